"""The grammar's parser of texts, and that `prism_kernels.segments` reads the same grammar in tokens."""

import itertools
import random

import numpy as np
import pytest

from prism_kernels.grammar import SPACE, TAGS, ParsedResponse, Reason, Sections, parse_response, split_response
from prism_kernels.segments import SINGLE_BYTES, find_segments

CASES = [
    ("<caption>c</caption><think>t</think><answer>a</answer>", Reason.VALID),
    ("\n<caption> c\n</caption>\n\n<think>t</think> <answer>\ta </answer>\n", Reason.VALID),
    ("<caption>a < b <b></caption><think>t</think><answer>5 < 6</answer>", Reason.VALID),
    ("", Reason.MISSING_TAG),
    ("5", Reason.MISSING_TAG),
    ("<caption>c</caption><think>t</think>", Reason.MISSING_TAG),
    ("<caption>c</caption><think>t</think><answer>a", Reason.MISSING_TAG),
    ("<Caption>c</Caption><think>t</think><answer>a</answer>", Reason.MISSING_TAG),
    ("<caption>c</caption><caption>c</caption><think>t</think><answer>a</answer>", Reason.REPEATED_TAG),
    ("<caption>c</caption><think>t</think><answer>a</answer><answer>b</answer>", Reason.REPEATED_TAG),
    ("<caption>c</caption><think>t</think><answer>a</answer></answer>", Reason.REPEATED_TAG),
    ("<caption>c</caption><think>t<answer>a</answer></think>", Reason.NESTED),
    ("<caption>c<think>t</caption></think><answer>a</answer>", Reason.NESTED),
    ("<caption>c<think>t</think><answer>a</answer></caption>", Reason.NESTED),
    ("<think>t</think><caption>c</caption><answer>a</answer>", Reason.WRONG_ORDER),
    ("</caption>c<caption><think>t</think><answer>a</answer>", Reason.WRONG_ORDER),
    ("So <caption>c</caption><think>t</think><answer>a</answer>", Reason.TEXT_OUTSIDE),
    ("<caption>c</caption>,<think>t</think><answer>a</answer>", Reason.TEXT_OUTSIDE),
    ("<caption>c</caption><think>t</think><answer>a</answer>.", Reason.TEXT_OUTSIDE),
    ("<caption></caption><think>t</think><answer>a</answer>", Reason.EMPTY_SEGMENT),
    ("<caption>c</caption><think> \n</think><answer>a</answer>", Reason.EMPTY_SEGMENT),
    ("<caption>c</caption><think>t</think><answer>\t</answer>", Reason.EMPTY_SEGMENT),
]


@pytest.mark.parametrize(("text", "reason"), CASES)
def test_response_is_valid_or_has_its_reason(text, reason):
    sections, given = parse_response(text)
    assert given is reason
    assert (sections is not None) == (reason is Reason.VALID)
    assert split_response(text) == sections


def test_sections_are_the_text_between_the_tags():
    text = "<caption>\n- a red cube\n</caption>\n<think>one, so 1</think>\n<answer> 1 </answer>"
    sections = Sections("- a red cube", "one, so 1", "1")
    assert parse_response(text) == ParsedResponse(sections, Reason.VALID)
    assert split_response(sections.text) == sections


def parsed_in_bytes(texts):
    """Returns the result of `parse_response` for each text, by `find_segments` with every byte a token."""
    encoded = [text.encode() for text in texts]
    whole = b"".join(encoded)
    segments = find_segments(
        np.frombuffer(whole, dtype=np.uint8).astype(np.int64), np.cumsum([0, *map(len, encoded)]), SINGLE_BYTES
    )
    for start, end, reason in zip(segments.start.tolist(), segments.end.tolist(), segments.reason.tolist()):
        parts = [whole[s:e].decode().strip(SPACE) for s, e in zip(start, end)]
        yield ParsedResponse(None if reason else Sections(*parts), Reason(reason))


def test_tokens_and_texts_have_one_grammar():
    pieces = [*(f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")), " ", "x", "\n", "\u00a0", "<", "五"]
    chance = random.Random(0)
    valid = "<caption>c</caption> <think>t</think><answer>a</answer>"
    texts = [text for text, _ in CASES] + [valid]
    texts += ["".join(chance.choices(pieces, k=chance.randint(1, 12))) for _ in range(2000)]
    # all orders of the six tags, with text within and without
    texts += ["x".join(order) for order in itertools.permutations(pieces[:6])]
    texts += [joint.join(order) for order in itertools.permutations(pieces[:6]) for joint in ("", "x ")]
    # a valid response with one change
    for place in range(len(valid)):
        texts.append(valid[:place] + valid[place + 1 :])
        texts += [valid[:place] + piece + valid[place:] for piece in pieces]
    expected = list(parsed_in_bytes(texts))
    # that number is reserved
    assert {parsed.reason for parsed in expected} == set(Reason) - {Reason.NO_TOKEN}
    for text, parsed in zip(texts, expected):
        assert parse_response(text) == parsed, text
