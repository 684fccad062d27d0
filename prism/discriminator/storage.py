"""Discriminators on disk: config.json, safetensors and value head; a tag names the layout of the expert weights.

E experts, D hidden width, I width of an expert. The three layouts hold the same numbers:

============== ============================================ ============
layout         experts.gate_up_proj                         down_proj
============== ============================================ ============
transformers   (E, 2I, D), gates before ups                 (E, D, I)
published      (E, D, 2I), gates before ups                 (E, I, D)
interleaved    (E, D, 2I), gate and up alternate            (E, I, D)
============== ============================================ ============

If 2I = D or I = D, the shapes do not tell the layouts apart, so the layout is never guessed from them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, Qwen3VLConfig, Qwen3VLModel, Qwen3VLMoeConfig, Qwen3VLMoeModel

from prism.discriminator.model import Discriminator
from prism.models.packed import Backbone
from prism_kernels import check

NAME = "discriminator checkpoint"
LAYOUTS = ("transformers", "published", "interleaved")
LAYOUT_KEY = "expert_layout"
IMAGES_KEY = "discriminator_images"
KIND_BIAS_KEY = "discriminator_kind_bias"
VALUE_KEY = "v_head.weight"
GATE_UP, DOWN, KIND_BIAS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.kind_bias"


def save_discriminator(
    model: Discriminator, folder: str | Path, *, layout: str = "transformers", max_shard_size: str = "5GB"
) -> Path:
    """Writes config.json and model.safetensors (or shards and their index), and returns the folder.

    Args:
        model: the discriminator; the backbone keeps its dtype, and the value head is written in fp32.
        folder: folder to write to; made if it does not exist.
        layout: layout of the expert weights, written into config.json; a dense model has none.
        max_shard_size: the largest size of a file.
    """
    check.one_of(NAME, "layout", layout, LAYOUTS)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    moe = isinstance(model.config, Qwen3VLMoeConfig)
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    config = model.config.to_dict() | {IMAGES_KEY: model.images, KIND_BIAS_KEY: model.kind_bias, "dtype": dtype}
    architecture = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
    config |= {"architectures": [architecture]} | ({LAYOUT_KEY: layout} if moe else {})
    state = {f"model.{name}": _to_layout(name, tensor, layout) for name, tensor in model.backbone.state_dict().items()}
    state[VALUE_KEY] = model.value_head.weight.detach().float()
    save_torch_state_dict({name: t.contiguous() for name, t in state.items()}, folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def load_discriminator(
    folder: str | Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    images: bool | None = None,
) -> Discriminator:
    """Returns the discriminator of a folder.

    The value head is a tensor `v_head.*` of the checkpoint, or the file value_head.pt beside it.

    Args:
        folder: folder with config.json and safetensors.
        layout: layout of the expert weights; needed if config.json has no `expert_layout`.
        dtype: dtype of the backbone; None: as config.json says.
        images: whether prompts hold images; None: as config.json says, or true if it does not say.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tensors = read_tensors(folder)
    head = value_weight(tensors, folder)
    backbone = {backbone_name(name): tensor for name, tensor in tensors.items()}
    for name in [name for name in backbone if name.startswith(("v_head.", "lm_head."))]:
        del backbone[name]
    if isinstance(config, Qwen3VLMoeConfig):
        layout = _layout_of(config, layout)
        backbone = {name: _from_layout(name, tensor, layout, config) for name, tensor in backbone.items()}
    biases = {name: backbone.pop(name) for name in list(backbone) if name.endswith(KIND_BIAS)}
    model = Discriminator(
        build_backbone(config, backbone, dtype),
        images=getattr(config, IMAGES_KEY, True) if images is None else images,
        kind_bias=getattr(config, KIND_BIAS_KEY, False),
        value_weight=head,
    )
    _fill(model.backbone, biases)
    return model


def build_backbone(config: PreTrainedConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Backbone:
    """Returns the backbone with these tensors, in transformers' layout; checks their names and shapes.

    Args:
        config: configuration of a Qwen3-VL or Qwen3-VL-MoE model.
        state: tensors by name, `language_model.…` and `visual.…`.
        dtype: dtype of the backbone; None: the configuration's, or fp32 if it has none.
    """
    classes = {Qwen3VLConfig: Qwen3VLModel, Qwen3VLMoeConfig: Qwen3VLMoeModel}
    if type(config) not in classes:
        check.fail(NAME, "the configuration of a Qwen3-VL or Qwen3-VL-MoE model", type(config).__name__, TypeError)
    cls = classes[type(config)]
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
    _check_tensors(expected, state, cls.__name__)
    chosen = dtype or config.dtype or torch.float32
    model = cls.from_pretrained(None, config=config, state_dict=dict(state), dtype=chosen, trust_remote_code=False)
    return cast(Backbone, model)


def _check_tensors(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], owner: str) -> None:
    for name, shape in expected.items():
        if name not in state:
            check.fail(NAME, f"tensor {name} of shape {shape}", "none")
        check.shape(NAME, name, state[name], shape)
    if unknown := sorted(set(state) - set(expected)):
        check.fail(NAME, f"the tensors of {owner} alone", f"{len(unknown)} more, the first is {unknown[0]}")


@torch.no_grad()
def _fill(backbone: Backbone, biases: Mapping[str, Tensor]) -> None:
    parameters = {name: p for name, p in backbone.named_parameters() if name.endswith(KIND_BIAS)}
    _check_tensors({name: tuple(p.shape) for name, p in parameters.items()}, biases, "the routers' kinds")
    for name, parameter in parameters.items():
        parameter.copy_(biases[name])


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder's safetensors, one file or shards."""
    tensors: dict[str, Tensor] = {}
    for file in _shards(folder):
        with safe_open(file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def has_value_head(folder: str | Path) -> bool:
    """Returns whether a folder holds a discriminator and not a plain model; reads no weights."""
    if (Path(folder) / "value_head.pt").exists():
        return True
    for file in _shards(folder):
        with safe_open(file, framework="pt") as shard:
            if any(name.startswith("v_head.") for name in shard.keys()):  # noqa: SIM118
                return True
    return False


def _shards(folder: str | Path) -> list[Path]:
    """Returns the safetensors files of a folder; checks that none is missing."""
    index = Path(folder) / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(names):
        if not (Path(folder) / name).exists():
            check.fail(NAME, f"{name} in {folder}", "none", FileNotFoundError)
    return [Path(folder) / name for name in sorted(names)]


def value_weight(tensors: Mapping[str, Tensor], folder: str | Path) -> Tensor:
    """Returns the value head (1, D) of a checkpoint: its one `v_head.*` tensor, or the tensor of value_head.pt."""
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("v_head.")}
    source = "the safetensors"
    if not heads:
        path = Path(folder) / "value_head.pt"
        source = path.name
        if not path.exists():
            check.fail(NAME, f"a tensor v_head.* or the file value_head.pt in {folder}", "neither", FileNotFoundError)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        heads = {"value": loaded} if isinstance(loaded, Tensor) else dict(loaded)
    if len(heads) != 1:
        check.fail(NAME, f"one value-head tensor without bias in {source}", sorted(heads))
    name, weight = next(iter(heads.items()))
    check.tensor(NAME, name, weight)
    check.shape(NAME, name, weight, (1, "D"))
    return weight.float()


def _layout_of(config: PreTrainedConfig, layout: str | None) -> str:
    tagged = getattr(config, LAYOUT_KEY, None)
    if tagged is None and layout is None:
        known = ", ".join(LAYOUTS)
        check.fail(NAME, f"the layout of the experts ({known}) as layout= or as {LAYOUT_KEY} in config.json", "neither")
    if tagged is not None and layout is not None and tagged != layout:
        check.fail(NAME, f"layout= to agree with {LAYOUT_KEY} {tagged!r} in config.json", repr(layout))
    chosen = str(layout or tagged)
    check.one_of(NAME, "layout", chosen, LAYOUTS)
    return chosen


def backbone_name(name: str) -> str:
    """Returns the backbone's name of a checkpoint's tensor."""
    return name.removeprefix("model.")


def _expert_shape(name: str, config: Qwen3VLMoeConfig, layout: str) -> tuple[int, int, int]:
    text: Any = config.text_config
    expert, D = text.moe_intermediate_size, text.hidden_size
    rows, columns = (2 * expert, D) if name.endswith(GATE_UP) else (D, expert)
    return (text.num_experts, rows, columns) if layout == "transformers" else (text.num_experts, columns, rows)


def _from_layout(name: str, tensor: Tensor, layout: str, config: Qwen3VLMoeConfig) -> Tensor:
    """Returns an expert tensor in transformers' layout; other tensors unchanged."""
    if not name.endswith((GATE_UP, DOWN)):
        return tensor
    check.shape(f"{NAME}, layout {layout}", name, tensor, _expert_shape(name, config, layout))
    if layout == "transformers":
        return tensor
    if layout == "interleaved" and name.endswith(GATE_UP):
        tensor = tensor.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return tensor.transpose(1, 2).contiguous()


def _to_layout(name: str, tensor: Tensor, layout: str) -> Tensor:
    """Returns an expert tensor of transformers' layout in another layout; other tensors unchanged."""
    if layout == "transformers" or not name.endswith((GATE_UP, DOWN)):
        return tensor
    tensor = tensor.transpose(1, 2)
    if layout == "interleaved" and name.endswith(GATE_UP):
        tensor = tensor.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    return tensor
