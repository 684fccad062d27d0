"""What a stage stands on: models, data, optimisers, checkpoints and the log of a run."""
