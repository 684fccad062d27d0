"""A reward of your own for RLVR: a right answer earns more with fewer steps of reasoning. In the repository's folder:

    python -m prism rlvr --config configs/tiny.toml --algorithm.rlvr.rewards docs.examples.my_reward:brevity

The built-in score of answer and format stays; `algorithm.rlvr.verifier_weight` and `reward_weights` weigh the two. A
reward runs in a worker process with a time limit, so an exception or a hang costs one rollout this reward, not the run.
"""

from prism.rewards import ProblemView, RolloutView
from prism_kernels.grammar import reasoning_steps


def brevity(rollout: RolloutView, problem: ProblemView) -> float | None:
    """Returns 0.2 divided by the number of steps; None, which counts as 0, for a wrong or invalid response.

    Args:
        rollout: the response: `text`, `tokens`, `accuracy`, `sections`, `answer`.
        problem: its problem: `id`, `prompt`, `ground_truth`, `equivalent_answers`, `data_source`.
    """
    if rollout.sections is None or rollout.accuracy < 1:
        return None
    return 0.2 / max(1, reasoning_steps(rollout.sections.think))
