"""The optimiser of a stage, which takes no step where something is not finite."""

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism.config.sections import Adam
from prism.schedule import learning_rate


class NotFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class Stepped(NamedTuple):
    """What a step did: the gradient's norm before clipping, the learning rate, and why it was not taken (or None)."""

    grad_norm: float
    lr: float
    skipped: str | None


class Stepper:
    """AdamW over the parameters that a model trains, and its learning rate.

    Args:
        model: what is trained.
        settings: of the optimiser.
        steps: of the stage.
    """

    # in a row
    MOST_SKIPPED = 10

    def __init__(self, model: nn.Module, settings: Adam, steps: int) -> None:
        self.settings = settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        warmup = settings.warmup_steps(steps)
        self.schedule = learning_rate(self.optimiser, settings.schedule, warmup_steps=warmup, steps=steps)
        self.skipped_in_a_row = 0

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return float(self.optimiser.param_groups[0]["lr"])

    def begin(self) -> None:
        """Drops the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def end(self, losses: Iterable[Tensor]) -> Stepped:
        """Takes the step, unless a loss or the gradient is not finite; raises after too many such steps in a row."""
        lr, norm = self.lr, math.nan
        skipped = None if all(math.isfinite(float(loss)) for loss in losses) else "the loss is not finite"
        if skipped is None:
            norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
            skipped = None if math.isfinite(norm) else "the gradient is not finite"
        if skipped is None:
            self.optimiser.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.MOST_SKIPPED:
                raise NotFiniteError(f"{self.skipped_in_a_row} steps in a row were not taken: {skipped}")
        return Stepped(norm, lr, skipped)

    def next_rate(self) -> None:
        """Goes on to the learning rate of the stage's next step."""
        with warnings.catch_warnings():
            # torch warns where no step of the optimiser came before, which is so where the first was not taken
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state."""
        self.optimiser.load_state_dict(state_dict["optimiser"])
        self.schedule.load_state_dict(state_dict["schedule"])
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]


def freeze_vision(model: nn.Module, frozen: bool) -> None:
    """Sets whether the vision tower and its projector are trained."""
    for name, parameter in model.named_parameters():
        if "visual." in name:
            parameter.requires_grad_(not frozen)
