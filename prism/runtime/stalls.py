"""Stalls name themselves: a thread that logs what the run has been waiting for."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self

_PACKAGE = str(Path(__file__).resolve().parents[1])


class _Wait(NamedTuple):
    # the text, or a function that makes it if it is needed
    what: str | Callable[[], str]
    since: float

    def __str__(self) -> str:
        try:
            return self.what if isinstance(self.what, str) else self.what()
        except Exception as error:
            # what it reads changes while it reads, and the watch must live on
            return f"something that cannot be named: {error!r}"


# the waits that have begun and not ended, outermost first
_waits: list[_Wait] = []


@contextmanager
def waiting_for(what: str | Callable[[], str]) -> Iterator[None]:
    """Names what the block waits for.

    Args:
        what: a few words; a function is called only to log them, and from another thread.
    """
    waits, wait = _waits, _Wait(what, time.monotonic())
    waits.append(wait)
    try:
        yield
    finally:
        waits.remove(wait)


class StallWatch:
    """Logs what the process waits for, each time that the outermost wait has lasted some seconds longer.

    Args:
        seconds: time between two messages.
        tell: takes a message.
    """

    def __init__(self, seconds: float, tell: Callable[[str], object]) -> None:
        self.seconds, self.tell = seconds, tell
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True, name="stalls")

    def __enter__(self) -> Self:
        global _waits
        # a generator that was never closed may have left waits of an earlier run
        _waits = []
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self, watched: int) -> None:
        outermost, told = None, 0
        while not self._end.wait(min(self.seconds / 4, 5.0)):
            # a copy, because the watched thread changes it
            waits = list(_waits)
            if not waits:
                continue
            if waits[0] is not outermost:
                outermost, told = waits[0], 0
            now = time.monotonic()
            if now - waits[0].since >= (told + 1) * self.seconds:
                told = int((now - waits[0].since) / self.seconds)
                self.tell(_message(waits, now, sys._current_frames().get(watched)))


def _message(waits: list[_Wait], now: float, frame: FrameType | None) -> str:
    parts = [f"{waits[0]} has taken {now - waits[0].since:.3g} s"]
    parts += [f"waiting for {wait}, for {now - wait.since:.3g} s" for wait in waits[1:]]
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None:
        name = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
        parts.append(f"in prism/{name}, line {frame.f_lineno}, {frame.f_code.co_name}")
    return "; ".join(parts)
