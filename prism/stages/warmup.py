"""Warm-up of the discriminator on pairs: the SFT policy's responses against their teachers', before the game begins."""

from typing import Any

from prism.config import Config
from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample, prepare_groups
from prism.discriminator.training import discriminator_step
from prism.models.prompts import PromptEncoder
from prism.optimisation import Stepper
from prism.stages.align import discriminator_figures, score_limits, step_settings


def warmup_step(
    discriminator: Discriminator,
    samples: list[Sample],
    encoder: PromptEncoder,
    stepper: Stepper,
    config: Config,
) -> dict[str, Any]:
    """Takes one step on pairs; returns what is logged."""
    stepper.begin()
    prepared = prepare_groups(samples, encoder, score_limits(config), images=discriminator.images)
    result = discriminator_step(discriminator, prepared, stepper.optimiser, step_settings(config))
    return {**discriminator_figures(result), "skipped": float(result.skipped is not None)}
