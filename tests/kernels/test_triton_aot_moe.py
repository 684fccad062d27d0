"""The Triton kernels around the experts, compiled for three architectures without a GPU; -s prints a table."""

import os

import pytest
import torch
from test_triton_aot import ARCHITECTURES, compiled, pointer, table  # noqa: F401

from prism_kernels.ops.moe_experts import kernels as experts

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under TRITON_INTERPRET=1 kernels are not compiled"
)
DTYPES = ("bf16", "fp32", "fp64")


def build(compiled, name, kernel, architecture, dtype, maxnreg=None, **arguments):  # noqa: F811
    tile = experts.TILES[architecture]
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    common = {"columns": "i32:16", "BLOCK": tile.columns}
    if "dtype" in kernel.arg_names:
        common["dtype"] = getattr(experts.tl, accumulator.replace("fp", "float"))
    options = {"num_warps": tile.num_warps, "maxnreg": maxnreg}
    code = compiled(f"{name} {dtype}", kernel, {**common, **arguments}, architecture, **options)
    assert code.uses(r"LDG\.E\S*\.128")
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(compiled, architecture, dtype):  # noqa: F811
    arguments = {"source": pointer(dtype), "permutation": "*i32:16", "out": pointer(dtype), "TOP_K": 2}
    code = build(compiled, "gather", experts._gather_kernel, architecture, dtype, **arguments)
    assert code.uses(r"STG\.E\S*\.128")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_forward(compiled, architecture, dtype):  # noqa: F811
    arguments = {"pre": pointer(dtype), "out": pointer(dtype)}
    code = build(compiled, "swiglu", experts._swiglu_fwd_kernel, architecture, dtype, **arguments)
    assert code.uses(r"STG\.E\S*\.128")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "needs, dtype",
    [("all", "bf16"), ("all", "fp32"), ("all", "fp64"), ("rows", "bf16"), ("activation", "bf16"), ("weight", "bf16")],
)
def test_swiglu_backward(compiled, architecture, dtype, needs):  # noqa: F811
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    arguments = {
        "pre": pointer(dtype),
        "grad": pointer(None if needs == "activation" else dtype),
        "weight": pointer(accumulator),
        "permutation": "*i32:16",
        "grad_pre": pointer(dtype if needs in ("all", "rows") else None),
        "weighted": pointer(dtype if needs in ("all", "activation") else None),
        "grad_weight": pointer(accumulator if needs in ("all", "weight") else None),
    }
    registers = experts.backward_registers(torch.float64 if dtype == "fp64" else torch.float32)
    name = f"swiglu backward, {needs}"
    build(compiled, name, experts._swiglu_bwd_kernel, architecture, dtype, registers, **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "top_k, weighted, dtype",
    [(2, True, "bf16"), (2, False, "bf16"), (2, True, "fp32"), (1, True, "bf16"), (8, True, "bf16"), (8, True, "fp64")],
)
def test_combine(compiled, architecture, dtype, weighted, top_k):  # noqa: F811
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    arguments = {
        "rows": pointer(dtype),
        "row": "*i32:16",
        "weight": pointer(accumulator if weighted else None),
        "out": pointer(dtype),
        "TOP_K": top_k,
    }
    name = f"combine of {top_k}{', weighted' if weighted else ''}"
    build(compiled, name, experts._combine_kernel, architecture, dtype, **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [8, 256])
def test_order(compiled, architecture, count):  # noqa: F811
    arguments = dict.fromkeys(("offsets", "permutation", "ends", "safe", "row"), "*i32:16")
    arguments |= {"index": "*i64:16", "total": "i32", "experts": "i32", "EXPERTS": count, "BLOCK": 1024}
    compiled(f"order of {count} experts", experts._order_kernel, arguments, architecture, num_warps=4)
