"""What counts as the right answer, beside math-verify, and for any text at all."""

import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from prism.rewards.algebra import same_expression
from prism.rewards.equivalence import MOST_CHARACTERS, equivalent
from prism.rewards.grade import judge


def test_equivalent_answers_are_right_too():
    golds = ["triangle", "3 sides", r"\sqrt{9}"]
    assert judge(golds, "Triangle") and judge(golds, "3") and judge(golds, "3 sides") and judge(golds, r"\frac{6}{2}")
    assert not judge(golds, "4")
    assert equivalent(["4", r"\sqrt{9}"], "4.0", None) is True
    assert equivalent(["4", r"\sqrt{9}"], "cat", None) is False
    assert equivalent(["4", r"\sqrt{9}"], r"\sqrt{81}/3", None) is None


# LaTeX that math-verify reads rightly, markers kept: (right answer, given answer)
READ_BY_MATH_VERIFY = [
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt{3}", r"2\sqrt{5}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2+1", "x^2-1"),
    ("1<x<2", "(1,2)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("y=2x+1", "2x-y+1=0"),
    ("y=2x+1", "2x+1"),
    ("x=3", "y=3"),
    ("x>3", "3<x"),
    ("x>3", r"x\geq 3"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}"),
    (r"\log_2 8", "3"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("2,3", "3,2"),
    ("2^{10}", "1024"),
    ("2^{10}", "210"),
]


@pytest.mark.parametrize(("gold", "answer"), READ_BY_MATH_VERIFY)
def test_agrees_with_math_verify_where_it_reads_latex(gold, answer):
    assert judge([gold], answer) == verify(parse(f"${gold}$"), parse(f"${answer}$"))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        # six decimals of whatever size
        ("0.0000001", "0.0000002"),
        (r"\sqrt{2}\cdot 10^{-20}", r"\pi\cdot 10^{-20}"),
        # capitals made small
        ("2X", "2x"),
        (r"\pi(R^2-r^2)", "0"),
        # words as products of letters
        ("cat", "act"),
        # units thrown away
        (r"5\text{ kg}", r"5\text{ lb}"),
        (r"20\text{ cm}^2", r"20\text{ cm}^3"),
        # numbers side by side as a product or a sum
        ("15", "1 2 3 4 5"),
    ],
)
def test_wrong_where_math_verify_says_right(gold, answer):
    assert verify(parse(f"${gold}$"), parse(f"${answer}$"))
    assert not judge([gold], answer)


def test_math_verify_is_asked_right_answer_first():
    # it reads an inequality for an interval one way only; ours reads both
    assert verify(parse("$1<x<2$"), parse("$(1,2)$")) and not verify(parse("$(1,2)$"), parse("$1<x<2$"))
    assert same_expression("1<x<2", "(1,2)") and same_expression("(1,2)", "1<x<2")


def test_long_answer_is_right_only_to_the_letter():
    long = "1" + "0" * MOST_CHARACTERS
    assert equivalent([long], f"\n{long} ", None) is True
    assert equivalent([long], long + ".0", None) is False
    assert equivalent(["1"], "1." + "0" * MOST_CHARACTERS, None) is False


_PIECES = r"""
1 2 10 1,000 . , ; : ( ) [ ] { } $ $$ \frac \frac{1}{2} \boxed{ \text{ } ^ ^{2} √ π ± ½ ² ° ' " % cm m kg / * - − = < x
A B) answer: the and or 五 十 答案 yes 1/2 10^ e5 five half a dozen third point is = because not wait July 4 2020 (1) 2)
① sin pi it's we'll squared no, \\ \{ \pm ~ to
"""
_PIECE = st.sampled_from(_PIECES.split())


def test_a_text_of_megabytes_is_refused_by_its_length():
    # seconds if every character were looked at
    begun = time.process_time()
    assert equivalent(["a " * 10_000_000], "1", None) is False
    assert equivalent(["1"], "a " * 10_000_000, None) is False
    assert time.process_time() - begun < 1


@settings(max_examples=300, deadline=None)
@given(gold=st.lists(_PIECE, min_size=1, max_size=12), answer=st.lists(_PIECE | st.text(max_size=3), max_size=12))
def test_no_answer_is_an_error(gold, answer):
    for joint in ("", " "):
        equivalent([joint.join(gold)], joint.join(answer), None)


def test_algebra_complains_to_nobody(caplog):
    with caplog.at_level(logging.DEBUG):
        assert not same_expression(r"\frac{1}{2}", r"\frac{1}{")
    assert not caplog.records
