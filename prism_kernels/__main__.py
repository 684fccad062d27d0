"""Prints the versions, the devices, and for each op and backend whether it is available, or why not."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from prism_kernels import __version__, backend_status


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Prints the report."""
    print(f"prism_kernels {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "transformers"):
        print(f"{package:<13} {_version(package)}")
    print(f"cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            print(f"cuda:{index}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}, CUDA {torch.version.cuda}")
    else:
        print("cuda          no device")
    print()
    for op, backend, reason in backend_status():
        print(f"{op:<18} {backend:<8} {'available' if reason is None else 'not available: ' + reason}")


if __name__ == "__main__":
    try:
        main()
        # a closed reader, as of `| head`, shows here, rather than when the interpreter exits
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
