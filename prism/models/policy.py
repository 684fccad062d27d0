"""The policy over packs: log-probabilities of response tokens; responses in one pack share their prompt's computation.

T packed tokens, N response tokens of S responses, V vocabulary, D hidden width, P prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism.models.packed import packed_rows, use_packs
from prism.models.prompts import EncodedPrompt, PromptEncoder, join_images
from prism_kernels import TokenLogProbs, check, linear_logprob
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, pack_groups

CausalModel = Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration


class ResponseRows(NamedTuple):
    """The rows of a pack that predict its response tokens."""

    # (N,), into T: the token before each response token; for a response's first token, its prompt's last
    source: Tensor
    # (N,), into T: the response tokens
    token: Tensor


def response_rows(pack: PrefixPack) -> ResponseRows:
    """Returns the rows of all response tokens, response by response."""
    token = torch.nonzero_static(pack.branch >= 0, size=sum(pack.layout.branch))[:, 0]
    owner, begin = pack.branch_group, pack.cu_branch[:-1].long()
    # the branches of a group are adjacent, so the first one has the lowest index
    first = torch.searchsorted(owner, owner)
    prompt_end = pack.cu_prefix.long()[owner + 1] + begin[first] - 1
    return ResponseRows((token - 1).index_copy(0, begin, prompt_end), token)


class Policy(nn.Module):
    """A causal Qwen3-VL model that scores responses over packs; its weights stay in transformers' layout."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self.model = model
        use_packs(model.model)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def head(self) -> Tensor:
        """The weight of the language-model head, (V, D)."""
        return self.model.lm_head.weight

    def forward(
        self,
        pack: PrefixPack,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        cache_bytes: int | None = None,
    ) -> TokenLogProbs:
        """Returns the log-probabilities of all response tokens, (N,), response by response as `pack.cu_branch` cuts.

        Args:
            pack: prompts, and whole responses as branches.
            pixel_values: see `packed_rows`.
            image_grid_thw: see `packed_rows`.
            temperature: temperature of the sampling.
            entropy: whether to return the entropies too.
            cache_bytes: see `linear_logprob`.
        """
        hidden, target = self.predictors(pack, pixel_values, image_grid_thw)
        return linear_logprob(
            hidden, self.head, target, temperature=temperature, entropy=entropy, cache_bytes=cache_bytes
        )

    def predictors(
        self, pack: PrefixPack, pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the hidden states that predict the response tokens, (N, D), and those tokens, (N,)."""
        rows = response_rows(pack)
        hidden = packed_rows(self.model.model, pack, rows.source, pixel_values, image_grid_thw)
        return hidden, pack.input_ids.index_select(0, rows.token)


class ResponsePack(NamedTuple):
    """One forward pass of the policy, and the responses in it."""

    pack: PrefixPack
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    # index of each branch's response among all responses
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
    """Packs each response once, and each prompt once per pack that holds a response to it.

    Args:
        prompts: P prompts with their images.
        responses: S responses as token ids, none empty.
        owner: the prompt of each response.
        encoder: the policy's encoder.
        budget: the most tokens of a pack; a prompt with one response must fit.
    """
    pieces: list[tuple[int, list[int]]] = []
    for index, prompt in enumerate(prompts):
        room = 0
        for response in (s for s, p in enumerate(owner) if p == index):
            size = len(responses[response])
            if len(prompt.input_ids) + size > budget:
                wanted = f"a prompt and response of at most {budget} tokens, the budget of a pack"
                check.fail("pack_responses", wanted, f"{len(prompt.input_ids)} + {size}")
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
    packs = pack_groups(
        groups, budget, image_token_id=encoder.image_token_id, spatial_merge_size=encoder.spatial_merge_size
    )
    return [
        ResponsePack(
            pack,
            *join_images([prompts[pieces[member][0]] for member in members]),
            tuple(s for member in members for s in pieces[member][1]),
        )
        for pack, members in packs
    ]


def response_ids(texts: Sequence[str], encoder: PromptEncoder) -> list[list[int]]:
    """Returns the tokens of demonstrations, each with the token that ends a turn."""
    end = encoder.tokenizer.eos_token_id
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return [[*ids, end] for ids in encoder.tokenizer(list(texts), **options)["input_ids"]]
