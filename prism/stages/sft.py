"""Fine-tuning on demonstrations."""

from prism.runtime.runtime import Runtime
from prism.stages.update import imitate


def sft(rt: Runtime) -> None:
    """Fine-tunes the policy on demonstrations."""
    settings = rt.config.optimiser.sft
    for step in rt.steps("sft", policy=settings, show=("loss", "grad_norm")):
        problems = step.problems(settings.batch)
        step.finish(imitate(rt.policy, problems, rt.encoder, rt.policy_optimiser, rt.config.memory))
