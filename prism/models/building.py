"""Builds the models of a run from its settings: the policy with its encoder, and the discriminator.

The package ships weights for the tiny policy of the default sizes: a base that answers well, in a style of its own.
`prism run --config configs/tiny_base.toml` trains such a base (that file says how the shipped one was made); then
`python -m prism.models.building FOLDER` writes the policy of that run's folder as the new shipped base.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from prism.config import Config, ConfigError
from prism.discriminator.model import Discriminator
from prism.discriminator.storage import IMAGES_KEY, has_value_head, load_discriminator
from prism.discriminator.upcycle import upcycle
from prism.models.policy import CausalModel, Policy
from prism.models.prompts import PromptEncoder
from prism.models.sizes import TinySize
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism_kernels import check

FAMILIES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}
# files of a checkpoint; the other files of a hub repository are not downloaded
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "value_head.pt")
TINY_BASE = "tiny base"
BASE_PATH = Path(__file__).parent / "tiny_base.safetensors"


class Built(NamedTuple):
    """A policy and the encoder of its prompts."""

    policy: Policy
    encoder: PromptEncoder


def device_of(config: Config) -> torch.device:
    """Returns the device of a run."""
    name = config.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def build_policy(config: Config) -> Built:
    """Returns the initial policy, set to packs, and its encoder."""
    model, encoder = plain_policy(config)
    policy = Policy(model)
    if config.memory.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Built(policy, encoder)


def plain_policy(config: Config) -> tuple[Qwen3VLForConditionalGeneration, PromptEncoder]:
    """Returns the initial policy as a plain transformers model, not set to packs, and its encoder."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.policy == "tiny":
        size = config.model.tiny
        model, tokenizer = tiny_policy(size, seed=config.run.seed)
        # other sizes have no shipped weights: they start at random, or with the stage `base`
        if size == TinySize() and "base" not in config.run.stages:
            load_tiny_base(model)
        encoder = PromptEncoder(tokenizer, tiny_image_processor(size))
    else:
        model = load_dense("model.policy", config.model.policy, dtype)
        encoder = load_encoder(config.model.policy, config.model.max_image_pixels)
    # the annotation of the model's own `to` has no device
    torch.nn.Module.to(model, device_of(config), dtype)
    return model, encoder


def build_discriminator(config: Config, base: CausalModel) -> Discriminator:
    """Returns the discriminator before its warm-up.

    Args:
        config: the settings.
        base: the initial policy; it is upcycled unless the settings name another model.
    """
    settings, name = config.discriminator, config.model.discriminator
    dtype = getattr(torch, config.model.dtype)
    if name != "policy":
        saved = _load_saved(config, checkpoint_folder("model.discriminator", name), dtype)
        if saved is not None:
            return _prepared(config, saved)
        base = load_causal("model.discriminator", name, dtype)
    if isinstance(base, Qwen3VLMoeForConditionalGeneration):
        if settings.dense:
            raise ConfigError(f"discriminator.dense: expected false, {name!r} is a Mixture-of-Experts, got true")
        backbone = copy.deepcopy(base.model)
    elif settings.dense:
        backbone = copy.deepcopy(base.model)
    else:
        backbone = upcycle(
            base,
            settings.experts,
            settings.top_k,
            noise=settings.noise,
            router_std=settings.router_std,
            seed=config.run.seed,
        )
    return _prepared(config, Discriminator(backbone, images=settings.images, kind_bias=settings.kind_bias))


def _prepared(config: Config, model: Discriminator) -> Discriminator:
    if config.memory.activation_checkpointing:
        model.checkpoint_layers()
    return model.to(device_of(config))


def _load_saved(config: Config, folder: Path, dtype: torch.dtype) -> Discriminator | None:
    """Returns the discriminator of a folder, checked against the settings; None for a model without a value head."""
    settings = config.discriminator
    try:
        if not has_value_head(folder):
            return None
        says_images = IMAGES_KEY in json.loads((folder / "config.json").read_text())
        model = load_discriminator(folder, dtype=dtype, images=None if says_images else settings.images)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.discriminator: {error}") from error
    _copy_weights(model)
    text: Any = model.config.get_text_config()
    # None for a dense model
    experts = getattr(text, "num_experts", None)
    saved = {"dense": experts is None, "images": model.images, "kind_bias": model.kind_bias}
    if experts is not None:
        saved |= {"experts": experts, "top_k": text.num_experts_per_tok}
    for name, value in saved.items():
        if getattr(settings, name) != value:
            expected, got = (str(x).lower() for x in (value, getattr(settings, name)))
            raise ConfigError(f"discriminator.{name}: expected {expected}, as in {str(folder)!r}, got {got}")
    return model


def checkpoint_folder(key: str, name: str) -> Path:
    """Returns the folder of a model; a model of the hub is downloaded.

    Args:
        key: setting or flag that names the model, for errors.
        name: folder or hub id.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{key}: expected a folder with a config.json, got {name!r}")
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        # every error of huggingface_hub is one of the two
        raise ConfigError(
            f"{key}: expected a folder with a config.json or a model of the hub, got {name!r}: {_first_line(error)}"
        ) from error


def load_causal(key: str, name: str, dtype: torch.dtype | str) -> CausalModel:
    """Returns a Qwen3-VL, dense or Mixture-of-Experts, with its language-model head; any other is a `ConfigError`.

    Args:
        key: setting or flag that names the model, for errors.
        name: folder or hub id.
        dtype: dtype of the weights; `auto`: as in the checkpoint.
    """
    folder = checkpoint_folder(key, name)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in FAMILIES:
            raise ConfigError(f"{key}: expected a model of type {' or '.join(FAMILIES)}, {name!r} is of type {kind!r}")
        # the annotation has no pair, which output_loading_info returns
        loaded: Any = FAMILIES[kind].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: expected a Qwen3-VL checkpoint, got {name!r}: {_first_line(error)}") from error
    model: CausalModel
    model, info = loaded
    # transformers initialises missing weights at random
    if missing := sorted(info["missing_keys"]):
        lacking = f"{len(missing)} tensors, the first is {missing[0]}"
        raise ConfigError(f"{key}: expected a model with all of its weights, {name!r} lacks {lacking}")
    _copy_weights(model)
    return model


def load_dense(key: str, name: str, dtype: torch.dtype | str) -> Qwen3VLForConditionalGeneration:
    """Returns a dense Qwen3-VL with its language-model head; see `load_causal`."""
    model = load_causal(key, name, dtype)
    if not isinstance(model, Qwen3VLForConditionalGeneration):
        raise ConfigError(f"{key}: expected a dense Qwen3-VL, {name!r} is a Mixture-of-Experts")
    return model


def load_encoder(name: str, max_image_pixels: int | None = None, *, local_files_only: bool = False) -> PromptEncoder:
    """Returns the encoder of a model's prompts.

    Args:
        name: folder or hub id.
        max_image_pixels: larger images are scaled down to this width times height; None: the processor's limit.
        local_files_only: whether to download nothing.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(name, local_files_only=local_files_only)
    if max_image_pixels is not None:
        processor.size = {**processor.size, "longest_edge": max_image_pixels}
    return PromptEncoder(AutoTokenizer.from_pretrained(name, local_files_only=local_files_only), processor)


def load_tiny_base(model: torch.nn.Module) -> None:
    """Loads the shipped weights into a tiny policy of the default sizes."""
    if not BASE_PATH.exists():
        wanted = f"{BASE_PATH}, which `prism run --config configs/tiny_base.toml` and `python -m {__name__}` make"
        check.fail(TINY_BASE, wanted, "none", RuntimeError)
    tensors = load_file(BASE_PATH)
    for name, value in model.state_dict().items():
        if name not in tensors or tensors[name].shape != value.shape:
            got = tuple(tensors[name].shape) if name in tensors else "none"
            check.fail(TINY_BASE, f"{name} of shape {tuple(value.shape)} in {BASE_PATH.name}", got)
    model.load_state_dict(tensors)


def write_tiny_base(folder: str | Path) -> None:
    """Writes the shipped weights, in half precision, from a folder that transformers saved."""
    tensors = load_file(Path(folder) / "model.safetensors")
    save_file({name: value.to(torch.float16) for name, value in tensors.items()}, BASE_PATH)
    print(f"wrote {BASE_PATH}, {BASE_PATH.stat().st_size / 2**20:.1f} MiB")


def _copy_weights(model: torch.nn.Module) -> None:
    """Copies the weights out of their memory-mapped file.

    Weights in the file have another alignment than torch's own memory, which changes the last bits of matrix products;
    and the file may be overwritten.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    write_tiny_base(sys.argv[1])
