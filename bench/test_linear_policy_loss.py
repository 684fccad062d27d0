"""Time and memory of `linear_policy_loss` against autograd over dense logits, and against our two ops in sequence."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import TRAIN, Case, reference
from bench.versus import Bar, Duel, Goal, Reference, Rival, Run, Values, duel_test
from prism_kernels import linear_logprob, linear_policy_loss, policy_loss, use_backend

SEQUENCES = 16
CPU_CASE = Case("main", "linear_policy_loss", 4096, 32768, 256, "float32")
CUDA_CASE = Case("4b", "linear_policy_loss", 16384, 151936, 2560, "bfloat16")
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


def make(case: Case, device: str = "cpu") -> Data:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    total, dtype = case.rows, case.torch_dtype
    hidden = normal(total, case.width).to(dtype)
    weight = normal(case.columns, case.width, scale=2 / math.sqrt(case.width)).to(dtype)
    target = torch.randint(case.columns, (total,), generator=generator, device=device)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, target).logp
    old = logp + 0.2 * normal(total)
    advantage = normal(SEQUENCES)
    cu_seqlens = torch.arange(0, total + 1, total // SEQUENCES, dtype=torch.int32, device=device)
    return Data(hidden.requires_grad_(), weight.requires_grad_(), target, old, advantage, cu_seqlens)


def clipped(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP[0], 1 + CLIP[1]))


def exact(data: Data) -> Values:
    hidden, weight = (x.detach().double().requires_grad_() for x in (data.hidden, data.weight))
    tokens = data.target.numel()
    advantage = data.advantage.double().repeat_interleave(tokens // SEQUENCES)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, tokens, BLOCK):
        rows = slice(start, start + BLOCK)
        logp = linear(hidden[rows], weight).log_softmax(-1).gather(1, data.target[rows, None])[:, 0]
        loss = clipped(logp, data.old_logp[rows].double(), advantage[rows]).sum() / tokens
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


def apart(backend: str):
    def load(data: Data) -> Run:
        def run() -> Values:
            with use_backend(backend):
                logp = linear_logprob(data.hidden, data.weight, data.target).logp
                loss, _ = policy_loss(logp, data.old_logp, data.advantage, data.cu_seqlens, clip=CLIP)
            return backward(loss, data)

        return run

    return load


def dense(data: Data) -> Run:
    advantage = data.advantage.repeat_interleave(data.target.numel() // SEQUENCES)

    def run() -> Values:
        # one expression, because a name would keep the logits until the backward pass
        logp = linear(data.hidden, data.weight).float().log_softmax(-1).gather(1, data.target[:, None])[:, 0]
        return backward(clipped(logp, data.old_logp, advantage).mean(), data)

    return run


DENSE = "PyTorch, dense logits"


def label(case: Case) -> str:
    return f"forward+backward, {case.label()}"


def cuda_duel(case: Case = CUDA_CASE, device: str = "cuda") -> Duel:
    """The op on a GPU, beside its three matrix products."""
    backends = ("cuda", "triton") if device == "cuda" else ()
    name = {"cuda": "CUDA", "triton": "Triton"}
    return Duel(
        op="linear_policy_loss",
        label=label(case),
        make=lambda: make(case, device),
        exact=exact,
        rivals=(
            *(Rival(f"ours, {name[backend]}", fused(backend), ours=True) for backend in backends),
            Rival("ours, torch", fused("torch"), ours=True),
            Rival("ours, linear_logprob then policy_loss", apart("cuda" if backends else "torch"), ours=True),
            Rival(DENSE, dense),
        ),
        tolerance=5e-2,
        bars=(Bar(DENSE, slower=1.0),),
        memory=True,
        limit_s=2.0,
        rounds=(3, 20),
        device=device,
        reference=Reference("three torch.mm", lambda _: reference(case, device, TRAIN)),
        goals=(Goal("peak extra memory in GB", "peak_extra_bytes", "<=", 4, unit=1e-9),),
    )


DUELS = (
    Duel(
        op="linear_policy_loss",
        label="forward+backward, T=4096, V=32768, D=256, fp32",
        make=lambda: make(CPU_CASE),
        exact=exact,
        rivals=(
            Rival("ours, C++", fused("cpu"), ours=True),
            Rival("ours, torch", fused("torch"), ours=True),
            Rival("ours, linear_logprob then policy_loss", apart("cpu"), ours=True),
            Rival(DENSE, dense),
        ),
        tolerance=1e-4,
        # at most 0.65 of its time
        bars=(Bar(DENSE, slower=1 / 0.65, memory_share=0.08),),
        memory=True,
        limit_s=40,
    ),
)
CUDA_DUELS = (cuda_duel(),)
test_linear_policy_loss = duel_test(DUELS, __name__)
