import json
import math
from collections import Counter

import pytest
import torch
from discriminator_cases import SIZE, TOKENIZER

from prism.config import load_config
from prism.data.drift import drift, wasserstein
from prism.data.problem import Problem
from prism.discriminator.model import Discriminator
from prism.discriminator.score import TextBranches, score_groups, score_limits
from prism.discriminator.upcycle import upcycle
from prism.evaluation import assessment
from prism.evaluation.assessment import evaluate
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism.rollout.engine import Rollout
from prism.worlds.shapes.counters import judge, read_caption
from prism.worlds.shapes.probes import CHANGES, curated_text, wrong_caption, wrong_conclusion
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.teachers import TEACHERS
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels.grammar import split_response

ENCODER = PromptEncoder(TOKENIZER, tiny_image_processor(SIZE))
PROBLEMS = [problem_of(sample) for sample in ShapesWorld().samples("validation", 24)]
CONFIG = load_config(None, {"data.response_tokens": 400, "memory.score_pack_tokens": 6000})


class Written:
    """An engine whose responses are given, for greedy and for sampled decoding."""

    def __init__(self, say):
        self.say = say

    def generate(self, prompts, sampling, *, seed=0, keys=None):
        found = []
        for prompt in range(len(prompts)):
            key = prompt if keys is None else keys[prompt]
            for index in range(sampling.group):
                ids = TOKENIZER(self.say(PROBLEMS[key], index, sampling.temperature))["input_ids"]
                found.append(Rollout(prompt, index, ids, torch.zeros(len(ids)), torch.zeros(len(ids)), "stop"))
        return found


def the_teacher(problem, index=0, temperature=0.0):
    return curated_text(problem.shape)


def test_wasserstein_on_the_line():
    a, b = [1.0, 2.0, 3.0], [5.0, 2.0, 4.0, 3.0]
    assert wasserstein(a, a) == 0
    assert wasserstein([1], [3.5]) == pytest.approx(2.5)
    # by quantiles, on a grid that both sizes divide
    x, y = ([value for value in sorted(one) for _ in range(12 // len(one))] for one in (a, b))
    assert wasserstein(a, b) == pytest.approx(sum(abs(p - q) for p, q in zip(x, y)) / 12)
    assert wasserstein([0, 4], [1, 3]) == pytest.approx(1.0)
    assert math.isnan(wasserstein(a, [])) and math.isnan(wasserstein([], a))


def test_drift_counts_valid_responses_and_each_channel_apart():
    def response(items, steps):
        caption = "\n".join("- red star" for _ in range(items))
        return f"<caption>{caption}</caption><think>{' '.join('So.' for _ in range(steps))}</think><answer>1</answer>"

    found = drift([response(3, 1), response(5, 1), "nothing"], [response(2, 1), None, response(2, 4)])
    assert found == {"valid": pytest.approx(2 / 3), "drift_perception": 2.0, "drift_reasoning": 1.5}
    assert math.isnan(drift(["nothing"], [response(1, 1)])["drift_perception"])


def test_a_policy_that_speaks_as_its_teacher_is_right_in_everything():
    found = evaluate(Written(the_teacher), PROBLEMS, ENCODER, max_new_tokens=200, batch=7)
    assert (found.accuracy, found.format, found.perception_error, found.reasoning_error) == (1, 1, 0, 0)
    assert found.drift_perception == found.drift_reasoning == 0
    assert found.as_json()["accuracy_se"] == 0


def test_errors_and_drift_are_those_that_were_put_in():
    def say(problem, index, temperature):
        place = PROBLEMS.index(problem)
        return (wrong_caption(problem.shape, "kind"), wrong_conclusion(problem.shape), "no", the_teacher(problem))[
            place % 4
        ]

    found = evaluate(Written(say), PROBLEMS, ENCODER, max_new_tokens=200)
    # a changed caption may contradict the answer, which then does not follow although the last step was right
    assert found.format == 0.75 and found.accuracy == 0.5
    assert found.perception_error == 0.5
    assert 0.5 <= found.reasoning_error <= 0.75


def test_what_is_not_known_is_left_out():
    known = [Problem(p.name, p.prompt, p.images, p.answer) for p in PROBLEMS[:3]]
    found = evaluate(Written(the_teacher), known, ENCODER, max_new_tokens=200).as_json()
    assert found["accuracy"] == 1
    assert found.keys() == {"samples", "accuracy", "format", "length", "accuracy_se"}
    # JSON has no NaN
    json.dumps(found, allow_nan=False)


def test_sampled_responses_are_judged_beside_the_greedy_ones():
    def say(problem, index, temperature):
        return "no" if temperature else the_teacher(problem)

    found = assessment.assess_policy(Written(say), PROBLEMS, ENCODER, CONFIG, "validation")
    assert (found["split"], found["format"], found["sampled"]["format"]) == ("validation", 1, 0)
    assert found["sampled"]["samples"] == found["samples"] == len(PROBLEMS)
    assert "drift_perception" in found and "drift_perception" not in found["sampled"]
    without = load_config(None, {"evaluation.sampled": False})
    assert "sampled" not in assessment.assess_policy(Written(say), PROBLEMS, ENCODER, without, "validation")
    assert "accuracy 1.000 ± 0.000" in assessment.figures_line(found) and "at temperature 1" in assessment.figures_line(
        found
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_caption_has_one_item_changed_and_nothing_else(change):
    for problem in PROBLEMS:
        right, wrong = (split_response(t) for t in (the_teacher(problem), wrong_caption(problem.shape, change)))
        assert (right.think, right.answer) == (wrong.think, wrong.answer)
        kept, left = (Counter(one.caption.splitlines()) for one in (right, wrong))
        items = problem.shape.scene.items
        gone, new = (kept - left).total(), (left - kept).total()
        if change == "dropped" and len(items) > 1:
            assert (gone, new) == (1, 0)
        elif change == "colour" or len(items) == 1:
            # a colour is mistaken in all items of it
            assert gone == new >= 1
        else:
            assert (gone, new) == (1, 1)
        found = judge(wrong_caption(problem.shape, change), problem.shape.scene, problem.shape.question)
        assert found.valid and found.perception.wrong and found.perception.unreadable is None
        assert not judge(the_teacher(problem), problem.shape.scene, problem.shape.question).perception.wrong


def test_a_wrong_conclusion_has_the_same_caption_and_evidence():
    for problem in PROBLEMS:
        right, wrong = (split_response(t) for t in (the_teacher(problem), wrong_conclusion(problem.shape)))
        assert right.caption == wrong.caption and right.answer != wrong.answer
        assert right.think.splitlines()[:-1] == wrong.think.splitlines()[:-1]
        found = judge(wrong_conclusion(problem.shape), problem.shape.scene, problem.shape.question)
        assert found.valid and found.reasoning.wrong and not found.perception.wrong and not found.correct


def test_probes_say_which_changes_they_know():
    with pytest.raises(
        ValueError, match="wrong_caption: expected change to be one of 'colour', 'kind', 'dropped', 'place', got 'size'"
    ):
        wrong_caption(PROBLEMS[0].shape, "size")


@pytest.fixture(scope="module")
def discriminator():
    policy, _ = tiny_policy(SIZE, tokenizer=TOKENIZER)
    return Discriminator(upcycle(policy, num_experts=4, top_k=2, noise=0.01)).eval()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_teachers_texts_can_be_scored(teacher):
    """A token that spans a tag and its neighbour would make a text invalid for the discriminator only."""
    world = ShapesWorld()
    texts = [world.respond(teacher, sample).sections.text for sample in world.samples("validation", 200)]
    cut = TextBranches(ENCODER, score_limits(CONFIG)).cut(texts, texts)
    assert {text: one for text, one in zip(texts, cut) if isinstance(one, str)} == {}


def test_the_discriminator_is_seen_from_all_sides(discriminator):
    def say(problem, index, temperature):
        return (wrong_caption(problem.shape, "colour"), the_teacher(problem), "no tags")[min(index, 2)]

    found = assessment.assess_discriminator(discriminator, Written(say), PROBLEMS[:6], ENCODER, CONFIG)
    assert list(found) == ["pairs", "swapped images", "equal style"]
    # two of eight responses are valid, one of which is wrong in perception
    assert found["pairs"]["perception"]["pairs"] == 12 and found["pairs"]["perception"]["compared"] == 6
    # a new value head is 0, so all pairs tie
    for view in found.values():
        assert all(one["accuracy"] == 0.5 and one["gap"] == 0 for one in view.values())
    assert found["equal style"]["perception"]["by_change"] == dict.fromkeys(CHANGES, 0.5)
    assert (found["equal style"]["perception"]["pairs"], found["equal style"]["reasoning"]["pairs"]) == (24, 6)
    json.dumps(found, allow_nan=False)


def test_equal_style_reads_each_channel_from_the_text_that_is_wrong_in_it(discriminator, monkeypatch):
    """A judge of captions only tells perception apart and not reasoning; and a judge of reasoning the reverse."""
    real = score_groups

    def judged_by(channel):
        def scored(model, samples, encoder, limits):
            scores = real(model, samples, encoder, limits)

            def worth(problem, text):
                verdict = judge(text, problem.shape.scene, problem.shape.question)
                errors = verdict.perception if channel == "perception" else verdict
                return float(not errors.wrong if channel == "perception" else errors.correct)

            texts = [(PROBLEMS[p], text) for p, sample in enumerate(samples) for text in sample.responses]
            student = torch.tensor([worth(*one) for one in texts])
            teacher = torch.tensor([worth(PROBLEMS[p], sample.teacher) for p, sample in enumerate(samples)])
            return scores._replace(**{channel: student, f"teacher_{channel}": teacher})

        return scored

    for channel, other in (("perception", "reasoning"), ("reasoning", "perception")):
        monkeypatch.setattr(assessment, "score_groups", judged_by(channel))
        found = assessment.assess_discriminator(discriminator, Written(the_teacher), PROBLEMS[:4], ENCODER, CONFIG)
        assert found["equal style"][channel]["accuracy"] == 1 and found["equal style"][other]["accuracy"] == 0.5


def test_a_group_of_the_assessment_fits_whatever_the_training_needs():
    config = load_config(None, {"rollout.align.group": 2, "memory.score_pack_tokens": 704})
    room = assessment._limits(config).budget
    assert room >= config.data.prompt_tokens + (assessment.GROUP + 1) * config.data.response_tokens
    assert score_limits(config).budget == 704


def test_problems_of_files_have_pairs_but_no_probes(discriminator):
    known = [Problem(p.name, p.prompt, p.images, p.answer, teacher=p.teacher) for p in PROBLEMS[:3]]
    found = assessment.assess_discriminator(discriminator, Written(the_teacher), known, ENCODER, CONFIG)
    assert list(found) == ["pairs", "swapped images"]
    assert "auc" not in found["pairs"]["perception"]


def test_captions_of_the_probes_can_be_read():
    for problem in PROBLEMS:
        caption = split_response(the_teacher(problem)).caption
        assert read_caption(caption) == problem.shape.scene.items
