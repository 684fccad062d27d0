"""Batches and options of policy_loss, for the tests."""

import itertools
import random

import torch

from prism_kernels.backend import backend_status
from prism_kernels.ops.policy_loss.options import AGGREGATES, CORRECTIONS, ESTIMATORS, OBJECTIVES, RATIOS

LENGTHS = (5, 0, 7, 1, 12, 3)
BACKENDS = [s.backend for s in backend_status() if s.op == "policy_loss" and s.reason is None and s.backend != "cuda"]


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def make(lengths=LENGTHS, *, dtype=torch.float64, device="cpu", per_token=False, masked=True, seed=0, spread=0.4):
    """Random inputs of policy_loss with every optional tensor; masked tokens hold NaN and inf."""
    rng = torch.Generator().manual_seed(seed)
    tokens, sequences = sum(lengths), len(lengths)

    def rand(n, scale=1.0):
        return (torch.randn(n, generator=rng) * scale).to(device, dtype)

    logp = rand(tokens) - 2
    batch = {
        "logp": logp,
        "old_logp": logp + rand(tokens, spread),
        "advantage": rand(tokens if per_token else sequences),
        "ref_logp": logp + rand(tokens, spread),
        "rollout_logp": logp + rand(tokens, spread),
        "entropy": rand(tokens).abs(),
        "mask": None,
    }
    if masked:
        mask = torch.rand(tokens, generator=rng).to(device) < 0.7
        if tokens > 3:
            # one sequence without a valid token
            mask[-lengths[-1] :] = False
        for i, (name, x) in enumerate(batch.items()):
            if name not in ("mask", "advantage") or (name == "advantage" and per_token):
                x[~mask] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        batch["mask"] = mask
    batch["logp"].requires_grad_()
    batch["entropy"].requires_grad_()
    return batch, bounds(lengths, device)


def run(op, batch, cu_seqlens, **options):
    """Returns the loss, both gradients and the metrics."""
    batch = dict(batch)
    logp, old, advantage = batch.pop("logp"), batch.pop("old_logp"), batch.pop("advantage")
    loss, metrics = op(logp, old, advantage, cu_seqlens, **batch, **options)
    leaves = [x for x in (logp, batch.get("entropy")) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss * 1.7, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads, metrics


def grid(count):
    """A random sample of all the combinations of options, the same at every run."""
    pick = random.Random(0)
    for case in range(count):
        correction = pick.choice((None, *CORRECTIONS))
        objective = OBJECTIVES[case % 3]
        yield {
            "ratio": RATIOS[case // 3 % 2],
            "objective": objective,
            "aggregate": AGGREGATES[case % 4],
            "kl_estimator": ESTIMATORS[case % 5],
            "correction": correction,
            "clip": pick.choice(((0.2, 0.2), (0.2, 0.28), (0.05, 0.1))),
            "dual_clip": pick.choice((None, 1.3)) if objective == "clip" else None,
            "log_ratio_bound": pick.choice((20.0, 0.3)),
            "denominator": pick.choice((None, 17.0, torch.tensor(9.0))),
            "horizon": 50.0,
            "kl_coef": pick.choice((0.0, 0.3)),
            "correction_bounds": (0.8, 1.2),
            "entropy_coef": pick.choice((0.0, 0.1)),
        }


def surrogate(ratio, advantage, low, high):
    """PPO's clipped gain of each token, in autograd."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
