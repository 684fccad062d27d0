"""The worker process: `python -m prism.rewards.worker DESCRIPTOR` answers jobs that come through a pipe, one by one."""

import importlib
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from prism.rewards.custom import import_function

# how long after its time limit a job that nobody stopped ends the process: then the parent is gone
ORPHAN_SECONDS = 2.0


def serve(connection: Connection) -> None:
    """Answers jobs, (function's path, arguments, seconds), by (reason, value or text), until the pipe is closed."""
    first: tuple[list[str], list[str], int | None] = connection.recv()
    path, preload, memory_bytes = first
    sys.path[:] = path
    try:
        _limit_memory(memory_bytes)
        for module in preload:
            importlib.import_module(module)
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        return
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments, seconds = pickle.loads(message)
        except Exception:
            connection.send(("error", traceback.format_exc()))
            continue
        # the default action ends the process in the middle of whatever it does; no handler of Python's could
        signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_SECONDS)
        reply = _answer(function, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(reply)
        except BrokenPipeError:
            return
        except Exception:
            connection.send(("error", traceback.format_exc()))


def _answer(function: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "", import_function(function)(*arguments)
    except MemoryError:
        return "memory", "out of the memory that a worker may use"
    # one sample's trouble, SystemExit and RecursionError among it, is that sample's
    except BaseException:
        return "error", traceback.format_exc()


def _limit_memory(memory_bytes: int | None) -> None:
    # elsewhere the limit is refused or counts other things
    if memory_bytes is None or not sys.platform.startswith("linux"):
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or memory_bytes < hard:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))


if __name__ == "__main__":
    # Ctrl-C is the parent's to handle: it closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    serve(Connection(int(sys.argv[1])))
