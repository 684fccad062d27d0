"""The tables of a settings file, except algorithms and optimisers.

`NAMESettings` is the table [NAME]; the other classes are tables inside one. The rest of prism takes these classes as
they are, so that a value has one class, one default and one check, whether it comes from a file or from code. Tables
that models, rollouts and worlds take without pydantic are dataclasses of theirs, see `prism.ranges`.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from prism.models.sizes import TinySize
from prism.ranges import Natural, Positive, Ranged, Share
from prism.rollout.options import StageRollouts
from prism.worlds.shapes.carelessness import Carelessness

StageName = Literal["base", "sft", "distill", "warmup", "align", "rlvr"]
# the order in which a run takes them
STAGES: tuple[str, ...] = get_args(StageName)


def _none(value: Any) -> Any:
    return None if value == "none" else value


def _as_tuple(value: Any) -> Any:
    """Returns a list, or a text with commas, as a tuple, and anything else unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _as_numbers(value: Any) -> Any:
    """Returns a number as a tuple of one, a list as a tuple, and anything else unchanged."""
    return (value,) if isinstance(value, (int, float)) else _as_tuple(value)


# TOML has no null: the text "none" stands for it
NONE = BeforeValidator(_none)
# strict models take no list for a tuple; a flag may separate by commas
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_numbers)]
Two = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]


class ConfigError(ValueError):
    """Settings that cannot be used: one line for each problem, with its key."""


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _DataclassTable:
    """Marks a dataclass as a table of the file."""

    def __get_pydantic_core_schema__(self, source: type[Ranged], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Returns the schema of the dataclass that takes tables as well, whose fields stay strict."""
        optional = {field.name for field in fields(source) if field.default is None}

        def without_none(given: Any) -> Any:
            if not isinstance(given, dict):
                return given
            return {name: _none(value) if name in optional else value for name, value in given.items()}

        schema = handler(source)
        # a strict dataclass takes its instances only
        resolved: Any = handler.resolve_ref_schema(schema)
        resolved["strict"] = False
        return core_schema.no_info_before_validator_function(without_none, schema)


TABLE = _DataclassTable()


def over_defaults(cls: type[Section], given: Any) -> Any:
    """Returns tables whose missing keys are filled from the field's default, not from the defaults of its class."""
    if not isinstance(given, dict):
        return given
    defaults = {
        name: vars(field.default)
        for name, field in cls.model_fields.items()
        if isinstance(field.default, (Section, Ranged))
    }
    return {
        name: {**defaults[name], **value} if name in defaults and isinstance(value, dict) else value
        for name, value in given.items()
    }


class RunSettings(Section):
    """The run as a whole.

    Args:
        folder: The folder that gets checkpoints, metrics, models and the report.
        seed: The seed of all random numbers, except those of the embedded world (data.shapes.seed).
        stages: The stages to run, in this order: base, sft, distill, warmup, align, rlvr. `base` pretrains a tiny
            policy; `distill` fine-tunes on alignment's demonstrations, for comparison with alignment.
        device: `cpu` or `cuda`; `auto` takes a GPU if there is one.
    """

    folder: str = "runs/tiny"
    seed: Natural = 0
    stages: Annotated[tuple[StageName, ...], BeforeValidator(_as_tuple)] = ("sft", "warmup", "align", "rlvr")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ModelSettings(Section):
    """The models that training begins with.

    Args:
        policy: `tiny`, built offline with a pretrained base; or a folder or hub id of a Qwen3-VL.
        discriminator: The model to make the discriminator of: `policy` (as it is before the first stage), or a folder
            or hub id. A dense Qwen3-VL is upcycled; a Mixture-of-Experts or a discriminator is used unchanged.
        dtype: Data type of weights and activations.
        max_image_pixels: No image takes more than this width times height after scaling; none: the processor's own
            limit. Lower it to save image tokens.
        tiny: Sizes of the policy `tiny`.
    """

    policy: str = "tiny"
    discriminator: str = "policy"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_image_pixels: Annotated[Positive | None, NONE] = None
    tiny: Annotated[TinySize, TABLE] = TinySize()


class ShapesSettings(Section):
    """The embedded world: samples in each split, and the public teacher.

    Args:
        seed: Seed of the world.
        base: Plain texts for the stage `base`.
        judged: Share of the base's samples that ask whether a description or an answer is right.
        sft: Responses of the public teacher, for SFT.
        sft_curated: Alignment's demonstrations that are mixed into SFT.
        alignment: Demonstrations of the curated teacher, for distill, warmup and align.
        rl: Problems for RLVR.
        validation: Held-out problems for evaluation during training, and for choosing settings.
        test: Held-out problems for the report.
        carelessness: Error rates of the public teacher.
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
    carelessness: Annotated[Carelessness, TABLE] = Carelessness()


class DataFiles(Section):
    """JSONL or parquet files of each stage, or folders of them; `distill` reads the files of `align`.

    Args:
        sft: Chats to fine-tune on.
        warmup: Pairs of a teacher's and a student's response; without them, the policy's own responses to align's
            problems are compared with the teacher's.
        align: Problems with the teacher's responses.
        rlvr: Problems with their answers.
        validation: Held-out problems for evaluation between the stages; without them there is none.
        test: Held-out problems for evaluation before and after the last stage; without them there is none.
    """

    sft: Names = ()
    warmup: Names = ()
    align: Names = ()
    rlvr: Names = ()
    validation: Names = ()
    test: Names = ()


class DataSettings(Section):
    """The source of the samples, and which of them are used. No sample is ever truncated.

    Args:
        source: `shapes`, the embedded world; or `files`.
        prompt_tokens: Tokens of the longest prompt, including chat template and image tokens.
        response_tokens: Tokens of the longest response of a teacher or of SFT, and of the longest that is scored.
        on_error: `skip` skips and counts a row that cannot be used; `raise` stops the run.
        max_skipped: Share of skipped rows above which the run stops anyway.
        buffer: Rows that are shuffled at a time; 0 keeps the files' order. More rows shuffle better and use more
            memory.
        image_root: Folder that image paths are relative to; none: the folder of the data file.
        allow_remote_images: Whether to download images from http and https addresses.
        files: Data files of each stage, for source `files`.
        shapes: The embedded world, for source `shapes`.
    """

    source: Literal["shapes", "files"] = "shapes"
    prompt_tokens: Positive = 128
    response_tokens: Positive = 112
    on_error: Literal["skip", "raise"] = "skip"
    max_skipped: Share = 0.05
    buffer: Natural = 512
    image_root: Annotated[str | None, NONE] = None
    allow_remote_images: bool = False
    files: DataFiles = DataFiles()
    shapes: ShapesSettings = ShapesSettings()


class RolloutSettings(Section):
    """How the policy responds to prompts in training.

    Args:
        engine: `lean` decodes with prism's own kernels and cache, `stock` with transformers' model; `auto` takes
            `lean` where the model allows it.
        cache_tokens: Tokens that the key-value cache holds; none: as many as a step needs. Lower it to save memory:
            a step is then decoded in several batches.
        align: Rollouts of an alignment step.
        rlvr: Rollouts of an RLVR step.
    """

    engine: Literal["auto", "lean", "stock"] = "auto"
    cache_tokens: Annotated[Positive | None, NONE] = None
    align: Annotated[StageRollouts, TABLE] = StageRollouts(prompts=16, group=8, max_new_tokens=112)
    rlvr: Annotated[StageRollouts, TABLE] = StageRollouts(prompts=32, group=8, max_new_tokens=112)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return over_defaults(cls, given)


class DiscriminatorSettings(Section):
    """The discriminator and its loss. Its learning rates are in optimiser.warmup and optimiser.discriminator.

    Args:
        dense: Whether it is a dense model instead of a Mixture-of-Experts.
        experts: Experts of each layer.
        top_k: Experts that each token chooses.
        noise: Noise on upcycled experts, in standard deviations of each weight. Without noise they begin equal.
        router_std: Standard deviation of the routers' initial weights.
        kind_bias: Whether routers learn a bias for each kind of token (description, reasoning, ...).
        images: Whether the discriminator sees images.
        aux_coef: Factor of the load-balance loss (mean over the layers). Raise it if few experts get most tokens.
        z_coef: Factor of the routers' z loss (mean over the layers). Raise it if router logits grow large.
        regularisation: Factor of the squared scores in the loss. Raise it if scores drift away from 0.
        soft_clip: Bound c of the score difference x in the loss, c tanh(x / c); none: no bound.
        steps: Optimiser steps on each batch of rollouts in alignment. Rewards are the scores before the first.
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


class MemorySettings(Section):
    """Trade-offs of memory and time. They change results only by rounding.

    Args:
        pack_tokens: Tokens of a packed forward pass of the policy: at least the longest prompt with its response.
            Lower it if memory runs out.
        score_pack_tokens: Tokens of a packed forward pass of the discriminator, which holds a prompt's group whole;
            none: as many as the largest possible group has.
        head_cache_bytes: Bytes that the fused head may keep for its backward pass; none: it decides itself. 0 saves
            the most memory.
        fused_policy_loss: Whether the policy loss and its gradient are computed from the head chunk by chunk, so that
            alignment and RLVR keep nothing of the size of the logits. The entropy is then logged only with an entropy
            bonus.
        activation_checkpointing: Whether layers are computed again in the backward pass instead of kept.
    """

    pack_tokens: Positive = 8192
    score_pack_tokens: Annotated[Positive | None, NONE] = 8192
    head_cache_bytes: Annotated[Natural | None, NONE] = None
    fused_policy_loss: bool = False
    activation_checkpointing: bool = False


class CheckpointSettings(Section):
    """Training states, from which the same command resumes.

    Args:
        every: Steps between checkpoints; the end of a stage has one as well. A killed run repeats at most these steps.
        keep: Newest checkpoints to keep.
    """

    every: Positive = 20
    keep: Positive = 2


class LogSettings(Section):
    """Output besides metrics.jsonl.

    Args:
        console: `auto` shows a progress bar on a terminal and a line per step elsewhere; `lines` always shows lines;
            `quiet` shows nothing.
        rollouts_every: Steps between the steps whose rollouts are written to rollouts/; 0: never.
        stall_seconds: A step, an evaluation or a checkpoint that takes longer says on the console what it waits for,
            once for each such time.
    """

    console: Literal["auto", "lines", "quiet"] = "auto"
    rollouts_every: Natural = 1
    stall_seconds: Annotated[float, Field(gt=0)] = 600.0


class EvaluationSettings(Section):
    """Evaluation on held-out problems, before the first stage and after each.

    Args:
        samples: Problems of validation. Before and after the last stage all of test are evaluated as well.
        every: Steps between evaluations within a stage; 0: none within a stage.
        max_new_tokens: Tokens of the longest response.
        temperature: Temperature of the responses; 0 is greedy.
        sampled: Whether each problem gets a second response, at temperature 1.
    """

    samples: Positive = 256
    every: Natural = 0
    max_new_tokens: Positive = 112
    temperature: Annotated[float, Field(ge=0)] = 0.0
    sampled: bool = True
