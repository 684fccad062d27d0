"""Every Triton kernel, compiled for three architectures without a GPU, with the tiles that ship; -s prints a table."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prism_kernels.ops.anchored_rows import kernels as rows
from prism_kernels.ops.linear_logprob import kernels as head

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under TRITON_INTERPRET=1 kernels are not compiled"
)
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# 80 has no tensor descriptors and 90 has; 100, compiled like 90, is left to `make test-all`
ARCHITECTURES = (80, 90, pytest.param(100, marks=pytest.mark.full))
SOFTCAP = 30.0
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


class Code(NamedTuple):
    registers: int
    shared: int
    stack: int
    opcodes: list[str]
    text: str

    @property
    def spills(self):
        return sum(opcode.startswith(("LDL", "STL")) for opcode in self.opcodes)

    def uses(self, pattern):
        return any(re.match(pattern, opcode) for opcode in self.opcodes)


def compile_kernel(folder, kernel, arguments, architecture, **options):
    """Returns the machine code. An argument is a type, ":16" if divisible by 16, or a constant."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(arguments[name], str):
            signature[name], _, divisor = arguments[name].partition(":")
            if divisor:
                attributes[(i,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name], constants[name] = "constexpr", arguments[name]
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={**options, **rows.FP_FUSION},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])

    def read(*command):
        return subprocess.run([*command, cubin], capture_output=True, text=True, check=True).stdout

    usage = read(BINARIES / "cuobjdump", "-res-usage")
    text = read(BINARIES / "nvdisasm", "-c")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    assert len(opcodes) > 50
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Code(registers, built.metadata.shared, stack, opcodes, text)


@pytest.fixture(scope="module", autouse=True)
def table():
    print(f"\n{'kernel':70s} sm  registers  shared  spills  instructions")


@pytest.fixture
def compiled(tmp_path):
    def run(name, kernel, arguments, architecture, **options):
        code = compile_kernel(tmp_path, kernel, arguments, architecture, **options)
        size = f"{code.registers:9d} {code.shared:7d} {code.spills:7d} {len(code.opcodes):13d}"
        print(f"{name:70s} {architecture:3d} {size}")
        assert code.spills == 0
        assert code.stack == 0
        return code

    return run


def pointer(dtype):
    return None if dtype is None else f"*{dtype}:16"


def row_arguments(kernel, accumulator, bias, **arguments):
    strides = dict.fromkeys(kernel.arg_names, "i32")
    vectors = {name: pointer(accumulator) for name in ("anchor", "inv_temperature", "stats", "coefficients")}
    common = {"target": "*i64:16", "bias": pointer(bias), "bias_stride": 1 if bias else "i32:16", "columns": "i32:16"}
    return {**strides, **vectors, **common, **arguments}


def row_tile(tiles, architecture, accumulator):
    tile = tiles[architecture]
    return {"FOLD": tile.fold * 4 // BYTES[accumulator], "LANES": tile.lanes}, tile.num_warps


# architecture and dtypes choose the tiles; bias and softcap add registers
@pytest.mark.grid
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias, softcap", [(None, 0.0), ("fp32", SOFTCAP)])
@pytest.mark.parametrize(
    "z, exp, in_place",
    [
        ("fp32", None, False),
        ("bf16", None, False),
        ("fp16", None, False),
        ("fp64", None, False),
        ("fp32", "bf16", False),
        ("bf16", "bf16", False),
        ("fp32", "fp32", True),
        ("bf16", "bf16", True),
        ("fp16", "fp16", True),
        ("fp64", "fp64", False),
    ],
)
def test_row_forward(compiled, architecture, z, exp, in_place, bias, softcap):
    accumulator = "fp64" if z == "fp64" else "fp32"
    bias = accumulator if bias else None
    kernel = rows._anchored_rows_fwd_kernel
    tile, num_warps = row_tile(rows.FORWARD_TILES, architecture, accumulator)
    arguments = row_arguments(
        kernel, accumulator, bias, z=pointer(z), z_row_stride="i32:16", z_stride=1, exp=pointer(exp),
        exp_row_stride="i32:16", exp_stride=1 if exp else "i32:16", SOFTCAP=softcap, CHAIN=bool(softcap),
        IN_PLACE=in_place, LOWEST=-3.4e38, **tile,
    )  # fmt: skip
    name = f"rows forward {z} -> {'in place' if in_place else exp}{', bias, soft cap' if bias else ''}"
    registers = rows.forward_registers(torch.float64 if z == "fp64" else torch.float32, softcap)
    code = compiled(name, kernel, arguments, architecture, num_warps=num_warps, maxnreg=registers)
    assert code.uses(r"LDG\.E\S*\.128")
    if exp:
        assert code.uses(r"STG\.E\S*\.128")


# architecture and dtypes choose the tiles; softcap adds registers
@pytest.mark.grid
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("softcap", [0.0, SOFTCAP])
@pytest.mark.parametrize(
    "source, is_exp, out",
    [
        ("bf16", True, "bf16"),
        ("fp32", True, "fp32"),
        ("fp32", False, "bf16"),
        ("fp32", False, "fp32"),
        ("bf16", False, "bf16"),
        ("fp16", False, "fp16"),
        ("fp64", True, "fp64"),
        ("fp64", False, "fp64"),
    ],
)
def test_row_backward(compiled, architecture, source, is_exp, out, softcap):
    accumulator = "fp64" if source == "fp64" else "fp32"
    kernel = rows._anchored_rows_bwd_kernel
    tile, num_warps = row_tile(rows.BACKWARD_TILES, architecture, accumulator)
    bias = accumulator if softcap and not is_exp else None
    arguments = row_arguments(
        kernel, accumulator, bias, source=pointer(source), source_row_stride="i32:16", source_stride=1,
        out=pointer(out), out_row_stride="i32:16", out_stride=1, SOURCE_IS_EXP=is_exp, SOFTCAP=softcap, **tile,
    )  # fmt: skip
    name = f"rows backward {source}{' exp' if is_exp else ''} -> {out}{', soft cap' if softcap else ''}"
    code = compiled(name, kernel, arguments, architecture, num_warps=num_warps)
    assert code.uses(r"LDG\.E\S*\.128")
    assert code.uses(r"STG\.E\S*\.128")


FUSED = [
    # tile, dtype, bias, soft cap
    ("half", "bf16", None, 0.0),
    ("half", "bf16", "bf16", 0.0),
    ("half", "fp16", "fp32", 0.0),
    ("half_capped", "bf16", None, SOFTCAP),
    ("half_capped", "bf16", "fp32", SOFTCAP),
    ("single", "fp32", None, 0.0),
    ("single", "fp32", "fp32", SOFTCAP),
    ("unaligned", "bf16", "fp32", SOFTCAP),
    ("unaligned", "fp32", "fp32", SOFTCAP),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("which, dtype, bias, softcap", FUSED)
def test_fused_forward(compiled, architecture, which, dtype, bias, softcap):
    tiles = head.TILES[architecture]
    tile = getattr(tiles, which)
    aligned = which != "unaligned"
    descriptors = tiles.descriptors and aligned
    by_row = "i32:16" if aligned else "i32"
    operands = {"hidden": pointer(dtype), "weight": pointer(dtype)}
    if descriptors:
        operands = {
            "hidden": f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>",
            "weight": f"tensordesc<{dtype}[{tile.columns}, {tile.depth}]>",
        }
    arguments = {
        **operands, "hidden_row_stride": by_row, "hidden_stride": 1, "weight_row_stride": by_row, "weight_stride": 1,
        "target": "*i64:16", "anchor": "*fp32:16", "inv_temperature": "*fp32:16", "bias": pointer(bias),
        "partial": "*fp32:16", "rows": "i32", "columns": "i32:16", "depth": by_row, "splits": "i32",
        "tiles_of_split": "i32", "SOFTCAP": softcap, "DESCRIPTORS": descriptors,
        "BLOCK_T": tile.rows, "BLOCK_V": tile.columns, "BLOCK_D": tile.depth, "GROUP": tile.group,
    }  # fmt: skip
    name = f"fused forward {which} {dtype}{', bias' if bias else ''}{', soft cap' if softcap else ''}"
    code = compiled(
        name, head._linear_logprob_fwd_kernel, arguments, architecture,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
    )  # fmt: skip
    # 8.6 and 8.9, which take the tiles of 8.0, have 99 KB of shared memory
    assert code.shared <= {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}[architecture]
    assert code.uses("UTMALDG") == descriptors
    if not which.startswith("half"):
        return
    assert code.uses({80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}[architecture])
    if architecture == 80:
        assert code.uses(r"LDGSTS\S*\.128")
    if architecture == 90:
        # one product is left in flight while the next one's operands are awaited
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", code.text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("splits", [64, 256])
def test_merge_of_splits(compiled, architecture, splits):
    arguments = dict.fromkeys(("partial", "anchor", "inv_temperature", "stats"), "*fp32:16")
    arguments |= {"stats_row_stride": "i32", "rows": "i32", "splits": "i32", "SPLITS": splits, "BLOCK_T": 16}
    compiled(f"merge of {splits} splits", head._linear_logprob_merge_kernel, arguments, architecture, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype, bias, softcap", [("bf16", None, 0.0), ("fp16", "fp32", SOFTCAP), ("fp32", None, 0.0)])
def test_target_logits(compiled, architecture, dtype, bias, softcap):
    kernel = head._target_logits_kernel
    strides = dict.fromkeys(kernel.arg_names, "i32:16")
    arguments = strides | {
        "hidden": pointer(dtype), "hidden_stride": 1, "weight": pointer(dtype), "weight_stride": 1,
        "target": "*i64:16", "bias": pointer(bias), "out": "*fp32:16", "SOFTCAP": softcap, "BLOCK": 1024,
    }  # fmt: skip
    code = compiled(f"target logits {dtype}{', bias, soft cap' if bias else ''}", kernel, arguments, architecture)
    assert code.uses(r"LDG\.E\S*\.128")


def test_spills_are_found_where_there_are_some(tmp_path):
    kernel = rows._anchored_rows_fwd_kernel
    arguments = row_arguments(
        kernel, "fp32", "fp32", z="*fp32:16", z_row_stride="i32:16", z_stride=1, exp="*bf16:16",
        exp_row_stride="i32:16", exp_stride=1, SOFTCAP=SOFTCAP, CHAIN=True, IN_PLACE=False, LOWEST=-3.4e38,
        FOLD=8, LANES=2048,
    )  # fmt: skip
    code = compile_kernel(tmp_path, kernel, arguments, 90, num_warps=8, maxnreg=40)
    assert code.spills > 0
    assert code.stack > 0
