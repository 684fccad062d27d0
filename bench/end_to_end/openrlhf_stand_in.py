"""A stand-in for OpenRLHF 0.11's `models.{utils, actor, loss}`; the package needs DeepSpeed and flash-attn.

It has the same names, parameters and mathematics in our own code, without packed samples, ring attention and
flash-attn's cross-entropy. It makes the same tensors of logits, because its memory is compared.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

VERSION = "0.11.0"
NAMES = ("openrlhf", "openrlhf.models", "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.models.actor")
# the number of rows of logits whose normalisers are computed together
_ROWS = 1024


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-probabilities of the labels; the logits are divided in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    normaliser = torch.cat([rows.logsumexp(-1) for rows in logits.flatten(0, -2).split(_ROWS)])
    return chosen - normaliser.view(chosen.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    """Returns the entropies of the rows of logits."""
    mean = (logits.softmax(-1) * logits).sum(-1)
    return logits.logsumexp(-1) - mean


class Actor(nn.Module):
    def __init__(self, pretrain_or_model, temperature=1.0, **_):
        super().__init__()
        self.model, self.temperature, self.packing_samples = pretrain_or_model, temperature, False

    def forward(
        self,
        sequences,
        action_mask=None,
        attention_mask=None,
        return_output=False,
        allgather_logits=False,
        return_logprobs=False,
        ring_attn_group=None,
        packed_seq_lens=None,
        return_entropy=False,
        **mm_inputs,
    ):
        actor = sys.modules["openrlhf.models.actor"]
        position = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position, **mm_inputs)
        output["logits"] = output["logits"].to(torch.float32)
        if return_entropy:
            output.entropy = actor.compute_entropy(output["logits"])[:, :-1]
        if action_mask is None and not return_logprobs:
            return output
        following = sequences.roll(-1, 1)
        found = actor.log_probs_from_logits(output["logits"], following, temperature=self.temperature)[:, :-1]
        if action_mask is not None:
            found = found[:, -action_mask.shape[1] :] * action_mask.float()
        return (found, output) if return_output else found


class PolicyLoss(nn.Module):
    def __init__(
        self,
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        dual_clip=None,
        token_level_loss=True,
        policy_loss_type="ppo",
        enable_vllm_is_correction=False,
        vllm_is_truncated_threshold=None,
        vllm_is_correction_type="tis",
    ):
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss, self.policy_loss_type = token_level_loss, policy_loss_type
        self.enable_vllm_is_correction = enable_vllm_is_correction
        self.vllm_is_truncated_threshold = vllm_is_truncated_threshold
        self.vllm_is_correction_type = vllm_is_correction_type

    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        delta = log_probs - old_log_probs
        ratio = delta.clamp(-20, 20).exp()
        free, held = ratio * advantages, ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
        gain = torch.minimum(free, held)
        if self.dual_clip is not None:
            gain = torch.where(advantages < 0, gain.maximum(self.dual_clip * advantages), gain)
        count, rollout_kl = action_mask.sum(), None
        if self.enable_vllm_is_correction:
            low, high = self.vllm_is_truncated_threshold
            lag = old_log_probs - rollout_log_probs
            weight = lag.exp()
            if self.vllm_is_correction_type == "tis":
                weight = weight.clamp(low, high)
            elif self.vllm_is_correction_type == "icepop":
                weight = weight * ((weight >= low) & (weight <= high))
            else:
                mean = ((lag * action_mask).sum(-1) / action_mask.sum(-1)).exp()
                weight = weight * ((mean >= low) & (mean <= high))[:, None]
            gain = gain * weight
            rollout_kl = -(lag * action_mask).sum() / count
        if self.token_level_loss:
            loss = -(gain * action_mask).sum() / (count if batch_num_tokens is None else batch_num_tokens / dp_size)
        else:
            means = (gain * action_mask).sum(-1) / (action_mask.sum(-1) + 1e-8)
            there = (action_mask.sum(-1) > 0).float()
            loss = -(means * there).sum() / (there.sum() if global_batch_size is None else global_batch_size / dp_size)
        clipped = ((held < free).float() * action_mask).sum() / count
        return loss, clipped, -(delta.detach() * action_mask).sum() / count, rollout_kl


def modules(compiled: bool = False) -> dict[str, ModuleType]:
    """Returns the modules for `sys.modules`, by name; none if OpenRLHF is installed.

    Args:
        compiled: whether `compute_entropy` is compiled, as in the package: faster, except for the first call.
    """
    if find_spec("openrlhf") is not None:
        return {}
    entropy = torch.compile(compute_entropy) if compiled else compute_entropy
    functions = {"log_probs_from_logits": log_probs_from_logits, "compute_entropy": entropy}
    contents = ({}, {}, functions, {"PolicyLoss": PolicyLoss}, {"Actor": Actor, **functions})
    made = {name: ModuleType(name) for name in NAMES}
    for module, content in zip(made.values(), contents):
        vars(module).update(content)
    return made
