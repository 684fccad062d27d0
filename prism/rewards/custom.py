"""Own rewards: any callable `reward(rollout, sample) -> float | None`, named by import path."""

import importlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prism.rewards.workers import Workers

# None: this reward says nothing about this rollout
Reward = Callable[[Any, Any], float | None]


class Rewards(NamedTuple):
    """Of each rollout its reward, or None, and why there is none."""

    values: list[float | None]
    # "" where the function has answered, with None or a number; else "timeout", "crash", "memory", "error"
    reasons: list[str]
    # the first exception's text, for the log
    first_error: str

    @property
    def failures(self) -> dict[str, int]:
        """How many rollouts have no reward, by reason."""
        return dict(Counter(filter(None, self.reasons)))


def load_reward(path: str) -> Reward:
    """Returns the reward that a path such as "my_package.rewards:short_caption" names, and checks that it fits.

    Args:
        path: "package.module:function" of a callable that takes a rollout and a sample.
    """
    function = import_function(path, "load_reward")
    try:
        signature = inspect.signature(function)
    except ValueError:
        # a builtin that does not tell
        return function
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"load_reward: expected {path} to be callable as reward(rollout, sample), got {signature}"
        ) from error
    return function


def evaluate_reward(
    path: str, rollouts: Sequence[Any], samples: Sequence[Any], *, workers: Workers, timeout_s: float
) -> Rewards:
    """Returns an own reward of each rollout, computed in worker processes: a hang or a crash costs one reward.

    Args:
        path: of the reward, importable in a fresh interpreter.
        rollouts: picklable.
        samples: of each rollout the row of data, picklable.
        workers: where it runs. A reward that needs this process (a model on the GPU) is called directly instead, by
            `load_reward(path)(rollout, sample)`, and then has no time limit.
        timeout_s: seconds that one call may take.
    """
    if len(rollouts) != len(samples):
        raise ValueError(f"evaluate_reward: expected a sample for each of {len(rollouts)} rollouts, got {len(samples)}")
    # a wrong path or signature is the run's mistake, and is told before any worker starts
    load_reward(path)
    calls = [(path, rollout, sample) for rollout, sample in zip(rollouts, samples)]
    outcomes = workers.map("prism.rewards.custom:call_reward", calls, timeout_s)
    return Rewards(
        [outcome.value for outcome in outcomes],
        [outcome.reason for outcome in outcomes],
        next((outcome.detail for outcome in outcomes if outcome.reason == "error"), ""),
    )


def call_reward(path: str, rollout: Any, sample: Any) -> float | None:
    """Returns the reward as a finite float or None; anything else is a TypeError or ValueError that names the path."""
    value = load_reward(path)(rollout, sample)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{path}: expected a reward to be a float or None, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{path}: expected a finite reward, got {number}")
    return number


def import_function(path: str, name: str = "import_function") -> Callable[..., Any]:
    """Returns the callable that a path such as "my_package.rewards:short_caption" names.

    Args:
        path: module and attribute; the module must be importable, so its folder must be on sys.path.
        name: what errors call the caller.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f'{name}: expected a path like "package.module:function", got {path!r}')
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        # the module itself, or one of its packages, or something that it imports
        if module_name == missing or module_name.startswith(missing + "."):
            raise ImportError(
                f"{name}: expected module {module_name!r} of {path!r} to be importable, got no module "
                f"named {missing!r}; install it or put its folder on PYTHONPATH"
            ) from error
        raise ImportError(
            f"{name}: module {module_name!r} of {path!r} needs {missing!r}, which is not installed"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = ", ".join(sorted(n for n, v in vars(found).items() if callable(v) and not n.startswith("_")))
            raise AttributeError(f"{name}: expected {part!r} in {module_name!r}, got only {known or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name}: expected {path!r} to be callable, got {type(found).__name__}")
    return found
