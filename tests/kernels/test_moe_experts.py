"""moe_experts against its float64 reference: values, each gradient, saved memory."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import Routing, check, moe_experts, moe_route, use_backend
from prism_kernels.library import native_reason
from prism_kernels.ops.moe_experts import eager
from prism_kernels.ops.moe_experts.reference import moe_experts_reference
from prism_kernels.testing import assert_close, double

ops = torch.ops.prism_kernels
NAMES = ("x", "weight", "gate_up", "down")


def make(T=29, E=5, K=2, D=12, F=7, *, choice="random", dtype=torch.float32, seed=0):
    """The leaves, which want gradients, and the experts' index."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(dtype).requires_grad_()

    x, gate_up, down = rand(T, D), rand(E, 2 * F, D, scale=D**-0.5), rand(E, D, F, scale=F**-0.5)
    weight = torch.rand(T, K, generator=rng).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if choice == "random":
        index = torch.rand(T, E, generator=rng).argsort(dim=1)[:, :K]
    else:
        # every token chooses the last experts; the others are empty
        index = torch.arange(E - K, E).expand(T, K)
    return (x, weight.requires_grad_(), gate_up, down), index.contiguous()


def ours(leaves, index, **options):
    x, weight, gate_up, down = leaves
    return moe_experts(x, Routing.from_topk(index, weight, gate_up.shape[0]), gate_up, down, **options)


def reference(leaves, index):
    x, weight, gate_up, down = leaves
    return moe_experts_reference(x, index, weight, gate_up, down)


def run(op, leaves, index, seed=3):
    out = op(leaves, index)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return out, torch.autograd.grad(out, leaves, upstream)


def compare(leaves, index, tiny):
    out, grads = run(ours, leaves, index)
    plain, plain_grads = run(reference, leaves, index)
    exact, wanted = run(reference, double(leaves), index)
    assert out.dtype == leaves[0].dtype
    assert_close(out, plain, exact, name="out", tiny=tiny)
    for name, leaf, grad, p, w in zip(NAMES, leaves, grads, plain_grads, wanted):
        assert grad.dtype == leaf.dtype
        assert_close(grad, p, w, name=name, tiny=tiny)


TINY = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("choice", ["random", "last"])
@pytest.mark.parametrize("T, E, K, D, F", [(29, 5, 2, 12, 7), (64, 4, 2, 32, 48), (33, 8, 8, 16, 8), (1, 3, 1, 1, 1)])
def test_experts_match_float64(T, E, K, D, F, choice, dtype):
    # plain torch may compute a single number exactly by chance: allow one rounding
    tiny = TINY[dtype] if T > 1 else max(TINY[dtype], torch.finfo(dtype).eps)
    compare(*make(T, E, K, D, F, choice=choice, dtype=dtype), tiny)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 12),
    E=st.integers(1, 6),
    D=st.integers(1, 9),
    F=st.integers(1, 9),
    last=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_experts_any_shape(T, E, D, F, last, seed, data):
    K = data.draw(st.integers(1, E))
    compare(*make(T, E, K, D, F, choice="last" if last else "random", dtype=torch.float64, seed=seed), 1e-12)


def test_no_token():
    leaves, index = make(0)
    out, grads = run(ours, leaves, index)
    assert out.shape == (0, 12)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert grads[2].eq(0).all() and grads[3].eq(0).all()


def test_an_expert_without_tokens_has_gradient_zero():
    leaves, index = make(choice="last")
    _, grads = run(ours, leaves, index)
    for grad in grads[2:]:
        assert grad[:3].eq(0).all() and grad[3:].ne(0).any()


def test_one_expert_with_weight_one_is_a_plain_mlp():
    (x, _, gate_up, down), _ = make(E=1, K=1)
    routing = Routing.from_topk(torch.zeros(29, 1, dtype=torch.int64), torch.ones(29, 1), 1)
    gate, up = (x @ gate_up[0].t()).chunk(2, -1)
    wanted = (torch.nn.functional.silu(gate) * up) @ down[0].t()
    torch.testing.assert_close(moe_experts(x, routing, gate_up, down), wanted)


@pytest.mark.parametrize("needs", range(1, 16))
def test_only_the_gradients_that_are_needed(needs):
    leaves, index = make()
    out, everything = run(ours, leaves, index)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needs >> i & 1))
    again = ours(leaves, index)
    wanted = [i for i in range(4) if needs >> i & 1]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(again, [leaves[i] for i in wanted], upstream)
    assert torch.equal(again, out)
    for i, grad in zip(wanted, grads):
        assert torch.equal(grad, everything[i]), NAMES[i]


def test_gradcheck():
    leaves, index = make(7, 4, 2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *values: ours(values, index), leaves)


def test_from_the_router_to_the_output():
    """Gradients flow through the routing's weights into the router."""
    (x, _, gate_up, down), _ = make(dtype=torch.float64)
    router = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def plain(x, router, gate_up, down):
        weight, index = (x @ router.t()).softmax(-1).topk(2)
        return moe_experts_reference(x, index, weight / weight.sum(-1, keepdim=True), gate_up, down)

    def fused(x, router, gate_up, down):
        return moe_experts(x, moe_route(x, router, 2), gate_up, down)

    values = (x, router, gate_up, down)
    for a, b in zip(*(torch.autograd.grad(f(*values).square().sum(), values) for f in (fused, plain))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_strided_and_expanded_inputs_and_gradients():
    leaves, index = make()
    out, grads = run(ours, leaves, index)
    x, weight, gate_up, down = (leaf.detach() for leaf in leaves)
    views = (
        torch.stack((x, x * 3), -1)[..., 0],
        torch.stack((weight, weight), 0)[1],
        gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        down.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    assert not any(view.is_contiguous() for view in (views[0], *views[2:]))
    again, same = run(ours, tuple(view.requires_grad_() for view in views), index)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(same, grads)
    row = x[:1].expand(29, 12).requires_grad_()
    torch.testing.assert_close(
        ours((row, *leaves[1:]), index), ours((row.detach().clone(), *leaves[1:]), index), rtol=0, atol=0
    )
    ones = torch.ones(())
    expanded = torch.autograd.grad(ours(leaves, index), leaves, ones.expand(29, 12))
    filled = torch.autograd.grad(ours(leaves, index), leaves, torch.ones(29, 12))
    assert all(torch.equal(a, b) for a, b in zip(expanded, filled))


def test_a_broken_row_stays_alone():
    leaves, index = make()
    out, grads = run(ours, leaves, index)
    with torch.no_grad():
        leaves[0][4] = torch.nan
    broken, broken_grads = run(ours, leaves, index)
    others = torch.arange(29) != 4
    assert broken[4].isnan().all() and torch.equal(broken[others], out[others])
    assert torch.equal(broken_grads[0][others], grads[0][others])


def test_large_gates_are_finite():
    """Where exp(-gate) overflows in fp32: silu and its slope are 0 there."""
    leaves, index = make()
    with torch.no_grad():
        leaves[2].mul_(400)
    out, grads = run(ours, leaves, index)
    exact, wanted = run(reference, double(leaves), index)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-2)
    for grad, w in zip(grads, wanted):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad.double(), w, rtol=1e-3, atol=float(w.abs().max()) * 1e-4)


def test_autocast_multiplies_in_its_dtype():
    leaves, index = make(64, 4, 2, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(leaves, index)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out, leaves, upstream)
    x, weight, gate_up, down = leaves
    low = tuple(t.detach().bfloat16().requires_grad_() for t in (x, gate_up, down))
    wanted = moe_experts(low[0], Routing.from_topk(index, weight, 4), *low[1:])
    assert torch.equal(out, wanted.float())
    same = torch.autograd.grad(wanted, (low[0], weight, *low[1:]), upstream.bfloat16())
    for name, grad, s in zip(NAMES, grads, same):
        assert grad.dtype == torch.float32, name
        assert torch.equal(grad, s.float()), name


def test_keeps_the_input_the_rows_before_the_activation_and_nothing_else_of_size():
    T, E, K, D, F = 64, 4, 2, 32, 48
    leaves, index = make(T, E, K, D, F)
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves[2:]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ours(leaves, index)
    # the weights, and the order with its inverse
    small = T * K * (4 + 1 + 4 + 4) + E * 4
    assert sum(kept.values()) == 4 * (T * D + T * K * 2 * F) + small
    out.sum().backward()


def test_compiles_whole_and_repeats():
    leaves, index = make()

    def f(*values):
        return ours(values, index).square().sum()

    wanted = f(*leaves)
    compiled = torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(wanted, leaves))
    first, second = (run(ours, leaves, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((first[0], *first[1]), (second[0], *second[1])))


def test_opcheck():
    leaves, index = make()
    x, weight, gate_up, down = (leaf.detach() for leaf in leaves)
    routing = Routing.from_topk(index, weight, 5)
    leaves = (weight, gate_up, down)
    arguments = (x, routing.index, *leaves, routing.offsets, routing.permutation)
    torch.library.opcheck(ops.moe_experts_fwd.default, (*arguments, "torch"))
    out, pre, *order = ops.moe_experts_fwd(*arguments, "torch")
    for needs in ([True] * 4, [False, False, False, True], [False, True, False, False]):
        torch.library.opcheck(ops.moe_experts_bwd.default, (out, x, *leaves, pre, *order, needs, "torch"))
    if not native_reason["_C"]:
        results = {"ends": 5, "assignment": index.numel(), "row": index.numel()}
        results = {name: torch.empty(size, dtype=torch.int32) for name, size in results.items()}
        results["bad"] = torch.empty(1, dtype=torch.int64)
        given = (routing.index.flatten(), routing.offsets, routing.permutation)
        # it runs inside the others, which have the fakes
        torch.library.opcheck(ops.moe_experts_order.out, given, results, test_utils="test_schema")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("choice", ["random", "last"])
@pytest.mark.parametrize(
    "T, E, K, D, F", [(300, 4, 2, 64, 96), (300, 8, 3, 40, 20), (33, 5, 2, 13, 7), (0, 4, 2, 64, 96)]
)
def test_on_a_gpu(T, E, K, D, F, choice, dtype, backend):
    """Shapes and dtypes that grouped_mm takes, and those that its alignment or its dtype excludes."""
    leaves, index = make(T, E, K, D, F, choice=choice, dtype=dtype)
    leaves = tuple(leaf.detach().cuda().requires_grad_() for leaf in leaves)
    index = index.cuda()
    with use_backend(backend):
        out, grads = run(ours, leaves, index)
        again, same = run(ours, leaves, index)
    plain, plain_grads = run(reference, leaves, index)
    exact, wanted = run(reference, double(leaves), index)
    assert_close(out, plain, exact, name="out", tiny=TINY[dtype])
    for name, grad, p, w in zip(NAMES, grads, plain_grads, wanted):
        assert_close(grad, p, w, name=name, tiny=TINY[dtype])
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), (again, *same)))


def test_backends_are_named():
    leaves, index = make()
    with use_backend("torch"):
        ours(leaves, index)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="moe_experts: backend 'triton' is not available"):
            ours(leaves, index, backend="triton")
    with pytest.raises(RuntimeError, match="moe_experts has no implementation for it; it has triton, torch"):
        ours(leaves, index, backend="cpu")


X = torch.zeros(4, 3)
ROUTING = Routing.from_topk(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2), 5)
BAD = [
    ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
    ({"x": torch.zeros(4, 3, 1)}, ValueError, "expected x of shape (T, D), got (4, 3, 1)"),
    ({"x": X.long()}, TypeError, "expected x of dtype float32"),
    ({"routing": (1, 2)}, TypeError, "expected routing to be a Routing, got tuple"),
    ({"x": torch.zeros(6, 3)}, ValueError, "expected routing.index of shape (6, K), got (4, 2)"),
    ({"gate_up": torch.zeros(4, 8, 3)}, ValueError, "expected gate_up of shape (5, 2I, 3), got (4, 8, 3)"),
    ({"gate_up": torch.zeros(5, 3, 8)}, ValueError, "expected gate_up of shape (5, 2I, 3), got (5, 3, 8)"),
    ({"gate_up": torch.zeros(5, 7, 3)}, ValueError, "expected gate_up of shape (5, 2I, 3), an even number of rows"),
    ({"down": torch.zeros(5, 4, 3)}, ValueError, "expected down of shape (5, 3, 4), got (5, 4, 3)"),
    ({"down": torch.zeros(5, 3, 4).double()}, TypeError, "expected down of x's dtype torch.float32 (or autocast)"),
    ({"gate_up": None}, TypeError, "expected gate_up to be a tensor, got NoneType"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_experts_name_the_bad_argument(changes, error, message):
    arguments = {"x": X, "routing": ROUTING, "gate_up": torch.zeros(5, 8, 3), "down": torch.zeros(5, 3, 4), **changes}
    with pytest.raises(error, match=re.escape(f"moe_experts: {message}")):
        moe_experts(**arguments)


CHOSEN = Routing.from_topk(torch.tensor([[0, 1], [4, 0], [2, 3], [1, 0]]), torch.rand(4, 2), 5)
ROWS = torch.randn(4, 3)
N = CHOSEN.permutation.numel()
OFFSETS, PERMUTATION = CHOSEN.offsets, CHOSEN.permutation
ENDS = "expected routing.offsets that do not decrease, from at least 0 to 8, the assignments, got "
AGREE = "expected routing.permutation and routing.offsets to follow routing.index, got expert"
BAD_ORDERS = {
    "offsets of 0": ({"offsets": OFFSETS * 0}, ENDS + "[0, 0, 0, 0, 0]"),
    "negated offsets": ({"offsets": -OFFSETS}, ENDS),
    "reversed offsets": ({"offsets": OFFSETS.flip(0)}, ENDS),
    "offsets too large": ({"offsets": OFFSETS + 1}, ENDS),
    "one offset too large": ({"offsets": OFFSETS.clone().index_fill_(0, torch.tensor(1), 9)}, ENDS),
    "huge offsets": ({"offsets": OFFSETS.long() + 2**32}, ENDS),
    "another expert's offsets": ({"offsets": torch.tensor([0, 0, 0, 0, N], dtype=torch.int32)}, AGREE),
    "an assignment twice": (
        {"permutation": PERMUTATION.clone().index_copy_(0, torch.tensor([0]), PERMUTATION[1:2])},
        "expected routing.permutation to hold each assignment once, got",
    ),
    "a permutation of 0": ({"permutation": PERMUTATION * 0}, "expected routing.permutation to hold each assignment"),
    "a negative assignment": ({"permutation": PERMUTATION - 1}, "expected routing.permutation in [0, 8), got -1"),
    "an assignment too large": ({"permutation": PERMUTATION + 1}, "expected routing.permutation in [0, 8), got 8"),
    "huge assignments": ({"permutation": PERMUTATION.long() + 2**32}, "expected routing.permutation in [0, 8), got"),
    "a reversed permutation": ({"permutation": PERMUTATION.flip(0)}, AGREE),
    "another index": ({"index": (CHOSEN.index + 1) % 5}, AGREE),
}
BAD_TENSORS = {
    "a permutation of floats": ({"permutation": PERMUTATION.float()}, "expected routing.permutation of dtype int32"),
    "offsets of floats": ({"offsets": OFFSETS.double()}, "expected routing.offsets of dtype int32, int64, got float64"),
    "an index of floats": ({"index": CHOSEN.index.float()}, "expected routing.index of dtype int32, int64"),
    "complex weights": ({"weight": CHOSEN.weight + 0j}, "expected routing.weight of dtype float32"),
    "no offsets": ({"offsets": OFFSETS[:0]}, "expected routing.offsets of shape (E,) with E > 0, got (0,)"),
    "offsets in a matrix": ({"offsets": OFFSETS[None]}, "expected routing.offsets of shape (E,), got (1, 5)"),
    "a list": ({"offsets": OFFSETS.tolist()}, "expected routing.offsets to be a tensor, got list"),
    "a short permutation": ({"permutation": PERMUTATION[1:]}, "expected routing.permutation of shape (8,), got (7,)"),
}
MLPS = (torch.randn(5, 8, 3), torch.randn(5, 3, 4))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", [*BAD_ORDERS, *BAD_TENSORS])
def test_a_damaged_routing_is_refused(name, native, monkeypatch):
    changes, message = {**BAD_ORDERS, **BAD_TENSORS}[name]
    if not native:
        monkeypatch.setitem(native_reason, "_C", "not built")
    with pytest.raises((ValueError, TypeError), match=re.escape(f"moe_experts: {message}")):
        moe_experts(ROWS, CHOSEN._replace(**changes), *MLPS)


@pytest.mark.parametrize("native", [True, False])
def test_other_integers_and_strides_of_a_routing_are_right(native, monkeypatch):
    if not native:
        monkeypatch.setitem(native_reason, "_C", "not built")
    wanted = moe_experts(ROWS, CHOSEN, *MLPS)
    wide = {name: getattr(CHOSEN, name).long() for name in ("index", "offsets", "permutation")}
    assert torch.equal(moe_experts(ROWS, CHOSEN._replace(**wide), *MLPS), wanted)
    strided = {name: torch.stack((x, x), -1)[..., 0] for name, x in wide.items()}
    assert torch.equal(moe_experts(ROWS, CHOSEN._replace(**strided), *MLPS), wanted)


@pytest.mark.parametrize("name", [*BAD_ORDERS, "sound"])
def test_unchecked_a_damaged_routing_gives_nan(name, monkeypatch):
    """As on a GPU, where no value is read: no step leaves its bounds, and a token is right or NaN."""
    leaves = [t.clone().requires_grad_() for t in (ROWS, CHOSEN.weight, *MLPS)]

    def call(routing):
        x, weight, gate_up, down = leaves
        out = moe_experts(x, routing._replace(weight=weight), gate_up, down)
        return out, torch.autograd.grad(out.sum(), leaves)

    wanted, wanted_grads = call(CHOSEN)
    changes = BAD_ORDERS[name][0] if name in BAD_ORDERS else {}
    routing = CHOSEN._replace(**changes)
    monkeypatch.setattr(check, "reads_values", lambda _: False)
    ends, permutation, row = eager.safe_order(routing.index, routing.offsets, routing.permutation)
    assert ends[-1] == N and (ends.diff() >= 0).all() and ends[0] >= 0
    assert ((permutation >= 0) & (permutation < N)).all() and ((row >= -1) & (row < N)).all()
    out, grads = call(routing)
    lost = out.isnan().any(1)
    assert lost.any() == (name in BAD_ORDERS)
    assert torch.equal(lost, (row.view(4, 2) < 0).any(1))
    assert torch.equal(out[~lost], wanted[~lost])
    if not lost.any():
        assert all(map(torch.equal, grads, wanted_grads))
    else:
        assert grads[0][lost].isnan().all()
