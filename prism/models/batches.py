"""Packs for the policy: demonstrations, and groups of rollouts with what the loss needs of each token.

S responses, N response tokens, P prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism.models.prompts import EncodedPrompt, PromptEncoder, join_images
from prism_kernels import check
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, pack_groups

NAME = "pack_responses"


class ResponsePack(NamedTuple):
    """One forward pass of the policy, and which responses it holds."""

    pack: PrefixPack
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    # of each branch: which of the responses that were given it is
    responses: tuple[int, ...]

    def to(self, device: torch.device) -> "ResponsePack":
        """Returns the pack on a device."""
        pixels, grids = (None if x is None else x.to(device) for x in (self.pixel_values, self.image_grid_thw))
        return ResponsePack(self.pack.to(device), pixels, grids, self.responses)


def pack_responses(
    prompts: Sequence[EncodedPrompt],
    responses: Sequence[Sequence[int]],
    owner: Sequence[int],
    encoder: PromptEncoder,
    budget: int,
) -> list[ResponsePack]:
    """Returns packs that hold each response once, and each prompt once for those of its responses that share a pack.

    Args:
        prompts: P prompts with their images.
        responses: S responses as token ids, none empty.
        owner: the prompt of each response.
        encoder: of the policy.
        budget: tokens of a pack; a prompt with one response must fit.
    """
    pieces: list[tuple[int, list[int]]] = []
    for index, prompt in enumerate(prompts):
        room = 0
        for response in (s for s, p in enumerate(owner) if p == index):
            size = len(responses[response])
            if len(prompt.input_ids) + size > budget:
                wanted = f"a prompt and response of at most {budget} tokens, the budget of a pack"
                check.fail(NAME, wanted, f"{len(prompt.input_ids)} + {size}")
            if size > room:
                pieces.append((index, []))
                room = budget - len(prompt.input_ids)
            pieces[-1][1].append(response)
            room -= size
    groups = [
        PrefixGroup(
            prompts[index].input_ids,
            [Branch(responses[s], Kind.REASONING) for s in chosen],
            image_grids=() if (grids := prompts[index].image_grid_thw) is None else grids,
        )
        for index, chosen in pieces
    ]
    found = pack_groups(
        groups, budget, image_token_id=encoder.image_token_id, spatial_merge_size=encoder.spatial_merge_size
    )
    return [
        ResponsePack(
            pack,
            *join_images([prompts[pieces[member][0]] for member in members]),
            tuple(s for member in members for s in pieces[member][1]),
        )
        for pack, members in found
    ]


def response_ids(texts: Sequence[str], encoder: PromptEncoder) -> list[list[int]]:
    """Returns demonstrations as the policy is to write them: their tokens and the token that ends a turn."""
    end = encoder.tokenizer.eos_token_id
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return [[*ids, end] for ids in encoder.tokenizer(list(texts), **options)["input_ids"]]
