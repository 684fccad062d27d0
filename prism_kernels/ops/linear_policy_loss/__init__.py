"""The policy loss straight from hidden states and the LM head; the forward pass forms the gradients: flat memory."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.metrics import PolicyMetrics
from prism_kernels.ops.linear_logprob import head_arguments, with_lora
from prism_kernels.ops.linear_policy_loss.op import NAME, LinearPolicyLossFunction
from prism_kernels.ops.policy_loss.options import check_required, check_tensors, checked_options


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
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
    entropy_coef: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, PolicyMetrics, Tensor]:
    """Returns the loss, its metrics and the log-probabilities (T,), detached.

    It replaces, up to rounding, with the exponentials of one chunk of rows in memory and three matrix products::

        out = linear_logprob(hidden, weight, target, entropy=entropy_coef != 0, ...)
        loss, metrics = policy_loss(out.logp, old_logp, advantage, cu_seqlens, mask=mask & (target != ignore_index),
                                    entropy=out.entropy, ...)
        logp = out.logp.detach() * mask

    Rows that are ignored or masked are skipped; their log-probability is 0. Under a sequence ratio, a sequence longer
    than a chunk costs a fourth product. On a GPU the call reads from the device which rows count, which have a gradient
    and, under a sequence ratio, cu_seqlens; while a graph is captured it reads nothing.

    Args:
        hidden: (T, D), fp32, bf16, fp16 or fp64; the products run in its dtype.
        weight: (V, D); for a DTensor see `linear_logprob`.
        target: (T,), int64, already aligned (no shift).
        old_logp: see `policy_loss`, as all options that are not listed here.
        advantage: see `policy_loss`.
        cu_seqlens: see `policy_loss`.
        bias: see `linear_logprob`.
        temperature: see `linear_logprob`.
        softcap: see `linear_logprob`.
        lora: see `linear_logprob`.
        ignore_index: rows with this target do not count.
        chunk_tokens: the rows of a chunk; None: as many as keep memory flat.
        mask: see `policy_loss`.
        ratio: see `policy_loss`.
        clip: see `policy_loss`.
        dual_clip: see `policy_loss`.
        objective: see `policy_loss`.
        log_ratio_bound: see `policy_loss`.
        aggregate: see `policy_loss`.
        denominator: see `policy_loss`.
        horizon: see `policy_loss`.
        ref_logp: see `policy_loss`.
        kl_coef: see `policy_loss`.
        kl_estimator: see `policy_loss`.
        rollout_logp: see `policy_loss`.
        correction: see `policy_loss`.
        correction_bounds: see `policy_loss`.
        entropy_coef: the factor of the entropy bonus; entropies are computed where it is not 0.
        backend: `cuda`, `triton`, `cpu` or `torch`, for the rows of logits; see `use_backend`.
    """
    check.tensor(NAME, "hidden", hidden)
    check.shape(NAME, "hidden", hidden, ("T", "D"))
    head = head_arguments(NAME, hidden, weight, target, bias, temperature, softcap)
    columns = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    per_token = check_tensors(NAME, "hidden", head.hidden, advantage, cu_seqlens, mask, denominator, columns)
    chosen = checked_options(
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
    check_required(NAME, "rollout_logp", rollout_logp, "correction", correction)
    ignore_index = check.integer(NAME, "ignore_index", ignore_index)
    if chunk_tokens is not None:
        chunk_tokens = check.integer(NAME, "chunk_tokens", chunk_tokens, low=1, expected="chunk_tokens >= 1 or None")
    head = with_lora(NAME, head, lora)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head[:5]]
    constants = [None if x is None else x.detach() for x in (old_logp, advantage, cu_seqlens, mask)]
    constants += [None if x is None else x.detach() for x in (ref_logp, rollout_logp)]
    given = denominator.detach() if isinstance(denominator, Tensor) else None
    rest = (*head[5:], ignore_index, *constants, given, *chosen.encoded(), chunk_tokens or 0)
    loss, totals, logp = LinearPolicyLossFunction.apply(
        *head[:5], rest, needs, resolve(NAME, head.hidden.device, backend)
    )
    return loss, PolicyMetrics(totals), logp
