"""The C++ code by itself, with up to three damaged arguments: it refuses or runs, and stays within its memory.

AddressSanitizer, with which `make fuzz` runs this too, watches the memory.
"""

from contextlib import suppress

import pytest
import torch
from hypothesis import strategies as st
from values import FLOATS, booleans, damage, floats, integers, maybe

import prism_kernels as pk
from prism_kernels.backend import unavailable

REASON = unavailable("policy_loss", "cpu", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def native_calls(draw):
    """Returns the C++ ops with sound arguments of a random size: they check what they are given by themselves."""

    def choose(*values):
        return draw(st.sampled_from(values))

    ops, T, V = torch.ops.prism_kernels, draw(st.integers(0, 6)), choose(1, 2, 3, 15, 16, 17, 33, 70)
    dtype = choose(*FLOATS)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def rand(*shape, kind=exact):
        return floats(draw, *shape, dtype=kind).detach()

    target, ones = integers(draw, -1, V, T), torch.ones(T, dtype=exact)
    z, bias = rand(T, V, kind=dtype), maybe(draw, lambda: rand(V))
    cap, stats = choose(0.0, 5.0), torch.zeros(4, T, dtype=exact)
    ids, flags = integers(draw, 0, T, T), maybe(draw, lambda: booleans(draw, T))
    out, bad = rand(T), torch.zeros(1, dtype=torch.int64)
    K, E = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    routing = pk.Routing.from_topk(integers(draw, 0, E, T, K), torch.ones(T, K), E)
    order = [torch.zeros(n, dtype=torch.int32) for n in (E, T * K, T * K)]
    columns_of_loss = (rand(T), rand(T), rand(2), torch.tensor([0, T // 2, T]), flags, rand(T), rand(T), rand(T))
    choices = [choose(0, 1), choose(0, 1, 2), choose(0, 3), choose(0, 4), choose(-1, 5), 0]
    numbers = [0.2, 0.2, 2.0, 20.0, 0.0, 7.0, 0.1, 0.5, 2.0, 0.1]
    totals = torch.zeros(16, dtype=torch.float64)
    settings = [0.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1e-2]
    return choose(
        (ops.anchored_rows_fwd.default, [z, target, rand(T), ones, bias, cap, draw(st.booleans()), z.clone(), stats]),
        (
            ops.anchored_rows_bwd.default,
            [z, draw(st.booleans()), target, rand(T), ones, rand(3, T), bias, cap, z.clone()],
        ),
        (
            ops.policy_loss_fwd.out,
            [*columns_of_loss, 0.0, choices, numbers, rand(()), rand(T), rand(T), totals],
        ),
        (ops.group_advantage_fwd.out, [rand(T), ids, flags, choose(0, 1, 2), choose(0, 1, 2), 1e-6, out, bad]),
        (
            ops.prism_advantage_fwd.out,
            [rand(T), rand(T), ids, flags, rand(T), choose(0, 1), choose(0, 1), choose(0, 5), settings, out, bad],
        ),
        (ops.moe_experts_order.out, [routing.index.flatten(), routing.offsets, routing.permutation, *order, bad]),
    )


def test_native(fuzz):
    @fuzz
    def target(draw):
        op, values = native_calls(draw)
        schema = op._schema.arguments
        arguments = dict(zip((a.name for a in schema), values, strict=True))
        for _ in range(draw(st.integers(0, 3))):
            arguments = damage(draw, arguments)
        plain = [arguments[a.name] for a in schema if not a.kwarg_only]
        # whatever torch or the op says
        with suppress(RuntimeError, TypeError, ValueError, OverflowError):
            op(*plain, **{a.name: arguments[a.name] for a in schema if a.kwarg_only})
