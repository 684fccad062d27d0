"""The folder of a run: one process at a time, whole files, a full disk, and whatever else may be found in it."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from test_resuming import rewritten
from test_run import SMALL

from prism import cli
from prism.commands import run as run_command
from prism.commands.run import run, run_stages
from prism.config import load_config
from prism.models import tiny
from prism.runtime import checkpoint
from prism.runtime.disk import FILES, FOLDERS, RunFolderError, write_whole
from prism.runtime.lock import locked
from prism.runtime.runtime import InterruptedRunError, Runtime

ROOT = Path(__file__).parents[2]
CHANGES = {**SMALL, "run.stages": ["sft", "rlvr"], "optimiser.sft.steps": 2, "optimiser.rlvr.steps": 2}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Trains the tiny tokenizer once, which takes most of a small run's start."""
    before = tiny.train_tokenizer
    tiny.train_tokenizer = functools.cache(before)
    yield
    tiny.train_tokenizer = before


def flags(folder, **changes):
    given = {**CHANGES, "run.folder": str(folder), **changes}
    lists = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in given.items()}
    return [part for key, value in lists.items() for part in (f"--{key}", value)]


def stop_in(folder, stage, step, **changes):
    """Runs as far as a step, and returns the exit status."""
    config = load_config(None, {**CHANGES, "run.folder": str(folder), **changes})
    with Runtime(config) as one:
        write = one.log.step

        def stop_there(number, metrics, shown=None):
            write(number, metrics, shown)
            if (one.log._stage, number) == (stage, step):
                one.ask_to_stop()

        one.log.step = stop_there
        with pytest.raises(InterruptedRunError):
            run_stages(one)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped in its last stage, with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_in(folder, "rlvr", 1)
    assert len(list(checkpoint.checkpoints(folder / "checkpoints"))) == 2
    return folder


# --- one process at a time

HOLDER = """
import sys, time
from pathlib import Path
from prism.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holds(folder):
    """Starts a process that holds a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_with_the_host_and_process_of_the_first(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with holds(tmp_path / "run") as first:
        try:
            assert cli.main(["run", *flags(tmp_path / "run")]) == 2
            told = capsys.readouterr().err
            assert f"process {first.pid} on host {os.uname().nodename} since 20" in told
            assert f"'{tmp_path / 'run'}' is in use by" in told and "take another run.folder" in told
            assert cli.main(["upcycle", *flags(tmp_path / "run")]) == 2
            assert f"process {first.pid} on host" in capsys.readouterr().err
            assert snapshot(tmp_path / "run", without="lock") == before
            # reading is no conflict
            assert cli.main(["report", "--run", str(tmp_path / "run")]) == 0
            assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
        finally:
            first.kill()
    # a kill frees it
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / "lock").exists()


def snapshot(folder, without=""):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != without}


def test_a_lock_that_was_removed_under_a_waiting_process_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    from prism.runtime import lock

    take, removed = lock._take, []

    def remove_first(descriptor, folder):
        if not removed:
            # as the holder does at its end, after this process has opened the file
            removed.append((folder / "lock").unlink())
        take(descriptor, folder)

    monkeypatch.setattr(lock, "_take", remove_first)
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on host"), locked(tmp_path):
            pytest.fail("held twice")


def test_without_locks_the_run_says_so(tmp_path, monkeypatch, caplog):
    from prism.runtime import lock

    monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
    assert "this system has no flock, so nothing keeps a second run out of this folder" in caplog.text
    assert not (tmp_path / "a").exists()


# --- files are whole

WRITER = """
import sys
from pathlib import Path
from prism.runtime.disk import write_whole
print("begins", flush=True)
number = 0
while True:
    number += 1
    write_whole(Path(sys.argv[1]), '{"number": %d, "long": "%s"}' % (number, "x" * 300_000))
"""


def test_a_kill_while_the_settings_are_written_leaves_them_whole(tmp_path):
    """config.json and the other tables are written by `write_whole`."""
    path, rng, seen, cut = tmp_path / "config.json", random.Random(0), 0, 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-S", "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout.readline() == b"begins\n"
        time.sleep(0.01 + rng.random() * 0.05)
        process.kill()
        process.wait()
        process.stdout.close()
        if path.exists():
            found = json.loads(path.read_text())
            assert len(found["long"]) == 300_000
            seen += 1
        cut += len(list(tmp_path.glob(".aside-config.json-*")))
        for left in tmp_path.glob(".aside-*"):
            left.unlink()
    assert seen >= 8 and cut >= 3


def test_no_table_of_a_run_is_written_in_place(tmp_path, monkeypatch):
    """A write that fails in its middle leaves the file of before."""
    stop_in(tmp_path, "sft", 1)
    before = {name: (tmp_path / name).read_text() for name in ("config.json", "environment.json", "changes.json")}
    replace = Path.replace

    def fails(self, target):
        if self.name.startswith(".aside-"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with Runtime(load_config(None, {**CHANGES, "run.folder": str(tmp_path), "log.rollouts_every": 7})) as one:
        for name in before:
            with pytest.raises(KeyboardInterrupt):
                write_whole(tmp_path / name, "half")
        with pytest.raises(KeyboardInterrupt):
            one.restore()
    assert before == {name: (tmp_path / name).read_text() for name in before}
    assert list(tmp_path.glob(".aside-*")) == []


# --- a full disk


@pytest.mark.parametrize("room", [0, 30_000, 400_000])
def test_a_full_disk_while_a_checkpoint_is_written_costs_no_earlier_one(stopped, tmp_path, room, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    before = {path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")}
    save = checkpoint.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(*arguments, **named):
        # the system then refuses to write past this size, as it refuses to write to a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            return save(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_on_a_full_disk)
        assert cli.main(["run", *flags(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "this checkpoint could not be written: " in told and "make room, and rerun the same command" in told
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == before
    assert all(checkpoint.damage(path) is None for path in checkpoint.checkpoints(folder))
    # with room again, it ends as if nothing had happened
    assert cli.main(["run", *flags(tmp_path / "run")]) == 0
    assert run(load_config(None, {**CHANGES, "run.folder": str(tmp_path / "whole")})) == 0
    for name in ("policy/model.safetensors", "evaluations.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_while_metrics_are_written_ends_the_run_with_a_message(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_command, "run_stages", full_while(limits))
        assert cli.main(["run", *flags(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert f"prism run: {tmp_path}: File too large; make room, and rerun the same command to resume" in told


def full_while(limits):
    def run_it(rt):
        rt.restore()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            rt.log.step(1, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return run_it


# --- signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, status, capsys, monkeypatch):
    from prism.stages import rlvr

    reward = rlvr.reward_rollouts

    def signalled(batch, config):
        os.kill(os.getpid(), number)
        return reward(batch, config)

    monkeypatch.setattr(rlvr, "reward_rollouts", signalled)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    changes = {"log.console": "lines", "optimiser.rlvr.steps": 3}
    assert cli.main(["run", *flags(tmp_path / "run", **changes)]) == status
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    told = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: stopping after this step" in told
    assert f"stopped; rerun the same command to resume ({tmp_path / 'run'})" in told
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert (newest.extra["stage"], newest.extra["step"]) == ("rlvr", 1)
    monkeypatch.undo()
    assert cli.main(["run", *flags(tmp_path / "run", **changes)]) == 0
    assert cli.main(["run", *flags(tmp_path / "whole", **changes)]) == 0
    for name in ("policy/model.safetensors", "evaluations.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class AtOnceError(Exception):
    pass


def at_once(number, frame):
    raise AtOnceError


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_signal_ends_the_run_at_once(tmp_path, first, second, monkeypatch):
    from prism.stages import rlvr

    def signalled(batch, config):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        pytest.fail("it went on")

    monkeypatch.setattr(rlvr, "reward_rollouts", signalled)
    before = signal.signal(second, at_once)
    try:
        with pytest.raises(AtOnceError):
            run(load_config(None, {**CHANGES, "run.folder": str(tmp_path)}))
    finally:
        signal.signal(second, before)
    assert checkpoint.newest(tmp_path / "checkpoints").extra["stage"] is None


@pytest.mark.parametrize("after", ["start", "sft", "sft 1", "rlvr"])
def test_a_signal_during_an_evaluation_ends_it_and_costs_nothing(stoppable, tmp_path, after):
    """An evaluation may take hours, and a cluster kills soon after SIGTERM."""
    first = stoppable(tmp_path / "run", after)
    assert list(first.begun)[-1] == after and after not in first.evaluations
    again = stoppable(tmp_path / "run", None)
    # no evaluation is done twice, but for the one that was stopped
    assert again.begun[0] == after and not {*again.begun} & {*first.evaluations}
    whole = stoppable(tmp_path / "whole", None)
    assert list(again.evaluations.items()) == list(whole.evaluations.items())
    ours, wanted = again.policy.state_dict(), whole.policy.state_dict()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.fixture
def stoppable(monkeypatch):
    """A function that runs, sends SIGTERM at the beginning of an evaluation, and returns the run."""
    from prism.runtime import runtime

    assess, assess_policy = Runtime.assess, runtime.assess_policy

    def begins(self, after):
        self.begun.append(after)
        assess(self, after)

    def signalled(engine, problems, *rest):
        if asked and one[-1].begun[-1] == asked[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return assess_policy(engine, problems, *rest)

    one, asked = [], []

    def start(folder, after):
        changes = {**CHANGES, "run.folder": str(folder), "evaluation.every": 1, "optimiser.rlvr.steps": 1}
        asked[:] = [after] if after else []
        with Runtime(load_config(None, changes)) as rt:
            rt.begun = []
            one.append(rt)
            if after is None:
                run_stages(rt)
                return rt
            with pytest.raises(InterruptedRunError) as stop:
                run_stages(rt)
            assert stop.value.number == signal.SIGTERM
        return rt

    monkeypatch.setattr(Runtime, "assess", begins)
    monkeypatch.setattr(runtime, "assess_policy", signalled)
    return start


# --- whatever is found in the folder

DAMAGES = {
    "missing": None,
    "empty": b"",
    "cut": "half",
    "a table": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "binary": bytes(range(256)) * 9,
    "lines of null": b"null\nnull\n",
    "deep": b"[" * 200_000,
    "deep tables": b'{"a":' * 3000 + b"0" + b"}" * 3000,
    "a folder": "folder",
}
CHECKPOINT = "checkpoints/newest"
STOPPED_FILES = ("config.json", "environment.json", "changes.json", "metrics.jsonl", "evaluations.json", "lock",
                 "report.html", "skipped-rlvr.jsonl", "rollouts/rlvr-000001.jsonl",
                 *(f"{CHECKPOINT}/{name}" for name in ("state.json", "checksums.json", "training.pt",
                                                       "policy.safetensors")))  # fmt: skip
FINISHED_FILES = ("config.json", "metrics.jsonl", "evaluations.json", "policy/config.json",
                  "policy/model.safetensors")  # fmt: skip


def damaged(folder, name, damage):
    """Damages a file of a run."""
    newest = next(checkpoint.checkpoints(folder / "checkpoints"))
    path = folder / name.replace(CHECKPOINT, f"checkpoints/{newest.name}")
    content = path.read_bytes() if path.is_file() else b""
    if path.is_file():
        path.unlink()
    if DAMAGES[damage] == "folder":
        path.mkdir()
    elif DAMAGES[damage] is not None:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else DAMAGES[damage])
    return path


def resumes_only(rt):
    """Restores a run as far as its next step."""
    rt.restore()
    if rt._inside:
        next(rt.steps("rlvr", policy=rt.config.optimiser.rlvr, reference=True))


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(stopped, folder)
    assert cli.main(["run", *flags(folder)]) == 0
    return folder


def tried(folder, path, capsys, monkeypatch):
    """Runs, reports and exports; returns the exit statuses. An error names the file, and no command raises."""
    monkeypatch.setattr(run_command, "run_stages", resumes_only)
    statuses = []
    for command in (["report", "--run", str(folder)], ["export", "--run", str(folder), "--to", str(folder / "../to")],
                    ["run", *flags(folder)]):  # fmt: skip
        statuses.append(cli.main(command))
        told = capsys.readouterr().err
        assert statuses[-1] in (0, 2) and "Traceback" not in told, (command[0], told)
        if statuses[-1]:
            # or the folder around it: a checkpoint is used or refused as a whole
            assert any(str(part) in told for part in (path, path.parent)), (command[0], told)
    return statuses


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", STOPPED_FILES)
def test_whatever_a_file_of_a_stopped_run_holds_no_command_raises(stopped, tmp_path, name, damage, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    path = damaged(folder, name, damage)
    *_, status = tried(folder, path, capsys, monkeypatch)
    if name.startswith(CHECKPOINT):
        # the one before is used
        assert status == 0 and [p.name for p in folder.glob("checkpoints/damaged-*")] == [f"damaged-{path.parent.name}"]
    elif name == "metrics.jsonl":
        assert status == 2
    elif name == "evaluations.json" or damage != "a folder":
        # the run does not need it, or writes it anew
        assert status == 2 * (damage == "a folder")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FINISHED_FILES)
def test_whatever_a_file_of_a_finished_run_holds_no_command_raises(
    finished, tmp_path, name, damage, capsys, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    tried(tmp_path / "run", damaged(tmp_path / "run", name, damage), capsys, monkeypatch)


@pytest.mark.parametrize("name", ["", "checkpoints", "rollouts", "policy", CHECKPOINT])
def test_a_file_in_the_place_of_a_folder_is_an_error_that_names_it(stopped, tmp_path, name, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    path = folder / name
    if name == CHECKPOINT:
        path = next(checkpoint.checkpoints(folder / "checkpoints"))
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("a file")
    statuses = tried(folder, path, capsys, monkeypatch)
    assert statuses[-1] == (0 if name == CHECKPOINT else 2)


# the parts that the report computes with, each of a wrong type
WRONG = {
    "config.json": [("run", 3), ("run.stages", "sft"), ("run.stages", [1]), ("optimiser.rlvr.steps", "x"),
                    ("model.policy", []), ("data.shapes", 3), ("data.source", None), ("discriminator.experts", "x")],
    "evaluations.json": [("start", 3), ("start", None), ("start.sampled", 3), ("start.test", []),
                         ("start.discriminator", {"pairs": 3}), ("start.accuracy", 7.5), ("start.samples", "x"),
                         ("start.samples", -4), ("start.split", {}), ("start.sampled", {"accuracy": "x"})],
    "environment.json": [("versions", 3), ("device", {"x": []}), ("last_started", None)],
    "changes.json": [("", [3]), ("", [{"key": 3}]), ("", {"a": 1})],
    "metrics.jsonl": [("stage", 3), ("step", "x"), ("step", None), ("loss", "x"), ("non_finite", 3), ("tokens", {}),
                      ("non_finite", [3]), ("d_expert_load", {"image": 3}), ("seconds", []), ("peak_bytes", -1)],
    "rollouts/rlvr-000001.jsonl": [("problem", []), ("problem", {}), ("response", 3), ("reason", []), ("reward", "x"),
                                   ("advantage", {}), ("question", None), ("finish", [])],
}  # fmt: skip


@pytest.mark.parametrize("name, key, value", [(name, *one) for name, all_ in WRONG.items() for one in all_])
def test_a_value_of_a_wrong_type_is_shown_or_an_error(finished, tmp_path, name, key, value, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    path = folder / name
    whole = [json.loads(line) for line in path.read_text().splitlines()] if name.endswith("l") else None
    table = whole[0] if whole else json.loads(path.read_text())
    *parents, last = key.split(".")
    inner = table
    for part in parents:
        inner = inner[part]
    if key:
        inner[last] = value
    else:
        table = value
    path.write_text("".join(json.dumps(one) + "\n" for one in whole) if whole else json.dumps(table))
    for command in (["report", "--run", str(folder)], ["export", "--run", str(folder), "--to", str(tmp_path / "to")]):
        status = cli.main(command)
        told = capsys.readouterr().err
        assert status in (0, 2) and (status == 0 or str(path) in told), told


# state.json with its checksum, so that it is not damaged
STATES = {
    "without log": lambda state: state["extra"].pop("log"),
    "log of a wrong type": lambda state: state["extra"].update(log=3),
    "a negative position": lambda state: state["extra"]["log"].update(bytes=-1),
    "no stage begun": lambda state: state["extra"].update(done=[], stage=None),
    "an unknown stage": lambda state: state["extra"].update(stage="sleep"),
    "without settings": lambda state: state["extra"].pop("settings"),
    "settings of a wrong type": lambda state: state["extra"].update(settings={"run": 3}),
    "evaluations of a wrong type": lambda state: state["extra"].update(evaluations={"start": 3}),
    "without extra": lambda state: state.pop("extra"),
    "without models": lambda state: state.pop("models"),
    "other models": lambda state: state.update(models=["policy"]),
    "a text as step": lambda state: state["extra"].update(step="2"),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_no_run_wrote_is_an_error_that_names_it(stopped, tmp_path, change, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    newest = next(checkpoint.checkpoints(folder / "checkpoints"))
    state = json.loads((newest / "state.json").read_text())
    STATES[change](state)
    rewritten(newest, state)
    statuses = tried(folder, newest, capsys, monkeypatch)
    # a state without its parts is damaged, and the checkpoint before it is used
    assert statuses[-1] == (0 if change in ("without extra", "without models") else 2)


def test_checksums_that_cover_nothing_are_damage(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    newest = next(checkpoint.checkpoints(tmp_path / "run/checkpoints"))
    (newest / "checksums.json").write_text("{}")
    assert "expected a checksum of policy.safetensors, reference.safetensors, state.json" in checkpoint.damage(newest)


def test_stray_files_beside_checkpoints_do_no_harm(stopped, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / "checkpoints/.aside-step-00000009").write_text("a file")
    (folder / "checkpoints/.aside-link").symlink_to(tmp_path)
    (folder / "checkpoints/damaged-step-00000003").write_text("a file")
    (folder / "checkpoints/step-99999999").write_text("a file")
    (folder / "checkpoints/notes.txt").write_text("a file")
    assert cli.main(["run", *flags(folder)]) == 0
    assert tmp_path.exists() and not list(folder.glob("checkpoints/.aside-*"))


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_written_over(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = snapshot(tmp_path / "run")
    assert cli.main(["run", *flags(tmp_path / "run")]) == 2
    assert "got a finished run without checkpoints, which would be written over" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


def test_everything_that_a_run_writes_is_checked_at_its_start(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith("skipped-")}
    assert names <= {*FILES, *FOLDERS}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "checkpoints"])
def test_what_cannot_be_read_is_named(stopped, tmp_path, name, capsys, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / name).chmod(0)
    try:
        assert 2 in tried(tmp_path / "run", tmp_path / "run" / name, capsys, monkeypatch)
    finally:
        (tmp_path / "run" / name).chmod(0o700)
