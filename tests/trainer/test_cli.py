"""The command line: its commands, flags and dry run, and how soon it answers."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from prism import cli
from prism.config import load_config

ROOT = Path(__file__).parents[2]


def trains(config):
    """The function of a command."""
    print(f"seed {config.run.seed}, lr {config.optimiser.align.lr:g}")


def interrupted(config):
    raise KeyboardInterrupt


def broken(config):
    raise ValueError("a defect")


@pytest.fixture
def table(monkeypatch):
    """The table of commands with those of this file."""
    commands = {f.__name__: cli.Command(f"{__name__}:{f.__name__}", "a test") for f in (trains, interrupted, broken)}
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, **commands})


def test_a_command_gets_the_settings_of_file_and_flags(table, capsys, tmp_path):
    (tmp_path / "my.toml").write_text("[run]\nseed = 4\n[optimiser.align]\nlr = 1e-3\n")
    arguments = [
        "trains",
        "--optimiser.align.lr",
        "1e-6",
        "--config",
        str(tmp_path / "my.toml"),
        "--discriminator.dense",
    ]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "seed 4, lr 1e-06\n"


def test_help_lists_the_commands_and_others_are_refused(table, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as end:
        cli.main(["later"])
    assert end.value.code == 2
    assert "invalid choice: 'later'" in capsys.readouterr().err


def test_every_command_of_the_table_can_be_called():
    for name, command in cli.COMMANDS.items():
        module, _, function = command.target.partition(":")
        assert callable(getattr(__import__(module, fromlist=["_"]), function)), name


def test_bad_settings_name_the_key(table, capsys):
    assert cli.main(["trains", "--run.sed", "3"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "prism trains: settings: run.sed: expected a known key" in output.err
    assert "did you mean 'seed'?" in output.err
    assert cli.main(["trains", "what"]) == 2
    assert "flags: expected --section.key value, got 'what'" in capsys.readouterr().err
    assert cli.main(["doctor", "--x"]) == 2
    assert "doctor: expected no further arguments, got --x" in capsys.readouterr().err


def test_interrupts_end_cleanly_and_defects_do_not_hide(table, capsys):
    assert cli.main(["interrupted"]) == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["broken"])


def test_a_dry_run_prints_settings_that_are_a_file(table, capsys, tmp_path):
    assert cli.main(["trains", "--dry-run", "--algorithm.rlvr.name", "dapo", "--run.seed", "7"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    expected = load_config(None, {"algorithm.rlvr.name": "dapo", "run.seed": 7})
    assert load_config(tmp_path / "printed.toml") == expected


def test_a_dry_run_reads_the_data_and_counts_rejections(table, capsys, tmp_path):
    pytest.importorskip("transformers")
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    rows = [{"messages": chat}] * 3 + [{"messages": chat[:1]}, {"images": []}]
    rows.append({"messages": [chat[0], {"role": "assistant", "content": "one two three " * 100}]})
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    flags = ["--data.source", "files", "--data.files.sft", str(tmp_path / "sft.jsonl"), "--run.stages", "sft"]
    assert cli.main(["trains", "--dry-run", *flags]) == 1
    out = capsys.readouterr().out
    assert "# data.files.sft: 3 of 7 rows can be used" in out
    assert "too long: 1; the first: " in out and "not JSON: 1; the first: " in out and "row 7" in out
    assert "expected at most data.max_skipped = 5%" in out
    assert cli.main(["trains", "--dry-run", *flags, "--data.max_skipped", "0.6"]) == 0


def test_a_dry_run_rejects_what_a_stage_would(table, capsys, tmp_path):
    pytest.importorskip("transformers")
    from shapes_files import write_problems

    from prism.worlds.shapes.world import ShapesWorld

    write_problems(tmp_path / "align.jsonl", ShapesWorld().samples("alignment", 3))
    rows = [json.loads(line) for line in (tmp_path / "align.jsonl").read_text().splitlines()]
    for name in ("teacher_response", "teacher_caption"):
        del rows[0][name]
    (tmp_path / "align.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.source", "files", "--data.files.align", str(tmp_path / "align.jsonl"), "--run.stages", "align"]
    assert cli.main(["trains", "--dry-run", *flags]) == 1
    out = capsys.readouterr().out
    assert "# data.files.align: 2 of 3 rows can be used" in out and "align needs the teacher's response" in out
    # the length of a prompt includes the chat template and the image
    assert cli.main(["trains", "--dry-run", *flags, "--data.prompt_tokens", "12"]) == 1
    assert "expected at most data.prompt_tokens = 12 tokens" in capsys.readouterr().out
    # there is no tokenizer on this machine, and none is downloaded
    assert cli.main(["trains", "--dry-run", *flags, "--model.policy", "no/such", "--data.max_skipped", "1"]) == 0
    assert "lengths are not checked: there is no tokenizer of 'no/such'" in capsys.readouterr().out


def test_keys_are_listed(table, capsys):
    assert cli.main(["trains", "--settings"]) == 0
    assert "algorithm.rlvr.overlong.buffer" in capsys.readouterr().out.splitlines()


def test_doctor_shows_versions_kernels_and_reasons(capsys):
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert status == (
        "not installed"
        in "".join(line for line in out.splitlines() if line.split()[:1] and line.split()[0] in cli.PACKAGES)
    )
    for word in ("pydantic", "torch", "policy_loss", "available"):
        assert word in out


def called(*arguments, code=None):
    """Runs the command line in another process; returns the process and its CPU time in seconds."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "prism", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # not the time on the clock: other processes may keep the machine busy
    return process, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_bad_settings_answer_within_a_second():
    process, seconds = called("--help")
    assert process.returncode == 0 and "doctor" in process.stdout
    assert seconds < 1
    bad = (
        "import sys; from prism import cli; cli.COMMANDS['x'] = cli.Command('prism.cli:doctor', 'a test');"
        "status = cli.main(['x', '--rollout.align.group', '1']); print('torch' in sys.modules); sys.exit(status)"
    )
    process, seconds = called(code=bad)
    assert process.returncode == 2 and "rollout.align.group: expected at least 2" in process.stderr
    assert process.stdout == "False\n"
    assert seconds < 1


def test_every_command_refuses_what_is_not_there_within_a_second():
    cases = {
        "sft --rollout.align.group x": "rollout.align.group: expected",
        "upcycle --discriminator.dense": "discriminator.dense: expected false",
        "warmup --model.policy no/such/folder": "model.policy: expected a folder with a config.json",
        "align --rollout.align.group 1": "rollout.align.group: expected at least 2",
        "rlvr --run.stages sft": "run.stages: expected none, `prism rlvr` is one stage",
        "eval --model . --data x": "--model: expected a folder with a config.json",
        "eval --model org/name --data shapes:tst": "--data: expected shapes: with one of test",
        "eval --model org/name --data none.jsonl": "there is no 'none.jsonl'",
        "export --run none --to x": "expected the folder of a run, there is no 'none'",
    }
    code = "import sys; from prism import cli; from time import process_time as now\nfor case in sys.argv[1:]:\n"
    code += " start = now(); status = cli.main(case.split()); print(status, now() - start, 'torch' in sys.modules)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *cases]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    answers, errors = process.stdout.splitlines(), process.stderr.splitlines()
    assert len(answers) == len(errors) == len(cases)
    for (case, expected), answer, error in zip(cases.items(), answers, errors):
        status, seconds, torch = answer.split()
        assert (status, torch) == ("2", "False") and float(seconds) < 1, (case, answer)
        assert error.startswith(f"prism {case.split()[0]}: ") and expected in error


def test_errors_that_end_a_run_are_shown_without_a_traceback(table, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from prism.runtime.checkpoint import CheckpointError
    from prism.runtime.optimiser import NotFiniteError

    for error, status in ((CheckpointError("all 2 are damaged"), 2), (NotFiniteError("10 steps in a row"), 1)):

        def ends(config, error=error):
            raise error

        monkeypatch.setattr(sys.modules[__name__], "trains", ends)
        assert cli.main(["trains"]) == status
        assert capsys.readouterr().err == f"prism trains: {error}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_closes_the_output_is_no_error(unbuffered):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "prism", "run", "--settings"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 141


def test_a_pipe_that_is_not_the_output_is_an_error(table, monkeypatch):
    def lost(config):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(sys.modules[__name__], "trains", lost)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        cli.main(["trains"])


def test_numbers_of_flags_are_checked(capsys):
    for flag, value in (("--samples", "0"), ("--temperature", "-1"), ("--seed", "x"), ("--max_new_tokens", "1.5")):
        with pytest.raises(SystemExit) as end:
            cli.main(["eval", "--model", "m", "--data", "d", flag, value])
        assert end.value.code == 2
        assert f"argument {flag}: expected a" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['pydantic'] = None; from prism import cli;"
        "cli.COMMANDS['x'] = cli.Command('prism.cli:doctor', 'a test'); sys.exit(cli.main(['x']))"
    )
    process, _ = called(code=code)
    assert process.returncode == 2
    assert "expected the package pydantic, which is missing; pip install 'prism-kernels[train]'" in process.stderr
