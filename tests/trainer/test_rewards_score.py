"""The contract `score_response`, against the published rule where that is wrong, and its errors."""

import subprocess
import sys

import pytest
from math_verify import parse, verify

from prism.rewards import Verdict, score_batch, score_response


def response(answer):
    return f"<caption>\n- three cubes\n</caption>\n<think>counting, 1 2 3</think>\n<answer>{answer}</answer>"


def published_accuracy(answer, gold):
    """The rule of the published code, from its description: the dollar signs are removed, then math-verify decides."""
    return verify(parse(gold.replace("$", "")), parse(answer.replace("$", "")))


# method.md, defect P: (right answer, given answer, whether they are the same)
DEFECTS = [
    (r"$2\sqrt{5}$", r"$2\sqrt{3}$", False),
    ("2√5", "2√3", False),
    ("5", "1 2 3 4 5", False),
    ("5 kg", "5 lb", False),
    ("(1, 2)", "(1,2)", True),
    ("B", r"\boxed{B}", True),
    (r"$2\sqrt{3}$", r"$\sqrt{12}$", True),
]


@pytest.mark.parametrize(("gold", "answer", "same"), DEFECTS)
def test_right_where_the_published_rule_is_wrong(gold, answer, same):
    published = published_accuracy(answer, gold)
    assert published is (not same)
    accuracy = float(same)
    assert score_response(response(answer), gold) == {
        "score": pytest.approx(0.8 * accuracy + 0.2),
        "accuracy": accuracy,
        "format": 1.0,
    }


def test_thousands_separator():
    # apart from the table: the published code fails here, but not by what this test re-creates of it
    assert published_accuracy("1,234", "1234")
    assert score_response(response("1,234"), "1234")["accuracy"] == 1.0
    assert score_response(response("1234"), "1,234")["accuracy"] == 1.0
    assert score_response(response("1.234"), "1,234")["accuracy"] == 0.0


def test_score_is_eight_parts_accuracy_and_two_parts_format():
    assert score_response(response("3"), "3") == {"score": 1.0, "accuracy": 1.0, "format": 1.0}
    assert score_response(response("4"), "3") == {"score": 0.2, "accuracy": 0.0, "format": 1.0}
    assert score_response("3", "3") == {"score": 0.0, "accuracy": 0.0, "format": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        response("3") + response("3"),
        response("3").replace("<caption>", "<caption>c</caption><caption>"),
        response("4</answer><answer>3"),
        response("3").replace("counting", "<answer>3</answer>"),
        response(" "),
        response("3").removeprefix("<caption>"),
        response("3") + " I am sure.",
    ],
)
def test_the_answer_of_an_invalid_response_is_not_read(text):
    assert score_response(text, "3") == {"score": 0.0, "accuracy": 0.0, "format": 0.0}


def test_equivalent_answers():
    assert score_response(response("a square"), "quadrilateral", ["square", "rhombus"])["accuracy"] == 1.0
    assert score_response(response("a kite"), "quadrilateral", ["square", "rhombus"])["accuracy"] == 0.0
    # parquet has null where a row has none
    assert score_response(response("quadrilateral"), "quadrilateral", None)["accuracy"] == 1.0


def test_batch_gives_the_scores_of_single_responses_with_reasons():
    answers = ["3", r"\frac{\sqrt{36}}{2}", r"\sqrt{10}", "cat", " "]
    verdicts = score_batch([response(a) for a in answers], ["3"] * 5, [["4"], None, [], ("5",), []])
    assert verdicts == [
        Verdict(1.0, 1.0, 1.0, "right"),
        Verdict(1.0, 1.0, 1.0, "right"),
        Verdict(0.2, 0.0, 1.0, "wrong"),
        Verdict(0.2, 0.0, 1.0, "wrong"),
        Verdict(0.0, 0.0, 0.0, "empty_segment"),
    ]
    for answer, verdict in zip(answers, verdicts):
        single = score_response(response(answer), "3")
        assert single == {"score": verdict.score, "accuracy": verdict.accuracy, "format": verdict.format}
    assert score_batch([], []) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", 3), TypeError, "score_response: expected right answers to be text, got int"),
        (("a", "3", "4"), TypeError, "score_response: expected equivalent_answers to be a list of texts"),
        (("a", "3", [4]), TypeError, "score_response: expected right answers to be text, got int"),
        (("a", " "), ValueError, "score_response: expected right answers that are not empty"),
        ((None, "3"), TypeError, "score_response: expected a response to be text, got NoneType"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        score_response(*arguments)


def test_batch_of_unequal_lengths_is_an_error():
    with pytest.raises(ValueError, match="score_batch: expected ground_truths for each of the 2 responses, got 1"):
        score_batch(["a", "b"], ["1"])
    with pytest.raises(ValueError, match="score_batch: expected equivalent_answers for each of the 1 responses, got 2"):
        score_batch(["a"], ["1"], [[], []])


def test_import_loads_neither_torch_nor_sympy_and_plain_answers_start_no_worker():
    code = (
        "import sys, multiprocessing\n"
        "from prism.rewards import score_response\n"
        f"assert score_response({response('5 cm')!r}, '50 mm')['accuracy'] == 1\n"
        "from prism.rewards import workers\n"
        "assert not workers._shared\n"
        "assert not {'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
