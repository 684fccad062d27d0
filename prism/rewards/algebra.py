r"""Whether two LaTeX expressions are equal, by math-verify and SymPy. It may never return: for worker processes."""

import logging
import re

from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify
from sympy import Basic, Expr

# unreadable answers are usual in reinforcement learning: no warnings
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# units and boxes were read before, so nothing of an expression is dropped here
_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    ),
)
_FUNCTION_OF_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|\([^()]*\)|\{[^{}]*\}|\\[a-z]+|[a-zA-Z])\s*°")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_COMMAND_OR_CAPITAL = re.compile(r"\\[a-zA-Z]+|[A-Z]")
_SPELT = (
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"∞|(?<![\\a-zA-Z])(?:inf|infinity|oo)(?![a-zA-Z])"), r"\\infty "),
    (
        re.compile(
            r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|min|max"
            r"|alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau"
            r"|upsilon|(?:var)?phi|chi|psi|omega)(?![a-zA-Z])"
        ),
        r"\\\1 ",
    ),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^\s*(-?\d+(?:\.\d+)?)"), r"^{\1}"),
    (re.compile(r"×|(?<=\d)\s*\*\s*|\*|·|⋅"), r"\\cdot "),
    (re.compile(r"÷"), "/"),
    (re.compile(r"≤|<="), r"\\leq "),
    (re.compile(r"≥|>="), r"\\geq "),
    (re.compile(r"≠|!="), r"\\neq "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"∩"), r"\\cap "),
    (re.compile(r"∈"), r"\\in "),
)


def same_expression(gold: str, answer: str) -> bool:
    """Returns whether two expressions are equal. The order matters: math-verify takes x = 3 for 3 one way only."""
    gold, answer = _distinct_letters(_latex(gold), _latex(answer))
    # one angle in degrees, the other in radians; and a function of degrees is none of the number
    one_in_degrees = ("°" in gold) != ("°" in answer) and "\\pi" in gold + answer
    if one_in_degrees or (_FUNCTION_OF_ANGLE.search(gold + answer) and "°" in gold + answer):
        gold, answer = (_DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text) for text in (gold, answer))
    right, given = _parsed(gold.replace("°", "")), _parsed(answer.replace("°", ""))
    if not right or not given:
        return False
    # without its time limits, which use SIGALRM
    equal = verify(right, given, timeout_seconds=None, allow_set_relation_comp=True)
    return equal and not any(_far_apart(a, b) for a in right for b in given)


def _distinct_letters(gold: str, answer: str) -> tuple[str, str]:
    """Returns both with new letters for capitals whose small letter occurs too: math-verify lowers all letters."""
    letters = set(_COMMAND.sub("", gold + answer))
    free = (letter for letter in "abcfghjklmnopqrstuvwxyz" if not {letter, letter.upper()} & letters)
    capitals = sorted(letter for letter in letters if letter.isupper() and letter.lower() in letters)
    names = dict(zip(capitals, free))
    spelt = [_COMMAND_OR_CAPITAL.sub(lambda m: names.get(m[0], m[0]), text) for text in (gold, answer)]
    return spelt[0], spelt[1]


def _latex(text: str) -> str:
    for pattern, spelt in _SPELT:
        text = pattern.sub(spelt, text)
    return text


def _parsed(text: str) -> list[Basic]:
    return parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)


def _far_apart(one: object, other: object) -> bool:
    """Returns whether two numbers differ by more than rounding: math-verify compares six decimals of any size."""
    if not (isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number):
        return False
    a, b = one.evalf(15), other.evalf(15)
    if not (a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) > 1e-5 * max(abs(a), abs(b)))
