"""A run of all stages on a real folder equals itself after SIGTERM and a resume, and equals single commands."""

import json
import re

from real_runs import CAP, SMALLER, STAGES, STOP_AFTER, different, evaluations_of, records_of, weights_of
from transformers import AutoTokenizer

from prism.runtime.log import read_metrics
from prism_kernels.segments import Reason, find_segments, token_bytes

# as a shell says of a process that SIGTERM has ended
STOPPED = 143


def test_every_stage_trains(whole):
    settings = json.loads((whole / "config.json").read_text())
    assert settings["memory"]["activation_checkpointing"] and settings["model"]["max_image_pixels"] == CAP
    assert settings["model"]["dtype"] == "bfloat16" and tuple(settings["run"]["stages"]) == STAGES
    records = read_metrics(whole / "metrics.jsonl")
    wanted = [(stage, step + 1) for stage in STAGES for step in range(SMALLER[f"optimiser.{stage}.steps"])]
    assert [(record["stage"], record["step"]) for record in records] == wanted
    for stage, norm in (("sft", "grad_norm"), ("warmup", "d_grad_norm"), ("align", "grad_norm"),
                        ("align", "d_grad_norm"), ("rlvr", "grad_norm")):  # fmt: skip
        assert all(record[norm] > 0 for record in records if record["stage"] == stage), (stage, norm)
    # nothing was skipped, and the engine computes the trainer's log-probabilities, up to bf16's rounding
    assert sum(record.get("skipped", 0) + record.get("d_skipped", 0) for record in records) == 0
    assert max(record.get("engine_gap", 0) for record in records) < 0.2
    losses = [record["loss"] for record in records if record["stage"] == "sft"]
    assert losses[-1] < losses[0] / 2
    # responses in the right form, without which neither the discriminator nor DAPO has anything to learn from
    assert all(record["valid"] > 0.25 for record in records if record["stage"] == "align")
    assert evaluations_of(whole)["rlvr"]["test"]["format"] > 0.5


def test_a_row_over_the_limit_is_skipped_and_counted_once(whole):
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["rows_skipped"] for record in records if record["stage"] == "sft"][-1] == 1
    assert {record["rows_skipped"] for record in records if record["stage"] != "sft"} == {0}
    (line,) = (whole / "skipped-sft.jsonl").read_text().splitlines()
    assert (json.loads(line)["row"], json.loads(line)["cause"]) == (4, "too long")


def test_sigterm_stops_a_run_after_its_step_with_a_checkpoint(stopped, single):
    before = sum(SMALLER[f"optimiser.{stage}.steps"] for stage in ("sft", "warmup"))
    for run, finished in ((stopped, before), (single.align, 0)):
        assert run.status == STOPPED
        assert "Traceback" not in run.said and "rerun the same command to resume" in run.said
        *_, last = read_metrics(run.halted / "metrics.jsonl")
        # the signal comes while a step runs, which ends first
        assert last["stage"] == "align" and STOP_AFTER <= last["step"] <= STOP_AFTER + 2
        newest = sorted(path.name for path in (run.halted / "checkpoints").iterdir())[-1]
        assert newest == f"step-{finished + last['step']:08d}"
        assert f"resuming after step {last['step']} of align" in run.resumed
        again = re.findall(r"^(\w+) +(\d+)/", run.resumed, re.MULTILINE)
        assert again[0] == ("align", str(last["step"] + 1))


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(whole, stopped):
    for model in ("policy", "discriminator"):
        assert different(stopped.folder / model, whole / model) == [], model
    assert records_of(stopped.folder) == records_of(whole)
    assert evaluations_of(stopped.folder) == evaluations_of(whole)
    for name in ("rollouts", "skipped-sft.jsonl"):
        ours, theirs = stopped.folder / name, whole / name
        files = sorted(path.name for path in theirs.iterdir()) if theirs.is_dir() else [""]
        assert [file for file in files if (ours / file).read_bytes() != (theirs / file).read_bytes()] == [], name


def test_single_commands_equal_the_run(whole, single):
    folders = single.folders
    # a stage's randomness follows from the seed, the stage and the step; its optimisers begin anew; a policy is saved
    # in the dtype that it has, the value head in fp32. so nothing is left that could differ
    assert different(folders["rlvr"] / "policy", whole / "policy") == []
    assert different(folders["align"] / "discriminator", whole / "discriminator") == []
    assert [record for stage in STAGES for record in records_of(folders[stage])] == records_of(whole)
    for stage in STAGES:
        ours, theirs = evaluations_of(folders[stage])[stage], evaluations_of(whole)[stage]
        # the test split is measured around the last stage of each command
        assert {**ours, "test": None} == {**theirs, "test": None}, stage
        assert theirs.get("test", ours["test"]) == ours["test"], stage


def test_models_are_saved_as_they_came(place, whole):
    policy, base = weights_of(whole / "policy"), weights_of(place.folder / "policy")
    # a tied head is not written twice
    assert policy.keys() == base.keys() and "lm_head.weight" not in policy
    assert {name: (value.dtype, value.shape) for name, value in policy.items()} == {
        name: (value.dtype, value.shape) for name, value in base.items()
    }
    assert any(not value.equal(base[name]) for name, value in policy.items())
    written = json.loads((whole / "policy" / "config.json").read_text())
    assert written["tie_word_embeddings"] and written["dtype"] == "bfloat16"
    for name in ("generation_config.json", "video_preprocessor_config.json"):
        ours, theirs = (
            json.loads((folder / name).read_text()) for folder in (whole / "policy", place.folder / "policy")
        )
        assert {**ours, "transformers_version": None} == {**theirs, "transformers_version": None}, name
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (whole / "policy", place.folder / "policy")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert [(one.eos_token, one.pad_token, one.bos_token) for one in tokenizers] == [
        ("<|im_end|>", "<|endoftext|>", None)
    ] * 2


def test_letters_inside_a_tag_s_token_are_answers(place, whole):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "policy")
    table = token_bytes(tokenizer)
    rollouts = [
        json.loads(line) for path in sorted((whole / "rollouts").iterdir()) for line in path.read_text().splitlines()
    ]
    letters = [one for one in rollouts if re.search(r"<answer>[A-D]</answer>$", one["response"])]
    valid = [one for one in letters if one["reason"] in (None, "right", "wrong")]
    assert len(valid) > 20
    for one in valid:
        ids = tokenizer(one["response"], add_special_tokens=False)["input_ids"]
        # the letter is part of a token that begins with the tag's bracket
        assert tokenizer.convert_ids_to_tokens(ids)[-4] == f">{one['response'][-10]}"
        assert find_segments(ids, [0, len(ids)], table).reason.item() == Reason.VALID
    rewarded = [one for one in valid if "reward" in one]
    assert {one["reason"] for one in rewarded} == {"right", "wrong"}
    for one in rewarded:
        assert (one["reason"] == "right") == (one["response"][-10] == one["answer"])
