"""One advantage for each token of a response: perception's in the caption, reasoning's behind it.

S responses, T their tokens, B the tokens' bytes.
"""

import numpy as np
import torch
from torch import Tensor

from prism.discriminator.score import GroupScores
from prism.stages.rollouts import Answered
from prism_kernels import group_advantage
from prism_kernels.segments import SINGLE_BYTES, TokenBytes, find_segments
from prism_kernels.shaping import token_advantage

# of caption, think and answer the row of their advantage
CHANNEL = (0, 1, 1)


def token_credit(scores: GroupScores, answered: Answered, table: TokenBytes, mixed: Tensor) -> list[Tensor]:
    """Returns for each response one advantage a token; tags and invalid responses have `mixed`, that of both channels.

    Args:
        scores: of the responses.
        answered: the rollouts.
        table: the bytes of the policy's tokens.
        mixed: (S,), advantages of whole responses.
    """
    valid = torch.tensor([reason is None for reason in scores.reason])
    advantages = torch.stack(
        [
            group_advantage(torch.where(valid, column.cpu(), 0.0), answered.group, valid=valid)
            for column in (scores.perception, scores.reasoning)
        ]
    )
    lengths = answered.lengths
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    channel = _channels([token for rollout in answered.rollouts for token in rollout.token_ids], bounds, table)
    credit = token_advantage(advantages, channel, bounds.to(torch.int32))
    spread = mixed.repeat_interleave(lengths)
    return list(torch.where(channel >= 0, credit.to(spread.dtype), spread).split(lengths.tolist()))


def _channels(token_ids: list[int], bounds: Tensor, table: TokenBytes) -> Tensor:
    """Returns the channel of each token, (T,): that of the section that its first byte is in, -1 in none."""
    tokens = np.array(token_ids, dtype=np.int64)
    length = np.diff(table.offsets)[tokens]
    begin = np.concatenate(([0], length.cumsum()))
    place = np.repeat(table.offsets[tokens] - begin[:-1], length) + np.arange(begin[-1])
    # in bytes: a section of one token that begins in the tag before it must not make the response invalid
    found = find_segments(table.data[place], begin[bounds.numpy()], SINGLE_BYTES)
    channel = np.full(len(tokens), -1, dtype=np.int64)
    for section, row in enumerate(CHANNEL):
        start, end = found.start[:, section].numpy(), found.end[:, section].numpy()
        first, last = np.searchsorted(begin[:-1], start), np.searchsorted(begin[:-1], end)
        for a, b in zip(first, last):
            channel[a:b] = row
    return torch.from_numpy(channel)
