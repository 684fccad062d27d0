"""The specification of `policy_loss`: one sequence after the other, in autograd, in the dtype of its input."""

from itertools import pairwise

import torch
from torch import Tensor


def policy_loss_reference(
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and the metrics of `policy_loss` by their names."""
    bounds = cu_seqlens.tolist()
    per_token = advantage.shape == logp.shape
    parts = []
    total: dict[str, list[Tensor]] = {}

    def count(name: str, values: Tensor) -> None:
        total.setdefault(name, []).append(values.detach().double())

    for s, (begin, end) in enumerate(pairwise(bounds)):
        valid = torch.ones(end - begin, dtype=torch.bool) if mask is None else mask[begin:end]
        if not valid.any():
            continue

        def pick(x: Tensor, begin: int = begin, end: int = end, valid: Tensor = valid) -> Tensor:
            return x[begin:end][valid]

        x = pick(logp)
        old = x.detach() if old_logp is None else pick(old_logp).detach()
        a = pick(advantage) if per_token else advantage[s].expand_as(x)
        log_ratio = x - old
        count("approx_kl", -log_ratio)
        if ratio == "sequence":
            mean = log_ratio.mean()
            # per token: the value of the mean, the gradient of the token
            log_ratio = mean.detach() + x - x.detach() if per_token else mean.expand_as(x)
        r = log_ratio.clamp(-log_ratio_bound, log_ratio_bound).exp()
        low, high = 1 - clip[0], 1 + clip[1]
        clamped = r.clamp(low, high)
        if objective == "clip":
            gain = torch.minimum(r * a, clamped * a)
            count("clipped_low", (a < 0) & (r < low))
            count("clipped_high", (a > 0) & (r > high))
            if dual_clip is not None:
                count("clipped_dual", (a < 0) & (gain < dual_clip * a))
                gain = torch.where(a < 0, torch.maximum(gain, dual_clip * a), gain)
        elif objective == "cispo":
            gain = clamped.detach() * a * x
            count("clipped_low", r < low)
            count("clipped_high", r > high)
        else:
            gain = a * x
        count("ratio", r)

        raw = torch.ones_like(x)
        used = raw
        if rollout_logp is not None:
            log_weight = old - pick(rollout_logp)
            if correction is not None and correction.startswith("sequence"):
                log_weight = log_weight.sum().expand_as(x)
            elif correction is not None and correction.startswith("geometric"):
                log_weight = log_weight.mean().expand_as(x)
            raw = log_weight.clamp(-log_ratio_bound, log_ratio_bound).exp()
        if correction is not None:
            lower, upper = correction_bounds
            if correction.endswith("tis"):
                used = raw.clamp(max=upper)
                count("correction_clipped", raw > upper)
            else:
                outside = (raw < lower) | (raw > upper)
                used = torch.where(outside, 0, raw)
                count("correction_clipped", outside)
        count("correction_raw", raw)
        count("correction_used", used)
        count("weight", r * used)

        loss = -used * gain
        if ref_logp is not None:
            kl = _kl(x - pick(ref_logp), kl_estimator, log_ratio_bound)
            loss = loss + kl_coef * kl
            count("ref_kl", kl)
        if entropy is not None:
            loss = loss - entropy_coef * pick(entropy)
            count("entropy", pick(entropy))
        parts.append(loss)

    if denominator is None:
        denominator = sum(p.numel() for p in parts) if aggregate == "token_mean" else len(parts)
    zero = torch.where(torch.zeros_like(logp, dtype=torch.bool), logp, 0).sum()
    for part in parts:
        scale = {
            "token_mean": 1.0,
            "seq_mean_token_mean": 1 / part.numel(),
            "seq_mean_token_sum": 1.0,
            "seq_mean_token_sum_norm": 1 / (horizon or 1),
        }[aggregate]
        zero = zero + part.sum() * scale / denominator

    names = (
        "clipped_low",
        "clipped_high",
        "clipped_dual",
        "approx_kl",
        "ref_kl",
        "ratio",
        "correction_raw",
        "correction_used",
        "correction_clipped",
        "entropy",
    )
    joined = {name: torch.cat(values) for name, values in total.items()}
    none = torch.zeros(0, dtype=torch.float64)
    metrics = {name: joined.get(name, none).sum() for name in names}
    metrics["tokens"] = torch.tensor(float(sum(p.numel() for p in parts)), dtype=torch.float64)
    metrics["sequences"] = torch.tensor(float(len(parts)), dtype=torch.float64)
    weight, r = joined.get("weight", none), joined.get("ratio", none)
    metrics["ess_sum"], metrics["ess_sum_sq"] = weight.sum(), weight.square().sum()
    metrics["ratio_min"] = torch.cat((r, torch.tensor([torch.inf], dtype=torch.float64))).min()
    metrics["ratio_max"] = torch.cat((r, torch.tensor([-torch.inf], dtype=torch.float64))).max()
    return zero, metrics


def _kl(delta: Tensor, estimator: str, bound: float) -> Tensor:
    """Returns each token's estimate of KL(new, reference) from delta = logp - ref_logp."""
    if estimator == "k1":
        return delta
    half_square = delta.square() / 2
    if estimator == "k2":
        return half_square
    value = delta
    if estimator.startswith("k3"):
        clamped = delta.clamp(-bound, bound)
        value = torch.expm1(-clamped) + clamped
    if estimator.endswith("+"):
        return value.detach() + half_square - half_square.detach()
    return value
