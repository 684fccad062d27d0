"""The signals that end a run: the first after its step, the second at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(Exception):
    """The run was asked to stop, and has saved what a checkpoint holds.

    Args:
        number: the signal that asked for it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals(ask_to_stop: Callable[[int], None]) -> Iterator[None]:
    """Calls a function at the first Ctrl-C or SIGTERM; a second signal does what it did before.

    Args:
        ask_to_stop: takes the number of the signal; it may run in the middle of any line of the main thread.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        ask_to_stop(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    # None: the handler was not set from Python
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP}
    for number in STOP:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
