"""Learning rates over the steps of a stage."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate(optimiser: Optimizer, schedule: str, *, warmup_steps: int, steps: int) -> LambdaLR:
    """Returns a scheduler, stepped after each step of the optimiser.

    The rate rises linearly to that of the optimiser, which the last of `warmup_steps` has; then it is `constant`, or
    falls, `linear` or `cosine`, to where it would be 0 one step after the last. No step is wasted on a rate of 0.
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

    return LambdaLR(optimiser, factor)
