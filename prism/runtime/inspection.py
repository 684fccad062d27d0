"""What is saved of a batch on which no step was taken: tensors and plain values, as the models read them."""

from collections.abc import Sequence
from typing import Any

from prism.discriminator.score import PreparedGroups
from prism.models.prompts import EncodedPrompt


def of_responses(prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[int]], owner: Sequence[int]) -> Any:
    """Returns prompts with their images, and responses as token ids, each with the index of its prompt."""
    return {
        "prompts": [_plain(p.input_ids, p.pixel_values, p.image_grid_thw) for p in prompts],
        "responses": [list(response) for response in responses],
        "owner": list(owner),
    }


def of_groups(prepared: PreparedGroups) -> Any:
    """Returns what a discriminator reads: its packs, where each branch's score goes, and who is compared."""
    return {
        "packs": [
            {**_plain(p.pack.input_ids, p.pixel_values, p.image_grid_thw), "slots": p.slots} for p in prepared.packs
        ],
        "group": prepared.group,
        "reason": list(prepared.reason),
        "teacher_reason": list(prepared.teacher_reason),
    }


def _plain(input_ids: Any, pixel_values: Any, image_grid_thw: Any) -> dict[str, Any]:
    return {"input_ids": input_ids, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
