"""Answers in the forms of MathVista, MMMU and DeepMath, written after the rules to break them."""

import pytest

from prism.rewards.equivalence import equivalent
from prism.rewards.grade import judge

# (right answer, given answer, whether a careful human accepts it)
CASES = [
    # units and percent
    ("3.5 m/s", "3.5 meters per second", True),
    ("60 km/h", "60 km", False),
    ("45%", "45 percent", True),
    ("45%", "45 percentage points of 0.45", False),
    ("2 kg", "2000 g", True),
    (r"9.8 \text{ m/s}^2", "9.8 m/s^2", True),
    (r"12\text{ cm}^2", "12 cm", False),
    # intervals and inequalities
    (r"(-\infty, 2]", r"x \leq 2", True),
    (r"(-\infty, 2]", "x < 2", False),
    (r"[0, \infty)", "[0, infinity)", True),
    ("(2, 5)", "2 < x < 5", True),
    ("(2, 5)", "[2, 5]", False),
    ("x > 3", "x >= 3", False),
    # sets, coordinates, ratios
    (r"\{1, 2, 3\}", "{3, 2, 1}", True),
    (r"\{1, 2, 3\}", "{1, 2}", False),
    ("(3, -4)", "(-4, 3)", False),
    ("(3, -4)", "x = 3, y = -4", True),
    ("3:4", "3 to 4", True),
    ("3:4", "4:3", False),
    # options
    ("D", "None of the above", False),
    ("D) None of the above", "None of the above", True),
    ("A", "A and B", False),
    ("C", "The answer is not C", False),
    ("C", r"\boxed{\text{C}}", True),
    ("C", r"\boxed{C} or \boxed{D}", False),
    # money, thousands, scientific notation
    ("$1,250.50", "1250.50 dollars", True),
    ("$1,250", "€1,250", False),
    ("1,234,567", "1234567", True),
    ("1,234,567", "1,234,568", False),
    (r"6.02 \times 10^{23}", "6.02e23", True),
    (r"6.02 \times 10^{23}", r"6.02 \times 10^{22}", False),
    # mixed numbers, degrees, negations, chains
    (r"2\frac{1}{2}", "2 1/2", True),
    (r"2\frac{1}{2}", "1", False),
    ("120^\\circ", "120 degrees", True),
    ("120^\\circ", "120 degrees Celsius", False),
    ("5", "= 5 = 5", True),
    ("5", "5 = 5", True),
    ("5", "5 = 6", False),
    ("-5", "negative 5", True),
    ("5", "not equal to 5", False),
    ("7", r"\text{7}", True),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}}", True),
    (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}", False),
    # what the rules for words and dates may accept too much
    ("1", "one of them", False),
    ("1", "a", False),
    ("1", "an", False),
    ("1", "a one in ten chance", False),
    ("2", "a pair of twos", False),
    ("0", "none", False),
    ("3", "three is wrong", False),
    ("3", "third", False),
    ("20", "twenty twenty", False),
    ("2020", "twenty twenty", False),
    ("21", "twenty one", True),
    ("April 7, 2020", "07/04/2020", False),
    ("April 7, 2020", "04/07/2020", False),
    ("May 4", "4/5", False),
    ("4/5", "May 4", False),
    ("2020", "2020-01-01", False),
    ("2015", "2020-2-3", False),
    ("march", "March 2020", False),
    (r"\sin x", "sins", False),
    ("sin", "sin x", False),
    (r"\log 2", "log of the second day", False),
    ("tan", "sin", False),
    ("xi", r"\xi", True),
    ("xi", "x i", False),
    ("we'll", "well", False),
    ("it's", "its", True),
    # a missing unit is taken from the other
    ("5'", "5", True),
    ("x'", "x", False),
    ("can't", "can", False),
    ("I'll", "ill", False),
    # found wrong by a second look, and their controls
    ("5", "5 fives", False),
    ("5", "5 tens", False),
    ("2", "two halves", False),
    ("1", "one hundredth", False),
    ("1/3", "a third time", False),
    ("1/3", "a third", True),
    ("7/3", "two and a third", True),
    ("1/2", "half x", False),
    ("5", "5 factorial", False),
    ("B", "B) is not it", False),
    ("B", "B) is the one", True),
    ("B", "B) is one of the primes", True),
    ("B", "B. It could also be C.", False),
    ("B", "B) 4 cm; C) 5 cm", False),
    ("B", "B) 4 cm\nC) 5 cm", False),
    ("no", "no, it is", False),
    ("yes", "Yes, it is not", False),
    ("yes", "Yes, I disagree", False),
    ("yes", "true, I doubt it", False),
    ("no", "No, that's right, it is true", False),
    ("2009", "2020-07-4", False),
    ("sin 1", "sin 1°", False),
    ("mu", r"\mu m", False),
    (r"4\pi", r"4\pi cm", True),
    ("were", "we're", False),
    ("shell", "she'll", False),
    ("3 to 4", "3:4", False),
    ("3:4", "3 to 5", False),
    ("0.75", "3 to 4", False),
]
# still graded wrongly: (right answer, given answer, what a careful human says, why it is not mended)
STILL_WRONG = [
    (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or x>1", True, "inequalities joined by a word are read as a list"),
    ("A", "A - the left one", True, "a dash after a letter is a minus: A - sin x is no option"),
    (r"\emptyset", "empty set", True, "names of signs: equivalent_answers names them"),
    ("No solution", "no solutions", True, "plurals of free text: equivalent_answers names them"),
    ("2020", "in 2020", True, "a preposition may belong to the answer"),
    ("5", "x \\approx 5", False, "algebra takes a sign of about for an equals sign"),
    ("i", "I", False, "case is ignored in single letters, as for options"),
]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    CASES + [pytest.param(*c[:3], marks=pytest.mark.xfail(reason=c[3], strict=True)) for c in STILL_WRONG],
)
def test_form_is_graded_as_by_a_careful_human(gold, answer, right):
    assert judge([gold], answer) is right
    # what is decided without algebra is decided the same
    assert equivalent([gold], answer, None) in (right, None)


def test_no_case_occurs_twice():
    assert len({case[:2] for case in CASES}) == len(CASES)
