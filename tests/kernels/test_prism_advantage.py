"""prism_advantage: the six modes, both treatments of invalid samples, against formulas written out in float64."""

import itertools
import re
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import prism_advantage, use_backend
from prism_kernels.backend import backend_status
from prism_kernels.ops.prism_advantage.op import INVALID, MODES, NORMALIZE
from prism_kernels.ops.prism_advantage.reference import prism_advantage_reference

BACKENDS = [
    s.backend for s in backend_status() if s.op == "prism_advantage" and s.reason is None and s.backend != "cuda"
]
COEFFICIENTS = {
    "alpha": 0.3,
    "format_penalty": 1.4,
    "align_coef": 0.7,
    "wrong_penalty": 0.9,
    "w_acc": 0.8,
    "w_fmt": 0.2,
    "eps": 1e-4,
}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def make(sizes=(8, 1, 16, 3, 4, 1), seed=0, dtype=torch.float64, invalid=0.3):
    """Scores, ids, format and accuracy; one group without a valid sample, invalid scores are NaN."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    ids = ids[torch.randperm(n, generator=rng)]
    perception, reasoning = (torch.randn(n, generator=rng).to(dtype) for _ in range(2))
    ok = torch.rand(n, generator=rng) >= invalid
    if invalid and len(sizes) > 3:
        ok[ids == 3] = False
    accuracy = (torch.rand(n, generator=rng) < 0.5).to(dtype) * ok
    perception[~ok], reasoning[~ok] = torch.nan, torch.inf
    return perception, reasoning, ids, ok, accuracy


# mode, invalid and normalize are the choices that users combine; dtype is the accumulator
@pytest.mark.grid
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("invalid", INVALID)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prism_advantage_matches_float64(mode, invalid, normalize, dtype):
    for seed in range(3):
        perception, reasoning, ids, ok, accuracy = make(seed=seed, dtype=dtype)
        for given_ok in (ok, None):
            if given_ok is None:
                perception, reasoning = perception.nan_to_num(0.3, 0.4), reasoning.nan_to_num(0.3, 0.4)
            options = {"format_ok": given_ok, "accuracy": accuracy, "mode": mode, "invalid": invalid,
                       "normalize": normalize, **COEFFICIENTS}  # fmt: skip
            ours = prism_advantage(perception, reasoning, ids, **options)
            exact = prism_advantage_reference(perception, reasoning, ids, **options)
            assert ours.dtype == dtype and not ours.requires_grad
            tiny = 1e-12 if dtype == torch.float64 else 3e-7
            torch.testing.assert_close(ours.double(), exact, rtol=tiny, atol=tiny)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), max_size=7),
    mode=st.sampled_from(MODES),
    invalid=st.sampled_from(INVALID),
    normalize=st.sampled_from(NORMALIZE),
    seed=st.integers(0, 2**16),
)
def test_prism_advantage_any_groups(sizes, mode, invalid, normalize, seed):
    perception, reasoning, ids, ok, accuracy = make(sizes, seed, invalid=0.5)
    options = {"format_ok": ok, "accuracy": accuracy, "mode": mode, "invalid": invalid, "normalize": normalize}
    exact = prism_advantage_reference(perception, reasoning, ids, **options)
    for name in BACKENDS:
        with use_backend(name):
            ours = prism_advantage(perception, reasoning, ids, **options)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


# the published rules on one group of four: a right answer, a wrong one, one of bad format, another right one

P = torch.tensor([0.5, -1.0, 9.0, 2.0], dtype=torch.float64)
R = torch.tensor([1.5, 0.0, -7.0, 1.0], dtype=torch.float64)
OK = torch.tensor([True, True, False, True])
ACC = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
F = (~OK).double()
W = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
GROUP = torch.zeros(4, dtype=torch.int64)


def gn(x):
    return (x - x.mean()) / (x.std() + 1e-6)


def published(aligned, c=0.7, p_f=1.5, p_w=0.9, w_acc=0.8, w_fmt=0.2):
    reward = w_acc * ACC + w_fmt * (1 - F)
    gate = c * aligned * (1 - F) * (1 - W)
    return {
        "align": aligned - p_f * F,
        "acc_gating": c * aligned - p_w * W - p_f * F,
        "gated": gate - p_w * W - p_f * F,
        "rlvr": gn(reward) + gate,
        "rlvr_v2": gn(reward - p_w * W - p_f * F) + gate,
        "sign_align": gn((1 - F) * (reward - p_w * W) - p_f * F) + c * aligned * (1 - F) * (1 - 2 * W),
    }


def call(mode, **options):
    return prism_advantage(
        P, R, GROUP, format_ok=OK, accuracy=ACC, mode=mode, align_coef=0.7, wrong_penalty=0.9, w_acc=0.8, w_fmt=0.2,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_published_modes(mode):
    """below_min: the invalid sample's scores become the smallest valid one - 1, and join the statistics."""
    p = torch.tensor([0.5, -1.0, -2.0, 2.0], dtype=torch.float64)
    r = torch.tensor([1.5, 0.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(call(mode, invalid="below_min"), published(0.5 * gn(p) + 0.5 * gn(r))[mode])
    together = gn(0.5 * p + 0.5 * r)
    torch.testing.assert_close(call(mode, invalid="below_min", normalize="sum"), published(together)[mode])


@pytest.mark.parametrize("mode", MODES)
def test_excluded_samples_leave_the_statistics_alone(mode):
    good = torch.tensor([0, 1, 3])
    aligned = torch.zeros(4, dtype=torch.float64)
    aligned[good] = 0.5 * gn(P[good]) + 0.5 * gn(R[good])
    torch.testing.assert_close(call(mode), published(aligned)[mode])


# the published code's treatment of many groups, in plain Python, one sample after the other


def published_groups(perception, reasoning, group, ok, accuracy, mode, normalize, k):
    """method.md's equations with invalid="below_min": every group, its invalid samples and groups of one included."""

    def z(values):
        mean, std = (0.0, 1.0) if len(values) == 1 else (statistics.fmean(values), statistics.stdev(values))
        return [(v - mean) / (std + k["eps"]) for v in values]

    result = [None] * len(group)
    for g in set(group):
        rows = [i for i, other in enumerate(group) if other == g]
        filled = []
        for score in (perception, reasoning):
            valid = [score[i] for i in rows if ok[i]]
            below = min(valid) - 1 if valid else -1.0
            filled.append([score[i] if ok[i] else below for i in rows])
        a = k["alpha"]
        if normalize == "channel":
            aligned = [a * p + (1 - a) * r for p, r in zip(z(filled[0]), z(filled[1]))]
        else:
            aligned = z([a * p + (1 - a) * r for p, r in zip(*filled)])
        f = [0 if ok[i] else 1 for i in rows]
        w = [1 if ok[i] and accuracy[i] <= 0 else 0 for i in rows]
        outcome = [k["w_acc"] * accuracy[i] + k["w_fmt"] * (1 if ok[i] else 0) for i in rows]
        punished = [x - k["wrong_penalty"] * y - k["format_penalty"] * b for x, y, b in zip(outcome, w, f)]
        signed = [(1 - b) * (x - k["wrong_penalty"] * y) - k["format_penalty"] * b for x, y, b in zip(outcome, w, f)]
        plain, both, third = z(outcome), z(punished), z(signed)
        for j, i in enumerate(rows):
            c = k["align_coef"] * aligned[j]
            penalty = k["wrong_penalty"] * w[j] + k["format_penalty"] * f[j]
            gate = c * (1 - f[j]) * (1 - w[j])
            result[i] = {
                "align": aligned[j] - k["format_penalty"] * f[j],
                "acc_gating": c - penalty,
                "gated": gate - penalty,
                "rlvr": plain[j] + gate,
                "rlvr_v2": both[j] + gate,
                "sign_align": third[j] + c * (1 - f[j]) * (1 - 2 * w[j]),
            }[mode]
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_published_groups(mode, normalize):
    """Groups of many, of one, all invalid, all but one invalid, all equal, in no order; graded accuracy."""
    sizes = (8, 5, 1, 1, 4, 3, 2)
    rng = torch.Generator().manual_seed(MODES.index(mode))
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    perception, reasoning = torch.randn(2, len(ids), generator=rng, dtype=torch.float64) * 2
    ok = torch.rand(len(ids), generator=rng) < 0.7
    ok[:4] = torch.tensor([True, True, False, True])
    # a valid and an invalid group of one, one all invalid, one with a single valid sample, one of equal samples
    ok[ids == 2], ok[ids == 3], ok[ids == 4] = True, False, False
    ok[ids == 5] = torch.tensor([True, False, False])
    ok[ids == 6] = True
    perception[ids == 6], reasoning[ids == 6] = 0.25, -0.5
    accuracy = torch.randint(-1, 3, (len(ids),), generator=rng).double() / 2
    accuracy[ids == 6] = 0.5
    # a right answer in bad format, and a wrong answer in good format
    accuracy[2], accuracy[0] = 1.0, 0.0
    order = torch.randperm(len(ids), generator=rng)
    perception, reasoning, ids, ok, accuracy = (x[order] for x in (perception, reasoning, ids, ok, accuracy))
    wanted = published_groups(*(x.tolist() for x in (perception, reasoning, ids, ok, accuracy)), mode, normalize,
                              COEFFICIENTS)  # fmt: skip
    perception[~ok], reasoning[~ok] = torch.nan, torch.inf
    ours = prism_advantage(perception, reasoning, ids, format_ok=ok, accuracy=accuracy, mode=mode,
                           normalize=normalize, invalid="below_min", **COEFFICIENTS)  # fmt: skip
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_groups_of_one():
    one = torch.tensor([0.8], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    assert prism_advantage(one, one * 2, zero) == 0
    # the published code gives the raw score
    raw = prism_advantage(one, one * 2, zero, invalid="below_min")
    torch.testing.assert_close(raw, (0.5 * one + one) / (1 + 1e-6))
    bad = torch.tensor([False])
    assert prism_advantage(one, one, zero, format_ok=bad) == 0
    torch.testing.assert_close(
        prism_advantage(one, one, zero, format_ok=bad, invalid="below_min"), torch.full_like(one, -1 / (1 + 1e-6) - 1.5)
    )


def test_invalid_samples_do_not_squash_the_others():
    """The published rule's effect on two valid samples as their group fills up with invalid ones."""
    p = torch.tensor([1.0, 1.1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    ok = torch.tensor([True, True] + [False] * 6)
    ids = torch.zeros(8, dtype=torch.int64)
    exclude = prism_advantage(p, p, ids, format_ok=ok)
    published = prism_advantage(p, p, ids, format_ok=ok, invalid="below_min")
    assert float(exclude[1] - exclude[0]) > 6 * float(published[1] - published[0])
    nothing = torch.zeros(8, dtype=torch.bool)
    assert (prism_advantage(p, p, ids, format_ok=nothing) == 0).all()
    torch.testing.assert_close(
        prism_advantage(p, p, ids, format_ok=nothing, invalid="below_min"), torch.full_like(p, -1.5)
    )


def test_compiles_whole(backend):
    perception, reasoning, ids, ok, accuracy = make()

    def f(p, r):
        return prism_advantage(p, r, ids, format_ok=ok, accuracy=accuracy, mode="rlvr_v2") * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(perception, reasoning), f(perception, reasoning))


def test_opcheck_and_repeatability(backend):
    perception, reasoning, ids, ok, accuracy = make(dtype=torch.float32)
    op = torch.ops.prism_kernels.prism_advantage_fwd.default
    for normalize, invalid, mode in itertools.product(range(2), range(2), range(6)):
        arguments = (perception, reasoning, ids, ok, accuracy, normalize, invalid, mode, [0.5] * 7, backend)
        assert torch.equal(op(*arguments), op(*arguments))
        if mode in (0, 5):
            torch.library.opcheck(op, arguments)
            if backend == "cpu":
                out = {"out": torch.zeros_like(perception), "bad": torch.zeros(1, dtype=torch.int64)}
                torch.library.opcheck(torch.ops.prism_kernels.prism_advantage_fwd.out, arguments[:-1], out)
    assert prism_advantage(*(torch.zeros(0),) * 2, torch.zeros(0, dtype=torch.int64)).shape == (0,)


BAD = [
    ({"perception": torch.zeros(2, 2)}, ValueError, "expected perception of shape (N,), got (2, 2)"),
    ({"reasoning": torch.zeros(5)}, ValueError, "expected reasoning of shape (4,), got (5,)"),
    ({"reasoning": None}, TypeError, "expected reasoning to be a tensor, got NoneType"),
    ({"group": torch.tensor([0, 1, 2, 4])}, ValueError, "expected group ids in [0, 4), got 4 at 3"),
    ({"group": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected group of shape (4,), got (3,)"),
    ({"format_ok": torch.ones(4)}, TypeError, "expected format_ok of dtype bool, got float32"),
    ({"accuracy": torch.ones(3)}, ValueError, "expected accuracy of shape (4,), got (3,)"),
    ({"mode": "gated"}, ValueError, "expected accuracy with mode 'gated', got None"),
    (
        {"mode": "sum"},
        ValueError,
        "expected mode to be one of 'align', 'acc_gating', 'gated', 'rlvr', 'rlvr_v2', 'sign_",
    ),
    ({"normalize": "batch"}, ValueError, "expected normalize to be one of 'channel', 'sum', got 'batch'"),
    ({"invalid": "drop"}, ValueError, "expected invalid to be one of 'exclude', 'below_min', got 'drop'"),
    ({"alpha": 1.5}, ValueError, "expected alpha in [0, 1], got 1.5"),
    ({"eps": float("nan")}, ValueError, "expected eps > 0 and finite, got nan"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_prism_advantage_names_the_bad_argument(changes, error, message):
    zero = torch.zeros(4)
    arguments = {"perception": zero, "reasoning": zero, "group": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match="prism_advantage: .*" + re.escape(message)):
        prism_advantage(**{**arguments, **changes})
