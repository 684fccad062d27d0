"""Log-probabilities instead of logits from a transformers model, without the logits of all tokens in memory::

    patch_lm_head(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, token_logprobs=True)
    loss = -(out.log_probs * advantage).sum() / out.mask.sum()

Without `token_logprobs=True` the model is as it was, so that it generates as before. B sequences of L tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from prism_kernels.check import fail
from prism_kernels.integrations.head import head_of, logit_settings, run_to_head
from prism_kernels.integrations.patching import Undoable, require_version
from prism_kernels.ops.linear_logprob import linear_logprob

NAME = "patch_lm_head"
VERSIONS = ("5",)


@dataclass
class LogProbsOutput(ModelOutput):
    """What a patched model returns; each (B, L - 1) with `labels`, (B, L) with `shift_labels`, 0 where ignored."""

    log_probs: Tensor | None = None
    # None unless asked for
    entropy: Tensor | None = None
    # where the label is not -100
    mask: Tensor | None = None
    # the load-balancing loss of experts, with output_router_logits
    aux_loss: Tensor | None = None


class HeadPatch(Undoable):
    """A model whose forward was replaced."""

    def __init__(self, model: nn.Module, forward: Any) -> None:
        # a forward of the instance, as other wrappers leave one, or none: then the class's
        self._model, self._before = model, vars(model).get("forward")
        self._done = True
        model.forward = forward

    def undo(self) -> None:
        """Gives the model its forward back; a second call does nothing."""
        if not self._done:
            return
        self._done = False
        del self._model.forward
        if self._before is not None:
            self._model.forward = self._before


def patch_lm_head(model: Any, *, cache_bytes: int | None = 0) -> HeadPatch:
    """Lets a model called with `token_logprobs=True` return log-probabilities; returns the patch, to undo it.

    Then `forward` takes `labels` (as transformers does: a label belongs to the position before it, -100 is ignored) or
    `shift_labels` (aligned already), `temperature`, a number or a tensor of the result's shape, and `entropy=True`, and
    returns a LogProbsOutput. LoRA on the head, soft caps and logit scales are taken from the model.

    Args:
        model: a causal language model, or a vision-language one, of transformers; under peft its `get_base_model()`.
        cache_bytes: memory that a call may keep for its backward pass, as in `linear_logprob`: 0 keeps nothing, None
            all.
    """
    require_version(NAME, "transformers", VERSIONS)
    if getattr(getattr(model, "forward", None), "_prism_kernels", None) is not None:
        fail(NAME, "a model as transformers made it", "one that is patched already", RuntimeError)
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    head_of(NAME, outputs)
    divisor, softcap = logit_settings(NAME, model.config)
    original = model.forward

    # generation validates its arguments against the original signature
    @functools.wraps(type(model).forward)
    def forward(*args: Any, token_logprobs: bool = False, **options: Any) -> Any:
        if not token_logprobs:
            return original(*args, **options)
        temperature, entropy = options.pop("temperature", 1.0), options.pop("entropy", False)
        labels, shifted = options.pop("labels", None), options.pop("shift_labels", None)
        hidden, target, head, balance = run_to_head(NAME, model, labels, shifted, args, options)
        found = linear_logprob(
            hidden,
            head.weight,
            target,
            bias=head.bias,
            temperature=temperature * divisor,
            softcap=softcap,
            lora=head.lora,
            entropy=entropy,
            cache_bytes=cache_bytes,
        )
        return LogProbsOutput(log_probs=found.logp, entropy=found.entropy, mask=target != -100, aux_loss=balance)

    forward._prism_kernels = NAME  # type: ignore[attr-defined]
    return HeadPatch(model, forward)
