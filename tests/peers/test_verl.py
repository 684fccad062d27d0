"""This package equals verl 0.9.1's functions in float64, except for differences by design, which are tested too."""

from importlib.metadata import version

import numpy as np
import peer_cases
import pytest
import torch
import verl_cases
from peer_cases import AdvantageCase, LossCase, assert_same, backends, ours
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    agg_loss,
    get_adv_estimator_fn,
    kl_penalty,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig
from verl_cases import ADVANTAGES, GROUP, HEADS, LOSSES, REWARD, Call, advantage, loss, rollout_weights

from prism_kernels import group_advantage, policy_loss

BATCHES = peer_cases.batches()
STORED = peer_cases.read("verl")


def test_version():
    assert version("verl") == verl_cases.VERSION == STORED["versions"]["verl"]


def test_stored_batches_are_current():
    assert STORED["batches"] == peer_cases.stored_batches()
    for section, cases in (("losses", LOSSES), ("advantages", ADVANTAGES), ("heads", HEADS)):
        assert STORED[section].keys() == cases.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    case, call = LOSSES[name]
    batch = BATCHES[case.batch]
    theirs = loss(batch, call)
    for backend in backends("policy_loss"):
        assert_same(ours(case, batch, backend), theirs)
    peer_cases.assert_stored(STORED["losses"][name], peer_cases.stored(case, theirs))


def test_the_cases_reach_every_branch():
    """Some token is clipped low, high and by the dual clip; every correction clips some weights and not others."""
    means = [ours(case, BATCHES[case.batch], "torch").metrics for case, _ in LOSSES.values()]
    for name in ("clipped_low", "clipped_high"):
        assert sum(0 < m[name] < 1 for m in means) > 20
    for (case, _), found in zip(LOSSES.values(), means):
        if "correction" in case.options:
            assert 0 < found["correction_clipped"] < 1
        if "dual_clip" in case.options and not case.on_policy:
            assert 0 < found["clipped_dual"] < 1


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name):
    case, estimator, config = ADVANTAGES[name]
    theirs = advantage(case, estimator, config)
    for backend in backends("group_advantage"):
        mine = peer_cases.our_advantage(case, backend)
        torch.testing.assert_close(mine, theirs, rtol=case.tolerance, atol=case.tolerance)
    peer_cases.assert_stored(STORED["advantages"][name], peer_cases.stored(case, theirs))


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    case, function = HEADS[name]
    theirs = function(case)
    for backend in backends("linear_logprob" if case.weight else "token_logprob"):
        mine = peer_cases.our_head(case, backend)
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=case.tolerance, atol=case.tolerance, msg=key)
    peer_cases.assert_stored(STORED["heads"][name], peer_cases.stored(case, theirs))


def test_every_loss_and_estimator_of_verl_is_compared_or_listed():
    """docs/kernels.md names verl's losses and estimators: those compared here, and those that we do not offer."""
    losses = {"vanilla", "gspo", "cispo", "gpg", "bypass_mode"}
    assert {call.mode for _, call in LOSSES.values()} == losses
    other = {"sapo", "geo_mean", "clip_cov", "kl_cov", "dro", "dppo_tv", "dppo_kl"}
    assert set(POLICY_LOSS_REGISTRY) == losses | other
    estimators = {name for _, name, _ in ADVANTAGES.values()} | {"reinforce_plus_plus", "reinforce_plus_plus_baseline"}
    other = {"gae", "remax", "opo", "gpg", "gdpo", "grpo_passk", "optimal_token_baseline", "tir_optimal_token_baseline"}
    assert set(ADV_ESTIMATOR_REGISTRY) == estimators | other


# ---- differences by design


def test_verls_rejection_equals_a_smaller_mask():
    """rollout_rs removes tokens from the mask and the count; our *_mask corrections set weights and keep the count."""
    batch = BATCHES["masked"]
    old, rollout = (batch.pad(batch.columns[k]) for k in ("old_logp", "rollout_logp"))
    for mode in ("token_k1", "seq_sum_k1", "seq_mean_k1", "token_k3"):
        bounds = "0.6_1.4" if mode.endswith("k1") else "0.1"
        _, kept, _ = compute_rollout_correction_and_rejection_mask(
            old, rollout, batch.pad(batch.mask.long()), rollout_rs=mode, rollout_rs_threshold=bounds
        )
        smaller = batch._replace(mask=batch.pack(kept).bool())
        assert 0 < smaller.mask.sum() < batch.mask.sum()
        theirs = loss(smaller, Call())
        case = LossCase("masked", {"clip": (0.2, 0.28), "dual_clip": 1.5})
        assert_same(ours(case, smaller, "torch"), theirs)


def test_verls_normalised_weights_differ_by_a_factor():
    """rollout_is_batch_normalize divides all weights by their mean, a constant of the batch; we do not offer it."""
    batch = BATCHES["masked"]
    mask = batch.pad(batch.mask.long())
    old, rollout = (batch.pad(batch.columns[k]) for k in ("old_logp", "rollout_logp"))
    found, _, _ = compute_rollout_correction_and_rejection_mask(
        old, rollout, mask, rollout_is="token", rollout_is_threshold=1.3, rollout_is_batch_normalize=True
    )
    plain, _ = rollout_weights(batch, "token", 1.3)
    mean = plain.sum() / mask.sum()
    torch.testing.assert_close(found.batch["rollout_is_weights"], plain / mean)


def test_gspo_with_one_advantage_per_sequence():
    """With token weights verl weighs each token's gradient; we weigh a sequence by the mean, with the same sum."""
    case, call = LOSSES["gspo-token-tis"]
    batch = BATCHES["masked"]
    theirs = loss(batch, call)
    mine = ours(case._replace(per_token=False), batch, "torch")
    torch.testing.assert_close(mine.loss, theirs.loss)
    assert not torch.allclose(mine.grad, theirs.grad, atol=1e-3)
    for a, b in zip(batch.pad(mine.grad), batch.pad(theirs.grad)):
        torch.testing.assert_close(a.sum(), b.sum())


def test_bounds_of_log_ratios():
    """Both bound token log-ratios at 20. verl bounds sequence log-ratios at +10, and the value of k3 at +-10."""
    batch = BATCHES["plain"]
    shifted = batch._replace(columns={**batch.columns, "old_logp": batch.columns["logp"] - 12})
    # no clip, so that only the bound acts
    case = LossCase("plain", {"ratio": "sequence", "clip": (1.0, 1e9)}, per_token=True)
    theirs = loss(shifted, Call("gspo", {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9}))
    mine = ours(case, shifted, "torch")
    torch.testing.assert_close(theirs.loss * np.exp(2), mine.loss)
    assert (theirs.grad == 0).all()
    assert (mine.grad != 0).all()
    held = ours(case._replace(options={**case.options, "log_ratio_bound": 10.0}), shifted, "torch")
    torch.testing.assert_close(held.loss, theirs.loss)
    assert (held.grad == 0).all()

    logp = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    value = kl_penalty(logp, torch.zeros_like(logp), "low_var_kl")
    assert value.item() == 10
    assert torch.autograd.grad(value.sum(), logp)[0] == 0
    mine, _ = policy_loss(logp, None, torch.zeros(1), torch.tensor([0, 1], dtype=torch.int32),
                          ref_logp=torch.zeros_like(logp), kl_coef=1.0, kl_estimator="k3")  # fmt: skip
    assert mine.item() == pytest.approx(np.exp(3) - 4)
    assert float(torch.autograd.grad(mine, logp)[0]) == pytest.approx(1 - np.exp(3))


def test_verls_dual_clip_is_always_on():
    batch = BATCHES["plain"]
    far = batch._replace(columns={**batch.columns, "old_logp": batch.columns["logp"] - 1.5})
    theirs = loss(far, Call())
    assert theirs.metrics["clipped_dual"] > 0
    assert ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True).clip_ratio_c == 3
    assert ours(LossCase("plain", {"clip": (0.2, 0.28)}), far, "torch").loss > theirs.loss + 0.1


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_bad_numbers_under_the_mask(mode):
    """verl's sequence sums multiply by the mask, so a masked NaN reaches the loss. Ours select valid tokens."""
    batch = BATCHES["masked"]
    spoilt = batch.pad(batch.spoilt("logp"))
    assert agg_loss(spoilt, batch.pad(batch.mask.long()), mode).isnan()
    case = LossCase("masked", {"aggregate": mode.replace("-", "_")})
    assert ours(case, batch, "torch").loss.isfinite()


def test_a_batch_without_a_valid_token():
    """verl divides by 0; our loss and gradient are 0."""
    batch = BATCHES["masked"]
    nothing = batch._replace(mask=torch.zeros_like(batch.mask))
    zero = torch.zeros(batch.pad(batch.mask).shape, dtype=torch.float64)
    assert agg_loss(zero, zero, "token-mean").isnan()
    mine = ours(LossCase("masked", {}), nothing, "torch")
    assert mine.loss == 0
    assert (mine.grad == 0).all()


def test_a_group_of_one():
    """verl's grpo, grpo_vectorized and rloo keep its raw reward; our advantage is 0."""
    reward, group = [*REWARD, 0.5], [*GROUP, 3]
    for estimator, options, kept in (
        ("grpo", {}, 0.5 / (1 + 1e-6)),
        ("grpo_vectorized", {}, 0.5),
        ("rloo", {"baseline": "leave_one_out", "scale": "none"}, 0.5),
    ):
        case = AdvantageCase(reward, group, options, tolerance=1e-5)
        theirs = advantage(case, estimator, {})
        mine = peer_cases.our_advantage(case, "torch")
        assert float(theirs[-1]) == pytest.approx(kept, abs=1e-6)
        assert mine[-1] == 0
        torch.testing.assert_close(mine[:-1], theirs[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "estimator, baseline", [("reinforce_plus_plus_baseline", "mean"), ("reinforce_plus_plus", "none")]
)
def test_reinforce_plus_plus_whitens_over_tokens(estimator, baseline):
    """verl weighs samples by length; at equal lengths n only the variance's count differs, Nn - 1 instead of N - 1."""
    reward = torch.tensor(REWARD, dtype=torch.float64)
    index = np.array(GROUP)
    for lengths in ([4] * 8, [1, 4, 2, 4, 3, 4, 1, 2]):
        mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).double()
        scores = torch.zeros(8, 4, dtype=torch.float64)
        scores[torch.arange(8), torch.tensor(lengths) - 1] = reward
        theirs, _ = get_adv_estimator_fn(estimator)(
            scores, response_mask=mask, index=index, config=AlgoConfig(gamma=1.0)
        )
        mine = group_advantage(reward, torch.tensor(GROUP), baseline=baseline, scale="batch_std", eps=1e-9)
        factor = ((8 * 4 - 1) / (8 - 1) / 4) ** 0.5
        same = torch.allclose(theirs[:, 0], mine * factor, atol=1e-6)
        assert same == (len(set(lengths)) == 1)
