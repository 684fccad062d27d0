"""The forward pass of a Qwen3-VL backbone over a pack, which stores each prompt once; policy and discriminator use it.

T packed tokens, R rows that are read, D hidden width; M merged patches of all images, G = 4 M patches, C numbers a
patch, B images, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    Qwen3VLModel,
    Qwen3VLMoeModel,
    Qwen3VLMoeVisionModel,
    Qwen3VLVisionModel,
)

from prism_kernels import check
from prism_kernels.integrations.transformers.attention import use_prefix_attention
from prism_kernels.integrations.transformers.moe_block import token_kinds
from prism_kernels.packing import Kind, PrefixPack

NAME = "packed_rows"
IMAGES = "encode_images"
ATTENTION = "prism_images"
Backbone = Qwen3VLModel | Qwen3VLMoeModel
VisionTower = Qwen3VLVisionModel | Qwen3VLMoeVisionModel


class ImageFeatures(NamedTuple):
    """The features of images that a language model reads, in the order of the image tokens."""

    # (M, D), instead of the image tokens' embeddings
    merged: Tensor
    # (M, D) each, added after the first layers (DeepStack)
    deepstack: tuple[Tensor, ...]


def use_packs(backbone: Backbone) -> None:
    """Sets a backbone's language model to packed attention and its vision tower to batched images.

    Parameters and their names do not change.
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

    The top layer computes its MLP, and so its routing, for those tokens only: nothing reads the others.

    Args:
        backbone: after `use_packs`.
        pack: prompts and their branches.
        rows: (R,), int64, indices of those tokens in the pack.
        pixel_values: the patches of all images, in the order of the pack's groups.
        image_grid_thw: (images, 3), patches in time, height and width.
    """
    model = backbone.language_model
    hidden = model.embed_tokens(pack.input_ids)
    image_rows, features = _image_features(backbone, pack, pixel_values, image_grid_thw)
    if features is not None:
        hidden = hidden.index_copy(0, image_rows, features.merged.to(hidden.dtype))
    # transformers' layers take a batch: one row of T tokens
    hidden = hidden[None]
    rotation = model.rotary_emb(hidden, pack.position[:, None])
    deepstack = features.deepstack if features is not None else ()
    *below, top = model.layers
    with token_kinds(pack.kind, pack.token_weight):
        for index, layer in enumerate(below):
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, prefix_pack=pack)
            if index < len(deepstack):
                hidden = hidden.index_add(1, image_rows, deepstack[index].to(hidden.dtype)[None])
    return model.norm(_top_rows(top, hidden, rotation, pack, rows))


def _image_features(
    backbone: Backbone, pack: PrefixPack, pixel_values: Tensor | None, image_grid_thw: Tensor | None
) -> tuple[Tensor | None, ImageFeatures | None]:
    """Returns the indices of the image tokens in the pack, (M,), and their features."""
    is_image = pack.kind == Kind.IMAGE
    if pixel_values is None or image_grid_thw is None:
        if check.reads_values(is_image) and is_image.any():
            check.fail(NAME, "pixel_values and image_grid_thw for a pack with image tokens", "none")
        return None, None
    features = encode_images(backbone.visual, pixel_values, image_grid_thw)
    tokens = len(features.merged)
    if check.reads_values(is_image) and int(is_image.sum()) != tokens:
        check.fail(NAME, f"{tokens} image tokens in the pack, one for each merged patch", int(is_image.sum()))
    # the features give the count, so that no value is read from the device
    return torch.nonzero_static(is_image, size=tokens)[:, 0], features


def _top_rows(layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], pack: PrefixPack, rows: Tensor) -> Tensor:
    """Returns the top layer's output at some tokens, (R, D): only their MLP is computed."""
    attended, _ = layer.self_attn(
        layer.input_layernorm(hidden), position_embeddings=rotation, attention_mask=None, prefix_pack=pack
    )
    read = (hidden + attended)[0].index_select(0, rows)
    with token_kinds(pack.kind.index_select(0, rows), pack.token_weight.index_select(0, rows)):
        return read + layer.mlp(layer.post_attention_layernorm(read)[None])[0]


class PatchProjection(nn.Conv3d):
    """The patch embedding as one matrix product: kernel and stride cover the whole patch."""

    def forward(self, patches: Tensor) -> Tensor:
        """Returns (G, width, 1, 1, 1) for patches (G, channels, time, height, width)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def batch_images(visual: VisionTower) -> None:
    """Sets a vision tower to compute images of one size as one batch instead of one after another.

    The patch embedding becomes a matrix product, and the attention one call for all images. If sizes differ,
    transformers' loop over images stays. Parameters and their names do not change.
    """
    visual.config._attn_implementation = ATTENTION
    projection = visual.patch_embed.proj
    if projection.kernel_size == projection.stride:
        projection.__class__ = PatchProjection


def encode_images(visual: VisionTower, pixel_values: Tensor, image_grid_thw: Tensor) -> ImageFeatures:
    """Returns the features of all images.

    Args:
        visual: the vision tower of a Qwen3-VL or Qwen3-VL-MoE model, after `batch_images`.
        pixel_values: (G, C).
        image_grid_thw: (B, 3), patches in time, height and width.
    """
    check.shape(IMAGES, "image_grid_thw", image_grid_thw, ("B", 3))
    grids = image_grid_thw.tolist()
    patches = sum(t * h * w for t, h, w in grids)
    if len(pixel_values) != patches:
        check.fail(IMAGES, f"pixel_values with the {patches} patches of image_grid_thw", len(pixel_values))
    batch: dict[str, Any] = {}
    if visual.config._attn_implementation == ATTENTION and all(grid == grids[0] and grid[0] == 1 for grid in grids):
        # one sequence of all patches, which the attention splits into images
        bounds = torch.tensor([0, patches], dtype=torch.int32, device=pixel_values.device)
        batch = {"cu_seqlens": bounds, "images": len(grids)}
    out = visual(pixel_values.to(visual.dtype), grid_thw=image_grid_thw, return_dict=True, **batch)
    return ImageFeatures(out.pooler_output, tuple(out.deepstack_features))


def image_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    images: int = 1,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns (1, G, H, head_dim): each of the `images` equal parts of (1, H, G, head_dim) attends to itself."""
    if attention_mask is not None:
        check.fail(ATTENTION, "no attention mask in a vision tower", tuple(attention_mask.shape))
    q, k, v = (x[0].unflatten(1, (images, -1)).transpose(0, 1) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(ATTENTION, image_attention)
