"""Peak memory of a step."""

import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:
    # Windows has no such module
    resource = None  # type: ignore[assignment]

_PROCESS = Path("/proc/self")


def begin_peak(device: torch.device) -> None:
    """Starts a new measurement, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # 5 sets the process's peak resident size to its present size
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        # not Linux, or not permitted: the peak is that since the process began
        return


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most bytes since `begin_peak`: torch's allocations on a GPU, elsewhere the resident memory.

    Where the system cannot reset it, the resident memory's peak is that since the process began. None: the system does
    not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _PROCESS / "status"
    if status.exists():
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.removesuffix("kB")) * 1024
    if resource is None:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB
    return largest if sys.platform == "darwin" else largest * 1024
