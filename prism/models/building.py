"""Builds the models of a run from its settings: the policy with its encoder, and the discriminator.

The package ships weights for the tiny policy of the default sizes: a base that answers well, in a style of its own.
`prism run --config configs/tiny_base.toml` trains such a base (that file says how the shipped one was made); then
`python -m prism.models.building FOLDER` writes the policy of that run's folder as the new shipped base.
"""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from prism.config import Config, ConfigError
from prism.discriminator.model import Discriminator
from prism.discriminator.storage import IMAGES_KEY, has_value_head, load_discriminator
from prism.discriminator.upcycle import upcycle
from prism.models.families import DENSE, MOE, family_of
from prism.models.policy import CausalModel, Policy
from prism.models.prompts import PromptEncoder, limited_size
from prism.models.sizes import TinySize
from prism.models.tiny import VIDEOS, tiny_image_processor, tiny_policy, train_tokenizer
from prism_kernels import check

CLASSES = {DENSE: Qwen3VLForConditionalGeneration, MOE: Qwen3VLMoeForConditionalGeneration}
# files of a checkpoint; the other files of a hub repository are not downloaded
SMALL_FILES = ("*.json", "*.txt", "*.jinja")
FILES = (*SMALL_FILES, "*.safetensors", "value_head.pt")
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
    encoder = policy_encoder(config)
    if config.model.policy == "tiny":
        size = config.model.tiny
        assert isinstance(encoder.tokenizer, Qwen2Tokenizer)
        model, _ = tiny_policy(size, tokenizer=encoder.tokenizer, seed=config.run.seed)
        # other sizes have no shipped weights: they start at random, or with the stage `base`
        if size == TinySize() and "base" not in config.run.stages:
            load_tiny_base(model)
    else:
        model = load_dense("model.policy", config.model.policy, dtype)
    # the annotation of the model's own `to` has no device
    torch.nn.Module.to(model, device_of(config), dtype)
    return model, encoder


def policy_encoder(config: Config, *, download: bool = True) -> PromptEncoder:
    """Returns the encoder of prompts for the policy.

    Args:
        config: the settings.
        download: whether to download the files of a model of the hub; False: raises FileNotFoundError if they are not
            on this machine.
    """
    name, most = config.model.policy, config.model.max_image_pixels
    if name == "tiny":
        size = config.model.tiny
        return PromptEncoder(
            train_tokenizer(vocab_size=size.vocab_size), limit_images(tiny_image_processor(size), most)
        )
    return load_encoder("model.policy", name, most, families=(DENSE,), download=download)


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


def checkpoint_folder(
    key: str, name: str, families: Sequence[str] = (DENSE, MOE), *, weights: bool = True, download: bool = True
) -> Path:
    """Returns the folder of a model of a supported family; a model of the hub is downloaded, its weights last.

    Args:
        key: setting or flag that names the model, for errors.
        name: folder or hub id.
        families: the supported families.
        weights: whether to download the weights.
        download: whether to download anything; False: raises FileNotFoundError if the files are not on this machine.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{key}: expected a folder with a config.json, got {name!r}")
        family_of(key, folder, families)
        return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES), local_files_only=not download))
        family_of(key, folder, families, name=name)
        if weights and download:
            # the snapshot's folder has the name of its commit, so that both downloads are of one version
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=list(FILES)))
        return folder
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError) or (isinstance(error, FileNotFoundError) and not download):
            raise
        # every error of huggingface_hub is one of the two
        raise ConfigError(
            f"{key}: expected a folder with a config.json or a model of the hub, got {name!r}: {_first_line(error)}"
        ) from error


def load_causal(key: str, name: str, dtype: torch.dtype | str, families: Sequence[str] = (DENSE, MOE)) -> CausalModel:
    """Returns a Qwen3-VL, dense or Mixture-of-Experts, with its language-model head; any other is a `ConfigError`.

    Args:
        key: setting or flag that names the model, for errors.
        name: folder or hub id.
        dtype: dtype of the weights; `auto`: as in the checkpoint.
        families: the supported families.
    """
    folder = checkpoint_folder(key, name, families)
    try:
        # the annotation has no pair, which output_loading_info returns
        loaded: Any = CLASSES[family_of(key, folder)].from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
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
    model = load_causal(key, name, dtype, (DENSE,))
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    return model


def load_encoder(
    key: str,
    name: str,
    max_image_pixels: int | None = None,
    *,
    families: Sequence[str] = (DENSE, MOE),
    download: bool = True,
) -> PromptEncoder:
    """Returns the encoder of a model's prompts.

    Args:
        key: setting or flag that names the model, for errors.
        name: folder or hub id.
        max_image_pixels: see `limit_images`.
        families: the supported families.
        download: see `checkpoint_folder`.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = checkpoint_folder(key, name, families, weights=False, download=download)
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        videos = json.loads((folder / VIDEOS).read_text()) if (folder / VIDEOS).is_file() else None
    except (OSError, ValueError) as error:
        wanted = f"the files of a tokenizer and an image processor in {str(folder)!r}"
        raise ConfigError(f"{key}: expected {wanted}: {_first_line(error)}") from error
    return PromptEncoder(tokenizer, limit_images(processor, max_image_pixels), videos)


def limit_images(processor: Any, most: int | None) -> Any:
    """Sets an image processor to scale larger images down to `most` pixels, and returns it.

    Args:
        processor: `Qwen2VLImageProcessorPil` or its torchvision twin.
        most: width times height after scaling; None: the processor's limit.
    """
    if most is None:
        return processor
    factor = processor.patch_size * processor.merge_size
    if most < factor**2:
        wanted = f"at least {factor**2}, the pixels of one image token"
        raise ConfigError(f"model.max_image_pixels: expected {wanted}, got {most}")
    processor.size = limited_size(dict(processor.size), most, factor)
    return processor


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
