"""Interleaved timing of several callables, and the peak extra memory of one, on the CPU and on CUDA."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20


class Timed(NamedTuple):
    """A callable, and an untimed setup that runs before each round."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None


def seconds(run: Callable[[], object], device: str) -> float:
    """Returns the seconds of one call: by the wall clock on the CPU, between two events on CUDA."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleave(
    calls: Mapping[str, Timed], device: str, *, rounds: int = 5, warmup: int = 1, limit: float = float("inf")
) -> dict[str, list[float]]:
    """Returns each callable's durations in seconds: one call of each in a round, so that drift affects all alike.

    Every other round runs in reverse order, so that no callable always follows the same one. No round begins after
    `limit` seconds, but at least one is run.
    """
    for call in calls.values():
        for _ in range(warmup):
            if call.setup is not None:
                call.setup()
            call.run()
    durations: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + limit
    for count in range(rounds):
        if count and time.monotonic() > deadline:
            break
        order = list(calls.items())
        for name, call in order if count % 2 == 0 else reversed(order):
            if call.setup is not None:
                call.setup()
            durations[name].append(seconds(call.run, device))
    return durations


def median_ratio(durations: Iterable[float], reference: Iterable[float]) -> float:
    """Returns the ratio of the medians."""
    return statistics.median(durations) / statistics.median(reference)


class PeakMemory:
    """The peak memory inside a `with` block, in bytes, beyond the memory at its beginning.

    On CUDA it is the allocator's peak. On the CPU it is the resident set of this process, which includes the buffers of
    libraries: use it in a separate process, after a warm-up.
    """

    def __init__(self, device: str) -> None:
        self.device, self.before, self.peak = device, 0, 0

    @property
    def bytes(self) -> int:
        return self.peak - self.before

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            _give_back_free_memory()
            self.before = _reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = _status("VmHWM")


_PROC = Path("/proc/self")


def _status(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_PROC}/status has no {field}: the peak memory of a process cannot be read on this system")


def _reset_peak() -> int:
    """Resets the process's peak resident set to the current one, and returns it."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(
            f"cannot write {_PROC}/clear_refs ({error}): peak memory on the CPU is measured on Linux only"
        ) from error
    return _status("VmRSS")


def _give_back_free_memory() -> None:
    # memory that the allocator kept after the warm-up would hide a part of the peak; only glibc has this call
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
