"""The folder of a run: one process at a time, whole files, a full disk, and signals."""

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
from run_cases import CHANGES, flags, snapshot, stop_in

from prism import cli
from prism.commands import run as run_command
from prism.commands.run import run, run_stages
from prism.config import load_config
from prism.runtime import checkpoint
from prism.runtime.disk import RunFolderError, write_whole
from prism.runtime.lock import locked
from prism.runtime.runtime import Runtime
from prism.runtime.signals import InterruptedRunError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def whole(one_tokenizer, tmp_path_factory):
    """The folder of the same run without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(load_config(None, {**CHANGES, "run.folder": str(folder)})) == 0
    return folder


def same_end(folder, whole):
    names = ("policy/model.safetensors", "evaluations.json")
    return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


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
def test_a_full_disk_while_a_checkpoint_is_written_costs_no_earlier_one(stopped, whole, tmp_path, room, capsys):
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
    assert same_end(tmp_path / "run", whole)


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
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(whole, tmp_path, number, status, capsys, monkeypatch):
    from prism.stages import rlvr

    reward = rlvr.reward_rollouts

    def signalled(batch, config):
        os.kill(os.getpid(), number)
        return reward(batch, config)

    monkeypatch.setattr(rlvr, "reward_rollouts", signalled)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    changes = {"log.console": "lines"}
    assert cli.main(["run", *flags(tmp_path / "run", **changes)]) == status
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    told = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: stopping after this step" in told
    assert f"stopped; rerun the same command to resume ({tmp_path / 'run'})" in told
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert (newest.extra["stage"], newest.extra["step"]) == ("rlvr", 1)
    monkeypatch.undo()
    assert cli.main(["run", *flags(tmp_path / "run", **changes)]) == 0
    assert same_end(tmp_path / "run", whole)


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
