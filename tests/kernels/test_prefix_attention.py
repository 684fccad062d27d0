"""prefix_attention against its float64 reference, and against each prompt and branch run as a sequence of its own."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import prefix_attention
from prism_kernels.ops.prefix_attention.eager import attend_pieces, pieces
from prism_kernels.ops.prefix_attention.reference import prefix_attention_reference, visible
from prism_kernels.ops.prefix_attention.varlen import attend_expanded, expansion
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack
from prism_kernels.testing import assert_close, double

# unequal and equal branches, one-token branches, a group without branches, an empty prompt
SHAPES = [(7, (3, 1, 5, 3)), (4, ()), (0, (2, 6)), (1, (1,)), (9, (5, 5, 5))]


def make_pack(shapes):
    branches = ([Branch(torch.arange(n), Kind.REASONING) for n in lengths] for _, lengths in shapes)
    return build_pack([PrefixGroup(torch.arange(prompt), b) for (prompt, _), b in zip(shapes, branches)])


def make(pack, heads=4, kept=2, width=8, *, dtype=torch.float64, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    tokens = pack.input_ids.numel()
    shapes = ((tokens, heads, width), (tokens, kept, width), (tokens, kept, width), (tokens, heads, width))
    q, k, v, upstream = ((torch.randn(s, generator=rng) * scale).to(dtype) for s in shapes)
    return [x.requires_grad_() for x in (q, k, v)], upstream


def separate(q, k, v, pack, *, scale=None):
    """Each piece alone: the prompt's tokens are repeated for each branch, as in ordinary forward passes."""
    outputs = [q[:0]]
    for start, length, prefix, size in pieces(pack.layout):
        rows = torch.cat((torch.arange(prefix, prefix + size), torch.arange(start, start + length)))
        one = make_pack([(len(rows), ())])
        outputs.append(prefix_attention_reference(q[rows], k[rows], v[rows], one, scale=scale)[size:])
    return torch.cat(outputs)


def run(op, leaves, upstream, pack, **options):
    out = op(*leaves, pack, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def pieces_op(q, k, v, pack, *, scale=None):
    return attend_pieces(q, k, v, pack.layout, q.shape[2] ** -0.5 if scale is None else scale)


def lower_right(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """A variable-length flash call, sequence by sequence, in plain torch."""
    repeats = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(cu_q) - 1):
        queries, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        n, m = queries.stop - queries.start, keys.stop - keys.start
        assert 0 < n <= max_q and n <= m <= max_k
        ks, vs = (x[keys].repeat_interleave(repeats, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[queries], ks) * scale
        weight = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weight, vs))
    return torch.cat(outputs)


def expanded_op(q, k, v, pack, *, scale=None):
    return attend_expanded(q, k, v, pack, q.shape[2] ** -0.5 if scale is None else scale, lower_right)


WAYS = {"flash": prefix_attention, "pieces": pieces_op, "expanded": expanded_op}


def test_the_mask_is_a_group_then_a_branch():
    pack = make_pack([(2, (1, 2)), (1, ()), (1, (1,))])
    group = [0] * 5 + [1] + [2] * 2
    branch = [-1, -1, 0, 1, 1, -1, -1, 2]
    wanted = torch.tensor(
        [[j <= i and group[i] == group[j] and branch[j] in (-1, branch[i]) for j in range(8)] for i in range(8)]
    )
    assert torch.equal(visible(pack), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads, kept", [(4, 2), (3, 3), (6, 1)])
def test_equals_separate_sequences(way, heads, kept):
    pack = make_pack(SHAPES)
    leaves, upstream = make(pack, heads, kept)
    for scale in (None, 0.7):
        exact = run(separate, leaves, upstream, pack, scale=scale)
        specified = run(prefix_attention_reference, leaves, upstream, pack, scale=scale)
        ours = run(WAYS[way], leaves, upstream, pack, scale=scale)
        torch.testing.assert_close(specified, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_is_as_exact_as_plain_torch(dtype, scale, device):
    pack = make_pack([(70, (33, 1, 90, 33)), (5, (3,)), (64, (64, 64))])
    leaves, upstream = make(pack, 4, 2, 32, dtype=dtype, scale=scale)
    # on a GPU in 16 bits this is the variable-length call
    leaves = [x.detach().to(device).requires_grad_() for x in leaves]
    pack, upstream = pack.to(device), upstream.to(device)
    ours = run(prefix_attention, leaves, upstream, pack)
    # torch's own scaled_dot_product_attention, a call for each branch
    plain = run(pieces_op, leaves, upstream, pack)
    exact = run(prefix_attention_reference, double(tuple(leaves)), upstream.double(), pack)
    for name, a, b, c in zip(("out", "q", "k", "v"), ours, plain, exact):
        assert a.dtype == dtype
        assert_close(a, b, c, name=name)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=4),
    kept=st.integers(1, 3),
    repeats=st.integers(1, 3),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shapes, kept, repeats, width, seed):
    pack = make_pack([*shapes, (1, ())])
    leaves, upstream = make(pack, kept * repeats, kept, width, seed=seed)
    exact = run(prefix_attention_reference, leaves, upstream, pack)
    for op in WAYS.values():
        torch.testing.assert_close(run(op, leaves, upstream, pack), exact, rtol=1e-11, atol=1e-12)


def test_long_pieces_cross_the_kernels_blocks():
    """The flash kernel's blocks of queries and keys are 32 to 512 long."""
    pack = make_pack([(600, (530, 200, 530, 31, 33)), (513, (1,))])
    leaves, upstream = make(pack, 2, 1, 4)
    exact = run(separate, leaves, upstream, pack)
    torch.testing.assert_close(run(prefix_attention, leaves, upstream, pack), exact, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    pack = make_pack([(3, (2, 1, 2)), (1, (2,))])
    leaves, _ = make(pack, 2, 1, 3)
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, pack), leaves)


def test_a_branch_is_blind_to_the_others():
    """A NaN in one branch stays in it, forward and backward; a NaN in a prompt stays in its group."""
    pack = make_pack(SHAPES)
    for poisoned in (pack.branch == 1, (torch.arange(len(pack.branch)) >= 23) & (torch.arange(len(pack.branch)) < 24)):
        leaves, upstream = make(pack)
        clean = run(prefix_attention, leaves, upstream, pack)
        with torch.no_grad():
            for leaf in leaves:
                leaf[poisoned] = torch.nan
        dirty = run(prefix_attention, leaves, upstream * ~poisoned[:, None, None], pack)
        affected = visible(pack)[:, poisoned].any(1)
        assert torch.equal(dirty[0].isnan().any(-1).any(-1), affected)
        assert torch.equal(dirty[0][~affected], clean[0][~affected])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_what_is_needed_gets_a_gradient(wanted):
    pack = make_pack(SHAPES)
    leaves, upstream = make(pack)
    exact = run(prefix_attention_reference, leaves, upstream, pack)
    some = [leaf if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(prefix_attention(*some, pack), [some[i] for i in wanted], upstream)
    for i, grad in zip(wanted, grads):
        torch.testing.assert_close(grad, exact[1 + i], rtol=1e-12, atol=1e-12)
    assert not prefix_attention(*(x.detach() for x in leaves), pack).requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_strided_and_expanded_inputs(way):
    pack = make_pack(SHAPES)
    leaves, upstream = make(pack)
    strided = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in leaves]
    exact = run(prefix_attention_reference, leaves, upstream, pack)
    torch.testing.assert_close(run(WAYS[way], strided, upstream, pack), exact, rtol=1e-12, atol=1e-12)
    tokens = len(pack.branch)
    shared = [x.detach()[:1, :1].expand(tokens, h, 8).requires_grad_() for x, h in zip(leaves, (4, 2, 2))]
    flat = upstream[:1, :1, :1].expand(tokens, 4, 8)
    exact = run(prefix_attention_reference, shared, flat, pack)
    torch.testing.assert_close(run(WAYS[way], shared, flat, pack), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_repeats_bitwise(way):
    pack = make_pack(SHAPES)
    leaves, upstream = make(pack, dtype=torch.float32)
    first, again = (run(WAYS[way], leaves, upstream, pack) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("way", WAYS)
def test_trains_on_a_pack_that_was_scored_before(way):
    pack = make_pack([*SHAPES, (2, (2,))])
    leaves, upstream = make(pack)
    with torch.inference_mode():
        scored = WAYS[way](*leaves, pack)
    trained, *_ = run(WAYS[way], leaves, upstream, pack)
    torch.testing.assert_close(trained, scored.clone(), rtol=0, atol=0)


def test_nothing():
    for shapes in ([], [(0, ())]):
        pack = make_pack(shapes)
        leaves, upstream = make(pack)
        assert [x.shape for x in run(prefix_attention, leaves, upstream, pack)] == [
            (0, 4, 8),
            (0, 4, 8),
            (0, 2, 8),
            (0, 2, 8),
        ]


def test_compiles_whole():
    leaves, upstream = make(make_pack(SHAPES), dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def f(q, k, v, pack):
        return prefix_attention(q * 1.5, k, v, pack) + 1

    # a second pack of as many tokens must not run with the lengths of the first
    for pack in (make_pack(SHAPES), make_pack([*SHAPES[1:], SHAPES[0]])):
        out = f(*leaves, pack)
        wanted = prefix_attention(leaves[0] * 1.5, leaves[1], leaves[2], pack) + 1
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
        )


@pytest.mark.parametrize("way", ["pieces", "expanded"])
def test_the_other_ways_compile_around_a_break(way):
    compiled = torch.compile(WAYS[way], backend="eager")
    for shapes in (SHAPES, [*SHAPES[1:], SHAPES[0]], SHAPES[::-1]):
        pack = make_pack(shapes)
        leaves, upstream = make(pack)
        exact = run(prefix_attention_reference, leaves, upstream, pack)
        torch.testing.assert_close(run(compiled, leaves, upstream, pack), exact, rtol=1e-12, atol=1e-12)


def test_opcheck():
    pack = make_pack(SHAPES)
    (q, k, v), upstream = make(pack)
    forward = torch.ops.prism_kernels.prefix_attention_fwd
    plain = [x.detach() for x in (q, k, v)]
    rest = (*pack.lengths, 0.3)
    torch.library.opcheck(forward, (*plain, *rest))
    out, lse = forward(*plain, *rest)
    torch.library.opcheck(torch.ops.prism_kernels.prefix_attention_bwd, (upstream, *plain, out, lse, *rest))


def test_expansion_copies_the_prefix_before_each_branch():
    pack = make_pack([(2, (1, 2)), (1, ()), (0, (2,))])
    plan = expansion(pack.layout, torch.device("cpu"))
    assert plan.source.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert plan.source[plan.in_piece].tolist() == list(range(8))
    assert plan.cu_query.tolist() == [0, 2, 3, 5, 6, 8] and plan.cu_key.tolist() == [0, 2, 5, 9, 10, 12]
    assert (plan.max_query, plan.max_key) == (2, 4)
    ((prefix, copies),) = plan.copies
    assert prefix == 0 and copies.tolist() == [[2, 3], [5, 6]]


def test_expanded_gradients_are_summed_in_fp32():
    """300 equal contributions of 1 + 2**-7: a running sum in bf16 stops at 256."""
    pack = make_pack([(1, (1,) * 300)])
    leaves, _ = make(pack, 1, 1, 1, dtype=torch.bfloat16)
    one = torch.tensor(1 + 2**-7)

    def identity(q, k, v, *_):
        # each query's output is its prefix's value: row 0 is the prefix itself, then [prefix; branch] pairs
        return torch.cat((v[:1], v[1::2]))

    out = attend_expanded(*leaves, pack, 1.0, identity)
    upstream = one.to(torch.bfloat16).expand_as(out)
    grad = torch.autograd.grad(out, leaves[2], upstream)[0]
    assert grad[0].item() == torch.tensor(301 * one.item()).to(torch.bfloat16).item()
    assert (grad[1:] == 0).all()


def test_packs_that_move_keep_their_lengths():
    pack = make_pack(SHAPES)
    moved = pack.to("meta")
    assert moved.layout == pack.layout and moved.cu_prefix.device.type == "meta"


BAD = [
    ({"q": [1.0]}, TypeError, "expected q to be a tensor, got list"),
    ({"q": torch.zeros(57, 8).double()}, ValueError, "expected q of shape (T, H, d) with H, d > 0, got (57, 8)"),
    ({"q": torch.zeros(57, 4, 8, dtype=torch.int64)}, TypeError, "expected q of dtype float32"),
    (
        {"q": torch.zeros(56, 4, 8).double()},
        ValueError,
        "expected q of shape (57, H, d), the pack's tokens, got (56, 4, 8)",
    ),
    ({"k": torch.zeros(57, 2, 8)}, TypeError, "expected k of dtype float64, got float32"),
    (
        {"k": torch.zeros(57, 3, 8).double()},
        ValueError,
        "expected k of shape (T, K, d) with K a divisor of q's 4 heads",
    ),
    ({"k": torch.zeros(57, 2, 4).double()}, ValueError, "expected k of shape (57, K, 8), got (57, 2, 4)"),
    ({"v": torch.zeros(57, 1, 8).double()}, ValueError, "expected v of shape (57, 2, 8), got (57, 1, 8)"),
    ({"v": torch.zeros(57, 2, 8, device="meta").double()}, ValueError, "expected v on q's device cpu, got meta"),
    ({"pack": None}, TypeError, "expected pack to be a PrefixPack (prism_kernels.packing), got NoneType"),
    ({"pack": make_pack(SHAPES).to("meta")}, ValueError, "expected pack on q's device cpu, got meta"),
    ({"scale": 0.0}, ValueError, "expected scale > 0 and finite, got 0.0"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:50] for _, _, m in BAD])
def test_names_the_bad_argument(changes, error, message):
    pack = make_pack(SHAPES)
    (q, k, v), _ = make(pack)
    scale = changes.get("scale")
    arguments = {"q": q, "k": k, "v": v, "pack": pack, **{n: x for n, x in changes.items() if n != "scale"}}
    with pytest.raises(error, match=re.escape(f"prefix_attention: {message}")):
        prefix_attention(**arguments, scale=scale)


GROUPS = make_pack(SHAPES).branch_group
PREFIX, BRANCH = make_pack(SHAPES).cu_prefix, make_pack(SHAPES).cu_branch
DECREASING = torch.tensor([0, 0, 0, 0, 2, 3, 2, 4, 4, 4])
BAD_PACKS = {
    "groups shifted up": ({"branch_group": GROUPS + 1}, "branch_group in [0, 5) and not to decrease, got [1, 1,"),
    "groups shifted down": ({"branch_group": GROUPS - 1}, "branch_group in [0, 5) and not to decrease, got [-1,"),
    "one group too high": ({"branch_group": GROUPS.clone().index_fill_(0, torch.tensor([9]), 5)}, "branch_group in"),
    "groups that decrease": ({"branch_group": DECREASING}, "branch_group in [0, 5) and not to decrease, got [0, 0,"),
    "fewer groups than branches": ({"branch_group": GROUPS[:-1]}, "branch_group of shape (10,), got (9,)"),
    "more groups than branches": ({"branch_group": GROUPS.repeat_interleave(2)}, "branch_group of shape (10,)"),
    "branches in the next group": (
        {"branch_group": torch.tensor([0, 0, 0, 0, 2, 2, 3, 3, 4, 4])},
        "last_index 37 of branch 7, by the lengths and branch_group, got 46",
    ),
    "the last tokens of other branches": (
        {"last_index": make_pack(SHAPES).last_index.flip(0)},
        "last_index 9 of branch 0, by the lengths and branch_group, got",
    ),
    "groups as floats": ({"branch_group": GROUPS.double()}, "branch_group of dtype int32, int64, got float64"),
    "groups as a sparse tensor": ({"branch_group": GROUPS.to_sparse()}, "branch_group to be a dense tensor"),
    "groups in a matrix": ({"branch_group": GROUPS[None]}, "branch_group of shape (S,), got (1, 10)"),
    "short prefixes": ({"cu_prefix": PREFIX - PREFIX.clamp(max=1)}, "cu_prefix and cu_branch to cover the pack's 57"),
    "prefixes from 1": ({"cu_prefix": PREFIX + 1}, "cu_prefix to begin with 0 and not to decrease, got [1,"),
    "negated prefixes": ({"cu_prefix": -PREFIX}, "cu_prefix to begin with 0 and not to decrease"),
    "reversed prefixes": ({"cu_prefix": PREFIX.flip(0)}, "cu_prefix to begin with 0 and not to decrease"),
    "no prefix bounds": ({"cu_prefix": PREFIX[:0]}, "cu_prefix to begin with 0 and not to decrease, got []"),
    "huge branches": ({"cu_branch": BRANCH * 1000}, "cu_prefix and cu_branch to cover the pack's 57 tokens, got"),
    "branches that decrease": ({"cu_branch": BRANCH[[0, 2, 1, *range(3, 11)]]}, "cu_branch to begin with 0 and not"),
}


@pytest.mark.parametrize("way", ["cpu", "pieces", "expanded"])
@pytest.mark.parametrize("name", BAD_PACKS)
def test_refuses_a_damaged_pack(name, way):
    changes, message = BAD_PACKS[name]
    (q, k, v), _ = make(make_pack(SHAPES))
    pack = replace(make_pack(SHAPES), **changes)
    op = "prefix_attention" if way == "cpu" else "packing"
    with pytest.raises((ValueError, TypeError), match=re.escape(f"{op}: expected {message}")):
        (prefix_attention if way == "cpu" else WAYS[way])(q, k, v, pack)


def test_refuses_a_damaged_pack_without_tokens():
    pack = replace(make_pack([]), branch_group=torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prefix_attention: expected branch_group of shape \(0,\), got \(1,\)"):
        prefix_attention(*[torch.zeros(0, 1, 4)] * 3, pack)
