"""Upcycling: a dense model becomes a Mixture-of-Experts whose experts are the dense MLP with relative noise.

E experts, K chosen experts, D hidden width, I width of the MLP.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeModel,
)

from prism.discriminator.storage import backbone_name, build_backbone, read_tensors
from prism_kernels import check

NAME = "upcycle"
LAYER = "language_model.layers"


@dataclass(frozen=True)
class UpcycleReport:
    """The change of the model's function on a batch, as ratios of root mean squares."""

    noise: float
    # of the residual stream after each layer
    layer_change: tuple[float, ...]
    # of the last hidden state, after the final norm
    hidden_change: float
    # of the logits; None if the dense model has no head
    logit_change: float | None

    def require(self, max_change: float) -> "UpcycleReport":
        """Returns itself, or raises if the last hidden state or the logits changed by more than `max_change`."""
        for name, change in (("hidden states", self.hidden_change), ("logits", self.logit_change)):
            if change is not None and not change <= max_change:
                expected = f"{name} to change by at most {max_change:.3g} at noise {self.noise:.3g}"
                check.fail(NAME, expected, f"{change:.3g}; lower the noise")
        return self


def upcycle(
    dense: Qwen3VLForConditionalGeneration | Qwen3VLModel | str | Path,
    num_experts: int,
    top_k: int,
    *,
    noise: float = 0.0,
    router_std: float = 0.006,
    seed: int = 0,
) -> Qwen3VLMoeModel:
    """Returns a Qwen3-VL-MoE backbone: each layer mixes `top_k` of `num_experts` copies of the dense MLP.

    The weights of the chosen experts sum to 1, so that without noise the function is the dense one, up to rounding.
    The backbone has the dense model's dtype and device, and shares no memory with it.

    Args:
        dense: the model, with or without its language-model head, or the folder of its checkpoint.
        num_experts: E.
        top_k: K.
        noise: standard deviation of the noise, relative to that of each weight tensor.
        router_std: standard deviation of the router's weights.
        seed: seed of noise and router.
    """
    source: Any
    if isinstance(dense, str | Path):
        source = AutoConfig.from_pretrained(dense, trust_remote_code=False)
        tensors = {backbone_name(name): t for name, t in read_tensors(dense).items() if not name.startswith("lm_head.")}
        dtype, device, training = source.dtype, torch.device("cpu"), False
    else:
        base = dense.model if isinstance(dense, Qwen3VLForConditionalGeneration) else dense
        source, tensors = base.config, base.state_dict()
        dtype, device, training = base.dtype, base.device, base.training
    if not isinstance(source, Qwen3VLConfig):
        check.fail(NAME, "a dense Qwen3-VL model or its folder", type(source).__name__, TypeError)
    config = upcycled_config(source, num_experts, top_k)
    state = upcycled_state(tensors, config, noise=noise, router_std=router_std, seed=seed)
    model = build_backbone(config, state, dtype).train(training)
    assert isinstance(model, Qwen3VLMoeModel)
    nn.Module.to(model, device)
    return model


def upcycled_config(dense: Qwen3VLConfig, num_experts: int, top_k: int) -> Qwen3VLMoeConfig:
    """Returns a dense model's configuration with `num_experts` experts in each layer, `top_k` of them for a token."""
    if num_experts < 1:
        check.fail(NAME, "num_experts >= 1", num_experts)
    if not 1 <= top_k <= num_experts:
        check.fail(NAME, f"top_k in [1, num_experts = {num_experts}]", top_k)
    dropped = ("model_type", "architectures", "transformers_version")
    text: Any = dense.text_config
    parts: dict[str, Any] = {
        part: {key: value for key, value in getattr(dense, part).to_dict().items() if key not in dropped}
        for part in ("text_config", "vision_config")
    }
    parts["text_config"] |= {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": text.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    ids = {key: getattr(dense, key) for key in dense.to_dict() if key.endswith("_token_id")}
    return Qwen3VLMoeConfig(**parts, **ids, dtype=dense.dtype, tie_word_embeddings=dense.tie_word_embeddings)


def upcycled_state(
    dense: Mapping[str, Tensor],
    config: Qwen3VLMoeConfig,
    *,
    noise: float = 0.0,
    router_std: float = 0.006,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns the tensors of the new backbone, in transformers' layout, from the dense backbone's tensors.

    Args:
        dense: tensors by name, `language_model.…` and `visual.…`.
        config: configuration of the new model, see `upcycled_config`.
        noise: see `upcycle`.
        router_std: see `upcycle`.
        seed: see `upcycle`.
    """
    for name, value in (("noise", noise), ("router_std", router_std)):
        if not 0 <= value < math.inf:
            check.fail(NAME, f"{name} >= 0 and finite", value)
    text: Any = config.text_config
    E, D, I = text.num_experts, text.hidden_size, text.moe_intermediate_size  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.detach().clone() for name, tensor in dense.items() if ".mlp." not in name or "visual" in name}
    for layer in range(text.num_hidden_layers):
        prefix = f"{LAYER}.{layer}.mlp"
        shapes = {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
        experts = {}
        for part, shape in shapes.items():
            weight = _tensor(dense, f"{prefix}.{part}.weight", shape)
            experts[part] = torch.stack([_noisy(weight, noise, generator) for _ in range(E)])
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat((experts["gate_proj"], experts["up_proj"]), 1)
        state[f"{prefix}.experts.down_proj"] = experts["down_proj"]
        router = torch.randn(E, D, generator=generator) * router_std
        state[f"{prefix}.gate.weight"] = router.to(weight)
    return state


@torch.no_grad()
def measure_upcycle(
    dense: Qwen3VLForConditionalGeneration | Qwen3VLModel,
    upcycled: Qwen3VLMoeModel,
    batch: Mapping[str, Tensor],
    noise: float,
) -> UpcycleReport:
    """Returns the change of hidden states and logits from the dense to the upcycled model on a batch.

    Args:
        dense: the dense model.
        upcycled: the result of `upcycle`, before a `Discriminator` sets it to packs.
        batch: a processor's output: input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw.
        noise: the noise of the upcycling, for the report.
    """
    base = dense.model if isinstance(dense, Qwen3VLForConditionalGeneration) else dense
    before, after = (model(**batch, use_cache=False, output_hidden_states=True) for model in (base, upcycled))
    head: Callable[[Tensor], Tensor] | None = getattr(dense, "lm_head", None)
    last = before.last_hidden_state, after.last_hidden_state
    return UpcycleReport(
        noise=noise,
        layer_change=tuple(_change(b, a) for b, a in zip(before.hidden_states[1:], after.hidden_states[1:])),
        hidden_change=_change(*last),
        logit_change=None if head is None else _change(head(last[0]), head(last[1])),
    )


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        check.fail(NAME, f"tensor {name} of shape {shape}", "none")
    check.shape(NAME, name, tensors[name], shape)
    return tensors[name].detach()


def _noisy(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return weight.clone()
    wide = weight.float()
    # drawn on the CPU, so that a seed gives the same noise on every device
    sample = torch.randn(weight.shape, generator=generator).to(weight.device)
    return (wide + noise * wide.std() * sample).to(weight.dtype)


def _change(before: Tensor, after: Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())
