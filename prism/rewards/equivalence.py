r"""Whether an answer is the right one. The form of the right answer decides how the two are compared.

Decisions where usage is divided:

- If only one of the two has a unit, the question is taken to have given it; if both have one, it is converted
  (1 m is 100 cm, 5 kg is not 5 lb, 20 °C is not 68 °F). 50 % equals 0.5 and 50, but 0.5 does not equal 0.5 %.
- Decimals are exact. A decimal equals a value with more digits if it has at least six digits and is correctly
  rounded: 0.333333 equals 1/3, 0.33 does not. A comma groups thousands or separates; it is no decimal point.
- A list without brackets has no order, as the solutions of an equation; (1, 2) and [1, 2] have one, \{1, 2\} none.
- Several answers are no answer: "5 or 6" is not 5, "A or B" and "B) A" are not B. Nor is an answer that is hedged or
  taken back: "Yes, maybe", "5 wrong". A sentence with one verb gives its answer: "The area is 12" is 12.
- A date says all that the right one says: July 4 is not July 4, 2020. 04/07/2020 may be two dates, so it is none.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Literal

from prism.rewards.dates import read_date
from prism.rewards.forms import (
    Group,
    GroupKind,
    both_signs,
    read_clock,
    read_group,
    read_numbered_parts,
    read_option,
    read_options,
    read_ratio,
)
from prism.rewards.number_words import with_digits_of_ordinals
from prism.rewards.quantities import NO_UNIT, Unit, equal_quantities, is_counted_thing, read_quantity, read_unit
from prism.rewards.spelling import clean
from prism.rewards.wording import read_statement, read_truth, same_subject, takes_back

# (right answer, given answer), both LaTeX -> whether they are equal
Algebra = Callable[[str, str], bool]

# longer and deeper texts are no final answers, and the time of every reader here grows with both
MOST_CHARACTERS = 500
MOST_BRACKETS = 24

_NAME = r"[a-zA-Zα-ωΑ-Ω]|\\[a-z]+|[a-zA-Z]_\w|[a-zA-Z]_\{\w+\}|[a-zA-Z]\([a-z]\)"
_ASSIGNMENT = re.compile(rf"({_NAME})\s*=\s*([^=<>]+)")
_RELATION = re.compile(r"[=<>≤≥≠]|\\(?:leq|geq|neq?|lt|gt)(?![a-zA-Z])")
_ARTICLE = re.compile(r"\b(?:the|a|an)\s+")
_NOT_FREE_TEXT = re.compile(r"[\d\\^<>=+*/|√]")
# words and the signs between them, which carry no meaning
_SENTENCE = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_\n]+(?:[\s,.;:!?'\"-]+[^\W\d_\n]+)*[\s,.;:!?'\"-]*")
_INITIALS = re.compile(r"(?<![\w.])(?:[^\W\d_]\.)+[^\W\d_](?!\w)")
# we'll and I'd are other words than well and id
_APOSTROPHE = re.compile(r"'(?!(?:ll|re|ve|d|m)(?!\w))", re.IGNORECASE)
# P' and B'C' are other points than P and BC
_PRIMED = re.compile(r"(?:[A-Z]'*){1,4}|[a-z]'+")
_WITH_APOSTROPHE = re.compile(r"[^\W_]*'[^\W_']*(?:'[^\W_']*)*")
# not the factorial n!, nor x-y
_PUNCTUATION = re.compile(r"[^\w\s'!-]|(?<=\w{3})!|(?<=\w{3})-|-(?=\w{3})|(?<!\w)-(?!\w)")
_WORD = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"[^\W\d_πe]")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+")
# words of mathematics
_FUNCTION_NAMES = """
sin cos tan cot sec csc log ln lg exp sqrt min max arcsin arccos arctan sinh cosh tanh inf infinity pi
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_GREEK_NAMES = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi
varphi chi psi omega
"""
_GREEK = frozenset(_GREEK_NAMES.split())
_LETTERS = re.compile(r"(?<![a-zA-Z])[a-zA-Z]{2,}")
_MATHEMATICS = re.compile(r"[\d\\+*/^=<>|!√π∞≤≥≠∪∩∅_]|-(?=\S)")
# 12 in base 5, and 000 of 5-000
_NO_ARITHMETIC = re.compile(r"\d\)?\s*_|(?<![\d.,])0\d")
_NUMBER = re.compile(r"\d+")
# a length or an angle: AB, \angle ABC
_POINTS = re.compile(r"(?:m ?)?(?:(?:\\angle|∠) ?\{?[A-Z]{1,3}\}?|(?:\\overline ?)?\{?[A-Z]{2}\}?)")
_RATIO_IN_WORDS = re.compile(r"(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)")
# 6 (six)
_RESTATED = re.compile(r"([^()]+?)\s+\(([^()]+)\)")
_SUBSCRIPT = re.compile(r"_\s*\{(\w+)\}")
_NUMBERS_IN_A_ROW = re.compile(r"(?<![_^\d])\d+\s+[\d.]")


def equivalent(golds: Sequence[str], answer: str, algebra: Algebra | None) -> bool | None:
    """Returns whether the answer is one of the right ones, or None where only algebra can tell and none is given.

    An answer with more than MOST_CHARACTERS, or with more than MOST_BRACKETS inside each other, is right only if it is
    the same text.

    Args:
        golds: the right answers; one of them is enough.
        answer: the text to judge.
        algebra: compares two LaTeX expressions. It may never return, so it needs a process with a time limit.
    """
    if any(gold.strip() == answer.strip() for gold in golds):
        return True
    if _is_too_large(answer):
        return False
    spelt = clean(answer)
    return _any(_same(clean(gold), spelt, algebra) for gold in golds if not _is_too_large(gold))


def _is_too_large(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{（［｛") - (character in ")]}）］｝")
        deepest = max(deepest, depth)
    return len(text) > MOST_CHARACTERS or deepest > MOST_BRACKETS


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
    if answer.endswith("?") and "?" not in gold:
        return False

    if _SENTENCE.fullmatch(gold) and _SENTENCE.fullmatch(answer) and _words(gold) == _words(answer):
        return True

    parts = read_numbered_parts(gold), read_numbered_parts(answer)
    if any(parts):
        return _same_in_order(parts[0] or _list_parts(gold), parts[1] or _list_parts(answer), algebra)

    right, given = read_option(gold), read_option(answer)
    if right:
        if given:
            if given.letter != right.letter or (not right.text and takes_back(given.letter, given.text)):
                return False
            return not right.text or not given.text or _same(clean(right.text), clean(given.text), algebra)
        if right.text:
            return _same(clean(right.text), answer, algebra)
    elif given and given.text:
        # the text of an option is no option itself: "A) B" chooses two
        return False if read_option(clean(given.text)) else _same(gold, clean(given.text), algebra)

    # one word: the reason in "No, it is smaller" matters if the right answer gives it
    if " " not in gold and (truth := read_truth(gold)) is not None:
        statement = read_statement(answer)
        # "The claim is false" has a subject, "Yes because ..." none
        said = read_truth(statement.value if statement and statement.subject else answer)
        return said is truth
    values = _stated(gold, answer)
    if values:
        return _same(clean(values[0]), clean(values[1]), algebra)
    if right:
        return False
    if options := read_options(gold):
        return read_options(answer) == options

    dates = read_date(gold), read_date(answer)
    if any(dates):
        return dates[0] == dates[1]
    if clock := read_clock(gold):
        reading = read_clock(answer)
        return reading is not None and clock.agrees(reading)
    if read_ratio(gold) or read_ratio(answer):
        # a range is none: 3 to 4 answers 3:4 only if a ratio is asked for
        given_ratio = _ratio(_RATIO_IN_WORDS.sub(r"\1:\2", answer) if read_ratio(gold) else answer)
        return _ratio(gold) is not None and _ratio(gold) == given_ratio

    values = _assigned(gold, answer)
    if values:
        return _same(clean(values[0]), clean(values[1]), algebra)
    if steps := _steps(gold, answer):
        return _all(_same(gold, clean(step), algebra) for step in steps)

    quantities = read_quantity(gold), read_quantity(answer)
    if quantities[0] and quantities[1] and equal_quantities(quantities[0], quantities[1]):
        return True
    restated = _RESTATED.fullmatch(answer)
    if restated and not all(_NUMBER.fullmatch(text) for text in restated.groups()):
        twice = _all(_same(gold, clean(text), algebra) for text in restated.groups())
        # otherwise the brackets belong to it: 2 (x + 1)
        if twice is not False:
            return twice
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


def _stated(gold: str, answer: str) -> tuple[str, str] | None:
    """Returns both values where one of the two is a sentence that gives it; None where no sentence can be dropped."""
    right, given = read_statement(gold), read_statement(answer)
    if right and given:
        return (right.value, given.value) if same_subject(right, given) else None
    if right:
        return right.value, answer
    return (gold, given.value) if given else None


def _steps(gold: str, answer: str) -> list[str] | None:
    """Returns the steps of a chain of equations, such as A = 3*4 = 12, all of which must equal the right answer.

    A name at one end is dropped. None: the answer is no chain, or an equation for algebra to read.
    """
    steps = [step.strip() for step in answer.split("=")]
    if len(steps) < 2 or not all(steps) or _RELATION.search(gold) or _RELATION.search(answer.replace("=", " ")):
        return None
    # x = 2 or x = 3
    if (group := read_group(answer)) and group.kind is GroupKind.LIST:
        return None
    if _POINTS.fullmatch(steps[0]):
        return steps[1:]
    if _is_named(steps[0]):
        return steps[1:] if len(steps) > 2 else None
    if len(steps) == 2 and _is_named(steps[1]):
        return steps[:1]
    return steps


def _is_named(text: str) -> bool:
    """Returns whether a text has letters other than names of functions and constants."""
    if any(command.lower() in _GREEK for command in re.findall(r"\\([a-zA-Z]+)", text)):
        return True
    words = re.findall(r"[^\W\d_]+", _COMMAND.sub(" ", text))
    return any(word not in _FUNCTIONS and _LETTER.search(word) for word in words)


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
        if unit and unit.dimension and not is_counted_thing(unit) and not _is_named(head):
            return head, unit
    return text, None


def _groups(text: str) -> list[Group]:
    """Returns the ways in which a text is a group."""
    return [group for group in (read_group(text), both_signs(text)) if group]


def _list_parts(text: str) -> tuple[str, ...]:
    """Returns the parts of a list without labels, or none."""
    group = read_group(text)
    return group.parts if group and group.kind is GroupKind.LIST else ()


def _same_in_order(right: Sequence[str], given: Sequence[str], algebra: Algebra | None) -> bool | None:
    if len(right) != len(given):
        return False
    return _all(_same(clean(one), clean(other), algebra) for one, other in zip(right, given))


def _same_parts(right: Group, given: Group, algebra: Algebra | None) -> bool | None:
    kinds = {right.kind, given.kind}
    # a bare list equals one in brackets, but two kinds of brackets mean two things
    comparable = len(kinds) == 1 or (GroupKind.LIST in kinds and GroupKind.RANGE not in kinds)
    if len(right.parts) != len(given.parts) or not comparable:
        return False
    if kinds <= {GroupKind.LIST, GroupKind.SET}:
        return _matched(right.parts, given.parts, algebra)
    return _same_in_order(right.parts, given.parts, algebra)


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
    """Returns whether algebra can read a text: it has signs or names of mathematics, and no other words."""
    if any(word.lower() not in _FUNCTIONS | _GREEK for word in _WORD.findall(_COMMAND.sub(" ", text))):
        return False
    # numbers side by side are a product to algebra, and a list to people
    if _NUMBERS_IN_A_ROW.search(text) or _NO_ARITHMETIC.search(text):
        return False
    named = any(word in _FUNCTIONS | _GREEK for word in _LETTERS.findall(text))
    return len(text) == 1 or named or _MATHEMATICS.search(text) is not None


def _joined(match: re.Match[str]) -> str:
    """Returns a word without its apostrophes, where they make no other word of it."""
    return match[0] if _PRIMED.fullmatch(match[0]) else _APOSTROPHE.sub("", match[0])


def _words(text: str) -> str:
    """Returns free text without case, articles and punctuation; a text with digits or operators loses case only."""
    if not _NOT_FREE_TEXT.search(text):
        text = _INITIALS.sub(lambda m: m[0].replace(".", ""), text)
        text = _WITH_APOSTROPHE.sub(_joined, text)
        text = _ARTICLE.sub("", _PUNCTUATION.sub(" ", text.casefold()))
    return " ".join(_SUBSCRIPT.sub(r"_\1", with_digits_of_ordinals(text.casefold())).split())
