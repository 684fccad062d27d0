"""What the native build produces: only C shims of torch 2.11, nothing of Python, a pure install where it cannot be."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension as cpp

import prism_kernels
from prism_kernels.library import native_reason

ROOT = Path(__file__).parents[2]
BUILT = [
    name for name in ("_C", "_C_cuda") if (Path(prism_kernels.__file__).parent / f"{name}.so").exists() or name == "_C"
]


def run(*command, check=True, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def undefined_symbols(name):
    library = Path(prism_kernels.__file__).parent / f"{name}.so"
    lines = run("nm", "-D", "--undefined-only", str(library)).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


@pytest.fixture(scope="module")
def shims(tmp_path_factory):
    """The C functions that torch's headers declare for a target of 2.11."""
    source = tmp_path_factory.mktemp("shims") / "shims.cpp"
    source.write_text("#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n")
    include = [f"-I{path}" for path in cpp.include_paths()]
    target = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    text = run("c++", "-E", "-P", "-std=c++20", *target, *include, str(source)).stdout
    names = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))
    newer = run("c++", "-E", "-P", "-std=c++20", *include, str(source)).stdout
    # the oldest supported version really narrows the list, so the check below can fail
    assert len(names) < len(set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", newer)))
    return names


@pytest.mark.parametrize("name", BUILT)
def test_library_needs_only_the_shims_of_torch_2_11(name, shims):
    symbols = undefined_symbols(name)
    ours = {s for s in symbols if s.startswith(("aoti_torch", "torch_"))}
    assert "aoti_torch_library_init_impl" in ours
    assert ours <= shims, sorted(ours - shims)
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    # mangled names of torch's C++
    assert not [s for s in symbols if re.search(r"^_Z.*(2at|3c10|5torch)\d", s)]


@pytest.mark.parametrize("name", BUILT)
def test_library_loads_and_registers(name):
    assert native_reason[name] is None
    key = {"_C": "CPU", "_C_cuda": "CUDA"}[name]
    for op in ("anchored_rows_fwd", "anchored_rows_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prism_kernels::{op}", key)


def test_the_cuda_library_is_built_where_nvcc_is():
    assert (shutil.which("nvcc") is not None) == ("_C_cuda" in BUILT)


@pytest.fixture
def tree(tmp_path):
    """A copy of what an installation needs, so that nothing is written into this one."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in ("csrc", "prism_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def install(tree, *options, check=True, **environment):
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", str(tree / "site"), str(tree)]
    return run(*command, *options, check=check, **{"PRISM_KERNELS_CUDA": "0", **environment})


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, message", [("/bin/false", "fails on a C\\+\\+20 program"), ("no-such-cc", "is not")]
)
def test_a_missing_compiler_gives_a_pure_installation(tree, compiler, message):
    done = install(tree, "--no-build-isolation", CXX=compiler)
    assert re.search(f"native code is not built: .*{message}", done.stdout + done.stderr)
    assert (tree / "site" / "prism_kernels" / "py.typed").exists()
    assert not list((tree / "site" / "prism_kernels").glob("*.so"))
    code = (
        "import torch, prism_kernels as pk; print(pk.token_logprob(torch.zeros(1, 4), torch.tensor([1])).logp.item());"
        "print([s.reason for s in pk.backend_status() if s.backend == 'cpu'][0])"
    )
    used = run(sys.executable, "-P", "-c", code, PYTHONPATH=str(tree / "site"))
    assert float(used.stdout.split()[0]) == pytest.approx(-1.3862944)
    assert "it needs a C++ compiler" in used.stdout
    wheel = next((tree / "site").glob("*.dist-info/WHEEL")).read_text()
    assert "Tag: py3-none-any" in wheel


@pytest.mark.slow
def test_required_native_code_that_cannot_be_built_is_an_error(tree):
    done = install(tree, "--no-build-isolation", check=False, CXX="/bin/false", PRISM_KERNELS_REQUIRE="1")
    assert done.returncode != 0
    assert "PRISM_KERNELS_REQUIRE=1 asks for it" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_isolated_build_without_torch_is_pure(tree):
    done = install(tree)
    assert "torch is not there at build time" in done.stdout + done.stderr
    assert not list((tree / "site" / "prism_kernels").glob("*.so"))


def test_architectures_are_read_as_torch_writes_them():
    code = (
        "import setuptools; setuptools.setup = lambda **k: None\n"
        "import runpy; m = runpy.run_path('setup.py'); print(m['architecture_flags']())"
    )
    done = run(sys.executable, "-c", code, TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0+PTX", PRISM_KERNELS_SKIP_BUILD="1")
    for flag in ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100", "code=compute_100"):
        assert flag in done.stdout
    done = run(sys.executable, "-c", code, check=False, TORCH_CUDA_ARCH_LIST="Hopper", PRISM_KERNELS_SKIP_BUILD="1")
    assert done.returncode != 0 and "expected TORCH_CUDA_ARCH_LIST like" in done.stderr
