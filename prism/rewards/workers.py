"""Worker processes with time limits that kill: a hang or a crash costs one job, never the run."""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from prism.runtime.stalls import waiting_for

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_log = logging.getLogger(__name__)


class JobResult(NamedTuple):
    """The value of a job, or the reason why it has none."""

    value: Any
    # "" where there is a value; else "timeout", "crash" (the process died), "memory" or "error" (an exception)
    reason: str
    # the traceback of an exception, or how the process ended
    detail: str = ""


class Workers:
    """Processes that call functions by import path, each job within its time limit.

    A worker that hangs or crashes is replaced. Workers start at the first job, in fresh interpreters, so they inherit
    neither locks nor a GPU. Their imports take about a second, which no job's limit counts. Jobs may come from any
    thread. `close` or the end of the program ends all workers; a worker whose parent was killed ends by itself.

    Args:
        count: number of processes; None: one per core, at most four.
        preload: modules that a worker imports before its first job.
        memory_bytes: largest address space of a worker, Linux only; None: no limit.
        start_seconds: seconds that a worker may take to start.
        required: whether it is an error if a module of `preload` cannot be imported; otherwise the jobs that need it
            import it again, within their time limit.
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        preload: Sequence[str] = (),
        memory_bytes: int | None = None,
        start_seconds: float = 120.0,
        required: bool = True,
    ) -> None:
        if count is not None and count < 1:
            raise ValueError(f"Workers: expected count >= 1, got {count}")
        self.count = count or min(4, os.cpu_count() or 1)
        self._preload = list(preload)
        self._setup = (memory_bytes, start_seconds, required)
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._borrowed = 0
        # busy ones too, so that closing from another thread ends them
        self._all: set[_Worker] = set()
        self._closed = False
        # not bound to self, which would then never be collected
        self._end = weakref.finalize(self, _end_all, self._all, os.getpid())

    def map(
        self,
        function: str,
        arguments: Sequence[tuple[Any, ...]],
        timeout_s: float,
        names: Sequence[str] | None = None,
    ) -> list[JobResult]:
        """Returns the result of each call, in order.

        Args:
            function: "package.module:function", importable in a fresh interpreter.
            arguments: the arguments of each call, picklable.
            timeout_s: seconds for one call.
            names: a name of each call, for the message of a stall; None: the function's.
        """
        if not timeout_s > 0:
            raise ValueError(f"Workers.map: expected timeout_s > 0, got {timeout_s}")
        results: list[JobResult | None] = [None] * len(arguments)
        pending = deque(range(len(arguments)))
        workers = self._borrow(len(pending)) if pending else []

        def waits() -> str:
            running = [worker.job for worker in list(workers) if worker.job is not None]
            now = ", ".join(function if names is None else names[job] for job in running)
            return f"{results.count(None)} of {len(results)} calls; now {now or 'workers start'}"

        try:
            with waiting_for(waits):
                self._work(pending, workers, results, function, arguments, timeout_s)
        finally:
            for worker in workers:
                # after an interrupt, its answer would be taken for another job's
                if worker.job is not None:
                    worker.kill()
                self._return(worker)
        return [result for result in results if result is not None]

    def _work(
        self,
        pending: deque[int],
        workers: "list[_Worker]",
        results: list[JobResult | None],
        function: str,
        arguments: Sequence[tuple[Any, ...]],
        timeout_s: float,
    ) -> None:
        """Gives the pending jobs to the workers until all have results; `workers` changes as they end."""
        while pending or any(worker.job is not None for worker in workers):
            for worker in [w for w in workers if w.ready and w.job is None]:
                if pending:
                    job = pending.popleft()
                    worker.give(job, pickle.dumps((function, arguments[job], timeout_s)), timeout_s)
                else:
                    workers.remove(worker)
                    self._return(worker)
            if not pending:
                # workers that are still starting are no longer needed here
                for worker in [w for w in workers if not w.ready]:
                    workers.remove(worker)
                    self._return(worker)
            for i, worker in self._events(workers):
                try:
                    result = worker.collect()
                except _StartError as error:
                    workers[i] = self._start_bare(worker, error)
                    continue
                if result is not None and worker.job is not None:
                    results[worker.job], worker.job = result, None
                if not worker.alive:
                    workers[i] = self._replace(worker)

    def close(self) -> None:
        """Ends all workers, busy ones too; a call in another thread that waits for them fails."""
        with self._changed:
            self._closed = True
            self._idle.clear()
            self._changed.notify_all()
        self._end()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """The ids of the running processes."""
        return sorted(worker.process.pid for worker in list(self._all) if worker.process.poll() is None)

    def _events(self, workers: "list[_Worker]") -> "list[tuple[int, _Worker]]":
        """Waits for an answer, an end or a time limit, and returns those workers with their indices."""
        if not workers:
            return []
        first = min(worker.deadline for worker in workers)
        answered = wait([worker.connection for worker in workers], max(0.0, first - time.monotonic()))
        now = time.monotonic()
        return [(i, w) for i, w in enumerate(workers) if w.connection in answered or w.deadline <= now]

    def _borrow(self, most: int) -> "list[_Worker]":
        """Returns at least one and at most `most` workers, idle ones first; waits while other calls have all."""
        with self._changed:
            while not self._closed and not self._idle and self._borrowed >= self.count:
                self._changed.wait()
            if self._closed:
                raise RuntimeError("Workers.map: expected open workers, got closed ones; make new ones")
            workers: list[_Worker] = []
            while len(workers) < most and self._idle:
                worker = self._idle.pop()
                # an idle worker may have been killed
                workers.append(worker if worker.process.poll() is None else self._new(worker))
            while len(workers) < min(most, self.count - self._borrowed - len(self._idle)):
                workers.append(self._new())
            self._borrowed += len(workers)
            return workers

    def _return(self, worker: "_Worker") -> None:
        with self._changed:
            self._borrowed -= 1
            if worker.alive and not self._closed:
                self._idle.append(worker)
            else:
                self._all.discard(worker)
                worker.kill()
            self._changed.notify()

    def _replace(self, worker: "_Worker") -> "_Worker":
        with self._changed:
            if self._closed:
                raise RuntimeError("Workers.map: the workers were closed while they worked")
            return self._new(worker)

    def _start_bare(self, worker: "_Worker", error: "_StartError") -> "_Worker":
        """Replaces a worker that did not start by one without modules; raises the error if they are not the reason."""
        if worker.required or not worker.preload:
            raise error
        _log.warning("a worker starts without %s: %s", ", ".join(worker.preload), error)
        if error.timed_out:
            # each replacement would wait as long
            self._preload = []
        with self._changed:
            return self._new(worker, preload=())

    def _new(self, instead: "_Worker | None" = None, preload: Sequence[str] | None = None) -> "_Worker":
        if instead is not None:
            self._all.discard(instead)
            instead.kill()
        worker = _Worker(self._preload if preload is None else list(preload), *self._setup)
        self._all.add(worker)
        return worker


class _StartError(RuntimeError):
    """A worker that did not start."""

    def __init__(self, message: str, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class _Worker:
    """One process, its job and its deadline."""

    def __init__(self, preload: list[str], memory_bytes: int | None, start_seconds: float, required: bool) -> None:
        self.connection, theirs = Pipe()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.getenv("PYTHONPATH")]))
        }
        command = [sys.executable, "-m", "prism.rewards.worker", str(theirs.fileno())]
        # a session of its own, so that Ctrl-C in the terminal reaches only the parent
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.ready = False
        self.alive = True
        self.job: int | None = None
        self.deadline = time.monotonic() + start_seconds
        self._start_seconds = start_seconds
        self.preload, self.required = preload, required
        self.connection.send((sys.path, preload, memory_bytes, required))

    def give(self, job: int, message: bytes, timeout_s: float) -> None:
        """Sends a job; if the process has ended, `collect` will say so."""
        self.job, self.deadline = job, time.monotonic() + timeout_s
        try:
            self.connection.send_bytes(message)
        except OSError:
            self.deadline = time.monotonic()

    def collect(self) -> JobResult | None:
        """Returns the job's result after an answer, the end of the process or its time limit; None: it has started.

        Raises `_StartError` for a worker that cannot start.
        """
        try:
            if not self.connection.poll():
                self.kill()
                if not self.ready:
                    expected = f"Workers: expected a worker to start within {self._start_seconds} s, got none"
                    raise _StartError(expected, timed_out=True)
                return JobResult(None, "timeout", "killed at its time limit")
            reason, value = self.connection.recv()
        except (EOFError, OSError):
            self.kill()
            how = f"the process ended with status {self.process.returncode}"
            if not self.ready:
                raise _StartError(f"Workers: expected a worker to start, but {how}") from None
            return JobResult(None, "crash", how)
        self.deadline = float("inf")
        if not self.ready:
            if reason != "ready":
                self.kill()
                raise _StartError(f"Workers: expected a worker to start, got:\n{value}")
            self.ready = True
            return None
        return JobResult(None, reason, value) if reason else JobResult(value, "")

    def kill(self) -> None:
        """Ends the process at once and waits for it, so that none is left as a zombie."""
        self.alive = False
        # the pipe stays open, so that a thread that waits on it is woken by the end
        self.process.kill()
        self.process.wait()


def _end_all(workers: "set[_Worker]", owner: int) -> None:
    # a forked child has a copy of the set, but the processes are not its own
    if os.getpid() == owner:
        while workers:
            workers.pop().kill()


_shared: dict[tuple[int, tuple[str, ...], int | None, bool], Workers] = {}
_shared_lock = threading.Lock()


def shared_workers(preload: Sequence[str], memory_bytes: int | None, *, required: bool = True) -> Workers:
    """Returns workers that this process shares by their settings; they start at first use and end with the program."""
    # a forked child needs its own workers
    key = (os.getpid(), tuple(preload), memory_bytes, required)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = Workers(preload=preload, memory_bytes=memory_bytes, required=required)
        return _shared[key]
