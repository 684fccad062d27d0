"""Questions to the base whether a description or an answer is right: who describes well can also judge.

A discriminator that is upcycled from a model which never compared a text with an image has that to learn first.
"""

from random import Random

from prism.data.questions import infer
from prism.data.scenes import COLOURS, GRID, KINDS, Item, Scene, pick
from prism.data.sections import Sections
from prism.data.shapes import Sample
from prism.data.teachers import TEACHERS, write, wrong_answer

ASKED = "Is this right?"
VERDICTS = {True: "yes", False: "no"}


def judged(sample: Sample) -> tuple[str, str]:
    """Returns a part of a response to a sample, in any teacher's style, and whether it is right, as the base says it.

    The part is a caption, of which half have one item wrong, or the thinking with the answer, of which half end wrong.
    """
    rng = Random(f"judged/{sample.id}")
    scene, question, style = sample.scene, sample.question, pick(rng, TEACHERS)
    right = rng.random() < 0.5
    known = infer(question, scene.items)
    if rng.random() < 0.5:
        items = scene.items if right else one_wrong(rng, scene)
        written = write(style, rng, items, question, min(known))
        return f"<caption>\n{written.caption}\n</caption>", VERDICTS[right]
    answer = min(known) if right else wrong_answer(rng, question, known)
    return _reasoning(write(style, rng, scene.items, question, answer)), VERDICTS[right]


def one_wrong(rng: Random, scene: Scene) -> tuple[Item, ...]:
    """Returns a scene's items but for one, which has another colour, kind or place, or is left out if not alone."""
    items = list(scene.items)
    place = int(rng.random() * len(items))
    item = items.pop(place)
    how = pick(rng, ("colour", "kind", "place", "missing") if items else ("colour", "kind", "place"))
    taken = {other.cell for other in scene.items}
    if how == "colour":
        items.append(Item(item.cell, pick(rng, [c for c in COLOURS if c != item.colour]), item.kind))
    elif how == "kind":
        items.append(Item(item.cell, item.colour, pick(rng, [k for k in KINDS if k != item.kind])))
    elif how == "place":
        free = [cell for cell in range(GRID * GRID) if cell not in taken]
        items.append(Item(pick(rng, free), item.colour, item.kind))
    return tuple(sorted(items))


def _reasoning(sections: Sections) -> str:
    return f"<think>\n{sections.think}\n</think>\n<answer>{sections.answer}</answer>"
