import copy
import math

import pytest

from prism.report.summary import improvements, summary


def evaluation(accuracy, drift=(0.5, 0.5), samples=400, **more):
    error = math.sqrt(accuracy * (1 - accuracy) / samples)
    found = {"split": "validation", "samples": samples, "accuracy": accuracy, "accuracy_se": error, "format": 0.9}
    found |= {"perception_error": 0.25, "reasoning_error": 0.125}
    return found | {"drift_perception": drift[0], "drift_reasoning": drift[1], **more}


def sampled(one, drift):
    return {**one, "sampled": {**evaluation(0.5, drift), "split": None}}


# every stage reaches its goals
GOOD = {
    "start": evaluation(0.25, format=0.5),
    "sft": sampled(evaluation(0.50), (0.8, 0.7)),
    "sft 20": evaluation(0.01),
    "warmup": sampled(evaluation(0.50), (0.8, 0.7))
    | {
        "discriminator": {
            "pairs": {"perception": {"accuracy": 0.8, "auc": 0.75}, "reasoning": {"accuracy": 0.9}},
            "equal style": {"perception": {"accuracy": 0.6}, "reasoning": {}},
        }
    },
    "align": sampled(evaluation(0.45), (0.7, 0.6)) | {"test": evaluation(0.60, samples=1024, split="test")},
    "rlvr": evaluation(0.46) | {"test": evaluation(0.66, samples=1024, split="test")},
}
STATEMENTS = [
    ("sft", "format rises, or is at least 0.99"),
    ("sft", "accuracy rises"),
    ("warmup", "pair accuracy on held-out pairs is at least 0.8, perception"),
    ("warmup", "pair accuracy on held-out pairs is at least 0.8, reasoning"),
    ("align", "drift falls, perception"),
    ("align", "drift falls, reasoning"),
    ("align", "accuracy is not lower by more than two standard errors"),
    ("rlvr", "accuracy rises by more than two standard errors"),
]


def changed(path, value):
    found = copy.deepcopy(GOOD)
    place = found
    *parts, last = path
    for part in parts:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


def test_a_run_whose_stages_do_what_they_are_for():
    found = improvements(GOOD)
    assert [(one.stage, one.statement) for one in found] == STATEMENTS
    assert all(one.holds for one in found)
    # sqrt(0.6 * 0.4 / 1024 + 0.66 * 0.34 / 1024), of the test split and not of the validation split
    assert found[-1].figures["standard_error"] == pytest.approx(0.02130, abs=1e-5)
    assert (found[-1].figures["before"], found[-1].figures["after"], found[-1].figures["samples"]) == (0.60, 0.66, 1024)
    # drift at temperature 1
    assert found[4].figures == {"before": 0.8, "after": 0.7}


@pytest.mark.parametrize(
    ("path", "value", "fails"),
    [
        (("sft", "format"), 0.45, 0),
        (("sft", "accuracy"), 0.25, 1),
        (("warmup", "discriminator", "pairs", "perception", "accuracy"), 0.79, 2),
        (("warmup", "discriminator", "pairs", "reasoning", "accuracy"), 0.5, 3),
        (("align", "sampled", "drift_perception"), 0.8, 4),
        (("align", "sampled", "drift_reasoning"), 0.71, 5),
        (("align", "accuracy"), 0.40, 6),
        (("rlvr", "test", "accuracy"), 0.64, 7),
        # a goal without its figures is not reached
        (("sft", "accuracy_se"), None, 1),
        (("warmup", "discriminator"), None, (2, 3)),
        (("align", "sampled", "drift_perception"), None, 4),
        (("align", "accuracy"), None, 6),
        # without a common test split the two validations are compared: 0.45 and 0.46
        (("align", "test"), None, 7),
    ],
)
def test_each_statement_fails_by_its_own_figures(path, value, fails):
    found = improvements(changed(path, value))
    fails = fails if isinstance(fails, tuple) else (fails,)
    assert [place for place, one in enumerate(found) if not one.holds] == list(fails)


def test_what_cannot_be_better_is_not_asked_to_rise():
    found = changed(("sft", "format"), 0.995)
    found["start"]["format"] = 1.0
    assert improvements(found)[0].holds
    # all right before and after: not lower, though the standard error is 0
    both = {"warmup": evaluation(1.0), "align": evaluation(1.0)}
    assert improvements(both)[-1].holds
    assert not improvements({"align": evaluation(1.0), "rlvr": evaluation(1.0)})[-1].holds


def test_greedy_drift_where_nothing_was_sampled():
    both = {"sft": evaluation(0.5, (1.0, 1.0)), "align": evaluation(0.5, (0.5, 1.5))}
    assert [one.holds for one in improvements(both)] == [True, False, True]


def test_stages_that_were_not_reached_are_not_judged():
    assert improvements({}) == [] and improvements({"start": GOOD["start"]}) == []
    assert {one.stage for one in improvements({"start": GOOD["start"], "sft": GOOD["sft"]})} == {"sft"}
    # other stages have no goals
    assert improvements({"start": GOOD["start"], "base": GOOD["sft"]}) == []


def test_the_console_tells_all_of_it():
    told = summary(GOOD)
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "sft 400 of validation 0.500 ± 0.025 0.250 0.125 0.900" in lines
    assert "rlvr 1024 of test 0.660 ± 0.015 0.250 0.125 0.900" in lines
    assert not any(line.startswith("sft 20") for line in lines)
    assert "warmup pairs 0.800 0.900" in lines and "warmup equal style 0.600 -" in lines
    assert "before alignment, T=1 0.800 0.700" in lines and "after alignment, T=1 0.700 0.600" in lines
    assert (
        "yes rlvr: accuracy rises by more than two standard errors (0.600 → 0.660, +0.060 ± 0.021 of 1024 problems)"
    ) in lines
    assert max(map(len, told.splitlines())) <= 130


def test_the_console_says_what_does_not_hold_or_is_not_known():
    told = summary(changed(("align", "sampled", "drift_perception"), None))
    assert "NO   align: drift falls, perception (0.800 → not measured)" in told
    assert summary({}) == ""
    early = summary({"start": GOOD["start"]})
    assert "start" in early and "drift" not in early and "yes" not in early
