"""How the next token is drawn: the distribution of the candidates, and the streams of uniform numbers.

R rollouts, V vocabulary, C candidates that are left of it, B banned tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism.config import Sampling

# probabilities are added up as multiples of 2^-50: integers, whose sums have one value in whatever order
UNIT = 2.0**50


class Choice(NamedTuple):
    """The next tokens, all (R,)."""

    token: Tensor
    # of the distribution that the token was drawn from: after temperature, ban, top_k and top_p
    log_prob: Tensor
    # of the model's own distribution at this temperature
    model_log_prob: Tensor


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Tensor) -> Choice:
    """Returns a token for each row, drawn by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits: (R, V), of any float dtype; what follows is in fp32 at least.
        uniform: (R,) in [0, 1), float64; unused when greedy.
        sampling: the settings.
        banned: (B,), ids that have probability 0 whatever their logits.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.greedy:
        token = wide.index_fill(-1, banned, -torch.inf).argmax(-1)
        model_log_prob = wide.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        return Choice(token, torch.zeros_like(model_log_prob), model_log_prob)
    if sampling.temperature != 1:
        wide = wide / sampling.temperature
    log_probs, ids = _candidates(wide.index_fill(-1, banned, -torch.inf).log_softmax(-1), sampling)
    # a power of two: exact in any float dtype
    cumulative = (log_probs.exp() * UNIT).long().cumsum(-1)
    # below the total, however it is rounded: a float64 under 1 is at most 1 - 2^-53
    target = (uniform * cumulative[:, -1]).long()
    # the first place whose sum is past the target: never one that adds nothing. the clamp serves NaN alone
    place = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=log_probs.shape[-1] - 1)
    token = place if ids is None else ids.gather(-1, place)
    return Choice(token[:, 0], log_probs.gather(-1, place)[:, 0], wide.log_softmax(-1).gather(-1, token)[:, 0])


def _candidates(log_probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Returns what top_k and top_p leave, (R, C), normalised, and the ids of the columns; None: column i is token i."""
    if sampling.top_k is None and sampling.top_p == 1:
        return log_probs, None
    if sampling.top_k is not None:
        log_probs, ids = log_probs.topk(min(sampling.top_k, log_probs.shape[-1]))
    else:
        log_probs, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1:
        prob = log_probs.softmax(-1)
        # what comes before reaches top_p already; the first token has nothing before it
        log_probs = log_probs.masked_fill(prob.cumsum(-1) - prob >= sampling.top_p, -torch.inf)
    return log_probs.log_softmax(-1), ids


def uniforms(seed: int, keys: Sequence[int], n: int, length: int) -> Tensor:
    """Returns (len(keys) * n, length) numbers in [0, 1), float64: n rows for each key.

    Row j of a key depends on (seed, key, j) alone, and number t of a row on no other: not on `length`, nor on what
    other rows there are.
    """
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, key, j)))).random(length)
        for key in keys
        for j in range(n)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
