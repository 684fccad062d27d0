"""The policy over packs: log-probabilities of response tokens, each prompt computed once for all of its responses.

T packed tokens, N response tokens of S responses, V vocabulary, D hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism.models.packed import packed_rows, use_packs
from prism_kernels import TokenLogProbs, linear_logprob
from prism_kernels.packing import PrefixPack

CausalModel = Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration


class ResponseRows(NamedTuple):
    """Which rows of a pack predict its response tokens."""

    # (N,), into T: the token before each response token, a response's first being its prompt's last
    source: Tensor
    # (N,), into T: the response tokens themselves
    token: Tensor


def response_rows(pack: PrefixPack) -> ResponseRows:
    """Returns the rows of all response tokens, response by response."""
    token = torch.nonzero_static(pack.branch >= 0, size=sum(pack.layout.branch))[:, 0]
    owner, begin = pack.branch_group, pack.cu_branch[:-1].long()
    # the branches of a group lie together, so its first is found in their order
    first = torch.searchsorted(owner, owner)
    prompt_end = pack.cu_prefix.long()[owner + 1] + begin[first] - 1
    return ResponseRows((token - 1).index_copy(0, begin, prompt_end), token)


class Policy(nn.Module):
    """A causal Qwen3-VL model whose responses are scored over packs, and whose weights stay plain transformers'."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self.model = model
        use_packs(model.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

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
            temperature: that of the sampling.
            entropy: whether the entropies are wanted too.
            cache_bytes: see `linear_logprob`.
        """
        rows = response_rows(pack)
        hidden = packed_rows(self.model.model, pack, rows.source, pixel_values, image_grid_thw)
        head = self.model.lm_head
        target = pack.input_ids.index_select(0, rows.token)
        return linear_logprob(
            hidden, head.weight, target, temperature=temperature, entropy=entropy, cache_bytes=cache_bytes
        )
