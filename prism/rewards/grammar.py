"""The strict grammar of a response on its text: the same reasons as `prism_kernels.segments`, which reads tokens.

It is not imported from there: rewards run in worker processes that load neither torch nor a tokenizer.
"""

import re
from typing import NamedTuple

TAGS = ("caption", "think", "answer")

# ASCII's, as in prism_kernels.segments, which reads bytes
_SPACE = " \t\n\r\v\f"
_MARK = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
_ORDERED = [(closing, tag) for tag in TAGS for closing in ("", "/")]


class Response(NamedTuple):
    """The text of each segment without its tags and the white space around it, or why there is none."""

    caption: str
    think: str
    answer: str
    # "" where the response is valid, else one of REASONS
    reason: str


# of several reasons the first is given
REASONS = (
    "missing_tag",
    "repeated_tag",
    "nested",
    "wrong_order",
    "text_outside",
    "empty_segment",
)


def split_response(text: str) -> Response:
    """Returns the segments of a response that is `<caption>…</caption><think>…</think><answer>…</answer>`.

    Each tag stands once, in this order, no segment is empty or white space, and nothing but white space is around
    them. Of a response that is otherwise the segments are empty and the reason says why.
    """
    marks = list(_MARK.finditer(text))
    found = [(mark[1], mark[2]) for mark in marks]
    reason = _disorder(found)
    if not reason:
        edges = [0, *(edge for mark in marks for edge in mark.span()), len(text)]
        # outside, tag, inside, tag, outside, ...
        pieces = [text[begin:end].strip(_SPACE) for begin, end in zip(edges[::2], edges[1::2])]
        outside, inside = pieces[::2], pieces[1::2]
        if not any(outside) and all(inside):
            caption, think, answer = inside
            return Response(caption, think, answer, "")
        reason = "text_outside" if any(outside) else "empty_segment"
    return Response("", "", "", reason)


def _disorder(found: list[tuple[str, str]]) -> str:
    """Returns what is wrong with the sequence of tags, or ""."""
    if found == _ORDERED:
        return ""
    if set(found) != set(_ORDERED):
        return "missing_tag"
    if len(found) > len(_ORDERED):
        return "repeated_tag"
    for tag in TAGS:
        if any(name != tag for _, name in found[found.index(("", tag)) : found.index(("/", tag))]):
            return "nested"
    return "wrong_order"
