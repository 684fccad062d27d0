"""`prism score`: recorded rollouts are scored again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prism import cli
from prism.commands import rescore
from prism.rewards import score_batch

ROOT = Path(__file__).parents[2]
POLICY = {"model": "tiny", "stage": "rlvr", "step": 0}
MODULE = """
import os, time

def short(rollout, problem):
    if "hang" in rollout.text:
        time.sleep(60)
    if "raise" in rollout.text:
        raise KeyError("lost")
    if "die" in rollout.text:
        os._exit(3)
    return None if rollout.sections is None else float(rollout.tokens < 9)

def seen(rollout, problem):
    assert problem.equivalent_answers == ("three",) and problem.data_source == "stars" and problem.prompt == "How many?"
    return rollout.accuracy + 10 * float(problem.id)
"""


def response(answer, caption="c"):
    return f"<caption>{caption}</caption><think>t</think><answer>{answer}</answer>"


def record(number, text, stage="rlvr", **fields):
    """A record whose verdict is the present one, unless it is given."""
    row = {
        "record": "prism.rollout/1", "stage": stage, "step": 1, "policy": POLICY, "sampling": {"group": 2}, "seed": 1,
        "key": 0, "index": 0, "problem": str(number), "data_source": "stars", "question": "How many?",
        "prompt": [{"role": "user", "content": "How many?"}], "images": [], "answer": "3",
        "equivalent_answers": ["three"], "response": text, "token_ids": [1] * 8, "finish": "stop", "scored_by": {},
    }  # fmt: skip
    if stage == "rlvr":
        (verdict,) = score_batch([text], ["3"], [["three"]])
        row |= {"accuracy": verdict.accuracy, "format": verdict.format, "reason": verdict.reason}
    return {**row, **fields}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "scored_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "scored_rewards"


def score(capsys, *arguments):
    status = cli.main(["score", *map(str, arguments)])
    told = capsys.readouterr()
    return status, told.out, told.err


def cells(out):
    """Returns the lines of the table as words."""
    return [line.split() for line in out.splitlines()]


def test_unchanged_rewards_agree(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [record(n, response(n)) for n in range(1, 6)] + [record(6, "none")])
    status, out, _ = score(capsys, "--rollouts", path)
    assert status == 0
    assert ["rlvr", "accuracy", "6", "0.1667", "0.1667", "0", "of", "6"] in cells(out)
    assert ["rlvr", "format", "6", "0.8333", "0.8333", "0", "of", "6"] in cells(out)
    assert "accuracy agrees with the recorded one for 6 of 6 (100.00%)" in out and "differences" not in out


def test_changes_are_counted_and_named_with_file_and_line(tmp_path, capsys):
    rows = [record(1, response("three")), record(2, response(4), accuracy=1.0, reason="right")]
    rows += ["\n", record(3, response(3), accuracy=0.0, reason="timeout"), record(4, "x", reason="missing_tag")]
    path = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "scores.jsonl"
    status, told, _ = score(capsys, "--rollouts", path, "--out", out)
    assert status == 0
    assert ["rlvr", "accuracy", "4", "0.5", "0.5", "2", "of", "4"] in cells(told)
    assert "accuracy agrees with the recorded one for 2 of 4 (50.00%)" in told
    assert "1 x 'right' → 'wrong'" in told and "1 x 'timeout' → 'right'" in told
    assert f"  {path}:2: accuracy 1 → 0, 'right' → 'wrong', right answer '3'" in told
    # the empty line is a line
    assert f"  {path}:4: accuracy 0 → 1, 'timeout' → 'right', right answer '3'" in told
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[1] == {
        "file": path, "line": 2, "stage": "rlvr", "step": 1, "problem": "2",
        "old": {"accuracy": 1.0, "format": 1.0, "reason": "right"},
        "new": {"accuracy": 0.0, "format": 1.0, "reason": "wrong"}, "failed": {},
    }  # fmt: skip
    assert [line["line"] for line in written] == [1, 2, 4, 5]


def test_custom_rewards_are_compared_by_name_and_their_failures_counted(tmp_path, module, capsys, monkeypatch):
    monkeypatch.setattr(rescore.call_rewards, "__kwdefaults__", {"workers": None, "timeout_s": 2.0})
    texts = [response(3), response(3), "invalid", response(3, "hang"), response(4, "raise"), response(5, "die")]
    rows = [record(n, text, reward_short=n / 4, reward_other=1.0) for n, text in enumerate(texts)]
    path = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "scores.jsonl"
    status, told, _ = score(capsys, "--rollouts", path, "--reward", f"{module}:short", f"{module}:seen", "--out", out)
    assert status == 1
    assert ["rlvr", "reward_short", "2", "0.625", "1", "6", "of", "6"] in cells(told)
    # a reward that the records do not have is only new
    assert ["rlvr", "reward_seen", "6", "-", "25.5", "-"] in cells(told)
    for line, cause in ((4, "timeout"), (5, "error"), (6, "crash")):
        assert f"1 without a value, reward_short: {cause}; the first: {path}:{line}: " in told
    assert "KeyError: 'lost'" in told
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[2]["new"] == {"accuracy": 0.0, "format": 0.0, "reason": "missing_tag", "reward_short": None,
                                 "reward_seen": 20.0}  # fmt: skip
    assert written[2]["failed"] == {} and written[4]["failed"] == {"reward_short": "error: KeyError: 'lost'"}
    assert written[4]["old"] == {"accuracy": 0.0, "format": 1.0, "reason": "wrong", "reward_short": 1.0,
                                 "reward_other": 1.0}  # fmt: skip


def test_records_of_alignment_get_a_first_verdict(tmp_path, capsys):
    rows = [
        record(1, response(3), stage="align", perception=1.5, reasoning=None, reason=None),
        record(2, "x", stage="align", reason="missing tag"),
        record(3, response(3), stage="align", answer=None),
        record(4, response(3), stage="align", answer=" "),
    ]
    write(tmp_path / "run" / "align-000001.jsonl", rows)
    write(tmp_path / "run" / "rlvr-000001.jsonl", [record(5, response(3))])
    # unfinished, as a kill leaves it
    write(tmp_path / "run" / ".aside-rlvr-000002.jsonl-77", ["{"])
    status, out, _ = score(capsys, "--rollouts", tmp_path / "run")
    assert status == 1
    assert ["align", "accuracy", "2", "-", "0.5", "-"] in cells(out)
    assert ["rlvr", "accuracy", "1", "1", "1", "0", "of", "1"] in cells(out)
    assert "2 without a value, accuracy: no right answer; the first: " in out
    assert "agrees with the recorded one for 1 of 1" in out and " x " not in out and "5 rollouts of 2 files" in out


HOSTILE = [
    ("{\n", "not JSON"),
    ("[1]\n", "not JSON"),
    ("[" * 10**5 + "\n", "not JSON"),
    ('{"record": "prism.rollout/1", "problem": "\\ud800"}\n', "broken text"),
    ({"problem": "a", "question": "b", "answer": "3", "response": "c"}, "no version"),
    (record(1, "x", record="prism.rollout/9"), "another version"),
    ({k: v for k, v in record(1, "x").items() if k != "token_ids"}, "missing field"),
    (record(1, "x", response=None), "wrong type"),
    (record(1, "x", reward_x=["\x1b[2J"]), "wrong type"),
    (record(1, "x", stage="[red]x"), "wrong type"),
    ("\xff\xfe\n", "not JSON"),
]


def test_lines_that_are_no_records_are_counted_by_cause(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [row if isinstance(row, str) else json.dumps(row) + "\n" for row, _ in HOSTILE]
    # numbers out of range are no reason to leave a record out: they are not finite
    good = json.dumps(record(1, response(3), advantage=10**400)).replace('"accuracy": 1.0', '"accuracy": NaN') + "\n"
    path.write_bytes("".join([*rows, good]).encode("latin-1"))
    status, out, err = score(capsys, "--rollouts", path)
    assert status == 1 and err == "" and "1 rollouts of 1 file" in out and "\x1b" not in out
    for cause in {cause for _, cause in HOSTILE}:
        count = [other for _, other in HOSTILE].count(cause)
        first = [other for _, other in HOSTILE].index(cause) + 1
        assert f"{count} lines left out, {cause}; the first: {path}, row {first}: " in out
    assert "expected prism.rollout/1, got 'prism.rollout/9'; use the version of prism that wrote it" in out
    assert ["rlvr", "accuracy", "1", "-", "1", "1", "of", "1"] in cells(out)
    path.write_bytes("".join(rows).encode("latin-1"))
    status, out, err = score(capsys, "--rollouts", path)
    assert (status, out) == (
        2,
        "",
    ) and f"{path}: expected records of rollouts that can be scored, got none: {path}, row 1" in err


def test_many_records_are_scored_in_batches(tmp_path, capsys, monkeypatch):
    rows = [record(n, response(n % 5), accuracy=0.0, reason="wrong") for n in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    sizes = []
    whole = rescore.score_lines
    monkeypatch.setattr(rescore, "score_lines", lambda lines, paths: sizes.append(len(lines)) or whole(lines, paths))
    for limit, value, expected in (("BATCH", 16, [16, 16, 8]), ("BATCH_BYTES", 1, [1] * 40)):
        with monkeypatch.context() as patch:
            patch.setattr(rescore, limit, value)
            sizes.clear()
            status, out, _ = score(capsys, "--rollouts", path)
        assert (status, sizes) == (0, expected)
        assert ["rlvr", "accuracy", "40", "0", "0.2", "8", "of", "40"] in cells(out) and "8 x 'wrong' → 'right'" in out
    # ten are shown, of equal size the first
    monkeypatch.setattr(rescore, "MOST_SHOWN", 3)
    _, out, _ = score(capsys, "--rollouts", path)
    assert [line.split(": ")[0] for line in out.splitlines() if line.startswith("  ")] == [
        f"  {path}:{n}" for n in (4, 9, 14)
    ]


def test_bad_arguments_name_the_flag(tmp_path, module, capsys):
    path = write(tmp_path / "run" / "rollouts" / "a.jsonl", [record(1, "x")])
    (tmp_path / "a.parquet").write_bytes(b"x")
    cases = {
        ("--rollouts", tmp_path / "none"): "--rollouts: ",
        ("--rollouts", tmp_path / "run"): "did you mean",
        ("--rollouts", tmp_path / "a.parquet"): "--rollouts: expected files ending in .jsonl",
        ("--rollouts", path, "--out", tmp_path / "no" / "x"): "--out: expected a file in a folder that exists",
        ("--rollouts", path, "--out", path): "--out: expected another file than the rollouts'",
        ("--rollouts", path, "--reward", "short"): '--reward: expected a path like "package.module:function"',
        ("--rollouts", path, "--reward", f"{module}:none"): "--reward: expected 'none' in 'scored_rewards'",
        ("--rollouts", path, "--reward", f"{module}:short", "os:short"): "--reward: expected functions of different",
    }
    for arguments, message in cases.items():
        status, out, err = score(capsys, *arguments)
        assert (status, out) == (2, "") and message in err, arguments
    assert json.loads(Path(path).read_text())["response"] == "x"


def test_no_file_of_scores_is_left_by_an_error(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ["{}\n"])
    (tmp_path / "scores.jsonl").write_text("before")
    assert score(capsys, "--rollouts", path, "--out", tmp_path / "scores.jsonl")[0] == 2
    assert (tmp_path / "scores.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_neither_torch_nor_the_records_own_rewards_are_imported(tmp_path):
    (tmp_path / "named_rewards.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\ndef own(r, p): return 1.0\n"
    )
    by = {"function": "named_rewards:own", "version": None, "sha256": None, "weight": 1.0}
    path = write(tmp_path / "a.jsonl", [record(1, response(r"\sqrt{9}"), reward_own=1.0, scored_by={"reward_own": by})])
    code = "import sys; sys.modules['torch'] = None; from prism import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-c", code, "score", "--rollouts", path]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    # algebra ran in a worker
    assert ["rlvr", "accuracy", "1", "1", "1", "0", "of", "1"] in cells(process.stdout)
    assert not (tmp_path / "imported").exists()
