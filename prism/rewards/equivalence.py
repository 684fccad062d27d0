r"""Whether an answer is the right one. The form of the right answer decides how the two are compared.

Decisions where usage is divided:

- If only one of the two has a unit, the question is taken to have given it; if both have one, it is converted
  (1 m is 100 cm, 5 kg is not 5 lb, 20 °C is not 68 °F). 50 % equals 0.5 and 50, but 0.5 does not equal 0.5 %.
- Decimals are exact. A decimal equals a value with more digits if it has at least six digits and is correctly
  rounded: 0.333333 equals 1/3, 0.33 does not. A comma groups thousands or separates; it is no decimal point.
- A list without brackets has no order, as the solutions of an equation; (1, 2) and [1, 2] have one, \{1, 2\} none.
- Several answers are no answer: "5 or 6" is not 5, "A or B" is not B. Nor is a sentence that contains the answer.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Literal

from prism.rewards.forms import (
    Group,
    GroupKind,
    both_signs,
    closes_at_end,
    read_clock,
    read_group,
    read_option,
    read_options,
    read_ratio,
)
from prism.rewards.quantities import NO_UNIT, Unit, equal_quantities, is_counted_thing, read_quantity, read_unit

# (right answer, given answer), both LaTeX -> whether they are equal
Algebra = Callable[[str, str], bool]

# longer texts are no final answers, and the time of every reader here grows with the length
MOST_CHARACTERS = 500

_NAME = r"[a-zA-Zα-ωΑ-Ω]|\\[a-z]+|[a-zA-Z]_\w|[a-zA-Z]_\{\w+\}|[a-zA-Z]\([a-z]\)"
_ASSIGNMENT = re.compile(rf"({_NAME})\s*=\s*([^=<>]+)")
_RELATION = re.compile(r"[=<>≤≥≠]|\\(?:leq|geq|neq?|lt|gt)(?![a-zA-Z])")
_TRUTH = {
    **dict.fromkeys(("yes", "true", "correct", "是", "是的", "对", "正确"), True),
    **dict.fromkeys(("no", "false", "incorrect", "wrong", "否", "不是", "错", "错误"), False),
}
# the first word of "No, it is larger", but not of "Yes and no"
_TRUTH_FIRST = re.compile(r"(yes|no)\b\s*[,.;:](?!.*\b(?:yes|no)\b)", re.IGNORECASE | re.DOTALL)
_ARTICLE = re.compile(r"\b(?:the|a|an)\s+")
_PUNCTUATION = re.compile(r"[^\w\s]")
_NOT_FREE_TEXT = re.compile(r"[\d\\^<>=+*/|√]")
_WORD = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"[^\W\d_πe]")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+")
# words of mathematics
_FUNCTION_NAMES = """
sin cos tan cot sec csc log exp sqrt min max arcsin arccos arctan sinh cosh tanh inf infinity theta alpha beta
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_MATHEMATICS = re.compile(r"[\d\\+*/^=<>|!√π∞≤≥≠∪∩∅_]|-(?=\S)")
_NUMBERS_IN_A_ROW = re.compile(r"(?<![_^\d])\d+\s+[\d.]")


def equivalent(golds: Sequence[str], answer: str, algebra: Algebra | None) -> bool | None:
    """Returns whether the answer is one of the right ones, or None where only algebra can tell and none is given.

    An answer of more than MOST_CHARACTERS is right only if it is the same text.

    Args:
        golds: the right answers; one of them is enough.
        answer: the text to judge.
        algebra: compares two LaTeX expressions. It may never return, so it needs a process with a time limit.
    """
    if any(gold.strip() == answer.strip() for gold in golds):
        return True
    if len(answer) > MOST_CHARACTERS:
        return False
    spelt = clean(answer)
    return _any(_same(clean(gold), spelt, algebra) for gold in golds if len(gold) <= MOST_CHARACTERS)


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict:
            return True
        undecided |= verdict is None
    return None if undecided else False


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _same(gold: str, answer: str, algebra: Algebra | None) -> bool | None:
    if not gold or not answer:
        return False
    if gold == answer:
        return True

    right, given = read_option(gold), read_option(answer)
    if right:
        if given:
            same_text = not right.text or not given.text or _same(clean(right.text), clean(given.text), algebra)
            return same_text if given.letter == right.letter else False
        return _same(clean(right.text), answer, algebra) if right.text else False
    if given and given.text:
        # the text of an option is no option itself: "A) B" chooses two
        return False if read_option(clean(given.text)) else _same(gold, clean(given.text), algebra)
    if options := read_options(gold):
        return read_options(answer) == options

    if (truth := _TRUTH.get(gold.lower())) is not None:
        first = _TRUTH_FIRST.match(answer)
        return _TRUTH.get((first[1] if first else answer).lower()) is truth

    if clock := read_clock(gold):
        reading = read_clock(answer)
        return reading is not None and clock.agrees(reading)
    if read_ratio(gold) or read_ratio(answer):
        return _ratio(gold) is not None and _ratio(gold) == _ratio(answer)

    values = _assigned(gold, answer)
    if values:
        return _same(clean(values[0]), clean(values[1]), algebra)

    quantities = read_quantity(gold), read_quantity(answer)
    if quantities[0] and quantities[1] and equal_quantities(quantities[0], quantities[1]):
        return True
    groups = _groups(gold), _groups(answer)
    if any(groups):
        verdict = _any(_same_parts(one, other, algebra) for one in groups[0] for other in groups[1])
        kinds = {group.kind for side in groups for group in side}
        # algebra reads the rest: an interval may be answered as an inequality, 1-5 is -4 unless a range is asked for
        if all(groups) or GroupKind.LIST in kinds or (groups[0] and GroupKind.RANGE in kinds):
            return verdict
    if quantities[0] and quantities[1]:
        return False
    if _is_mathematics(gold) and _is_mathematics(answer):
        same_unit = _in_one_unit(gold, answer)
        return same_unit and (algebra(*same_unit) if algebra else None)
    return _words(gold) == _words(answer)


def _ratio(text: str) -> Fraction | None:
    """Returns the value of a ratio, or of a number that stands for one."""
    quantity = read_quantity(text)
    return read_ratio(text) or (quantity.number.value if quantity and quantity.unit == NO_UNIT else None)


def _assigned(gold: str, answer: str) -> tuple[str, str] | None:
    """Returns both values for x = 3 against x = 3, or x = 3 against 3; None where no name can be dropped."""
    right, given = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if right and given:
        return (right[2], given[2]) if right[1] == given[1] else None
    if right and not _RELATION.search(answer):
        return right[2], answer
    if given and not _RELATION.search(gold):
        return gold, given[2]
    return None


def _in_one_unit(gold: str, answer: str) -> tuple[str, str] | Literal[False]:
    """Returns both expressions without units, the answer converted to the right one's; False if it cannot be."""
    (right, unit), (given, other) = _without_unit(gold), _without_unit(answer)
    if unit and other:
        scale = other.size / unit.size
        return unit.dimension == other.dimension and (right, given if scale == 1 else rf"({given})\cdot({scale})")
    return right, given


def _without_unit(text: str) -> tuple[str, Unit | None]:
    """Returns a constant such as 4\\pi without the unit after it, and the unit."""
    for space in re.finditer(" ", text):
        head, unit = text[: space.start()], read_unit(text[space.end() :])
        if unit and unit.dimension and not is_counted_thing(unit) and not _LETTER.search(_COMMAND.sub("", head)):
            return head, unit
    return text, None


def _groups(text: str) -> list[Group]:
    """Returns the ways in which a text is a group."""
    return [group for group in (read_group(text), both_signs(text)) if group]


def _same_parts(right: Group, given: Group, algebra: Algebra | None) -> bool | None:
    kinds = {right.kind, given.kind}
    # a bare list equals one in brackets, but two kinds of brackets mean two things
    comparable = len(kinds) == 1 or (GroupKind.LIST in kinds and GroupKind.RANGE not in kinds)
    if len(right.parts) != len(given.parts) or not comparable:
        return False
    if kinds <= {GroupKind.LIST, GroupKind.SET}:
        return _matched(right.parts, given.parts, algebra)
    return _all(_same(clean(one), clean(other), algebra) for one, other in zip(right.parts, given.parts))


def _matched(right: Sequence[str], given: Sequence[str], algebra: Algebra | None) -> bool | None:
    """Returns whether the parts are equal in some order."""
    left = [clean(part) for part in given]
    undecided = False
    for part in map(clean, right):
        verdicts = [_same(part, other, algebra) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _is_mathematics(text: str) -> bool:
    """Returns whether algebra can read a text: it has signs of mathematics and no words but names of functions."""
    if any(word.lower() not in _FUNCTIONS for word in _WORD.findall(_COMMAND.sub(" ", text))):
        return False
    # numbers side by side are a product to algebra, and a list to people
    return not _NUMBERS_IN_A_ROW.search(text) and (len(text) == 1 or _MATHEMATICS.search(text) is not None)


def _words(text: str) -> str:
    """Returns free text without case, articles and punctuation; a text with digits or operators loses case only."""
    text = text.casefold()
    if not _NOT_FREE_TEXT.search(text):
        text = _ARTICLE.sub("", _PUNCTUATION.sub(" ", text))
    return " ".join(text.split())


# replaced before NFKC, which would make x² into x2 and 3½ into 31/2
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‒–—―﹣－", "-"),
        **dict.fromkeys("，、", ","),
        **dict.fromkeys("‘’`´′", "'"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
        "。": ".",
        "～": "~",
        "﹪": "%",
        "º": "°",
        "˚": "°",
        "″": '"',
        "⁄": "/",
        "∕": "/",
        "：": ":",
    }
)
# spaces that group digits, but never separate two numbers
_THIN_SPACE = re.compile(r"(?<=\d)(?:[\u2009\u202f\u00a0]|\\,|\\!|\{,\}\s?|\\;)(?=\d{3}(?!\d))")
_DRESS = (
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|mathstrut)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<!\\)\\(?:quad|qquad|,|;|:|!| )|~(?=[\\a-zA-Z])"), " "),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])|\^\{?°\}?"), "°"),
    (
        re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mbox|textrm|operatorname|rm|bf|mathit)\s*\{([^{}]*)\}"),
        r" \1 ",
    ),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:le|leqslant)(?![a-zA-Z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![a-zA-Z])"), r"\\geq"),
)
# markup around a whole answer
_WRAPPERS = (
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$((?:\\\$|[^$])+)(?<!\\)\$"),
    re.compile(r"\\\((.+)\\\)", re.DOTALL),
    re.compile(r"\\\[(.+)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]+)\*\*"),
    re.compile(r"`([^`]+)`"),
    re.compile(r'"([^"]+)"'),
    re.compile(r"'([^']+)'"),
)
# the most wrappers and phrases that are removed from one answer
_MOST_LAYERS = 8
_INLINE = re.compile(r"(?<![\\$])\$([^$]+)\$(?!\$)")
_PHRASE = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally)\b,?\s*)?"
    r"(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:(?:answer|result|solution|option|choice)\s*(?:(?:is|are|equals|would be)\b\s*:?|:|=)"
    r"|(?:there (?:are|is)|it is|it's)\b)\s*",
    re.IGNORECASE,
)
_CHINESE_PHRASE = re.compile(
    r"(?:所以|因此|故)?,?(?:最终|正确)?(?:答案|选项|结果)(?:是|为|选)?\s*:?\s*|(?:所以|因此|故)?选(?:择)?\s*:?\s*"
)
_TRAILING = " \t\r\n.,;:"


def clean(answer: str) -> str:
    """Returns an answer in one spelling: digits, signs and fractions in one form; no box, markup or phrase around."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", answer)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    # before NFKC, which makes these spaces plain ones
    text = _THIN_SPACE.sub("", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _boxed(text)
    for pattern, spelt in _DRESS:
        text = pattern.sub(spelt, text)
    for _ in range(_MOST_LAYERS):
        before = text
        text = text.strip().rstrip(_TRAILING)
        text = _CHINESE_PHRASE.sub("", _PHRASE.sub("", text, count=1), count=1) if _starts_with_phrase(text) else text
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        text = _without_group(text)
        if text == before:
            break
    # mathematics inside a text, as in $3$ cm; an amount of money has only one $
    text = _INLINE.sub(r"\1", text).replace("\\$", "$")
    return re.sub(r"\s+", " ", text).strip()


def _starts_with_phrase(text: str) -> bool:
    return bool(_PHRASE.match(text) or _CHINESE_PHRASE.match(text))


def _boxed(text: str) -> str:
    """Returns the content of the only box and the text after it; each of several boxes becomes its content."""
    boxes = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                boxes.append((match.start(), match.end(), end))
                break
    if len(boxes) == 1:
        _, begin, end = boxes[0]
        return text[begin:end] + re.sub(r"^\s*(?:\$\$?|\\[\])])", "", text[end + 1 :])
    for start, begin, end in reversed(boxes):
        text = text[:start] + text[begin:end] + text[end + 1 :]
    return text


def _without_group(text: str) -> str:
    """Returns the text without outer braces, unless they hold a list: LaTeX's grouping, not a set."""
    if text.startswith("{") and text.endswith("}") and "," not in text and closes_at_end(text):
        return text[1:-1]
    return text
