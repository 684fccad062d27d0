"""The special tokens of Qwen3-VL, and the mark of an image in texts; known without a tokenizer."""

import re

# in the order of Qwen's vocabulary
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
# marks an image in the texts of the data schemas
PLACEHOLDER = "<image>"

_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


def special_token(text: str) -> str | None:
    """Returns the first special token that a text spells, with its images or without them; None if there is none."""
    found = _SPECIAL.search(text) or _SPECIAL.search(text.replace(PLACEHOLDER, ""))
    return found and found[0]
