import json

import pytest
import torch

from prism.commands.run import run, run_stages
from prism.config import load_config
from prism.runtime.log import read_metrics
from prism.runtime.runtime import Runtime
from prism.runtime.signals import InterruptedRunError

SMALL = {
    "run.stages": ["base", "sft", "distill", "warmup", "align", "rlvr"],
    "model.tiny.hidden_size": 32,
    "model.tiny.intermediate_size": 48,
    "model.tiny.layers": 2,
    "model.tiny.heads": 2,
    "model.tiny.key_value_heads": 1,
    "model.tiny.vision_hidden_size": 32,
    "data.prompt_tokens": 96,
    "data.response_tokens": 128,
    "data.shapes.base": 64,
    "data.shapes.sft": 64,
    "data.shapes.sft_curated": 8,
    "data.shapes.alignment": 16,
    "data.shapes.rl": 64,
    "data.shapes.validation": 8,
    "data.shapes.test": 8,
    "rollout.align.prompts": 2,
    "rollout.align.group": 3,
    "rollout.align.max_new_tokens": 12,
    "rollout.rlvr.prompts": 2,
    "rollout.rlvr.group": 3,
    "rollout.rlvr.max_new_tokens": 12,
    "evaluation.samples": 4,
    "evaluation.max_new_tokens": 12,
    "checkpoint.every": 2,
    "log.console": "quiet",
}
for _stage in ("base", "sft", "distill", "warmup", "align", "rlvr"):
    SMALL[f"optimiser.{_stage}.steps"] = 3
    if _stage not in ("align", "rlvr"):
        SMALL[f"optimiser.{_stage}.batch"] = 4


# the metrics of a step that differ between two equal runs
SPENT = ("seconds", "peak_bytes")


def settings(folder, **changes):
    return load_config(None, {**SMALL, "run.folder": str(folder), **changes})


def weights(one):
    models = {"policy": one.policy, "discriminator": one.discriminator}
    return {f"{name}.{key}": value.clone() for name, m in models.items() for key, value in m.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of all stages."""
    one = Runtime(settings(tmp_path_factory.mktemp("whole")))
    run_stages(one)
    return one


def test_a_run_passes_through_all_stages_and_leaves_its_records(whole):
    records = read_metrics(whole.folder / "metrics.jsonl")
    stages = [record["stage"] for record in records]
    assert stages == [stage for stage in SMALL["run.stages"] for _ in range(3)]
    found = json.loads((whole.folder / "evaluations.json").read_text())
    assert list(found) == ["start", *SMALL["run.stages"]]
    assert {one["split"] for one in found.values()} == {"validation"} and found["sft"]["samples"] == 4
    # the last two stages are also evaluated on the whole test split
    assert [stage for stage in found if "test" in found[stage]] == SMALL["run.stages"][-2:]
    assert found["rlvr"]["test"]["samples"] == 8 and found["rlvr"]["test"]["sampled"]["samples"] == 8
    assert [stage for stage in found if "discriminator" in found[stage]] == ["warmup", "align"]
    lines = (whole.folder / "rollouts" / "rlvr-000001.jsonl").read_text().splitlines()
    assert len(lines) == 6 and {"question", "response", "reward", "advantage"} <= set(json.loads(lines[0]))
    # the trainer and the engine compute the same log-probabilities of the sampled tokens
    gaps = [record["engine_gap"] for record in records if "engine_gap" in record]
    assert len(gaps) == 6 and max(gaps) < 1e-4


def test_the_policy_loads_in_plain_transformers(whole):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(whole.folder / "policy")
    for (name, ours), theirs in zip(whole.policy.model.state_dict().items(), model.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert len(AutoTokenizer.from_pretrained(whole.folder / "policy")) == len(whole.encoder.tokenizer)


@pytest.mark.parametrize("stage, step", [("base", 1), ("warmup", 2), ("align", 1), ("align", 2), ("rlvr", 2)])
def test_an_interrupted_run_resumes_to_the_same_bits(whole, tmp_path, stage, step):
    first = Runtime(settings(tmp_path))
    write = first.log.step

    def stop_there(number, metrics, shown=None):
        write(number, metrics, shown)
        if (metrics_stage(first), number) == (stage, step):
            first.ask_to_stop()

    first.log.step = stop_there
    with pytest.raises(InterruptedRunError):
        run_stages(first)
    first.log.close()
    again = Runtime(settings(tmp_path))
    run_stages(again)
    ours, wanted = weights(again), weights(whole)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    lines = [[{k: v for k, v in r.items() if k not in SPENT} for r in read_metrics(one.folder / "metrics.jsonl")]
             for one in (again, whole)]  # fmt: skip
    assert lines[0] == lines[1]
    assert again.evaluations == whole.evaluations


def metrics_stage(one):
    return one.log._stage


def test_rerunning_a_finished_run_changes_nothing(whole):
    before = weights(whole)
    assert run(settings(whole.folder)) == 0
    again = Runtime(settings(whole.folder))
    again.restore()
    assert all(torch.equal(value, before[name]) for name, value in weights(again).items())


def test_alignment_alone_trains_both_models_in_training_mode(tmp_path):
    with Runtime(settings(tmp_path, **{"run.stages": ["align"]})) as one:
        assert not one.discriminator.backbone.training, (
            "the discriminator must start in evaluation mode, or this test shows nothing"
        )
        optimisers = one.config.optimiser
        next(one.steps("align", policy=optimisers.align, discriminator=optimisers.discriminator))
        assert all(module.training for model in (one.policy, one.discriminator) for module in model.modules())


def test_rlvr_trains_with_each_other_algorithm(tmp_path):
    changes = {
        "run.stages": ["align", "rlvr"],
        "optimiser.align.steps": 1,
        "optimiser.rlvr.steps": 1,
        "algorithm.align.token_credit": True,
        "optimiser.rlvr.batch": 3,
    }
    for name in ("dapo", "gspo", "dr_grpo", "rloo", "cispo", "reinforce_pp"):
        own = {"algorithm.rlvr.name": name} | ({"algorithm.rlvr.overlong": "none"} if name == "dapo" else {})
        one = Runtime(settings(tmp_path / name, **changes, **own))
        run_stages(one)
        record = read_metrics(one.folder / "metrics.jsonl")[-1]
        assert record["stage"] == "rlvr" and record["loss"] is not None, name
        if name == "dapo":
            # an untrained policy answers nothing correctly: no group is informative, so every try is used
            assert record["tries"] == 10
