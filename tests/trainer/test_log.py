"""The metrics file and the console."""

import io
import json
import math

import numpy as np
import pytest

pytest.importorskip("rich")

import torch

from prism.runtime.log import RunLog, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_every_step_is_a_line_of_json(tmp_path):
    with RunLog(tmp_path / "run" / "metrics.jsonl", console="quiet") as log, log.stage("sft", 2):
        log.step(1, {"loss": torch.tensor(0.5), "load": np.array([1, 2]), "pairs": {"perception": 0.25}, "kind": "é"})
        # a step is on the disk before the log is closed
        assert len(read_metrics(log.path)) == 1
        log.step(2, {"loss": 1, "skipped": True, "none": None})
    assert read_metrics(log.path) == [
        {"stage": "sft", "step": 1, "loss": 0.5, "load": [1, 2], "pairs": {"perception": 0.25}, "kind": "é"},
        {"stage": "sft", "step": 2, "loss": 1, "skipped": True, "none": None},
    ]


def test_non_finite_values_become_null_and_are_counted(tmp_path):
    with RunLog(tmp_path / "metrics.jsonl", console="quiet") as log, log.stage("align", 2):
        log.step(
            1, {"loss": math.nan, "norm": torch.tensor(math.inf), "pairs": {"gap": -math.inf}, "x": [1.0, math.nan]}
        )
        log.step(2, {"loss": math.nan, "norm": 1.0})
    first, second = (json.loads(line) for line in log.path.read_text().splitlines())
    expected = {"stage": "align", "step": 1, "loss": None, "norm": None, "pairs": {"gap": None}, "x": [1.0, None]}
    assert {name: value for name, value in first.items() if name != "non_finite"} == expected
    assert first["non_finite"] == ["loss", "norm", "pairs.gap", "x"] and second["non_finite"] == ["loss"]
    assert log.non_finite == {"loss": 2, "norm": 1, "pairs.gap": 1, "x": 1}


def test_resuming_cuts_the_steps_that_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def steps(log, first, last):
        with log.stage("rlvr", 6):
            for step in range(first, last + 1):
                log.step(step, {"loss": 1 / step, "bad": math.nan if step == 2 else 0.0})

    with RunLog(path, console="quiet") as log:
        steps(log, 1, 6)
        whole, counted = path.read_bytes(), log.non_finite
    path.unlink()
    with RunLog(path, console="quiet") as log:
        steps(log, 1, 3)
        state = json.loads(json.dumps(log.state_dict()))
        steps(log, 4, 5)
    # a kill leaves half a line
    with path.open("ab") as file:
        file.write(b'{"stage": "rlvr", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    with RunLog(path, console="quiet") as log:
        log.load_state_dict(state)
        steps(log, 4, 6)
        assert log.non_finite == counted == {"bad": 1}
    assert path.read_bytes() == whole
    with RunLog(path, console="quiet") as log:
        log.load_state_dict({"bytes": 0, "non_finite": {}})
        assert read_metrics(path) == []


def test_a_file_shorter_than_its_checkpoint_says_is_an_error(tmp_path):
    with RunLog(tmp_path / "metrics.jsonl", console="quiet") as log:
        log.step(1, {})
        state = log.state_dict()
    log.path.write_text("")
    with (
        RunLog(log.path) as log,
        pytest.raises(ValueError, match=r"metrics.jsonl: expected at least the .* bytes .* got 0"),
    ):
        log.load_state_dict(state)


def test_without_a_terminal_each_step_is_one_line(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path / "metrics.jsonl", stream=out) as log, log.stage("align", 60, done=8):
        log.step(9, {"loss": 0.123456, "norm": math.nan, "kind": "text", "tokens": 1200, "pairs": {"gap": 1.0}})
        log.note("checkpoint")
        log.step(10, {f"m{i}": i for i in range(9)})
        log.step(11, {"loss": 1.0, "reward": 0.5}, shown=["reward", "absent"])
    assert out.getvalue().splitlines() == [
        "align  9/60  loss 0.1235  norm not finite  tokens 1200",
        "checkpoint",
        "align 10/60  m0 0  m1 1  m2 2  m3 3  m4 4  m5 5",
        "align 11/60  reward 0.5",
    ]


def test_a_bar_on_a_terminal_lines_on_request_and_silence(tmp_path):
    seen = {}
    for console in ("auto", "lines", "quiet"):
        out = Terminal()
        with RunLog(tmp_path / f"{console}.jsonl", console=console, stream=out) as log, log.stage("sft", 3, done=1):
            log.step(2, {"loss": 0.5})
            log.note("[a note]")
            log.step(3, {"loss": 0.25})
        seen[console] = out.getvalue()
        assert len(read_metrics(log.path)) == 2
    assert "sft 2/3" not in seen["auto"] and "3/3" in seen["auto"] and "[a note]" in seen["auto"]
    assert "\x1b[" in seen["auto"] and "\x1b[" not in seen["lines"]
    assert seen["lines"].splitlines() == ["sft 2/3  loss 0.5", "[a note]", "sft 3/3  loss 0.25"]
    assert seen["quiet"] == ""


def test_the_progress_bar_is_closed_after_an_error(tmp_path):
    out = Terminal()
    log = RunLog(tmp_path / "metrics.jsonl", stream=out)
    with pytest.raises(RuntimeError, match="broken"), log.stage("sft", 3):
        raise RuntimeError("broken")
    # the cursor is shown again
    assert out.getvalue().rstrip().endswith("\x1b[?25h")
    log.close()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="RunLog: expected console to be 'auto', 'lines' or 'quiet', got 'loud'"):
        RunLog(tmp_path / "metrics.jsonl", console="loud")
    with (
        RunLog(tmp_path / "metrics.jsonl") as log,
        pytest.raises(TypeError, match=r"expected x to be a number.*got object"),
    ):
        log.step(1, {"x": object()})
