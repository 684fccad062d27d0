"""The model's own forward pass with transformers' cache, one prompt at a time, for models that lean.py does not know.

R rollouts of the prompt, V vocabulary.
"""

import inspect
from collections.abc import Sequence
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
        prompts: one prompt.
        copies: R.
        steps: unused, since the cache grows by itself; `LeanBatch` has it too.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[EncodedPrompt], copies: int, steps: int) -> None:
        (prompt,) = prompts
        self.model, self.copies = model, copies
        ids = torch.tensor([prompt.input_ids], device=model.device)
        parameters = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids}
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
            inputs["pixel_values"] = prompt.pixel_values.to(model.device)
            inputs["image_grid_thw"] = prompt.image_grid_thw.to(model.device)
            unknown = [name for name in inputs if name not in parameters]
            if unknown:
                check.fail(NAME, f"a model whose forward takes {', '.join(unknown)}", type(model).__name__, TypeError)
        if "mm_token_type_ids" in parameters:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = 1
        # Qwen's models would apply the position offset of the last prompt to this one
        module: Any
        for module in model.modules():
            if hasattr(module, "rope_deltas"):
                module.rope_deltas = None
        out = model(**inputs, use_cache=True)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]
        self.cache.batch_repeat_interleave(copies)

    def step(self, token: Tensor) -> Tensor:
        """Returns the logits (R, V) that follow each row's next token, (R,)."""
        out = self.model(input_ids=token[:, None], past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def keep(self, order: Tensor) -> None:
        """Keeps the rows `order`, in this order."""
        self.cache.batch_select_indices(order)
