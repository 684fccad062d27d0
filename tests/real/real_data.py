"""Data files of multiple-choice questions about coloured discs, with images of mixed sizes, formats and modes."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
from PIL import Image, ImageDraw
from pyarrow import parquet

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60), "yellow": (230, 210, 40)}
PLACES = ("left", "right")
LETTERS = "ABCD"
# width, height, mode and format of the images: below the processor's least size, above the cap, and odd ones
PICTURES = (
    (30, 40, "RGB", "PNG"),
    (1600, 1200, "RGB", "JPEG"),
    (640, 480, "RGBA", "PNG"),
    (97, 311, "P", "PNG"),
    (256, 256, "L", "JPEG"),
    (1200, 150, "LA", "PNG"),
    (333, 777, "RGB", "JPEG"),
    (1024, 1024, "P", "PNG"),
)


class Example(NamedTuple):
    """A question about pictures, and a teacher's and a careless student's response to it."""

    question: str
    letter: str
    teacher: str
    student: str
    colours: tuple[str, ...]
    places: tuple[str, ...]


def respond(items: list[tuple[str, str]], letter: str, *, compact: bool) -> str:
    """Returns a response; without spaces between text and tags if `compact`."""
    items_text = "\n".join(f"- a {colour} disc ({place})" for colour, place in items)
    thought = f"1. The disc is {items[0][0]}.\n2. So it is ({letter})"
    if compact:
        return f"<caption>{items_text}</caption><think>{thought}</think><answer>{letter}</answer>"
    return f"<caption>\n{items_text}\n</caption>\n<think>\n{thought}\n</think>\n<answer>{letter}</answer>"


def example(rng: random.Random, pictures: int = 1) -> Example:
    """Returns a question about a number of pictures; 0: about a disc that the text describes."""
    count = max(pictures, 1)
    options = rng.sample(list(COLOURS), len(COLOURS))
    colours = [rng.choice(options) for _ in range(count)]
    places = [rng.choice(PLACES) for _ in range(count)]
    about = "in the first picture" if pictures else f"that is {colours[0]} and {places[0]}"
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options))
    question = f"Which colour has the disc {about}?\n{listed}"
    right = options.index(colours[0])
    wrong = rng.choice([other for other in range(len(options)) if other != right])
    seen = list(zip(colours, places))
    missed = [(options[wrong], places[0]), *seen[1:]]
    compact = rng.random() < 0.5
    return Example(
        question,
        LETTERS[right],
        respond(seen, LETTERS[right], compact=compact),
        respond(missed, LETTERS[wrong], compact=compact),
        tuple(colours),
        tuple(places),
    )


def conversation(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its right response, without pictures."""
    one = example(rng, rng.choice((0, 1, 1, 2)))
    return one.question, one.teacher


def picture(colour: str, place: str, kind: int) -> tuple[bytes, str]:
    """Returns an image file, and the ending of its name."""
    width, height, mode, form = PICTURES[kind % len(PICTURES)]
    image = Image.new("RGB", (width, height), (250, 250, 250))
    radius, x = min(width, height) // 4, width // 4 if place == "left" else 3 * width // 4
    box = [x - radius, height // 2 - radius, x + radius, height // 2 + radius]
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[colour])
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return buffer.getvalue(), form.lower()


class Writer:
    """Writes the rows of data files into a folder, with their images.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, 0
        (folder / "images").mkdir(parents=True)

    def pictures(self, one: Example, count: int, *, inside: bool) -> list[Any]:
        """Returns the images of a row: their bytes if `inside` the file, else their paths."""
        sources: list[Any] = []
        for colour, place in list(zip(one.colours, one.places))[:count]:
            content, ending = picture(colour, place, self.images)
            name = f"images/{self.images:03d}.{ending}"
            self.images += 1
            if inside:
                sources.append({"bytes": content, "path": None})
            else:
                (self.folder / name).write_bytes(content)
                sources.append(name)
        return sources

    def write(self, name: str, rows: Iterator[dict[str, Any]]) -> Path:
        """Writes a file of rows, as JSONL or parquet by its name."""
        path = self.folder / name
        if path.suffix == ".parquet":
            parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def _counts(rows: int) -> list[int]:
    """Returns the number of pictures of each row: mostly one, in turns two or none."""
    return [(1, 2, 1, 0)[row % 4] for row in range(rows)]


def write_data(folder: Path) -> dict[str, Path]:
    """Writes the files of all stages and splits, and returns their paths by the name under data.files."""
    rng, writer = random.Random(2), Writer(folder)
    system = {"role": "system", "content": "You answer with one letter."}

    def chats() -> Iterator[dict[str, Any]]:
        for row, count in enumerate(_counts(40)):
            one = example(rng, count)
            turns = [
                {"role": "user", "content": "<image>" * count + one.question},
                {"role": "assistant", "content": one.teacher},
            ]
            if row == 3:
                # longer than data.prompt_tokens: skipped and counted
                turns[0]["content"] += " Look closely." * 400
            lead = [system] if row % 5 == 0 else []
            yield {"messages": [*lead, *turns], "images": writer.pictures(one, count, inside=False)}

    def pairs() -> Iterator[dict[str, Any]]:
        for row, count in enumerate(_counts(24)):
            one = example(rng, count)
            responses = {"teacher_response": one.teacher, "student_response": one.student}
            yield {
                "id": str(row),
                "images": writer.pictures(one, count, inside=False),
                "question": one.question,
                **responses,
            }

    def problems(name: str, rows: int) -> Iterator[dict[str, Any]]:
        for row, count in enumerate(_counts(rows)):
            one = example(rng, count)
            lead = [system] if row % 5 == 0 else []
            yield {
                "data_source": f"discs/{count}",
                "prompt": [*lead, {"role": "user", "content": "<image>" * count + one.question}],
                "images": writer.pictures(one, count, inside=name.endswith(".parquet")),
                "teacher_response": one.teacher,
                "reward_model": {"ground_truth": one.letter, "style": "rule"},
            }

    files = {"sft": writer.write("sft.jsonl", chats()), "warmup": writer.write("warmup.jsonl", pairs())}
    for use, name, rows in (
        ("align", "align.parquet", 24),
        ("rlvr", "rlvr.parquet", 24),
        ("validation", "validation.parquet", 8),
        ("test", "test.jsonl", 8),
    ):
        files[use] = writer.write(name, problems(name, rows))
    return files
