"""A policy measured on held-out problems: accuracy, format, length, drift, and exact errors in the embedded world."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

from prism.data.drift import drift
from prism.data.problem import Problem
from prism.models.prompts import PromptEncoder
from prism.rewards import score_batch
from prism.rollout.engine import Engine
from prism.rollout.sampling import Sampling
from prism.worlds.shapes.counters import judge


@dataclass(frozen=True)
class PolicyReport:
    """Figures of a policy, as shares of the samples unless said otherwise.

    The errors are NaN outside the embedded world, drift is NaN without teachers. An answer that follows from a wrong
    caption is an error of perception alone. A response without a valid form counts as wrong in everything.
    """

    samples: int
    accuracy: float
    format: float
    # mean number of tokens of a response
    length: float
    perception_error: float
    reasoning_error: float
    # Wasserstein distances to the teachers, in caption items and in reasoning steps
    drift_perception: float
    drift_reasoning: float

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)

    def as_json(self) -> dict[str, float]:
        """Returns the finite figures, with the accuracy's standard error."""
        figures = {**asdict(self), "accuracy_se": self.standard_error}
        return {name: value for name, value in figures.items() if math.isfinite(value)}


def evaluate(
    engine: Engine,
    problems: Iterable[Problem],
    encoder: PromptEncoder,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch: int = 128,
) -> PolicyReport:
    """Returns the figures of a policy from one response to each problem.

    Args:
        engine: generates the policy's responses.
        problems: problems with answers; the images of only one batch are in memory at a time.
        encoder: encodes prompts for the policy.
        max_new_tokens: length of the longest response.
        temperature: sampling temperature; 0 is greedy.
        batch: number of problems answered at a time.
    """
    texts: list[str] = []
    answered: list[Problem] = []
    tokens = 0
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    source = iter(problems)
    while part := list(islice(source, batch)):
        keys = range(len(answered), len(answered) + len(part))
        answered += [replace(problem, images=(), encoding=None) for problem in part]
        rollouts = engine.generate([problem.encoded(encoder) for problem in part], sampling, keys=keys)
        texts += encoder.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        tokens += sum(len(r.token_ids) for r in rollouts)
    verdicts = score_batch(
        texts, [problem.answer or "" for problem in answered], [problem.equivalent_answers for problem in answered]
    )
    count = len(answered)
    perception, reasoning = _errors(answered, texts)
    drifted = drift(texts, [problem.teacher for problem in answered])
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
    """Returns the shares of responses with errors of perception and of reasoning."""
    judgements = [
        judge(text, problem.shape.scene, problem.shape.question)
        for problem, text in zip(problems, texts)
        if problem.shape is not None
    ]
    if len(judgements) < len(problems):
        return math.nan, math.nan
    return (
        sum(one.perception.wrong for one in judgements) / len(judgements),
        sum(one.reasoning.wrong for one in judgements) / len(judgements),
    )
