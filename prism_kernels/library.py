"""The one torch Library of the package, and the native extensions that implement parts of it.

Schemas are defined in Python, next to each op; the extensions only supply implementations. So an installation
without a compiler has the same operators, and an extension can be built for any Python (LibTorch stable ABI).
"""

from pathlib import Path

import torch

LIBRARY = torch.library.Library("prism_kernels", "DEF")

# the reason why an extension is not loaded; None once it is
native_reason: dict[str, str | None] = {}

_HOW_TO_BUILD = {
    "_C": "it needs a C++ compiler: install one, then run `pip install --no-build-isolation .`",
    "_C_cuda": "it needs nvcc: install the CUDA toolkit, set CUDA_HOME, then run `pip install --no-build-isolation .`",
}


def define(schema: str) -> None:
    """Defines an operator `prism_kernels::<schema>`, callable under torch.compile."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


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
