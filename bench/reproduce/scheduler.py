"""Runs arms in parallel, each in its own process, and resumes an interrupted command."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bench.reproduce.jobs import Experiment, Job, JobError
from prism.config import ConfigError

CONSOLE = "console.log"
# the number of console lines of a failed arm that are shown
_SHOWN = 12
Tell = Callable[[str], None]


class Running:
    """The process of an arm.

    Args:
        job: the arm.
        settings: its file of settings.
        alone: whether it has the machine to itself, and may use all cores.
        lock: a file that stays open while it runs.
    """

    def __init__(self, job: Job, settings: Path, alone: bool, lock: int) -> None:
        self.job, self.folder, self.begun = job, settings.parent, time.monotonic()
        threads = {} if alone else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with (self.folder / CONSOLE).open("ab") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prism", "run", "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads},
                pass_fds=(lock,),
                # a new session: a Ctrl-C reaches it once, through this process
                process_group=0,
            )

    @property
    def seconds(self) -> float:
        """The seconds since its start."""
        return time.monotonic() - self.begun

    def problem(self) -> str | None:
        """Returns why an ended process failed; None: it succeeded."""
        if self.process.returncode == 0:
            return None
        lines = (self.folder / CONSOLE).read_text(errors="replace").splitlines()
        return "\n".join([f"exit status {self.process.returncode}; {self.folder / CONSOLE} ends:", *lines[-_SHOWN:]])


def run_all(
    experiment: Experiment, jobs: Sequence[Job], *, at_once: int, tell: Tell, figures: Callable[[Job], str]
) -> bool:
    """Runs the unfinished jobs; returns whether all are finished. Raises KeyboardInterrupt on Ctrl-C.

    Args:
        experiment: the experiment.
        jobs: the jobs, each after those that it needs.
        at_once: the number of processes at a time.
        tell: gets a line for each job.
        figures: returns the figures of a finished job, for its line.
    """
    total, done, failed = len(jobs), set[Job](), set[Job]()
    width = max(len(job.arm.name) for job in jobs)
    running: list[Running] = []

    def end(job: Job, outcome: str, kind: set[Job]) -> None:
        kind.add(job)
        tell(f"{len(done | failed):>{len(str(total))}}/{total}  seed {job.seed}  {job.arm.name:<{width}}  {outcome}")

    with _held(experiment.out, tell) as lock, _terminated():
        for seed in dict.fromkeys(job.seed for job in jobs):
            experiment.write_base(seed)
        for job in jobs:
            # jobs that need an unfinished arm are checked when their turn comes
            if experiment.finished(job) and all(one in done for one in _needs(experiment, job)):
                experiment.settle(job)
                if experiment.finished(job):
                    end(job, f"finished before  {figures(job)}", done)
        try:
            while len(done | failed) < total:
                for job in jobs:
                    if job in done | failed | {one.job for one in running}:
                        continue
                    needs = set(_needs(experiment, job))
                    if needs & failed:
                        end(job, "not run, because it needs an arm that failed", failed)
                    elif needs <= done and len(running) < at_once:
                        try:
                            settings = experiment.prepare(job)
                        except (ConfigError, JobError) as error:
                            end(job, f"failed: {error}", failed)
                            continue
                        if experiment.finished(job):
                            end(job, f"finished before  {figures(job)}", done)
                            continue
                        running.append(Running(job, settings, at_once == 1, lock))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    if problem := one.problem():
                        end(one.job, f"failed: {problem}", failed)
                    else:
                        end(one.job, f"{one.seconds:>5.0f} s  {figures(one.job)}", done)
                time.sleep(0.1)
        except BaseException:
            _end(running)
            raise
    return not failed


def _needs(experiment: Experiment, job: Job) -> list[Job]:
    return [Job(job.seed, experiment.arms[name]) for name in job.arm.after]


def _end(running: list[Running]) -> None:
    """Lets running arms end after a checkpoint; a second Ctrl-C ends them at once."""
    for one in running:
        one.process.send_signal(signal.SIGINT)
    try:
        for one in running:
            one.process.wait()
    except KeyboardInterrupt:
        for one in running:
            one.process.kill()
            one.process.wait()


@contextmanager
def _held(out: Path, tell: Tell) -> Iterator[int]:
    """Locks a folder, because two processes in an arm's folder would damage it.

    The arms hold the lock too, so that a new command waits for arms that a killed command left running.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for arms that another command runs, or left running, in {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


@contextmanager
def _terminated() -> Iterator[None]:
    """Treats a request to terminate like Ctrl-C."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
