"""Responses as the discriminator reads them: one perception and one reasoning branch, with the same ends for all.

S texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prism.config import Config
from prism.models.prompts import PromptEncoder
from prism_kernels import check
from prism_kernels.grammar import TAGS, ParsedResponse, parse_response
from prism_kernels.packing import Kind

NAME = "score_groups"
# what a branch is scored on, in the order of a response's branches
CHANNELS = ("perception", "reasoning")


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
        # of the text, not the tokens: where a vocabulary has a token for ">B", "<answer>B" is an answer all the same
        parsed = [parse_response(text) for text in texts]
        branches: list[tuple[Segment, ...] | str] = list(self._reasons(texts, parsed, names))
        valid = [s for s, reason in enumerate(branches) if not reason]
        caption, think, answer = (
            self._ids([f"<{tag}>{getattr(parsed[s].sections, tag)}" for s in valid]) for tag in TAGS
        )
        (close,) = self._ids([f"</{TAGS[1]}>"])
        for s, c, t, a in zip(valid, caption, think, answer):
            branches[s] = (
                _segment((c, Kind.PERCEPTION), ([self.terminal], Kind.PERCEPTION)),
                _segment((t + close, Kind.REASONING), ([*a, self.terminal], Kind.ANSWER)),
            )
        return branches

    def _reasons(self, texts: Sequence[str], parsed: Sequence[ParsedResponse], names: Sequence[str]) -> list[str]:
        """Returns why each text is invalid, or ""."""
        reasons: list[str] = []
        limit = self.limits.response_tokens
        for ids, response, name in zip(self._ids(texts), parsed, names):
            if len(ids) > limit:
                if self.limits.too_long == "raise":
                    check.fail(NAME, f"at most {limit} tokens in {name}", len(ids))
                reasons.append(f"too long: {len(ids)} tokens, the limit is {limit}")
            else:
                reasons.append("" if response.sections else response.reason.name.lower().replace("_", " "))
        return reasons

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # a text that spells a special token does not thereby hold one
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.encoder.tokenizer(list(texts), **options)["input_ids"]


def _segment(*parts: tuple[list[int], Kind]) -> Segment:
    ids = [token for part, _ in parts for token in part]
    return Segment(ids, [int(kind) for part, kind in parts for _ in part])
