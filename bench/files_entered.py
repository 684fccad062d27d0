"""Counts the files of a package that a call enters, and the pairs of files that call each other: the length of a read.

Run: python -m bench.files_entered linear_logprob, or align_step
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import prism_kernels

if TYPE_CHECKING:
    from prism.runtime.runtime import Step


class Entered(NamedTuple):
    """The files of a package that were entered, and which file called into which other, by paths below its root."""

    files: set[str]
    pairs: set[tuple[str, str]]

    def report(self) -> str:
        calls = [f"  {caller} -> {callee}" for caller, callee in sorted(self.pairs)]
        lines = [f"{len(self.files)} files", *(f"  {name}" for name in sorted(self.files))]
        return "\n".join([*lines, f"{len(self.pairs)} pairs of caller and callee", *calls])


@contextmanager
def files_entered(root: Path) -> Iterator[Entered]:
    """Collects the files below `root` whose functions run inside the block, in this thread.

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
        yield entered
    finally:
        sys.setprofile(None)


def linear_logprob() -> Entered:
    """Runs the op once on the CPU, forward and backward, with a bias and the entropy."""
    make = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=make).requires_grad_() for shape in ((16, 32), (64, 32), (64,))
    )
    target = torch.randint(0, 64, (16,), generator=make)
    # the first use of the name imports the ops, which is not a part of the call
    op = prism_kernels.linear_logprob
    with files_entered(Path(prism_kernels.__file__).parent) as entered:
        out = op(hidden, weight, target, bias=bias, entropy=True, backend="cpu")
        assert out.entropy is not None
        (out.logp.sum() + out.entropy.sum()).backward()
    return entered


# a run that only alignment's second step is read from
SMALL = {
    "run.stages": ["align"],
    "model.tiny.layers": 2,
    "data.shapes.validation": 8,
    "data.shapes.test": 8,
    "rollout.align.prompts": 2,
    "rollout.align.group": 3,
    "rollout.align.max_new_tokens": 12,
    "evaluation.samples": 4,
    "evaluation.max_new_tokens": 12,
    "optimiser.align.steps": 3,
    "log.console": "quiet",
}


def align_step() -> Entered:
    """Runs the second step of alignment on the embedded world, from its problems to its rollouts' record."""
    # the kernels' tests count files where the trainer's packages are missing
    from prism.commands.run import run_stages
    from prism.config import load_config
    from prism.runtime.runtime import Runtime

    found: list[Entered] = []

    class Counting(Runtime):
        def steps(self, stage: str, **options: Any) -> Iterator["Step"]:
            for step in super().steps(stage, **options):
                if step.index != 1:
                    yield step
                    continue
                with files_entered(Path(sys.modules["prism"].__path__[0])) as entered:
                    yield step
                found.append(entered)

    with tempfile.TemporaryDirectory() as folder, Counting(load_config(None, {**SMALL, "run.folder": folder})) as rt:
        run_stages(rt)
    return found[0]


CALLS = {"linear_logprob": linear_logprob, "align_step": align_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("call", choices=sorted(CALLS))
    print(CALLS[parser.parse_args().call]().report())


if __name__ == "__main__":
    main()
