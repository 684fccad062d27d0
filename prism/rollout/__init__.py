"""Rollouts: responses sampled from a policy, with the log-probabilities of their tokens."""
