"""The shapes world: the same on every machine, images that show their scenes, teachers that err at their rates."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields
from math import sqrt
from random import Random

import numpy as np
import pytest

from prism.models.tiny import train_tokenizer
from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.counters import judge
from prism.worlds.shapes.questions import EQUAL, NONE, QUESTION_KINDS, Question, ask, infer
from prism.worlds.shapes.scenes import CELL, COLOURS, GRID, KINDS, SIDE, Item, Scene, draw, random_scene
from prism.worlds.shapes.world import SPLITS, ShapesWorld, split_of
from prism_kernels.grammar import caption_items, reasoning_steps, split_response

WORLD = ShapesWorld()
# fingerprint of the first 64 samples of every split; if it changes, everyone's data have changed
GOLDEN = "264bcb77d98d191c"


def fingerprint(world):
    digest = hashlib.blake2b()
    for split in SPLITS:
        for sample in world.samples(split, 64):
            texts = (sample.id, sample.scene.key, sample.question.text, sample.answer, sample.response.text)
            digest.update("\n".join(texts).encode())
            digest.update(sample.image.tobytes())
    return digest.hexdigest()[:16]


def scenes_of(count, seed=0):
    rng = Random(seed)
    return [random_scene(rng) for _ in range(count)]


def test_world_is_the_same_everywhere():
    assert fingerprint(WORLD) == GOLDEN
    assert fingerprint(ShapesWorld(seed=1)) != GOLDEN


def test_samples_are_the_same_however_they_are_reached():
    whole = list(WORLD.samples("sft", 600))
    part = list(WORLD.samples("sft", 30, start=250))
    for a, b in zip(whole[250:280], part, strict=True):
        assert (a.id, a.scene, a.question, a.answer, a.response) == (b.id, b.scene, b.question, b.answer, b.response)
        assert np.array_equal(a.image, b.image)
    assert len({sample.id for sample in whole}) == 600


def test_samples_are_immutable():
    sample = next(WORLD.samples("test", 1))
    with pytest.raises(FrozenInstanceError):
        sample.answer = "7"
    with pytest.raises(ValueError, match="read-only"):
        sample.image[0, 0, 0] = 1


def test_default_sizes():
    assert sum(1 for _ in WORLD.samples("alignment")) == 2048
    with pytest.raises(ValueError, match="expected split to be one of 'base', 'sft'"):
        next(WORLD.samples("train"))


def test_splits_share_no_scene_whatever_the_seeds():
    seen = {split: {s.scene.key for seed in (0, 1) for s in ShapesWorld(seed).samples(split, 700)} for split in SPLITS}
    for split, keys in seen.items():
        for other, others in seen.items():
            assert split == other or not keys & others
    assert all(split_of(s.scene) == "rl" for s in WORLD.samples("rl", 50))


def test_scenes_lie_in_the_splits_by_their_shares():
    number = Counter(split_of(scene) for scene in scenes_of(4000))
    for split, (share, _, _) in SPLITS.items():
        p = share / 100
        # the hash decides in steps of 1 / 256
        assert abs(number[split] / 4000 - p) < 4 * sqrt(p * (1 - p) / 4000) + 1 / 256
    assert sum(share for share, _, _ in SPLITS.values()) == 100


def test_images_show_their_scenes():
    """The colour at the middle of a cell and the widths of its rows identify every item."""
    scenes = scenes_of(600)
    for scene, image in zip(scenes, draw(scenes)):
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        found = []
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            patch = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].astype(int)
            middle = patch[CELL // 2, CELL // 2]
            colour = next((name for name, value in COLOURS.items() if (middle == value).all()), None)
            if colour is None:
                assert (patch == 245).all()
                continue
            painted = (patch == middle).all(-1)
            widths = painted.sum(1)[painted.any(1)]
            height, widest = len(widths), widths.max()
            assert 12 <= height <= 27
            if widths[0] >= 0.9 * widest and widths[-1] >= 0.9 * widest:
                kind = "square"
            elif widths[-1] >= 0.8 * widest:
                kind = "triangle"
            else:
                kind = "circle" if painted.sum() > 0.65 * height * widest else "diamond"
            found.append(Item(cell, colour, kind))
        assert tuple(found) == scene.items


def test_same_scene_same_image_other_scenes_other_looks():
    one = Scene((Item(4, "red", "circle"),))
    assert np.array_equal(draw([one])[0], draw([*scenes_of(3), one])[-1])
    sizes = {int((draw([Scene((Item(c, "red", "circle"),))])[0] == COLOURS["red"]).all(-1).sum()) for c in range(9)}
    assert len(sizes) > 2


def test_drawing_has_no_loop_over_pixels_or_shapes():
    """Drawing takes a few Python and numpy calls per image: one call writes the pixels of all images."""
    scenes = scenes_of(512)
    # the tiles are made once
    draw(scenes[:1])
    events = Counter()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        images = draw(scenes)
    finally:
        sys.setprofile(None)
    assert images.shape == (512, SIDE, SIDE, 3)
    assert (events["call"] + events["c_call"]) / 512 < 40


@pytest.mark.parametrize(
    ("kind", "arguments", "text", "right"),
    [
        ("count", ("", ""), "How many shapes are there?", "4"),
        ("count", ("red", ""), "How many red shapes are there?", "2"),
        ("count", ("", "circle"), "How many circles are there?", "2"),
        ("count", ("red", "circle"), "How many red circles are there?", "1"),
        ("count", ("teal", "diamond"), "How many teal diamonds are there?", "0"),
        ("colour", ("north",), "What colour is the shape in the north?", "red"),
        ("colour", ("triangle",), "What colour is the triangle?", "blue"),
        ("colour", ("centre",), "What colour is the shape in the centre?", NONE),
        ("position", ("red", "circle"), "Where is the red circle?", "north"),
        ("position", ("green", "circle"), "Where is the green circle?", NONE),
        ("comparison", ("square", "circle"), "Are there more squares or circles?", "circles"),
        ("comparison", ("square", "triangle"), "Are there more squares or triangles?", EQUAL),
        ("comparison", ("red", "blue"), "Are there more red or blue shapes?", EQUAL),
        ("comparison", ("red", "purple"), "Are there more red or purple shapes?", "red"),
        ("sum", ("circle", "3", "square", "2"), "If a circle is worth 3 and a square 2, what is the sum?", "8"),
        ("sum", ("diamond", "3", "square", "2"), "If a diamond is worth 3 and a square 2, what is the sum?", "2"),
    ],
)
def test_questions_and_their_answers(kind, arguments, text, right):
    items = (
        Item(1, "red", "circle"),
        Item(2, "red", "square"),
        Item(5, "blue", "triangle"),
        Item(8, "blue", "circle"),
    )
    question = Question(kind, arguments)
    assert question.text == text
    assert infer(question, items) == {right}


def test_questions_have_one_answer_and_texts_of_their_own():
    rng, kinds, texts = Random(3), Counter(), {}
    for scene in scenes_of(1500, seed=2):
        question = ask(rng, scene)
        assert texts.setdefault(question.text, question) == question
        assert len(infer(question, scene.items)) == 1
        assert NONE not in infer(question, scene.items)
        kinds[question.kind] += 1
    assert set(kinds) == set(QUESTION_KINDS) and min(kinds.values()) > 200


def test_careful_teachers_make_no_error_and_vary():
    for split in ("base", "alignment"):
        for sample in WORLD.samples(split, 400):
            judged = judge(sample.response.sections.text, sample.scene, sample.question)
            assert judged.valid and judged.correct and not judged.perception.wrong and not judged.reasoning.wrong
            # the base does not know the tags, which SFT teaches
            assert (split_response(sample.response.text) is None) == (split == "base")
    sample = next(WORLD.samples("alignment", 1))
    assert len({WORLD.respond("curated", sample, draw=i).text for i in range(40)}) >= 10
    assert WORLD.respond("curated", sample) == sample.response
    with pytest.raises(ValueError, match="expected teacher to be one of 'base', 'public', 'curated', got 'best'"):
        WORLD.respond("best", sample)


def within(number, of, rate):
    """Whether a count lies within four standard deviations of a binomial."""
    return abs(number - of * rate) <= 4 * sqrt(of * rate * (1 - rate))


def test_careless_teacher_errs_as_often_as_it_is_said_to():
    """The counters find exactly the errors that were put in, each kind at its rate, independent of reasoning."""
    rates, n = WORLD.carelessness, 5000
    assert (rates.colour, rates.dropped, rates.reasoning, rates.careful_style) == (0.80, 0.80, 0.20, 0.50)
    mistakes, of, both, reasoning, careful = Counter(), Counter(), 0, 0, 0
    for sample in WORLD.samples("sft", n):
        response, items = sample.response, sample.scene.items
        judged = judge(response.text, sample.scene, sample.question)
        error, mistake = judged.perception, response.perception_error
        purple = sum(item.colour == "purple" for item in items)
        told = {
            "colour": (error.wrong_colour, purple),
            "dropped": (error.missing, 1),
            "invented": (error.invented, 1),
            "kind": (error.wrong_kind, 1),
            "place": (error.wrong_place, 1),
        }
        assert judged.valid and error.unreadable is None and judged.reasoning.unreadable is None
        assert all(found == (kind == mistake) * wanted for kind, (found, wanted) in told.items())
        assert judged.reasoning.wrong == response.reasoning_error
        mistakes[mistake] += 1
        # a response has at most one mistake: each is drawn only if the ones before it were not made
        of["colour"] += purple > 0
        of["dropped"] += len(items) == 5 and mistake != "colour"
        of["slips"] += mistake not in ("colour", "dropped")
        reasoning += response.reasoning_error
        both += response.reasoning_error and error.wrong
        careful += response.style == "curated"
    assert within(reasoning, n, 0.20)
    assert within(both, n - mistakes[None], 0.20)
    assert within(careful, n, 0.50)
    for kind in ("colour", "dropped"):
        assert within(mistakes[kind], of[kind], getattr(rates, kind))
    for kind in ("invented", "kind", "place"):
        assert within(mistakes[kind], of["slips"], getattr(rates, kind))
    # so often that a student of it always errs there
    assert 0.45 < 1 - mistakes[None] / n < 0.60


@pytest.mark.parametrize(("name", "rate"), [("colour", 1.2), ("reasoning", -0.1), ("invented", 0.98)])
def test_impossible_rates_are_refused(name, rate):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        Carelessness(**{name: rate})


def test_rates_can_be_set():
    world = ShapesWorld(carelessness=Carelessness(**{field.name: 0 for field in fields(Carelessness)}))
    for sample in world.samples("sft", 100):
        assert judge(sample.response.text, sample.scene, sample.question).correct
        assert sample.response.style == "public"


def test_styles_drift_in_both_channels():
    """The careless teacher's style differs from the curated one in the numbers of caption items and of steps."""

    def means(split):
        sections = [sample.response.sections for sample in WORLD.samples(split, 400)]
        items = np.mean([caption_items(s.caption) for s in sections])
        return items, np.mean([reasoning_steps(s.think) for s in sections])

    (items, steps), (careless_items, careless_steps) = means("alignment"), means("sft")
    assert careless_items - items > 0.1 and steps - careless_steps > 0.3


def test_responses_are_short():
    texts = [s.response.sections.text for split in ("base", "sft", "alignment") for s in WORLD.samples(split, 300)]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    lengths = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    assert lengths.min() >= 26 and lengths.mean() < 52
    assert (lengths <= 62).mean() > 0.85 and lengths.max() <= 90
    assert all(split_response(tokenizer.decode(tokenizer(text)["input_ids"])) for text in texts[::50])


def test_data_is_imported_without_torch():
    code = (
        "import sys; import prism.worlds.shapes.world, prism.data.loader; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kinds_have_partners():
    from prism.worlds.shapes.teachers import CONFUSED

    assert set(CONFUSED) == {*COLOURS, *KINDS} and all(CONFUSED[CONFUSED[part]] == part for part in CONFUSED)
