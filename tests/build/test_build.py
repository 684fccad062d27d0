"""The native build uses only the C shims of torch 2.11 and no Python API; without a compiler the install is pure."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prism_kernels.ops
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


# C functions that torch 2.11 exports: those in use, and some that a new kernel may need. Add a name only if
# torch/csrc/stable/c/shim.h or inductor/aoti_torch/c/shim.h of that release declares it
SHIMS_OF_TORCH_2_11 = """
aoti_torch_abi_version aoti_torch_library_init_impl aoti_torch_delete_library_object torch_library_impl
torch_call_dispatcher torch_parallel_for torch_get_num_threads torch_get_thread_idx
aoti_torch_new_uninitialized_tensor aoti_torch_new_tensor_handle aoti_torch_delete_tensor_object
aoti_torch_get_data_ptr torch_get_const_data_ptr torch_get_mutable_data_ptr
aoti_torch_get_dim aoti_torch_get_dtype aoti_torch_get_numel aoti_torch_get_size aoti_torch_get_sizes
aoti_torch_get_stride aoti_torch_get_strides aoti_torch_get_storage_offset
aoti_torch_is_contiguous aoti_torch_is_defined
aoti_torch_get_device_index aoti_torch_get_device_type aoti_torch_device_type_cpu aoti_torch_device_type_cuda
torch_list_size torch_list_get_item torch_delete_list aoti_torch_empty_strided
aoti_torch_create_device_guard aoti_torch_delete_device_guard aoti_torch_get_current_cuda_stream
torch_c10_cuda_check_msg torch_c10_cuda_free_error_msg
aoti_torch_dtype_bool aoti_torch_dtype_uint8 aoti_torch_dtype_uint16 aoti_torch_dtype_uint32 aoti_torch_dtype_uint64
aoti_torch_dtype_int8 aoti_torch_dtype_int16 aoti_torch_dtype_int32 aoti_torch_dtype_int64
aoti_torch_dtype_float16 aoti_torch_dtype_bfloat16 aoti_torch_dtype_float32 aoti_torch_dtype_float64
aoti_torch_dtype_complex32 aoti_torch_dtype_complex64 aoti_torch_dtype_complex128
aoti_torch_dtype_float8_e4m3fn aoti_torch_dtype_float8_e4m3fnuz aoti_torch_dtype_float8_e5m2
aoti_torch_dtype_float8_e5m2fnuz torch_dtype_float8_e8m0fnu torch_dtype_float4_e2m1fn_x2
"""


def undefined_symbols(name):
    """Returns the undefined symbols of a library, without their versions."""
    library = str(Path(prism_kernels.__file__).parent / f"{name}.so")
    if shutil.which("nm"):
        lines = run("nm", "-D", "--undefined-only", library).stdout.splitlines()
        names = [line.split()[-1] for line in lines]
    elif shutil.which("readelf"):
        fields = [line.split() for line in run("readelf", "--dyn-syms", "--wide", library).stdout.splitlines()]
        names = [field[7] for field in fields if len(field) > 7 and field[6] == "UND"]
    else:
        pytest.fail("needs nm or readelf (binutils) to read a library's symbols")
    return {name.split("@")[0] for name in names}


@pytest.mark.parametrize("name", BUILT)
def test_library_needs_only_the_shims_of_torch_2_11(name):
    symbols = undefined_symbols(name)
    of_torch = {s for s in symbols if "torch" in s or "c10" in s}
    assert "aoti_torch_library_init_impl" in of_torch
    assert sorted(of_torch - set(SHIMS_OF_TORCH_2_11.split())) == []
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    # mangled names of torch's C++ API: at::, c10:: and torch::
    assert not [s for s in symbols if re.match(r"_Z.*(2at|3c10|5torch)", s)]


@pytest.mark.parametrize("name", BUILT)
def test_host_code_calls_no_device_function(name):
    """nvcc silently compiles such a call into a call of `exit`, which nothing else in the library calls."""
    assert "exit" not in undefined_symbols(name)


@pytest.mark.parametrize("name", BUILT)
def test_library_loads_and_registers(name):
    assert native_reason[name] is None
    key = {"_C": "CPU", "_C_cuda": "CUDA"}[name]
    for op in ("anchored_rows_fwd", "anchored_rows_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prism_kernels::{op}", key)


def test_the_cuda_library_is_built_where_nvcc_is_installed():
    wanted = shutil.which("nvcc") is not None and os.environ.get("PRISM_KERNELS_CUDA") != "0"
    assert wanted == ("_C_cuda" in BUILT)


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that an installation needs, so that it writes nothing into the source tree."""
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
    "compiler, message",
    [pytest.param("/bin/false", "fails on a C\\+\\+20 program", marks=pytest.mark.full), ("no-such-cc", "is not")],
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
def test_sources_that_do_not_compile_give_a_pure_installation(tree):
    (tree / "csrc/cpu/anchored_rows.cpp").write_text("#error this does not compile\n")
    done = install(tree, "--no-build-isolation")
    assert "prism_kernels._C is not built: its compilation failed" in done.stdout + done.stderr
    assert (tree / "site" / "prism_kernels" / "py.typed").exists()
    assert not list((tree / "site" / "prism_kernels").glob("*.so"))
    assert "Tag: py3-none-any" in next((tree / "site").glob("*.dist-info/WHEEL")).read_text()


@pytest.mark.slow
def test_required_native_code_that_cannot_be_built_is_an_error(tree):
    done = install(tree, "--no-build-isolation", check=False, CXX="/bin/false", PRISM_KERNELS_REQUIRE="1")
    assert done.returncode != 0
    assert "PRISM_KERNELS_REQUIRE=1 makes this an error" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_isolated_build_without_torch_is_pure(tree):
    done = install(tree)
    assert "torch cannot be imported" in done.stdout + done.stderr
    assert not list((tree / "site" / "prism_kernels").glob("*.so"))


def test_architectures_are_read_in_torchs_notation():
    code = (
        "import setuptools; setuptools.setup = lambda **k: None\n"
        "import runpy; m = runpy.run_path('setup.py'); print(m['architecture_flags']())"
    )
    done = run(sys.executable, "-c", code, TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0+PTX", PRISM_KERNELS_SKIP_BUILD="1")
    for flag in ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100", "code=compute_100"):
        assert flag in done.stdout
    done = run(sys.executable, "-c", code, check=False, TORCH_CUDA_ARCH_LIST="Hopper", PRISM_KERNELS_SKIP_BUILD="1")
    assert done.returncode != 0 and "expected TORCH_CUDA_ARCH_LIST like" in done.stderr
