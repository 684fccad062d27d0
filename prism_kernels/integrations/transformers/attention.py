"""`prefix_attention` as an attention implementation of transformers, for packs in which each prompt is stored once.

Importing this module registers it; then::

    use_prefix_attention(model)
    out = model(
        input_ids=pack.input_ids[None],
        position_ids=pack.position[:, None],
        prefix_pack=pack,
        use_cache=False,
        ...,  # pixel_values and image_grid_thw of the groups' images, in their order
    )
    hidden = out.last_hidden_state[0, pack.last_index]

No mask is built, and none may be passed: the pack has the structure.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prism_kernels import check
from prism_kernels.ops.prefix_attention import prefix_attention

NAME = "prism_prefix"

# some models' options of attention, which prefix_attention does not compute
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


def use_prefix_attention(model: PreTrainedModel) -> None:
    """Sets `prism_prefix` for a model's language model alone: a vision tower keeps its own implementation."""
    config = model.config
    text = config.get_text_config(decoder=True)
    parts = [key for key in config.sub_configs if getattr(config, key) is text]
    model.set_attn_implementation(dict.fromkeys(parts, NAME) if parts else NAME)


def prism_prefix_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_pack: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns the output (1, T, H, d) of query (1, H, T, d), key and value (1, K, T, d), and None for the weights."""
    if not getattr(module, "is_causal", True):
        check.fail(
            NAME,
            "a causal language model; set it with prism_kernels.integrations.transformers.attention."
            "use_prefix_attention(model), which leaves the vision tower as it is",
            type(module).__name__,
        )
    if prefix_pack is None:
        check.fail(NAME, "prefix_pack=pack, a prism_kernels.packing.PrefixPack, in the call of the model", None)
    if attention_mask is not None:
        _refuse_mask(attention_mask)
    if query.shape[0] != 1:
        check.fail(NAME, "a batch of one row, the pack: input_ids=pack.input_ids[None]", f"{query.shape[0]} rows")
    if key.shape[2] != query.shape[2]:
        check.fail(NAME, "no cached keys; pass use_cache=False", f"{key.shape[2]} keys for {query.shape[2]} queries")
    if dropout:
        check.fail(NAME, "no dropout; set attention_dropout to 0", dropout)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            check.fail(NAME, f"a model without {name}", kwargs[name])
    device = query.device.type
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(device):
        # as scaled_dot_product_attention does: under autocast normalised queries and keys come in fp32, values do not
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    return prefix_attention(q, k, v, prefix_pack, scale=scaling)[None], None


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Returns None for transformers' mask registry; raises where a mask was passed to the model."""
    if attention_mask is not None:
        _refuse_mask(attention_mask)


def _refuse_mask(mask: Tensor) -> None:
    check.fail(NAME, "attention_mask=None: a pack has no padding", f"a mask of shape {tuple(mask.shape)}")


AttentionInterface.register(NAME, prism_prefix_forward)
AttentionMaskInterface.register(NAME, no_mask)
