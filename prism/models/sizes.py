"""The sizes of the tiny models."""

from dataclasses import dataclass
from typing import Annotated

from prism.ranges import Positive, Range, Ranged


@dataclass(frozen=True, kw_only=True)
class TinySize(Ranged):
    """The sizes of a tiny Qwen3-VL. The defaults suit a CPU, and only they have a pretrained base.

    Args:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Width of the language model.
        intermediate_size: Width of its MLPs. Not hidden_size or its half, which loaders of expert weights confuse.
        layers: Layers of the language model.
        heads: Query heads of each layer.
        key_value_heads: Key and value heads of each layer; a divisor of heads.
        head_dim: Width of a head, a multiple of 16 as M-RoPE requires. vLLM needs at least 32.
        vision_hidden_size: Width of the vision tower, a multiple of vision_heads.
        vision_layers: Layers of the vision tower.
        vision_heads: Heads of each of them.
        patch_size: Side of an image patch, in pixels.
        image_side: Side of the largest square image, in pixels; larger images are scaled down.
        max_positions: Tokens of the longest prompt with its response.
    """

    vocab_size: Positive = 1024
    hidden_size: Positive = 96
    intermediate_size: Positive = 256
    layers: Positive = 3
    heads: Positive = 4
    key_value_heads: Positive = 2
    head_dim: Annotated[int, Range(gt=0, multiple_of=16)] = 32
    vision_hidden_size: Positive = 64
    vision_layers: Positive = 2
    vision_heads: Positive = 2
    patch_size: Positive = 16
    image_side: Positive = 256
    max_positions: Positive = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.key_value_heads:
            raise ValueError(f"key_value_heads: expected a divisor of heads = {self.heads}, got {self.key_value_heads}")
        if self.vision_hidden_size % self.vision_heads:
            wanted = f"a divisor of vision_hidden_size = {self.vision_hidden_size}"
            raise ValueError(f"vision_heads: expected {wanted}, got {self.vision_heads}")
        self.check_width("intermediate_size", self.intermediate_size)

    def check_width(self, name: str, width: int) -> None:
        """Raises for an MLP as wide as the model or its half: transformers tells expert layouts by shape alone."""
        if width in (self.hidden_size, self.hidden_size / 2):
            wanted = f"other than hidden_size = {self.hidden_size} and its half"
            raise ValueError(f"{name}: expected {wanted}, got {width}")


@dataclass(frozen=True, kw_only=True)
class TinyMoeSize(TinySize):
    """The sizes of a tiny Mixture-of-Experts.

    Args:
        experts: Experts of each layer.
        experts_per_token: Experts that each token chooses.
        expert_intermediate_size: Width of an expert.
    """

    experts: Positive = 4
    experts_per_token: Positive = 2
    expert_intermediate_size: Positive = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_width("expert_intermediate_size", self.expert_intermediate_size)
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token: expected at most experts = {self.experts}, got {self.experts_per_token}"
            )
