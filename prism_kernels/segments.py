"""Where the tagged segments of responses are, found in the bytes of their tokens, with no decoding.

T packed tokens, S responses, k tags, B bytes of the batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_kernels import check
from prism_kernels.grammar import SPACE, TAGS, Reason

__all__ = [
    "SINGLE_BYTES",
    "TAGS",
    "Reason",
    "Segments",
    "TokenBytes",
    "byte_alphabet",
    "find_segments",
    "token_bytes",
]

NAME = "find_segments"

Ints = NDArray[np.int64]

_LESS_THAN = ord("<")
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(SPACE.encode())] = True


class TokenBytes(NamedTuple):
    """The bytes of each token of a vocabulary: those of token i are data[offsets[i] : offsets[i + 1]]."""

    # uint8
    data: NDArray[np.uint8]
    # [V + 1]
    offsets: Ints


# a vocabulary of the 256 bytes: finds segments in texts whose tokens do not matter
SINGLE_BYTES = TokenBytes(np.arange(256, dtype=np.uint8), np.arange(257, dtype=np.int64))


class Segments(NamedTuple):
    """The tokens [start, end) of each segment's text, without its tags, as indices into the packed batch."""

    # [S, k], int64; of an invalid response 0 and 0
    start: Tensor
    # [S, k], int64
    end: Tensor
    # [S], int64: `Reason`
    reason: Tensor


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level BPE's vocabulary stands for (GPT-2's alphabet).

    Printable bytes of Latin-1 stand for themselves, the others in order for the characters from 256.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any, size: int | None = None) -> TokenBytes:
    """Returns the bytes of every token of a byte-level BPE tokenizer of transformers: once per tokenizer.

    Special tokens, and ids that no token has, are empty; tokens that were added as plain text are their text.

    Args:
        tokenizer: what AutoTokenizer gives for Qwen, Llama 3, GPT-2 and their kin.
        size: how many ids there are, where the model has more than the tokenizer; None: the tokenizer's.
    """
    alphabet = byte_alphabet()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    total = max(vocabulary.values(), default=-1) + 1
    if size is not None and size < total:
        check.fail("token_bytes", f"size of at least {total}, the tokenizer's ids", size)
    pieces = [b""] * (total if size is None else size)
    for text, index in vocabulary.items():
        if index in special:
            continue
        if index in added:
            pieces[index] = added[index].content.encode()
            continue
        try:
            pieces[index] = bytes(alphabet[character] for character in text)
        except KeyError:
            check.fail("token_bytes", "a byte-level BPE, whose tokens are spelt in GPT-2's byte alphabet", repr(text))
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    return TokenBytes(np.frombuffer(b"".join(pieces), dtype=np.uint8), _cumulative(lengths))


def find_segments(
    token_ids: Tensor | NDArray | Sequence[int],
    cu_seqlens: Tensor | NDArray | Sequence[int],
    table: TokenBytes,
    tags: Sequence[str] = TAGS,
) -> Segments:
    """Returns where each response's segments are, or the reason why it has none, on the CPU.

    A valid response is, for each tag in order, `<tag>text</tag>`, each tag once, no text empty or white space, and
    nothing but white space around them; white space is ASCII's. Tags are searched in the bytes of the whole batch, so
    tokens may cut them anywhere. A token belongs to the segment that its first byte is in: one that ends an opening
    tag and begins the text is the tag's, one that ends the text and begins the closing tag is the text's. Special
    tokens have no bytes: they neither disturb a segment nor begin or end one.

    Args:
        token_ids: (T,), the responses one after the other.
        cu_seqlens: (S + 1,), cumulative lengths of the responses.
        table: of `token_bytes`.
        tags: names without brackets, in their order.
    """
    _check_tags(tags)
    ids, bounds = _integers("token_ids", token_ids), _integers("cu_seqlens", cu_seqlens)
    _check_values(ids, bounds, len(table.offsets) - 1)
    responses, count = len(bounds) - 1, len(tags)

    # bytes of the batch: each token's run in the table, laid out one after the other
    lengths = np.diff(table.offsets)[ids]
    starts = _cumulative(lengths)
    place = np.repeat(table.offsets[ids] - starts[:-1], lengths)
    place += np.arange(len(place))
    text = table.data[place]
    edges = starts[bounds]
    texts_before = _cumulative(~_IS_SPACE[text])

    marks = [mark for tag in tags for mark in (f"<{tag}>".encode(), f"</{tag}>".encode())]
    # [S, 2k]: of each opening and closing tag how often it occurs, where it begins and where it ends
    number = np.zeros((responses, 2 * count), dtype=np.int64)
    begin = np.zeros_like(number)
    brackets = np.flatnonzero(text == _LESS_THAN)
    for column, mark in enumerate(marks):
        found = _occurrences(text, brackets, mark)
        owner = np.searchsorted(edges, found, side="right") - 1
        # the last response that begins there is the one that holds the byte; a tag must also end in it
        whole = found + len(mark) <= edges[owner + 1]
        found, owner = found[whole], owner[whole]
        number[:, column] = np.bincount(owner, minlength=responses)
        begin[owner, column] = found
    # where a tag is missing these places mean nothing, but they must exist
    finish = np.minimum(begin + np.array([len(mark) for mark in marks]), len(text))

    inner = texts_before[begin[:, 1::2]] - texts_before[finish[:, ::2]]
    gap_begin = np.concatenate((edges[:-1, None], finish[:, 1::2]), 1)
    gap_end = np.concatenate((begin[:, ::2], edges[1:, None]), 1)
    outside = texts_before[gap_end] - texts_before[gap_begin]

    bearers = np.flatnonzero(lengths)
    first = np.searchsorted(starts[bearers], finish[:, ::2])
    behind = np.searchsorted(starts[bearers], begin[:, 1::2])

    # from the last reason to the first, which stays
    reason = np.full(responses, Reason.VALID, dtype=np.int64)
    reason[(first >= behind).any(1)] = Reason.NO_TOKEN
    reason[(inner == 0).any(1)] = Reason.EMPTY_SEGMENT
    reason[(outside != 0).any(1)] = Reason.TEXT_OUTSIDE
    reason[(np.diff(begin) <= 0).any(1)] = Reason.WRONG_ORDER
    reason[_nested(begin)] = Reason.NESTED
    reason[(number > 1).any(1)] = Reason.REPEATED_TAG
    reason[(number == 0).any(1)] = Reason.MISSING_TAG

    valid = reason == Reason.VALID
    start, end = np.zeros((2, responses, count), dtype=np.int64)
    start[valid] = bearers[first[valid]]
    end[valid] = bearers[behind[valid] - 1] + 1
    return Segments(torch.from_numpy(start), torch.from_numpy(end), torch.from_numpy(reason))


def _occurrences(text: NDArray[np.uint8], brackets: Ints, mark: bytes) -> Ints:
    """Returns where a tag begins; `brackets` are the places of "<", with which it does."""
    found = brackets[brackets + len(mark) <= len(text)]
    for offset in range(1, len(mark)):
        found = found[text[found + offset] == mark[offset]]
    return found


def _nested(begin: Ints) -> NDArray[np.bool_]:
    """Returns (S,): whether a tag of one segment begins within another segment; begin is (S, 2k)."""
    opens, closes = begin[:, ::2, None], begin[:, 1::2, None]
    within = (opens < begin[:, None]) & (begin[:, None] < closes)
    return np.logical_or.reduce(within, axis=(1, 2))


def _cumulative(lengths: NDArray) -> Ints:
    total = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=total[1:])
    return total


def _integers(name: str, values: Tensor | NDArray | Sequence[int]) -> Ints:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        check.fail(NAME, f"{name} to be integers", array.dtype, TypeError)
    if array.ndim != 1:
        check.fail(NAME, f"{name} to have one dimension", array.shape)
    return array.astype(np.int64, copy=False)


def _check_tags(tags: Sequence[str]) -> None:
    if isinstance(tags, str) or not tags or len(set(tags)) != len(tags):
        check.fail(NAME, "tags to be different names", repr(tags))
    for tag in tags:
        # so that no two occurrences can overlap
        if not tag or any(character in "<>/" or character.isspace() for character in tag):
            check.fail(NAME, "each of tags to be a name without <, >, / or white space", repr(tag))


def _check_values(ids: Ints, bounds: Ints, vocabulary: int) -> None:
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(ids) or (np.diff(bounds) < 0).any():
        check.fail(NAME, f"cu_seqlens to rise from 0 to {len(ids)}, the number of tokens", bounds.tolist())
    bad = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(bad):
        place = int(bad[0])
        check.fail(NAME, f"token_ids in [0, {vocabulary}), the table's ids", f"{ids[place]} at {place}")
