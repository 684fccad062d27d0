"""The vision tower of a Qwen3-VL model, all images of a batch at once.

M merged patches of all images, G = 4 M patches, C numbers a patch, D the language model's width, B images, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, Qwen3VLMoeVisionModel, Qwen3VLVisionModel

from prism_kernels import check

NAME = "encode_images"
ATTENTION = "prism_images"
VisionTower = Qwen3VLVisionModel | Qwen3VLMoeVisionModel


class ImageFeatures(NamedTuple):
    """What a language model reads of images, in the order of their image tokens."""

    # (M, D), for the embeddings
    merged: Tensor
    # each (M, D), added behind the first layers (DeepStack)
    deepstack: tuple[Tensor, ...]


class PatchProjection(nn.Conv3d):
    """The patch embedding as one matrix product: kernel and stride are the whole patch, so each output reads it all."""

    def forward(self, patches: Tensor) -> Tensor:
        """Returns (G, width, 1, 1, 1) for patches (G, channels, time, height, width)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def batch_images(visual: VisionTower) -> None:
    """Sets a vision tower to treat images of one size as one batch, instead of one after another.

    Parameters and their names stay: the patch embedding becomes a matrix product, the attention one call for all
    images. Where sizes differ, transformers' loop over images stays.
    """
    visual.config._attn_implementation = ATTENTION
    projection = visual.patch_embed.proj
    if projection.kernel_size == projection.stride:
        projection.__class__ = PatchProjection


def encode_images(visual: VisionTower, pixel_values: Tensor, image_grid_thw: Tensor) -> ImageFeatures:
    """Returns the features of all images, each image seen once.

    Args:
        visual: the vision tower of a Qwen3-VL or Qwen3-VL-MoE model, after `batch_images`.
        pixel_values: (G, C).
        image_grid_thw: (B, 3), patches in time, height and width.
    """
    check.shape(NAME, "image_grid_thw", image_grid_thw, ("B", 3))
    grids = image_grid_thw.tolist()
    patches = sum(t * h * w for t, h, w in grids)
    if len(pixel_values) != patches:
        check.fail(NAME, f"pixel_values with the {patches} patches of image_grid_thw", len(pixel_values))
    batch: dict[str, Any] = {}
    if visual.config._attn_implementation == ATTENTION and all(grid == grids[0] and grid[0] == 1 for grid in grids):
        # one run of all patches; the attention cuts it into images
        whole = torch.tensor([0, patches], dtype=torch.int32, device=pixel_values.device)
        batch = {"cu_seqlens": whole, "images": len(grids)}
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
