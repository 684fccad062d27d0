"""Rewards of rule and own rewards: the strict format of a response, and whether its answer is right.

Neither torch nor SymPy is imported here; algebra runs in worker processes.
"""

from prism.rewards.custom import Reward, Rewards, evaluate_reward, load_reward
from prism.rewards.grade import Verdict, score_batch, score_response, verifier_workers
from prism.rewards.workers import JobResult, Workers

__all__ = [
    "JobResult",
    "Reward",
    "Rewards",
    "Verdict",
    "Workers",
    "evaluate_reward",
    "load_reward",
    "score_batch",
    "score_response",
    "verifier_workers",
]
