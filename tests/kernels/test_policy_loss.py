"""policy_loss against its float64 reference: values, gradients, metrics, and where autograd forms fail."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import BACKENDS, LENGTHS, bounds, grid, make, run, surrogate

from prism_kernels import policy_loss
from prism_kernels.metrics import POLICY_TOTALS, PolicyMetrics
from prism_kernels.ops.policy_loss.options import AGGREGATES, RATIOS, checked_options
from prism_kernels.ops.policy_loss.reference import policy_loss_reference
from prism_kernels.testing import assert_close, double


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# options: the algorithms' choices, sampled; per_token and dtype choose other inner loops of the C++ kernel
@pytest.mark.grid
@pytest.mark.parametrize("options", list(grid(60)), ids=lambda o: f"{o['objective']}-{o['ratio']}-{o['kl_estimator']}")
@pytest.mark.parametrize("per_token", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_policy_loss_matches_float64(backend, options, per_token, dtype):
    for masked, on_policy in ((True, False), (False, True)):
        batch, cu = make(dtype=dtype, per_token=per_token, masked=masked)
        if on_policy:
            batch["old_logp"] = None
        loss, grads, metrics = run(policy_loss, batch, cu, **options, backend=backend)
        exact, wanted, totals = run(policy_loss_reference, double(batch), cu, **options)
        plain, plain_grads, _ = run(policy_loss_reference, batch, cu, **options)
        tiny = 1e-13 if dtype == torch.float64 else 1e-6
        # terms of both signs cancel
        assert_close(loss, plain, exact, name="loss", tiny=4 * tiny)
        for name, ours, p, w in zip(("logp", "entropy"), grads, plain_grads, wanted):
            assert ours.dtype == dtype
            assert_close(ours, p, w, name=f"gradient of {name}", tiny=tiny)
        for name, value in totals.items():
            got = float(getattr(metrics, name))
            assert got == pytest.approx(float(value), rel=10 * tiny, abs=10 * tiny), name


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    case=st.integers(0, 59),
    per_token=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_policy_loss_any_shape(lengths, case, per_token, masked, seed):
    options = list(grid(60))[case]
    for name in BACKENDS:
        batch, cu = make(lengths, per_token=per_token, masked=masked and sum(lengths) > 0, seed=seed)
        loss, grads, _ = run(policy_loss, batch, cu, **options, backend=name)
        exact, wanted, _ = run(policy_loss_reference, batch, cu, **options)
        torch.testing.assert_close(loss, exact, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("objective", ["clip", "reinforce"])
def test_policy_loss_gradcheck(backend, aggregate, ratio, objective):
    """Where no part of the loss is constant by definition, the gradient is the derivative."""
    for estimator, correction in zip(("k1", "k2", "k3"), ("token_tis", "sequence_mask", "geometric_tis")):
        batch, cu = make(masked=False)
        old, advantage = batch["old_logp"], batch["advantage"]
        rest = {k: batch[k] for k in ("ref_logp", "rollout_logp")}

        def f(logp, entropy, old=old, advantage=advantage, cu=cu, rest=rest, estimator=estimator, fix=correction):
            return policy_loss(
                logp, old, advantage, cu, ratio=ratio, objective=objective, aggregate=aggregate, horizon=9.0,
                dual_clip=1.5 if objective == "clip" else None, kl_coef=0.2, kl_estimator=estimator, correction=fix,
                entropy=entropy, entropy_coef=0.1, backend=backend, **rest,
            )[0]  # fmt: skip

        assert torch.autograd.gradcheck(f, (batch["logp"], batch["entropy"]))


def naive(logp, old, advantage, mask, low=0.2, high=0.2, dual=3.0):
    ratio = torch.exp(logp - old)
    losses = -surrogate(ratio, advantage, low, high)
    losses = torch.where(advantage < 0, torch.minimum(losses, -dual * advantage), losses)
    return torch.where(mask, losses, 0.0).sum() / mask.sum()


@pytest.mark.parametrize("case", ["masked overflow", "log-ratio 90", "clipped both ways", "masked nan"])
def test_gradients_are_finite_where_autograd_gives_nan(backend, case):
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.5])
    old = torch.tensor([-1.1, -1.9, -3.2, -1.4])
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask = torch.tensor([True, True, True, True])
    if case == "masked overflow":
        old[1], mask[1] = -200.0, False
    elif case == "masked nan":
        logp[1], old[1], mask[1] = torch.nan, torch.inf, False
    elif case == "log-ratio 90":
        # clipped, but the branch that is not taken is inf
        old[0] = -91.0
    else:
        # clipped by dual_clip, and the branch of the clip is inf
        old[1], old[0] = -92.0, -92.0
    leaf = logp.clone().requires_grad_()
    value = naive(leaf, old, advantage, mask)
    (grad,) = torch.autograd.grad(value, leaf)
    assert not grad.isfinite().all()

    leaf = logp.clone().requires_grad_()
    cu = bounds([2, 2])
    loss, metrics = policy_loss(leaf, old, advantage, cu, mask=mask, dual_clip=3.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all() and loss.isfinite() and metrics.totals.isfinite().all()
    others = torch.tensor([i for i in range(4) if abs(float(logp[i] - old[i])) < 1 and mask[i]])
    clean = logp.clone().requires_grad_()
    rest = surrogate(torch.exp(clean - old), advantage, 0.2, 0.2)[others].sum() / mask.sum()
    (wanted,) = torch.autograd.grad(-rest, clean)
    torch.testing.assert_close(grad[others], wanted[others], rtol=1e-5, atol=1e-7)
    gone = torch.tensor([i for i in range(4) if i not in others.tolist()])
    assert (grad[gone] == 0).all()


def test_ratio_is_one_on_policy(backend):
    """old_logp=None gives the results of passing logp itself, without a forward pass for it."""
    batch, cu = make(masked=False)
    given = dict(batch, old_logp=batch["logp"].detach().clone())
    ours = run(policy_loss, dict(batch, old_logp=None), cu, backend=backend)
    wanted = run(policy_loss, given, cu, backend=backend)
    assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[1][0], wanted[1][0])
    assert float(ours[2].ratio) == float(ours[2].tokens) == 28


def halves(batch, cu, at, per_token):
    """The batch's sequences before and after `at`."""
    t = int(cu[at])
    for tokens, sequences in ((slice(0, t), slice(0, at)), (slice(t, None), slice(at, None))):
        part = {}
        for name, x in batch.items():
            cut = sequences if name == "advantage" and not per_token else tokens
            part[name] = None if x is None else x.detach()[cut]
        part["logp"] = part["logp"].requires_grad_()
        yield part, (cu[: at + 1] if at == sequences.stop else cu[at:] - t)


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence", "token"])
def test_two_halves_make_the_whole(backend, per_token):
    """With the global denominator, losses and gradients add up, and metrics merge."""
    for options in list(grid(24)):
        batch, cu = make(per_token=per_token)
        by_token = options["aggregate"] == "token_mean"
        valid = [int(batch["mask"][a:b].sum()) for a, b in itertools.pairwise(cu.tolist())]
        options["denominator"] = float(sum(valid) if by_token else sum(v > 0 for v in valid))
        loss, grads, metrics = run(policy_loss, batch, cu, **options, backend=backend)
        parts = [run(policy_loss, p, c, **options, backend=backend) for p, c in halves(batch, cu, 3, per_token)]
        torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
        torch.testing.assert_close(torch.cat([p[1][0] for p in parts]), grads[0])
        merged = parts[0][2] + parts[1][2]
        torch.testing.assert_close(merged.totals, metrics.totals)
        natural, _, _ = run(policy_loss, batch, cu, **dict(options, denominator=None), backend=backend)
        torch.testing.assert_close(natural, loss)


def test_means_are_floats_per_token(backend):
    batch, cu = make()
    _, _, metrics = run(policy_loss, batch, cu, correction="token_tis", backend=backend)
    means = metrics.means()
    assert all(isinstance(v, float) for v in means.values())
    mask = batch["mask"]
    r = (batch["logp"].detach() - batch["old_logp"])[mask].exp()
    assert means["tokens"] == float(mask.sum()) and means["sequences"] == 3
    assert means["ratio"] == pytest.approx(float(r.mean()))
    assert means["ratio_min"] == pytest.approx(float(r.min()))
    assert means["ratio_max"] == pytest.approx(float(r.max()))
    assert means["approx_kl"] == pytest.approx(float(-r.log().mean()))
    w = r * (batch["old_logp"] - batch["rollout_logp"])[mask].exp().clamp(max=2.0)
    assert means["ess"] == pytest.approx(float(w.sum() ** 2 / (w.square().sum() * w.numel())))
    assert 0 < means["ess"] <= 1


def test_metrics_of_no_token(backend):
    batch, cu = make((3, 4), masked=False)
    batch["mask"] = torch.zeros(7, dtype=torch.bool)
    loss, grads, metrics = run(policy_loss, batch, cu, backend=backend)
    assert float(loss) == 0 and (grads[0] == 0).all()
    assert float(metrics.tokens) == 0 and float(metrics.ratio_min) == torch.inf
    assert metrics.means()["ratio"] != metrics.means()["ratio"]
    _, _, whole = run(policy_loss, dict(batch, mask=None), cu, backend=backend)
    assert torch.equal((metrics + whole).totals, whole.totals)
    assert len(POLICY_TOTALS) == metrics.totals.numel() and isinstance(metrics, PolicyMetrics)


def test_as_many_sequences_as_tokens_means_per_token(backend):
    """S == T: the advantage is per token, also where the sequences have other lengths than 1."""
    batch, cu = make((3, 0, 1), masked=False, per_token=True)
    cu = torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32)
    ours, grads, _ = run(policy_loss, batch, cu, backend=backend)
    advantage = batch["advantage"]
    loss = -surrogate((batch["logp"] - batch["old_logp"]).exp(), advantage, 0.2, 0.2).mean()
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss * 1.7, batch["logp"])[0])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (9,)], ids=str)
def test_few_tokens(backend, lengths):
    for ratio in RATIOS:
        batch, cu = make(lengths, masked=False)
        ours, grads, metrics = run(policy_loss, batch, cu, ratio=ratio, backend=backend)
        exact, wanted, totals = run(policy_loss_reference, batch, cu, ratio=ratio)
        torch.testing.assert_close(ours, exact)
        torch.testing.assert_close(grads, wanted)
        assert float(metrics.tokens) == float(totals["tokens"]) == sum(lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_fp32(backend, dtype):
    batch, cu = make(dtype=dtype)
    loss, grads, _ = run(policy_loss, batch, cu, kl_coef=0.1, entropy_coef=0.1, backend=backend)
    exact, wanted, _ = run(policy_loss_reference, double(batch), cu, kl_coef=0.1, entropy_coef=0.1)
    assert loss.dtype == torch.float32 and grads[0].dtype == grads[1].dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0].double(), wanted[0], rtol=eps, atol=1e-6)


def test_strided_and_expanded_inputs(backend):
    batch, cu = make(masked=False)
    wanted, grads, _ = run(policy_loss, batch, cu, backend=backend)
    wide = {k: None if x is None else torch.stack((x.detach(), x.detach()), 1)[:, 0] for k, x in batch.items()}
    wide["logp"] = wide["logp"].requires_grad_()
    ours, strided, _ = run(policy_loss, wide, cu.long(), backend=backend)
    assert torch.equal(ours, wanted) and torch.equal(strided[0], grads[0])
    constant = dict(batch, advantage=torch.ones((), dtype=torch.float64).expand(len(LENGTHS)))
    given = dict(batch, advantage=torch.ones(len(LENGTHS), dtype=torch.float64))
    assert torch.equal(
        run(policy_loss, constant, cu, backend=backend)[0], run(policy_loss, given, cu, backend=backend)[0]
    )


def test_gradients_only_where_they_are_wanted(backend):
    batch, cu = make()
    for logp, entropy in ((True, False), (False, True), (False, False)):
        leaf = batch["logp"].detach().requires_grad_(logp)
        surprise = batch["entropy"].detach().requires_grad_(entropy)
        loss, _ = policy_loss(leaf, batch["old_logp"], batch["advantage"], cu, mask=batch["mask"], entropy=surprise,
                              entropy_coef=0.1, backend=backend)  # fmt: skip
        assert loss.requires_grad == (logp or entropy)
        if loss.requires_grad:
            loss.backward()
        assert (leaf.grad is not None) == logp and (surprise.grad is not None) == entropy


def test_backward_twice(backend):
    batch, cu = make()
    leaf = batch["logp"]
    loss, _ = policy_loss(leaf, batch["old_logp"], batch["advantage"], cu, mask=batch["mask"], backend=backend)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    doubled = torch.autograd.grad(loss * 2, leaf, retain_graph=True)[0]
    assert torch.equal(doubled, 2 * first)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaf.grad, doubled)


def test_bitwise_repeatable(backend):
    batch, cu = make((4000, 1, 300, 9000, 0, 700), dtype=torch.float32)
    options = {"ratio": "sequence", "kl_coef": 0.1, "correction": "geometric_tis", "entropy_coef": 0.1}
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(policy_loss, batch, cu, **options, backend=backend))
    first = runs[1 if backend == "torch" else 0]
    for loss, grads, metrics in runs[1:]:
        assert torch.equal(loss, first[0]) and torch.equal(metrics.totals, first[2].totals)
        assert all(torch.equal(a, b) for a, b in zip(grads, first[1]))


def test_compiles_whole(backend):
    batch, cu = make()

    def f(logp, entropy):
        loss, metrics = policy_loss(
            logp, batch["old_logp"], batch["advantage"], cu, mask=batch["mask"], entropy=entropy, entropy_coef=0.1,
            backend=backend,
        )  # fmt: skip
        return loss * 2, metrics.ratio

    leaves = (batch["logp"], batch["entropy"])
    ours, wanted = torch.compile(f, fullgraph=True)(*leaves), f(*leaves)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(torch.autograd.grad(ours[0], leaves), torch.autograd.grad(wanted[0], leaves))


def test_opcheck(backend):
    for case in itertools.islice(grid(60), 0, 60, 7):
        denominator = case["denominator"]
        encoded = checked_options("policy_loss", **case, per_token=False).encoded()
        batch, cu = make(dtype=torch.float32)
        names = ("logp", "old_logp", "advantage")
        rest = (batch["ref_logp"], batch["rollout_logp"], batch["entropy"].detach())
        tensors = [batch[k].detach() for k in names]
        scalar = denominator if isinstance(denominator, torch.Tensor) else None
        arguments = (*tensors, cu, batch["mask"], *rest, scalar, *encoded, backend)
        torch.library.opcheck(torch.ops.prism_kernels.policy_loss_fwd.default, arguments)
        if backend == "cpu":
            names = ("loss", "grad", "grad_entropy", "totals")
            outputs = dict(zip(names, torch.ops.prism_kernels.policy_loss_fwd(*arguments)))
            given = (*tensors, cu.long(), batch["mask"], *rest, 0.0, *encoded)
            torch.library.opcheck(torch.ops.prism_kernels.policy_loss_fwd.out, given, outputs)


BAD = [
    ({"logp": [1.0]}, TypeError, "expected logp to be a tensor, got list"),
    ({"logp": torch.zeros(4, 7)}, ValueError, "expected logp of shape (T,), got (4, 7)"),
    ({"logp": torch.zeros(28, dtype=torch.int64)}, TypeError, "expected logp of dtype float32"),
    ({"old_logp": torch.zeros(27)}, ValueError, "expected old_logp of shape (28,), got (27,)"),
    ({"advantage": torch.zeros(5)}, ValueError, "expected advantage of shape (6,), one for each sequence, or (28,)"),
    ({"advantage": torch.zeros(6, device="meta")}, ValueError, "expected advantage on logp's device cpu, got meta"),
    ({"cu_seqlens": torch.zeros(3)}, TypeError, "expected cu_seqlens of dtype int32, int64, got float32"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "expected cu_seqlens of shape (S + 1,), got (0,)"),
    ({"cu_seqlens": bounds((5, 0, 7, 1, 12, 2))}, ValueError, "from 0 to 28, the number of tokens, got 0 to 27"),
    ({"cu_seqlens": bounds((5, 0, 7, 1, 12, 3)) + 1}, ValueError, "got 1 to 29"),
    ({"cu_seqlens": bounds((5, 9, -3, 2, 12, 3))}, ValueError, "that do not decrease, got 11 after 14 at 3"),
    ({"mask": torch.ones(28)}, TypeError, "expected mask of dtype bool, got float32"),
    ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "expected mask of shape (28,), got (6,)"),
    ({"ratio": "both"}, ValueError, "expected ratio to be one of 'token', 'sequence', got 'both'"),
    ({"objective": "ppo"}, ValueError, "expected objective to be one of 'clip', 'cispo', 'reinforce', got 'ppo'"),
    ({"aggregate": "mean"}, ValueError, "expected aggregate to be one of 'token_mean', 'seq_mean_token_mean'"),
    ({"kl_estimator": "k4"}, ValueError, "expected kl_estimator to be one of 'k1', 'k2', 'k3', 'k1+', 'k3+', got 'k4'"),
    ({"correction": "tis"}, ValueError, "expected correction to be one of 'token_tis', 'sequence_tis'"),
    ({"clip": 0.2}, TypeError, "expected clip to be a pair of numbers, got 0.2"),
    ({"clip": (-0.1, 0.2)}, ValueError, "expected clip to be two numbers >= 0, (low, high), got -0.1"),
    ({"dual_clip": 1.0}, ValueError, "expected dual_clip > 1, got 1.0"),
    ({"dual_clip": 3.0, "objective": "cispo"}, ValueError, "expected dual_clip None with objective 'cispo', got 3.0"),
    ({"log_ratio_bound": 90.0}, ValueError, "expected log_ratio_bound in (0, 40], got 90.0"),
    ({"aggregate": "seq_mean_token_sum_norm"}, ValueError, "expected horizon > 0 with aggregate 'seq_mean"),
    ({"denominator": 0.0}, ValueError, "expected denominator > 0 and finite, got 0.0"),
    ({"denominator": torch.tensor(0.0)}, ValueError, "expected denominator > 0 and finite, got 0.0"),
    ({"denominator": torch.ones(1)}, ValueError, "expected denominator of shape (), got (1,)"),
    ({"kl_coef": 0.1}, ValueError, "expected ref_logp with kl_coef 0.1, got None"),
    ({"entropy_coef": 0.1}, ValueError, "expected entropy with entropy_coef 0.1, got None"),
    ({"correction": "token_tis"}, ValueError, "expected rollout_logp with correction 'token_tis', got None"),
    ({"correction_bounds": (2.0, 0.5)}, ValueError, "(lower, upper) with 0 <= lower < upper"),
    ({"backend": "triton"}, RuntimeError, "backend 'triton' is not available for cpu tensors: policy_loss has no"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_policy_loss_names_the_bad_argument(changes, error, message):
    tokens = torch.zeros(28)
    arguments = {"logp": tokens, "old_logp": tokens, "advantage": torch.zeros(6), "cu_seqlens": bounds(LENGTHS)}
    with pytest.raises(error, match="policy_loss: .*" + re.escape(message)):
        policy_loss(**{**arguments, **changes})
