"""Tiny Qwen3-VL and Qwen3-VL-MoE models with random weights, built offline in seconds, as plain transformers has them.

I is the width of an expert's hidden layer, D that of the model.
"""

import json
from pathlib import Path
from typing import Self

import torch
from pydantic import model_validator
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism.config import TinySize
from prism.config.sections import Positive
from prism.models.tokenizer import IMAGE_TOKEN, TERMINAL_TOKEN, VIDEO_TOKEN, train_tokenizer


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

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        self.check_width("expert_intermediate_size", self.expert_intermediate_size)
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token: expected at most experts = {self.experts}, got {self.experts_per_token}"
            )
        return self


def tiny_policy(
    size: TinySize | None = None, *, tokenizer: Qwen2Tokenizer | None = None, seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen2Tokenizer]:
    """Returns a dense Qwen3-VL with its own random weights, and its tokenizer."""
    size = size or TinySize()
    tokenizer = tokenizer or train_tokenizer(vocab_size=size.vocab_size)
    text = {**_text_config(size, tokenizer), "intermediate_size": size.intermediate_size}
    config = Qwen3VLConfig(text_config=text, vision_config=_vision_config(size), **_token_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer)
    return model.eval(), tokenizer


def tiny_discriminator_base(
    size: TinyMoeSize | None = None, *, tokenizer: Qwen2Tokenizer | None = None, seed: int = 0
) -> tuple[Qwen3VLMoeForConditionalGeneration, Qwen2Tokenizer]:
    """Returns a Qwen3-VL-MoE with its own random weights, and its tokenizer."""
    size = size or TinyMoeSize()
    tokenizer = tokenizer or train_tokenizer(vocab_size=size.vocab_size)
    text = {
        **_text_config(size, tokenizer),
        "intermediate_size": size.intermediate_size,
        "moe_intermediate_size": size.expert_intermediate_size,
        "num_experts": size.experts,
        "num_experts_per_tok": size.experts_per_token,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_vision_config(size), **_token_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer)
    return model.eval(), tokenizer


def tiny_image_processor(size: TinySize | None = None) -> Qwen2VLImageProcessorPil:
    """Returns Qwen3-VL's image processor for tiny images, on PIL and numpy alone."""
    size = size or TinySize()
    side = 2 * size.patch_size
    return Qwen2VLImageProcessorPil(
        patch_size=size.patch_size,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": side * side, "longest_edge": size.image_side * size.image_side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_processor(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil
) -> None:
    """Writes tokenizer, chat template and processor files, such that AutoProcessor reads them where torchvision is.

    Without torchvision AutoTokenizer and the image processor load; transformers' Qwen3-VL processor itself asks for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    image = {key: value for key, value in image_processor.to_dict().items() if key != "image_processor_type"}
    image = {**image, "processor_class": "Qwen3VLProcessor"}
    files = {
        "preprocessor_config.json": {**image, "image_processor_type": "Qwen2VLImageProcessor"},
        # written by hand: the class needs torchvision even to be imported
        "video_preprocessor_config.json": {
            **{key: image[key] for key in ("patch_size", "temporal_patch_size", "merge_size", "size")},
            **{key: image[key] for key in ("image_mean", "image_std", "processor_class")},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_tiny(
    folder: str | Path,
    model: Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    image_processor: Qwen2VLImageProcessorPil | None = None,
) -> Path:
    """Writes a folder that plain transformers and vLLM load, and returns it."""
    folder = Path(folder)
    model.save_pretrained(folder)
    save_processor(folder, tokenizer, image_processor or tiny_image_processor())
    return folder


def _text_config(size: TinySize, tokenizer: Qwen2Tokenizer) -> dict:
    section = size.head_dim // 8
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {**rope, "mrope_section": [size.head_dim // 2 - 2 * section, section, section]},
        # tied, an engine that takes weights in place after each step goes wrong
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision_config(size: TinySize) -> dict:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden_size,
        "patch_size": size.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": (size.image_side // size.patch_size) ** 2,
        "deepstack_visual_indexes": [0],
    }


def _token_ids(tokenizer: Qwen2Tokenizer) -> dict:
    named = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()} | {
        "tie_word_embeddings": False
    }


def _generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (TERMINAL_TOKEN, "<|endoftext|>")]
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=True)
