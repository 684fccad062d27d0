"""The experiment's arms, scheduling and page; the measurements here are invented."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.reproduce import __main__ as command
from bench.reproduce import page, scheduler
from bench.reproduce.arms import ABLATION, SIZES, Arm, arms, chosen, curve, long_steps
from bench.reproduce.figures import ahead, collect, compare, crossings, halved, mean_and_error, seed_figures, summarise
from bench.reproduce.jobs import FINISHED, MADE_WITH, Experiment, Job, JobError
from bench.reproduce.plots import draw_all
from prism.commands.run import run as run_prism
from prism.config import Config, load_config
from prism.runtime.log import read_metrics
from prism.runtime.runtime import Runtime
from tests.trainer.test_run import SMALL

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.toml"
QUICK = {key: value for key, value in SMALL.items() if key not in ("run.stages", "log.console")}


def experiment(out, algorithm="grpo", **changes):
    return Experiment(TINY, {**QUICK, **changes}, algorithm, out)


# --- the arms


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_every_arm_has_valid_settings(algorithm, tmp_path):
    found = Experiment(TINY, {}, algorithm, tmp_path)
    for seed in (0, 2):
        for arm in found.arms.values():
            settings = found.settings(Job(seed, arm), planned=True)
            assert settings.run.stages == arm.stages and settings.run.seed == settings.data.shapes.seed == seed
            assert settings.evaluation.temperature == 0 and settings.evaluation.sampled
            assert settings.data.shapes.test >= 1000
            if arm.reinforces:
                # the preset's options, except the KL term, which comes from the file and is the same for all algorithms
                preset = load_config(None, {"algorithm.rlvr.name": algorithm}).algorithm.rlvr
                assert settings.algorithm.rlvr == preset.model_copy(update={"kl_coef": 0.05, "kl_estimator": "k3"})
    ablated = found.arms["align_dense"], found.arms["align_no_warmup"]
    assert found.settings(Job(0, ablated[0]), planned=True).discriminator.dense
    assert ablated[1].stages == ("align",)


def test_choosing_an_arm_also_chooses_the_arms_it_starts_from(tmp_path):
    known = arms(load_config(TINY), "grpo")
    names = list(known)
    for arm in known.values():
        assert all(names.index(needed) < names.index(arm.name) for needed in arm.after)
    assert list(chosen(known, ["long_rlvr"])) == ["sft", "rlvr", "align", "prism", "long_rlvr"]
    assert {arm.part for arm in chosen(known, None).values()} == {"main", "curve"}
    assert list(chosen(known, ["prism_dense"])) == ["sft", "align_dense", "prism_dense"]
    with pytest.raises(SystemExit, match=r"expected some of sft, rlvr, .*, got 'prsm'"):
        chosen(known, ["prsm"])


def test_the_curve_starts_from_an_sft_without_demonstrations():
    seen = load_config(TINY, {"data.shapes.sft_curated": 400, "data.shapes.alignment": 400})
    found = arms(seen, "grpo")
    assert found["clean_sft"].changes == {"data.shapes.sft_curated": 0}
    for n in SIZES:
        for name in curve(seen)[n]:
            assert found[name].parent == "clean_sft" and found[name].changes["data.shapes.alignment"] == n
    # if no SFT has seen demonstrations, the curve shares the SFT and arms of the main part
    unseen = load_config(TINY, {"data.shapes.sft_curated": 0, "data.shapes.alignment": 400})
    found = arms(unseen, "grpo")
    assert "clean_sft" not in found and "align_400" not in found
    assert curve(unseen)[400] == ("align", "distill") and found["align_12"].parent == "sft"
    assert all(found[name].part != ABLATION for pair in curve(unseen).values() for name in pair)


def test_the_longer_rlvr_gets_the_time_of_alignment_and_rlvr(tmp_path):
    assert long_steps(spent=300.0, seconds=50.0, steps=40) == 240
    assert long_steps(spent=0.1, seconds=50.0, steps=40) == 1
    found = experiment(tmp_path)

    def took(name, **stages):
        folder = found.folder(Job(0, found.arms[name]))
        folder.mkdir(parents=True)
        lines = [{"stage": s, "step": i + 1, "seconds": t} for s, each in stages.items() for i, t in enumerate(each)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    took("rlvr", rlvr=[2.0, 1.0])
    took("align", warmup=[4.0], align=[5.0, 6.0])
    took("prism", rlvr=[1.5, 1.5])
    for folder in (found.folder(Job(0, found.arms["sft"])) / "policy", found.base_folder(0)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    settings = found.settings(Job(0, found.arms["long_rlvr"]))
    # 18 seconds, at 1.5 seconds per step
    assert settings.optimiser.rlvr.steps == 12
    assert settings.model.policy == str(tmp_path / "seed-0" / "sft" / "policy")


# --- measurements


def share(perception, accuracy, reasoning=0.2, samples=1024):
    found = {"perception_error": perception, "reasoning_error": reasoning, "accuracy": accuracy}
    more = {"format": 0.99, "length": 40.0, "drift_perception": 0.1, "drift_reasoning": 0.2}
    return {**found, **more, "accuracy_se": 0.01, "samples": samples}


def made_up(seeds=3, algorithm="grpo", **levels):
    """Returns invented measurements in which each arm has the given perception error and accuracy."""
    given = {
        "sft": (0.25, 0.72),
        "rlvr": (0.13, 0.91),
        "align": (0.06, 0.83),
        "prism": (0.05, 0.93),
        "long_rlvr": (0.10, 0.94),
        "distill": (0.035, 0.95),
        "distill_rlvr": (0.03, 0.955),
        "clean_sft": (0.26, 0.71),
        "align_12": (0.07, 0.82),
        "distill_12": (0.15, 0.76),
        "align_40": (0.08, 0.88),
        "distill_40": (0.075, 0.86),
        "align_400": (0.06, 0.89),
        "distill_400": (0.035, 0.95),
        **levels,
    }
    config = load_config(TINY, {"data.shapes.sft_curated": 400, "data.shapes.alignment": 400})
    known = arms(config, algorithm)
    found = {}
    for place, (name, (perception, accuracy)) in enumerate(given.items()):
        by_seed = {}
        for seed in range(seeds):
            off = 0.004 * ((seed + place) % 3 - 1)
            by_seed[str(seed)] = {
                "samples": 1024,
                "greedy": share(perception + off, accuracy - off),
                "sampled": share(perception + 0.08 + off, accuracy - 0.06 - off),
                "validation": {},
                "discriminator": {},
                "seconds": dict.fromkeys(known[name].stages, 50.0 + seed),
                "steps": dict.fromkeys(known[name].stages, 40 + seed * (name == "long_rlvr")),
            }
        arm = known[name]
        own = {"title": arm.title, "part": arm.part, "parent": arm.parent, "stages": list(arm.stages)}
        found[name] = {**own, "changes": dict(arm.changes), "seeds": by_seed}
    head = {"machine": "a machine", "versions": {"torch": "1", "transformers": "2"}, "date": "2026-01-01"}
    sizes = {str(n): list(names) for n, names in curve(config).items()}
    measured = {"algorithm": algorithm, "settings": {}, "curve_arms": sizes, "arms": found}
    return {**head, "at_once": 2, **summarise(measured)}


def test_means_have_standard_errors_over_seeds():
    assert mean_and_error([1.0, 2.0, 6.0]) == [3.0, pytest.approx((7 / 3) ** 0.5)]
    assert mean_and_error([2.5]) == [2.5, None]
    content = made_up()
    assert content["arms"]["sft"]["mean"]["greedy"]["perception_error"] == [
        pytest.approx(0.25),
        pytest.approx(0.004 / 3**0.5),
    ]
    # distillation and RLVR took 50, 51 and 52 seconds each; the SFT, which all arms share, is not counted
    assert content["arms"]["distill_rlvr"]["seconds_after_sft"] == [pytest.approx(102), pytest.approx(2 / 3**0.5)]
    assert content["arms"]["prism"]["seconds_after_sft"][0] == pytest.approx(153)
    assert content["arms"]["sft"]["seconds_after_sft"] == [0.0, None]


def test_differences_are_taken_seed_by_seed():
    content = made_up()
    found = compare(content["arms"], "prism", "rlvr", "greedy", "accuracy")
    own = [content["arms"][name]["seeds"][seed]["greedy"]["accuracy"] for name in ("prism", "rlvr") for seed in "012"]
    assert found["differences"] == pytest.approx([a - b for a, b in zip(own[:3], own[3:])])
    assert found["mean"] == pytest.approx(0.02)

    def verdict(name, mean, error):
        return ahead({"share": name, "mean": mean, "standard_error": error})

    assert verdict("accuracy", 0.05, 0.02) == 1 and verdict("accuracy", -0.05, 0.02) == -1
    assert verdict("perception_error", 0.05, 0.02) == -1 and verdict("perception_error", 0.03, 0.02) == 0
    # one seed has no standard error and gives no verdict
    assert verdict("accuracy", 0.5, None) == 0


def test_halving_the_error_is_judged_on_every_seed():
    found = halved(made_up()["arms"])["greedy"]
    assert list(found) == ["0", "1", "2"] and all(one["halved"] for one in found.values())
    # errors after alignment are .120, .112, .116; half of SFT's are .123, .125, .127
    assert all(one["halved"] for one in halved(made_up(align=(0.116, 0.8))["arms"])["greedy"].values())
    mixed = halved(made_up(align=(0.125, 0.8))["arms"])["greedy"]
    assert [one["halved"] for one in mixed.values()] == [False, True, True]
    assert halved({}) == {}


def test_crossings_are_interpolated_over_the_logarithm_of_the_size():
    assert crossings([(10, 1.0), (1000, -1.0)]) == [pytest.approx(100)]
    assert crossings([(10, 3.0), (1000, -1.0)]) == [pytest.approx(10 * 100**0.75)]
    assert crossings([(12, 0.1), (40, 0.2), (400, 0.01)]) == []
    assert crossings([(12, 0.1), (40, -0.1), (400, 0.1)]) == [pytest.approx(480**0.5), pytest.approx(16000**0.5)]
    # a difference of zero is a crossing only if the sign changes there
    assert crossings([(12, 0.1), (40, 0.0), (400, -0.1)]) == [40.0]
    assert crossings([(12, 0.1), (40, 0.0), (400, 0.1)]) == []
    assert crossings([(12, 0.0), (40, 0.0)]) == []
    by_share = {(one["draw"], one["share"]): one for one in made_up()["curve"]}
    (at,) = by_share["greedy", "perception_error"]["crossings"]
    assert 12 < at < 40
    (at,) = by_share["greedy", "accuracy"]["crossings"]
    assert 40 < at < 400
    better = {f"align_{n}": (0.01, 0.99) for n in SIZES}
    assert not any(one["crossings"] for one in made_up(**better)["curve"] if one["share"] != "reasoning_error")


# --- the page


def statements(**levels):
    return page.block([made_up(**levels)])


def test_the_page_states_the_results():
    made = statements()
    assert made.startswith(page.BEGIN) and made.endswith(page.END)
    assert "at most half of SFT's?** Greedy: yes, on every seed (seed 0: 0.246 → 0.064, yes;" in made
    assert "**Best perception error of greedy responses**: SFT → distillation → RLVR with 0.030 ± 0.002" in made
    assert "the lines cross at about" in made and "![alignment and distillation by number" in made
    assert "| SFT → RLVR, longer | 0.100 ± 0.002 |" in made and "| 40–42 |" in made
    both = page.block([made_up(), made_up(algorithm="dapo")])
    assert both.count("at most half of SFT's?** Greedy") == both.count("![alignment and distillation by number") == 1
    assert "### RLVR by DAPO" in both and "dapo_arms.svg" in both
    worse = statements(align=(0.24, 0.8), prism=(0.2, 0.7))
    assert "Greedy: no, on no seed (" in worse
    mixed = statements(align=(0.125, 0.8))
    assert "Greedy: on 2 of 3 seeds (" in mixed
    better = statements(**{f"align_{n}": (0.01, 0.99) for n in SIZES})
    assert "perception error of greedy responses**: no crossing; the better one is alignment at 12 (−0.140" in better
    assert "distillation (" not in better.split("Alignment against distillation, accuracy")[1].split("\n")[0]


def test_one_seed_or_an_unfinished_experiment_gives_no_unsupported_verdict():
    content = made_up(seeds=1)
    made = page.block([content])
    assert (
        "± 0" not in made
        and "on the only seed" in made
        and "standard errors" not in page._leader(content["arms"], ["prism", "rlvr"], "greedy", "accuracy")
    )
    part = made_up()
    measured = {**part, "arms": {name: part["arms"][name] for name in ("sft", "rlvr", "clean_sft", "align_12")}}
    made = page.block([{**part, **summarise(measured)}])
    assert "at most half" not in made and "Alignment against distillation" not in made
    assert "Not measured yet" in page.block([])
    # a measurement that one seed lacks has no mean
    del part["arms"]["sft"]["seeds"]["1"]["greedy"]["drift_perception"]
    assert "not measured" in page.block([{**part, **summarise(part)}])


def test_the_page_matches_the_committed_results():
    text = page.PAGE.read_text()
    made = page.block(page.load_all(page.RESULTS))
    assert made in text, "run `python -m bench.reproduce --collect`, or put back the results of the page"
    assert page.insert(text, made) == text
    for content in page.load_all(page.RESULTS):
        for picture in ("arms", "curve"):
            assert (page.RESULTS / f"{content['algorithm']}_{picture}.svg").is_file()


def test_the_pictures_show_every_arm(tmp_path):
    drawn = draw_all(made_up(), tmp_path / "grpo")
    assert [path.name for path in drawn] == ["grpo_arms.svg", "grpo_curve.svg"]
    again = draw_all(made_up(), tmp_path / "again" / "grpo")
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in again]


# --- running


FAKE = """
import json, pathlib, sys, time, tomllib
settings = pathlib.Path(sys.argv[1])
folder, stages = settings.parent, tomllib.loads(settings.read_text())["run"]["stages"]
steps = tomllib.loads(settings.read_text())["optimiser"]
(folder / "began").open("a").write("x")
if folder.name == "align_12":
    sys.exit("made to fail")
time.sleep(float(sys.argv[2]))
records = [{"stage": s, "step": i + 1, "seconds": 0.5} for s in stages for i in range(steps[s]["steps"])]
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
figures = json.loads(sys.argv[3])
(folder / "policy").mkdir(exist_ok=True)
for name, text in (("config.json", "{}"), ("model.safetensors", settings.read_text())):
    (folder / "policy" / name).write_text(text)
found = {stage: {**figures, "test": {**figures, "sampled": figures}, "sampled": figures} for stage in stages}
(folder / "evaluations.json").write_text(json.dumps(found))
"""
REAL_POPEN = subprocess.Popen


@pytest.fixture
def without_training(monkeypatch):
    """Replaces the training of each arm by a program that only writes a run's files."""
    started = []

    def popen(arguments, **named):
        started.append(Path(arguments[-1]).parent.name)
        figures = json.dumps(share(0.1, 0.9))
        return REAL_POPEN([sys.executable, "-c", FAKE, arguments[-1], "0.05", figures], **named)

    def write_base(self, seed):
        self.base_folder(seed).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (self.base_folder(seed) / name).write_text("{}")

    monkeypatch.setattr(scheduler.subprocess, "Popen", popen)
    monkeypatch.setattr(Experiment, "write_base", write_base)
    return started


def run(found, names, told, at_once=2, seeds=(0,)):
    jobs = [Job(seed, arm) for seed in seeds for arm in chosen(found.arms, names).values()]
    return scheduler.run_all(
        found, jobs, at_once=at_once, tell=told.append, figures=lambda job: str(seed_figures(found, job)["samples"])
    )


def test_finished_arms_are_not_run_again_and_changed_settings_are_refused(tmp_path, without_training):
    told = []
    assert run(experiment(tmp_path), ["long_rlvr"], told, seeds=(0, 1))
    # two run at once, so either seed may be the last
    assert len(told) == 10 and told[-1].startswith("10/10  seed ")
    names = ["sft", "rlvr-grpo", "align", "prism-grpo", "long_rlvr-grpo"]
    assert sorted(without_training) == sorted(2 * names)
    # only the interrupted arm and the new one run
    (tmp_path / "seed-1" / "rlvr-grpo" / FINISHED).unlink()
    without_training.clear()
    again = []
    assert run(experiment(tmp_path), ["long_rlvr", "distill"], again, seeds=(0, 1))
    assert sorted(without_training) == ["distill", "distill", "rlvr-grpo"]
    assert sum("finished before" in line for line in again) == 9
    # another algorithm runs only its RLVR, from the same alignment
    without_training.clear()
    assert run(experiment(tmp_path, "dapo"), ["prism"], [])
    assert without_training == ["prism-dapo"]
    with pytest.raises(JobError, match=r"seed-0/sft: expected .* \(optimiser.sft.steps 3, now 7\); --replace"):
        run(experiment(tmp_path, **{"optimiser.sft.steps": 7}), ["sft"], [])
    # a setting of alignment does not affect SFT
    changed = experiment(tmp_path, **{"optimiser.align.steps": 5})
    changed.check(Job(0, changed.arms["sft"]))
    with pytest.raises(JobError, match=r"seed-0/align: .*optimiser.align.steps 3, now 5"):
        run(changed, ["prism"], [])
    left_out = []
    assert list(collect(changed, (0, 1), left_out.append)["arms"]) == ["sft", "rlvr", "distill"]
    # the arms that start from alignment are left out too
    assert len(left_out) == 6 and all("/align: expected" in line for line in left_out)
    changed.replace = True
    without_training.clear()
    assert run(changed, ["prism"], [])
    assert sorted(without_training) == ["align", "prism-grpo"]
    # the weights that an arm started from have changed
    (tmp_path / "seed-0" / "sft" / "policy" / "model.safetensors").write_text("others")
    with pytest.raises(JobError, match=r"seed-0/rlvr-grpo: expected .*policy"):
        run(experiment(tmp_path), ["rlvr"], [])
    made = json.loads((tmp_path / "seed-0" / "align" / MADE_WITH).read_text())
    assert made["settings"]["run.seed"] == 0 and set(made["weights"]) == {"policy", "base"}


def test_a_failed_arm_stops_only_those_that_need_it(tmp_path, without_training):
    found, told = experiment(tmp_path, **{"data.shapes.sft_curated": 8}), []
    broken = Arm("after", "after", "main", ("rlvr",), "align_12")
    found.arms["after"] = broken
    jobs = [Job(0, arm) for arm in (*chosen(found.arms, ["align_12", "distill_12"]).values(), broken)]
    assert not scheduler.run_all(found, jobs, at_once=2, tell=told.append, figures=lambda job: "")
    (failed,) = (line for line in told if "failed: exit status 1" in line)
    assert "align_12" in failed and "made to fail" in failed
    assert any("after" in line and "needs an arm that failed" in line for line in told)
    assert found.finished(Job(0, found.arms["distill_12"]))
    # the same command tries a failed arm again
    without_training.clear()
    assert not scheduler.run_all(found, jobs, at_once=2, tell=told.append, figures=lambda job: "")
    assert without_training == ["align_12"]


def test_the_command_writes_figures_and_pictures(tmp_path, without_training, capsys):
    given = [f"--{key}={json.dumps(value)}" for key, value in QUICK.items()]
    given += ["--config", str(TINY), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert command.main([*given, "--arms", "prism", "--seeds", "0", "1"]) == 0
    content = json.loads((tmp_path / "results" / "grpo.json").read_text())
    assert list(content["arms"]) == ["sft", "align", "prism"] and content["halved"]["greedy"]["0"]["halved"] is False
    assert content["settings"]["optimiser.sft.steps"] == 3 and "torch" in content["versions"]
    assert (tmp_path / "results" / "grpo_arms.svg").is_file()
    assert command.main([*given, "--optimiser.sft.stps", "3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


DRIVER = """
import subprocess, sys
from pathlib import Path
from bench.reproduce import scheduler
from bench.reproduce.jobs import Experiment, Job
popen = subprocess.Popen
subprocess.Popen = lambda arguments, **named: popen([sys.executable, "-c", sys.argv[3], arguments[-1]], **named)
Experiment.write_base = lambda self, seed: None
Experiment.made_with = lambda self, job, settings: {}
found = Experiment(sys.argv[1], {}, "grpo", Path(sys.argv[2]))
scheduler.run_all(found, [Job(0, found.arms["sft"])], at_once=2, tell=print, figures=lambda job: "")
"""
SLOW = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]).parent
try:
    (folder / "began").write_text("")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    (folder / "ended").write_text("well")
"""


def test_a_terminated_experiment_waits_for_its_arms_and_keeps_its_lock(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(TINY), str(tmp_path), SLOW], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "seed-0" / "sft"
    wait_for(folder / "began", process)
    # another command must wait while an arm runs
    lock = os.open(tmp_path / ".lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0 and "KeyboardInterrupt" in process.stderr.read()
    assert (folder / "ended").read_text() == "well"
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def wait_for(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_arms_in_sequence_equal_one_run_of_all_stages(tmp_path):
    found = experiment(tmp_path / "arms")
    found.write_base(0)
    parts = ("sft", "align", "prism")
    for name in parts:
        job = Job(0, found.arms[name])
        run_prism(load_config(found.prepare(job)))
        assert found.finished(job)
        found.check(job)
        assert set(seed_figures(found, job)["seconds"]) == set(job.arm.stages)
    stages = [stage for name in parts for stage in found.arms[name].stages]
    changes = {"run.folder": str(tmp_path / "whole"), "run.stages": stages}
    run_prism(load_config(TINY, {**QUICK, **changes}))
    ours, wanted = (
        load_file(folder / "policy" / "model.safetensors")
        for folder in (found.folder(Job(0, found.arms["prism"])), tmp_path / "whole")
    )
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)
    paths = [found.folder(Job(0, found.arms[name])) for name in parts]
    whole, *records = (
        [steady(r) for r in read_metrics(path / "metrics.jsonl")] for path in (tmp_path / "whole", *paths)
    )
    assert [record for part in records for record in part] == whole
    # each arm changed the policy; the discriminators start equal, though no valid response trains them here
    for one, other in pairwise(load_file(path / "policy" / "model.safetensors") for path in paths):
        assert any(not torch.equal(one[key], other[key]) for key in one)
    joined = Runtime(load_config(TINY, {**QUICK, **changes, "run.folder": str(tmp_path / "one")})).discriminator
    settings = found.settings(Job(0, found.arms["align"])).model_dump()
    settings["run"]["folder"] = str(tmp_path / "two")
    split = Runtime(Config.model_validate(settings)).discriminator.state_dict()
    assert all(torch.equal(split[key], value) for key, value in joined.state_dict().items())


def steady(record):
    """Returns a step's record without the metrics that differ between equal runs."""
    return {key: value for key, value in record.items() if key not in ("seconds", "peak_bytes")}
