"""The CUDA kernels for the tests: those of the extension on a GPU, else g++'s build of the same sources, emulated.

Without a GPU, g++ compiles the source of the kernels against cuda_emulation/, which runs each CUDA thread as a fiber on
the CPU. That cannot show races, speed, or what a single instruction of a GPU rounds to.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import prism_kernels.ops  # noqa: F401

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def _cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parents[1])]
    found = (Path(home) / "include" for home in homes if home)
    return next((include for include in found if (include / "cuda_bf16.h").exists()), None)


def _compile(compiler: str, cuda: Path, source: str, path: Path) -> None:
    command = f"{compiler} -x c++ -std=c++20 -O1 -fPIC -shared -fno-strict-aliasing -U_FORTIFY_SOURCE".split()
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{ROOT / 'tests/kernels/cuda_emulation'}", f"-I{ROOT / 'csrc/include'}"]
    for include in [*cpp_extension.include_paths(), cuda]:
        command += ["-isystem", str(include)]
    command += [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(path)]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    command += ["-Wl,--no-as-needed", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def kernels(source: str, operators: tuple[str, ...], folder: Path) -> Iterator[Any]:
    """Yields the namespace in which the operators of csrc/cuda/<source>.cu run on tensors of DEVICE."""
    if DEVICE == "cuda":
        yield torch.ops.prism_kernels
        return
    compiler, cuda = shutil.which(os.environ.get("CXX", "g++")), _cuda_include()
    if compiler is None or cuda is None:
        pytest.skip("needs a GPU, or a C++ compiler and the CUDA headers to emulate one")
    path = folder / f"{source}.so"
    _compile(compiler, cuda, source, path)
    library = torch.library.Library("prism_emulated", "FRAGMENT")
    for name in operators:
        packet, _, overload = name.partition(".")
        schema = str(getattr(getattr(torch.ops.prism_kernels, packet), overload or "default")._schema)
        library.define(schema.removeprefix("prism_kernels::"))
    ctypes.CDLL(str(path))
    yield torch.ops.prism_emulated
    library._destroy()


def as_cuda_backend(source: str, operators: tuple[str, ...], folder: Path) -> Iterator[None]:
    """Lets the operators of the backend `cuda` take tensors of DEVICE while it is suspended."""
    made = kernels(source, operators, folder)
    namespace = next(made)
    library = None
    if DEVICE != "cuda":
        library = torch.library.Library("prism_kernels", "IMPL")
        for name in operators:
            packet, _, overload = name.partition(".")
            library.impl(name, getattr(getattr(namespace, packet), overload), "CPU")
    yield
    if library is not None:
        library._destroy()
    next(made, None)
