"""Log-probabilities from a transformers model without the logits of all tokens in memory::

    patch_lm_head(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, token_logprobs=True)
    loss = -(out.log_probs * advantage).sum() / out.mask.sum()

Without `token_logprobs=True` the model works as before, generation included. B sequences of L tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from prism_kernels.check import fail
from prism_kernels.integrations.head import Head, head_logprob, head_of, logit_settings, run_to_head
from prism_kernels.integrations.patching import ForwardPatch, require_version
from prism_kernels.outputs import TokenLogProbs

NAME = "patch_lm_head"
VERSIONS = ("5",)


@dataclass
class LogProbsOutput(ModelOutput):
    """A patched model's output, each (B, L - 1) with `labels`, (B, L) with `shift_labels`; 0 where ignored."""

    log_probs: Tensor | None = None
    # with entropy=True
    entropy: Tensor | None = None
    # where the label is not -100
    mask: Tensor | None = None
    # the load-balancing loss of experts, with output_router_logits
    aux_loss: Tensor | None = None


def patch_lm_head(model: Any, *, cache_bytes: int | None = 0) -> ForwardPatch:
    """Makes a model called with `token_logprobs=True` return log-probabilities; returns the patch, to undo it.

    Such a call takes `labels` (as transformers does: a label belongs to the position before it, -100 is ignored) or
    `shift_labels` (aligned already), `temperature` (a number or a tensor of the result's shape) and `entropy=True`, and
    returns a LogProbsOutput. LoRA on the head, soft caps and logit scales are the model's.

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
    settings = logit_settings(NAME, model.config)
    original = model.forward

    # generation validates its arguments against the original signature
    @functools.wraps(type(model).forward)
    def forward(*args: Any, token_logprobs: bool = False, **options: Any) -> Any:
        if not token_logprobs:
            return original(*args, **options)
        temperature, entropy = options.pop("temperature", 1.0), options.pop("entropy", False)
        labels, shifted = options.pop("labels", None), options.pop("shift_labels", None)
        before = run_to_head(NAME, model, labels, shifted, args, options)
        target = before.target

        def score(hidden: Tensor, head: Head) -> TokenLogProbs:
            chosen = {"temperature": temperature, "entropy": entropy, "cache_bytes": cache_bytes}
            return head_logprob(hidden, target, head, settings, **chosen)

        result = before.at_head(score)
        mask = target != -100
        return LogProbsOutput(log_probs=result.logp, entropy=result.entropy, mask=mask, aux_loss=before.balance)

    forward._prism_kernels = NAME  # type: ignore[attr-defined]
    return ForwardPatch(model, forward)
