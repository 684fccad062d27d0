"""Each op on random shapes, dtypes, layouts and damaged arguments: it equals its reference or names what is wrong."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

import prism_kernels as pk
from fuzz.values import FLOATS, booleans, damage, floats, integers, maybe, run
from prism_kernels.backend import unavailable
from prism_kernels.ops.group_advantage import reference as group
from prism_kernels.ops.linear_logprob import reference as linear
from prism_kernels.ops.linear_policy_loss import reference as fused
from prism_kernels.ops.moe_experts import reference as experts
from prism_kernels.ops.moe_route import reference as route
from prism_kernels.ops.pair_loss import reference as pair
from prism_kernels.ops.policy_loss import reference as policy
from prism_kernels.ops.policy_loss.options import AGGREGATES, CORRECTIONS, ESTIMATORS, OBJECTIVES, RATIOS
from prism_kernels.ops.prefix_attention import reference as attention
from prism_kernels.ops.prism_advantage import op as prism_op
from prism_kernels.ops.prism_advantage import reference as prism
from prism_kernels.ops.token_logprob import reference as token
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack

BACKENDS = [name for name in ("cpu", "torch") if unavailable("linear_logprob", name, "cpu") is None]
SIZES = st.integers(0, 6)


def pick(draw, *values):
    return draw(st.sampled_from(values))


def columns(draw):
    # the widest vectors have 16 lanes
    return pick(draw, 1, 2, 3, 15, 16, 17, 33, 70)


def tensors_of(result):
    return [x for x in result if isinstance(x, torch.Tensor)]


@st.composite
def head(draw, dims=(2, 3)):
    dtype, other = pick(draw, *FLOATS), pick(draw, *FLOATS)
    V, D, R = columns(draw), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shape = (draw(SIZES),) if pick(draw, *dims) == 2 else (draw(SIZES), draw(st.integers(1, 3)))
    target = integers(draw, 0, V, *shape)
    if draw(st.booleans()):
        target = target.clone().masked_fill_(booleans(draw, *shape), -100)
    temperature = pick(draw, 1.0, 0.5, 3, "rows")
    lora = (floats(draw, R, D, dtype=other), floats(draw, V, R, dtype=other), pick(draw, 0.5, -2.0, 0.0))
    return {
        "hidden": floats(draw, *shape, D, dtype=dtype),
        "weight": floats(draw, V, D, dtype=dtype),
        "target": target,
        "bias": maybe(draw, lambda: floats(draw, V, dtype=other)),
        "temperature": torch.rand(shape) + 0.5 if temperature == "rows" else temperature,
        "softcap": pick(draw, None, 5.0, 30.0),
        "lora": pick(draw, None, lora),
        "backend": pick(draw, *BACKENDS),
    }


def test_linear_logprob(fuzz):
    @fuzz
    def target(draw):
        arguments = {**draw(head()), "entropy": draw(st.booleans()), "ignore_index": pick(draw, -100, 0)}
        arguments["cache_bytes"] = pick(draw, None, 0, 100, 10**9)

        def reference(*, cache_bytes, **options):
            return linear.linear_logprob_reference(**options)

        run(["linear_logprob"], pk.linear_logprob, reference, damage(draw, arguments), tensors_of)


def test_token_logprob(fuzz):
    @fuzz
    def target(draw):
        V, shape = columns(draw), draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        in_place = draw(st.booleans())
        arguments = {
            "logits": floats(draw, *shape, V, dtype=pick(draw, *FLOATS), scale=pick(draw, 1.0, 30.0)),
            "target": integers(draw, 0, V, *shape),
            "temperature": pick(draw, 1.0, 0.5, torch.rand(shape) + 0.5),
            "entropy": draw(st.booleans()),
            "ignore_index": pick(draw, -100, 0),
            "backend": pick(draw, *BACKENDS),
        }

        def op(logits, **options):
            # not a leaf, which may not be written
            scratch = logits * 1 if in_place and isinstance(logits, torch.Tensor) else logits
            return pk.token_logprob(scratch, inplace_backward=in_place, **options)

        run(["token_logprob"], op, token.token_logprob_reference, damage(draw, arguments), tensors_of)


def losses(draw, T):
    """The arguments that both policy losses share."""
    S = draw(st.integers(0, 4)) if T == 0 else draw(st.integers(1, 4))
    cuts = sorted(draw(st.lists(st.integers(0, T), min_size=max(S - 1, 0), max_size=max(S - 1, 0))))
    bounds = [0, *cuts, T] if S else [0]
    dtype, objective = pick(draw, *FLOATS), pick(draw, *OBJECTIVES)
    return {
        "old_logp": maybe(draw, lambda: floats(draw, T, dtype=dtype).detach()),
        "advantage": floats(draw, pick(draw, T, S), dtype=dtype).detach(),
        "cu_seqlens": torch.tensor(bounds, dtype=pick(draw, torch.int32, torch.int64)),
        "mask": maybe(draw, lambda: booleans(draw, T)),
        "ratio": pick(draw, *RATIOS),
        "clip": pick(draw, (0.2, 0.2), (0.0, 0.3), (0.1, 1e300)),
        "dual_clip": pick(draw, None, 1.5) if objective == "clip" else None,
        "objective": objective,
        "log_ratio_bound": pick(draw, 20.0, 0.5),
        "aggregate": pick(draw, *AGGREGATES),
        "denominator": pick(draw, None, 3.0, torch.tensor(5.0)),
        "horizon": 7.0,
        "ref_logp": floats(draw, T, dtype=dtype).detach(),
        "kl_coef": pick(draw, 0.0, 0.3),
        "kl_estimator": pick(draw, *ESTIMATORS),
        "rollout_logp": floats(draw, T, dtype=dtype).detach(),
        "correction": pick(draw, None, *CORRECTIONS),
        "correction_bounds": pick(draw, (0.5, 2.0), (0.0, 1e300)),
        "entropy_coef": pick(draw, 0.0, 0.1),
    }


def test_policy_loss(fuzz):
    @fuzz
    def target(draw):
        T, dtype = draw(SIZES), pick(draw, *FLOATS)
        arguments = {"logp": floats(draw, T, dtype=dtype), "entropy": floats(draw, T, dtype=dtype), **losses(draw, T)}
        arguments["backend"] = pick(draw, *BACKENDS)
        run(["policy_loss"], pk.policy_loss, policy.policy_loss_reference, damage(draw, arguments), tensors_of)


def test_linear_policy_loss(fuzz):
    @fuzz
    def target(draw):
        rows = draw(head(dims=(2,)))
        arguments = {**rows, **losses(draw, rows["hidden"].shape[0]), "chunk_tokens": pick(draw, None, 1, 3)}

        def reference(*, chunk_tokens, **options):
            return fused.linear_policy_loss_reference(**options)

        run(["linear_policy_loss"], pk.linear_policy_loss, reference, damage(draw, arguments), tensors_of)


def test_group_advantage(fuzz):
    @fuzz
    def target(draw):
        N = draw(SIZES)
        arguments = {
            "reward": floats(draw, N, dtype=pick(draw, *FLOATS)).detach(),
            "group": integers(draw, 0, N, N, dtype=pick(draw, torch.int64, torch.int32)),
            "baseline": pick(draw, "mean", "leave_one_out", "none"),
            "scale": pick(draw, "std", "none", "batch_std"),
            "valid": maybe(draw, lambda: booleans(draw, N)),
            # large beside the rounding of equal rewards
            "eps": 1e-2,
        }
        with pk.use_backend(pick(draw, *BACKENDS)):
            reference = group.group_advantage_reference
            run(["group_advantage"], pk.group_advantage, reference, damage(draw, arguments), lambda x: [x])


def test_prism_advantage(fuzz):
    @fuzz
    def target(draw):
        N = draw(SIZES)
        arguments = {
            "perception": floats(draw, N, dtype=pick(draw, *FLOATS)).detach(),
            "reasoning": floats(draw, N, dtype=pick(draw, *FLOATS)).detach(),
            "group": integers(draw, 0, N, N, dtype=pick(draw, torch.int64, torch.int32)),
            "format_ok": maybe(draw, lambda: booleans(draw, N)),
            "accuracy": integers(draw, 0, 2, N).float(),
            "alpha": pick(draw, 0.0, 0.5, 1.0),
            "normalize": pick(draw, *prism_op.NORMALIZE),
            "invalid": pick(draw, *prism_op.INVALID),
            "mode": pick(draw, *prism_op.MODES),
            "align_coef": pick(draw, 1.0, -0.5),
            "eps": 1e-2,
        }
        with pk.use_backend(pick(draw, *BACKENDS)):
            reference = prism.prism_advantage_reference
            run(["prism_advantage"], pk.prism_advantage, reference, damage(draw, arguments), lambda x: [x])


def test_pair_loss(fuzz):
    @fuzz
    def target(draw):
        N, P, grouped = draw(SIZES), draw(st.integers(1, 4)), draw(st.booleans())
        arguments = {
            "preferred": floats(draw, P if grouped else N, dtype=pick(draw, *FLOATS)),
            "other": floats(draw, N, dtype=pick(draw, *FLOATS)),
            "group": integers(draw, 0, P, N) if grouped else None,
            "valid": maybe(draw, lambda: booleans(draw, N)),
            "denominator": pick(draw, None, 2.0, torch.tensor(3.0)),
            "regularisation": pick(draw, 0.0, 0.1),
            "soft_clip": pick(draw, None, 2.0),
        }
        run(["pair_loss"], pk.pair_loss, pair.pair_loss_reference, damage(draw, arguments), lambda x: [x[0]])


def test_moe_route(fuzz):
    @fuzz
    def target(draw):
        T, D, E, kinds = draw(SIZES), draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.booleans())
        # fp32 and fp64 alone: with rounded logits another expert may be right
        dtype = pick(draw, torch.float32, torch.float64)
        arguments = {
            "x": floats(draw, T, D, dtype=dtype),
            "router_weight": floats(draw, E, D, dtype=dtype),
            "top_k": draw(st.integers(1, E)),
            "kind": integers(draw, 0, 3, T) if kinds else None,
            "kind_bias": maybe(draw, lambda: floats(draw, 3 if kinds else 1, E, dtype=dtype)),
            "token_weight": maybe(draw, lambda: integers(draw, 0, 3, T).to(dtype)),
            "renormalize": draw(st.booleans()),
        }

        def outputs(routing):
            # equal probabilities: the order of experts is the order of rounding
            return [routing.weight, routing.aux_loss, routing.z_loss]

        run(["moe_route"], pk.moe_route, route.moe_route_reference, damage(draw, arguments), outputs)


def test_moe_experts(fuzz):
    @fuzz
    def target(draw):
        T, D, F, E = draw(SIZES), draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
        K, dtype = draw(st.integers(1, E)), pick(draw, *FLOATS)
        index = floats(draw, T, E, dtype=torch.float64).argsort(1)[:, :K]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        routing = pk.Routing.from_topk(index, floats(draw, T, K, dtype=exact), E)
        parts = {name: getattr(routing, name) for name in ("index", "weight", "offsets", "permutation")}
        parts["weight"] = parts["weight"].detach().requires_grad_()
        arguments = {
            "x": floats(draw, T, D, dtype=dtype),
            "gate_up": floats(draw, E, 2 * F, D, dtype=dtype),
            "down": floats(draw, E, D, F, dtype=dtype),
            **parts,
        }

        def op(x, gate_up, down, **order):
            return pk.moe_experts(x, routing._replace(**order), gate_up, down)

        def reference(x, gate_up, down, index, weight, **_):
            return experts.moe_experts_reference(x, index, weight, gate_up, down)

        run(["moe_experts"], op, reference, damage(draw, arguments), lambda x: [x])


def test_from_topk(fuzz):
    @fuzz
    def target(draw):
        T, K, E = draw(SIZES), draw(st.integers(1, 3)), draw(st.integers(1, 5))
        arguments = {
            "index": integers(draw, 0, E, T, K, dtype=pick(draw, torch.int64, torch.int32)),
            "weight": floats(draw, T, K, dtype=pick(draw, *FLOATS)),
            "num_experts": E,
        }

        def reference(index, weight, num_experts):
            order = index.flatten().sort(stable=True).indices
            ends = torch.stack([(index <= e).sum() for e in range(num_experts)])
            return index, weight, ends, order

        outputs = lambda routing: list(routing[:4])  # noqa: E731
        run(["moe_route.from_topk"], pk.Routing.from_topk, reference, damage(draw, arguments), outputs)


def test_prefix_attention(fuzz):
    @fuzz
    def target(draw):
        shapes = draw(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 3), max_size=3)), max_size=3))
        pieces = [PrefixGroup(range(n), [Branch(range(m), Kind.REASONING) for m in lengths]) for n, lengths in shapes]
        pack = build_pack(pieces)
        tokens = pack.input_ids.shape[0]
        kept, repeats, width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), pick(draw, 1, 3, 8)
        dtype = pick(draw, *FLOATS)
        parts = {name: getattr(pack, name) for name in ("cu_prefix", "cu_branch", "branch_group", "last_index")}
        arguments = {
            "q": floats(draw, tokens, kept * repeats, width, dtype=dtype),
            "k": floats(draw, tokens, kept, width, dtype=dtype),
            "v": floats(draw, tokens, kept, width, dtype=dtype),
            "scale": pick(draw, None, 0.3),
            **parts,
        }

        def call(op):
            return lambda q, k, v, scale, **changed: op(q, k, v, replace(pack, **changed), scale=scale)

        reference = call(attention.prefix_attention_reference)
        names = ["prefix_attention", "packing"]
        run(names, call(pk.prefix_attention), reference, damage(draw, arguments), lambda x: [x], finite=True)
