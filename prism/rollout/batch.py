"""A step's rollouts with their problems and texts: alignment and RLVR begin with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prism.models.prompts import EncodedPrompt, PromptEncoder
from prism.rollout.engine import Engine, Rollout
from prism.rollout.options import Sampling

if TYPE_CHECKING:
    from prism.data.problem import Problem


class RolloutBatch(NamedTuple):
    """Problems with the policy's responses, group by group. S responses."""

    problems: "list[Problem]"
    prompts: list[EncodedPrompt]
    rollouts: list[Rollout]
    texts: list[str]

    @property
    def group(self) -> Tensor:
        """The problem of each response, (S,), int64."""
        return torch.tensor([rollout.prompt for rollout in self.rollouts], dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each response, (S,), int64."""
        return torch.tensor([len(rollout.token_ids) for rollout in self.rollouts], dtype=torch.int64)

    def texts_of(self, problem: int) -> list[str]:
        """Returns the texts of one problem's responses."""
        return [text for text, rollout in zip(self.texts, self.rollouts) if rollout.prompt == problem]


def generate(
    engine: Engine, problems: "Sequence[Problem]", encoder: PromptEncoder, sampling: Sampling, seed: int
) -> RolloutBatch:
    """Samples the policy's responses to some problems; the same seed gives the same responses.

    Args:
        engine: the policy's engine.
        problems: the problems to answer.
        encoder: the policy's encoder.
        sampling: group size, length and temperature.
        seed: seed of this step.
    """
    prompts = [problem.encoded(encoder) for problem in problems]
    rollouts = engine.generate(prompts, sampling, seed=seed)
    return RolloutBatch(list(problems), prompts, rollouts, decode(rollouts, encoder))


def decode(rollouts: Sequence[Rollout], encoder: PromptEncoder) -> list[str]:
    """Returns the texts of rollouts, without special tokens."""
    return encoder.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
