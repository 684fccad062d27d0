"""The CUDA sources compile for sm_80, sm_90a and sm_100, without spills and with the accesses they were written for."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}

pytestmark = pytest.mark.slow


def _tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit; Triton's package carries some of them too."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).exists()), None)


class Compiled:
    """What nvcc says about the kernels of a source file: {(architecture, kernel): ...}."""

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
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    nvcc = _tool("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("fatbin")
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
        command += [f"-gencode=arch={virtual},code={real}" for real, virtual in ARCHITECTURES.items()]
        done = subprocess.run([*command, str(source), "-o", str(fatbin)], capture_output=True, text=True)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        found[source.stem] = Compiled(fatbin, log)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_kernels_neither_spill_nor_use_the_stack(compiled, source, architecture):
    spills = {kernel: used for (arch, kernel), used in compiled[source].spills.items() if arch == architecture}
    assert spills, f"nvcc reports no kernel for {architecture}"
    assert not {kernel: used for kernel, used in spills.items() if any(used)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_blocks_of_anchored_rows_fit_a_multiprocessor(compiled, architecture):
    registers = compiled["anchored_rows"].registers
    used = {kernel: n for (arch, kernel), n in registers.items() if arch == architecture and "Id" not in kernel}
    # 65,536 registers, 512 threads to a block
    assert used and max(used.values()) <= 64


@pytest.fixture(scope="module")
def machine_code(compiled) -> dict[str, list[str]]:
    """The instructions of each kernel of anchored_rows for sm_90a."""
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    command = [cuobjdump, "--dump-sass", "-arch", "sm_90a", str(compiled["anchored_rows"].fatbin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        kernels[function.split()[0]] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", function)
    return kernels


# mangled template arguments: source, destination
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
    # four packs of four columns, and a column on its own before and after them
    assert sum("MUFU.EX2" in instruction for instruction in code) == 17
