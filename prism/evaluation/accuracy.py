"""What a policy does on held-out problems: accuracy, format, length, drift; in the embedded world errors, exactly."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

from prism.config import Sampling
from prism.data.drift import drift
from prism.data.problem import Problem
from prism.models.prompts import PromptEncoder
from prism.rewards import score_batch
from prism.rollout.engine import Engine
from prism.worlds.shapes.counters import judge


@dataclass(frozen=True)
class PolicyReport:
    """Shares over the samples. The errors are those of the embedded world, NaN elsewhere; drift needs teachers.

    An answer that follows from a wrong caption is an error of perception alone; a response without a valid form counts
    as wrong in everything.
    """

    samples: int
    accuracy: float
    format: float
    length: float
    perception_error: float
    reasoning_error: float
    # Wasserstein distances to the teachers in the numbers of caption items and of reasoning steps
    drift_perception: float
    drift_reasoning: float

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)

    def as_json(self) -> dict[str, float]:
        """Returns the figures that are known, with the accuracy's standard error."""
        found = {**asdict(self), "accuracy_se": self.standard_error}
        return {name: value for name, value in found.items() if math.isfinite(value)}


def evaluate(
    engine: Engine,
    problems: Iterable[Problem],
    encoder: PromptEncoder,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 128,
) -> PolicyReport:
    """Returns what one response to each problem shows.

    Args:
        engine: of the policy.
        problems: each with its answer; their images are in memory for a batch alone.
        encoder: of the policy.
        max_new_tokens: the longest response.
        temperature: 0 is greedy.
        seed: of the sampling.
        batch: problems at a time.
    """
    texts: list[str] = []
    seen: list[Problem] = []
    tokens = 0
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    source = iter(problems)
    while part := list(islice(source, batch)):
        keys = range(len(seen), len(seen) + len(part))
        seen += [replace(problem, images=(), encoding=None) for problem in part]
        rollouts = engine.generate([problem.encoded(encoder) for problem in part], sampling, seed=seed, keys=keys)
        texts += encoder.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        tokens += sum(len(r.token_ids) for r in rollouts)
    verdicts = score_batch(
        texts, [problem.answer or "" for problem in seen], [problem.equivalent_answers for problem in seen]
    )
    count = len(seen)
    perception, reasoning = _errors(seen, texts)
    drifted = drift(texts, [problem.teacher for problem in seen])
    return PolicyReport(
        samples=count,
        accuracy=sum(verdict.accuracy for verdict in verdicts) / count,
        format=sum(verdict.format for verdict in verdicts) / count,
        length=tokens / count,
        perception_error=perception,
        reasoning_error=reasoning,
        drift_perception=drifted["drift_perception"],
        drift_reasoning=drifted["drift_reasoning"],
    )


def _errors(problems: Sequence[Problem], texts: Sequence[str]) -> tuple[float, float]:
    found = [
        judge(text, problem.shape.scene, problem.shape.question)
        for problem, text in zip(problems, texts)
        if problem.shape is not None
    ]
    if len(found) < len(problems):
        return math.nan, math.nan
    return (
        sum(one.perception.wrong for one in found) / len(found),
        sum(one.reasoning.wrong for one in found) / len(found),
    )
