"""The models of a run, as its settings say: the policy with its encoder, and the discriminator upcycled from it.

The tiny policy of the default sizes has a base that ships with the package: it answers well, in a style of its own.
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

from prism.config import Config, ConfigError, TinySize
from prism.discriminator.model import Discriminator
from prism.discriminator.storage import IMAGES_KEY, has_value_head, load_discriminator
from prism.discriminator.upcycle import upcycle
from prism.models.policy import CausalModel, Policy
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism_kernels import check

FAMILIES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}
# what a checkpoint is made of; other files of a hub's repository are not fetched
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "value_head.pt")
TINY_BASE = "tiny base"
BASE_PATH = Path(__file__).parent / "tiny_base.safetensors"


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
    model, encoder = plain_policy(config)
    policy = Policy(model)
    if config.memory.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Built(policy, encoder)


def plain_policy(config: Config) -> tuple[Qwen3VLForConditionalGeneration, PromptEncoder]:
    """Returns the policy before the first stage as transformers has it, not set to packs, and its encoder."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.policy == "tiny":
        size = config.model.tiny
        model, tokenizer = tiny_policy(size, seed=config.run.seed)
        # other sizes have no base that could be shipped: they begin at random, or with the stage that pretrains
        if size == TinySize() and "base" not in config.run.stages:
            load_tiny_base(model)
        encoder = PromptEncoder(tokenizer, tiny_image_processor(size))
    else:
        model = load_dense("model.policy", config.model.policy, dtype)
        encoder = load_encoder(config.model.policy, config.model.max_image_pixels)
    # not the model's own `to`, whose annotation knows no device
    torch.nn.Module.to(model, device_of(config), dtype)
    return model, encoder


def build_discriminator(config: Config, base: CausalModel) -> Discriminator:
    """Returns the discriminator before its warm-up.

    Args:
        config: the settings.
        base: the policy before the first stage, which it is upcycled from unless the settings name another model.
    """
    wanted, named = config.discriminator, config.model.discriminator
    dtype = getattr(torch, config.model.dtype)
    if named != "policy":
        if (whole := _load_whole(config, checkpoint_folder("model.discriminator", named), dtype)) is not None:
            return _placed(config, whole)
        base = load_causal("model.discriminator", named, dtype)
    if isinstance(base, Qwen3VLMoeForConditionalGeneration):
        if wanted.dense:
            raise ConfigError(f"discriminator.dense: expected false, {named!r} is a Mixture-of-Experts, got true")
        backbone = copy.deepcopy(base.model)
    elif wanted.dense:
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
    return _placed(config, Discriminator(backbone, images=wanted.images, kind_bias=wanted.kind_bias))


def _placed(config: Config, model: Discriminator) -> Discriminator:
    if config.memory.activation_checkpointing:
        model.checkpoint_layers()
    return model.to(device_of(config))


def _load_whole(config: Config, folder: Path, dtype: torch.dtype) -> Discriminator | None:
    """Returns the discriminator of a folder, as which the settings must describe it; None: a model to make one of."""
    wanted, saved = config.discriminator, json.loads((folder / "config.json").read_text())
    try:
        if not has_value_head(folder):
            return None
        model = load_discriminator(folder, dtype=dtype, images=None if IMAGES_KEY in saved else wanted.images)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.discriminator: {error}") from error
    _own(model)
    text: Any = model.config.get_text_config()
    # a dense one has no experts
    experts = getattr(text, "num_experts", None)
    found = {"dense": experts is None, "images": model.images, "kind_bias": model.kind_bias}
    if experts is not None:
        found |= {"experts": experts, "top_k": text.num_experts_per_tok}
    for name, value in found.items():
        if getattr(wanted, name) != value:
            had, got = (str(x).lower() for x in (value, getattr(wanted, name)))
            raise ConfigError(f"discriminator.{name}: expected {had}, which {str(folder)!r} was made with, got {got}")
    return model


def checkpoint_folder(key: str, named: str) -> Path:
    """Returns the folder of a model, downloaded where it is a hub id.

    Args:
        key: of the settings or the flag, for errors.
        named: folder or hub id.
    """
    if Path(named).is_dir():
        if not (Path(named) / "config.json").is_file():
            raise ConfigError(f"{key}: expected a folder with a config.json, got {named!r}")
        return Path(named)
    try:
        return Path(snapshot_download(named, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        # huggingface_hub's errors are one of the two
        raise ConfigError(
            f"{key}: expected a folder with a config.json or a model of the hub, got {named!r}: {_first_line(error)}"
        ) from error


def load_causal(key: str, named: str, dtype: torch.dtype | str) -> CausalModel:
    """Returns a Qwen3-VL model with its language-model head, dense or not; raises `ConfigError` where it is none.

    Args:
        key: of the settings or the flag, for errors.
        named: folder or hub id.
        dtype: of the weights; `auto`: the checkpoint's.
    """
    folder = checkpoint_folder(key, named)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in FAMILIES:
            raise ConfigError(f"{key}: expected a model of type {' or '.join(FAMILIES)}, {named!r} is of type {kind!r}")
        # its annotation does not know that it gives two things when asked
        loaded: Any = FAMILIES[kind].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: expected a Qwen3-VL checkpoint, got {named!r}: {_first_line(error)}") from error
    model: CausalModel
    model, info = loaded
    # transformers has begun them at random
    if missing := sorted(info["missing_keys"]):
        lacking = f"{len(missing)} tensors, the first is {missing[0]}"
        raise ConfigError(f"{key}: expected a model with all of its weights, {named!r} lacks {lacking}")
    _own(model)
    return model


def load_dense(key: str, named: str, dtype: torch.dtype | str) -> Qwen3VLForConditionalGeneration:
    """Returns a dense Qwen3-VL with its language-model head; see `load_causal`."""
    model = load_causal(key, named, dtype)
    if not isinstance(model, Qwen3VLForConditionalGeneration):
        raise ConfigError(f"{key}: expected a dense Qwen3-VL, {named!r} is a Mixture-of-Experts")
    return model


def load_encoder(named: str, max_image_pixels: int | None = None, *, local_files_only: bool = False) -> PromptEncoder:
    """Returns what turns prompts into what a model reads.

    Args:
        named: folder or hub id.
        max_image_pixels: images are scaled down to this width times height; None: as the processor says.
        local_files_only: whether nothing is downloaded.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(named, local_files_only=local_files_only)
    if max_image_pixels is not None:
        processor.size = {**processor.size, "longest_edge": max_image_pixels}
    return PromptEncoder(AutoTokenizer.from_pretrained(named, local_files_only=local_files_only), processor)


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


def _own(model: torch.nn.Module) -> None:
    """Copies weights out of the file that they are mapped from.

    There they are not aligned as torch aligns its own, on which the last bits of a matrix product depend; and the file
    may be written over.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    write_tiny_base(sys.argv[1])
