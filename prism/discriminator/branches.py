"""Responses as the discriminator reads them: one perception and one reasoning branch, with the same ends for all.

S texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from prism.config import Config
from prism.models.prompts import PromptEncoder
from prism_kernels import check
from prism_kernels.packing import Kind
from prism_kernels.segments import SINGLE_BYTES, TAGS, Reason, find_segments

NAME = "score_groups"
# what a branch is scored on, in the order of a response's branches
CHANNELS = ("perception", "reasoning")
# white space of the grammar
SPACE = " \t\n\r\v\f"


@dataclass(frozen=True)
class ScoreLimits:
    """Lengths in tokens. Nothing is ever cut.

    Args:
        budget: of a pack; a group over it is an error.
        prompt_tokens: of a prompt with its image tokens; more is an error.
        response_tokens: of a response, the student's or the teacher's.
        too_long: what happens to a response past it: `skip` makes it invalid, with its reason, `raise` is an error.
    """

    budget: int = 16384
    prompt_tokens: int = 2048
    response_tokens: int = 6144
    too_long: str = "skip"

    def __post_init__(self) -> None:
        for name in ("budget", "prompt_tokens", "response_tokens"):
            check.positive(NAME, name, getattr(self, name))
        check.one_of(NAME, "too_long", self.too_long, ("skip", "raise"))


def score_limits(config: Config) -> ScoreLimits:
    """Returns the lengths that the settings allow."""
    return ScoreLimits(config.score_pack_tokens, config.data.prompt_tokens, config.data.response_tokens)


class Segment(NamedTuple):
    """The tokens of a branch and what each is."""

    token_ids: list[int]
    kind: list[int]


@dataclass(frozen=True)
class TextBranches:
    """Cuts responses into branches.

    A branch is its opening tag, the segment's text without white space at its ends, and the terminal token, at which
    it is scored; the reasoning branch holds the thinking and the answer. Each segment is tokenised by itself, from
    text, so that neither sampled tokens nor tokens that reach over a tag tell students and teachers apart.
    """

    encoder: PromptEncoder
    limits: ScoreLimits

    @property
    def terminal(self) -> int:
        """The token that ends every branch."""
        if self.encoder.tokenizer.eos_token_id is None:
            check.fail(NAME, "a tokenizer with an end-of-turn token as eos_token", "none")
        return int(self.encoder.tokenizer.eos_token_id)

    def cut(self, texts: Sequence[str], names: Sequence[str]) -> list[tuple[Segment, ...] | str]:
        """Returns each text's branches, one for each channel, or the reason why it has none.

        Args:
            texts: S whole responses.
            names: what errors call them.
        """
        # as the tokens will spell them, so that text and tokens have the same tags
        normalizer = self.encoder.tokenizer.backend_tokenizer.normalizer
        texts = [normalizer.normalize_str(text) for text in texts] if normalizer else texts
        reasons = self._reasons(texts, names)
        valid = [s for s, reason in enumerate(reasons) if reason is None]
        # valid by the grammar: each tag is there once, and in order
        parts = [[_between(texts[s], tag) for tag in TAGS] for s in valid]
        caption, think, answer = (
            self._ids([f"<{tag}>{part[i].strip(SPACE)}" for part in parts]) for i, tag in enumerate(TAGS)
        )
        (close,) = self._ids([f"</{TAGS[1]}>"])
        branches: list[tuple[Segment, ...] | str] = [reason or "" for reason in reasons]
        for s, c, t, a in zip(valid, caption, think, answer):
            branches[s] = (
                _segment((c, Kind.PERCEPTION), ([self.terminal], Kind.PERCEPTION)),
                _segment((t + close, Kind.REASONING), ([*a, self.terminal], Kind.ANSWER)),
            )
        return branches

    def _reasons(self, texts: Sequence[str], names: Sequence[str]) -> list[str | None]:
        """Returns why each text is invalid, or None."""
        # in bytes: where a vocabulary has a token for ">B", "<answer>B" is an answer all the same
        spelt = [text.encode() for text in texts]
        bounds = [0, *accumulate(map(len, spelt))]
        found = find_segments(np.frombuffer(b"".join(spelt), dtype=np.uint8), bounds, SINGLE_BYTES)
        reasons: list[str | None] = []
        limit = self.limits.response_tokens
        for ids, name, reason in zip(self._ids(texts), names, found.reason.tolist()):
            if len(ids) > limit:
                if self.limits.too_long == "raise":
                    check.fail(NAME, f"at most {limit} tokens in {name}", len(ids))
                reasons.append(f"too long: {len(ids)} tokens, the limit is {limit}")
            else:
                reasons.append(None if reason == Reason.VALID else Reason(reason).name.lower().replace("_", " "))
        return reasons

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # a text that spells a special token does not thereby hold one
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.encoder.tokenizer(list(texts), **options)["input_ids"]


def _between(text: str, tag: str) -> str:
    return text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]


def _segment(*parts: tuple[list[int], Kind]) -> Segment:
    ids = [token for part, _ in parts for token in part]
    return Segment(ids, [int(kind) for part, kind in parts for _ in part])
