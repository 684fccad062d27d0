"""The base's problems of judging: the counters confirm the verdicts, the discriminator reads the same parts."""

import hashlib
import json
from collections import Counter
from random import Random

import pytest

from prism.discriminator.score import ScoreLimits, TextBranches
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, train_tokenizer
from prism.worlds.shapes.counters import perception_error, reasoning_error
from prism.worlds.shapes.probes import VERDICTS, judged, one_wrong
from prism.worlds.shapes.problems import ShapesProblems, judged_problem
from prism.worlds.shapes.world import ShapesWorld

WORLD = ShapesWorld()
ENCODER = PromptEncoder(train_tokenizer(), tiny_image_processor())


def test_verdicts_are_true():
    seen = Counter()
    for sample in WORLD.samples("base", 600):
        part, verdict = judged(sample)
        if part.startswith("<caption>"):
            right = not perception_error(part.removeprefix("<caption>"), sample.scene).wrong
        else:
            answer = part.rpartition("<answer>")[2]
            truth = "\n".join(f"- {item.colour} {item.kind} {item.place}" for item in sample.scene.items)
            right = not reasoning_error(answer, truth, sample.question).wrong
        assert verdict == VERDICTS[right]
        seen[part[:4], right] += 1
    # parts and verdicts are equally frequent: a quarter of 600, within four standard deviations
    assert len(seen) == 4 and all(abs(number - 150) < 4 * 10.7 for number in seen.values())


def test_one_item_is_wrong():
    for sample in WORLD.samples("base", 200):
        told = one_wrong(Random(sample.id), sample.scene.items)
        caption = "\n".join(f"- {item.colour} {item.kind} {item.place}" for item in told)
        assert perception_error(caption, sample.scene).count == 1


def test_parts_are_written_as_the_discriminator_reads_them():
    sample = next(s for s in WORLD.samples("base", 40) if judged(s)[0].startswith("<caption>"))
    prompt = judged_problem(sample).encoded(ENCODER)
    caption = judged(sample)[0].removeprefix("<caption>")
    text = f"<caption>\n{caption}\n</caption>\n<think>\na\n</think>\n<answer>1</answer>"
    ((perception, _),) = TextBranches(ENCODER, ScoreLimits()).cut([text], ["it"])
    asked = ENCODER.encode(sample.question.text, judged_problem(sample).images)
    assert prompt.input_ids == [*asked.input_ids, *perception.token_ids]


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.5, 20), (0.7, 28), (1.0, 40)])
def test_their_share_is_as_set(share, number):
    problems = ShapesProblems(WORLD, "base", 40, share).take(range(40))
    assert sum(problem.prefix is not None for problem in problems) == number


def test_the_shipped_base_knows_the_tokenizer():
    """The vocabulary is learnt from these texts in this order: a change would give the base's rows other meanings."""
    vocabulary = json.dumps(sorted(train_tokenizer().get_vocab().items()))
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "871ebb85eb08c664"
