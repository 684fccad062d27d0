"""The CUDA sources compile for sm_80, sm_90a and sm_100, without spills and with wide memory accesses."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import prism_kernels.ops  # noqa: F401
from prism_kernels.library import native_reason

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
# nvcc takes half a minute for each; `make test` compiles for Hopper
EACH = [name if name == "sm_90a" else pytest.param(name, marks=pytest.mark.full) for name in ARCHITECTURES]

pytestmark = pytest.mark.slow


def _tool(name: str) -> str | None:
    """Returns the path of a CUDA toolkit program, from the PATH or from Triton's package."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).exists()), None)


class Compiled:
    """The stack, spills and registers that nvcc reports for the kernels of a source file, by (architecture, kernel)."""

    def __init__(self, fatbin: Path, log: str):
        self.fatbin = fatbin
        self.spills = {}
        self.registers = {}
        entry = r"Compiling entry function '(\w+)' for '(\w+)'(.*?)Used (\d+) registers"
        for kernel, architecture, between, registers in re.findall(entry, log, re.DOTALL):
            self.spills[architecture, kernel] = tuple(
                map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*? stores, (\d+) .*? loads", between).groups())
            )
            self.registers[architecture, kernel] = int(registers)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    nvcc = _tool("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("fatbin")
    chosen = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = {"sm_90a", *(case.params["architecture"] for case in chosen if case and "architecture" in case.params)}
    found = {}
    for source in SOURCES:
        fatbin = folder / f"{source.stem}.fatbin"
        command = [
            nvcc,
            "-fatbin",
            "-O3",
            "-std=c++20",
            "-Xptxas",
            "-v",
            "--threads",
            "0",
            f"-I{ROOT / 'csrc/include'}",
        ]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [f"-gencode=arch={virtual},code={real}" for real, virtual in ARCHITECTURES.items() if real in wanted]
        done = subprocess.run([*command, str(source), "-o", str(fatbin)], capture_output=True, text=True)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        found[source.stem] = Compiled(fatbin, log)
    return found


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_kernels_neither_spill_nor_use_the_stack(compiled, source, architecture):
    spills = {kernel: used for (arch, kernel), used in compiled[source].spills.items() if arch == architecture}
    assert spills, f"nvcc reports no kernel for {architecture}"
    assert not {kernel: used for kernel, used in spills.items() if any(used)}


@pytest.mark.parametrize("architecture", EACH)
def test_two_blocks_of_anchored_rows_fit_a_multiprocessor(compiled, architecture):
    registers = compiled["anchored_rows"].registers
    used = {kernel: n for (arch, kernel), n in registers.items() if arch == architecture and "Id" not in kernel}
    # a multiprocessor has 65,536 registers; a block has 512 threads
    assert used and max(used.values()) <= 64


# these kernels synchronise the whole grid, so all blocks of 256 threads must be resident at once
@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize(
    "source, kernel, blocks",
    [
        # mangled template arguments: the type of the computation, and whether the loss is plain
        ("policy_loss", "policy_loss_fwd_kernelIfLb1E", 3),
        ("policy_loss", "policy_loss_fwd_kernelIfLb0E", 2),
        ("policy_loss", "policy_loss_fwd_kernelIdLb", 1),
        ("group_advantage", "group_advantage_fwd_kernel", 2),
        ("group_advantage", "prism_advantage_fwd_kernel", 2),
    ],
)
def test_blocks_that_wait_for_each_other_fit_a_multiprocessor(compiled, architecture, source, kernel, blocks):
    registers = compiled[source].registers
    used = [n for (arch, name), n in registers.items() if arch == architecture and kernel in name]
    # registers are allocated in units of 8 per thread
    assert used and (max(used) + 7) // 8 * 8 * 256 * blocks <= 65536


@pytest.fixture(scope="module")
def disassembled(compiled) -> Callable[[str], dict[str, list[str]]]:
    """Returns the instructions of each kernel of a source for sm_90a."""
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")

    @functools.cache
    def kernels(source: str) -> dict[str, list[str]]:
        command = [cuobjdump, "--dump-sass", "-arch", "sm_90a", str(compiled[source].fatbin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {}
        for function in re.split(r"\n\s*Function : ", text)[1:]:
            found[function.split()[0]] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", function)
        return found

    return kernels


@pytest.fixture(scope="module")
def machine_code(disassembled) -> dict[str, list[str]]:
    """Returns the instructions of each kernel of anchored_rows for sm_90a."""
    return disassembled("anchored_rows")


# mangled template arguments: types of source and destination
@pytest.mark.parametrize(
    "kernel, loads, stores",
    [
        ("fwd_kernelIf13__nv_bfloat16Lb0E", 4, {"STG.E.EF.64": 4, "STG.E.U16": 1}),
        ("fwd_kernelIfvLb0E", 4, {}),
        ("fwd_kernelI13__nv_bfloat16vLb0E", 4, {}),
        ("bwd_kernelI13__nv_bfloat16S2_Lb1ELb0E", 4, {"STG.E.EF.128": 4}),
        ("bwd_kernelIffLb0ELb0E", 4, {"STG.E.EF.128": 4}),
    ],
)
def test_rows_are_read_and_written_in_wide_accesses(machine_code, kernel, loads, stores):
    code = next(code for name, code in machine_code.items() if kernel in name)
    assert sum("LDG.E.EF.128" in instruction for instruction in code) == loads
    for store, count in stores.items():
        assert sum(store in instruction for instruction in code) >= count
    assert not any(re.search(r"\b(LDL|STL)\b", instruction) for instruction in code)


def test_exponentials_take_one_instruction_each(machine_code):
    code = next(code for name, code in machine_code.items() if "fwd_kernelIf13__nv_bfloat16Lb0E" in name)
    # one for each of four packs of four columns, and one in the loop over single columns
    assert sum("MUFU.EX2" in instruction for instruction in code) == 17


# the first pass reads up to three columns, the last pass two or six
@pytest.mark.parametrize("plain, columns", [(True, 3 + 2), (False, 3 + 6)])
def test_tokens_are_read_and_written_in_wide_accesses(disassembled, plain, columns):
    kernels = disassembled("policy_loss")
    code = next(code for name, code in kernels.items() if f"policy_loss_fwd_kernelIfLb{int(plain)}E" in name)
    # 128-bit: each column as fp32, and as fp64 in two halves; 64-bit: as bf16 and fp16; 32-bit: the mask in both passes
    assert sum("LDG.E.128.CONSTANT" in i for i in code) == 3 * columns
    assert sum("LDG.E.64.CONSTANT" in i for i in code) == 2 * columns
    assert sum("LDG.E.CONSTANT" in i for i in code) == 2
    # stores of dL/dlogp, and of dL/dentropy unless the loss is plain
    assert sum("STG.E.EF.128" in i for i in code) == (1 if plain else 2)


@pytest.mark.parametrize("source", ["policy_loss", "group_advantage"])
def test_sums_use_no_float_atomics(disassembled, source):
    """Float atomics add in a varying order. The grid barrier and the list of large groups use integer atomics."""
    for code in disassembled(source).values():
        atomics = [i for i in code if re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\b", i)]
        assert atomics and not [i for i in atomics if re.search(r"\.F(16|32|64)", i)]


@pytest.mark.parametrize(
    "operator", ["policy_loss_fwd.cuda", "group_advantage_fwd.cuda", "prism_advantage_fwd.cuda", "anchored_rows_fwd"]
)
def test_the_built_library_registers_its_operators(operator):
    if native_reason["_C_cuda"] is not None:
        pytest.skip(f"needs the CUDA extension: {native_reason['_C_cuda']}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prism_kernels::{operator}", "CUDA")
