"""`linear_policy_loss`, time and memory, against autograd over dense logits, and against our two ops one after the
other."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.versus import Bar, Duel, Rival, Run, Values, duel_test
from prism_kernels import linear_logprob, linear_policy_loss, policy_loss, use_backend

T, V, D, S = 4096, 32768, 256, 16
CLIP = (0.2, 0.2)
# rows of a block of the exact computation
BLOCK = 256


class Data(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    old_logp: Tensor
    advantage: Tensor
    cu_seqlens: Tensor


def make() -> Data:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * (2 / math.sqrt(D))
    target = torch.randint(V, (T,), generator=generator)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, target).logp
    old = logp + 0.2 * torch.randn(T, generator=generator)
    advantage = torch.randn(S, generator=generator)
    cu_seqlens = torch.arange(0, T + 1, T // S, dtype=torch.int32)
    return Data(hidden.requires_grad_(), weight.requires_grad_(), target, old, advantage, cu_seqlens)


def clipped(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP[0], 1 + CLIP[1]))


def exact(data: Data) -> Values:
    hidden, weight = (x.detach().double().requires_grad_() for x in (data.hidden, data.weight))
    advantage = data.advantage.double().repeat_interleave(T // S)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, T, BLOCK):
        rows = slice(start, start + BLOCK)
        logp = linear(hidden[rows], weight).log_softmax(-1).gather(1, data.target[rows, None])[:, 0]
        loss = clipped(logp, data.old_logp[rows].double(), advantage[rows]).sum() / T
        loss.backward()
        total += loss.detach()
    return {"loss": total, "hidden": hidden.grad, "weight": weight.grad}


def backward(loss: Tensor, data: Data) -> Values:
    data.hidden.grad = data.weight.grad = None
    loss.backward()
    return {"loss": loss.detach(), "hidden": data.hidden.grad, "weight": data.weight.grad}


def fused(backend: str):
    def load(data: Data) -> Run:
        def run() -> Values:
            loss, _, _ = linear_policy_loss(*data, clip=CLIP, backend=backend)
            return backward(loss, data)

        return run

    return load


def apart(data: Data) -> Run:
    def run() -> Values:
        with use_backend("cpu"):
            logp = linear_logprob(data.hidden, data.weight, data.target).logp
            loss, _ = policy_loss(logp, data.old_logp, data.advantage, data.cu_seqlens, clip=CLIP)
        return backward(loss, data)

    return run


def dense(data: Data) -> Run:
    advantage = data.advantage.repeat_interleave(T // S)

    def run() -> Values:
        logp = linear(data.hidden, data.weight).log_softmax(-1).gather(1, data.target[:, None])[:, 0]
        return backward(clipped(logp, data.old_logp, advantage).mean(), data)

    return run


DENSE = "PyTorch, dense logits"
DUELS = (
    Duel(
        op="linear_policy_loss",
        label=f"forward+backward, T={T}, V={V}, D={D}, fp32",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, C++", fused("cpu"), ours=True),
            Rival("ours, torch", fused("torch"), ours=True),
            Rival("ours, linear_logprob then policy_loss", apart, ours=True),
            Rival(DENSE, dense),
        ),
        tolerance=1e-4,
        # at most 0.65 of its time
        bars=(Bar(DENSE, slower=1 / 0.65, memory_share=0.08),),
        memory=True,
        limit_s=40,
    ),
)
test_linear_policy_loss = duel_test(DUELS, __name__)
