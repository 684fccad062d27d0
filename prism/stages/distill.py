"""Distillation, the comparison to alignment: fine-tuning on the same demonstrations."""

from prism.runtime.runtime import Runtime
from prism.stages.update import imitate


def distill(rt: Runtime) -> None:
    """Fine-tunes the policy on the teachers' responses to alignment's problems."""
    settings = rt.config.optimiser.distill
    for step in rt.steps("distill", policy=settings, show=("loss", "grad_norm")):
        problems = step.problems(settings.batch)
        step.finish(imitate(rt.policy, problems, rt.encoder, rt.policy_optimiser, rt.config.memory))
