"""The discriminator: scores of the branches of packed groups.

S branches, D hidden width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3VLMoeModel

from prism.models.packed import Backbone, packed_rows, use_packs
from prism_kernels import check
from prism_kernels.integrations.transformers.moe_block import checkpoint_contexts, use_moe_blocks
from prism_kernels.packing import Kind, PrefixPack

NAME = "Discriminator"


class Discriminator(nn.Module):
    """A Qwen3-VL backbone and a linear value head without bias, in fp32: one score for each branch of a pack.

    A dense backbone makes the dense variant, `images=False` the text-only one. The top layer computes its MLP, and so
    its routing, for the scored tokens only: nothing reads the others.

    Args:
        backbone: the model without its language-model head. `use_packs` sets it to packs; its parameters do not change.
        images: whether prompts hold images.
        kind_bias: whether the routers learn a bias for each kind of token, initially 0; only for a Mixture-of-Experts.
        value_weight: (1, D), the value head; None: zeros, so that all scores are equal at first.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        images: bool = True,
        kind_bias: bool = False,
        value_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        use_packs(backbone)
        self.backbone = backbone
        self.images = images
        self.kind_bias = kind_bias
        width = backbone.language_model.config.hidden_size
        self.value_head = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=backbone.device)
        if value_weight is not None:
            check.shape(NAME, "value_weight", value_weight, (1, width))
        with torch.no_grad():
            self.value_head.weight.copy_(torch.zeros(1, width) if value_weight is None else value_weight)
        if isinstance(backbone, Qwen3VLMoeModel):
            use_moe_blocks(backbone, kinds=len(Kind) if kind_bias else None)
        elif kind_bias:
            check.fail(NAME, "a Mixture-of-Experts backbone for kind_bias", type(backbone).__name__)

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        return self.backbone.config

    def checkpoint_layers(self) -> None:
        """Recomputes the layers in the backward pass; not reentrant, so that the routers keep their gradients."""
        self.backbone.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})

    def forward(
        self, pack: PrefixPack, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None
    ) -> Tensor:
        """Returns the raw score of each branch, (S,), read at its last token; fp32, or fp64 for an fp64 backbone.

        Args:
            pack: prompts and their branches.
            pixel_values: the patches of all images, in the order of the pack's groups.
            image_grid_thw: (images, 3), patches in time, height and width.
        """
        if not self.images and pixel_values is not None:
            check.fail(NAME, "no pixel_values, since this discriminator is text-only", tuple(pixel_values.shape))
        last = packed_rows(self.backbone, pack, pack.last_index, pixel_values, image_grid_thw)
        wide = torch.promote_types(last.dtype, torch.float32)
        return nn.functional.linear(last.to(wide), self.value_head.weight.to(wide))[:, 0]
