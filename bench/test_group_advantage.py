"""`group_advantage` of 4,096 groups of 16 samples against verl's loop and its vectorised form, on a GPU also against
plain PyTorch."""

from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.versus import Bar, Duel, Goal, Rival, Run, Values, duel_test
from prism_kernels import group_advantage, use_backend

GROUPS, SIZE = 4096, 16
# the loop takes seconds: a sixteenth of the groups is enough
SHARE = 1 / 16


class Data(NamedTuple):
    reward: Tensor
    group: Tensor
    # verl's ids are strings in an array of objects
    uid: np.ndarray


def make(device: str = "cpu") -> Data:
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(GROUPS * SIZE, generator=generator)
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    names = np.array([f"{index:032x}" for index in range(GROUPS)], dtype=object)
    return Data(reward.to(device), group.to(device), names[group.numpy()])


def exact(data: Data) -> Values:
    reward = data.reward.double().view(GROUPS, SIZE)
    return {"advantage": ((reward - reward.mean(1, True)) / (reward.std(1, keepdim=True) + 1e-6)).flatten()}


def ours(backend: str):
    def load(data: Data) -> Run:
        def run() -> Values:
            with use_backend(backend):
                return {"advantage": group_advantage(data.reward, data.group)}

        return run

    return load


def vectorised(data: Data) -> Run:
    """Plain PyTorch for any ids in any order, with at most as many groups as samples: it reads nothing from a GPU."""
    reward, group = data.reward, data.group

    def sums(x: Tensor) -> Tensor:
        return torch.zeros_like(reward).index_add_(0, group, x)[group]

    def run() -> Values:
        count = sums(torch.ones_like(reward))
        away = reward - sums(reward) / count
        deviation = (sums(away.square()) / (count - 1).clamp(min=1)).sqrt()
        return {"advantage": away / (deviation + 1e-6)}

    return run


def verl(name: str, share: float = 1.0, integers: bool = False):
    def load(data: Data) -> Run:
        function = getattr(import_module("verl.trainer.ppo.core_algos"), name)
        used = int(GROUPS * share) * SIZE
        index = (data.group.cpu().numpy() if integers else data.uid)[:used]
        mask = torch.ones(used, 1, device=data.reward.device)

        def run() -> Values:
            # it overwrites the sums, which share the rewards' memory if there is one column
            return {"advantage": function(data.reward[:used, None].clone(), mask, index)[0][:, 0]}

        return run

    return load


def cuda_duel(device: str = "cuda") -> Duel:
    return Duel(
        op="group_advantage",
        label=f"{GROUPS:,} groups of {SIZE}, fp32",
        make=lambda: make(device),
        exact=exact,
        rivals=(
            Rival("ours, CUDA", ours("cuda" if device == "cuda" else "torch"), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            Rival("PyTorch, index_add", vectorised),
            Rival(VECTORISED, verl("compute_grpo_vectorized_outcome_advantage"), package="verl"),
        ),
        tolerance=1e-4,
        limit_s=1.0,
        device=device,
        goals=(Goal("host syncs", "syncs", "<=", 0), Goal("launches", "launches", "<=", 1)),
    )


LOOP, VECTORISED = "verl grpo (its loop)", "verl grpo_vectorized"
DUELS = (
    Duel(
        op="group_advantage",
        label=f"{GROUPS:,} groups of {SIZE}, fp32",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, C++", ours("cpu"), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            Rival(LOOP, verl("compute_grpo_outcome_advantage", SHARE), package="verl", share=SHARE),
            Rival(VECTORISED, verl("compute_grpo_vectorized_outcome_advantage"), package="verl"),
            Rival(
                f"{VECTORISED}, integer ids",
                verl("compute_grpo_vectorized_outcome_advantage", integers=True),
                package="verl",
            ),
        ),
        tolerance=1e-4,
        bars=(Bar(LOOP, 500), Bar(VECTORISED, 10)),
    ),
)
CUDA_DUELS = (cuda_duel(),)
test_group_advantage = duel_test(DUELS, __name__)
