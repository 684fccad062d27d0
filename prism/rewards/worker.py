"""The worker process: `python -m prism.rewards.worker DESCRIPTOR` runs the jobs that come through a pipe."""

import importlib
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from prism.rewards.custom import import_function

# a job that nobody stopped ends its process this long after its time limit: the parent is gone
ORPHAN_SECONDS = 2.0


def serve(connection: Connection) -> None:
    """Answers each job, (function's path, arguments, seconds), with (reason, value or text), until the pipe closes."""
    first: tuple[list[str], list[str], int | None, bool] = connection.recv()
    path, preload, memory_bytes, required = first
    sys.path[:] = path
    # where it is not required, a job that needs the module imports it again, and says what is wrong
    forgiven = () if required else (BaseException,)
    try:
        _limit_memory(memory_bytes)
        for module in preload:
            with suppress(*forgiven):
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
        # the default action ends the process even inside C code, where no Python handler runs
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
    # SystemExit and RecursionError too cost only their own sample
    except BaseException:
        return "error", traceback.format_exc()


def _limit_memory(memory_bytes: int | None) -> None:
    # other systems refuse the limit or count other things
    if memory_bytes is None or not sys.platform.startswith("linux"):
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or memory_bytes < hard:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))


if __name__ == "__main__":
    # the parent handles Ctrl-C and closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    serve(Connection(int(sys.argv[1])))
