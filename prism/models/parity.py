"""Compares the model's inputs as our encoder makes them with those of transformers' own processor and model.

L tokens of a prompt, G patches of its images, C numbers a patch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, Qwen3VLModel, Qwen3VLMoeModel, Qwen3VLProcessor

from prism.config import ConfigError
from prism.models.building import limit_images
from prism.models.families import DENSE, MOE
from prism.models.prompts import EncodedPrompt, Message, PromptEncoder, chat_messages
from prism_kernels.packing import prompt_positions

BACKBONES = {DENSE: Qwen3VLModel, MOE: Qwen3VLMoeModel}
# torchvision scales images with other rounding than PIL: up to 2 of 255 grey levels on noise
TORCHVISION_LEVELS = 4.0


class ImageTextProcessor(Qwen3VLProcessor):
    """transformers' Qwen3-VL processor as it is, without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class Inputs(NamedTuple):
    """What a model reads of a prompt."""

    # (L,)
    ids: Tensor
    image_tokens: int
    # (G, C), or None without images
    pixels: Tensor | None
    # (images, 3), patches in time, height and width, or None without images
    grids: Tensor | None
    # (3, L), of M-RoPE
    positions: Tensor


class Reference:
    """Makes inputs with transformers' own processor, chat template and `get_rope_index`.

    Without torchvision, the processor scales images with PIL; `made_with` says which.

    Args:
        key: setting or flag that names the model, for errors.
        folder: the model's folder; its weights are not read.
        max_image_pixels: see `prism.models.building.limit_images`.
    """

    def __init__(self, key: str, folder: Path, max_image_pixels: int | None = None) -> None:
        missing = _torchvision_problem()
        backend = "pil" if missing else "torchvision"
        self.levels = 0.0 if missing else TORCHVISION_LEVELS
        how = (
            f"PIL ({missing})"
            if missing
            else f"torchvision, whose rounding may differ by {TORCHVISION_LEVELS:g} levels"
        )
        self.made_with = f"transformers' processor with {how}"
        self.processor = ImageTextProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False)
        limit_images(self.processor.image_processor, max_image_pixels)
        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self._check_config(key, folder)
        # only its method is called
        with torch.device("meta"):
            self._backbone: Any = BACKBONES[self.config.model_type](self.config)

    def inputs(self, prompt: str | Sequence[Message], images: Sequence[Image.Image]) -> Inputs:
        """Returns the inputs of a prompt; for the arguments see `PromptEncoder.encode`."""
        messages = chat_messages(prompt, len(images))
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = [image.convert("RGB") for image in images]
        batch = self.processor(text=[text], images=pictures or None, return_tensors="pt")
        ids, grids = batch["input_ids"], batch.get("image_grid_thw")
        positions, _ = self._backbone.get_rope_index(ids, batch["mm_token_type_ids"], grids)
        is_image = ids == self.config.image_token_id
        return Inputs(ids[0], int(is_image.sum()), batch.get("pixel_values"), grids, positions[:, 0])

    def _check_config(self, key: str, folder: Path) -> None:
        vision, images = self.config.vision_config, self.processor.image_processor
        processed = {
            "vision_config.patch_size": (vision.patch_size, images.patch_size),
            "vision_config.temporal_patch_size": (vision.temporal_patch_size, images.temporal_patch_size),
            "vision_config.spatial_merge_size": (vision.spatial_merge_size, images.merge_size),
            "image_token_id": (self.config.image_token_id, self.processor.image_token_id),
        }
        for name, (model, processor) in processed.items():
            if model != processor:
                raise ConfigError(
                    f"{key}: expected a processor with {name} = {model}, as in config.json of {str(folder)!r}, "
                    f"got {processor}; take the processor's files from the released model"
                )


class Comparison(NamedTuple):
    """Our inputs of one row beside those of transformers; of a pair, ours is the first."""

    row: str
    # width and height of each image
    images: tuple[tuple[int, int], ...]
    tokens: tuple[int, int]
    image_tokens: tuple[int, int]
    # index of the first token that differs; None: none
    first_token: int | None
    # largest difference of a pixel, in grey levels of 255; infinite if the numbers of patches differ
    levels: float
    # largest difference of a position; None if the numbers of tokens differ
    positions: int | None
    # largest difference of a pixel that rounding explains
    allowed_levels: float

    @property
    def problem(self) -> str:
        """The differences in words; empty where there are none."""
        parts: list[str] = []
        if self.image_tokens[0] != self.image_tokens[1]:
            parts.append("{} image tokens, transformers has {}".format(*self.image_tokens))
        if self.tokens[0] != self.tokens[1]:
            parts.append("{} tokens, transformers has {}".format(*self.tokens))
        if self.first_token is not None:
            parts.append(f"the first different token is the one at {self.first_token}")
        if self.levels > self.allowed_levels:
            parts.append(f"pixels differ by up to {self.levels:.3g} of 255 grey levels")
        if self.positions:
            parts.append(f"positions differ by up to {self.positions}")
        return "; ".join(parts)


def inputs_of(encoder: PromptEncoder, encoded: EncodedPrompt) -> Inputs:
    """Returns the inputs of a prompt that our encoder has encoded."""
    ids, grids = torch.tensor(encoded.input_ids), encoded.image_grid_thw
    positions = prompt_positions(
        ids,
        () if grids is None else grids,
        image_token_id=encoder.image_token_id,
        spatial_merge_size=encoder.spatial_merge_size,
    )
    tokens = int((ids == encoder.image_token_id).sum())
    return Inputs(ids, tokens, encoded.pixel_values, grids, positions)


def compare(
    row: str, images: tuple[tuple[int, int], ...], ours: Inputs, theirs: Inputs, reference: Reference
) -> Comparison:
    """Compares the inputs of one row.

    Args:
        row: name of the row.
        images: width and height of each of its images.
        ours: inputs that we made.
        theirs: inputs that the reference made.
        reference: transformers' side.
    """
    tokens = len(ours.ids), len(theirs.ids)
    common = min(tokens)
    differing = (ours.ids[:common] != theirs.ids[:common]).nonzero()
    same_length = tokens[0] == tokens[1]
    return Comparison(
        row,
        images,
        tokens,
        (ours.image_tokens, theirs.image_tokens),
        int(differing[0]) if len(differing) else None if same_length else common,
        _levels(ours, theirs, reference.processor.image_processor),
        int((ours.positions - theirs.positions).abs().max()) if same_length else None,
        reference.levels,
    )


def _levels(ours: Inputs, theirs: Inputs, processor: Any) -> float:
    """Returns the largest difference of a pixel in grey levels."""
    if ours.pixels is None or theirs.pixels is None or ours.grids is None or theirs.grids is None:
        return 0.0 if ours.pixels is theirs.pixels else math.inf
    if ours.pixels.shape != theirs.pixels.shape or not torch.equal(ours.grids, theirs.grids):
        return math.inf
    # pixels are scaled by `rescale_factor`, then divided by `image_std`
    return float((ours.pixels - theirs.pixels).abs().max()) * max(processor.image_std) / processor.rescale_factor


def _torchvision_problem() -> str:
    """Returns why torchvision cannot be used; empty if it can."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return "torchvision is not installed"
    except (OSError, RuntimeError) as error:
        # built for another torch
        return f"torchvision cannot be imported: {(str(error).splitlines() or ['unknown'])[0]}"
    return ""
