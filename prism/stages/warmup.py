"""Warm-up of the discriminator on pairs of a response and its teacher's, before it plays against the policy."""

from dataclasses import replace

from prism.discriminator.score import prepare_groups, sample_of, score_limits
from prism.discriminator.training import discriminator_step
from prism.runtime.runtime import Runtime


def warmup(rt: Runtime) -> None:
    """Trains the discriminator on given responses, or else on the policy's, against their teachers'."""
    settings = rt.config.optimiser.warmup
    sampling = replace(rt.config.rollout.align, group=1)
    discriminator, limits = rt.discriminator, score_limits(rt.config)
    show = ("d_loss", "d_accuracy_perception", "d_accuracy_reasoning")
    for step in rt.steps("warmup", discriminator=settings, show=show):
        problems = step.problems(settings.batch)
        given = [problem.student for problem in problems if problem.student is not None]
        if len(given) == len(problems):
            prompts, responses = [problem.encoded(rt.encoder) for problem in problems], given
        else:
            batch = rt.generate(problems, sampling, step.seed)
            prompts, responses = batch.prompts, batch.texts
        samples = [
            sample_of(problem, [response], prompt if discriminator.images else None)
            for problem, prompt, response in zip(problems, prompts, responses)
        ]
        groups = prepare_groups(samples, rt.encoder, limits, images=discriminator.images)
        result = discriminator_step(discriminator, groups, rt.discriminator_optimiser, rt.config.discriminator)
        step.finish({**result.metrics(), "skipped": float(result.skipped is not None)})
