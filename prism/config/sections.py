"""The tables of the file, but for the algorithms: what may be set, with defaults."""

from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from prism.config.types import NONE, Names, Natural, Positive, Section, Share, Two, as_tuple

StageName = Literal["base", "sft", "distill", "warmup", "align", "rlvr"]
# the order in which a run takes them
STAGES: tuple[str, ...] = get_args(StageName)


def _over_defaults(cls: type[Section], given: Any) -> Any:
    """Returns tables with the keys that they lack taken from the default of the table, not of its type."""
    if not isinstance(given, dict):
        return given
    defaults = {
        name: dict(field.default) for name, field in cls.model_fields.items() if isinstance(field.default, Section)
    }
    return {
        name: {**defaults[name], **value} if name in defaults and isinstance(value, dict) else value
        for name, value in given.items()
    }


class Run(Section):
    """The run as a whole.

    Args:
        folder: that gets checkpoints, metrics and the report.
        seed: of everything that is drawn, but for the embedded world, which has its own.
        stages: of base, sft, distill, warmup, align, rlvr those that are run, in this order. `base` pretrains a tiny
            policy; `distill` is the comparison, fine-tuning on alignment's demonstrations.
        device: `auto` is a GPU where there is one.
    """

    folder: str = "runs/tiny"
    seed: Natural = 0
    stages: Annotated[tuple[StageName, ...], BeforeValidator(as_tuple)] = ("sft", "warmup", "align", "rlvr")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Tiny(Section):
    """Sizes of the tiny policy: see `prism.models.tiny.TinySize`."""

    vocab_size: Positive = 1024
    hidden_size: Positive = 96
    intermediate_size: Positive = 256
    layers: Positive = 3
    heads: Positive = 4
    key_value_heads: Positive = 2
    head_dim: Annotated[int, Field(gt=0, multiple_of=16)] = 32
    vision_hidden_size: Positive = 64
    vision_layers: Positive = 2
    vision_heads: Positive = 2
    patch_size: Positive = 16
    image_side: Positive = 256
    max_positions: Positive = 4096


class Model(Section):
    """What is trained.

    Args:
        policy: `tiny`, built and pretrained offline; or a folder or hub id of a Qwen3-VL.
        discriminator: what it is upcycled from: `policy` (the policy before the first stage), or a folder or hub id of
            a dense Qwen3-VL. A Mixture-of-Experts there is taken as it is.
        dtype: of weights and activations.
        max_image_pixels: images are scaled down to this width times height; none: as the processor says.
        tiny: sizes.
    """

    policy: str = "tiny"
    discriminator: str = "policy"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_image_pixels: Annotated[Positive | None, NONE] = None
    tiny: Tiny = Tiny()


class Carelessness(Section):
    """How often the public teacher errs: see `prism.worlds.shapes.world.Carelessness`."""

    colour: Share = 0.80
    dropped: Share = 0.80
    invented: Share = 0.01
    kind: Share = 0.02
    place: Share = 0.01
    reasoning: Share = 0.20
    careful_style: Share = 0.50

    @model_validator(mode="after")
    def _check(self) -> Self:
        slips = self.invented + self.kind + self.place
        if slips > 1:
            raise ValueError(f"invented: expected invented, kind and place to sum to <= 1, got {slips:g}")
        return self


class Shapes(Section):
    """The embedded world: how many samples of each split.

    Args:
        seed: of the world.
        base: plain texts, for `base`.
        judged: the share of the base's samples that ask whether a description or an answer is right.
        sft: responses of the public teacher.
        sft_curated: how many of alignment's demonstrations are mixed into SFT.
        alignment: demonstrations of the curated teacher, for distill, warmup and align.
        rl: problems.
        validation: held out, for evaluation while training and for choosing settings.
        test: held out, for the report.
        carelessness: of the public teacher.
    """

    seed: Natural = 0
    base: Positive = 131072
    judged: Share = 0.5
    sft: Positive = 8192
    sft_curated: Natural = 0
    alignment: Positive = 2048
    rl: Positive = 2048
    validation: Positive = 512
    test: Positive = 1024
    carelessness: Carelessness = Carelessness()


class Files(Section):
    """JSONL and parquet files, or folders of them, of each stage; `distill` reads those of `align`.

    The schemas: chat (sft), pairs (warmup), problems (the rest). Without files of its own, warmup compares the policy's
    responses to align's problems with the teacher's. Without validation or test there is no such evaluation.
    """

    sft: Names = ()
    warmup: Names = ()
    align: Names = ()
    rlvr: Names = ()
    validation: Names = ()
    test: Names = ()


class Data(Section):
    """Where samples come from, and which are taken. Nothing is ever cut.

    Args:
        source: `shapes` (embedded) or `files`.
        prompt_tokens: the longest prompt, its image tokens included.
        response_tokens: the longest response of a teacher or of SFT; and of the policy, to be scored.
        on_error: a row that cannot be used is skipped and counted, or stops the run.
        max_skipped: the share of skipped rows that stops the run even so.
        buffer: how many rows are shuffled at a time; 0: the files' order.
        image_root: what paths of images are relative to; none: their data file's folder.
        allow_remote_images: whether http and https addresses are opened.
        files: see there.
        shapes: see there.
    """

    source: Literal["shapes", "files"] = "shapes"
    prompt_tokens: Positive = 128
    response_tokens: Positive = 112
    on_error: Literal["skip", "raise"] = "skip"
    max_skipped: Share = 0.05
    buffer: Natural = 512
    image_root: Annotated[str | None, NONE] = None
    allow_remote_images: bool = False
    files: Files = Files()
    shapes: Shapes = Shapes()


class Sampling(Section):
    """Rollouts of a step.

    Args:
        prompts: a step.
        group: rollouts of each prompt.
        max_new_tokens: the longest response.
        temperature: what logits are divided by.
        top_p: the smallest set of tokens that reaches this probability.
        top_k: this many of the most probable tokens; none: all.
    """

    prompts: Positive
    group: Positive
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Positive | None, NONE] = None


class RolloutSection(Section):
    """How the policy answers.

    Args:
        engine: a path of `prism.rollout.Engine`; `auto` is the lean one where the model allows it.
        cache_tokens: the most tokens that the cache holds; none: as many as a step needs.
        align: rollouts of alignment.
        rlvr: rollouts of RLVR.
    """

    engine: Literal["auto", "lean", "stock"] = "auto"
    cache_tokens: Annotated[Positive | None, NONE] = None
    align: Sampling = Sampling(prompts=16, group=8, max_new_tokens=112)
    rlvr: Sampling = Sampling(prompts=32, group=8, max_new_tokens=112)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return _over_defaults(cls, given)


class Discriminator(Section):
    """The scorer and its loss. Its learning rates are in optimiser.warmup and optimiser.discriminator.

    Args:
        dense: a dense model instead of experts.
        experts: of each layer.
        top_k: experts that a token chooses.
        noise: of the upcycled experts, in standard deviations of each weight.
        router_std: of the router's first weights.
        kind_bias: whether routers learn a bias for each kind of token.
        images: whether it sees images.
        aux_coef: of the load-balance loss.
        z_coef: of the router's z loss.
        regularisation: of raw scores, L2.
        soft_clip: of scores in the loss; none: no clip.
        steps: optimiser steps on each batch of rollouts; only the first one's scores are rewards.
    """

    dense: bool = False
    experts: Positive = 4
    top_k: Positive = 2
    noise: Annotated[float, Field(ge=0)] = 0.01
    router_std: Annotated[float, Field(ge=0)] = 0.006
    kind_bias: bool = False
    images: bool = True
    aux_coef: Annotated[float, Field(ge=0)] = 0.01
    z_coef: Annotated[float, Field(ge=0)] = 0.0
    regularisation: Annotated[float, Field(ge=0)] = 1e-3
    soft_clip: Annotated[Annotated[float, Field(gt=0)] | None, NONE] = 10.0
    steps: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dense and self.kind_bias:
            raise ValueError("kind_bias: expected false with dense = true, which has no routers, got true")
        if not self.dense and self.top_k > self.experts:
            raise ValueError(f"top_k: expected at most experts = {self.experts}, got {self.top_k}")
        return self


class Adam(Section):
    """AdamW, and how its learning rate goes.

    Args:
        name: `adamw` holds fp32 copies of weights that have fewer bits, which would lose small updates. Without copies
            (torchao): `adamw_bf16` rounds updates up or down by chance, `adamw8bit` has moments of 8 bits as well.
        lr: the highest.
        schedule: after the warm-up; `linear` and `cosine` end at 0.
        warmup: below 1 the share of the steps with a rising rate, else their number.
        betas: of the moments.
        eps: added to the root of the second.
        weight_decay: decoupled.
        clip_norm: gradients are scaled down to this norm.
        freeze_vision: whether vision tower and projector stay as they are.
    """

    name: Literal["adamw", "adamw8bit", "adamw_bf16"] = "adamw"
    lr: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    betas: Two = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    freeze_vision: bool = False

    def warmup_steps(self, steps: int) -> int:
        """Returns for how many of the steps the learning rate rises."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {list(self.betas)}")
        if self.name != "adamw" and find_spec("torchao") is None:
            raise ValueError(
                f"name: expected 'adamw' without torchao (pip install 'prism-kernels[ao]'), got {self.name!r}"
            )
        return self


class Optimiser(Adam):
    """That of a stage.

    Args:
        steps: of the optimiser; where a step begins with rollouts, of rollouts.
        batch: samples of a step (in warmup: pairs of responses, each compared in both channels). With rollouts: how
            many responses make an optimiser step; none: all, so that there is one and the policy is the one that
            sampled.
    """

    steps: Positive
    batch: Annotated[Positive | None, NONE] = None


class Warmup(Optimiser):
    """That of the discriminator's warm-up.

    Args:
        head_rate: the learning rate of the value head is so many times `lr`. The head begins at 0: what the backbone
            knows should be found before it is bent.
    """

    head_rate: Annotated[float, Field(gt=0)] = 1.0


class Optimisers(Section):
    """One for each stage; `discriminator` is the discriminator's in alignment, warmup before it."""

    base: Optimiser = Optimiser(lr=2e-3, schedule="cosine", warmup=0.1, steps=600, batch=64)
    sft: Optimiser = Optimiser(lr=2e-3, schedule="cosine", warmup=0.1, steps=400, batch=64)
    distill: Optimiser = Optimiser(lr=5e-4, schedule="cosine", warmup=0.1, steps=60, batch=64)
    warmup: Warmup = Warmup(lr=2e-4, schedule="cosine", warmup=0.1, steps=60, batch=48, head_rate=25)
    align: Optimiser = Optimiser(lr=1e-4, schedule="linear", steps=50)
    discriminator: Adam = Adam(lr=1e-3)
    rlvr: Optimiser = Optimiser(lr=1.5e-4, steps=40)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return _over_defaults(cls, given)


class Memory(Section):
    """What is kept and what is computed again.

    Args:
        pack_tokens: of a pack of the policy.
        score_pack_tokens: of a pack of the discriminator, which holds a prompt's group whole; none: as many as the
            largest possible group has.
        head_cache_bytes: what the fused head may keep for its backward pass; none: its own choice.
        fused_policy_loss: compute the policy loss and its gradient from the head chunk by chunk, so that alignment and
            RLVR keep nothing of the size of the logits. The entropy is then logged only with an entropy bonus.
        activation_checkpointing: layers are computed again in the backward pass.
    """

    pack_tokens: Positive = 8192
    score_pack_tokens: Annotated[Positive | None, NONE] = 8192
    head_cache_bytes: Annotated[Natural | None, NONE] = None
    fused_policy_loss: bool = False
    activation_checkpointing: bool = False


class Checkpoint(Section):
    """Training states.

    Args:
        every: steps; the end of a stage has one as well.
        keep: the newest of them.
    """

    every: Positive = 20
    keep: Positive = 2


class Log(Section):
    """What is told beside metrics.jsonl.

    Args:
        console: `auto` is a progress bar on a terminal and one line a step elsewhere; `lines`; or `quiet`.
        rollouts_every: steps after which a step's rollouts are written; 0: never.
    """

    console: Literal["auto", "lines", "quiet"] = "auto"
    rollouts_every: Natural = 1


class Evaluation(Section):
    """Held-out samples, before the first stage and after each.

    Args:
        samples: how many, of validation; before and after the last stage all of test as well.
        every: steps, also within a stage; 0: never.
        max_new_tokens: the longest response.
        temperature: 0 is greedy.
        sampled: whether a response at temperature 1 is judged as well.
    """

    samples: Positive = 256
    every: Natural = 0
    max_new_tokens: Positive = 112
    temperature: Annotated[float, Field(ge=0)] = 0.0
    sampled: bool = True
