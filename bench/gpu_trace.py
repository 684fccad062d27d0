"""Traces one call on a GPU: its launches, their time on the device, and the number of times the host waits."""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# larger than any cache
COLD_BYTES = 256 * 2**20
WAITING = "called a synchronizing CUDA operation"


class Trace(NamedTuple):
    """One call. Copies and fills count as launches too."""

    launches: int
    device_s: float
    syncs: int
    # counts by name, the longest first
    kernels: dict[str, int]


@cache
def _cold() -> torch.Tensor:
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")


def clear_cache() -> None:
    """Fills the GPU's caches with other data: cached inputs would be timed without memory traffic."""
    _cold().zero_()


def trace(run: Callable[[], object], rounds: int = 3) -> Trace | None:
    """Returns the trace of a call that has run before: the median time, and the last run's launches and waits.

    None if the profiler sees nothing of the GPU.
    """
    waits = syncs(run)
    times: list[float] = []
    for _ in range(rounds):
        clear_cache()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
            torch.cuda.synchronize()
        done = launched(profiled.events())
        times.append(sum(seconds for _, seconds in done))
    if not done:
        return None
    longest_first = sorted(done, key=lambda launch: -launch[1])
    return Trace(len(done), statistics.median(times), waits, dict(Counter(name for name, _ in longest_first)))


def launched(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Returns the names and seconds of the kernels that ran on the device."""
    kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return [(e.name, e.time_range.elapsed_us() / 1e6) for e in kernels]


def syncs(run: Callable[[], object]) -> int:
    """Returns the number of times that torch makes the host wait for the device in one call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum(WAITING in str(warning.message) for warning in caught)
