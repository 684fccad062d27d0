"""The policy losses of PPO, GRPO and CISPO over packed sequences, with metrics: one pass, no host synchronisation."""

from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.metrics import PolicyMetrics
from prism_kernels.ops.policy_loss.op import NAME, PolicyLossFunction
from prism_kernels.ops.policy_loss.options import check_required, check_tensors, checked_options
from prism_kernels.ops.rows import FLOATS


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    ratio: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    objective: str = "clip",
    log_ratio_bound: float = 20.0,
    aggregate: str = "token_mean",
    denominator: float | Tensor | None = None,
    horizon: float | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    rollout_logp: Tensor | None = None,
    correction: str | None = None,
    correction_bounds: tuple[float, float] = (0.5, 2.0),
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """Returns the loss and its metrics; dL/dlogp is formed in the same pass, and backward only scales it.

    With the default options it replaces, over the valid tokens of all sequences::

        ratio = torch.exp((logp - old_logp).clamp(-20, 20))
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        loss = -(gain * mask).sum() / mask.sum()

    A token that is not valid may hold any value, even NaN. Without a valid token the loss and its gradient are 0.

    Args:
        logp: (T,), the log-probabilities of the tokens of S sequences, one after the other.
        old_logp: (T,), the log-probabilities in the ratio's denominator; None: those of `logp`, so the ratio is 1.
        advantage: (S,) or (T,); if S == T it is per token.
        cu_seqlens: (S + 1,), int32 or int64, the sequences' bounds: from 0 to T.
        mask: (T,), bool, the valid tokens; None: all.
        ratio: `token`; or `sequence`, the exponential of the mean log-ratio over the sequence's valid tokens. With
            an advantage per token its gradient is that of the token's own log-ratio (straight-through).
        clip: (low, high): the ratio is clipped to [1 - low, 1 + high].
        dual_clip: the largest ratio that counts where the advantage is negative.
        objective: `clip` (PPO); `cispo`, the clipped ratio as a constant times advantage * logp; or `reinforce`,
            advantage * logp.
        log_ratio_bound: log-ratios are clamped to +- this before the exponential, without gradient beyond it.
        aggregate: `token_mean`, over all valid tokens; or the mean over the sequences with a valid token of their
            tokens' mean (`seq_mean_token_mean`), sum (`seq_mean_token_sum`), or sum / horizon
            (`seq_mean_token_sum_norm`).
        denominator: the number of tokens or sequences to divide by instead of this batch's: the global one.
        horizon: a fixed length, for `seq_mean_token_sum_norm`.
        ref_logp: (T,), the reference policy's log-probabilities, for the KL term and its metric.
        kl_coef: the factor of the KL term.
        kl_estimator: `k1`, `k2`, `k3` with their plain derivatives; `k1+`, `k3+` with the derivative of k2, which is
            an unbiased gradient of KL(policy, reference).
        rollout_logp: (T,), the log-probabilities of the policy that sampled the tokens.
        correction: weights exp(old_logp - rollout_logp) of the tokens (`token_*`), of sequences by product
            (`sequence_*`) or by geometric mean (`geometric_*`), truncated at the upper bound (`*_tis`) or 0 outside
            the bounds (`*_mask`).
        correction_bounds: (lower, upper).
        entropy: (T,), for the entropy bonus and its metric.
        entropy_coef: the factor of the entropy bonus.
        backend: `cuda`, `cpu` or `torch`; see `use_backend`.
    """
    check.tensor(NAME, "logp", logp)
    check.shape(NAME, "logp", logp, ("T",))
    check.dtype(NAME, "logp", logp, FLOATS)
    columns = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp, "entropy": entropy}
    per_token = check_tensors(NAME, "logp", logp, advantage, cu_seqlens, mask, denominator, columns)
    options = checked_options(
        NAME,
        ratio=ratio,
        clip=clip,
        dual_clip=dual_clip,
        objective=objective,
        log_ratio_bound=log_ratio_bound,
        aggregate=aggregate,
        denominator=denominator,
        horizon=horizon,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        correction=correction,
        correction_bounds=correction_bounds,
        entropy_coef=entropy_coef,
        per_token=per_token,
    )
    check_required(NAME, "ref_logp", ref_logp, "kl_coef", kl_coef)
    check_required(NAME, "entropy", entropy, "entropy_coef", entropy_coef)
    check_required(NAME, "rollout_logp", rollout_logp, "correction", correction)
    tensor_denominator = denominator if isinstance(denominator, Tensor) else None
    constants = (old_logp, advantage, cu_seqlens, mask, ref_logp, rollout_logp, tensor_denominator)
    detached = tuple(None if x is None else x.detach() for x in constants)
    loss, totals = PolicyLossFunction.apply(logp, entropy, detached, options, resolve(NAME, logp.device, backend))
    return loss, PolicyMetrics(totals)
