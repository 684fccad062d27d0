r"""Whether an answer is the right one: by what the right answer is, from a choice over quantities to free text.

Decisions where usage is divided:

- A unit that only one of the two has is taken as said by the question; where both have one, it is converted
  (1 m is 100 cm, 5 kg is not 5 lb, 20 °C is not 68 °F). 50 % is 0.5, and it is 50, but 0.5 is not 0.5 %.
- Decimals are exact. Against a value with more digits a decimal counts when it has at least six digits and is
  correctly rounded: 0.333333 is 1/3, 0.33 is not. A comma groups thousands or separates; it is no decimal point.
- A list without brackets has no order, as the solutions of an equation; (1, 2) and [1, 2] have one, \{1, 2\} none.
- More than one answer is none: "5 or 6" is not 5, "A or B" is not B. Nor is a sentence that contains the answer.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Literal

from prism.rewards.choices import read_option, read_options
from prism.rewards.groups import Group, Kind, both_signs, read_group
from prism.rewards.quantities import NO_UNIT, equal_quantities, read_quantity
from prism.rewards.spelling import clean
from prism.rewards.times import read_clock, read_ratio
from prism.rewards.units import Unit, is_counted_thing, read_unit

# the right answer and the given one in LaTeX: whether they are one expression
Algebra = Callable[[str, str], bool]

# longer ones are no final answer, and what every reader here takes grows with the length
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
# words that mathematics is written with
_FUNCTION_NAMES = """
sin cos tan cot sec csc log exp sqrt min max arcsin arccos arctan sinh cosh tanh inf infinity theta alpha beta
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_MATHEMATICS = re.compile(r"[\d\\+*/^=<>|!√π∞≤≥≠∪∩∅_]|-(?=\S)")
_NUMBERS_IN_A_ROW = re.compile(r"(?<![_^\d])\d+\s+[\d.]")


def equivalent(golds: Sequence[str], answer: str, algebra: Algebra | None) -> bool | None:
    """Returns whether the answer is one of the right ones, or None where only algebra could tell and there is none.

    An answer of more than MOST_CHARACTERS is right only to the letter.

    Args:
        golds: the right answers, each alone enough.
        answer: the text to judge.
        algebra: compares two LaTeX expressions; it may never return, so it is for a process with a time limit.
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
        # one letter, not a heap of them
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
        # an interval may be answered as an inequality, and 1-5 is -4 where no range is asked for
        if all(groups) or Kind.LIST in kinds or (groups[0] and Kind.RANGE in kinds):
            return verdict
    if quantities[0] and quantities[1]:
        return False
    if _is_mathematics(gold) and _is_mathematics(answer):
        same_unit = _in_one_unit(gold, answer)
        return same_unit and (algebra(*same_unit) if algebra else None)
    return _words(gold) == _words(answer)


def _ratio(text: str) -> Fraction | None:
    """Returns the value of a ratio, or of a number that may stand for one."""
    quantity = read_quantity(text)
    return read_ratio(text) or (quantity.number.value if quantity and quantity.unit == NO_UNIT else None)


def _assigned(gold: str, answer: str) -> tuple[str, str] | None:
    """Returns the values of x = 3 against x = 3, or x = 3 against 3; None where there is nothing to take away."""
    right, given = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if right and given:
        return (right[2], given[2]) if right[1] == given[1] else None
    if right and not _RELATION.search(answer):
        return right[2], answer
    if given and not _RELATION.search(gold):
        return gold, given[2]
    return None


def _in_one_unit(gold: str, answer: str) -> tuple[str, str] | Literal[False]:
    """Returns two expressions without their units, the answer in the right one's, or False where that cannot be."""
    (right, unit), (given, other) = _without_unit(gold), _without_unit(answer)
    if unit and other:
        scale = other.size / unit.size
        return unit.dimension == other.dimension and (right, given if scale == 1 else rf"({given})\cdot({scale})")
    return right, given


def _without_unit(text: str) -> tuple[str, Unit | None]:
    """Returns a constant such as 4\\pi without the unit behind it, and the unit."""
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
    # a bare list is the same as one in brackets, but brackets of two kinds say two things
    if len(right.parts) != len(given.parts) or (len(kinds) == 2 and (Kind.LIST not in kinds or Kind.RANGE in kinds)):
        return False
    if kinds <= {Kind.LIST, Kind.SET}:
        return _matched(right.parts, given.parts, algebra)
    return _all(_same(clean(one), clean(other), algebra) for one, other in zip(right.parts, given.parts))


def _matched(right: Sequence[str], given: Sequence[str], algebra: Algebra | None) -> bool | None:
    """Returns whether the parts are the same in some order."""
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
    """Returns whether a text is for algebra to read: signs of mathematics, and no words but the names of functions."""
    if any(word.lower() not in _FUNCTIONS for word in _WORD.findall(_COMMAND.sub(" ", text))):
        return False
    # numbers side by side are a product to algebra, and a list to people
    return not _NUMBERS_IN_A_ROW.search(text) and (len(text) == 1 or _MATHEMATICS.search(text) is not None)


def _words(text: str) -> str:
    """Returns free text without case, articles and punctuation; what has figures or operators keeps all but case."""
    text = text.casefold()
    if not _NOT_FREE_TEXT.search(text):
        text = _ARTICLE.sub("", _PUNCTUATION.sub(" ", text))
    return " ".join(text.split())
