"""The model's own forward and transformers' cache, for models that the lean step does not know: a prompt at a time.

R rollouts of the prompt, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism.models.prompts import EncodedPrompt
from prism_kernels import check

NAME = "Engine"


class StockBatch:
    """One prompt and its growing responses.

    Args:
        model: any causal model of transformers with a dynamic cache.
        prompts: one.
        copies: R.
        steps: unused: the cache grows by itself.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[EncodedPrompt], copies: int, steps: int) -> None:
        (prompt,) = prompts
        self.model, self.copies = model, copies
        ids = torch.tensor([prompt.input_ids], device=model.device)
        takes = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids}
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
            inputs["pixel_values"] = prompt.pixel_values.to(model.device)
            inputs["image_grid_thw"] = prompt.image_grid_thw.to(model.device)
            unknown = [name for name in inputs if name not in takes]
            if unknown:
                check.fail(NAME, f"a model whose forward takes {', '.join(unknown)}", type(model).__name__, TypeError)
        if "mm_token_type_ids" in takes:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        # what an earlier prompt left there would place the tokens of this one
        for module in _with_rope_deltas(model):
            module.rope_deltas = None
        out = model(**inputs, use_cache=True)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]
        self.cache.batch_repeat_interleave(copies)

    def step(self, token: Tensor) -> Tensor:
        """Returns the logits (R, V) behind each row's next token (R,)."""
        out = self.model(input_ids=token[:, None], past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def keep(self, order: Tensor) -> None:
        """Leaves the rows `order`, in this order."""
        self.cache.batch_select_indices(order)


@contextmanager
def rope_deltas_kept(model: PreTrainedModel) -> Iterator[None]:
    """Restores, in the end, the positions that Qwen's models remember between calls."""
    before = [(module, module.rope_deltas) for module in _with_rope_deltas(model)]
    try:
        yield
    finally:
        for module, value in before:
            module.rope_deltas = value


def _with_rope_deltas(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "rope_deltas")]
