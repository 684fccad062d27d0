"""group_advantage against its float64 reference and the published forms."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import group_advantage, use_backend
from prism_kernels.backend import backend_status
from prism_kernels.ops.group_advantage.op import BASELINES, SCALES
from prism_kernels.ops.group_advantage.reference import group_advantage_reference

BACKENDS = [
    s.backend for s in backend_status() if s.op == "group_advantage" and s.reason is None and s.backend != "cuda"
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def make(groups, seed=0, *, contiguous=False, dtype=torch.float64, invalid=0.3):
    """Groups of the given sizes, mixed unless contiguous; invalid samples hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(groups)
    ids = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups, dtype=torch.int64))
    # ids need not be dense
    ids = ids * (n // max(len(groups), 1)) if n else ids
    if not contiguous:
        ids = ids[torch.randperm(n, generator=rng)]
    reward = torch.randn(n, generator=rng).to(dtype)
    valid = torch.rand(n, generator=rng) >= invalid
    reward[~valid] = torch.nan
    return reward, ids, valid


# baseline and scale are the choices that users combine; stride and dtype choose how samples are read
@pytest.mark.grid
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_group_advantage_matches_float64(baseline, scale, contiguous, dtype):
    for seed, eps in ((0, 1e-6), (1, 0.1)):
        reward, ids, valid = make((8, 1, 16, 3, 2, 1, 5), seed, contiguous=contiguous, dtype=dtype)
        options = {"baseline": baseline, "scale": scale, "eps": eps}
        ours = group_advantage(reward, ids, valid=valid, **options)
        exact = group_advantage_reference(reward, ids, valid=valid, **options)
        assert ours.dtype == dtype and not ours.requires_grad
        tiny = 1e-12 if dtype == torch.float64 else 2e-7
        torch.testing.assert_close(ours.double(), exact, rtol=tiny, atol=tiny)
        assert (ours[~valid] == 0).all()


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(1, 6), max_size=8),
    baseline=st.sampled_from(BASELINES),
    scale=st.sampled_from(SCALES),
    contiguous=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_group_advantage_any_groups(groups, baseline, scale, contiguous, masked, seed):
    reward, ids, valid = make(groups, seed, contiguous=contiguous, invalid=0.4 if masked else 0)
    valid = valid if masked else None
    exact = group_advantage_reference(reward, ids, valid=valid, baseline=baseline, scale=scale)
    for name in BACKENDS:
        with use_backend(name):
            ours = group_advantage(reward, ids, valid=valid, baseline=baseline, scale=scale)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_grpo_and_its_kin_written_out():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.25], [2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    flat = reward.reshape(-1)
    mean, std = reward.mean(1, keepdim=True), reward.std(1, keepdim=True)
    torch.testing.assert_close(group_advantage(flat, ids), ((reward - mean) / (std + 1e-6)).reshape(-1))
    torch.testing.assert_close(group_advantage(flat, ids, scale="none"), (reward - mean).reshape(-1))
    others = (reward.sum(1, keepdim=True) - reward) / 3
    rloo = group_advantage(flat, ids, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(rloo, (reward - others).reshape(-1))
    centred = (reward - mean).reshape(-1)
    whitened = (centred - centred.mean()) / (centred.std() + 1e-6)
    torch.testing.assert_close(group_advantage(flat, ids, scale="batch_std"), whitened)
    plain = group_advantage(flat, ids, baseline="none", scale="batch_std")
    torch.testing.assert_close(plain, (flat - flat.mean()) / (flat.std() + 1e-6))
    assert torch.equal(group_advantage(flat, ids, baseline="none", scale="none"), flat)


def test_one_valid_sample_has_no_advantage_over_its_group():
    reward = torch.tensor([3.0, 7.0, 1.0, 5.0, torch.inf])
    ids = torch.tensor([0, 1, 2, 2, 1])
    valid = torch.tensor([True, True, True, True, False])
    for baseline in BASELINES:
        for scale in SCALES:
            out = group_advantage(reward, ids, valid=valid, baseline=baseline, scale=scale)
            assert out.isfinite().all() and out[4] == 0
            if baseline != "none" or scale == "std":
                assert out[0] == 0 and out[1] == 0
    assert torch.equal(group_advantage(reward[:1], ids[:1], baseline="none", scale="none"), reward[:1])


def test_equal_rewards_give_exactly_zero():
    reward = torch.full((48,), 0.1)
    ids = torch.arange(48) % 3
    assert (group_advantage(reward, ids) == 0).all()


def test_a_large_offset_cancels():
    reward = torch.tensor([1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6 + 1])
    exact = group_advantage_reference(reward, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(
        group_advantage(reward, torch.zeros(4, dtype=torch.int64)).double(), exact, rtol=2e-7, atol=0
    )


def test_nan_stays_in_its_group():
    reward, ids, _ = make((4, 4, 4), invalid=0)
    wanted = group_advantage(reward, ids)
    bad = reward.clone()
    bad[5] = torch.nan
    out = group_advantage(bad, ids)
    same = ids == ids[5]
    assert out[same].isnan().all() and torch.equal(out[~same], wanted[~same])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rewards(dtype):
    reward, ids, valid = make((8, 8, 3), dtype=dtype)
    ours = group_advantage(reward, ids.int(), valid=valid)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), group_advantage_reference(reward, ids, valid=valid), rtol=1e-6, atol=1e-6)


def test_empty_strided_and_repeatable():
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    reward, ids, valid = make((16,) * 300)
    first = group_advantage(reward, ids, valid=valid)
    assert torch.equal(group_advantage(reward, ids, valid=valid), first)
    pairs = torch.stack((reward, reward), 1)[:, 0]
    assert torch.equal(group_advantage(pairs, torch.stack((ids, ids), 1)[:, 1], valid=valid), first)


def test_compiles_whole(backend):
    reward, ids, valid = make((8, 1, 3))

    def f(x):
        return group_advantage(x, ids, valid=valid, baseline="leave_one_out") * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(reward), f(reward))


def test_opcheck(backend):
    reward, ids, valid = make((8, 1, 3), dtype=torch.float32)
    for baseline in range(3):
        for scale in range(3):
            arguments = (reward, ids, valid, baseline, scale, 1e-6, backend)
            torch.library.opcheck(torch.ops.prism_kernels.group_advantage_fwd.default, arguments)
            if backend == "cpu":
                out = {"out": torch.zeros_like(reward), "bad": torch.zeros(1, dtype=torch.int64)}
                torch.library.opcheck(torch.ops.prism_kernels.group_advantage_fwd.out, arguments[:-1], out)


BAD = [
    ({"reward": [1.0]}, TypeError, "expected reward to be a tensor, got list"),
    ({"reward": torch.zeros(2, 3)}, ValueError, "expected reward of shape (N,), got (2, 3)"),
    ({"reward": torch.zeros(6, dtype=torch.int64)}, TypeError, "expected reward of dtype float32"),
    ({"group": torch.zeros(5, dtype=torch.int64)}, ValueError, "expected group of shape (6,), got (5,)"),
    ({"group": torch.zeros(6)}, TypeError, "expected group of dtype int64, int32, got float32"),
    ({"group": torch.tensor([0, 1, 2, 6, 0, 0])}, ValueError, "expected group ids in [0, 6), got 6 at 3"),
    ({"group": torch.tensor([0, -1, 2, 3, 0, 0])}, ValueError, "expected group ids in [0, 6), got -1 at 1"),
    ({"valid": torch.ones(6)}, TypeError, "expected valid of dtype bool, got float32"),
    ({"valid": torch.ones(5, dtype=torch.bool)}, ValueError, "expected valid of shape (6,), got (5,)"),
    (
        {"baseline": "median"},
        ValueError,
        "expected baseline to be one of 'mean', 'leave_one_out', 'none', got 'median'",
    ),
    ({"scale": "mad"}, ValueError, "expected scale to be one of 'std', 'none', 'batch_std', got 'mad'"),
    ({"eps": -1.0}, ValueError, "expected eps > 0 and finite, got -1.0"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_group_advantage_names_the_bad_argument(changes, error, message):
    arguments = {"reward": torch.zeros(6), "group": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(error, match="group_advantage: .*" + re.escape(message)):
        group_advantage(**{**arguments, **changes})


@pytest.mark.parametrize(
    "baseline, scale", [("mean", "std"), ("leave_one_out", "std"), ("none", "std"), ("mean", "none")]
)
@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 3.0])
def test_a_group_of_one_gets_0_whatever_its_reward(backend, baseline, scale, reward):
    rewards, group = torch.tensor([reward, 1.0, 2.0]), torch.tensor([2, 0, 0])
    with use_backend(backend):
        out = group_advantage(rewards, group, baseline=baseline, scale=scale)
    assert out[0] == 0 and out[1:].isfinite().all()
