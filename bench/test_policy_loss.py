"""`policy_loss` on a million packed tokens, forward and backward, against the eager losses of verl and TRL.

Both get the packed tokens as one row, without padding, and the mean over tokens: their cheapest form. They take an
advantage for each token; ours takes one for each sequence.
"""

from collections import defaultdict
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.versus import Bar, Duel, Rival, Run, Values, duel_test
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


def make() -> Data:
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(T - 1, generator=generator)[: S - 1].add(1).sort().values
    cu_seqlens = torch.cat((torch.zeros(1), cuts, torch.tensor([T]))).to(torch.int32)
    old = -torch.rand(T, generator=generator) * 3
    logp = old + 0.2 * torch.randn(T, generator=generator)
    advantage = torch.randn(S, generator=generator)
    token_advantage = advantage.repeat_interleave(cu_seqlens.diff().long())
    mask = torch.rand(T, generator=generator) > 0.1
    return Data(logp.requires_grad_(), old, advantage, token_advantage, cu_seqlens, mask)


def exact(data: Data) -> Values:
    logp = data.logp.detach().double().requires_grad_()
    ratio = (logp - data.old_logp.double()).exp()
    advantage = data.token_advantage.double()
    worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP[0], 1 + CLIP[1]))
    worse = torch.where(advantage < 0, torch.minimum(worse, -advantage * DUAL), worse)
    loss = worse[data.mask].mean()
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
    entropies = torch.zeros(1, T)
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (data.logp[None], entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, loss_type="dapo",
        importance_sampling_level="token", epsilon_low=CLIP[0], epsilon_high=CLIP[1], use_vllm=False,
        args=SimpleNamespace(delta=DUAL, steps_per_generation=1), accelerator=same, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    # the ids only pass through: a byte each makes their concatenation cheap
    nothing, ids = torch.zeros(1, 0, dtype=torch.uint8), torch.zeros(1, T, dtype=torch.uint8)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": ids, "completion_mask": data.mask[None].long(),
        "advantages": data.token_advantage[None], "old_per_token_logps": data.old_logp[None],
        "num_items_in_batch": data.mask.sum(),
    }  # fmt: skip
    return lambda: backward(compute(stub, stub.model, inputs), data)


DUELS = (
    Duel(
        op="policy_loss",
        label=f"forward+backward, T={T:,} tokens in {S:,} sequences, fp32",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, C++", ours("cpu"), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            Rival("verl compute_policy_loss_vanilla", verl, package="verl"),
            Rival("TRL GRPOTrainer._compute_loss", trl, package="trl"),
        ),
        tolerance=1e-5,
        bars=(Bar("verl compute_policy_loss_vanilla", 10), Bar("TRL GRPOTrainer._compute_loss", 8)),
    ),
)
test_policy_loss = duel_test(DUELS, __name__)
