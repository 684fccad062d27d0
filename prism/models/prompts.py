"""Chat prompts with images as token ids and patches, equal to those of transformers' Qwen3-VL processor.

That processor needs torchvision; this module does not.

L tokens of a prompt, M merged patches of an image, G = 4 M patches before merging, C numbers a patch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prism_kernels import check
from prism_kernels.segments import TokenBytes, token_bytes

NAME = "encode_prompt"
# marks an image in the texts of the data schemas
PLACEHOLDER = "<image>"
# of Qwen's vocabulary
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"

# of an image's longer side to its shorter; the processor refuses more
MAX_ASPECT = 200

Message = Mapping[str, Any]


class ImageSizeError(ValueError):
    """An image that takes more pixels than the processor's limit, because it is too narrow to be scaled down."""


class EncodedPrompt(NamedTuple):
    """A prompt as the models read it."""

    # (L,), the image token once for each merged patch
    input_ids: list[int]
    # (G, C) of all images, or None
    pixel_values: Tensor | None
    # (images, 3), int64, or None
    image_grid_thw: Tensor | None


@dataclass(frozen=True)
class PromptEncoder:
    """Turns a chat and its images into token ids and patches.

    Args:
        tokenizer: with a chat template of Qwen's form.
        image_processor: `Qwen2VLImageProcessorPil` or its torchvision twin.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any

    @property
    def image_token_id(self) -> int:
        """The id that stands for one merged patch."""
        return cast(int, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of the tokens, for `find_segments`; cached, since a large vocabulary takes seconds."""
        return token_bytes(self.tokenizer)

    @property
    def spatial_merge_size(self) -> int:
        """The number of patches along each side of a merged patch."""
        return self.image_processor.merge_size

    def encode(
        self, prompt: str | Sequence[Message], images: Sequence[Image.Image] = (), *, name: str = "the prompt"
    ) -> EncodedPrompt:
        """Returns a prompt that ends where the assistant begins.

        Args:
            prompt: the user's text, or chat messages; `<image>` in a text, or an image item, stands for an image. In
                a text without either, the images come first.
            images: the images, in the order of the prompt.
            name: name of the prompt in errors.
        """
        messages = chat_messages(prompt, len(images))
        expected = sum(item["type"] == "image" for message in messages for item in message["content"])
        if expected != len(images):
            check.fail(NAME, f"an image for each of the {expected} image places of {name}", f"{len(images)} images")
        text = cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        pixels, grids = None, None
        if images:
            self._check_sizes(images, name)
            patches = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
            pixels, grids = patches["pixel_values"], patches["image_grid_thw"]
            merged = (grids.prod(-1) // self.spatial_merge_size**2).tolist()
            pieces = text.split(IMAGE_TOKEN)
            if len(pieces) != len(images) + 1:
                check.fail(NAME, f"{len(images)} image tokens in {name} after the chat template", len(pieces) - 1)
            text = pieces[0] + "".join(IMAGE_TOKEN * count + piece for count, piece in zip(merged, pieces[1:]))
        return EncodedPrompt(self.tokenizer(text, add_special_tokens=False)["input_ids"], pixels, grids)

    def _check_sizes(self, images: Sequence[Image.Image], name: str) -> None:
        processor = self.image_processor
        most, patch = processor.size["longest_edge"], processor.patch_size
        for index, image in enumerate(images):
            pixels = processor.get_number_of_image_patches(image.height, image.width) * patch**2
            if pixels > most:
                check.fail(
                    NAME,
                    f"image {index} of {name} to take at most {most} pixels, the limit of the image processor",
                    f"{pixels} for {image.width}x{image.height}, since no side is scaled below {patch} times "
                    f"{self.spatial_merge_size} pixels; raise model.max_image_pixels or crop the image",
                    ImageSizeError,
                )

    def answered(self, prompt: EncodedPrompt, text: str) -> EncodedPrompt:
        """Returns a prompt that goes on with a text of the assistant and the token that ends a turn."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return prompt._replace(input_ids=[*prompt.input_ids, *ids, self.tokenizer.eos_token_id])


def limited_size(size: Mapping[str, int], most: int, factor: int) -> dict[str, int]:
    """Returns the `size` of an image processor that scales no image up to more than `most` pixels.

    Args:
        size: the processor's own size, with `shortest_edge` and `longest_edge`: both are pixels of an image.
        most: limit of width times height after scaling, at least `factor` squared.
        factor: every side becomes a multiple of it.
    """
    # an image below `shortest_edge` is scaled to sides a and b whose product is `shortest_edge`, then each side grows
    # to a multiple: (a + factor)(b + factor) <= most must hold up to the greatest aspect
    sides = factor * (math.sqrt(MAX_ASPECT) + 1 / math.sqrt(MAX_ASPECT))
    root = (math.sqrt(sides**2 + 4 * (most - factor**2)) - sides) / 2
    return {**size, "shortest_edge": max(1, min(size["shortest_edge"], int(root**2))), "longest_edge": most}


def chat_messages(prompt: str | Sequence[Message], images: int = 0) -> list[dict[str, Any]]:
    """Returns a prompt of any form as chat messages whose contents are lists of text and image items.

    Args:
        prompt: see `PromptEncoder.encode`.
        images: number of images; they come first in a text without `<image>`.
    """
    if isinstance(prompt, str):
        if PLACEHOLDER not in prompt:
            prompt = PLACEHOLDER * images + prompt
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": message["role"], "content": _items(message["content"])} for message in prompt]


def without_images(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the messages without their image items."""
    return [
        {"role": message["role"], "content": [item for item in message["content"] if item["type"] != "image"]}
        for message in messages
    ]


def _items(content: str | Sequence[Message]) -> list[dict[str, Any]]:
    if not isinstance(content, str):
        for item in content:
            if "text" not in item and not {item.get("type"), *item} & {"image", "image_url"}:
                check.fail(NAME, "text and image items in a message", dict(item))
        # paths and URLs of image items are dropped: the caller passes the images
        return [{"type": "text", "text": item["text"]} if "text" in item else {"type": "image"} for item in content]
    items: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(PLACEHOLDER)):
        if index:
            items.append({"type": "image"})
        if text:
            items.append({"type": "text", "text": text})
    return items


def join_images(prompts: Sequence[EncodedPrompt]) -> tuple[Tensor | None, Tensor | None]:
    """Returns the patches and grids of the images of several prompts, in the order of the prompts."""
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return (torch.cat(pixels), torch.cat(grids)) if pixels else (None, None)
