"""The exact counters on errors made by hand, of every kind and number, and on texts that cannot be read."""

import dataclasses
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.models.tiny import train_tokenizer
from prism.worlds.shapes.counters import (
    PerceptionError,
    UnreadableError,
    judge,
    perception_error,
    read_answer,
    read_caption,
    reasoning_error,
)
from prism.worlds.shapes.questions import Question, ask, infer
from prism.worlds.shapes.scenes import COLOURS, KINDS, PLACES, Item, Scene, random_scene
from prism.worlds.shapes.teachers import CONFUSED
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels.grammar import Sections, caption_items, reasoning_steps, split_response
from prism_kernels.segments import TAGS, Reason, find_segments, token_bytes

SCENE = Scene((Item(0, "red", "circle"), Item(4, "blue", "square"), Item(8, "green", "triangle")))
RIGHT = "- red circle northwest\n- blue square, centre\n- green triangle at southeast"


def caption(*lines):
    return "\n".join(f"- {line}" for line in lines)


FIRST, SECOND, THIRD = "red circle northwest", "blue square centre", "green triangle southeast"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((FIRST, SECOND, THIRD), {}),
        ((THIRD, FIRST, SECOND), {}),
        ((FIRST, SECOND), {"missing": 1}),
        ((FIRST,), {"missing": 2}),
        (("white background",), {"missing": 3}),
        (("orange circle northwest", SECOND, THIRD), {"wrong_colour": 1}),
        (("orange circle northwest", "teal square centre", "red triangle southeast"), {"wrong_colour": 3}),
        (("red diamond northwest", SECOND, THIRD), {"wrong_kind": 1}),
        (("blue diamond northwest", SECOND, THIRD), {"wrong_colour": 1, "wrong_kind": 1}),
        (("red circle north", SECOND, THIRD), {"wrong_place": 1}),
        (("red circle north", "blue square west", THIRD), {"wrong_place": 2}),
        ((FIRST, SECOND, THIRD, "red circle east"), {"invented": 1}),
        ((FIRST, FIRST, SECOND, THIRD), {"invented": 1}),
        (("teal circle northwest", FIRST, SECOND, THIRD), {"invented": 1}),
        ((FIRST, "purple square east"), {"missing": 2, "invented": 1}),
        (
            ("orange circle northwest", "blue square south", "red diamond east"),
            {"wrong_colour": 1, "wrong_place": 1, "missing": 1, "invented": 1},
        ),
        # items in the same cell are compared first
        (("blue square northwest", "red circle centre", THIRD), {"wrong_colour": 2, "wrong_kind": 2}),
    ],
)
def test_perception_errors_are_counted(lines, expected):
    error = perception_error(caption(*lines), SCENE)
    assert error == PerceptionError(**expected)
    assert error.count == sum(expected.values()) and error.wrong == bool(expected)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_perception_errors_are_counted_in_any_scene(seed, data):
    """A caption has errors of all kinds at once, each in another item, so that their numbers are known."""
    scene = random_scene(Random(seed))
    faults = [data.draw(st.sampled_from(["none", "colour", "kind", "dropped"])) for _ in scene.items]
    told = []
    for item, fault in zip(scene.items, faults):
        if fault == "colour":
            item = dataclasses.replace(item, colour=CONFUSED[item.colour])
        elif fault == "kind":
            item = dataclasses.replace(item, kind=CONFUSED[item.kind])
        if fault != "dropped":
            told.append(item)
    # invented items go to empty cells, with a colour and kind that no item has
    free = [cell for cell in range(9) if cell not in {item.cell for item in scene.items}]
    taken = {(item.colour, item.kind) for item in scene.items}
    strange = next((c, k) for c in COLOURS for k in KINDS if (c, k) not in taken)
    invented = data.draw(st.integers(0, len(free)))
    told += [Item(cell, *strange) for cell in free[:invented]]
    lines = [f"{item.colour} {item.kind} {item.place}" for item in data.draw(st.permutations(told))]
    error = perception_error(caption(*lines, "white background"), scene)
    assert error == PerceptionError(
        missing=faults.count("dropped"),
        invented=invented,
        wrong_colour=faults.count("colour"),
        wrong_kind=faults.count("kind"),
    )


@pytest.mark.parametrize(
    "line",
    [
        "- red circle northwest",
        "* northwest red circle",
        "• circle northwest, red",
        "1. There is a red circle in the northwest.",
        "2) Northwest: red circle",
        "red circle (northwest)",
        "- A RED CIRCLE, NORTHWEST CORNER",
    ],
)
def test_all_styles_are_read(line):
    assert read_caption(line) == (Item(0, "red", "circle"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "- red circle",
        "- circle northwest",
        "- red northwest",
        "- red blue circle northwest",
        "- red circle northwest south",
        "- red circle and blue square northwest",
        "- crimson circle northwest",
        "- red circles northwest",
        "- two red circle northwest",
        "- not a red circle northwest",
        "- red circle northwest 2",
        "- red circle northwest\n- something else",
        "- redcircle northwest",
        "red circle northwest; blue square centre",
        "- white background red circle northwest",
    ],
)
def test_what_cannot_be_read_is_an_error_of_its_own(text):
    with pytest.raises(UnreadableError):
        read_caption(text)
    error = perception_error(text, SCENE)
    assert error.wrong and error.count == 1 and error.unreadable
    assert (error.missing, error.invented, error.wrong_colour, error.wrong_kind, error.wrong_place) == (0,) * 5
    judged = reasoning_error("1", text, Question("count", ("red", "")))
    assert judged.wrong and judged.unreadable


COUNT = Question("count", ("red", ""))
WHERE = Question("position", ("red", "circle"))
WHAT = Question("colour", ("north",))
MORE = Question("comparison", ("circle", "square"))
SUM = Question("sum", ("circle", "2", "square", "3"))


@pytest.mark.parametrize(
    ("question", "lines", "answer", "wrong"),
    [
        (COUNT, ("red circle north", "red square east"), "2", False),
        (COUNT, ("red circle north", "red square east"), "3", True),
        (COUNT, ("blue circle north",), "0", False),
        (WHERE, ("red circle north",), "north", False),
        (WHERE, ("red circle north",), "The North.", False),
        (WHERE, ("red circle north",), "south", True),
        (WHERE, ("blue circle north",), "none", False),
        (WHERE, ("blue circle north",), "north", True),
        # both answers follow
        (WHERE, ("red circle north", "red circle east"), "east", False),
        (WHERE, ("red circle north", "red circle east"), "west", True),
        (WHAT, ("teal diamond north",), "teal", False),
        (WHAT, ("teal diamond north",), "green", True),
        (MORE, ("red circle north", "red circle east", "red square west"), "circles", False),
        (MORE, ("red circle north", "red circle east", "red square west"), "more circles", False),
        (MORE, ("red circle north", "red circle east", "red square west"), "equal", True),
        (MORE, ("red diamond north",), "equal", False),
        (SUM, ("red circle north", "red square west"), "5", False),
        (SUM, ("red circle north", "red square west"), "05", False),
        (SUM, ("red circle north", "red square west"), "6", True),
    ],
)  # fmt: skip
def test_answers_are_held_against_the_caption(question, lines, answer, wrong):
    judged = reasoning_error(answer, caption(*lines), question)
    assert judged.wrong == wrong and judged.unreadable is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [(COUNT, "two"), (COUNT, ""), (COUNT, "-1"), (COUNT, "2.0"), (COUNT, "1 2"), (COUNT, "20000"), (WHERE, "left"),
     (WHERE, "north or south"), (WHAT, "crimson"), (MORE, "diamonds"), (MORE, "yes"), (SUM, "2+3"), (SUM, "٣")],
)  # fmt: skip
def test_unreadable_answers_are_errors_of_their_own(question, answer):
    with pytest.raises(UnreadableError, match="expected"):
        read_answer(answer, question)
    judged = reasoning_error(answer, caption("red circle north"), question)
    assert judged.wrong and judged.unreadable


def test_a_right_inference_from_a_wrong_caption_is_an_error_of_perception_alone():
    scene = Scene((Item(0, "orange", "circle"), Item(4, "red", "square")))
    seen = caption("red circle northwest", "red square centre")
    think = "1. I see northwest centre.\n2. So 2."
    judged = judge(Sections(seen, think, "2").text, scene, COUNT)
    assert judged.perception == PerceptionError(wrong_colour=1) and not judged.reasoning.wrong and not judged.correct
    # the reverse: a right answer by luck
    judged = judge(Sections(seen, think, "1").text, scene, COUNT)
    assert judged.perception.wrong and judged.reasoning.wrong and judged.correct
    right = caption("orange circle northwest", "red square centre")
    judged = judge(Sections(right, think, "2").text, scene, COUNT)
    assert not judged.perception.wrong and judged.reasoning.wrong and not judged.correct


def test_no_sections_no_judgement():
    for text in ("2", RIGHT, Sections(RIGHT, "1. So 1.", "1").text + " tail"):
        judged = judge(text, SCENE, COUNT)
        assert not judged.valid and not judged.correct
        assert judged.perception.unreadable and judged.reasoning.unreadable and judged.perception.count == 1
    judged = judge(Sections(RIGHT, "1. So one.", "one").text, SCENE, COUNT)
    assert judged.valid and not judged.correct and judged.reasoning.unreadable and not judged.perception.wrong


TOKENIZER = train_tokenizer(vocab_size=280)
TABLE = token_bytes(TOKENIZER)
GOOD = "<caption>a</caption><think>b</think><answer>c</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD + GOOD,
        "x" + GOOD,
        GOOD.replace("a</", "</"),
        GOOD.replace("b<", " \n<"),
        GOOD.replace("<answer>c</answer>", ""),
        GOOD.replace("b<", "<answer>c</answer><"),
        GOOD.replace("<answer>c</answer>", "<answer>c</answer><answer>d</answer>"),
        GOOD.replace("</think><answer>", "</think>and<answer>"),
        "<think>b</think><caption>a</caption><answer>c</answer>",
        "",
    ],
)
def test_sections_are_strict(text):
    assert split_response(GOOD) == Sections("a", "b", "c") == split_response(f"\n {Sections('a', 'b', 'c').text}\n")
    assert split_response(text) is None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*(f"<{end}{tag}>" for tag in TAGS for end in ("", "/")), "a", " ", "\n", "<", "\x0b"]))
)
def test_sections_are_those_of_the_kernels_grammar(pieces):
    """`find_segments` on a policy's tokens accepts the same texts."""
    for text in ("".join(pieces), GOOD[:10] + "".join(pieces) + GOOD[10:]):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        reason = find_segments(ids, [0, len(ids)], TABLE).reason
        assert (split_response(text) is not None) == (int(reason[0]) == Reason.VALID)


@pytest.mark.parametrize(
    ("text", "number"),
    [("- a\n- b", 2), ("* a\n\n* b\n• c", 3), ("1. a\n2) b", 2), ("Intro:\n- a\n  - b", 2), ("a\nb\n\nc", 3), ("", 0)],
)
def test_caption_items(text, number):
    assert caption_items(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1. a\n2. b", 2), ("Step 1: a. b.\nStep 2: c", 2), ("First, a. Then b! So c?", 3), ("It is 2.5 wide. Yes.", 2),
     ("one\ntwo", 2), ("", 0), ("no full stop", 1)],
)  # fmt: skip
def test_reasoning_steps(text, number):
    assert reasoning_steps(text) == number


def test_every_readable_answer_is_one_that_questions_have():
    rng, world = Random(0), ShapesWorld()
    for sample in world.samples("validation", 200):
        question = ask(rng, sample.scene)
        for answer in infer(question, sample.scene.items):
            assert read_answer(answer, question) == answer
    assert len(PLACES) == 9
