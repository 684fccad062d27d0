"""What a policy does on held-out problems: accuracy, format, length, and in the embedded world its errors, exactly."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prism.data.shapes import judge
from prism.models.prompts import PromptEncoder
from prism.problems import Problem
from prism.rewards import score_batch
from prism.rollout.engine import Engine
from prism.rollout.sampling import Sampling


@dataclass(frozen=True)
class Report:
    """Shares over the samples. The errors are those of the embedded world, NaN elsewhere.

    An answer that follows from a wrong caption is an error of perception alone; a response without a valid form counts
    as wrong in everything.
    """

    samples: int
    accuracy: float
    format: float
    length: float
    perception_error: float
    reasoning_error: float

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)

    def as_json(self) -> dict[str, float]:
        """Returns the figures with the accuracy's standard error."""
        return {**asdict(self), "accuracy_se": self.standard_error}


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 128,
) -> Report:
    """Returns what one response to each problem shows.

    Args:
        engine: of the policy.
        problems: each with its answer.
        encoder: of the policy.
        max_new_tokens: the longest response.
        temperature: 0 is greedy.
        seed: of the sampling.
        batch: problems at a time.
    """
    texts: list[str] = []
    tokens = 0
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        keys = range(start, start + len(part))
        rollouts = engine.generate([problem.encoded(encoder) for problem in part], sampling, keys=keys)
        texts += encoder.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        tokens += sum(len(r.token_ids) for r in rollouts)
    verdicts = score_batch(
        texts, [problem.answer or "" for problem in problems], [problem.equivalent_answers for problem in problems]
    )
    count = len(problems)
    perception, reasoning = _errors(problems, texts)
    return Report(
        samples=count,
        accuracy=sum(verdict.accuracy for verdict in verdicts) / count,
        format=sum(verdict.format for verdict in verdicts) / count,
        length=tokens / count,
        perception_error=perception,
        reasoning_error=reasoning,
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
