"""`policy_loss` on a million packed tokens, forward and backward, against the eager losses of verl and TRL. On a GPU it
runs on fewer and on more tokens, also against the same loss in plain PyTorch.

verl and TRL get their cheapest form: the packed tokens as one row, without padding, and the mean over tokens. They get
an advantage for each token; ours gets one for each sequence.
"""

from collections import defaultdict
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.versus import Bar, Duel, Goal, Reference, Rival, Run, Values, duel_test
from prism_kernels import policy_loss

T, S = 1_000_000, 2_000
CLIP, DUAL = (0.2, 0.28), 3.0


class Data(NamedTuple):
    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    token_advantage: Tensor
    cu_seqlens: Tensor
    mask: Tensor


def make(tokens: int, sequences: int, device: str = "cpu") -> Data:
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(tokens - 1, generator=generator)[: sequences - 1].add(1).sort().values
    cu_seqlens = torch.cat((torch.zeros(1), cuts, torch.tensor([tokens]))).to(torch.int32)
    old = -torch.rand(tokens, generator=generator) * 3
    logp = old + 0.2 * torch.randn(tokens, generator=generator)
    advantage = torch.randn(sequences, generator=generator)
    token_advantage = advantage.repeat_interleave(cu_seqlens.diff().long())
    mask = torch.rand(tokens, generator=generator) > 0.1
    data = (t.to(device) for t in (logp, old, advantage, token_advantage, cu_seqlens, mask))
    return Data(next(data).requires_grad_(), *data)


def clipped(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP[0], 1 + CLIP[1]))
    worse = torch.where(advantage < 0, torch.minimum(worse, -advantage * DUAL), worse)
    return (worse * mask).sum() / mask.sum()


def exact(data: Data) -> Values:
    logp = data.logp.detach().double().requires_grad_()
    loss = clipped(logp, data.old_logp.double(), data.token_advantage.double(), data.mask)
    loss.backward()
    return {"loss": loss.detach(), "gradient": logp.grad}


def backward(loss: Tensor, data: Data) -> Values:
    data.logp.grad = None
    loss.backward()
    return {"loss": loss.detach(), "gradient": data.logp.grad}


def ours(backend: str):
    def load(data: Data) -> Run:
        options = {"mask": data.mask, "clip": CLIP, "dual_clip": DUAL, "backend": backend}

        def run() -> Values:
            loss, _ = policy_loss(data.logp, data.old_logp, data.advantage, data.cu_seqlens, **options)
            return backward(loss, data)

        return run

    return load


def plain(compiled: bool):
    def load(data: Data) -> Run:
        function = torch.compile(clipped, dynamic=False) if compiled else clipped
        return lambda: backward(function(data.logp, data.old_logp, data.token_advantage, data.mask), data)

    return load


def verl(data: Data) -> Run:
    function = import_module("verl.trainer.ppo.core_algos").compute_policy_loss_vanilla
    config = import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=CLIP[0], clip_ratio_high=CLIP[1], clip_ratio_c=DUAL,
    )  # fmt: skip
    old, advantage, mask = data.old_logp[None], data.token_advantage[None], data.mask[None]
    return lambda: backward(function(old, data.logp[None], advantage, mask, "token-mean", config)[0], data)


def trl(data: Data) -> Run:
    compute = import_module("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss
    tokens, device = data.logp.numel(), data.logp.device
    entropies = torch.zeros(1, tokens, device=device)
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (data.logp[None], entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, loss_type="dapo",
        importance_sampling_level="token", epsilon_low=CLIP[0], epsilon_high=CLIP[1], use_vllm=False,
        args=SimpleNamespace(delta=DUAL, steps_per_generation=1), accelerator=same, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    # the ids only pass through; one byte each makes their concatenation cheap
    nothing, ids = (torch.zeros(1, size, dtype=torch.uint8, device=device) for size in (0, tokens))
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": ids, "completion_mask": data.mask[None].long(),
        "advantages": data.token_advantage[None], "old_per_token_logps": data.old_logp[None],
        "num_items_in_batch": data.mask.sum(),
    }  # fmt: skip
    return lambda: backward(compute(stub, stub.model, inputs), data)


VERL = Rival("verl compute_policy_loss_vanilla", verl, package="verl")
TRL = Rival("TRL GRPOTrainer._compute_loss", trl, package="trl")


def label(tokens: int, sequences: int) -> str:
    return f"forward+backward, T={tokens:,} tokens in {sequences:,} sequences, fp32"


def moved(tokens: int, sequences: int) -> int:
    # forward reads logp, old_logp and mask and writes the gradient; backward reads and writes it again
    return tokens * (4 + 4 + 1 + 4 + 8) + sequences * 8


def copying(data: Data) -> Run:
    source = torch.ones(moved(data.logp.numel(), data.advantage.numel()) // 2, dtype=torch.uint8).to(data.logp.device)
    sink = torch.empty_like(source)
    return lambda: sink.copy_(source)


def cuda_duel(op: str, tokens: int, sequences: int, device: str = "cuda") -> Duel:
    """The op on a GPU. Launches dominate its cost for few tokens, bytes for many."""
    # the loss, the upstream gradient of 1, and the scale
    goals = (Goal("host syncs", "syncs", "<=", 0), Goal("launches, forward and backward", "launches", "<=", 3))
    if tokens >= 2**20:
        goals += (Goal("share of the copy's bytes a second", "bandwidth_share", ">=", 0.8),)
    return Duel(
        op=op,
        label=label(tokens, sequences),
        make=lambda: make(tokens, sequences, device),
        exact=exact,
        rivals=(
            Rival("ours, CUDA", ours("cuda" if device == "cuda" else "torch"), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            Rival("PyTorch", plain(False)),
            Rival("PyTorch, torch.compile", plain(True)),
            VERL,
            TRL,
        ),
        tolerance=1e-4,
        limit_s=1.0,
        device=device,
        reference=Reference("a copy of as many bytes", copying, moved(tokens, sequences)),
        goals=goals,
    )


DUELS = (
    Duel(
        op="policy_loss",
        label=label(T, S),
        make=lambda: make(T, S),
        exact=exact,
        rivals=(
            Rival("ours, C++", ours("cpu"), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            VERL,
            TRL,
        ),
        tolerance=1e-5,
        bars=(Bar(VERL.name, 10), Bar(TRL.name, 8)),
    ),
)
CUDA_DUELS = (cuda_duel("policy_loss_16k", 2**14, 32), cuda_duel("policy_loss_4m", 2**22, 2**13))
test_policy_loss = duel_test(DUELS, __name__)
