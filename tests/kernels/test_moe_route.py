"""moe_route against its float64 reference: the choice, the losses, the gradients."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import Routing, moe_route
from prism_kernels.ops.moe_route import KINDS
from prism_kernels.ops.moe_route.reference import moe_route_reference
from prism_kernels.testing import assert_close, double, relative_error

ops = torch.ops.prism_kernels
LEAVES = ("x", "router_weight", "kind_bias")


def make(T=37, E=6, D=12, *, kinds=3, bias=True, weighted=True, dtype=torch.float32, seed=0):
    """Returns leaves that want gradients, and options; about a quarter of the tokens have weight 0."""
    rng = torch.Generator().manual_seed(seed)
    leaves = {
        "x": torch.randn(T, D, generator=rng).to(dtype).requires_grad_(),
        "router_weight": (torch.randn(E, D, generator=rng) * 0.5).to(dtype).requires_grad_(),
    }
    options = {}
    if kinds:
        options["kind"] = torch.randint(0, kinds, (T,), generator=rng)
    if bias:
        leaves["kind_bias"] = torch.randn(kinds or 1, E, generator=rng).to(dtype).requires_grad_()
    if weighted:
        options["token_weight"] = torch.randint(0, 4, (T,), generator=rng).float() / 2
    return leaves, options


def run(op, leaves, top_k, options, seed=5):
    routing = op(**leaves, top_k=top_k, **options)
    upstream = torch.randn(routing.weight.shape, generator=torch.Generator().manual_seed(seed)).to(routing.weight.dtype)
    total = (routing.weight * upstream).sum() + 1.7 * routing.aux_loss + 0.3 * routing.z_loss
    return routing, torch.autograd.grad(total, list(leaves.values()))


def compare(leaves, top_k, options, tiny):
    ours, grads = run(moe_route, leaves, top_k, options)
    plain, plain_grads = run(moe_route_reference, leaves, top_k, options)
    exact, wanted = run(moe_route_reference, double(leaves), top_k, options)
    for name in ("index", "offsets", "permutation"):
        assert torch.equal(getattr(ours, name), getattr(exact, name)), name
    assert ours.offsets.dtype == ours.permutation.dtype == torch.int32
    torch.testing.assert_close(ours.counts.double(), exact.counts, rtol=1e-6, atol=0)
    for name in ("weight", "aux_loss", "z_loss"):
        assert_close(getattr(ours, name), getattr(plain, name), getattr(exact, name), name=name, tiny=tiny)
    for name, grad, p, w in zip(leaves, grads, plain_grads, wanted):
        assert grad.dtype == leaves[name].dtype
        assert_close(grad, p, w, name=name, tiny=tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "kinds, bias, weighted", [(3, True, True), (0, False, False), (0, True, True), (3, False, True)]
)
def test_route_matches_float64(kinds, bias, weighted, renormalize, dtype):
    tiny = 1e-13 if dtype == torch.float64 else 2e-6
    leaves, options = make(kinds=kinds, bias=bias, weighted=weighted, dtype=dtype)
    for top_k in (1, 2, 6):
        compare(leaves, top_k, options | {"renormalize": renormalize}, tiny)


@settings(max_examples=40, deadline=None)
@given(T=st.integers(0, 9), E=st.integers(1, 9), kinds=st.integers(0, 4), seed=st.integers(0, 2**16), data=st.data())
def test_route_any_shape(T, E, kinds, seed, data):
    leaves, options = make(
        T, E, 3, kinds=kinds, bias=seed % 2 == 0, weighted=seed % 3 > 0, dtype=torch.float64, seed=seed
    )
    compare(leaves, data.draw(st.integers(1, E)), options, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_routed_in_fp32(dtype):
    """Products of halves are exact in fp32; a plain router rounds the logits to x's dtype."""
    leaves, options = make(dtype=dtype)
    ours, grads = run(moe_route, leaves, 2, options)
    exact, wanted = run(moe_route_reference, double(leaves), 2, options)
    assert torch.equal(ours.index, exact.index)
    assert ours.weight.dtype == torch.float32
    assert relative_error(ours.weight, exact.weight) < 1e-6
    assert relative_error(ours.aux_loss, exact.aux_loss) < 1e-6
    for name, grad, w in zip(leaves, grads, wanted):
        assert grad.dtype == dtype
        assert relative_error(grad, w) < 2 * torch.finfo(dtype).eps, name
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = run(moe_route, leaves, 2, options)
    assert torch.equal(again.weight, ours.weight)


def test_gradcheck_of_each_output():
    leaves, options = make(6, 4, 3, dtype=torch.float64)
    for renormalize in (True, False):
        for field in ("weight", "aux_loss", "z_loss"):

            def f(x, router_weight, kind_bias, field=field, renormalize=renormalize):
                routing = moe_route(x, router_weight, 2, kind_bias=kind_bias, renormalize=renormalize, **options)
                return getattr(routing, field)

            assert torch.autograd.gradcheck(f, tuple(leaves.values()))


@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_that_are_needed(wanted):
    leaves, options = make()
    _, everything = run(moe_route, leaves, 2, options)
    for i, leaf in enumerate(leaves.values()):
        leaf.requires_grad_(bool(wanted >> i & 1))
    routing = moe_route(**leaves, top_k=2, **options)
    assert routing.aux_loss.requires_grad == routing.weight.requires_grad == bool(wanted)
    if wanted:
        needing = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        upstream = torch.randn(routing.weight.shape, generator=torch.Generator().manual_seed(5))
        total = (routing.weight * upstream).sum() + 1.7 * routing.aux_loss + 0.3 * routing.z_loss
        grads = torch.autograd.grad(total, list(needing.values()))
        for name, grad in zip(needing, grads):
            assert torch.equal(grad, everything[list(leaves).index(name)]), name


def test_each_output_alone_has_its_gradient():
    leaves, options = make()
    for field in ("weight", "aux_loss", "z_loss"):
        output = getattr(moe_route(**leaves, top_k=2, **options), field).square().sum()
        ours = torch.autograd.grad(output, list(leaves.values()))
        exact = double(leaves)
        output = getattr(moe_route_reference(**exact, top_k=2, **options), field).square().sum()
        for a, b in zip(ours, torch.autograd.grad(output, list(exact.values()))):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_balance_is_the_transformers_loss_of_one_layer_and_k_at_balance():
    """E * sum_e f_e P_e, where f sums to K, is K where all experts are alike."""
    T, E, K = 60, 4, 2
    x = torch.eye(E).repeat(15, 1)
    routing = moe_route(x, torch.zeros(E, E), K)
    assert routing.aux_loss == K
    weight = torch.randn(E, E, generator=torch.Generator().manual_seed(0))
    routing = moe_route(x, weight, K)
    probability = (x @ weight.t()).softmax(-1)
    mask = torch.nn.functional.one_hot(probability.topk(K).indices, E).float()
    theirs = (mask.mean(0) * probability.mean(0)).sum() * E
    torch.testing.assert_close(routing.aux_loss, theirs)
    assert routing.counts.sum() == T * K


def test_opposite_imbalances_of_kinds_do_not_cancel():
    """Pooled over kinds, experts 0 and 1 look balanced although each kind uses one of them alone."""
    x = torch.ones(40, 2)
    kind = torch.arange(40) % 2
    bias = torch.tensor([[8.0, -8.0], [-8.0, 8.0]])
    apart = moe_route(x, torch.zeros(2, 2), 1, kind=kind, kind_bias=bias)
    assert apart.counts.tolist() == [[20, 0], [0, 20]]
    torch.testing.assert_close(apart.aux_loss, torch.tensor(2.0))
    pooled = moe_route(torch.eye(2).repeat(20, 1), bias, 1)
    torch.testing.assert_close(pooled.aux_loss, torch.tensor(1.0))


def test_tokens_of_weight_zero_count_nowhere():
    leaves, options = make(bias=True)
    options["token_weight"][3] = 0
    clean, _ = run(moe_route, leaves, 2, options)
    keep = options["token_weight"] != 0
    fewer = {name: v[keep] if name == "x" else v for name, v in leaves.items()}
    alone = moe_route(**fewer, top_k=2, kind=options["kind"][keep], token_weight=options["token_weight"][keep])
    torch.testing.assert_close((clean.aux_loss, clean.z_loss), (alone.aux_loss, alone.z_loss))
    torch.testing.assert_close(clean.counts, alone.counts)
    with torch.no_grad():
        leaves["x"][3] = torch.nan
    broken = moe_route(**leaves, top_k=2, **options)
    assert torch.equal(broken.aux_loss, clean.aux_loss) and torch.equal(broken.z_loss, clean.z_loss)
    others = torch.arange(37) != 3
    assert torch.equal(broken.weight[others], clean.weight[others])
    assert broken.weight[3].isnan().all() and ((broken.index >= 0) & (broken.index < 6)).all()
    losses = torch.autograd.grad(broken.aux_loss + broken.z_loss, leaves["x"], allow_unused=True)[0]
    assert (losses[~keep] == 0).all()


def test_ties_go_to_the_lower_index():
    routing = moe_route(torch.zeros(5, 3), torch.ones(7, 3), 3)
    assert (routing.index == torch.arange(3)).all()
    assert routing.offsets.tolist() == [5, 10, 15, 15, 15, 15, 15]


def test_no_token_and_no_weight():
    leaves, _ = make(0, kinds=0, bias=False, weighted=False)
    routing, grads = run(moe_route, leaves, 2, {})
    assert routing.index.shape == (0, 2) and routing.offsets.tolist() == [0] * 6
    assert routing.aux_loss == routing.z_loss == 0 and grads[1].eq(0).all()
    leaves, options = make()
    options["token_weight"].zero_()
    routing = moe_route(**leaves, top_k=2, **options)
    assert routing.aux_loss == routing.z_loss == 0
    grads = torch.autograd.grad(routing.aux_loss + routing.z_loss, list(leaves.values()))
    assert all(g.eq(0).all() for g in grads)


def test_given_choice_as_a_routing():
    rng = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(9, generator=rng)[:4] for _ in range(50)])
    weight = torch.rand(50, 4, generator=rng).requires_grad_()
    routing = Routing.from_topk(index.int(), weight, 9)
    order = torch.sort(index.reshape(-1), stable=True).indices
    assert torch.equal(routing.permutation.long(), order)
    assert torch.equal(routing.offsets.long(), torch.bincount(index.reshape(-1), minlength=9).cumsum(0))
    assert routing.counts.sum() == 200 and routing.aux_loss is None
    assert torch.equal(routing.index, index)
    (grad,) = torch.autograd.grad((routing.weight * 3).sum(), weight)
    assert grad.eq(3).all()
    empty = Routing.from_topk(index[:0], weight[:0], 9)
    assert empty.offsets.tolist() == [0] * 9 and empty.permutation.numel() == 0


def test_strided_and_expanded_inputs():
    leaves, options = make()
    ours, grads = run(moe_route, leaves, 2, options)
    apart = {
        n: torch.stack((v, torch.full_like(v, 7)), -1)[..., 0].detach().requires_grad_() for n, v in leaves.items()
    }
    assert not apart["x"].is_contiguous()
    again, same = run(moe_route, apart, 2, {n: torch.stack((v, v), -1)[..., 0] for n, v in options.items()})
    torch.testing.assert_close(again.weight, ours.weight)
    torch.testing.assert_close(same, grads)
    routing = moe_route(**leaves, top_k=2, **options)
    expanded = torch.ones((), dtype=torch.float32).expand_as(routing.weight)
    assert torch.autograd.grad(routing.weight, leaves["x"], expanded)[0].isfinite().all()


def test_compiles_whole_and_repeats():
    leaves, options = make()

    def f(*values):
        routing = moe_route(*values[:2], 2, kind_bias=values[2], **options)
        given = Routing.from_topk(routing.index, routing.weight, 6)
        return (given.weight.square().sum() + routing.aux_loss + routing.z_loss) * 2, given.permutation

    values = list(leaves.values())
    wanted, permutation = f(*values)
    ours, same = torch.compile(f, fullgraph=True)(*values)
    assert torch.equal(permutation, same)
    torch.testing.assert_close(torch.autograd.grad(ours, values), torch.autograd.grad(wanted, values))
    first, second = (run(moe_route, leaves, 2, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])))


def test_opcheck():
    leaves, options = make()
    x, router_weight, bias = (v.detach() for v in leaves.values())
    kind, weight = options["kind"], options["token_weight"]
    for chosen in ((bias, kind, weight, 2, 3, True), (None, None, None, 1, 1, False)):
        torch.library.opcheck(ops.moe_route_fwd.default, (x, router_weight, *chosen, "torch"))
        index, value, _, _, counts, aux, z, p, lse = ops.moe_route_fwd(x, router_weight, *chosen, "torch")
        saved = (x, router_weight, *chosen[1:3], index, p, lse, counts, chosen[5])
        for needs in ([True, True, True], [False, True, False]):
            torch.library.opcheck(ops.moe_route_bwd.default, (*saved, value, aux, z, torch.float32, needs))
            torch.library.opcheck(ops.moe_route_bwd.default, (*saved, None, aux, None, torch.float32, needs))
    torch.library.opcheck(ops.moe_permutation_fwd.default, (index, 6, "torch"))


X, W = torch.zeros(4, 3), torch.zeros(5, 3)
BAD = [
    ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
    ({"x": torch.zeros(2, 2, 3)}, ValueError, "expected x of shape (T, D), got (2, 2, 3)"),
    ({"x": X.long()}, TypeError, "expected x of dtype float32"),
    ({"router_weight": torch.zeros(5, 4)}, ValueError, "expected router_weight of shape (E, 3), got (5, 4)"),
    ({"top_k": 6}, ValueError, "expected top_k in [1, 5], the number of experts, got 6"),
    ({"top_k": 0}, ValueError, "expected top_k in [1, 5], the number of experts, got 0"),
    ({"kind": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected kind of shape (4,), got (3,)"),
    ({"kind": torch.zeros(4)}, TypeError, "expected kind of dtype int64, int32, got float32"),
    ({"kind": torch.tensor([0, 1, KINDS, 0])}, ValueError, "expected kind in [0, 5), got 5 at 2"),
    ({"kind_bias": torch.zeros(2, 5)}, ValueError, "expected kind_bias of shape (1, 5), got (2, 5)"),
    (
        {"kind": torch.zeros(4).long(), "kind_bias": torch.zeros(2, 4)},
        ValueError,
        "expected kind_bias of shape (kinds, 5), got (2, 4)",
    ),
    (
        {"kind": torch.zeros(4).long(), "kind_bias": torch.zeros(0, 5)},
        ValueError,
        "expected kind_bias of shape (kinds, E) with kinds > 0, got (0, 5)",
    ),
    ({"token_weight": torch.zeros(5)}, ValueError, "expected token_weight of shape (4,), got (5,)"),
    (
        {"token_weight": torch.tensor([1.0, -1, 1, 1])},
        ValueError,
        "expected token_weight >= 0 and finite, got -1.0 at 1",
    ),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_route_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(f"moe_route: {message}")):
        moe_route(**{"x": X, "router_weight": W, "top_k": 2, **changes})


@pytest.mark.parametrize(
    "index, weight, message",
    [
        (torch.zeros(4), X, "expected index of dtype int64, int32, got float32"),
        (torch.zeros(4, 2).long(), X, "expected weight of shape (4, 2), got (4, 3)"),
        (torch.full((4, 3), 5), X, "expected index in [0, 5), got 5 in row 0"),
        (torch.full((4, 3), -1), X, "expected index in [0, 5), got -1 in row 0"),
    ],
)
def test_given_choice_names_the_bad_argument(index, weight, message):
    index = index if index.dim() == 2 else index[:, None]
    with pytest.raises((TypeError, ValueError), match=re.escape(f"moe_route.from_topk: {message}")):
        Routing.from_topk(index, weight, 5)
