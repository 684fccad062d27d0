"""A run resumes with other settings only where they do not affect its finished steps; peak memory of a step."""

import json
import mmap
import os

import pytest
import torch

from prism import cli
from prism.config import ConfigError, load_config
from prism.runtime import checkpoint
from prism.runtime import memory as peak
from prism.runtime.checkpoint import check_settings


def begun(folder, done=("sft",), stage="warmup", **changes):
    """Returns a folder as an interrupted run leaves it."""
    (folder / "config.json").write_text(load_config(None, changes).model_dump_json())
    extra = {"done": list(done), "stage": stage, "step": 2}
    checkpoint.save(folder / "checkpoints", 2, {}, {}, extra)
    return folder


def now(folder, **changes):
    return load_config(None, {"run.folder": str(folder), **changes})


REFUSED = {
    "run.seed": 1,
    "data.shapes.rl": 100,
    "data.prompt_tokens": 100,
    "discriminator.soft_clip": "none",
    "evaluation.samples": 8,
    "optimiser.sft.lr": 1e-5,
    "optimiser.warmup.steps": 99,
    # warm-up answers alignment's prompts
    "rollout.align.temperature": 0.5,
    "run.stages": ["sft", "warmup"],
    "model.tiny.layers": 2,
}
FREE = {
    "log.console": "quiet",
    "checkpoint.keep": 5,
    "memory.pack_tokens": 4096,
    "memory.activation_checkpointing": True,
    "run.device": "cpu",
    "rollout.cache_tokens": 50000,
    "optimiser.rlvr.steps": 99,
    "algorithm.rlvr.name": "dapo",
    "rollout.rlvr.group": 4,
}


@pytest.mark.parametrize("key", REFUSED)
def test_changed_settings_are_refused_and_named(tmp_path, key):
    begun(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_settings(now(tmp_path, **{key: REFUSED[key]}))
    first, *others, rule = str(error.value).splitlines()
    assert first.startswith(f"{key}: expected ") and f"with which the run in '{tmp_path}' began" in first
    assert others == [] and rule.startswith("take another run.folder, or the old values; what may differ: log, ")


def test_settings_that_affect_no_finished_step_may_change(tmp_path):
    begun(tmp_path)
    check_settings(now(tmp_path, **FREE))
    # alignment has not begun and no earlier stage reads its tables, so they may change too
    (other := tmp_path / "other").mkdir()
    begun(other, done=(), stage="sft")
    check_settings(now(other, **{"optimiser.align.lr": 1e-6, "optimiser.discriminator.lr": 1e-6}))
    with pytest.raises(ConfigError, match=r"optimiser.discriminator.lr: expected 0.001, .* got 1e-06"):
        check_settings(now(tmp_path, **{"optimiser.discriminator.lr": 1e-6}))


def test_a_run_without_a_checkpoint_may_change_all_settings(tmp_path):
    begun(tmp_path)
    for path in checkpoint.checkpoints(tmp_path / "checkpoints"):
        path.rename(tmp_path / "gone")
    check_settings(now(tmp_path, **{"run.seed": 1}))


def test_a_setting_missing_from_an_older_run_counts_as_its_default(tmp_path):
    begun(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"kind_bias":false,', "", 1))
    check_settings(now(tmp_path))
    with pytest.raises(ConfigError, match=r"discriminator.kind_bias: expected false"):
        check_settings(now(tmp_path, **{"discriminator.kind_bias": True}))


def test_the_command_refuses_before_a_model_is_built(tmp_path, monkeypatch, capsys):
    import prism.runtime.runtime

    begun(tmp_path)
    monkeypatch.setattr(prism.runtime.runtime, "build_policy", lambda config: pytest.fail("a model was built"))
    assert cli.main(["run", "--run.folder", str(tmp_path), "--run.seed", "4"]) == 2
    assert "prism run: run.seed: expected 0" in capsys.readouterr().err


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
    assert f"{path}: expected a checkpoint of format 2, got format 1" in told
    assert "finish the run with the version that began it, or take another run.folder" in told
    # a damaged checkpoint would have been renamed
    assert path.exists()
