"""Small pure functions around the advantages: overlong shaping, the group filter, credit by channel.

N samples (one sequence each), T tokens, C channels.
"""

import torch
from torch import Tensor

from prism_kernels import check


def overlong_penalty(length: Tensor, *, limit: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """Returns what is added to the reward of each sample for its length, (N,), fp32: DAPO's soft overlong punishment.

    0 up to limit - buffer tokens, then linearly down to -penalty at the limit, and -penalty beyond.
    """
    check.positive("overlong_penalty", "buffer", buffer)
    if limit < buffer:
        check.fail("overlong_penalty", f"limit >= buffer {buffer}", limit)
    excess = (length - (limit - buffer)).to(torch.float32) / buffer
    return -penalty * excess.clamp(0, 1)


def informative_groups(reward: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Returns which samples are in a group whose valid rewards are not all equal, (N,), bool: DAPO's group filter.

    The others have an advantage of 0 throughout. `reward`, `group` and `valid` are those of `group_advantage`.
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
    """Returns an advantage for each token, (T,): that of its sequence in its own channel, 0 where it has none.

    So the description is credited with the perception's advantage, thinking and answer with the reasoning's.

    Args:
        advantage: (C, N), one row for each channel, such as `group_advantage` of each channel's score.
        channel: (T,), int64, the row of each token; -1 for none (tags, the prompt).
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
    place = torch.arange(tokens, device=channel.device)
    sequence = torch.bucketize(place, cu_seqlens[1:].to(torch.int64), right=True).clamp(max=advantage.shape[1] - 1)
    credit = advantage[channel.clamp(min=0), sequence]
    return torch.where(channel >= 0, credit, 0)
