"""The rollout engine: samples responses to prompts with images, with the log-probabilities of their tokens.

R rollouts, A of them still in the batch, L tokens of a response, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prism.models.prompts import EncodedPrompt
from prism.rollout.lean import LeanBatch, why_not_lean
from prism.rollout.options import Sampling
from prism.rollout.sampling import Choice, choose, uniforms
from prism.rollout.stock import StockBatch
from prism_kernels import check

NAME = "Engine"
LOG = logging.getLogger(__name__)
# names in a model's configuration of the tokens that stand for images and videos, or enclose them
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# finished rows leave the batch once they are this share of it: moving rows costs more than a few idle rows
IDLE_SHARE = 1 / 8


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response.

    Each token has two exact log-probabilities. `log_probs` are those of the distribution that was sampled from, after
    ban, top_k and top_p; importance weights need them. `model_log_probs` are those of the model's softmax over the
    whole vocabulary at the same temperature, as a training forward computes them. In greedy sampling, the first are 0
    and the second are at temperature 1.
    """

    # index of the prompt, and of the rollout in its group
    prompt: int
    index: int
    # L tokens with the stop token
    token_ids: list[int]
    # (L,) each, on the CPU
    log_probs: Tensor
    model_log_probs: Tensor
    # stop: the last token is a stop token; length: the response reached max_new_tokens without one
    finish_reason: Literal["stop", "length"]
    # with index, what its random numbers follow from; None: unknown
    seed: int | None = None
    key: int | None = None


class Engine:
    """Samples from a transformers model with its current weights, in their dtype.

    The engine computes each prompt once for its whole group and decodes all prompts in one batch, which finished rows
    leave. A rollout depends on the seed, its prompt, the prompt's key and its index in the group, but not on the rest
    of the batch, except for rounding: the batch's size changes the order of sums.

    The engine never samples the model's vision tokens, the tokenizer's special tokens that are not stop tokens, and
    ids that the tokenizer does not know (a vocabulary is often padded).

    Args:
        model: a causal model with its head.
        tokenizer: the model's tokenizer.
        path: `lean`, `stock`, or None: lean if the model allows it. The attributes `path` and `reason` say which and
            why.
        cache_tokens: the most tokens in a batch's cache, counting responses at full length; more prompts are split
            into several batches. None: one batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        path: Literal["lean", "stock"] | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        obstacle = why_not_lean(model)
        if path is not None:
            check.one_of(NAME, "path", path, ("lean", "stock"))
        if path == "lean" and obstacle is not None:
            check.fail(NAME, "a model for path='lean' (take path='stock')", obstacle)
        if cache_tokens is not None:
            check.positive(NAME, "cache_tokens", cache_tokens)
        self.model, self.tokenizer, self.cache_tokens = model, tokenizer, cache_tokens
        self.path: Literal["lean", "stock"] = path or ("stock" if obstacle else "lean")
        self.reason = obstacle or ("as asked" if path else f"the lean step knows {type(model).__name__}")
        LOG.info("rollouts take the %s path: %s", self.path, self.reason)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Returns the group of rollouts of each prompt, in the order of the prompts.

        Args:
            prompts: prompts with their images; lengths and images may differ.
            sampling: the settings of all prompts.
            seed: seed of the random numbers; a trainer takes another one for each step.
            keys: a number >= 0 for each prompt, which chooses its random numbers; None: the prompt's index. A prompt
                with the same key gets the same rollouts in any batch.
            stop_token_ids: a response ends with the first of them; None: those of the model's generation_config.
        """
        keys = range(len(prompts)) if keys is None else keys
        stops = self._stops(stop_token_ids)
        if not (isinstance(seed, int) and seed >= 0):
            check.fail(NAME, "seed to be an integer >= 0", repr(seed))
        self._check(prompts, sampling, keys)
        if not prompts:
            return []
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            # gathering them in each step would deadlock ranks whose responses end at different steps
            check.fail(
                NAME, "whole parameters on every rank (unshard() each FSDP module before, reshard() after)", "shards"
            )
        device = self.model.device
        stop = torch.tensor(sorted(stops), device=device, dtype=torch.int64)
        banned = torch.tensor(sorted(self.banned_token_ids(stops)), device=device, dtype=torch.int64)
        rollouts: dict[int, list[Rollout]] = {}
        with _evaluating(self.model):
            for chosen in self._batches([len(prompt.input_ids) for prompt in prompts], sampling):
                streams = uniforms(seed, [keys[p] for p in chosen], sampling.group, sampling.max_new_tokens)
                batch = (LeanBatch if self.path == "lean" else StockBatch)(
                    self.model, [prompts[p] for p in chosen], sampling.group, sampling.max_new_tokens
                )
                decoded = _decode(batch, streams.to(device), sampling, stop, banned)
                for i, p in enumerate(chosen):
                    rollouts[p] = [
                        replace(decoded.rollout(i * sampling.group + j, p, j), seed=seed, key=keys[p])
                        for j in range(sampling.group)
                    ]
        return [rollout for p in range(len(prompts)) for rollout in rollouts[p]]

    def banned_token_ids(self, stop_token_ids: Sequence[int] | frozenset[int]) -> set[int]:
        """Returns the ids that are never sampled."""
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        banned = special | set(self.tokenizer.all_special_ids) | set(range(len(self.tokenizer), self._vocabulary))
        return {i for i in (banned - set(stop_token_ids)) | self._vision_tokens if i < self._vocabulary}

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def _vision_tokens(self) -> set[int]:
        tokens = (getattr(self.model.config, name, None) for name in VISION_TOKENS)
        return {token for token in tokens if token is not None}

    def _stops(self, stops: Sequence[int] | None) -> frozenset[int]:
        if stops is None:
            default = self.model.generation_config.eos_token_id if self.model.generation_config else None
            stops = (default,) if isinstance(default, int) else tuple(default or ())
            if not stops:
                check.fail(NAME, "stop_token_ids, since the model's generation_config names none", None)
        wrong = [token for token in stops if not 0 <= token < self._vocabulary]
        if wrong:
            check.fail(NAME, f"stop_token_ids in [0, {self._vocabulary})", wrong)
        vision = sorted(self._vision_tokens.intersection(stops))
        if vision:
            check.fail(NAME, "stop_token_ids without the model's vision tokens, which are never sampled", vision)
        return frozenset(stops)

    def _check(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, keys: Sequence[int]) -> None:
        if len(keys) != len(prompts):
            check.fail(NAME, f"a key for each of the {len(prompts)} prompts", f"{len(keys)} keys")
        if any(key < 0 for key in keys):
            check.fail(NAME, "keys >= 0", min(keys))
        positions = self.model.config.get_text_config().max_position_embeddings
        for index, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            if length == 0:
                check.fail(NAME, f"prompt {index} to have at least one token", "none")
            if length + sampling.max_new_tokens > positions:
                check.fail(
                    NAME,
                    f"prompt {index} with max_new_tokens to fit the model's {positions} positions",
                    f"{length} + {sampling.max_new_tokens}",
                )
            least, greatest = min(prompt.input_ids), max(prompt.input_ids)
            if least < 0 or greatest >= self._vocabulary:
                got = least if least < 0 else greatest
                check.fail(NAME, f"token ids of prompt {index} in [0, {self._vocabulary})", got)

    def _batches(self, lengths: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Yields the indices of the prompts of each batch."""
        if self.path == "stock":
            yield from ([p] for p in range(len(lengths)))
            return
        limit = self.cache_tokens
        chosen: list[int] = []
        # longest first: similar lengths share a batch, and its first prompt sets its width
        order = range(len(lengths)) if limit is None else sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
        for p in order:
            width = lengths[chosen[0] if chosen else p] + sampling.max_new_tokens
            if limit is not None and width * sampling.group > limit:
                check.fail(
                    NAME,
                    f"cache_tokens of at least {width * sampling.group}, for the group of prompt {p} "
                    f"({sampling.group} rollouts of up to {width} tokens)",
                    limit,
                )
            if chosen and limit is not None and width * sampling.group * (len(chosen) + 1) > limit:
                yield chosen
                chosen = []
            chosen.append(p)
        yield chosen


@dataclass(frozen=True)
class _Decoded:
    """Responses as rows of one length, on the CPU."""

    # (R, L)
    token: Tensor
    log_prob: Tensor
    model_log_prob: Tensor
    # (R,)
    length: Tensor
    stopped: Tensor

    def rollout(self, row: int, prompt: int, index: int) -> Rollout:
        length = int(self.length[row])
        log_probs, model_log_probs = (x[row, :length].clone() for x in (self.log_prob, self.model_log_prob))
        if not (log_probs.isfinite().all() and model_log_probs.isfinite().all()):
            expected = f"finite logits after prompt {prompt} (look at the model's weights)"
            check.fail(NAME, expected, "log-probabilities that are not", FloatingPointError)
        reason: Literal["stop", "length"] = "stop" if self.stopped[row] else "length"
        return Rollout(prompt, index, self.token[row, :length].tolist(), log_probs, model_log_probs, reason)


def _decode(
    batch: LeanBatch | StockBatch, streams: Tensor, sampling: Sampling, stop: Tensor, banned: Tensor
) -> _Decoded:
    """Returns the responses of a batch; `streams`: (R, max_new_tokens) uniform numbers."""
    total, steps = streams.shape
    logits = batch.logits.repeat_interleave(sampling.group, 0)
    # (A,): the rollout in each row of the batch, and whether it still runs
    rollout = torch.arange(total, device=streams.device)
    runs = torch.ones_like(rollout, dtype=torch.bool)
    # one of each for each step
    choices: list[Choice] = []
    rollouts: list[Tensor] = []
    while True:
        choice = choose(logits, streams[rollout, len(choices)], sampling, banned)
        choices.append(choice)
        rollouts.append(rollout)
        runs = runs & ~torch.isin(choice.token, stop)
        running = runs.nonzero()[:, 0]
        if len(choices) == steps or len(running) == 0:
            break
        token = choice.token
        if len(running) <= (1 - IDLE_SHARE) * len(rollout):
            order = _compact(running)
            batch.keep(order)
            rollout, token, runs = rollout[order], token[order], runs[order]
        logits = batch.step(token)
    return _decoded(choices, torch.cat(rollouts), total, stop)


def _decoded(choices: Sequence[Choice], rollout: Tensor, total: int, stop: Tensor) -> _Decoded:
    """Returns the responses of the choices of all steps; `rollout`: the rollout of each choice, step by step."""
    steps, counts = len(choices), torch.tensor([len(choice.token) for choice in choices])
    index = rollout.cpu(), torch.arange(steps).repeat_interleave(counts)
    columns = (torch.cat(column).cpu() for column in zip(*choices))
    token, log_prob, model_log_prob = (column.new_zeros(total, steps).index_put_(index, column) for column in columns)
    # truncate at the first stop token: idle rows sample on, and rows that left are filled with zeros
    ends = torch.isin(token, stop.cpu())
    stopped = ends.any(1)
    length = torch.where(stopped, ends.int().argmax(1) + 1, steps)
    return _Decoded(token, log_prob, model_log_prob, length, stopped)


def _compact(running: Tensor) -> Tensor:
    """Returns an order of the running rows that moves the fewest: the last ones fill the gaps among the first."""
    count = len(running)
    order = torch.arange(count, device=running.device)
    stays = running < count
    gap = torch.ones(count, dtype=torch.bool, device=running.device)
    gap[running[stays]] = False
    order[gap] = running[~stays]
    return order


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Sets a model to evaluation; afterwards restores its modes and the position offsets that Qwen's models keep."""
    training: list[nn.Module] = []
    offsets: list[tuple[Any, Any]] = []
    for module in model.modules():
        if module.training:
            training.append(module)
        if hasattr(module, "rope_deltas"):
            offsets.append((module, module.rope_deltas))
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, offset in offsets:
            module.rope_deltas = offset
