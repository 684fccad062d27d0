"""Trains a tiny policy by GRPO on the kernels: it learns to repeat its prompt. `python docs/examples/train_loop.py`."""

import torch
from torch import nn

from prism_kernels import group_advantage, linear_logprob, policy_loss

# V vocabulary, D hidden; a step has P prompts with G rollouts each, N = P G rollouts of L tokens, T = N L tokens
V, D, P, G, L = 16, 64, 8, 8, 6


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(tokens))[0]  # [N, length, D]


@torch.no_grad()
def generate(policy: Policy, tokens: torch.Tensor) -> torch.Tensor:
    for _ in range(L):
        probability = policy.head(policy(tokens)[:, -1]).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probability, 1)], 1)
    return tokens  # [N, 1 + L]: the prompt, then the response


def train(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for tensors this small a second thread only costs time
    policy = Policy()
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    group = torch.arange(P).repeat_interleave(G)
    cu_seqlens = torch.arange(0, P * G * L + 1, L, dtype=torch.int32)
    rewards = []
    for step in range(1, steps + 1):
        tokens = generate(policy, torch.randint(V, (P, 1)).repeat_interleave(G, 0))
        reward = (tokens[:, 1:] == tokens[:, :1]).float().mean(1)  # [N]: the share of tokens that repeat the prompt
        advantage = group_advantage(reward, group)
        target, old_logp = tokens[:, 1:].flatten(), None
        for _ in range(2):
            hidden = policy(tokens[:, :-1]).flatten(0, 1)  # [T, D]
            logp = linear_logprob(hidden, policy.head.weight, target).logp
            old_logp = logp.detach() if old_logp is None else old_logp
            loss, metrics = policy_loss(logp, old_logp, advantage, cu_seqlens)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        rewards.append(reward.mean().item())
        if step % 10 == 0:
            print(f"step {step}: reward {rewards[-1]:.2f}, approx_kl {metrics.means()['approx_kl']:.4f}")
    return rewards


if __name__ == "__main__":
    train()
