"""The options of sampling: how many responses, how long, and drawn from which distribution."""

from dataclasses import dataclass
from typing import Annotated

from prism.ranges import Positive, Range, Ranged


@dataclass(frozen=True, kw_only=True)
class Sampling(Ranged):
    """How responses are drawn.

    Args:
        group: Rollouts of each prompt.
        max_new_tokens: Tokens of the longest response, including its stop token.
        temperature: Divisor of the logits: above 1 more varied, below 1 more predictable; 0 is greedy.
        top_p: Draw from the smallest set of most probable tokens with this total probability; 1: all tokens.
        top_k: Draw from this many of the most probable tokens, chosen before top_p; none: all tokens.
    """

    group: Positive = 1
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Range(ge=0)] = 1.0
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    top_k: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class StageRollouts(Sampling):
    """The rollouts of a training step. They are compared with each other, so they cannot be greedy.

    Args:
        prompts: Prompts of a step, each with `group` rollouts.
    """

    prompts: Positive
    temperature: Annotated[float, Range(gt=0)] = 1.0
