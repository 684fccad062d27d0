"""The built-in reward: 0.8 for a right answer, 0.2 for the format. Only a valid response's answer is read."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prism.rewards.equivalence import equivalent
from prism.rewards.workers import Workers, shared_workers
from prism_kernels.grammar import parse_response

ACCURACY_WEIGHT = 0.8
FORMAT_WEIGHT = 0.2
# most comparisons take milliseconds; custom rewards have the same limit
TIMEOUT_S = 5.0
# an expression such as 9^9^9 takes the machine's memory before its time is over
MEMORY_BYTES = 4 << 30
ALGEBRA = "prism.rewards.algebra"

# reasons of verdicts that a verifier failed to give
FAILURES = ("timeout", "crash", "memory", "error")

_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """The score of a response, and the reason."""

    # 0.8 accuracy + 0.2 format
    score: float
    # 1.0: the answer is right; 0.0: it is wrong, or the response is invalid
    accuracy: float
    # 1.0: the response is valid
    format: float
    # "right" or "wrong"; of an invalid response the grammar's `Reason` in lower case; where a verifier gave no verdict
    # one of FAILURES
    reason: str


def score_response(response: str, ground_truth: str, equivalent_answers: Sequence[str] | None = ()) -> dict[str, float]:
    """Returns {"score", "accuracy", "format"} of one response: score = 0.8 accuracy + 0.2 format.

    A valid response is `<caption>…</caption><think>…</think><answer>…</answer>`: each tag once, no section empty, no
    text around them; see `prism_kernels.grammar`. Accuracy and score of an invalid response are 0: its answer is not
    read. `prism.rewards.equivalence` says which answers are right.

    Algebra runs in a worker process within TIMEOUT_S. A hang, a crash or an error counts as a wrong answer and is
    logged as a warning. For many responses `score_batch` is faster.

    Args:
        response: the policy's whole response.
        ground_truth: the right answer, as in the data set.
        equivalent_answers: other right answers.
    """
    verdict = _score([response], [ground_truth], [equivalent_answers], TIMEOUT_S, None, "score_response")[0]
    return {"score": verdict.score, "accuracy": verdict.accuracy, "format": verdict.format}


def score_batch(
    responses: Sequence[str],
    ground_truths: Sequence[str],
    equivalent_answers: Sequence[Sequence[str] | None] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    workers: Workers | None = None,
) -> list[Verdict]:
    """Returns the verdict of each response: `score_response` with the reason.

    Args:
        responses: the policy's whole responses.
        ground_truths: the right answer of each.
        equivalent_answers: other right answers of each; None: there are none.
        timeout_s: seconds for one comparison. After that the answer is wrong, with the reason "timeout".
        workers: processes for algebra; None: workers that this process shares.
    """
    others = [()] * len(responses) if equivalent_answers is None else equivalent_answers
    for name, given in (("ground_truths", ground_truths), ("equivalent_answers", others)):
        if len(given) != len(responses):
            raise ValueError(
                f"score_batch: expected {name} for each of the {len(responses)} responses, got {len(given)}"
            )
    return _score(responses, ground_truths, others, timeout_s, workers, "score_batch")


def verifier_workers(count: int | None = None) -> Workers:
    """Returns new workers for `score_batch`, which the caller closes."""
    return Workers(count, preload=[ALGEBRA], memory_bytes=MEMORY_BYTES)


def judge(golds: Sequence[str], answer: str) -> bool:
    """Returns whether an answer is right, with algebra and without a time limit: runs in a worker."""
    # SymPy takes half a second to import, and only workers need it
    from prism.rewards.algebra import same_expression

    return bool(equivalent(golds, answer, same_expression))


def _score(
    responses: Sequence[str],
    ground_truths: Sequence[str],
    equivalent_answers: Sequence[Sequence[str] | None],
    timeout_s: float,
    workers: Workers | None,
    name: str,
) -> list[Verdict]:
    verdicts: list[Verdict | None] = []
    # comparisons for algebra: index of the response, the right answers, the answer
    open_questions: list[tuple[int, tuple[str, ...], str]] = []
    for i, (text, truth, others) in enumerate(zip(responses, ground_truths, equivalent_answers)):
        golds = _right_answers(name, truth, others)
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a response to be text, got {type(text).__name__}")
        sections, reason = parse_response(text)
        if sections is None:
            verdicts.append(Verdict(0.0, 0.0, 0.0, reason.name.lower()))
            continue
        try:
            right = equivalent(golds, sections.answer, None)
        # whatever goes wrong with one sample must not end the run
        except Exception as error:
            why = f"error: {type(error).__name__}: {error}"
            _log.warning("%s: no verdict on %.200r for %.200r: %.200s", name, sections.answer, golds[0], why)
            verdicts.append(_verdict(False, "error"))
            continue
        verdicts.append(None if right is None else _verdict(right, "right" if right else "wrong"))
        if right is None:
            open_questions.append((i, golds, sections.answer))
    if open_questions:
        pool = shared_workers([ALGEBRA], MEMORY_BYTES) if workers is None else workers
        calls = [(golds, answer) for _, golds, answer in open_questions]
        results = pool.map("prism.rewards.grade:judge", calls, timeout_s)
        for (i, golds, answer), result in zip(open_questions, results):
            if result.reason:
                _log.warning("%s: no verdict on %.200r for %.200r: %s", name, answer, golds[0], result.reason)
            right = not result.reason and result.value
            verdicts[i] = _verdict(right, result.reason or ("right" if right else "wrong"))
    return [verdict for verdict in verdicts if verdict is not None]


def _verdict(right: bool, reason: str) -> Verdict:
    return Verdict(ACCURACY_WEIGHT * right + FORMAT_WEIGHT, float(right), 1.0, reason)


def _right_answers(name: str, ground_truth: str, equivalent_answers: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(equivalent_answers, str):
        raise TypeError(
            f"{name}: expected equivalent_answers to be a list of texts, got the text {equivalent_answers!r}"
        )
    golds = (ground_truth, *(() if equivalent_answers is None else equivalent_answers))
    for gold in golds:
        if not isinstance(gold, str):
            raise TypeError(f"{name}: expected right answers to be text, got {type(gold).__name__}")
        if not gold.strip():
            raise ValueError(f"{name}: expected right answers that are not empty, got {gold!r}")
    return golds
