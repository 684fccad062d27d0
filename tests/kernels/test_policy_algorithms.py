"""policy_loss against the published algorithms, written out on padded matrices (S, L) in float64."""

import itertools

import pytest
import torch
from policy_cases import BACKENDS, bounds, make, surrogate

from prism_kernels import group_advantage, policy_loss


def padded(x, cu, fill=0.0):
    rows = [x[a:b] for a, b in itertools.pairwise(cu.tolist())]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


class Padded:
    """The padded matrices (S, L) of a packed batch, as a trainer with padding has them."""

    def __init__(self, seed=0):
        self.batch, self.cu = make((5, 7, 3, 12), masked=False, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.batch["mask"] = torch.rand(27, generator=generator) < 0.8
        self.packed = {k: self.batch[k] for k in ("logp", "old_logp", "advantage")}
        self.mask = padded(self.batch["mask"], self.cu, False).double()
        self.x, self.old, self.ref, self.rollout = (
            padded(self.batch[k], self.cu) for k in ("logp", "old_logp", "ref_logp", "rollout_logp")
        )
        self.a = self.batch["advantage"][:, None]

    def check(self, loss, names=(), **options):
        """Asserts that policy_loss with these options has this loss and its gradient."""
        (wanted,) = torch.autograd.grad(loss, self.batch["logp"])
        extra = {k: self.batch[k] for k in names}
        for backend in BACKENDS:
            ours, _ = policy_loss(*self.packed.values(), self.cu, mask=self.batch["mask"], **extra, **options,
                                  backend=backend)  # fmt: skip
            (grad,) = torch.autograd.grad(ours, self.batch["logp"])
            torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_grpo():
    """Shao et al. 2024: mean over outputs of the mean over tokens of the clipped surrogate minus beta * k3."""
    p = Padded()
    k3 = (p.ref - p.x).exp() - (p.ref - p.x) - 1
    per_token = surrogate((p.x - p.old).exp(), p.a, 0.2, 0.2) - 0.04 * k3
    loss = -((per_token * p.mask).sum(1) / p.mask.sum(1)).mean()
    p.check(loss, ("ref_logp",), aggregate="seq_mean_token_mean", kl_coef=0.04, kl_estimator="k3")


def test_dapo():
    """Yu et al. 2025: clip-higher, the mean over all tokens; its overlong and filter rules are in shaping."""
    p = Padded(1)
    loss = -(surrogate((p.x - p.old).exp(), p.a, 0.2, 0.28) * p.mask).sum() / p.mask.sum()
    p.check(loss, clip=(0.2, 0.28))


def test_gspo():
    """Zheng et al. 2025: the sequence's ratio is the geometric mean of its tokens', differentiated as such."""
    p = Padded(2)
    s = (((p.x - p.old) * p.mask).sum(1) / p.mask.sum(1)).exp()
    loss = -surrogate(s, p.a[:, 0], 0.05, 0.08).mean()
    p.check(loss, ratio="sequence", aggregate="seq_mean_token_mean", clip=(0.05, 0.08))


def test_gspo_token():
    """GSPO-token: the value of the sequence's ratio with the gradient of the token's, here with varying advantages."""
    p = Padded(3)
    s = (((p.x - p.old) * p.mask).sum(1) / p.mask.sum(1)).exp().detach()[:, None]
    advantage = torch.randn(27, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p.packed["advantage"] = advantage
    gain = surrogate(s * (p.x - p.x.detach()).exp(), padded(advantage, p.cu), 0.05, 0.08)
    loss = -((gain * p.mask).sum(1) / p.mask.sum(1)).mean()
    p.check(loss, ratio="sequence", aggregate="seq_mean_token_mean", clip=(0.05, 0.08))


def test_dr_grpo():
    """Liu et al. 2025: no division by the length or the std; the sum over tokens is divided by a fixed length."""
    p = Padded(4)
    reward = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    p.packed["advantage"] = group_advantage(reward, torch.zeros(4, dtype=torch.int64), scale="none")
    advantage = (reward - reward.mean())[:, None]
    gain = surrogate((p.x - p.old).exp(), advantage, 0.2, 0.2)
    loss = -(gain * p.mask).sum(1).mean() / 64
    p.check(loss, aggregate="seq_mean_token_sum_norm", horizon=64)


def test_rloo():
    """Ahmadian et al. 2024: REINFORCE on whole sequences; the baseline is the mean of the other samples' rewards."""
    p = Padded(5)
    reward = torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    others = torch.stack([torch.cat((reward[:i], reward[i + 1 :])).mean() for i in range(4)])
    p.packed["advantage"] = group_advantage(
        reward, torch.zeros(4, dtype=torch.int64), baseline="leave_one_out", scale="none"
    )
    loss = -((reward - others) * (p.x * p.mask).sum(1)).mean()
    p.check(loss, objective="reinforce", aggregate="seq_mean_token_sum")


def test_cispo():
    """MiniMax-M1 2025: the clipped importance weight as a constant factor of REINFORCE, mean over all tokens."""
    p = Padded(6)
    weight = (p.x - p.old).exp().detach().clamp(max=1.28)
    loss = -(weight * p.a * p.x * p.mask).sum() / p.mask.sum()
    p.check(loss, objective="cispo", clip=(1.0, 0.28))


def test_reinforce_plus_plus():
    """Hu 2025: advantages centred on the group's mean, then whitened over the batch; PPO's clip; k2 as the loss' KL."""
    p = Padded(7)
    reward = torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    centred = reward - torch.tensor([0.625, 0.625, 0.25, 0.25], dtype=torch.float64)
    p.packed["advantage"] = group_advantage(reward, group, scale="batch_std")
    advantage = ((centred - centred.mean()) / (centred.std() + 1e-6))[:, None]
    k2 = (p.x - p.ref).square() / 2
    gain = surrogate((p.x - p.old).exp(), advantage, 0.2, 0.2)
    loss = -((gain - 0.01 * k2) * p.mask).sum() / p.mask.sum()
    p.check(loss, ("ref_logp",), kl_coef=0.01, kl_estimator="k2")


def test_dual_clip():
    """Ye et al. 2020: where the advantage is negative, the surrogate is at least c times the advantage."""
    p = Padded(8)
    gain = surrogate((p.x - p.old).exp(), p.a, 0.2, 0.2)
    gain = torch.where(p.a < 0, torch.maximum(gain, 1.4 * p.a), gain)
    p.check(-(gain * p.mask).sum() / p.mask.sum(), dual_clip=1.4)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("rule", ["tis", "mask"])
def test_rollout_correction(level, rule):
    """Truncated importance sampling (Yao et al. 2025), and masking outside the bounds."""
    p = Padded(9)
    behind = (p.old - p.rollout) * p.mask
    if level != "token":
        behind = behind.sum(1, keepdim=True)
    if level == "geometric":
        behind = behind / p.mask.sum(1, keepdim=True)
    weight = behind.exp()
    inside = (weight >= 0.7) & (weight <= 1.3)
    weight = weight.clamp(max=1.3) if rule == "tis" else weight * inside
    gain = surrogate((p.x - p.old).exp(), p.a, 0.2, 0.2)
    loss = -(weight * gain * p.mask).sum() / p.mask.sum()
    p.check(loss, ("rollout_logp",), correction=f"{level}_{rule}", correction_bounds=(0.7, 1.3))


def test_kl_gradients_are_those_of_the_reverse_kl():
    """Over the policy, k2's, k1+'s and k3+'s gradients are the reverse KL's; k1's is 0, k3's the forward KL's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, generator=generator, requires_grad=True)
    ref = torch.log_softmax(torch.randn(9, dtype=torch.float64, generator=generator), 0)
    logp = torch.log_softmax(logits, 0)
    pi = logp.detach().exp()
    reverse = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)[0]
    wanted = {"k1": 0 * reverse, "k2": reverse, "k1+": reverse, "k3": forward, "k3+": reverse}
    exact = float((pi * (logp.detach() - ref)).sum())
    for estimator, gradient in wanted.items():
        leaf = logp.detach().requires_grad_()
        # one token per sequence; the reward is 0, so only the KL term remains
        loss, metrics = policy_loss(leaf, None, torch.zeros(9), bounds([1] * 9), ref_logp=ref, kl_coef=1.0,
                                    kl_estimator=estimator, denominator=1.0)  # fmt: skip
        (slope,) = torch.autograd.grad(loss, leaf)
        (grad,) = torch.autograd.grad(logp, logits, slope * pi, retain_graph=True)
        torch.testing.assert_close(grad, gradient, rtol=1e-12, atol=1e-13)
        if estimator != "k2":
            delta = logp.detach() - ref
            value = torch.expm1(-delta) + delta if "3" in estimator else delta
            assert float((pi * value).sum()) == pytest.approx(exact, rel=1e-12)
            assert float(metrics.ref_kl) == pytest.approx(float(value.sum()), rel=1e-12)
