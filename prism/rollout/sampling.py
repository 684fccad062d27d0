"""How the next token is drawn: the distribution of the candidates, and the streams of uniform numbers.

R rollouts, V vocabulary, C candidates that are left of it, B banned tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism.rollout.options import Sampling

# probabilities are summed as integer multiples of 2^-50, so that the order of the sum does not matter
UNIT = 2.0**50


class Choice(NamedTuple):
    """The next tokens, all (R,)."""

    token: Tensor
    # under the distribution of the draw: after temperature, ban, top_k and top_p
    log_prob: Tensor
    # under the model's softmax over the whole vocabulary at this temperature
    model_log_prob: Tensor


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Tensor) -> Choice:
    """Returns a token for each row, drawn by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits: (R, V), any float dtype; computed in fp32 at least.
        uniform: (R,) in [0, 1), float64; greedy sampling does not use it.
        sampling: the settings.
        banned: (B,), ids that are never drawn.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # greedy
    if sampling.temperature == 0:
        token = wide.index_fill(-1, banned, -torch.inf).argmax(-1)
        model_log_prob = wide.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        return Choice(token, torch.zeros_like(model_log_prob), model_log_prob)
    if sampling.temperature != 1:
        wide = wide / sampling.temperature
    log_probs, ids = _candidates(wide.index_fill(-1, banned, -torch.inf).log_softmax(-1), sampling)
    # a power of two: exact in any float dtype
    cumulative = (log_probs.exp() * UNIT).long().cumsum(-1)
    # always less than the total, even after rounding: a float64 less than 1 is at most 1 - 2^-53
    target = (uniform * cumulative[:, -1]).long()
    # the first column whose sum exceeds the target, so that its probability is not 0; only NaN needs the clamp
    column = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=log_probs.shape[-1] - 1)
    token = column if ids is None else ids.gather(-1, column)
    return Choice(token[:, 0], log_probs.gather(-1, column)[:, 0], wide.log_softmax(-1).gather(-1, token)[:, 0])


def _candidates(log_probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Returns the log-probabilities (R, C) after top_k and top_p, and their token ids; None: column i is token i."""
    if sampling.top_k is None and sampling.top_p == 1:
        return log_probs, None
    if sampling.top_k is not None:
        log_probs, ids = log_probs.topk(min(sampling.top_k, log_probs.shape[-1]))
    else:
        log_probs, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1:
        prob = log_probs.softmax(-1)
        # drop a token if the ones before it reach top_p; the first token always stays
        log_probs = log_probs.masked_fill(prob.cumsum(-1) - prob >= sampling.top_p, -torch.inf)
    return log_probs.log_softmax(-1), ids


def uniforms(seed: int, keys: Sequence[int], n: int, length: int) -> Tensor:
    """Returns (len(keys) * n, length) numbers in [0, 1), float64: n rows for each key.

    Row j of a key depends on (seed, key, j) alone: not on `length`, which only cuts it, and not on other rows.
    """
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, key, j)))).random(length)
        for key in keys
        for j in range(n)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
