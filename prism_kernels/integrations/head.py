"""The head of a transformers model as arguments of `linear_logprob`, and the model run up to its head.

B sequences of L tokens, V columns, D width.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from prism_kernels.check import fail
from prism_kernels.ops.linear_logprob import linear_logprob
from prism_kernels.ops.rows import whole
from prism_kernels.outputs import TokenLogProbs

Lora = tuple[Tensor, Tensor, float]


class Head(NamedTuple):
    """A head's tensors; `lora` is (A, B, scale)."""

    weight: Tensor
    bias: Tensor | None
    lora: Lora | None

    def gathered(self) -> "Head":
        """Returns the head with DTensors gathered."""
        lora = self.lora and (whole(self.lora[0]), whole(self.lora[1]), self.lora[2])
        return Head(whole(self.weight), None if self.bias is None else whole(self.bias), lora)


class BeforeHead(NamedTuple):
    """A model's last hidden states (B, L, D), their targets (B, L), and the module of the head."""

    # the name of the caller in errors
    op: str
    hidden: Tensor
    target: Tensor
    module: nn.Module
    # the load-balancing loss of experts, if the model gives one
    balance: Tensor | None

    def at_head(self, compute: Callable[[Tensor, Head], Any]) -> Any:
        """Returns compute(hidden, head).

        A head that is a unit of FSDP2 runs it as its forward: FSDP2 gathers the parameters, casts hidden, and reduces
        the gradients as it is set to.
        """
        module: Any = self.module

        def run(hidden: Tensor) -> Any:
            return compute(hidden, head_of(self.op, module).gathered())

        # the mark of FSDP2's modules, without the import of FSDP2
        if not hasattr(module, "set_requires_gradient_sync"):
            return run(self.hidden)
        module.prism_forward = run
        import_module("torch.distributed.fsdp").register_fsdp_forward_method(module, "prism_forward")
        try:
            return module.prism_forward(self.hidden)
        finally:
            del module.prism_forward


class LogitSettings(NamedTuple):
    """How a model's logits follow from z = h Wᵀ + b: softcap * tanh(z / softcap), or z without one, over `divisor`."""

    divisor: float
    softcap: float | None


def head_of(op: str, module: nn.Module | None) -> Head:
    """Returns the tensors of a linear layer, or of one under a LoRA adapter of peft.

    Args:
        op: the name of the caller in errors.
        module: the model's output embeddings.
    """
    layer = getattr(module, "base_layer", None)
    if layer is None:
        return _plain(op, module)
    plain = _plain(op, layer)
    if not hasattr(module, "lora_A"):
        _refuse(op, f"an adapter of type {type(module).__name__}")
    adapted: Any = module
    # adapters of other layers do not change this one, and a merged adapter is part of the weight
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
    return plain._replace(lora=(a.weight, b.weight, float(adapted.scaling[name])))


def logit_settings(op: str, config: Any) -> LogitSettings:
    """Returns how a transformers model of this configuration turns its head's product into logits."""
    text = config.get_text_config()

    def first(*names: str) -> float | None:
        return next((float(x) for x in (getattr(text, name, None) for name in names) if x is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None:
        scaling = first("logits_scaling")
        # all other families divide by it
        multiplies = getattr(text, "model_type", "") == "hyperclovax"
        scale = 1.0 if scaling is None else scaling if multiplies else 1 / scaling
    if not scale > 0:
        fail(op, "a model whose logits are scaled by a positive number", scale)
    # softcap * tanh(scale z / softcap) is scale times z under the cap softcap / scale
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
    """Returns the input of a model's head, its targets and the head; from `labels` one position fewer than labels.

    Args:
        op: the name of the caller in errors.
        model: a causal language model of transformers, or a vision-language one.
        labels: (B, L), as the model's own forward takes them: a label belongs to the position before it.
        shift_labels: (B, L), aligned already, instead of labels.
        args: of the model's forward.
        options: of the model's forward.
    """
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        options.setdefault("output_router_logits", True)
    # at each call, since sharding and adapters replace modules
    backbone = model.base_model(*args, **{**options, "use_cache": False})
    module = model.get_output_embeddings()
    # ZeRO-3 empties a module's parameters outside its forward
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
    return BeforeHead(op, hidden, target.to(hidden.device), module, balance)


def head_logprob(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    settings: LogitSettings,
    *,
    temperature: float | Tensor,
    entropy: bool,
    cache_bytes: int | None,
) -> TokenLogProbs:
    """Returns `linear_logprob` of the targets (B, L) under a model's logits over the temperature.

    Args:
        hidden: (B, L, D).
        target: (B, L), -100 is ignored.
        head: of the model.
        settings: of the model.
        temperature: divides the logits.
        entropy: whether entropies are wanted.
        cache_bytes: as in `linear_logprob`.
    """
    result = linear_logprob(
        hidden,
        head.weight,
        target,
        bias=head.bias,
        temperature=temperature * settings.divisor,
        softcap=settings.softcap,
        lora=head.lora,
        entropy=entropy,
        cache_bytes=cache_bytes,
    )
    # views would lose FSDP2's hooks where a caller writes into them
    copies = {name: x.clone() for name, x in result._asdict().items() if x is not None and x._is_view()}
    return result._replace(**copies)


def _plain(op: str, module: nn.Module | None) -> Head:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        fail(op, "a model with an LM head that has a weight", type(module).__name__, TypeError)
    assert weight is not None
    return Head(weight, getattr(module, "bias", None), None)


def _refuse(op: str, got: str) -> None:
    fail(op, "an LM head that is linear or under one plain LoRA adapter", got, NotImplementedError)
