"""Warm-up of the discriminator on pairs: the SFT policy's responses against their teachers', before the game begins."""

from typing import Any

from prism.config import Config
from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample, prepare_groups
from prism.models.prompts import PromptEncoder
from prism.runtime.optimiser import Stepper
from prism.stages.align import discriminator_figures, score_limits, train_discriminator


def warmup_step(
    discriminator: Discriminator,
    samples: list[Sample],
    encoder: PromptEncoder,
    stepper: Stepper,
    config: Config,
) -> dict[str, Any]:
    """Takes one step on pairs; returns what is logged."""
    prepared = prepare_groups(samples, encoder, score_limits(config), images=discriminator.images)
    result, skipped = train_discriminator(discriminator, prepared, stepper, config)
    return {**discriminator_figures(result), "skipped": float(skipped)}
