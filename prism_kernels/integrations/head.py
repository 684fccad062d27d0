"""What a transformers model's head computes, as `linear_logprob` takes it, and the model run up to there.

B sequences of L tokens, V columns, D width.
"""

from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from prism_kernels.check import fail

Lora = tuple[Tensor, Tensor, float]


class Head(NamedTuple):
    """A head's tensors; `lora` is (A, B, scale)."""

    weight: Tensor
    bias: Tensor | None
    lora: Lora | None


class BeforeHead(NamedTuple):
    """A model's last hidden states (B, L, D), the targets that belong to them (B, L), and its head."""

    hidden: Tensor
    target: Tensor
    head: Head
    # the load-balancing loss of experts, if the model gives one
    balance: Tensor | None


class LogitSettings(NamedTuple):
    """What makes a model's logits of z = h Wᵀ + b: softcap * tanh(z / softcap), or z itself, over `divisor`."""

    divisor: float
    softcap: float | None


def head_of(op: str, module: nn.Module | None) -> Head:
    """Returns the tensors of a linear layer, or of one under a LoRA adapter of peft; DTensors are gathered.

    Args:
        op: who asks, for the error.
        module: the model's output embeddings.
    """
    layer = getattr(module, "base_layer", None)
    if layer is None:
        return _plain(op, module)
    plain = _plain(op, layer)
    if not hasattr(module, "lora_A"):
        _refuse(op, f"an adapter of type {type(module).__name__}")
    adapted: Any = module
    # adapters of other layers do not touch this one, and a merged one is in the weight already
    active = [name for name in adapted.active_adapters if name in adapted.lora_A]
    if adapted.disable_adapters or adapted.merged or not active:
        return plain
    if len(active) > 1:
        _refuse(op, f"{len(active)} active ones: {', '.join(active)}")
    (name,) = active
    if name in adapted.lora_variant:
        _refuse(op, f"{name!r}, a variant of LoRA ({type(adapted.lora_variant[name]).__name__})")
    a, b, dropout = adapted.lora_A[name], adapted.lora_B[name], adapted.lora_dropout[name]
    if b.bias is not None:
        _refuse(op, f"{name!r} with a bias; set lora_bias=False")
    if getattr(dropout, "p", 0.0) > 0:
        _refuse(op, f"{name!r} with dropout; set lora_dropout=0")
    return plain._replace(lora=(_whole(a.weight), _whole(b.weight), float(adapted.scaling[name])))


def logit_settings(op: str, config: Any) -> LogitSettings:
    """Returns what a transformers model of this configuration does to the product of its head."""
    text = config.get_text_config()

    def first(*names: str) -> float | None:
        return next((float(x) for x in (getattr(text, name, None) for name in names) if x is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None:
        scaling = first("logits_scaling")
        # the one family that multiplies by it
        multiplies = getattr(text, "model_type", "") == "hyperclovax"
        scale = 1.0 if scaling is None else scaling if multiplies else 1 / scaling
    if not scale > 0:
        fail(op, "a model whose logits are scaled by a positive number", scale)
    # softcap * tanh(scale z / softcap) is the cap softcap / scale of z itself, times the scale
    softcap = first("final_logit_softcapping")
    return LogitSettings(1 / scale, None if softcap is None else softcap / scale)


def run_to_head(
    op: str,
    model: Any,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> BeforeHead:
    """Returns what a causal language model of transformers gives to its head, one position fewer than labels.

    Args:
        op: who asks, for the error.
        model: a causal language model, or a vision-language one.
        labels: (B, L), as the model's own forward takes them: a label belongs to the position before it.
        shift_labels: (B, L), aligned already, instead of labels.
        args: of the model's forward.
        options: of the model's forward.
    """
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        options.setdefault("output_router_logits", True)
    # looked up at each call: sharding and adapters replace modules
    backbone = model.base_model(*args, **{**options, "use_cache": False})
    module = model.get_output_embeddings()
    # its parameters are empty outside their own module's forward
    if any(hasattr(parameter, "ds_status") for parameter in module.parameters()):
        fail(op, "a model without DeepSpeed ZeRO-3; FSDP2 works", "an LM head that ZeRO-3 has split", RuntimeError)
    head = head_of(op, module)
    if shift_labels is not None:
        target = shift_labels
    elif labels is not None:
        target = labels[:, 1:]
    else:
        fail(op, "labels or shift_labels", None)
    # the head may lie on another device than the last layer
    hidden = backbone.last_hidden_state[:, : target.shape[1]].to(head.weight.device)
    balance = None
    if options.get("output_router_logits"):
        compute = import_module("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
        experts = text.num_experts, text.num_experts_per_tok
        balance = compute(backbone.router_logits, *experts, options.get("attention_mask"))
    return BeforeHead(hidden, target.to(hidden.device), head, balance)


def _plain(op: str, module: nn.Module | None) -> Head:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        fail(op, "a model with an LM head that has a weight", type(module).__name__, TypeError)
    assert weight is not None
    bias = getattr(module, "bias", None)
    return Head(_whole(weight), bias if bias is None else _whole(bias), None)


def _whole(tensor: Tensor) -> Tensor:
    # FSDP2 keeps parameters as DTensors
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _refuse(op: str, got: str) -> None:
    fail(op, "an LM head that is linear or under one plain LoRA adapter", got, NotImplementedError)
