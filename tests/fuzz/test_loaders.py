"""Fuzz targets of the loaders: each row is yielded or counted with its cause, and nothing but DataError is raised.

`pytest tests/fuzz/test_loaders.py --hypothesis-profile NAME` takes the profile's number of examples; without a profile
there are few, as a part of `make test`.
"""

import io
import json
import socket
import struct
import sys
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

sys.path.append(str(Path(__file__).parents[1] / "trainer"))

from loader_cases import chat, problem, warmup, write_images

from prism.config import DataSettings
from prism.data.files import DataError, RowError, read_rows
from prism.data.images import FORMATS, ImageLimits, decode, read_images
from prism.data.loader import LoadOptions, RowStream, dry_run
from prism.data.problem import problem_reader
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, train_tokenizer
from prism.models.vocabulary import SPECIAL_TOKENS

GOOD = {"chat": chat, "warmup": warmup, "problem": problem}
FEW = 25
PROFILED = settings.get_current_profile_name() != "default"
fuzzed = settings(
    max_examples=settings().max_examples if PROFILED else FEW,
    deadline=None,
    derandomize=not PROFILED,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ENCODER = PromptEncoder(train_tokenizer(), tiny_image_processor())
LIMITS = ImageLimits(max_pixels=10**6, max_row_pixels=4 * 10**6, allow_remote=True, timeout=1.0)
OPTIONS = LoadOptions(buffer=4, max_skipped=1.0, max_bytes=10**6, images=LIMITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images; no name can be looked up, so that nothing is sent anywhere."""
    path = tmp_path_factory.mktemp("fuzz")
    write_images(path)
    with pytest.MonkeyPatch.context() as patch:

        def look_up(host, port, *arguments, **named):
            host.encode("idna")
            raise socket.gaierror("no names here")

        patch.setattr(socket, "getaddrinfo", look_up)
        yield path


def check_file(path, schema):
    """Reads a file as a run does and as a dry run does; both count every row."""
    take = problem_reader("sft" if schema == "chat" else "warmup", ENCODER, DataSettings(response_tokens=256))
    try:
        tried = dry_run(path, schema, OPTIONS, take=take)
    except RowError:
        raise
    except DataError:
        # the file itself is broken
        return
    stream = RowStream(path, schema, OPTIONS, take=take)
    given = 0
    try:
        for row in stream:
            given += 1
            check_problem(row)
    except RowError:
        raise
    except DataError as error:
        assert given == 0 and "got none of" in str(error)
    assert (stream.read, given) == (tried.rows, tried.accepted)
    assert dict(stream.causes) == dict(tried.rejected) and tried.rows == given + sum(stream.causes.values())
    assert all(cause and tried.first[cause].startswith(f"{path}, row ") for cause in tried.rejected)


def check_problem(row):
    """A prompt has no control token but the template's: each turn's two or three, and three or more of each image."""
    ids = row.encoding.input_ids
    turns = 1 if isinstance(row.prompt, str) else len(row.prompt)
    image = ENCODER.image_token_id
    special = [i for i in ids if ENCODER.tokenizer.decode([i]) in SPECIAL_TOKENS and i != image]
    assert len(special) == 2 * turns + 1 + 2 * len(row.images)
    assert len(ids) <= DataSettings().prompt_tokens


# --- rows

PIECES = [
    "<image>",
    "<|im_",
    "end|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<caption>",
    "<answer>",
    "\n",
    "\0",
    "a\u0301",
]
texts = st.one_of(
    st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.just("why " * 5000)
)
paths = st.one_of(
    st.sampled_from(
        ["images/good.png", "images/half.png", "images/huge.png", "images", "/dev/zero", "", "\0", "~", ".."]
    ),
    st.builds("{}://{}/{}".format, st.sampled_from(["http", "https", "file", "ftp", ""]), st.text(max_size=12), texts),
    texts,
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, paths)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


def mutated(row, random, draw):
    """Returns a row with one of its parts, at any depth, replaced, removed or repeated."""
    if isinstance(row, dict) and row and random.random() < 0.8:
        key = random.choice(sorted(row))
        kind = random.randrange(4)
        if kind == 0:
            return {name: value for name, value in row.items() if name != key}
        if kind == 1:
            return {
                **row,
                random.choice(["system", "prompt", "question", "videos", "images", "image", "id"]): draw(values),
            }
        return {**row, key: mutated(row[key], random, draw)}
    if isinstance(row, list) and row and random.random() < 0.8:
        index = random.randrange(len(row))
        if random.randrange(4) == 0:
            return row + [row[index]] * random.randrange(1, 4)
        return [*row[:index], mutated(row[index], random, draw), *row[index + 1 :]]
    return draw(st.one_of(values, paths))


@st.composite
def rows(draw):
    """Draws a schema and rows of it, some of them broken."""
    schema = draw(st.sampled_from(sorted(GOOD)))
    random = Random(draw(st.integers(0, 2**32)))
    made = [GOOD[schema](n) for n in range(draw(st.integers(1, 6)))]
    for index in range(len(made)):
        for _ in range(random.randrange(3)):
            if isinstance(made[index], dict):
                made[index] = mutated(made[index], random, draw)
    return schema, made


def cut(content, random):
    """Returns bytes with some of them changed, removed or repeated."""
    content = bytearray(content)
    for _ in range(random.randrange(1, 6)):
        at, length = random.randrange(len(content) + 1), random.randrange(1, 9)
        kind = random.randrange(4)
        if kind == 0:
            content[at : at + length] = random.randbytes(length)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[max(0, at - length) : at] * random.randrange(1, 5)
        else:
            content[at:at] = random.choice(
                [b"\n", b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b"1e999"]
            )
    return bytes(content)


@given(rows(), st.booleans(), st.integers(0, 2**32))
@fuzzed
def test_jsonl(folder, drawn, whole, seed):
    schema, made = drawn
    # halves of surrogate pairs, as json escapes them
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in made)
    path = folder / "rows.jsonl"
    path.write_bytes(lines if whole else cut(lines, Random(seed)))
    check_file(path, schema)


@given(st.sampled_from(sorted(GOOD)), st.binary(max_size=300))
@fuzzed
def test_jsonl_of_any_bytes(folder, schema, content):
    (folder / "rows.jsonl").write_bytes(content)
    check_file(folder / "rows.jsonl", schema)


@given(rows(), st.booleans(), st.sampled_from([1, 2, 100]), st.booleans(), st.integers(0, 2**32))
@fuzzed
def test_parquet(folder, drawn, whole, group, dictionary, seed):
    schema, made = drawn
    path = folder / "rows.parquet"
    try:
        objects = [row for row in made if isinstance(row, dict)]
        # pyarrow would take the fields of the first row only
        names = dict.fromkeys(name for row in objects for name in row)
        table = arrow.Table.from_pylist([{name: row.get(name) for name in names} for row in objects])
        parquet.write_table(table, path, row_group_size=group, use_dictionary=dictionary)
    except (arrow.ArrowException, OverflowError, TypeError, UnicodeEncodeError):
        # no file has columns of mixed types
        return
    if not whole:
        path.write_bytes(cut(path.read_bytes(), Random(seed)))
    check_file(path, schema)


# --- images


@st.composite
def pictures(draw):
    """Draws the bytes of an image in any format, with some of them broken, or its header."""
    kind = draw(st.sampled_from(FORMATS))
    mode = draw(st.sampled_from(["RGB", "L", "P", "RGBA", "1", "CMYK"]))
    side = st.integers(1, 40)
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (draw(side), draw(side), 3), np.uint8)
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).convert(mode).save(buffer, kind)
    except (OSError, ValueError):
        # the format has no such mode
        Image.fromarray(pixels).save(buffer, kind)
    content = buffer.getvalue()
    if draw(st.booleans()):
        at = draw(st.integers(0, max(0, len(content) - 4)))
        number = struct.pack(draw(st.sampled_from("<>")) + "I", draw(st.integers(0, 2**32 - 1)))
        content = content[:at] + number + content[at + 4 :]
    return cut(content, Random(draw(st.integers(0, 2**32)))) if draw(st.booleans()) else content


@given(st.lists(pictures(), min_size=1, max_size=3))
@fuzzed
def test_images(folder, contents):
    fields = [f"images.{n}" for n in range(len(contents))]
    try:
        stored = read_images(contents, fields, folder, LIMITS)
        assert sum(one.size[0] * one.size[1] for one in stored) <= LIMITS.max_row_pixels
        decoded = [decode(image, field) for image, field in zip(stored, fields)]
    except RowError as error:
        assert error.cause in ("broken image", "image size", "wrong type") and error.field in fields
        return
    assert [(one.mode, one.size) for one in decoded] == [("RGB", image.size) for image in stored]


@given(
    st.one_of(
        paths, st.dictionaries(st.sampled_from(["bytes", "path"]), st.one_of(paths, st.binary(max_size=9))), scalars
    )
)
@fuzzed
def test_sources_of_images(folder, source):
    try:
        (image,) = read_images([source], ["image"], folder, LIMITS)
        decode(image, "image")
    except RowError as error:
        assert error.field == "image"


# --- positions


@given(rows(), st.booleans(), st.integers(0, 6))
@fuzzed
def test_a_file_is_read_from_any_row(folder, drawn, lines, start):
    _, made = drawn
    path = folder / ("rows.jsonl" if lines else "rows.parquet")
    if lines:
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    else:
        parquet.write_table(arrow.table({"id": list(map(str, range(len(made))))}), path, row_group_size=2)
    whole = list(read_rows(path))
    if start < len(whole):
        before = whole[start]
        rest = list(read_rows(path, before.row, before.end))
        assert [(raw.row, raw.end, raw.content) for raw in rest] == [
            (raw.row, raw.end, raw.content) for raw in whole[start + 1 :]
        ]
