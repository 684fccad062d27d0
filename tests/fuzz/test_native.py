"""The C++ code by itself, with up to three damaged arguments: it refuses or runs, and stays within its memory.

AddressSanitizer, with which `make fuzz` runs this too, watches the memory.
"""

from contextlib import suppress

import pytest
import torch
from hypothesis import strategies as st

import prism_kernels as pk
from fuzz.values import FLOATS, booleans, damage, floats, integers, maybe
from prism_kernels.backend import unavailable

ops = torch.ops.prism_kernels
REASON = unavailable("policy_loss", "cpu", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Calls:
    """The C++ ops with sound arguments of a random size; they check by themselves what they are given."""

    def __init__(self, draw):
        self.draw = draw
        self.dtype = self.choose(*FLOATS)
        self.exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.T = draw(st.integers(0, 6))

    def choose(self, *values):
        return self.draw(st.sampled_from(values))

    def rand(self, *shape, dtype=None):
        return floats(self.draw, *shape, dtype=dtype or self.exact).detach()

    def ids(self):
        return integers(self.draw, 0, self.T, self.T), maybe(self.draw, lambda: booleans(self.draw, self.T))

    def rows(self):
        V = self.choose(1, 2, 3, 15, 16, 17, 33, 70)
        z, target = self.rand(self.T, V, dtype=self.dtype), integers(self.draw, -1, V, self.T)
        bias = maybe(self.draw, lambda: self.rand(V))
        return z, target, torch.ones(self.T, dtype=self.exact), bias, self.choose(0.0, 5.0)

    def anchored_rows_fwd(self):
        z, target, ones, bias, cap = self.rows()
        stats = torch.zeros(4, self.T, dtype=self.exact)
        return ops.anchored_rows_fwd.default, [z, target, ones, ones, bias, cap, self.choose(True, False), z, stats]

    def anchored_rows_bwd(self):
        z, target, ones, bias, cap = self.rows()
        coefficients, is_exp = self.rand(3, self.T), self.choose(True, False)
        return ops.anchored_rows_bwd.default, [z, is_exp, target, ones, ones, coefficients, bias, cap, z.clone()]

    def policy_loss(self):
        T, rand = self.T, self.rand
        bounds = torch.tensor([0, T // 2, T])
        columns = [rand(T), rand(T), rand(2), bounds, self.ids()[1], rand(T), rand(T), rand(T)]
        names = [self.choose(*values) for values in ((0, 1), (0, 1, 2), (0, 3), (0, 4), (-1, 5), (0, 1))]
        numbers = [0.2, 0.2, 2.0, 20.0, 0.0, 7.0, 0.1, 0.5, 2.0, 0.1]
        outputs = [torch.zeros((), dtype=self.exact), rand(T), rand(T), torch.zeros(16, dtype=torch.float64)]
        return ops.policy_loss_fwd.out, [*columns, 0.0, names, numbers, *outputs]

    def group_advantage(self):
        (ids, flags), options = self.ids(), [self.choose(0, 1, 2), self.choose(0, 1, 2), 1e-6]
        outputs = [self.rand(self.T), torch.zeros(1, dtype=torch.int64)]
        return ops.group_advantage_fwd.out, [self.rand(self.T), ids, flags, *options, *outputs]

    def prism_advantage(self):
        (ids, flags), rand, T = self.ids(), self.rand, self.T
        options = [self.choose(0, 1), self.choose(0, 1), self.choose(0, 5), [0.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1e-2]]
        outputs = [rand(T), torch.zeros(1, dtype=torch.int64)]
        return ops.prism_advantage_fwd.out, [rand(T), rand(T), ids, flags, rand(T), *options, *outputs]

    def moe_experts_order(self):
        K, E = self.choose(1, 2, 3), self.choose(1, 2, 5)
        routing = pk.Routing.from_topk(integers(self.draw, 0, E, self.T, K), torch.ones(self.T, K), E)
        outputs = [torch.zeros(n, dtype=torch.int32) for n in (E, self.T * K, self.T * K)]
        given = [routing.index.flatten(), routing.offsets, routing.permutation]
        return ops.moe_experts_order.out, [*given, *outputs, torch.zeros(1, dtype=torch.int64)]


OPS = [name for name in vars(Calls) if name.endswith(("_fwd", "_bwd", "_loss", "_advantage", "_order"))]


@pytest.mark.parametrize("name", OPS)
def test_native(fuzz, name):
    @fuzz
    def target(draw):
        op, values = getattr(Calls(draw), name)()
        schema = op._schema.arguments
        arguments = damage(draw, dict(zip((a.name for a in schema), values, strict=True)), most=3)
        plain = [arguments[a.name] for a in schema if not a.kwarg_only]
        # whatever torch or the op says
        with suppress(RuntimeError, TypeError, ValueError, OverflowError):
            op(*plain, **{a.name: arguments[a.name] for a in schema if a.kwarg_only})
