"""The strict grammar on text, and that it is the one that `prism_kernels.segments` reads in tokens."""

import itertools
import random

import numpy as np
import pytest

from prism.rewards.grammar import REASONS, TAGS, split_response
from prism_kernels.segments import TAGS as TOKEN_TAGS
from prism_kernels.segments import Reason, TokenBytes, find_segments

# every byte a token
BYTES = TokenBytes(np.arange(256, dtype=np.uint8), np.arange(257, dtype=np.int64))

CASES = [
    ("<caption>c</caption><think>t</think><answer>a</answer>", ""),
    ("\n<caption> c\n</caption>\n\n<think>t</think> <answer>\ta </answer>\n", ""),
    ("<caption>a < b <b></caption><think>t</think><answer>5 < 6</answer>", ""),
    ("", "missing_tag"),
    ("5", "missing_tag"),
    ("<caption>c</caption><think>t</think>", "missing_tag"),
    ("<caption>c</caption><think>t</think><answer>a", "missing_tag"),
    ("<Caption>c</Caption><think>t</think><answer>a</answer>", "missing_tag"),
    ("<caption>c</caption><caption>c</caption><think>t</think><answer>a</answer>", "repeated_tag"),
    ("<caption>c</caption><think>t</think><answer>a</answer><answer>b</answer>", "repeated_tag"),
    ("<caption>c</caption><think>t</think><answer>a</answer></answer>", "repeated_tag"),
    ("<caption>c</caption><think>t<answer>a</answer></think>", "nested"),
    ("<caption>c<think>t</caption></think><answer>a</answer>", "nested"),
    ("<caption>c<think>t</think><answer>a</answer></caption>", "nested"),
    ("<think>t</think><caption>c</caption><answer>a</answer>", "wrong_order"),
    ("</caption>c<caption><think>t</think><answer>a</answer>", "wrong_order"),
    ("So <caption>c</caption><think>t</think><answer>a</answer>", "text_outside"),
    ("<caption>c</caption>,<think>t</think><answer>a</answer>", "text_outside"),
    ("<caption>c</caption><think>t</think><answer>a</answer>.", "text_outside"),
    ("<caption></caption><think>t</think><answer>a</answer>", "empty_segment"),
    ("<caption>c</caption><think> \n</think><answer>a</answer>", "empty_segment"),
    ("<caption>c</caption><think>t</think><answer>\t</answer>", "empty_segment"),
]


@pytest.mark.parametrize(("text", "reason"), CASES)
def test_response_is_valid_or_has_its_reason(text, reason):
    response = split_response(text)
    assert response.reason == reason
    assert all(response[:3]) if not reason else response[:3] == ("", "", "")


def test_segments_are_the_text_between_the_tags():
    text = "<caption>\n- a red cube\n</caption>\n<think>one, so 1</think>\n<answer> 1 </answer>"
    assert split_response(text) == ("- a red cube", "one, so 1", "1", "")


def token_reasons(texts):
    """The reason and the segments of each text as `prism_kernels.segments` reads its bytes."""
    encoded = [text.encode() for text in texts]
    packed = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int64)
    bounds = np.cumsum([0, *map(len, encoded)])
    found = find_segments(packed, bounds, BYTES)
    whole = b"".join(encoded)
    for start, end, reason in zip(found.start.tolist(), found.end.tolist(), found.reason.tolist()):
        texts = [whole[s:e].decode().strip(" \t\n\r\v\f") for s, e in zip(start, end)]
        yield ("" if reason == Reason.VALID else Reason(reason).name.lower()), tuple(texts)


def test_grammar_is_the_one_of_tokens():
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
    expected = list(token_reasons(texts))
    assert TAGS == TOKEN_TAGS
    assert {reason for reason, _ in expected} == {"", *REASONS}
    for text, (reason, segments) in zip(texts, expected):
        response = split_response(text)
        assert response.reason == reason, text
        assert response[:3] == segments, text
