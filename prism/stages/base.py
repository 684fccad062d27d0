"""Pretraining of the tiny policy on the embedded world's plain texts."""

from prism.runtime.runtime import Runtime
from prism.stages.update import imitate


def base(rt: Runtime) -> None:
    """Pretrains the policy, then makes the discriminator of it anew."""
    settings = rt.config.optimiser.base
    for step in rt.steps("base", policy=settings, show=("loss", "grad_norm")):
        problems = step.problems(settings.batch)
        step.finish(imitate(rt.policy, problems, rt.encoder, rt.policy_optimiser, rt.config.memory))
    rt.rebuild_discriminator()
