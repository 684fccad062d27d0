"""Overlong shaping, the group filter, and credit by channel, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import group_advantage, policy_loss
from prism_kernels.shaping import informative_groups, overlong_penalty, token_advantage


def test_overlong_penalty_is_dapos():
    """Equation 13: 0, then ((limit - buffer) - length) / buffer, then -1."""
    lengths = torch.tensor([0, 11, 12, 13, 14, 15, 16, 17, 900])
    wanted = torch.tensor([0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1])
    assert torch.equal(overlong_penalty(lengths, limit=16, buffer=4), wanted)
    assert torch.equal(overlong_penalty(lengths, limit=16, buffer=4, penalty=0.5), wanted / 2)


@pytest.mark.parametrize("limit, buffer, message", [(16, 0, "buffer > 0"), (4, 8, "limit >= buffer 8, got 4")])
def test_overlong_penalty_bad_arguments(limit, buffer, message):
    with pytest.raises(ValueError, match=f"overlong_penalty: expected {message}"):
        overlong_penalty(torch.tensor([1]), limit=limit, buffer=buffer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.booleans()), max_size=12))
def test_informative_groups_are_those_with_an_advantage(samples):
    samples = [(g % max(len(samples), 1), r, v) for g, r, v in samples]
    group = torch.tensor([g for g, _, _ in samples], dtype=torch.int64)
    reward = torch.tensor([float(r) if v else float("nan") for _, r, v in samples])
    valid = torch.tensor([v for _, _, v in samples], dtype=torch.bool)
    keep = informative_groups(reward, group, valid=valid)
    for i, (g, _, _) in enumerate(samples):
        values = {r for h, r, v in samples if h == g and v}
        assert bool(keep[i]) == (len(values) > 1)
    advantage = group_advantage(reward, group, valid=valid)
    assert torch.equal(advantage != 0, keep & valid)
    assert informative_groups(reward.nan_to_num(0), group).shape == group.shape


def test_token_advantage_credits_each_channel():
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    #         prompt, perception, reasoning, answer | prompt, tag, perception, reasoning, answer
    kind = torch.tensor([0, 2, 3, 4, 0, 0, 2, 3, 4])
    channel = torch.tensor([-1, -1, 0, 1, 1])[kind]
    advantage = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    out = token_advantage(advantage, channel, cu)
    assert out.tolist() == [0, 1, 10, 10, 0, 0, 3, 30, 30]
    same = token_advantage(advantage[:1].expand(2, 3), channel, cu)
    leaf = torch.linspace(-1, 1, 9).requires_grad_()
    by_token = torch.autograd.grad(policy_loss(leaf, None, same, cu, mask=channel >= 0)[0], leaf)[0]
    by_sequence = torch.autograd.grad(policy_loss(leaf, None, advantage[0], cu, mask=channel >= 0)[0], leaf)[0]
    torch.testing.assert_close(by_token, by_sequence)
    assert token_advantage(torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64), cu[:1]).shape == (0,)


def test_token_advantage_bad_arguments():
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"token_advantage: expected advantage of shape \(C, 2\), got \(2, 3\)"):
        token_advantage(torch.zeros(2, 3), torch.zeros(9, dtype=torch.int64), cu)
    with pytest.raises(TypeError, match="token_advantage: expected channel of dtype int64, got float32"):
        token_advantage(torch.zeros(2, 2), torch.zeros(9), cu)
