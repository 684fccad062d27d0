"""All settings together, and checks of their combinations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import model_validator

from prism.config.algorithms import AlgorithmSettings, OptimiserSettings
from prism.config.sections import (
    STAGES,
    CheckpointSettings,
    DataSettings,
    DiscriminatorSettings,
    EvaluationSettings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    RolloutSettings,
    RunSettings,
    Section,
)

# room in a scored response for the tags of its two segments and the tokens that end them
_TAG_TOKENS = 32


class Config(Section):
    """The settings of a run."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    rollout: RolloutSettings = RolloutSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(_impossible(self)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def score_pack_tokens(self) -> int:
        """Tokens of a pack of the discriminator: memory.score_pack_tokens, or those of the largest possible group."""
        return self.memory.score_pack_tokens or self.largest_scored_group

    @property
    def largest_scored_group(self) -> int:
        """Tokens of the longest prompt with a group of longest responses and the teacher's."""
        data = self.data
        return data.prompt_tokens + (self.rollout.align.group + 1) * (data.response_tokens + _TAG_TOKENS)

    @property
    def dynamic_prompts(self) -> int:
        """Prompts of each try of dynamic sampling in RLVR; without it, prompts of a step."""
        rule, prompts = self.algorithm.rlvr.dynamic_sampling, self.rollout.rlvr.prompts
        return prompts if rule is None else rule.generate or 3 * prompts

    @property
    def overlong_buffer(self) -> int:
        """Tokens before the limit of RLVR's responses in which the overlong penalty grows; 0: no penalty."""
        rule = self.algorithm.rlvr.overlong
        return 0 if rule is None else rule.buffer or max(self.rollout.rlvr.max_new_tokens // 2, 1)


def _positions(config: Config) -> int | None:
    """Returns the number of the policy's positions, or None if only a download would tell."""
    if config.model.policy == "tiny":
        return config.model.tiny.max_positions
    path = Path(config.model.policy) / "config.json"
    if not path.is_file():
        return None
    try:
        model = json.loads(path.read_text())
        positions = model.get("text_config", model).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, RecursionError):
        # `prism.models.families` says what is wrong with the file
        return None
    return positions if isinstance(positions, int) else None


def _impossible(config: Config) -> Iterator[str]:
    """Yields a line for each impossible combination, with the key to change."""
    yield from _stages(config)
    yield from _models(config)
    yield from _data(config)
    for stage in ("align", "rlvr"):
        if stage in config.run.stages:
            yield from _rollouts(config, stage)
    yield from _lengths(config)


def _stages(config: Config) -> Iterator[str]:
    stages = list(config.run.stages)
    if not stages:
        yield f"run.stages: expected at least one of {', '.join(STAGES)}, got none"
    elif len(set(stages)) < len(stages) or stages != sorted(stages, key=STAGES.index):
        wanted = [stage for stage in STAGES if stage in stages]
        yield f"run.stages: expected each once and in this order, {', '.join(wanted)}, got {', '.join(stages)}"
    if "base" in stages and config.data.source != "shapes":
        yield f"run.stages: expected no 'base', which pretrains on shapes, with data.source {config.data.source!r}"
    for stage in stages:
        optimiser = getattr(config.optimiser, stage)
        if stage not in ("align", "rlvr") and optimiser.batch is None:
            yield f"optimiser.{stage}.batch: expected the number of samples a step, got none"
        for key in (stage, "discriminator") if stage == "align" else (stage,):
            warmup = getattr(config.optimiser, key).warmup
            if warmup > optimiser.steps:
                yield f"optimiser.{key}.warmup: expected at most the {optimiser.steps} steps, got {warmup:g}"


def _models(config: Config) -> Iterator[str]:
    policy = config.model.policy
    if policy == "tiny" and config.model.dtype != "float32" and config.run.device == "cpu":
        yield f"model.dtype: expected 'float32' with run.device = 'cpu', got {config.model.dtype!r}"
    # a hub id has at most one slash; anything else is a folder
    for key, value in (("policy", policy), ("discriminator", config.model.discriminator)):
        folder = value not in ("tiny", "policy") and (value.count("/") > 1 or value.startswith((".", "/", "~")))
        if folder and not (Path(value) / "config.json").is_file():
            yield f"model.{key}: expected a folder with a config.json, got {value!r}"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    given = {name: list(paths) for name, paths in data.files if paths}
    if data.source == "shapes":
        if given:
            key = next(iter(given))
            yield f"data.files.{key}: expected none with data.source = 'shapes', got files; set data.source = 'files'"
        if data.shapes.sft_curated > data.shapes.alignment:
            wanted = f"at most data.shapes.alignment = {data.shapes.alignment}"
            yield f"data.shapes.sft_curated: expected {wanted}, got {data.shapes.sft_curated}"
        if config.evaluation.samples > data.shapes.validation:
            wanted = f"at most data.shapes.validation = {data.shapes.validation}"
            yield f"evaluation.samples: expected {wanted}, got {config.evaluation.samples}"
        return
    needed = {"sft": "sft", "distill": "align", "align": "align", "rlvr": "rlvr"}
    for stage in config.run.stages:
        name = needed.get(stage)
        # without files of its own, warm-up reads alignment's
        if stage == "warmup":
            name = None if "warmup" in given else "align"
        if name is not None and name not in given:
            yield f"data.files.{name}: expected files for the stage {stage!r}, got none"
    for name, paths in given.items():
        for path in paths:
            if not Path(path).exists():
                yield f"data.files.{name}: expected a file or folder, there is no {path!r}"


def _rollouts(config: Config, stage: str) -> Iterator[str]:
    sampling, batch = getattr(config.rollout, stage), getattr(config.optimiser, stage).batch
    rlvr = config.algorithm.rlvr
    absolute = stage == "rlvr" and rlvr.baseline == "none" and rlvr.scale != "std"
    if sampling.group == 1 and not absolute:
        why = "which are compared with each other"
        if stage == "align" or rlvr.scale == "std":
            why += " by a z-score"
        yield f"rollout.{stage}.group: expected at least 2 responses, {why}, got 1"
    responses = sampling.prompts * sampling.group
    if batch is not None and (batch % sampling.group or responses % batch):
        wanted = f"a multiple of rollout.{stage}.group = {sampling.group} that divides the step's {responses} responses"
        yield f"optimiser.{stage}.batch: expected {wanted}, got {batch}"
    if stage == "rlvr":
        if config.dynamic_prompts < sampling.prompts:
            wanted = f"at least rollout.rlvr.prompts = {sampling.prompts}"
            yield f"algorithm.rlvr.dynamic_sampling.generate: expected {wanted}, got {config.dynamic_prompts}"
        if config.overlong_buffer > sampling.max_new_tokens:
            wanted = f"at most rollout.rlvr.max_new_tokens = {sampling.max_new_tokens}"
            yield f"algorithm.rlvr.overlong.buffer: expected {wanted}, got {config.overlong_buffer}"


def _lengths(config: Config) -> Iterator[str]:
    data, memory, stages = config.data, config.memory, config.run.stages
    lengths = {"data.response_tokens": data.response_tokens}
    for stage in ("align", "rlvr"):
        if stage in stages:
            lengths[f"rollout.{stage}.max_new_tokens"] = getattr(config.rollout, stage).max_new_tokens
    lengths["evaluation.max_new_tokens"] = config.evaluation.max_new_tokens
    positions = _positions(config)
    for key, length in lengths.items():
        whole = data.prompt_tokens + length
        if positions is not None and whole > positions:
            room = positions - data.prompt_tokens
            wanted = f"at most {room}, the model's {positions} positions less data.prompt_tokens"
            yield f"{key}: expected {wanted}, got {length}"
    longest = data.prompt_tokens + max(length for key, length in lengths.items() if "evaluation" not in key)
    if memory.pack_tokens < longest:
        wanted = f"at least {longest}, the longest prompt with its longest response"
        yield f"memory.pack_tokens: expected {wanted}, got {memory.pack_tokens}"
    if "align" not in stages and "warmup" not in stages:
        return
    if "align" in stages and config.rollout.align.max_new_tokens > data.response_tokens:
        wanted = f"at most data.response_tokens = {data.response_tokens}, since longer responses are not scored"
        yield f"rollout.align.max_new_tokens: expected {wanted}, got {config.rollout.align.max_new_tokens}"
    if config.score_pack_tokens < config.largest_scored_group:
        wanted = f"none, or at least the largest group's {config.largest_scored_group}"
        yield f"memory.score_pack_tokens: expected {wanted}, got {config.score_pack_tokens}"
