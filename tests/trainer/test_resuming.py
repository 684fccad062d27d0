"""A run resumes with other settings only where no finished step has read them; peak memory of a step."""

import json
import mmap
import os

import pytest
import torch
from run_cases import rewritten, stop_in
from test_run import SPENT, weights

from prism import cli
from prism.config import ConfigError, load_config
from prism.report import write_report
from prism.report.run_folder import read_run
from prism.runtime import checkpoint
from prism.runtime import memory as peak
from prism.runtime.log import read_metrics
from prism.runtime.resuming import READERS, resume


def begun(folder, done=("sft",), stage="warmup", step=2, models=("policy", "discriminator"), **changes):
    """Returns a folder as an interrupted run leaves it."""
    settings = load_config(None, changes).model_dump(mode="json")
    extra = {"done": list(done), "stage": stage, "step": step, "data": {}, "evaluations": {}, "changes": []}
    extra |= {"log": {"bytes": 0, "non_finite": {}}, "settings": settings}
    plain = dict.fromkeys(models, torch.nn.Identity())
    checkpoint.save(folder / "checkpoints", 2, plain, {}, extra)
    return folder


def check(folder, **changes):
    """Resumes the run of a folder as far as its settings, and returns the changed keys."""
    resumed = resume(load_config(None, {"run.folder": str(folder), **changes}), tell=pytest.fail)
    return None if resumed is None else [key for key, _, _ in resumed.changed if key != "run.folder"]


# in the middle of warm-up
REFUSED = {
    "run.seed": 1,
    "data.shapes.alignment": 100,
    "data.prompt_tokens": 100,
    "data.image_root": ".",
    # read by the loss of warm-up
    "discriminator.soft_clip": "none",
    # the discriminator was made of it
    "discriminator.experts": 8,
    "optimiser.sft.lr": 1e-5,
    "optimiser.warmup.lr": 1e-5,
    # warm-up answers alignment's prompts
    "rollout.align.temperature": 0.5,
    "rollout.align.max_new_tokens": 64,
    "run.stages": ["sft", "align", "rlvr"],
    "model.tiny.layers": 2,
}
FREE = {
    "log.console": "quiet",
    "log.stall_seconds": 5.0,
    "checkpoint.keep": 5,
    "memory.pack_tokens": 4096,
    "memory.activation_checkpointing": True,
    "run.device": "cpu",
    "rollout.engine": "stock",
    "rollout.cache_tokens": 50000,
    "evaluation.samples": 8,
    "evaluation.every": 3,
    "evaluation.max_new_tokens": 50,
    "data.max_skipped": 0.5,
    "data.on_error": "raise",
    "data.shapes.validation": 600,
    "data.shapes.rl": 100,
    "optimiser.rlvr.steps": 99,
    "algorithm.rlvr.name": "dapo",
    "rollout.rlvr.group": 4,
    # alignment has not begun, and these only alignment reads
    "rollout.align.group": 4,
    "rollout.align.prompts": 8,
    "discriminator.steps": 2,
    "optimiser.align.lr": 1e-6,
    "optimiser.align.steps": 7,
    "optimiser.discriminator.lr": 1e-6,
    "algorithm.align.kl_coef": 0.0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_changed_settings_are_refused_and_named(tmp_path, key):
    begun(tmp_path)
    with pytest.raises(ConfigError) as error:
        check(tmp_path, **{key: REFUSED[key]})
    first, *others, rule = str(error.value).splitlines()
    assert first.startswith(f"{key}: expected ") and "got " in first
    assert others == [] and rule.startswith("take another run.folder, or the old values; what may differ: log, ")


@pytest.mark.parametrize("key", FREE)
def test_settings_that_affect_no_finished_step_may_change(tmp_path, key):
    begun(tmp_path)
    assert key in check(tmp_path, **{key: FREE[key]})


def test_many_settings_may_change_at_once_and_each_is_named(tmp_path):
    begun(tmp_path)
    assert {*FREE} <= {*check(tmp_path, **FREE)}


def test_warm_up_on_files_of_its_own_reads_no_rollouts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    files = {"data.source": "files", "run.stages": ["warmup", "align"], "data.files.align": [str(path)]}
    own = {**files, "data.files.warmup": [str(path)]}
    changes = {"rollout.align.temperature": 0.5, "data.files.align": [str(path), str(path)]}
    (with_own := tmp_path / "own").mkdir()
    begun(with_own, done=(), **own)
    assert check(with_own, **{**own, **changes}) == ["data.files.align", "rollout.align.temperature"]
    (without := tmp_path / "without").mkdir()
    begun(without, done=(), **files)
    with pytest.raises(ConfigError, match=r"data.files.align: .*\nrollout.align.temperature: "):
        check(without, **{**files, **changes})


def test_a_begun_table_is_locked_and_a_later_one_is_not(tmp_path):
    for number, (stages, stage) in enumerate([((), "sft"), (("sft",), None), (("sft", "warmup"), "align")]):
        (folder := tmp_path / str(number)).mkdir()
        begun(folder, done=stages, stage=stage)
        read = {*stages, stage}
        for key, owner in (("optimiser.sft.weight_decay", "sft"), ("optimiser.warmup.weight_decay", "warmup"),
                           ("optimiser.discriminator.weight_decay", "align"), ("algorithm.align.alpha", "align"),
                           ("discriminator.aux_coef", "warmup"), ("optimiser.rlvr.weight_decay", "rlvr")):  # fmt: skip
            if owner in read:
                with pytest.raises(ConfigError, match=f"{key}: expected"):
                    check(folder, **{key: 0.5 if key != "algorithm.align.alpha" else 0.1})
            else:
                assert check(folder, **{key: 0.5 if key != "algorithm.align.alpha" else 0.1}) == [key]


def test_every_key_of_the_rules_is_a_setting():
    def flat(table, name=""):
        yield name
        for key, value in table.items() if isinstance(table, dict) else ():
            yield from flat(value, f"{name}.{key}" if name else key)

    assert {*READERS} <= {*flat(load_config().model_dump())}


# schedule, warm-up, steps done, old and new number of steps, whether it is accepted
STEPS = [
    ("constant", 0.0, 10, 20, 40, True),
    ("constant", 0.0, 10, 20, 10, True),
    ("constant", 0.0, 10, 20, 9, False),
    # 2 steps of warm-up become 4
    ("constant", 0.1, 10, 20, 40, False),
    ("constant", 3.0, 10, 20, 40, True),
    ("linear", 0.0, 10, 20, 40, False),
    ("cosine", 0.0, 1, 20, 40, False),
    # still in a warm-up of 12 steps
    ("cosine", 12.0, 10, 20, 40, True),
    ("cosine", 12.0, 14, 20, 40, False),
]


@pytest.mark.parametrize("schedule, warmup, done, old, new, accepted", STEPS)
def test_the_steps_of_a_stage_may_change_where_the_finished_ones_stay(
    tmp_path, schedule, warmup, done, old, new, accepted
):
    key = "optimiser.rlvr"
    given = {f"{key}.schedule": schedule, f"{key}.warmup": warmup, f"{key}.steps": old}
    begun(tmp_path, done=("sft",), stage="rlvr", step=done, **given)
    if accepted:
        assert check(tmp_path, **{**given, f"{key}.steps": new}) == [f"{key}.steps"]
    else:
        with pytest.raises(ConfigError, match=rf"optimiser.rlvr.steps: expected .* that are done, got {new}"):
            check(tmp_path, **{**given, f"{key}.steps": new})


def test_alignments_steps_also_set_the_rates_of_the_discriminator(tmp_path):
    given = {"optimiser.align.schedule": "constant", "optimiser.discriminator.schedule": "cosine"}
    begun(tmp_path, done=("sft",), stage="align", **given)
    with pytest.raises(ConfigError, match=r"optimiser.align.steps: .*optimiser.discriminator \(cosine"):
        check(tmp_path, **given, **{"optimiser.align.steps": 99})


def test_a_finished_stage_takes_no_more_steps_and_the_error_says_what_to_do(tmp_path):
    begun(tmp_path, done=("sft", "warmup", "align", "rlvr"), stage=None)
    with pytest.raises(
        ConfigError, match=r"optimiser.rlvr.steps: expected 40, this stage is finished, got 80"
    ) as error:
        check(tmp_path, **{"optimiser.rlvr.steps": 80})
    assert f"as model.policy ({tmp_path / 'policy'}" in str(error.value)


def test_stages_may_be_added_or_left_out_after_those_that_have_begun(tmp_path):
    begun(tmp_path, **{"run.stages": ["sft", "warmup", "align"]})
    for stages in (["sft", "warmup", "align", "rlvr"], ["sft", "warmup"], ["sft", "warmup", "rlvr"]):
        assert check(tmp_path, **{"run.stages": stages}) == ["run.stages"]
    for stages in (["base", "sft", "warmup"], ["sft"], ["warmup", "align"], ["sft", "distill", "warmup"]):
        with pytest.raises(ConfigError, match=r'run.stages: expected stages that begin with \["sft", "warmup"\]'):
            check(tmp_path, **{"run.stages": stages})


def test_a_discriminator_cannot_be_made_after_the_policy_that_it_was_to_be_made_of(tmp_path):
    begun(tmp_path, done=("base",), stage="sft", models=("policy",), **{"run.stages": ["base", "sft"]})
    with pytest.raises(ConfigError, match=r"run.stages: expected no stage with a discriminator"):
        check(tmp_path, **{"run.stages": ["base", "sft", "warmup"]})
    assert check(tmp_path, **{"run.stages": ["base", "sft", "rlvr"]}) == ["run.stages"]


def test_the_settings_of_a_discriminator_that_was_not_made_are_free(tmp_path):
    begun(tmp_path, done=(), stage="sft", models=("policy",), **{"run.stages": ["sft"]})
    changes = {"run.stages": ["sft", "warmup"], "discriminator.experts": 8, "optimiser.warmup.lr": 1e-5}
    assert check(tmp_path, **changes) == ["run.stages", "discriminator.experts", "optimiser.warmup.lr"]


def test_a_run_without_a_checkpoint_may_change_all_settings(tmp_path):
    begun(tmp_path)
    for path in checkpoint.checkpoints(tmp_path / "checkpoints"):
        path.rename(tmp_path / "gone")
    assert check(tmp_path, **{"run.seed": 1}) is None


def test_a_setting_missing_from_an_older_run_counts_as_its_default(tmp_path):
    begun(tmp_path)
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    state = json.loads((path / "state.json").read_text())
    del state["extra"]["settings"]["discriminator"]["kind_bias"]
    rewritten(path, state)
    assert check(tmp_path) == []
    with pytest.raises(ConfigError, match=r"discriminator.kind_bias: expected false"):
        check(tmp_path, **{"discriminator.kind_bias": True})


@pytest.mark.parametrize("config", [None, "{", "{}", '{"run": {"seed": 4}}'])
def test_the_settings_that_count_are_those_in_the_checkpoint(tmp_path, config):
    begun(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"run.seed: expected 0"):
        check(tmp_path, **{"run.seed": 4})
    assert check(tmp_path) == []


def test_the_command_refuses_before_a_model_is_built(tmp_path, monkeypatch, capsys):
    import prism.runtime.runtime

    begun(tmp_path)
    monkeypatch.setattr(prism.runtime.runtime, "build_policy", lambda config: pytest.fail("a model was built"))
    assert cli.main(["run", "--run.folder", str(tmp_path), "--run.seed", "4"]) == 2
    assert "prism run: run.seed: expected 0" in capsys.readouterr().err


# --- runs that go on with other settings


def records(one):
    lines = read_metrics(one.folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in SPENT} for line in lines]


def test_stages_and_steps_that_are_added_later_end_with_the_same_bits(tmp_path):
    """A run of SFT that gets more steps in its middle, and alignment after its end, equals the run that had all."""
    stages = ["sft", "warmup", "align"]
    final = {"optimiser.sft.schedule": "constant", "optimiser.sft.warmup": 0.0, "optimiser.sft.steps": 4}
    whole = stop_in(tmp_path / "whole", None, 0, **final, **{"run.stages": stages})
    folder = tmp_path / "parts"
    first = {**final, "run.stages": ["sft"], "optimiser.align.lr": 1.0}
    stop_in(folder, "sft", 2, **{**first, "optimiser.sft.steps": 3})
    stop_in(folder, None, 0, **first)
    assert read_run(folder).finished
    unfinished = stop_in(folder, "align", 1, **final, **{"run.stages": stages})
    # an export would now take the checkpoint, not the policy of the run's first end
    assert (folder / "evaluations.json").exists() and not read_run(folder).finished
    end = stop_in(folder, None, 0, **final, **{"run.stages": stages}, **{"evaluation.every": 2})
    assert unfinished.done != end.done == stages
    ours, wanted = weights(end), weights(whole)
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    assert records(end) == records(whole)
    # each change is recorded once, where it took effect
    assert json.loads((folder / "changes.json").read_text()) == [
        {"after": "step 2 of sft", "key": "optimiser.sft.steps", "old": 3, "new": 4},
        {"after": "the end of sft", "key": "run.stages", "old": ["sft"], "new": stages},
        {"after": "the end of sft", "key": "optimiser.align.lr", "old": 1.0, "new": 1e-4},
        {"after": "step 1 of align", "key": "evaluation.every", "old": 0, "new": 2},
    ]
    assert "align 2" in end.evaluations
    page = write_report(folder).read_text()
    assert "Changed when the run was resumed" in page and "<code>optimiser.sft.steps</code>" in page


def test_each_change_is_told_on_the_console(tmp_path, capsys):
    changes = {"run.stages": ["sft"], "log.console": "lines"}
    stop_in(tmp_path, "sft", 1, **changes)
    stop_in(tmp_path, "sft", 2, **changes, **{"memory.pack_tokens": 4096, "evaluation.samples": 3})
    told = capsys.readouterr().out
    assert "changed since step 1 of sft: memory.pack_tokens, 8192 → 4096" in told
    assert "changed since step 1 of sft: evaluation.samples, 4 → 3" in told


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot reset the peak")
def test_peak_memory_is_counted_from_the_last_reset():
    device = torch.device("cpu")
    size = 64 * 2**20
    peak.begin_peak(device)
    before = peak.peak_bytes(device)
    with mmap.mmap(-1, size) as held:
        held.write(b"1" * size)
        within = peak.peak_bytes(device)
    assert within - before > 0.9 * size
    peak.begin_peak(device)
    after = peak.peak_bytes(device)
    assert after < within - 0.9 * size


def test_peak_memory_where_the_system_cannot_reset_it(monkeypatch, tmp_path):
    """As on macOS: it is the highest value of the process's whole life."""
    device = torch.device("cpu")
    monkeypatch.setattr(peak, "_PROCESS", tmp_path / "none")
    first = peak.peak_bytes(device)
    peak.begin_peak(device)
    assert peak.peak_bytes(device) >= first > 2**20


def test_a_checkpoint_of_an_older_format_is_refused_with_both_formats(tmp_path, capsys):
    begun(tmp_path)
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    state = json.loads((path / "state.json").read_text())
    # the first format had no number
    del state["format"]
    (path / "state.json").write_text(json.dumps(state))
    assert cli.main(["run", "--run.folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"{path}: expected a checkpoint of format 3, got format 1" in told
    assert "finish the run with the version that began it, or take another run.folder" in told
    # a damaged checkpoint would have been renamed
    assert path.exists()
