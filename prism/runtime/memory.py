"""The most memory that something takes."""

import resource
import sys
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def begin_peak(device: torch.device) -> None:
    """Forgets the peak so far, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # 5: the process's highest resident size becomes its present one
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        # no Linux, or not allowed: peaks are those since the process began
        return


def peak_bytes(device: torch.device) -> int:
    """Returns the most bytes since `begin_peak`: that torch allocated on a GPU, or resident of the process.

    Where the system forgets no peak, of a process it is the most since it began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _PROCESS / "status"
    if status.exists():
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.removesuffix("kB")) * 1024
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB
    return found if sys.platform == "darwin" else found * 1024
