"""A training step of the discriminator: the published four-forward scheme in plain transformers, and a packed group.

The published step scores caption and reasoning of each response separately. Then it runs, for each micro-batch, student
captions, student reasoning, teacher captions and teacher reasoning, each with its own copy of prompt and image; the
teacher's texts run once for every response. S responses of a group, T tokens.

The model is tiny; on a GPU it has the size of Qwen3-VL-2B with four experts a layer, in bf16. Its weights are random.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModel, Qwen3VLMoeConfig

from prism.discriminator.model import Discriminator
from prism.discriminator.score import PreparedGroups, ScorePack
from prism.discriminator.training import discriminator_step
from prism.models.sizes import TinyMoeSize
from prism.models.tiny import tiny_discriminator_base
from prism.models.vocabulary import IMAGE_TOKEN
from prism.runtime.optimiser import GuardedOptimiser
from prism_kernels.packing import Branch, Kind, PrefixGroup, pack_groups

# the micro-batch of the published training step
MICRO_BATCH = 4
# without the terms that the published loss lacks, so both have the same gradient
PLAIN_LOSS = SimpleNamespace(aux_coef=0.0, z_coef=0.0, regularisation=0.0, soft_clip=None)
SIZE = TinyMoeSize(
    hidden_size=256, intermediate_size=768, layers=4, expert_intermediate_size=512, vision_hidden_size=128, experts=4
)


# Qwen3-VL-2B with each MLP four times
TRUE_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 6144,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
TRUE_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
TRUE_IMAGE_TOKEN = 151655


@dataclass(frozen=True)
class Shape:
    """The lengths of one group in tokens."""

    responses: int = 16
    prompt: int = 256
    # patches along each side of the square image; the number of tokens is a quarter of the number of patches
    image_side: int = 16
    caption: int = 40
    reasoning: int = 160
    # patches along the other side, if the image is not square
    image_width: int | None = None

    @property
    def image_grid(self) -> tuple[int, int]:
        return self.image_side, self.image_width or self.image_side

    @property
    def patches(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def image_tokens(self) -> int:
        return self.patches // 4


# the group of docs/discriminator.md, with 600 image tokens
TRUE_SHAPE = Shape(prompt=1024, image_side=48, image_width=50, caption=150, reasoning=600)


class Texts(NamedTuple):
    """The token ids of the segments of one response."""

    caption: list[int]
    reasoning: list[int]


@dataclass
class Group:
    """One prompt with its image, the responses, the teacher's response, and a model."""

    shape: Shape
    prompt: list[int]
    responses: list[Texts]
    teacher: Texts
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_token_id: int
    backbone: torch.nn.Module
    value_weight: Tensor

    def sequences(self) -> dict[str, list[list[int]]]:
        """Returns the sequences of the four forwards for all responses, each after its prompt."""
        s = self.shape.responses
        return {
            "student caption": [self.prompt + r.caption for r in self.responses],
            "student reasoning": [self.prompt + r.reasoning for r in self.responses],
            "teacher caption": [self.prompt + self.teacher.caption] * s,
            "teacher reasoning": [self.prompt + self.teacher.reasoning] * s,
        }


def make_group(shape: Shape | None = None, size: TinyMoeSize = SIZE, seed: int = 0) -> Group:
    """Returns a group of random texts and a random tiny model."""
    model, tokenizer = tiny_discriminator_base(size, seed=seed)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return group_for(model.model.train(), image, shape or Shape(), seed)


def make_true_group(
    shape: Shape = TRUE_SHAPE,
    device: str = "cuda",
    seed: int = 0,
    text: dict | None = None,
    vision: dict | None = None,
) -> Group:
    """Returns a group of random texts and a model of true size, with the given changes, made on the device in bf16."""
    config = Qwen3VLMoeConfig(
        text_config=TRUE_TEXT | (text or {}),
        vision_config=TRUE_VISION | (vision or {}),
        image_token_id=TRUE_IMAGE_TOKEN,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        backbone = AutoModel.from_config(config, dtype=torch.bfloat16)
    return group_for(backbone.train(), TRUE_IMAGE_TOKEN, shape, seed)


def group_for(backbone: torch.nn.Module, image: int, shape: Shape, seed: int) -> Group:
    """Returns a group of random texts on the device and in the dtype of a model."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    before = (shape.prompt - shape.image_tokens) // 2
    prompt = text(before) + [image] * shape.image_tokens + text(shape.prompt - shape.image_tokens - before)
    # lengths vary by a fifth around the shape's
    texts = []
    for place in range(shape.responses):
        factor = 0.8 + 0.4 * place / max(1, shape.responses - 1)
        texts.append(Texts(text(round(factor * shape.caption)), text(round(factor * shape.reasoning))))
    vision = backbone.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    value = torch.randn(1, backbone.config.text_config.hidden_size, generator=generator)
    return Group(
        shape=shape,
        prompt=prompt,
        responses=texts,
        teacher=Texts(text(shape.caption), text(shape.reasoning)),
        pixel_values=torch.randn(shape.patches, patch, generator=generator).to(backbone.device),
        image_grid_thw=torch.tensor([[1, *shape.image_grid]]),
        image_token_id=image,
        backbone=backbone,
        value_weight=value.to(backbone.device),
    )


def part_of(group: Group, responses: int) -> Group:
    """Returns the group with its first responses only."""
    return replace(group, shape=replace(group.shape, responses=responses), responses=group.responses[:responses])


class StepOutput(NamedTuple):
    """The responses' scores from before the step, and the gradients of some parameters, by name."""

    perception: Tensor
    reasoning: Tensor
    gradients: dict[str, Tensor]


class PublishedScheme:
    """A scoring pass, then four forwards for each micro-batch."""

    def __init__(self, group: Group, checkpointed: bool = False) -> None:
        self.group, self.backbone = group, group.backbone
        self.value = torch.nn.Parameter(group.value_weight.clone())
        if checkpointed:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimiser = optimiser_of([*self.backbone.parameters(), self.value])
        self.sequences = group.sequences()

    def step(self) -> StepOutput:
        """Scores, then updates; returns the scores and the gradients."""
        scores = self.scoring_pass()
        self.optimiser.zero_grad(set_to_none=True)
        total = self.group.shape.responses
        for start in range(0, total, MICRO_BATCH):
            rows = slice(start, start + MICRO_BATCH)
            found = {name: self.forward(ids[rows]) for name, ids in self.sequences.items()}
            loss = sum(
                -logsigmoid(found[f"teacher {channel}"] - found[f"student {channel}"]).sum() / total
                for channel in ("caption", "reasoning")
            )
            loss.backward()
        norm_to(1.0, [*self.backbone.parameters(), self.value])
        self.optimiser.step()
        return StepOutput(*scores, gradients(self.backbone, self.value))

    @torch.no_grad()
    def scoring_pass(self) -> tuple[Tensor, Tensor]:
        """Returns the scores of captions and reasonings, one sequence at a time."""
        caption, reasoning = (
            torch.cat([self.forward([ids]) for ids in self.sequences[f"student {channel}"]])
            for channel in ("caption", "reasoning")
        )
        return caption, reasoning

    def forward(self, sequences: list[list[int]]) -> Tensor:
        """Returns the score of each sequence at its last token; shorter sequences are padded on the right."""
        longest = max(map(len, sequences))
        device = self.backbone.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=device)
        lengths = torch.tensor([len(row) for row in sequences], device=device)
        self.backbone.rope_deltas = None
        count = len(sequences)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=(torch.arange(longest, device=device) < lengths[:, None]).long(),
            mm_token_type_ids=(ids == self.group.image_token_id).int(),
            pixel_values=self.group.pixel_values.repeat(count, 1),
            image_grid_thw=self.group.image_grid_thw.to(device).repeat(count, 1),
            use_cache=False,
        ).last_hidden_state
        last = hidden[torch.arange(count, device=device), lengths - 1]
        return last.to(self.value.dtype) @ self.value[0]


class PackedScheme:
    """One forward and backward over the packed group; its scores are the rewards."""

    def __init__(self, group: Group, checkpointed: bool = False) -> None:
        self.group = group
        self.model = Discriminator(group.backbone, value_weight=group.value_weight)
        if checkpointed:
            self.model.checkpoint_layers()
        self.optimiser = GuardedOptimiser(optimiser_of(list(self.model.parameters())))
        self.prepared = prepared_group(group)

    def step(self) -> StepOutput:
        """Scores and updates; returns the scores and the gradients."""
        result = discriminator_step(self.model, self.prepared, self.optimiser, PLAIN_LOSS)
        if result.skipped is not None:
            raise RuntimeError(f"the step was skipped: {result.skipped}")
        scores = result.scores
        found = gradients(self.model.backbone, self.model.value_head.weight)
        return StepOutput(scores.perception, scores.reasoning, found)


def prepared_group(group: Group) -> PreparedGroups:
    """Returns the group in the form that `prepare_groups` makes from texts."""
    total = group.shape.responses + 1
    branches, slots = [], []
    for n, texts in enumerate([*group.responses, group.teacher]):
        for channel, (ids, kind) in enumerate(zip(texts, (Kind.PERCEPTION, Kind.REASONING))):
            pair = 2 * (total - 1) + channel if n < total - 1 else None
            branches.append(Branch(ids, kind, pair=pair))
            slots.append(channel * total + n)
    prefix = PrefixGroup(group.prompt, branches, image_grids=group.image_grid_thw)
    ((pack, _),) = pack_groups([prefix], prefix.tokens, image_token_id=group.image_token_id)
    part = ScorePack(pack, group.pixel_values, group.image_grid_thw, torch.tensor(slots))
    return PreparedGroups((part,), torch.zeros(total - 1, dtype=torch.int64), (None,) * (total - 1), (None,))


def optimiser_of(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns an AdamW that changes nothing, so that all steps are equal; on a GPU in one launch without copies."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=parameters[0].is_cuda)


def norm_to(limit: float, parameters: list[torch.nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, limit)


def gradients(backbone: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Returns the compared gradients: value head, query of the first layer, patch embedding."""
    watched = {
        "value head": value,
        "query": backbone.language_model.layers[0].self_attn.q_proj.weight,
        "patches": backbone.visual.patch_embed.proj.weight,
    }
    return {name: parameter.grad.detach().clone() for name, parameter in watched.items()}


def token_counts(group: Group) -> dict[str, int]:
    """Returns the numbers of tokens that the language model computes in a step of each scheme."""
    four = sum(len(ids) for rows in group.sequences().values() for ids in rows)
    scoring = sum(len(ids) for name, rows in group.sequences().items() if "student" in name for ids in rows)
    packed = len(group.prompt) + sum(len(ids) for texts in [*group.responses, group.teacher] for ids in texts)
    return {"published": four + scoring, "packed": packed}


SCHEMES: dict[str, Callable[[Group], PublishedScheme | PackedScheme]] = {
    "ours, one packed group": PackedScheme,
    "four forwards and a scoring pass, transformers": PublishedScheme,
}
