"""OpenRLHF on our ops: `patch()` before an Actor runs, `undo()` or `with` to take it back.

OpenRLHF computes all logits of a batch and casts them to fp32. With the patch, where log-probabilities are wanted, the
model of an Actor returns its last hidden states, and `linear_logprob` computes the log-probabilities; a caller of the
model that wants logits gets logits. B sequences of L tokens, V columns, D width.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from prism_kernels.check import fail
from prism_kernels.integrations.head import Head, LogitSettings, head_logprob, head_of, logit_settings, run_to_head
from prism_kernels.integrations.padded import padded_policy_loss
from prism_kernels.integrations.patching import (
    ForwardPatch,
    Patch,
    Replacement,
    everywhere,
    require_parameters,
    require_version,
)
from prism_kernels.ops.token_logprob import token_logprob
from prism_kernels.outputs import TokenLogProbs

NAME = "integrations.openrlhf"
VERSIONS = ("0.11",)
ACTOR = (
    *("self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs"),
    *("ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs"),
)
LOSS = (
    *("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs"),
    *("dp_size", "batch_num_tokens", "global_batch_size"),
)


def patch(*, cache_bytes: int | None = 0, losses: bool = False) -> Patch:
    """Replaces `log_probs_from_logits` and `compute_entropy`, and gives Actor a fused head; returns the patch.

    DeepSpeed ZeRO-3 is refused when an Actor is called.

    Args:
        cache_bytes: memory that a call may keep for its backward pass, as in `linear_logprob`: 0 keeps nothing, None
            all.
        losses: whether to replace PolicyLoss too. Ours takes `policy_loss_type="ppo"` alone.
    """
    require_version(NAME, "openrlhf", VERSIONS)
    utils, actor, loss = (import_module(f"openrlhf.models.{name}") for name in ("utils", "actor", "loss"))
    require_parameters(NAME, utils.log_probs_from_logits, ("logits", "labels", "temperature"))
    require_parameters(NAME, utils.compute_entropy, ("logits",))
    require_parameters(NAME, actor.Actor.forward, ACTOR)
    replacements = [
        *everywhere(utils, "log_probs_from_logits", log_probs_from_logits),
        *everywhere(utils, "compute_entropy", compute_entropy),
        Replacement(actor.Actor, "forward", _actor_forward(actor.Actor.forward, cache_bytes)),
    ]
    if losses:
        require_parameters(NAME, loss.PolicyLoss.forward, LOSS)
        replacements.append(Replacement(loss.PolicyLoss, "forward", policy_loss_forward))
    return Patch(NAME, replacements)


class HiddenLogits:
    """Stands for logits that are not computed: hidden states (B, L, D) and the head."""

    def __init__(self, model: Any, settings: LogitSettings, cache_bytes: int | None, args: Any, options: Any) -> None:
        ids = args[0] if args else options["input_ids"]
        self.before = run_to_head(NAME, model, None, ids, args, options)
        self.settings, self.cache_bytes = settings, cache_bytes
        # the labels that Actor asks for next: their log-probabilities cost nothing beside the entropies
        self.likely = torch.roll(ids, -1, 1)
        self._scores: TokenLogProbs | None = None

    def to(self, *_: Any) -> "HiddenLogits":
        """Returns itself, since the log-probabilities are in fp32 anyway."""
        return self

    def entropy(self) -> Tensor:
        """Returns the entropies (B, L) at temperature 1, as OpenRLHF does."""
        self._scores = self._compute(self.likely, 1.0, True)
        assert self._scores.entropy is not None
        return self._scores.entropy

    def log_probs(self, labels: Tensor, temperature: float) -> Tensor:
        """Returns the log-probabilities of the labels (B, L)."""
        if self._scores is not None and temperature == 1.0 and torch.equal(labels, self.likely):
            return self._scores.logp
        return self._compute(labels, temperature, False).logp

    def _compute(self, labels: Tensor, temperature: float, entropy: bool) -> TokenLogProbs:
        def compute(hidden: Tensor, head: Head) -> TokenLogProbs:
            return head_logprob(
                hidden,
                labels,
                head,
                self.settings,
                temperature=temperature,
                entropy=entropy,
                cache_bytes=self.cache_bytes,
            )

        scores: TokenLogProbs = self.before.at_head(compute)
        return scores


def log_probs_from_logits(logits: Tensor | HiddenLogits, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-probabilities of the labels in fp32; unlike the published function it does not change the logits.

    Args:
        logits: (..., V), or HiddenLogits.
        labels: of the logits' leading shape.
        temperature: divides the logits.
    """
    if isinstance(logits, HiddenLogits):
        return logits.log_probs(labels, temperature)
    return token_logprob(logits, labels, temperature=temperature).logp


def compute_entropy(logits: Tensor | HiddenLogits) -> Tensor:
    """Returns the entropies of the rows of logits (..., V), or of HiddenLogits, in fp32."""
    if isinstance(logits, HiddenLogits):
        return logits.entropy()
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_logprob(logits, any_target, entropy=True).entropy
    assert entropy is not None
    return entropy


def _actor_forward(published: Callable[..., Any], cache_bytes: int | None) -> Callable[..., Any]:
    @functools.wraps(published)
    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        *args: Any,
        **options: Any,
    ) -> Any:
        given = (sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs, *args)
        if action_mask is None and not return_logprobs:
            return published(self, *given, **options)
        model = _language_model(self.model)
        head_of(NAME, model.get_output_embeddings())
        with ForwardPatch(model, _hidden_forward(model, logit_settings(NAME, model.config), cache_bytes)):
            result = published(self, *given, **options)
        if return_output:
            # no caller reads logits beside log-probabilities
            result[1]["logits"] = None
        return result

    return forward


def _hidden_forward(model: Any, settings: LogitSettings, cache_bytes: int | None) -> Callable[..., Any]:
    output = import_module("transformers.modeling_outputs").MoeCausalLMOutputWithPast

    @functools.wraps(type(model).forward)
    def forward(*args: Any, **options: Any) -> Any:
        logits = HiddenLogits(model, settings, cache_bytes, args, options)
        return output(aux_loss=logits.before.balance, logits=logits)

    return forward


def _language_model(model: Any) -> Any:
    """Returns the model of transformers inside a DeepSpeed engine or a peft model."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the results of PolicyLoss: loss, clipped share, KL to the old and to the rollout policy (or None)."""
    if self.policy_loss_type != "ppo":
        fail(NAME, 'policy_loss_type="ppo" with losses=True', repr(self.policy_loss_type), NotImplementedError)
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
    rollout_kl = None
    if self.enable_vllm_is_correction:
        assert rollout_log_probs is not None
        # weights of the objective are not negative, so that they may multiply the advantage
        advantages = advantages * _rollout_weight(self, old_log_probs - rollout_log_probs, mask)
        rollout_kl = (rollout_log_probs - old_log_probs)[mask].mean()
    total = batch_num_tokens if self.token_level_loss else global_batch_size
    loss, metrics = padded_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip=(self.clip_eps_low, self.clip_eps_high),
        dual_clip=self.dual_clip,
        aggregate="token_mean" if self.token_level_loss else "seq_mean_token_mean",
        denominator=None if total is None else total / dp_size,
    )
    count = metrics.tokens.clamp(min=1)
    clipped = (metrics.clipped_low + metrics.clipped_high) / count
    return loss, clipped.float(), (metrics.approx_kl / count).float(), rollout_kl


def _rollout_weight(self: Any, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Returns the weights (B, L) of the rollout correction, of three types."""
    low, high = self.vllm_is_truncated_threshold
    weight = log_ratio.detach().exp()
    if self.vllm_is_correction_type == "tis":
        return weight.clamp(low, high)
    bounded = weight
    if self.vllm_is_correction_type == "seq-mask-tis":
        mean = (log_ratio.detach() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        bounded = mean.exp()
    return weight * ((bounded >= low) & (bounded <= high))
