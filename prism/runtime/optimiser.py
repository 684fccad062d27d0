"""The optimiser of a stage, which takes no step where something is not finite."""

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from prism.config.sections import Adam, Warmup
from prism.runtime.schedule import learning_rate


class NotFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class Stepped(NamedTuple):
    """What a step did: the gradient's norm before clipping, the learning rate, and why it was not taken (or None)."""

    grad_norm: float
    lr: float
    skipped: str | None


class MasterAdamW(AdamW):
    """AdamW on fp32 copies of parameters that have fewer bits; they take the copies' values, rounded, at each step.

    bf16 numbers lie 1/256 apart: a step of 1e-6 on them would be rounded away, each time anew. The copies are a part
    of the state. A step leaves those parameters without gradients.

    Args:
        groups: what is trained, as torch's own takes it; parameters in fp32 are stepped on themselves.
        settings: of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        self.trained: list[nn.Parameter] = []
        self.held: list[Tensor] = []
        copied = []
        for group in groups:
            held = [p if _is_wide(p) else p.detach().float() for p in group["params"]]
            self.trained += group["params"]
            self.held += held
            copied.append({**group, "params": held})
        super().__init__(copied, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        super().zero_grad(set_to_none)
        for parameter, _ in self._copied():
            parameter.grad = None

    # torch's own has overloads for a closure, which nothing here has
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Takes a step."""
        for parameter, copy in self._copied():
            # one after the other: no two gradients of all parameters at a time
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        super().step()
        for parameter, copy in self._copied():
            copy.grad = None
            parameter.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with the copies."""
        return {**super().state_dict(), "copies": [copy for _, copy in self._copied()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state."""
        super().load_state_dict(state_dict)
        for (_, copy), saved in zip(self._copied(), state_dict["copies"], strict=True):
            copy.copy_(saved)

    def _copied(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(parameter, copy) for parameter, copy in zip(self.trained, self.held) if copy is not parameter]


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)


def parameter_groups(model: nn.Module, settings: Adam) -> list[dict[str, Any]]:
    """Returns what a model trains; a value head whose learning rate is another is a group of its own, the last."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not isinstance(settings, Warmup) or settings.head_rate == 1:
        return [{"params": trained}]
    head = model.get_parameter("value_head.weight")
    rest = [p for p in trained if p is not head]
    return [{"params": rest}, {"params": [head], "lr": settings.lr * settings.head_rate}]


def make_optimiser(groups: list[dict[str, Any]], settings: Adam) -> Optimizer:
    """Returns the optimiser that the settings name, of groups of parameters."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        wide = all(_is_wide(p) for group in groups for p in group["params"])
        return (AdamW if wide else MasterAdamW)(groups, **options)
    from torchao import optim  # type: ignore[import-not-found, unused-ignore]

    # without copies: an update is not lost but for chance, and kept by chance
    build = optim.AdamW8bit if settings.name == "adamw8bit" else optim._AdamW
    return build(groups, bf16_stochastic_round=True, **options)


class Stepper:
    """The optimiser of the parameters that a model trains, and its learning rate.

    Args:
        model: what is trained.
        settings: of the optimiser.
        steps: of the stage.
        inspection: the folder that gets the batches of steps that were not taken, `step-000012.pt` that of the stage's
            twelfth, to be read by `torch.load`; None: they are not saved.
    """

    # in a row
    MOST_SKIPPED = 10

    def __init__(self, model: nn.Module, settings: Adam, steps: int, *, inspection: Path | None = None) -> None:
        self.settings = settings
        self.inspection = inspection
        groups = parameter_groups(model, settings)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimiser = make_optimiser(groups, settings)
        warmup = settings.warmup_steps(steps)
        self.schedule = learning_rate(self.optimiser, settings.schedule, warmup_steps=warmup, steps=steps)
        self.skipped_in_a_row = 0
        # of the optimiser, in a step of the stage
        self.tries = 0

    @property
    def lr(self) -> float:
        """The learning rate now, of all but a head that has another."""
        return float(self.optimiser.param_groups[0]["lr"])

    def begin(self) -> None:
        """Drops the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def end(self, losses: Iterable[Tensor], batch: Mapping[str, Any] | None = None) -> Stepped:
        """Takes the step, unless a loss or the gradient is not finite; raises after too many such steps in a row.

        Args:
            losses: of the step's packs.
            batch: see `count`.
        """
        lr, norm = self.lr, math.nan
        skipped = None if all(math.isfinite(float(loss)) for loss in losses) else "the loss is not finite"
        if skipped is None:
            norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
            skipped = None if math.isfinite(norm) else "the gradient is not finite"
        if skipped is None:
            self.optimiser.step()
        self.count(skipped, batch)
        return Stepped(norm, lr, skipped)

    def count(self, skipped: str | None, batch: Mapping[str, Any] | None = None) -> None:
        """Takes note of a step that was taken or not; raises after too many in a row that were not.

        Args:
            skipped: what was not finite; None: the step was taken.
            batch: tensors and plain Python values, saved where the step was not taken.
        """
        self.tries += 1
        if skipped is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        kept = self._save(skipped, batch)
        if self.skipped_in_a_row >= self.MOST_SKIPPED:
            where = "" if kept is None else f"; their batches are in {kept.parent}"
            raise NotFiniteError(f"{self.skipped_in_a_row} steps in a row were not taken: {skipped}{where}")

    def _save(self, reason: str, batch: Mapping[str, Any] | None) -> Path | None:
        if self.inspection is None or batch is None:
            return None
        self.inspection.mkdir(parents=True, exist_ok=True)
        again = f"-{self.tries}" if self.tries > 1 else ""
        path = self.inspection / f"step-{self.schedule.last_epoch + 1:06d}{again}.pt"
        torch.save({**batch, "skipped": reason, "lr": self.lr}, path)
        return path

    def next_rate(self) -> None:
        """Goes on to the learning rate of the stage's next step."""
        self.tries = 0
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
