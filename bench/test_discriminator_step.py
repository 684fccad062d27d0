"""The discriminator's step on one group of 16: the published scheme in plain transformers against ours."""

from bench.end_to_end.discriminator import PublishedScheme, SCHEMES, Group, Shape, StepOutput, make_group, token_counts
from bench.versus import Bar, Duel, Rival, Run, Values, duel_test

SHAPE = Shape()
OURS, PUBLISHED = SCHEMES


def values(output: StepOutput) -> Values:
    return {"perception": output.perception, "reasoning": output.reasoning, **output.gradients}


def loaded(name: str):
    def load(group: Group) -> Run:
        # a scheme sets the backbone's attention: each has its own
        scheme = SCHEMES[name](make_group(SHAPE))
        return lambda: values(scheme.step())

    return load


def label() -> str:
    count = token_counts(make_group(SHAPE))
    return (
        f"score + update, group of {SHAPE.responses}, prompt {SHAPE.prompt} with {SHAPE.image_tokens} image tokens, "
        f"caption {SHAPE.caption}, reasoning {SHAPE.reasoning}, fp32: "
        f"{count['packed']:,} tokens against {count['published']:,}"
    )


DUELS = (
    Duel(
        op="discriminator_step",
        label=label(),
        make=lambda: make_group(SHAPE),
        exact=lambda group: values(PublishedScheme(group).step()),
        rivals=(
            Rival(OURS, loaded(OURS), ours=True),
            Rival(PUBLISHED, loaded(PUBLISHED), package="transformers"),
        ),
        tolerance=1e-3,
        bars=(Bar(PUBLISHED, slower=6, memory_share=1.0),),
        memory=True,
        limit_s=60,
    ),
)
test_discriminator_step = duel_test(DUELS, __name__)
