"""Custom rewards: callables `reward(rollout, problem) -> float | None`, named by import path in the settings.

They run in worker processes with a time limit. A hang, a crash, an exception or a non-finite value costs one rollout
one reward, and so does a module that can no longer be imported when a worker is replaced.
"""

import hashlib
import importlib
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import packages_distributions, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from prism.rewards.grade import FAILURES, TIMEOUT_S, Verdict, score_batch
from prism.rewards.workers import Workers, shared_workers
from prism.runtime.disk import write_whole
from prism_kernels.grammar import Sections, split_response
from prism_kernels.version import __version__

if TYPE_CHECKING:
    from prism.data.problem import Problem

# samples of failed rewards that are kept of a step
MOST_KEPT = 16
# seconds to import a reward's module
IMPORT_S = 120.0
# advantages are computed in fp32, where the squares of larger values overflow
LARGEST = 1e18

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutView:
    """A response of the policy, as a custom reward sees it."""

    # without special tokens
    text: str
    # the number of its tokens, with the stop token
    tokens: int
    # the built-in verdict: 1.0 where the answer is right, else 0.0
    accuracy: float

    @property
    def sections(self) -> Sections | None:
        """The caption, reasoning (`think`) and answer; None where the response is invalid."""
        return split_response(self.text)

    @property
    def answer(self) -> str | None:
        """The text of the answer; None where the response is invalid."""
        return None if self.sections is None else self.sections.answer


@dataclass(frozen=True)
class ProblemView:
    """A problem, as a custom reward sees it: without its images."""

    # the row's id, or its file and line
    id: str
    # the question; of a chat all messages, as lines `role: text`
    prompt: str
    # the right answer, and others that are right too
    ground_truth: str
    equivalent_answers: tuple[str, ...]
    # the row's data_source; shapes/KIND in the embedded world
    data_source: str

    @classmethod
    def of(cls, problem: "Problem") -> Self:
        """Returns the view of a problem."""
        answer = problem.answer or ""
        return cls(problem.name, problem.question, answer, problem.equivalent_answers, problem.data_source)


# None: this reward does not apply to this rollout
Reward = Callable[[RolloutView, ProblemView], float | None]


class RewardFailure(NamedTuple):
    """A custom reward that gave no value for a rollout."""

    name: str
    # "timeout", "crash" (the process died), "memory", "error" (an exception) or "not_finite"
    cause: str
    # the exception's traceback, or how the process ended
    detail: str
    rollout: RolloutView
    problem: ProblemView


class Rewards(NamedTuple):
    """The rewards of some rollouts. Of a reward that failed or does not apply, the value is None and counts as 0."""

    verdicts: list[Verdict]
    # verifier_weight * the verdict's score + the sum of weight * value over the custom rewards
    total: list[float]
    # the values of each custom reward
    by_name: dict[str, list[float | None]]
    # `select` keeps all of them
    failures: list[RewardFailure]

    def select(self, rollouts: Sequence[int]) -> "Rewards":
        """Returns the rewards of some of the rollouts."""
        return Rewards(
            [self.verdicts[i] for i in rollouts],
            [self.total[i] for i in rollouts],
            {name: [values[i] for i in rollouts] for name, values in self.by_name.items()},
            self.failures,
        )

    def metrics(self) -> dict[str, Any]:
        """Returns each custom reward's mean where it applies, and the number of failures by cause.

        Failures of the built-in verifier are named only where there are any.
        """
        failed = dict(Counter(verdict.reason for verdict in self.verdicts if verdict.reason in FAILURES))
        built_in = {"failed_verdicts": failed} if failed else {}
        if not self.by_name:
            return built_in
        means = {f"reward_{name}": _mean(values) for name, values in self.by_name.items()}
        return {**built_in, **means, "failed_rewards": dict(Counter(failure.cause for failure in self.failures))}

    def write_failures(self, path: Path) -> None:
        """Writes the first MOST_KEPT failures with their samples, one a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        views = [
            {**failure._asdict(), "rollout": asdict(failure.rollout), "problem": asdict(failure.problem)}
            for failure in self.failures[:MOST_KEPT]
        ]
        write_whole(path, "".join(json.dumps(view) + "\n" for view in views))


def join_rewards(parts: Sequence[Rewards]) -> Rewards:
    """Joins the rewards of several batches, of which there is at least one."""
    return Rewards(
        [verdict for part in parts for verdict in part.verdicts],
        [total for part in parts for total in part.total],
        {name: [value for part in parts for value in part.by_name[name]] for name in parts[0].by_name},
        [failure for part in parts for failure in part.failures],
    )


def rewards_of(
    texts: Sequence[str],
    token_counts: Sequence[int],
    problems: Sequence[ProblemView],
    custom: Mapping[str, tuple[str, float]],
    *,
    verifier_weight: float = 1.0,
    workers: Workers | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Rewards:
    """Returns the rewards of rollouts: the built-in score and custom rewards, weighted and added.

    Args:
        texts: the whole responses, without special tokens.
        token_counts: the number of tokens of each.
        problems: the problem of each.
        custom: for each name of a custom reward, its import path "package.module:function" and its weight.
        verifier_weight: the weight of the built-in score.
        workers: processes for the custom rewards; None: workers that this process shares.
        timeout_s: seconds that one call of a custom reward may take.
    """
    for name, given in (("token_counts", token_counts), ("problems", problems)):
        if len(given) != len(texts):
            raise ValueError(f"rewards_of: expected {name} for each of the {len(texts)} texts, got {len(given)}")
    verdicts = score_batch(
        texts, [problem.ground_truth for problem in problems], [problem.equivalent_answers for problem in problems]
    )
    total = [verifier_weight * verdict.score for verdict in verdicts]
    if not custom:
        return Rewards(verdicts, total, {}, [])
    rollouts = [
        RolloutView(text, tokens, verdict.accuracy) for text, tokens, verdict in zip(texts, token_counts, verdicts)
    ]
    samples = list(zip(rollouts, problems))
    answered = call_rewards([path for path, _ in custom.values()], samples, workers=workers, timeout_s=timeout_s)
    by_name: dict[str, list[float | None]] = {}
    failures: list[RewardFailure] = []
    for (name, (path, weight)), answers in zip(custom.items(), answered):
        by_name[name] = [value for value, _, _ in answers]
        total = [before + weight * (value or 0.0) for before, value in zip(total, by_name[name])]
        failed = [
            RewardFailure(name, cause, detail, *sample) for (_, cause, detail), sample in zip(answers, samples) if cause
        ]
        if failed:
            first = f"{failed[0].cause}: {_last_line(failed[0].detail)}"
            _log.warning("%s: no reward for %d of %d rollouts, the first by %s", path, len(failed), len(texts), first)
        failures += failed
    return Rewards(verdicts, total, by_name, failures)


# a value, or the cause and the detail of a failure; without either, the reward does not apply
Answer = tuple[float | None, str, str]


def call_rewards(
    paths: Sequence[str],
    samples: Sequence[tuple[RolloutView, ProblemView]],
    *,
    workers: Workers | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[list[Answer]]:
    """Returns for each custom reward its answer to each sample; for the options see `rewards_of`."""
    if workers is None:
        workers = shared_workers(sorted({path.partition(":")[0] for path in paths}), None, required=False)
    calls = [(path, *sample) for path in paths for sample in samples]
    names = [f"{path} for {problem.id}" for path, _, problem in calls]
    jobs = iter(workers.map("prism.rewards.custom:call_reward", calls, timeout_s, names))
    return [
        [(None, job.reason, job.detail) if job.reason else job.value for job in islice(jobs, len(samples))]
        for _ in paths
    ]


def call_reward(path: str, rollout: RolloutView, problem: ProblemView) -> Answer:
    """Returns a custom reward's value, or the cause and detail of its failure: runs in a worker."""
    value: Any = load_reward(path)(rollout, problem)
    if value is None:
        return None, "", ""
    # numbers of numpy and torch have it, texts do not
    if not hasattr(value, "__float__"):
        raise TypeError(f"{path}: expected a reward to be a float or None, got {type(value).__name__}")
    number = float(value)
    if not abs(number) < LARGEST:
        return None, "not_finite", f"{path}: expected a finite reward below {LARGEST:g} in size, got {number}"
    return number, "", ""


def load_reward(path: str) -> Reward:
    """Returns the reward at a path such as "my_package.rewards:short_caption", if it takes a rollout and a problem."""
    function = import_function(path)
    if getattr(function, "__name__", "") == "<lambda>":
        raise TypeError(f"expected a function with a name at {path!r}, got a lambda")
    try:
        signature = inspect.signature(function)
    except ValueError:
        # a builtin without a signature
        return function
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"expected {path!r} to be callable as reward(rollout, problem), got {signature}") from error
    return function


def reward_versions(custom: Mapping[str, tuple[str, float]], verifier_weight: float) -> dict[str, dict[str, Any]]:
    """Returns for each recorded value of RLVR what computed it: function, version, hash of its file, and weight.

    Args:
        custom: see `rewards_of`.
        verifier_weight: see `rewards_of`.
    """
    built_in = {"function": "prism.rewards:score_batch", "version": f"prism-kernels {__version__}", "sha256": None}
    versions = {key: {**built_in, "weight": verifier_weight} for key in ("accuracy", "format")}
    for name, (path, weight) in custom.items():
        versions[f"reward_{name}"] = {"function": path, **_version_of(path), "weight": weight}
    return versions


@cache
def _version_of(path: str) -> dict[str, str | None]:
    """Returns the version of a custom reward as it is when the run first asks; its module is imported elsewhere."""
    with Workers(1) as workers:
        (result,) = workers.map("prism.rewards.custom:read_version", [(path,)], IMPORT_S)
    return {"version": None, "sha256": None} if result.reason else result.value


def read_version(path: str) -> dict[str, str | None]:
    """Returns the distribution of a custom reward and the SHA-256 of its file, None where it has none."""
    function = import_function(path)
    module = inspect.getmodule(function) or importlib.import_module(path.partition(":")[0])
    (distribution, *_) = packages_distributions().get(module.__name__.partition(".")[0], [None])
    file = getattr(module, "__file__", None)
    return {
        "version": None if distribution is None else f"{distribution} {version(distribution)}",
        "sha256": None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }


def why_not_a_reward(path: str) -> str:
    """Returns why a path names no custom reward; "" where it names one. Imports its module."""
    try:
        load_reward(path)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        return str(error)
    return ""


def find_unusable_rewards(paths: Sequence[str]) -> list[str]:
    """Returns what is wrong with the custom rewards at some paths. Their modules are imported in another process."""
    with Workers(1) as workers:
        results = workers.map("prism.rewards.custom:why_not_a_reward", [(path,) for path in paths], IMPORT_S)
    problems = []
    for path, result in zip(paths, results):
        if result.reason:
            problems.append(f"expected {path!r} to be importable, got {result.reason}: {_last_line(result.detail)}")
        elif result.value:
            problems.append(result.value)
    return problems


def import_function(path: str) -> Callable[..., Any]:
    """Returns the callable at a path such as "my_package.rewards:short_caption".

    Args:
        path: module and attribute; the module's folder must be on sys.path.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f'expected a path like "package.module:function", got {path!r}')
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        # the module itself, one of its packages, or a module that it imports
        if module_name == missing or module_name.startswith(missing + "."):
            raise ImportError(
                f"expected module {module_name!r} of {path!r} to be importable, got no module "
                f"named {missing!r}; install it or put its folder on PYTHONPATH"
            ) from error
        raise ImportError(
            f"expected {missing!r}, which module {module_name!r} of {path!r} imports, got none"
        ) from error
    except Exception as error:
        problem = f"got {type(error).__name__}: {error}"
        raise ImportError(f"expected module {module_name!r} of {path!r} to be importable, {problem}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = ", ".join(sorted(n for n, v in vars(value).items() if callable(v) and not n.startswith("_")))
            raise AttributeError(f"expected {part!r} in {module_name!r}, got only {known or 'no functions'}")
        value = getattr(value, part)
    if not callable(value):
        raise TypeError(f"expected {path!r} to be callable, got {type(value).__name__}")
    return value


def _last_line(detail: str) -> str:
    """Returns the message of a traceback, or a detail of one line."""
    return detail.strip().rpartition("\n")[2]


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None
