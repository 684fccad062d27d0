"""The optimiser of a stage: learning rates, clipping, and the guard that skips an update with a non-finite number."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prism_kernels import check

if TYPE_CHECKING:
    from prism.config import Adam

Batch = Callable[[], Mapping[str, Any]]


class NotFiniteError(RuntimeError):
    """Too many updates in a row were skipped because a loss or a gradient was not finite."""


class MasterAdamW(AdamW):
    """AdamW that updates fp32 copies of low-precision parameters, and rounds the copies into the parameters.

    bf16 numbers near 1 lie 1/128 apart, so rounding would discard every update of 1e-6. The copies are part of the
    state. A step drops the gradients of the copied parameters.

    Args:
        groups: parameter groups, as torch's AdamW takes them; fp32 and fp64 parameters are updated directly.
        settings: "Adam"W's options.
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
        """Drops all gradients."""
        super().zero_grad(set_to_none)
        for parameter, _ in self._copied():
            parameter.grad = None

    # torch's method also takes a closure, which nothing here passes
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates the copies and rounds them into their parameters."""
        for parameter, copy in self._copied():
            # one by one, so that bf16 and fp32 gradients of all parameters never exist at once
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        super().step()
        for parameter, copy in self._copied():
            copy.grad = None
            parameter.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, the copies included."""
        return {**super().state_dict(), "copies": [copy for _, copy in self._copied()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state."""
        super().load_state_dict(state_dict)
        for (_, copy), saved in zip(self._copied(), state_dict["copies"], strict=True):
            copy.copy_(saved)

    def _copied(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(parameter, copy) for parameter, copy in zip(self.trained, self.held) if copy is not parameter]


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)


def parameter_groups(model: nn.Module, settings: "Adam") -> list[dict[str, Any]]:
    """Returns the trained parameters; a value head with its own learning rate forms a second group."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # only the warm-up's optimiser has a rate of the head
    head_rate = getattr(settings, "head_rate", 1)
    if head_rate == 1:
        return [{"params": trained}]
    head = model.get_parameter("value_head.weight")
    rest = [p for p in trained if p is not head]
    return [{"params": rest}, {"params": [head], "lr": settings.lr * head_rate}]


def make_optimiser(groups: list[dict[str, Any]], settings: "Adam") -> Optimizer:
    """Builds the optimiser that the settings name."""
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

    # stochastic rounding preserves small updates in expectation, so no fp32 copies are needed
    build = optim.AdamW8bit if settings.name == "adamw8bit" else optim._AdamW
    return build(groups, bf16_stochastic_round=True, **options)


def rate_factor(schedule: str, *, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Returns a function of a step, from 0, that gives its learning rate as a share of the highest.

    The rate rises linearly and reaches the highest at the last of `warmup_steps`. Then it is `constant`, or falls
    (`linear`, `cosine`) so that it would reach 0 one step after the last: no step has a rate of 0.
    """
    shapes = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
    }
    if schedule not in shapes:
        raise ValueError(
            f"learning_rate: expected schedule to be one of {', '.join(map(repr, shapes))}, got {schedule!r}"
        )
    shape = shapes[schedule]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return shape(min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0))

    return factor


def learning_rate(optimiser: Optimizer, schedule: str, *, warmup_steps: int, steps: int) -> LambdaLR:
    """Returns a scheduler to be stepped after each update, with the rates of `rate_factor`."""
    return LambdaLR(optimiser, rate_factor(schedule, warmup_steps=warmup_steps, steps=steps))


class Update:
    """One update of a model: call `backward` on each part of the loss, read the other attributes afterwards."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        # the norm before clipping; NaN if the update was skipped before the gradient was looked at
        self.grad_norm = math.nan
        # why the update was skipped; None: it was applied
        self.skipped: str | None = None
        # whether it was skipped because of a non-finite number
        self.failed = False
        self.losses: list[Tensor] = []

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one part of the loss."""
        loss.backward()
        self.losses.append(loss.detach())

    def skip(self, reason: str, *, failed: bool = True) -> None:
        """Skips this update.

        Args:
            reason: for the log.
            failed: whether a number is not finite.
        """
        self.skipped, self.failed = reason, failed

    @property
    def loss(self) -> float:
        """The sum of all parts of the loss."""
        return float(sum(self.losses))


class GuardedOptimiser:
    """Zeroes and clips the gradients of an optimiser, and skips an update with a non-finite loss or gradient::

        with optimiser.step() as update:
            for part in parts:
                update.backward(loss_of(part))
        update.skipped, update.grad_norm, update.loss

    Args:
        optimiser: any optimiser of torch.
        clip_norm: gradients are scaled down to this norm.
        parameters: the parameters whose gradients are clipped; None: those of the optimiser.
    """

    def __init__(
        self, optimiser: Optimizer, clip_norm: float = 1.0, parameters: Sequence[nn.Parameter] | None = None
    ) -> None:
        check.positive("GuardedOptimiser", "clip_norm", clip_norm)
        self.optimiser, self.clip_norm = optimiser, clip_norm
        if parameters is None:
            # the groups of MasterAdamW hold copies, which have no gradients
            grouped = [p for group in optimiser.param_groups for p in group["params"]]
            parameters = optimiser.trained if isinstance(optimiser, MasterAdamW) else grouped
        self.parameters = parameters

    @property
    def lr(self) -> float:
        """The current learning rate; a value head may have its own."""
        return float(self.optimiser.param_groups[0]["lr"])

    @contextmanager
    def step(self, batch: Batch | None = None) -> Iterator[Update]:
        """Applies the gradients that the block computes, unless something is not finite.

        Args:
            batch: returns the inputs of the update; not used here, but saved by `StageOptimiser`.
        """
        self.optimiser.zero_grad(set_to_none=True)
        update = Update(self.lr)
        yield update
        if update.skipped is None:
            self._apply(update)
        if update.skipped is not None:
            self.optimiser.zero_grad(set_to_none=True)

    def _apply(self, update: Update) -> None:
        if not all(math.isfinite(float(loss)) for loss in update.losses):
            update.skip("the loss is not finite")
            return
        update.grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
        if math.isfinite(update.grad_norm):
            self.optimiser.step()
        else:
            update.skip(f"the gradient's norm is not finite: {update.grad_norm}")


class StageOptimiser(GuardedOptimiser):
    """The optimiser of one model in one stage, with its learning rates.

    It saves the batches of failed updates, and ends the run after too many of them in a row.

    Args:
        model: the model to train.
        settings: settings of the optimiser.
        steps: the stage's number of steps.
        failures: folder for the batches of failed updates, `step-000012.pt` for the stage's twelfth step, readable
            by `torch.load`; None: they are not saved.
    """

    # updates in a row that may fail before the run ends
    MOST_FAILED = 10

    def __init__(self, model: nn.Module, settings: "Adam", steps: int, *, failures: Path | None = None) -> None:
        optimiser = make_optimiser(parameter_groups(model, settings), settings)
        super().__init__(optimiser, settings.clip_norm, [p for p in model.parameters() if p.requires_grad])
        self.failures = failures
        warmup = settings.warmup_steps(steps)
        self.schedule = learning_rate(optimiser, settings.schedule, warmup_steps=warmup, steps=steps)
        self.failed_in_a_row = 0
        # updates in the current step of the stage, for the names of saved batches
        self.tries = 0

    @contextmanager
    def step(self, batch: Batch | None = None) -> Iterator[Update]:
        """Applies the gradients that the block computes, unless something is not finite, and counts failures.

        Args:
            batch: returns the tensors and plain values to save if the update fails.
        """
        with super().step() as update:
            yield update
        self.tries += update.skipped is None or update.failed
        self._count(update, batch)

    def _count(self, update: Update, batch: Batch | None) -> None:
        """Counts a failed update and saves its batch; raises after too many in a row."""
        if update.skipped is None:
            self.failed_in_a_row = 0
        if not update.failed:
            return
        self.failed_in_a_row += 1
        saved = self._save(update, batch)
        if self.failed_in_a_row >= self.MOST_FAILED:
            where = "" if saved is None else f"; their batches are in {saved.parent}"
            raise NotFiniteError(f"{self.failed_in_a_row} updates in a row were skipped: {update.skipped}{where}")

    def _save(self, update: Update, batch: Batch | None) -> Path | None:
        if self.failures is None or batch is None:
            return None
        self.failures.mkdir(parents=True, exist_ok=True)
        again = f"-{self.tries}" if self.tries > 1 else ""
        path = self.failures / f"step-{self.schedule.last_epoch + 1:06d}{again}.pt"
        torch.save({**batch(), "skipped": update.skipped, "lr": self.lr}, path)
        return path

    def next_rate(self) -> None:
        """Moves on to the learning rate of the stage's next step."""
        self.tries = 0
        with warnings.catch_warnings():
            # torch warns if no update came before, as when the first one was skipped
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "failed_in_a_row": self.failed_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state."""
        self.optimiser.load_state_dict(state_dict["optimiser"])
        self.schedule.load_state_dict(state_dict["schedule"])
        self.failed_in_a_row = state_dict["failed_in_a_row"]


def freeze_vision(model: nn.Module, frozen: bool) -> None:
    """Freezes the vision tower and its projector, or trains them."""
    for name, parameter in model.named_parameters():
        if "visual." in name:
            parameter.requires_grad_(not frozen)
