"""A Qwen3-VL backbone over a pack in which each prompt is stored once: the policy's and the discriminator's forward.

T packed tokens, R rows that are read, D hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLModel, Qwen3VLMoeModel

from prism.models.vision import ImageFeatures, batch_images, encode_images
from prism_kernels import check
from prism_kernels.integrations.transformers.attention import use_prefix_attention
from prism_kernels.integrations.transformers.moe_block import token_kinds
from prism_kernels.packing import Kind, PrefixPack

NAME = "packed_rows"
Backbone = Qwen3VLModel | Qwen3VLMoeModel


def use_packs(backbone: Backbone) -> None:
    """Sets a backbone's language model to the packed attention and its vision tower to batched images.

    Parameters and their names stay.
    """
    if not isinstance(backbone, Qwen3VLModel | Qwen3VLMoeModel):
        check.fail(NAME, "backbone to be a Qwen3VLModel or Qwen3VLMoeModel", type(backbone).__name__, TypeError)
    use_prefix_attention(backbone)
    batch_images(backbone.visual)


def packed_rows(
    backbone: Backbone,
    pack: PrefixPack,
    rows: Tensor,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
) -> Tensor:
    """Returns the last hidden states, after the final norm, of some tokens of a pack, (R, D).

    The top layer's MLP, and so its routing, is computed for those tokens alone: nothing else of it is read.

    Args:
        backbone: after `use_packs`.
        pack: prompts and their branches.
        rows: (R,), int64, which of the T tokens.
        pixel_values: the patches of all images, in the order of the pack's groups.
        image_grid_thw: (images, 3), patches in time, height and width.
    """
    model = backbone.language_model
    hidden = model.embed_tokens(pack.input_ids)
    places, features = _image_features(backbone, pack, pixel_values, image_grid_thw)
    if features is not None:
        hidden = hidden.index_copy(0, places, features.merged.to(hidden.dtype))
    # transformers' layers take a batch: one row of T tokens
    hidden = hidden[None]
    rotation = model.rotary_emb(hidden, pack.position[:, None])
    deepstack = features.deepstack if features is not None else ()
    *below, top = model.layers
    with token_kinds(pack.kind, pack.token_weight):
        for index, layer in enumerate(below):
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, prefix_pack=pack)
            if index < len(deepstack):
                hidden = hidden.index_add(1, places, deepstack[index].to(hidden.dtype)[None])
    return model.norm(_top_rows(top, hidden, rotation, pack, rows))


def _image_features(
    backbone: Backbone, pack: PrefixPack, pixel_values: Tensor | None, image_grid_thw: Tensor | None
) -> tuple[Tensor | None, ImageFeatures | None]:
    """Returns where in T the image tokens are, (M,), and what they read."""
    is_image = pack.kind == Kind.IMAGE
    if pixel_values is None or image_grid_thw is None:
        if check.reads_values(is_image) and is_image.any():
            check.fail(NAME, "pixel_values and image_grid_thw for a pack with image tokens", "none")
        return None, None
    features = encode_images(backbone.visual, pixel_values, image_grid_thw)
    tokens = len(features.merged)
    if check.reads_values(is_image) and int(is_image.sum()) != tokens:
        check.fail(NAME, f"{tokens} image tokens in the pack, one for each merged patch", int(is_image.sum()))
    # the count is known from the features: nothing is read from the device
    return torch.nonzero_static(is_image, size=tokens)[:, 0], features


def _top_rows(layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], pack: PrefixPack, rows: Tensor) -> Tensor:
    """Returns the top layer's output at some tokens, (R, D): only their MLP is computed."""
    attended, _ = layer.self_attn(
        layer.input_layernorm(hidden), position_embeddings=rotation, attention_mask=None, prefix_pack=pack
    )
    read = (hidden + attended)[0].index_select(0, rows)
    with token_kinds(pack.kind.index_select(0, rows), pack.token_weight.index_select(0, rows)):
        return read + layer.mlp(layer.post_attention_layernorm(read)[None])[0]
