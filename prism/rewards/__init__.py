"""Rewards of responses: the strict format, the right answer, and custom rewards.

Neither torch nor SymPy is imported here; algebra runs in worker processes.
"""

from prism.rewards.custom import ProblemView, Reward, Rewards, RolloutView, join_rewards, reward_versions, rewards_of
from prism.rewards.grade import Verdict, score_batch, score_response, verifier_workers
from prism.rewards.workers import JobResult, Workers

__all__ = [
    "JobResult",
    "ProblemView",
    "Reward",
    "Rewards",
    "RolloutView",
    "Verdict",
    "Workers",
    "join_rewards",
    "reward_versions",
    "rewards_of",
    "score_batch",
    "score_response",
    "verifier_workers",
]
