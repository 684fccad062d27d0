"""The models of a run, as its settings say: the policy with its encoder, and the discriminator upcycled from it."""

import copy
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from prism.config import Config
from prism.config.sections import Tiny
from prism.discriminator.model import Discriminator
from prism.discriminator.upcycle import upcycle
from prism.models.pretrained import load_tiny_base
from prism.models.prompts import PromptEncoder
from prism.models.tiny import TinySize, tiny_image_processor, tiny_policy
from prism.policy import CausalModel, Policy


class Built(NamedTuple):
    """A policy, and what turns prompts into what it reads."""

    policy: Policy
    encoder: PromptEncoder


def device_of(config: Config) -> torch.device:
    """Returns the device of a run."""
    name = config.run.device
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def build_policy(config: Config) -> Built:
    """Returns the policy before the first stage."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.policy == "tiny":
        size = tiny_size(config)
        model, tokenizer = tiny_policy(size, seed=config.run.seed)
        # other sizes have no base that could be shipped: they begin at random, or with the stage that pretrains
        if config.model.tiny == Tiny() and "base" not in config.run.stages:
            load_tiny_base(model)
        encoder = PromptEncoder(tokenizer, tiny_image_processor(size))
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(config.model.policy, dtype=dtype)
        encoder = PromptEncoder(AutoTokenizer.from_pretrained(config.model.policy), _image_processor(config))
    # not the model's own `to`, whose annotation knows no device
    torch.nn.Module.to(model, device_of(config), dtype)
    policy = Policy(model)
    if config.memory.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Built(policy, encoder)


def tiny_size(config: Config) -> TinySize:
    """Returns the sizes of the tiny models."""
    found = config.discriminator
    return TinySize(**config.model.tiny.model_dump(), experts=found.experts, experts_per_token=found.top_k)


def build_discriminator(config: Config, base: CausalModel) -> Discriminator:
    """Returns the discriminator before its warm-up.

    Args:
        config: the settings.
        base: the policy before the first stage, which it is upcycled from unless the settings name another model.
    """
    wanted, named = config.discriminator, config.model.discriminator
    dtype = getattr(torch, config.model.dtype)
    if named != "policy":
        kind = AutoConfig.from_pretrained(named).model_type
        family = Qwen3VLMoeForConditionalGeneration if kind == "qwen3_vl_moe" else Qwen3VLForConditionalGeneration
        base = family.from_pretrained(named, dtype=dtype)
    if wanted.dense or isinstance(base, Qwen3VLMoeForConditionalGeneration):
        backbone = copy.deepcopy(base.model)
    else:
        backbone = upcycle(
            base,
            wanted.experts,
            wanted.top_k,
            noise=wanted.noise,
            router_std=wanted.router_std,
            seed=config.run.seed,
        )
    model = Discriminator(backbone, images=wanted.images, kind_bias=wanted.kind_bias)
    if config.memory.activation_checkpointing:
        model.checkpoint_layers()
    return model.to(device_of(config))


def _image_processor(config: Config) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(config.model.policy)
    if config.model.max_image_pixels is not None:
        processor.size = {**processor.size, "longest_edge": config.model.max_image_pixels}
    return processor
