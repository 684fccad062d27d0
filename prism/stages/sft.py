"""Fine-tuning on demonstrations, and the pretraining of the tiny policy in the same way."""

from prism.config import StageAdam
from prism.runtime.runtime import Runtime
from prism.stages.update import imitate


def sft(rt: Runtime) -> None:
    """Fine-tunes the policy on demonstrations."""
    _fine_tune(rt, "sft", rt.config.optimiser.sft)


def base(rt: Runtime) -> None:
    """Pretrains the policy on the embedded world's plain texts, then makes the discriminator of it anew."""
    _fine_tune(rt, "base", rt.config.optimiser.base)
    rt.rebuild_discriminator()


def _fine_tune(rt: Runtime, stage: str, settings: StageAdam) -> None:
    for step in rt.steps(stage, policy=settings, show=("loss", "grad_norm")):
        problems = step.problems(settings.batch)
        step.finish(imitate(rt.policy, problems, rt.encoder, rt.policy_optimiser, rt.config.memory))
