"""What `make demo` shows, on a shorter run of its settings: every stage improves what it is for."""

import json
from pathlib import Path

import pytest

from prism.commands.run import run_stages
from prism.config import load_config
from prism.report.summary import improvements
from prism.runtime.log import read_metrics
from prism.runtime.runtime import Runtime

ROOT = Path(__file__).parents[2]
# the demo's settings, but for fewer steps and responses
SHORTER = {
    "optimiser.sft.steps": 160,
    "optimiser.warmup.steps": 40,
    # greedy alone: the responses at temperature 1 take as long again
    "evaluation.sampled": False,
    "log.rollouts_every": 0,
    "log.console": "quiet",
}
STAGES = ("sft", "warmup", "align", "rlvr")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a run of the demo's stages."""
    folder = tmp_path_factory.mktemp("demo")
    one = Runtime(load_config(ROOT / "configs" / "tiny.toml", {**SHORTER, "run.folder": str(folder)}))
    run_stages(one)
    return folder


def test_every_stage_improves_what_it_is_for(short):
    evaluations = json.loads((short / "evaluations.json").read_text())
    found = improvements(evaluations)
    assert [one.stage for one in found] == ["sft"] * 2 + ["warmup"] * 2 + ["align"] * 3 + ["rlvr"]
    assert [one for one in found if not one.holds and one.stage != "rlvr"] == []
    # two standard errors are for the whole run: this one is shorter, and rounding differs from machine to machine
    rise = found[-1].figures
    assert rise["after"] - rise["before"] > rise["standard_error"]
    # on enough held-out problems to tell
    assert evaluations["rlvr"]["test"]["samples"] >= 1000


def test_alignment_halves_the_errors_of_perception(short):
    evaluations = json.loads((short / "evaluations.json").read_text())
    assert evaluations["align"]["perception_error"] < evaluations["sft"]["perception_error"] / 2


def test_its_metrics_tell_the_same(short):
    steps = {}
    for row in read_metrics(short / "metrics.jsonl"):
        steps.setdefault(row["stage"], []).append(row)
    settings = load_config(ROOT / "configs" / "tiny.toml", SHORTER).optimiser
    assert {stage: len(rows) for stage, rows in steps.items()} == {s: getattr(settings, s).steps for s in STAGES}

    def ends(stage, name, count=10):
        values = [row[name] for row in steps[stage]]
        return sum(values[:count]) / count, sum(values[-count:]) / count

    first, last = ends("sft", "loss")
    assert last < first
    for channel in ("perception", "reasoning"):
        first, last = ends("warmup", f"d_accuracy_{channel}")
        assert last > max(first, 0.5)
        first, last = ends("align", f"drift_{channel}")
        assert last < first
    first, last = ends("rlvr", "reward")
    assert last > first
    assert not any("non_finite" in row for rows in steps.values() for row in rows)
