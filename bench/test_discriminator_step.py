"""The discriminator's step on one group of 16, ours against the published scheme in plain transformers; on a GPU at
true size, with random weights."""

from collections.abc import Callable

from bench.end_to_end.discriminator import (
    SCHEMES,
    TRUE_SHAPE,
    Group,
    PackedScheme,
    PublishedScheme,
    Shape,
    StepOutput,
    make_group,
    make_true_group,
    part_of,
)
from bench.versus import Bar, Duel, Rival, Run, Values, duel_test
from prism_kernels.packing import plan_tokens

SHAPE = Shape()
OURS, PUBLISHED = SCHEMES
# the responses of the published step at true size: one micro-batch
PART = 4


def values(output: StepOutput) -> Values:
    return {"perception": output.perception, "reasoning": output.reasoning, **output.gradients}


def loaded(name: str):
    def load(group: Group) -> Run:
        # a scheme sets the backbone's attention, so each scheme has its own backbone
        scheme = SCHEMES[name](make_group(SHAPE))
        return lambda: values(scheme.step())

    return load


def label(shape: Shape, dtype: str) -> str:
    count = plan_tokens(
        shape.prompt, [(shape.caption, shape.reasoning)] * shape.responses, (shape.caption, shape.reasoning)
    )
    return (
        f"score + update, group of {shape.responses}, prompt {shape.prompt} with {shape.image_tokens} image tokens, "
        f"caption {shape.caption}, reasoning {shape.reasoning}, {dtype}: "
        f"{count.packed:,} tokens against {count.published + count.published_scoring:,}"
    )


def scores_alone(output: StepOutput) -> Values:
    return {"perception": output.perception, "reasoning": output.reasoning}


def exact_scores(make: Callable[[], Group]) -> Values:
    """The scores of the same weights in fp32, with true fp32 matrix products; in fp64 they would not fit."""
    group = make()
    group.backbone.float()
    caption, reasoning = PublishedScheme(group).scoring_pass()
    return {"perception": caption, "reasoning": reasoning}


def cuda_duel(make: Callable[[], Group] = make_true_group, shape: Shape = TRUE_SHAPE, device: str = "cuda") -> Duel:
    """The step at true size. Each rival has the GPU to itself; the first two recompute layers and fit into 80 GB."""

    def packed(checkpointed: bool) -> Callable[[None], Run]:
        def load(_: None) -> Run:
            scheme = PackedScheme(make(), checkpointed)
            return lambda: scores_alone(scheme.step())

        return load

    def published(checkpointed: bool) -> Callable[[None], Run]:
        def load(_: None) -> Run:
            scheme = PublishedScheme(part_of(make(), PART), checkpointed)
            return lambda: scores_alone(scheme.step())

        return load

    share = PART / shape.responses
    again = ", layers computed again"
    return Duel(
        op="discriminator_step",
        label=f"Qwen3-VL-2B x 4 experts, {label(shape, 'bf16')}",
        make=lambda: None,
        exact=lambda _: exact_scores(make),
        rivals=(
            Rival(f"{OURS}{again}", packed(True), ours=True),
            Rival(f"{PUBLISHED}{again}", published(True), package="transformers", share=share),
            Rival(OURS, packed(False), ours=True),
            Rival(PUBLISHED, published(False), package="transformers", share=share),
        ),
        # in 16 bits near-ties of 28 routers flip; unrelated scores would be off by 1.4
        tolerance=0.5,
        bars=(Bar(f"{PUBLISHED}{again}", slower=6),),
        memory=True,
        limit_s=5.0,
        rounds=(2, 5),
        device=device,
        apart=True,
    )


DUELS = (
    Duel(
        op="discriminator_step",
        label=label(SHAPE, "fp32"),
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
CUDA_DUELS = (cuda_duel(),)
test_discriminator_step = duel_test(DUELS, __name__)
