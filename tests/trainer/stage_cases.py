"""A stand-in for a run, so that a stage takes steps on models and rollouts that a test has made."""

from types import SimpleNamespace


class FixedRun(SimpleNamespace):
    """The parts of a run that a stage reads. Its rollouts are given; each step's metrics are kept.

    Args:
        config: the settings.
        batch: the rollouts of every step.
        steps: number of steps.
        parts: models and optimisers, by the names that `prism.runtime.runtime.Runtime` gives them.
    """

    def __init__(self, config, batch, steps=1, **parts):
        super().__init__(
            config=config,
            batch=batch,
            count=steps,
            metrics=[],
            **{"reference": None, **parts},
        )

    def steps(self, stage, *, policy=None, discriminator=None, reference=False, show=()):
        # what a stage trains is what it has an optimiser for
        assert (policy is None) == (getattr(self, "policy_optimiser", None) is None)
        assert (discriminator is None) == (getattr(self, "discriminator_optimiser", None) is None)
        assert reference == (self.reference is not None)
        for _ in range(self.count):
            yield SimpleNamespace(
                seed=0,
                problems=lambda count: self.batch.problems,
                version=lambda model: {"model": model, "stage": stage, "step": 0},
                finish=self.finish,
            )

    def finish(self, metrics, batch=None, columns=None, scored_by=None):
        assert all(len(values) == len(batch.rollouts) for values in (columns or {}).values())
        self.metrics.append(metrics)

    def generate(self, problems, sampling, seed):
        return self.batch
