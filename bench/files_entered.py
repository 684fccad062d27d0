"""Counts the files of a package that a call enters, and the pairs of files that call each other: the length of a read.

Run: python -m bench.files_entered linear_logprob
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import prism_kernels


class Entered(NamedTuple):
    """The files of a package that were entered, and which file called into which other, by paths below its root."""

    files: set[str]
    pairs: set[tuple[str, str]]

    def report(self) -> str:
        calls = [f"  {caller} -> {callee}" for caller, callee in sorted(self.pairs)]
        lines = [f"{len(self.files)} files", *(f"  {name}" for name in sorted(self.files))]
        return "\n".join([*lines, f"{len(self.pairs)} pairs of caller and callee", *calls])


def files_entered(run: Callable[[], object], root: Path) -> Entered:
    """Returns the files below `root` whose functions ran during `run`, in this thread.

    A call through other code, such as torch's, counts for the last function of the package before it.
    """
    entered = Entered(set(), set())
    prefix = f"{root.resolve()}/"

    def name_of(frame: FrameType | None) -> str | None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(prefix):
                return frame.f_code.co_filename.removeprefix(prefix)
            frame = frame.f_back
        return None

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(prefix):
            return
        callee, caller = name_of(frame), name_of(frame.f_back)
        assert callee is not None
        entered.files.add(callee)
        if caller is not None and caller != callee:
            entered.pairs.add((caller, callee))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def linear_logprob() -> None:
    """Runs the op once on the CPU, forward and backward, with a bias and the entropy."""
    make = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=make).requires_grad_() for shape in ((16, 32), (64, 32), (64,))
    )
    target = torch.randint(0, 64, (16,), generator=make)
    out = prism_kernels.linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend="cpu")
    assert out.entropy is not None
    (out.logp.sum() + out.entropy.sum()).backward()


CALLS: dict[str, tuple[Callable[[], None], Path]] = {
    "linear_logprob": (linear_logprob, Path(prism_kernels.__file__).parent),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("call", choices=sorted(CALLS))
    print(files_entered(*CALLS[parser.parse_args().call]).report())


if __name__ == "__main__":
    main()
