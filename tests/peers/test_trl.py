"""This package equals TRL 1.16's functions in float64, except for differences by design, which are tested too."""

from dataclasses import replace
from importlib.metadata import version

import peer_cases
import pytest
import torch
import trl_cases
from peer_cases import AdvantageCase, LossCase, assert_same, backends, ours
from trl import RLOOTrainer
from trl_cases import ADVANTAGES, GROUP, HEADS, LOSSES, REWARD, Call, advantage, loss, trainer

from prism_kernels import group_advantage, policy_loss

BATCHES = peer_cases.batches()
STORED = peer_cases.read("trl")


def test_version():
    assert version("trl") == trl_cases.VERSION == STORED["versions"]["trl"]


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
    case, method, config = ADVANTAGES[name]
    theirs = advantage(case, method, config)
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


# ---- differences by design


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "luspo"])
def test_trl_counts_fully_masked_sequences(kind):
    """TRL divides by the batch size, 5; we divide by the 4 sequences with a valid token, unless `denominator` is 5."""
    case, call = LOSSES[f"{kind}-token-silent"]
    options = {k: v for k, v in case.options.items() if k != "denominator"}
    mine = ours(case._replace(options=options), BATCHES["silent"], "torch")
    theirs = loss(BATCHES["silent"], call)
    torch.testing.assert_close(mine.loss * 4 / 5, theirs.loss)
    torch.testing.assert_close(mine.grad * 4 / 5, theirs.grad)


def test_trl_does_not_bound_log_ratios():
    """At a log-ratio of 25 TRL's ratio is e^25; ours is e^20, with no gradient beyond the bound."""
    batch = BATCHES["plain"]
    far = batch._replace(columns={**batch.columns, "old_logp": batch.columns["logp"] - 25})
    # the ratio of a negative advantage is not clipped from above
    far = far._replace(advantage=-batch.advantage.abs())
    theirs = loss(far, Call())
    mine = ours(LossCase("plain", {"clip": (0.2, 0.28)}), far, "torch")
    torch.testing.assert_close(mine.loss * torch.tensor(5.0).double().exp(), theirs.loss)
    assert (mine.grad == 0).all()
    assert (theirs.grad != 0).all()


def test_delta_below_the_clip():
    """A delta below 1 + epsilon_high: TRL bounds positive advantages by it, a dual clip bounds negative ones."""
    batch = BATCHES["plain"]
    case = LossCase("plain", {"clip": (0.2, 0.28), "dual_clip": 1.1})
    for sign in (1, -1):
        one = batch._replace(
            advantage=sign * torch.ones(5, dtype=torch.float64),
            columns={**batch.columns, "old_logp": batch.columns["logp"] - 1},
        )
        theirs = loss(one, Call(args={"delta": 1.1}))
        assert float(theirs.loss) == pytest.approx(-1.1 if sign == 1 else 1.28)
        assert float(ours(case, one, "torch").loss) == pytest.approx(-1.28 if sign == 1 else 1.1)


def test_trls_clip_fractions_of_a_sequence_ratio_are_over_sequences():
    batch = BATCHES["masked"]
    case, call = LOSSES["grpo-sequence-masked"]
    lag = batch.pad((batch.columns["logp"] - batch.columns["old_logp"]) * batch.mask)
    count = batch.pad(batch.mask.long()).sum(1)
    ratio = (lag.sum(1) / count).exp()
    clipped = (ratio > 1.28) & (batch.advantage > 0) | (ratio < 0.8) & (batch.advantage < 0)
    assert clipped.any()
    self_metrics = sequence_metrics(batch, call)
    assert self_metrics["clip_ratio/region_mean"][0] == pytest.approx(float(clipped.double().mean()))
    mine = ours(case, batch, "torch").metrics
    assert mine["clipped_low"] + mine["clipped_high"] == pytest.approx(float(count[clipped].sum() / count.sum()))


def sequence_metrics(batch, call):
    """Returns the metrics that TRL logs with a loss."""
    kept = {}
    original = trl_cases.trainer

    def keep(*args):
        made = original(*args)
        kept.update(made._metrics)
        return made

    trl_cases.trainer = keep
    try:
        loss(batch, call)
    finally:
        trl_cases.trainer = original
    return kept["train"]


def test_trls_cispo_counts_only_positive_advantages_as_clipped():
    case, call = LOSSES["cispo-token-masked"]
    batch = BATCHES["masked"]
    theirs = sequence_metrics(batch, call)["cispo_clip_ratio"][0]
    ratio = (batch.columns["logp"] - batch.columns["old_logp"]).exp()
    high = (ratio > 1.3) & batch.mask
    positive = batch.advantage.repeat_interleave(batch.cu_seqlens.diff().long()) > 0
    tokens = batch.mask.sum()
    assert (high & ~positive).any()
    assert theirs == pytest.approx(float((high & positive).sum() / tokens))
    assert ours(case, batch, "torch").metrics["clipped_high"] == pytest.approx(float(high.sum() / tokens))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_trls_entropy_bonus_is_always_a_mean_over_tokens(kind):
    """Our bonus is aggregated like the loss, so TRL's takes a separate call here."""
    batch = BATCHES["masked"]
    case, call = LOSSES[f"{kind}-token-masked"]
    theirs = loss(batch, replace(call, trainer={**call.trainer, "entropy_coef": 0.1}))
    mine = ours(case, batch, "torch")
    bonus = ours(LossCase("masked", {"entropy_coef": 0.1, "objective": "reinforce"}, ("entropy",)),
                 batch._replace(advantage=torch.zeros(5, dtype=torch.float64)), "torch")  # fmt: skip
    torch.testing.assert_close(mine.loss + bonus.loss, theirs.loss)
    torch.testing.assert_close(bonus.grad_entropy, theirs.grad_entropy)
    together = ours(case._replace(options={**case.options, "entropy_coef": 0.1}), batch, "torch")
    assert abs(float(together.loss - theirs.loss)) > 1e-3


def test_truncation_from_below():
    """In TRL's *_truncate modes a lower bound raises small weights; ours has only the upper bound."""
    batch = BATCHES["masked"]
    case, call = LOSSES["dapo-token-token-truncate"]
    lifted = loss(batch, replace(call, correction=("token_truncate", 0.9, 1.3)))
    assert abs(float(lifted.loss - ours(case, batch, "torch").loss)) > 1e-3


def test_bad_numbers_under_the_mask():
    """TRL multiplies by the mask, so a masked NaN reaches the loss. Ours selects valid tokens."""
    batch = BATCHES["masked"]
    spoilt = batch._replace(columns={**batch.columns, "logp": batch.spoilt("logp")})
    assert loss(spoilt, Call()).loss.isnan()
    assert ours(LossCase("masked", {}), spoilt, "torch").loss.isfinite()


@pytest.mark.parametrize("scale", ["batch"])
def test_batch_scaled_rewards(scale):
    """TRL divides by the std of the batch's raw rewards, `batch_std` by the std of the centred ones."""
    case = AdvantageCase(REWARD, GROUP, {})
    theirs = advantage(case, "grpo", {"scale_rewards": scale})
    reward, group = torch.tensor(REWARD, dtype=torch.float64), torch.tensor(GROUP)
    centred = group_advantage(reward, group, scale="none")
    torch.testing.assert_close(theirs, centred / (reward.std() + 1e-4))
    mine = group_advantage(reward, group, scale="batch_std", eps=1e-4)
    torch.testing.assert_close(mine, centred / (centred.std() + 1e-4))
    assert not torch.allclose(mine, theirs, atol=1e-3)


def test_a_sum_of_normalised_rewards():
    """`normalize_then_sum` equals the sum of each reward's group_advantage, scaled by `batch_std`."""
    rewards = torch.tensor([REWARD, REWARD[::-1]], dtype=torch.float64).t()
    batch = trl_cases.Batch(
        {"rollout_logp": torch.zeros(8, dtype=torch.float64)}, rewards[:, 0], torch.arange(9), torch.ones(8) > 0
    )
    zero = torch.zeros(8, 1, dtype=torch.float64)
    self = trainer(Call(trainer={"multi_objective_aggregation": "normalize_then_sum", "num_generations": 4}),
                   lambda: (zero, zero, None))  # fmt: skip
    theirs = trl_cases.scored(self, batch, rewards)["advantages"]
    group = torch.tensor(GROUP)
    total = sum(group_advantage(r, group, eps=1e-4) for r in rewards.unbind(1))
    mine = group_advantage(total, group, baseline="none", scale="batch_std", eps=1e-4)
    torch.testing.assert_close(mine, theirs)


def test_rloo_loss_on_policy():
    """RLOOTrainer clips the product of a sequence's ratios, which we do not offer; at ratio 1 the gradients agree."""
    batch = BATCHES["plain"]
    logp = batch.columns["logp"].clone().requires_grad_()
    padded = batch.pad(logp)
    self = trainer(Call(), lambda: (padded, torch.zeros_like(padded), None))
    mask = batch.pad(batch.mask.long())
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.advantage,
        "old_logps": (padded * mask).sum(1).detach(),
    }
    (theirs,) = torch.autograd.grad(RLOOTrainer._compute_loss(self, None, inputs), logp)
    mine, _ = policy_loss(logp, None, batch.advantage, batch.cu_seqlens, aggregate="seq_mean_token_sum")
    torch.testing.assert_close(torch.autograd.grad(mine, logp)[0], theirs)
