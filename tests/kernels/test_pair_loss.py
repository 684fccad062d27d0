"""pair_loss against its float64 reference: values, gradients, metrics."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import pair_loss
from prism_kernels.metrics import PAIR_TOTALS
from prism_kernels.ops.pair_loss.reference import pair_loss_reference
from prism_kernels.testing import assert_close, double


def make(pairs=23, scores=5, *, grouped=True, masked=True, dtype=torch.float64, seed=0, scale=3.0):
    """Scores that want gradients, and options; pairs that are not valid hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    preferred = (torch.randn(scores if grouped else pairs, generator=rng) * scale).to(dtype)
    other = (torch.randn(pairs, generator=rng) * scale).to(dtype)
    options = {}
    if grouped:
        options["group"] = torch.randint(0, max(scores, 1), (pairs,), generator=rng)
    if masked:
        valid = torch.rand(pairs, generator=rng) < 0.7
        other[~valid] = torch.nan
        if not grouped:
            preferred[~valid] = torch.inf
        options["valid"] = valid
    return preferred.requires_grad_(), other.requires_grad_(), options


def run(op, preferred, other, **options):
    loss, metrics = op(preferred, other, **options)
    return loss.detach(), torch.autograd.grad(loss * 1.7, (preferred, other)), metrics


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("soft_clip", [None, 2.0])
@pytest.mark.parametrize("regularisation", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pair_loss_matches_float64(grouped, masked, soft_clip, regularisation, dtype):
    preferred, other, options = make(grouped=grouped, masked=masked, dtype=dtype)
    for denominator in (None, 31.0, torch.tensor(7.0)):
        options |= {"soft_clip": soft_clip, "regularisation": regularisation, "denominator": denominator}
        loss, grads, metrics = run(pair_loss, preferred, other, **options)
        plain, plain_grads, _ = run(pair_loss_reference, preferred, other, **options)
        exact, wanted, totals = run(pair_loss_reference, double(preferred), double(other), **options)
        tiny = 1e-13 if dtype == torch.float64 else 1e-6
        assert_close(loss, plain, exact, name="loss", tiny=tiny)
        for name, g, p, w in zip(("preferred", "other"), grads, plain_grads, wanted):
            assert g.dtype == dtype
            assert_close(g, p, w, name=name, tiny=tiny)
        for name in PAIR_TOTALS:
            assert float(getattr(metrics, name)) == pytest.approx(float(totals[name]), rel=10 * tiny), name


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.integers(0, 12),
    scores=st.integers(1, 5),
    grouped=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_pair_loss_any_shape(pairs, scores, grouped, masked, seed):
    preferred, other, options = make(pairs, scores, grouped=grouped, masked=masked, seed=seed)
    ours = run(pair_loss, preferred, other, **options)
    exact = run(pair_loss_reference, preferred, other, **options)
    torch.testing.assert_close(ours[:2], exact[:2], rtol=1e-12, atol=1e-13)


def test_pair_loss_gradcheck():
    preferred, other, options = make(masked=False)
    for extra in ({}, {"soft_clip": 3.0}, {"regularisation": 0.1, "denominator": 9.0}):
        assert torch.autograd.gradcheck(
            lambda p, o, extra=extra: pair_loss(p, o, **options, **extra)[0], (preferred, other)
        )


def test_bradley_terry():
    """-log sigma(D(y+) - D(y-)), averaged; a shared preferred score is the same as its copies."""
    preferred, other, options = make(masked=False)
    copies = preferred.detach()[options["group"]].requires_grad_()
    loss, (_, grad), metrics = run(pair_loss, copies, other)
    wanted = torch.nn.functional.softplus(-(copies - other), threshold=1000).mean()
    torch.testing.assert_close(loss, wanted.detach())
    shared, (grad_shared, grad_other), totals = run(pair_loss, preferred, other, **options)
    torch.testing.assert_close((shared, grad_other, totals.totals), (loss, grad, metrics.totals))
    copied = torch.autograd.grad(pair_loss(copies, other)[0] * 1.7, copies)[0]
    torch.testing.assert_close(grad_shared, torch.zeros(5).double().index_add(0, options["group"], copied))


def test_no_valid_pair_teaches_nothing():
    preferred, other, options = make()
    options["valid"] = torch.zeros(23, dtype=torch.bool)
    for extra in ({}, {"regularisation": 0.1}, {"denominator": 64.0}):
        loss, grads, metrics = run(pair_loss, preferred, other, **options, **extra)
        assert float(loss) == 0 and all((g == 0).all() for g in grads)
        assert float(metrics.pairs) == 0 and metrics.means()["correct"] != metrics.means()["correct"]


def test_huge_differences_are_finite():
    """Where exp(-x) overflows; the soft clip keeps a gradient where a clip at 10 has none."""
    preferred = torch.tensor([-500.0, 500.0, 0.0]).requires_grad_()
    other = torch.tensor([500.0, -500.0, 0.0]).requires_grad_()
    loss, grads, _ = run(pair_loss, preferred, other)
    assert float(loss) == pytest.approx((1000 + 0.6931472) / 3, rel=1e-6)
    torch.testing.assert_close(grads[0], torch.tensor([-1.0, 0.0, -0.5]) * 1.7 / 3)
    far, zero = torch.tensor([-12.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    hard = torch.nn.functional.softplus(-(far - zero).clamp(-10, 10)).sum()
    assert torch.autograd.grad(hard, far)[0] == 0
    _, (soft, _), _ = run(pair_loss, far, zero, soft_clip=10.0)
    assert soft < -0.3


def test_two_halves_make_the_whole():
    preferred, other, options = make(grouped=False)
    count = float(options["valid"].sum())
    loss, grads, metrics = run(pair_loss, preferred, other, **options, denominator=count)
    parts = []
    for half in (slice(0, 9), slice(9, None)):
        p, o = (x.detach()[half].requires_grad_() for x in (preferred, other))
        parts.append(run(pair_loss, p, o, valid=options["valid"][half], denominator=count))
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    for i in range(2):
        torch.testing.assert_close(torch.cat([p[1][i] for p in parts]), grads[i])
    torch.testing.assert_close((parts[0][2] + parts[1][2]).totals, metrics.totals)
    means = metrics.means()
    x = (preferred - other)[options["valid"]]
    assert means["margin"] == pytest.approx(float(x.detach().mean()))
    assert means["correct"] == pytest.approx(float((x > 0).double().mean()))


def test_compiles_whole_and_repeats():
    preferred, other, options = make(dtype=torch.float32)

    def f(p, o):
        loss, metrics = pair_loss(p, o, **options, soft_clip=5.0)
        return loss * 2 + 0 * metrics.margin.float()

    ours = torch.autograd.grad(torch.compile(f, fullgraph=True)(preferred, other), (preferred, other))
    wanted = torch.autograd.grad(f(preferred, other), (preferred, other))
    torch.testing.assert_close(ours, wanted)
    again = torch.autograd.grad(f(preferred, other), (preferred, other))
    assert all(torch.equal(a, b) for a, b in zip(wanted, again))


def test_opcheck():
    op = torch.ops.prism_kernels.pair_loss_fwd.default
    for grouped in (True, False):
        preferred, other, options = make(grouped=grouped, dtype=torch.float32)
        rest = (options.get("group"), options["valid"], torch.tensor(3.0), 0.0, 0.1, 2.0)
        torch.library.opcheck(op, (preferred.detach(), other.detach(), *rest))


ZERO = torch.zeros(4)
BAD = [
    ({"preferred": [1.0]}, TypeError, "expected preferred to be a tensor, got list"),
    ({"preferred": torch.zeros(3)}, ValueError, "expected preferred of shape (4,), got (3,)"),
    ({"other": torch.zeros(2, 2)}, ValueError, "expected other of shape (N,), got (2, 2)"),
    ({"other": torch.zeros(4, dtype=torch.int64)}, TypeError, "expected other of dtype float32"),
    ({"group": torch.tensor([0, 1, 4, 0])}, ValueError, "expected group ids in [0, 4), got 4 at 2"),
    ({"group": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected group of shape (4,), got (3,)"),
    ({"group": torch.zeros(4)}, TypeError, "expected group of dtype int64, int32, got float32"),
    ({"valid": torch.ones(4)}, TypeError, "expected valid of dtype bool, got float32"),
    ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, "expected valid of shape (4,), got (3,)"),
    ({"denominator": 0}, ValueError, "expected denominator > 0 and finite, got 0"),
    ({"denominator": torch.tensor(0.0)}, ValueError, "expected denominator > 0 and finite, got 0.0"),
    ({"soft_clip": -1.0}, ValueError, "expected soft_clip > 0 and finite, got -1.0"),
    ({"regularisation": -1.0}, ValueError, "expected regularisation >= 0 and finite, got -1.0"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_pair_loss_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match="pair_loss: .*" + re.escape(message)):
        pair_loss(**{"preferred": ZERO, "other": ZERO, **changes})
