import math

import pytest
import torch

from prism_kernels import Routing, moe_experts
from prism_kernels.ops.moe_experts import eager, kernels
from prism_kernels.ops.moe_experts.reference import moe_experts_reference
from prism_kernels.testing import assert_close, double

NAN = math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def rows(total, columns, dtype, seed=0):
    return torch.randn(total, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routed(T, K, E, dtype, seed=1):
    rng = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=rng).argsort(dim=1)[:, :K]
    weight = torch.rand(T, K, generator=rng, dtype=torch.float64)
    return Routing.from_topk(index, weight.to(torch.float64 if dtype == torch.float64 else torch.float32), E)


def order_of(routing):
    return routing.index, routing.offsets, routing.permutation


def close(ours, theirs):
    # both are computed in the accumulator's dtype and rounded once
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, K, E, columns", [(7, 2, 4, 65), (5, 3, 3, 32), (1, 1, 1, 1), (0, 2, 4, 9), (4, 2, 3, 0)])
def test_every_step_is_its_specification(T, K, E, columns, dtype):
    routing = routed(T, K, E, dtype)
    permutation, weight = routing.permutation, routing.weight
    x, pre, grad = rows(T, columns, dtype), rows(T * K, 2 * columns, dtype), rows(T * K, columns, dtype, 5)
    assert torch.equal(kernels.gather(x, permutation, K), eager.gather(x, permutation, K))
    close(kernels.swiglu(pre), eager.swiglu(pre))
    for needs in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        ours = kernels.swiglu_backward(pre, grad, weight, permutation, needs)
        theirs = eager.swiglu_backward(pre, grad, weight, permutation, needs)
        for a, b, wanted in zip(ours, theirs, needs):
            assert (a is not None) == (b is not None) == wanted
            if wanted:
                close(a, b)
    _, ours, _ = kernels.swiglu_backward(pre, None, weight, permutation, (False, True, False))
    close(ours, eager.swiglu_backward(pre, None, weight, permutation, (False, True, False))[1])
    row = eager.checked_order("test", *order_of(routing)).row
    for share in (weight, None):
        close(kernels.combine(grad, row, share, T, K), eager.combine(grad, row, share, T, K))


def test_large_gates_are_finite():
    pre = torch.tensor([[-200.0, 200.0, -90.0, 2.0, 2.0, 2.0]])
    one, first = torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)
    close(kernels.swiglu(pre), eager.swiglu(pre))
    ours = kernels.swiglu_backward(pre, torch.ones(1, 3), one, first, (True, True, True))
    assert all(t.isfinite().all() for t in ours)
    assert ours[0][0, 0] == 0 and ours[0][0, 1] == 2


def test_a_broken_row_stays_alone():
    routing = routed(6, 2, 3, torch.float32)
    broken = rows(12, 40, torch.float32)
    row = kernels.safe_order(*order_of(routing)).row
    clean = kernels.combine(broken, row, routing.weight, 6, 2)
    broken[3] = NAN
    token = int(routing.permutation[3]) // 2
    out = kernels.combine(broken, row, routing.weight, 6, 2)
    others = torch.arange(6) != token
    assert torch.equal(out[others], clean[others]) and out[token].isnan().all()


@pytest.mark.parametrize("T, E, K, D, F", [(13, 4, 2, 40, 33), (3, 5, 5, 7, 1), (0, 3, 1, 8, 8)])
def test_experts_on_triton_match_float64(T, E, K, D, F):
    rng = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=rng).mul_(0.5).requires_grad_() for shape in ((T, D), (E, 2 * F, D), (E, D, F))
    ]
    x, gate_up, down = leaves
    index = torch.rand(T, E, generator=rng).argsort(dim=1)[:, :K]
    weight = torch.rand(T, K, generator=rng).requires_grad_()
    leaves = (x, weight, gate_up, down)
    upstream = torch.randn(T, D, generator=rng)

    def ours(x, weight, gate_up, down):
        return moe_experts(x, Routing.from_topk(index, weight, E), gate_up, down, backend="triton")

    def plain(x, weight, gate_up, down):
        return moe_experts_reference(x, index, weight, gate_up, down)

    exact_leaves = double(leaves)
    outs = [f(*values) for f, values in ((ours, leaves), (plain, leaves), (plain, exact_leaves))]
    assert_close(*outs, name="out")
    grads = [
        torch.autograd.grad(out, values, upstream.to(out.dtype))
        for out, values in zip(outs, (leaves, leaves, exact_leaves))
    ]
    for name, *three in zip(("x", "weight", "gate_up", "down"), *grads):
        assert_close(*three, name=name)
    again = torch.autograd.grad(ours(*leaves), leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(again, grads[0]))


DAMAGE = {
    "none": lambda index, offsets, permutation: (index, offsets, permutation),
    "offsets of 0": lambda index, offsets, permutation: (index, offsets * 0, permutation),
    "negated offsets": lambda index, offsets, permutation: (index, -offsets, permutation),
    "reversed offsets": lambda index, offsets, permutation: (index, offsets.flip(0), permutation),
    "offsets too large": lambda index, offsets, permutation: (index, offsets + 5, permutation),
    "huge offsets": lambda index, offsets, permutation: (index, offsets.long() + 2**40, permutation),
    "shifted assignments": lambda index, offsets, permutation: (index, offsets, permutation + 1),
    "huge assignments": lambda index, offsets, permutation: (index, offsets, permutation.long() * 2**40 - 2**50),
    "repeated assignments": lambda index, offsets, permutation: (index, offsets, permutation // 2 * 2),
    "reversed assignments": lambda index, offsets, permutation: (index, offsets, permutation.flip(0)),
    "experts too high": lambda index, offsets, permutation: (index + 2**40, offsets, permutation),
    "another index": lambda index, offsets, permutation: ((index + 1) % 5, offsets, permutation),
}


@pytest.mark.parametrize("T", [0, 1, 7, 700])
@pytest.mark.parametrize("name", DAMAGE)
def test_no_order_leaves_its_bounds(name, T):
    routing = routed(T, 2, 5, torch.float32)
    total, damaged = 2 * T, DAMAGE[name](*order_of(routing))
    offsets, permutation, row = kernels.safe_order(*damaged)
    assert offsets[-1] == total and (offsets.diff(prepend=offsets.new_zeros(1)) >= 0).all()
    assert ((permutation >= 0) & (permutation < max(total, 1))).all()
    has = row >= 0
    assert torch.equal(permutation[row[has].long()].long(), has.nonzero()[:, 0])
    wanted = eager.safe_order(*damaged).row
    assert torch.equal(has, wanted >= 0)
    if name == "none":
        sound = eager.checked_order("test", *damaged)
        assert all(map(torch.equal, (offsets, permutation, row), sound))
    out = kernels.combine(torch.ones(total, 3), row, None, T, 2)
    assert torch.equal(out.isnan().any(1), (row.view(T, 2) < 0).any(1))
