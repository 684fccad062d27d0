"""The tagged segments of responses, found in the bytes of their tokens, without decoding.

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
    """The bytes of each token of a vocabulary: data[offsets[i] : offsets[i + 1]] for token i."""

    # uint8
    data: NDArray[np.uint8]
    # [V + 1]
    offsets: Ints


# a vocabulary of the 256 bytes, to find segments in texts
SINGLE_BYTES = TokenBytes(np.arange(256, dtype=np.uint8), np.arange(257, dtype=np.int64))


class Segments(NamedTuple):
    """Each segment's text, which is all between its tags: its tokens [start, end), its bytes [byte_start, byte_end).

    Tokens are indices into the packed batch. Bytes are indices into the batch's text: the bytes of all its tokens, one
    after the other. Special tokens have none.
    """

    # [S, k], int64; start, end, byte_start and byte_end are 0 in invalid responses
    start: Tensor
    # [S, k], int64
    end: Tensor
    # [S], int64: `Reason`
    reason: Tensor
    # [S, k], int64
    byte_start: Tensor
    # [S, k], int64
    byte_end: Tensor


def byte_alphabet() -> dict[str, int]:
    """Returns the byte of each character in a byte-level BPE's vocabulary (GPT-2's alphabet).

    The printable characters of Latin-1 stand for their own bytes, the characters from 256 on for the other bytes.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any, size: int | None = None) -> TokenBytes:
    """Returns the bytes of every token of a byte-level BPE tokenizer of transformers; call it once per tokenizer.

    Special tokens and unused ids have no bytes. Tokens that were added as plain text have the bytes of their text.

    Args:
        tokenizer: the result of AutoTokenizer for Qwen, Llama 3, GPT-2 and the like.
        size: number of ids, if the model has more than the tokenizer; None: the tokenizer's.
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
    """Returns the segments of each response, or the reason why it is invalid, on the CPU.

    A valid response is `<tag>text</tag>` for each tag in order: each tag once, no text empty or white space, and only
    white space around them; white space is ASCII's. Tags are searched in the bytes of the whole batch, so tokens may
    cut them anywhere. A segment's text is all between its tags, white space included, and its tokens are those that
    hold at least one byte of the text: `>B` and `)</` belong to the text, although they end or begin a tag too. A token
    with bytes of several texts, such as `a</caption><think>b`, belongs to each of their segments, which then overlap.
    Special tokens have no bytes: they neither disturb a segment nor begin or end one.

    Args:
        token_ids: (T,), the responses one after the other.
        cu_seqlens: (S + 1,), cumulative lengths of the responses.
        table: the result of `token_bytes`.
        tags: names without brackets, in order.
    """
    _check_tags(tags)
    ids, bounds = _integers("token_ids", token_ids), _integers("cu_seqlens", cu_seqlens)
    _check_values(ids, bounds, len(table.offsets) - 1)
    responses, count = len(bounds) - 1, len(tags)

    # the bytes of the batch: each token's run in the table, one after the other
    lengths = np.diff(table.offsets)[ids]
    starts = _cumulative(lengths)
    source = np.repeat(table.offsets[ids] - starts[:-1], lengths)
    source += np.arange(len(source))
    text = table.data[source]
    edges = starts[bounds]
    texts_before = _cumulative(~_IS_SPACE[text])

    marks = [mark for tag in tags for mark in (f"<{tag}>".encode(), f"</{tag}>".encode())]
    # [S, 2k]: how often each opening and closing tag occurs, where it begins and where it ends
    number = np.zeros((responses, 2 * count), dtype=np.int64)
    begin = np.zeros_like(number)
    brackets = np.flatnonzero(text == _LESS_THAN)
    for column, mark in enumerate(marks):
        at = _occurrences(text, brackets, mark)
        response = np.searchsorted(edges, at, side="right") - 1
        # a response is searched from the right, because empty ones share an edge; a tag must also end in it
        whole = at + len(mark) <= edges[response + 1]
        at, response = at[whole], response[whole]
        number[:, column] = np.bincount(response, minlength=responses)
        begin[response, column] = at
    # a missing tag's positions mean nothing, but must be in range
    finish = np.minimum(begin + np.array([len(mark) for mark in marks]), len(text))

    inner = texts_before[begin[:, 1::2]] - texts_before[finish[:, ::2]]
    gap_begin = np.concatenate((edges[:-1, None], finish[:, 1::2]), 1)
    gap_end = np.concatenate((begin[:, ::2], edges[1:, None]), 1)
    outside = texts_before[gap_end] - texts_before[gap_begin]

    # from the last reason to the first, which overwrites the others
    reason = np.full(responses, Reason.VALID, dtype=np.int64)
    reason[(inner == 0).any(1)] = Reason.EMPTY_SEGMENT
    reason[(outside != 0).any(1)] = Reason.TEXT_OUTSIDE
    reason[(np.diff(begin) <= 0).any(1)] = Reason.WRONG_ORDER
    reason[_nested(begin)] = Reason.NESTED
    reason[(number > 1).any(1)] = Reason.REPEATED_TAG
    reason[(number == 0).any(1)] = Reason.MISSING_TAG

    valid = reason == Reason.VALID
    start, end, byte_start, byte_end = np.zeros((4, responses, count), dtype=np.int64)
    byte_start[valid], byte_end[valid] = finish[valid, ::2], begin[valid, 1::2]
    # by where tokens end: a token without bytes is never the first to reach a byte
    start[valid] = np.searchsorted(starts[1:], byte_start[valid], side="right")
    end[valid] = np.searchsorted(starts[1:], byte_end[valid], side="left") + 1
    return Segments(*map(torch.from_numpy, (start, end, reason, byte_start, byte_end)))


def _occurrences(text: NDArray[np.uint8], brackets: Ints, mark: bytes) -> Ints:
    """Returns the positions of a tag, which are among the positions of "<"."""
    at = brackets[brackets + len(mark) <= len(text)]
    for offset in range(1, len(mark)):
        at = at[text[at + offset] == mark[offset]]
    return at


def _nested(begin: Ints) -> NDArray[np.bool_]:
    """Returns whether a tag of one segment begins inside another segment, (S,), from the tags' beginnings, (S, 2k)."""
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
        i = int(bad[0])
        check.fail(NAME, f"token_ids in [0, {vocabulary}), the table's ids", f"{ids[i]} at {i}")
