"""The one torch Library of the package, how an op enters it, and the native extensions that implement parts of it.

Schemas are defined in Python, next to each op; the extensions only supply implementations. So an installation
without a compiler has the same operators, and an extension can be built for any Python (LibTorch stable ABI).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prism_kernels import check

LIBRARY = torch.library.Library("prism_kernels", "DEF")

# the reason why an extension is not loaded; None once it is
native_reason: dict[str, str | None] = {}

_HOW_TO_BUILD = {
    "_C": "it needs a C++ compiler: install one, then run `pip install --no-build-isolation .`",
    "_C_cuda": "it needs nvcc: install the CUDA toolkit, set CUDA_HOME, then run `pip install --no-build-isolation .`",
}


def register_op(
    schema: str,
    *,
    fake: Callable[..., Any] | None = None,
    eager: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `prism_kernels::<schema>`, registers its implementations and returns the function that calls it.

    Args:
        schema: name, arguments and results. csrc implements an op by its name and dispatch key; nothing here says so.
        fake: returns empty results of the right shapes, for torch.compile; None where the op returns nothing and
            writes into its arguments.
        eager: the implementation in Python, on every device; None where csrc implements the op.
        triton: the implementation by Triton kernels, which becomes the overload `.triton` of the same schema.
        cuda: what `eager` calls for the backend "cuda", the last argument, once it has checked values. It takes the
            arguments before that one and calls an op of csrc. The returned function calls it directly where no values
            are checked, which saves an op that torch would dispatch to Python: 3.1 us of a call with 7 arguments,
            4.8 us of a call with 12.
    """
    name, arguments = schema.split("(", 1)
    overload = _define(schema, fake, eager, "CompositeExplicitAutograd")
    if triton is not None:
        _define(f"{name}.triton({arguments}", fake, triton, "CPU", "CUDA")
    if cuda is None:
        return overload

    def call(*values: Any) -> Any:
        if values[-1] == "cuda" and not check.reads_values(values[0]):
            return cuda(*values[:-1])
        return overload(*values)

    return call


def _define(
    schema: str, fake: Callable[..., Any] | None, implementation: Callable[..., Any] | None, *keys: str
) -> Callable[..., Any]:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"prism_kernels::{name}", fake or _returns_nothing, lib=LIBRARY)
    if implementation is not None:
        for key in keys:
            LIBRARY.impl(name, implementation, key)
    op, _, suffix = name.partition(".")
    overload: Callable[..., Any] = getattr(getattr(torch.ops.prism_kernels, op), suffix or "default")
    return overload


def _returns_nothing(*arguments: Any, **outputs: Any) -> None:
    """The fake of an op that writes into its arguments."""


def load_native() -> None:
    """Loads the extensions that were built; `native_reason` says why for each that was not."""
    for name, how in _HOW_TO_BUILD.items():
        path = Path(__file__).parent / f"{name}.so"
        if not path.exists():
            native_reason[name] = f"prism_kernels/{name}.so was not built; {how}"
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            native_reason[name] = f"prism_kernels/{name}.so does not load: {error}"
        else:
            native_reason[name] = None
