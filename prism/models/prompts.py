"""Chat prompts with images as token ids and patches, equal to those of transformers' Qwen3-VL processor.

That processor needs torchvision; this module does not.

L tokens of a prompt, M merged patches of an image, G = 4 M patches before merging, C numbers a patch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prism.models.vocabulary import IMAGE_TOKEN, PLACEHOLDER
from prism_kernels import check
from prism_kernels.segments import TokenBytes, token_bytes

NAME = "encode_prompt"

# of an image's longer side to its shorter; the processor refuses more
MAX_ASPECT = 200

Message = Mapping[str, Any]


class ImageSizeError(ValueError):
    """An image that takes more pixels than the processor's limit, because it is too narrow to be scaled down."""


class Picture(Protocol):
    """An image of PIL, or one that is decoded when it is converted."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def convert(self, mode: str) -> Image.Image:
        """Returns the image in a mode of PIL."""


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
        videos: the model's settings of videos, which nothing here reads: they are saved with the model as they came.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    videos: Mapping[str, Any] | None = None

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
        self, prompt: str | Sequence[Message], images: Sequence[Picture] = (), *, name: str = "the prompt"
    ) -> EncodedPrompt:
        """Returns a prompt that ends where the assistant begins.

        Args:
            prompt: the user's text, or chat messages; `<image>` in a text, or an image item, stands for an image. In
                a text without either, the images come first. A text that spells a special token is an error, because
                the tokenizer would make it the token itself.
            images: the images, in the order of the prompt.
            name: name of the prompt in errors.
        """
        return self.with_patches(self.token_ids(prompt, [image.size for image in images], name=name), images)

    def token_ids(
        self, prompt: str | Sequence[Message], sizes: Sequence[tuple[int, int]] = (), *, name: str = "the prompt"
    ) -> list[int]:
        """Returns the tokens of an encoded prompt, from the sizes of its images alone.

        Args:
            prompt: see `encode`.
            sizes: width and height of each image.
            name: see `encode`.
        """
        messages = chat_messages(prompt, len(sizes))
        expected = sum(item["type"] == "image" for message in messages for item in message["content"])
        if expected != len(sizes):
            check.fail(NAME, f"an image for each of the {expected} image places of {name}", f"{len(sizes)} images")
        for message in messages:
            for text in (message["role"], *_joined(message["content"])):
                if (token := self.special_token(text)) is not None:
                    check.fail(NAME, f"texts without special tokens in {name}", repr(token))
        text = cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if sizes:
            self._check_sizes(sizes, name)
            pieces = text.split(IMAGE_TOKEN)
            if len(pieces) != len(sizes) + 1:
                check.fail(NAME, f"{len(sizes)} image tokens in {name} after the chat template", len(pieces) - 1)
            places = [IMAGE_TOKEN * self.image_tokens(*size) for size in sizes]
            text = pieces[0] + "".join(place + piece for place, piece in zip(places, pieces[1:]))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def with_patches(self, input_ids: list[int], images: Sequence[Picture]) -> EncodedPrompt:
        """Returns tokens from `token_ids` with the patches of their images."""
        if not images:
            return EncodedPrompt(input_ids, None, None)
        patches = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        grids = patches["image_grid_thw"]
        tokens, merged = input_ids.count(self.image_token_id), int(grids.prod(-1).sum()) // self.spatial_merge_size**2
        if tokens != merged:
            check.fail(NAME, f"an image processor that makes {tokens} merged patches, as it counts them", merged)
        return EncodedPrompt(input_ids, patches["pixel_values"], grids)

    def image_tokens(self, width: int, height: int) -> int:
        """Returns the number of merged patches of an image."""
        return self.image_processor.get_number_of_image_patches(height, width) // self.spatial_merge_size**2

    def special_token(self, text: str) -> str | None:
        """Returns the first special token that a text spells; None if there is none."""
        found = self._special.search(text) or self._special.search(self._normalised(text))
        return found and found[0]

    def is_longer(self, text: str, tokens: int) -> bool:
        """Returns whether a text has more tokens than a number for certain; it is not tokenised, which takes long."""
        most = tokens * self._longest
        return len(text) > most and len(self._normalised(text)) > most

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # a pattern of nothing would match everywhere
        return re.compile("|".join(map(re.escape, {*added, *self.tokenizer.all_special_tokens})) or "(?!)")

    @cached_property
    def _longest(self) -> int:
        """The number of characters of the longest token."""
        # a token of a byte-level vocabulary is written with a character for each byte
        return max(map(len, self.tokenizer.get_vocab()))

    def _normalised(self, text: str) -> str:
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer and not text.isascii() else text

    def _check_sizes(self, sizes: Sequence[tuple[int, int]], name: str) -> None:
        processor = self.image_processor
        most, patch = processor.size["longest_edge"], processor.patch_size
        for index, (width, height) in enumerate(sizes):
            pixels = processor.get_number_of_image_patches(height, width) * patch**2
            if pixels > most:
                check.fail(
                    NAME,
                    f"image {index} of {name} to take at most {most} pixels, the limit of the image processor",
                    f"{pixels} for {width}x{height}, since no side is scaled below {patch} times "
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


def _joined(items: Sequence[Message]) -> list[str]:
    """Returns the texts between images; a template writes neighbouring items as one text."""
    runs = groupby(items, key=lambda item: item["type"])
    return ["".join(item["text"] for item in run) for kind, run in runs if kind == "text"]


def join_images(prompts: Sequence[EncodedPrompt]) -> tuple[Tensor | None, Tensor | None]:
    """Returns the patches and grids of the images of several prompts, in the order of the prompts."""
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None]
    return (torch.cat(pixels), torch.cat(grids)) if pixels else (None, None)
