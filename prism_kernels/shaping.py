"""Small pure functions around the advantages: overlong shaping, the group filter, credit by channel.

N samples (one sequence each), T tokens, C channels.
"""

import torch
from torch import Tensor

from prism_kernels import check


def overlong_penalty(length: Tensor, *, limit: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """Returns a term for each sample's reward from its length, (N,), fp32: DAPO's soft overlong punishment.

    It is 0 up to limit - buffer tokens, falls linearly to -penalty at the limit, and is -penalty beyond.
    """
    name = "overlong_penalty"
    buffer = check.integer(name, "buffer", buffer, 1, expected="buffer > 0")
    limit = check.integer(name, "limit", limit, buffer, expected=f"limit >= buffer {buffer}")
    penalty = check.number(name, "penalty", penalty)
    excess = (length - (limit - buffer)).to(torch.float32) / buffer
    return -penalty * excess.clamp(0, 1)


def informative_groups(reward: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Returns whether each sample's group has valid rewards that differ, (N,), bool: DAPO's group filter.

    All advantages of the other groups are 0. `reward`, `group` and `valid` are those of `group_advantage`.
    """
    name = "informative_groups"
    check.shape(name, "reward", reward, ("N",))
    check.shape(name, "group", group, tuple(reward.shape))
    ids = group.to(torch.int64)
    keep = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    ends = []
    for how, none in (("amin", torch.inf), ("amax", -torch.inf)):
        x = torch.where(keep, reward, none)
        ends.append(torch.full_like(x, none).scatter_reduce(0, ids, x, how).gather(0, ids))
    return ends[0] < ends[1]


def token_advantage(advantage: Tensor, channel: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns each token's advantage, (T,): its sequence's advantage in the token's channel, 0 without a channel.

    So the description gets the advantage of perception; thinking and answer get the advantage of reasoning.

    Args:
        advantage: (C, N), one row for each channel, such as `group_advantage` of each channel's score.
        channel: (T,), int64, the channel of each token; -1: none (tags, the prompt).
        cu_seqlens: (N + 1,), the sequences' bounds.
    """
    name = "token_advantage"
    check.shape(name, "cu_seqlens", cu_seqlens, ("N + 1",))
    check.shape(name, "advantage", advantage, ("C", cu_seqlens.shape[0] - 1))
    check.shape(name, "channel", channel, ("T",))
    check.dtype(name, "channel", channel, (torch.int64,))
    tokens = channel.shape[0]
    if advantage.numel() == 0:
        return advantage.new_zeros(tokens)
    position = torch.arange(tokens, device=channel.device)
    sequence = torch.bucketize(position, cu_seqlens[1:].to(torch.int64), right=True).clamp(max=advantage.shape[1] - 1)
    credit = advantage[channel.clamp(min=0), sequence]
    return torch.where(channel >= 0, credit, 0)
