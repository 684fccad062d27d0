"""Hostile data files: nothing hangs, ends a run that skips bad rows, or takes memory without bound."""

import gc
import os
import threading
import time

import pyarrow as arrow
import pytest
from loader_cases import RESPONSE, chat, picture, problem, warmup, write_images, write_lines
from PIL import Image
from pyarrow import parquet

from bench.loader_memory import SUFFIXES, measure
from prism.config import load_config
from prism.data.files import DataError, read_rows
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, RowStream, dry_run
from prism.data.problem import problem_reader
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, train_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(train_tokenizer(), tiny_image_processor())


def within(seconds, function):
    """Returns a function's result; a function that hangs fails the test."""
    results = []

    def call():
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no result within {seconds} s"
    result, error = results[0]
    if error is not None:
        raise error
    return result


def rejected(path, schema, **options):
    """Returns the number of usable rows, and of the others by cause, as run and dry run count them."""
    options = LoadOptions(max_skipped=1.0, **options)
    tried = within(5, lambda: dry_run(path, schema, options))
    stream = RowStream(path, schema, options)
    assert len(list(stream)) == tried.accepted and dict(stream.causes) == tried.rejected
    return tried.accepted, tried.rejected


# --- files that are not files


@pytest.mark.parametrize("special", ["fifo", "/dev/zero", "/dev/stdin", "socket"])
def test_a_device_or_fifo_as_an_image_is_a_bad_row(tmp_path, special):
    write_images(tmp_path)
    if special == "fifo":
        os.mkfifo(tmp_path / "fifo")
    elif special == "socket":
        os.mknod(tmp_path / "socket", 0o140600)
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), chat(1, images=[special]), chat(2)])
    assert rejected(path, "chat") == (2, {"image not found": 1})
    # a socket cannot even be opened
    reason = "No such device" if special == "socket" else "expected a regular file, got a"
    assert reason in dry_run(path, "chat").first["image not found"]


def test_a_local_image_has_a_greatest_size(tmp_path):
    write_images(tmp_path)
    (tmp_path / "images/long.png").write_bytes(picture() + bytes(10_000))
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), chat(1, images=["images/long.png"])])
    limits = ImageLimits(max_bytes=5000)
    assert rejected(path, "chat", images=limits) == (1, {"image size": 1})
    assert "at most 5000 bytes" in dry_run(path, "chat", LoadOptions(images=limits)).first["image size"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_data_file_is_a_regular_file(tmp_path, suffix, kind):
    path = tmp_path / "data" / f"rows{suffix}"
    path.parent.mkdir()
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    # a folder of files holds it, too
    for given in (path.parent, path) if kind != "folder" else (path.parent,):
        with pytest.raises(DataError, match=r"rows\.(jsonl|parquet): expected a regular file, got a"):
            within(5, lambda given=given: list(RowStream(given, "chat")))
    # as if it had taken the place of a file after the check
    with pytest.raises(DataError, match="expected a regular file"):
        within(5, lambda: next(read_rows(path)))


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [chat()])
    stream = RowStream(path, "chat")
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: expected a file that can be read.*No such file"):
        next(stream)


# --- text


def test_text_that_no_tokenizer_accepts_is_a_bad_row(tmp_path):
    write_images(tmp_path)
    # half of a surrogate pair as bytes, which json accepts
    line = b'{"messages": [{"role": "user", "content": "a\xed\xa0\x80"}, {"role": "assistant", "content": "b"}]}'
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), line, chat(2)])
    assert rejected(path, "chat") == (2, {"not JSON": 1})


def test_a_long_list_of_bad_turns_is_refused_at_the_first(tmp_path):
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), chat(1, messages=[1] * 200_000), chat(2, note=[1] * 2**21)])
    gc.collect()
    before = time.monotonic()
    assert rejected(path, "chat") == (1, {"wrong type": 1, "too long": 1})
    assert time.monotonic() - before < 5


def test_an_id_is_a_text_or_a_number(tmp_path):
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), chat(id=[1])])
    assert rejected(path, "chat") == (1, {"wrong type": 1})
    path = write_lines(tmp_path / "rows.jsonl", [problem(0), problem(extra_info={"id": {"a": 1}})])
    assert rejected(path, "problem") == (1, {"wrong type": 1})


# --- sizes


@pytest.fixture
def longest_tokenised(encoder, monkeypatch):
    """The lengths of the texts that the tokenizer gets."""
    lengths = []
    call = type(encoder.tokenizer).__call__

    def spy(self, text, *arguments, **named):
        lengths.extend(map(len, [text] if isinstance(text, str) else text))
        return call(self, text, *arguments, **named)

    monkeypatch.setattr(type(encoder.tokenizer), "__call__", spy)
    return lengths


LONG = "why " * 2**20
TOO_LONG = [
    ("chat", "sft", chat(1, messages=[{"role": "user", "content": "<image>" + LONG}, chat()["messages"][1]]), "prompt"),
    ("chat", "sft", chat(1, messages=[chat()["messages"][0], {"role": "assistant", "content": LONG}]), "messages.1"),
    ("problem", "rlvr", problem(1, prompt=[{"role": "user", "content": "<image>" + LONG}]), "prompt"),
    ("problem", "align", problem(1, teacher_response=RESPONSE.replace("So", LONG)), "teacher_response"),
    ("warmup", "warmup", warmup(1, question=LONG), "prompt"),
    ("warmup", "warmup", warmup(1, student_caption=LONG), "student_response"),
]


@pytest.mark.parametrize("schema, use, row, field", TOO_LONG, ids=[f"{c[0]}-{c[3]}" for c in TOO_LONG])
def test_the_length_of_a_text_is_checked_before_it_is_tokenised(
    tmp_path, encoder, longest_tokenised, schema, use, row, field
):
    write_images(tmp_path)
    good = {"chat": chat, "problem": problem, "warmup": warmup}[schema](0)
    path = write_lines(tmp_path / "rows.jsonl", [good, row])
    take = problem_reader(use, encoder, load_config().data)
    tried = dry_run(path, schema, take=take)
    assert (tried.accepted, tried.rejected) == (1, {"too long": 1})
    assert f"row 2: {field}: expected at most data." in tried.first["too long"]
    assert max(longest_tokenised) < 20_000


def test_the_length_of_a_prompt_is_checked_before_its_images_are_cut(tmp_path, encoder, monkeypatch):
    (tmp_path / "large.png").write_bytes(picture(256, 256))
    path = write_lines(tmp_path / "rows.jsonl", [problem(images=["large.png"])])
    config = load_config(None, {"data.prompt_tokens": 60}).data
    calls = []
    real = type(encoder.image_processor).__call__
    monkeypatch.setattr(type(encoder.image_processor), "__call__", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    tried = dry_run(path, "problem", take=problem_reader("rlvr", encoder, config))
    assert tried.rejected == {"too long": 1} and not calls


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"max_images": 2}, "at most 2 images, got 3"),
        ({"max_row_pixels": 2500}, "at most 2500 pixels in the images of a row"),
        ({"max_row_bytes": 8000}, "at most 8000 bytes in the images of a row"),
    ],
)
def test_the_images_of_a_row_are_limited_together(tmp_path, limits, reason):
    write_images(tmp_path)
    rows = [problem(n, images=["images/good.png"] * n, prompt=[{"role": "user", "content": "<image>" * n + "a"}])
            for n in (1, 2, 3)]  # fmt: skip
    path, limits = write_lines(tmp_path / "rows.jsonl", rows), ImageLimits(**limits)
    assert rejected(path, "problem", images=limits) == (2, {"image size": 1})
    assert reason in dry_run(path, "problem", LoadOptions(images=limits)).first["image size"]


def decoded():
    """Returns the number of images in memory."""
    return sum(issubclass(type(one), Image.Image) for one in gc.get_objects())


def test_decoded_images_are_released_once_they_are_encoded(tmp_path, encoder):
    rows = [problem(n, images=["a.png"] * 2, prompt=[{"role": "user", "content": "<image><image>Which?"}])
            for n in range(5)]  # fmt: skip
    (tmp_path / "a.png").write_bytes(picture(64, 48))
    path = write_lines(tmp_path / "rows.jsonl", rows)
    gc.collect()
    before = decoded()
    problems = list(RowStream(path, "problem", take=problem_reader("rlvr", encoder, load_config().data)))
    gc.collect()
    assert len(problems) == 5
    assert decoded() == before
    # they can still be encoded again, as the controls of the discriminator need it
    again = encoder.encode(problems[0].prompt, problems[0].images)
    assert again.input_ids == problems[0].encoding.input_ids
    assert again.pixel_values.equal(problems[0].encoding.pixel_values)


def write_table(path, rows, **options):
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)
    return path


def test_a_parquet_row_has_a_greatest_size(tmp_path):
    write_images(tmp_path)
    long = "x" * 100_000
    rows = [problem(n, teacher_response=RESPONSE.replace("So", long)) if n in (3, 7) else problem(n) for n in range(40)]
    path = write_table(tmp_path / "rows.parquet", rows)
    assert rejected(path, "problem", max_bytes=50_000) == (38, {"too long": 2})
    first = dry_run(path, "problem", LoadOptions(max_bytes=50_000)).first["too long"]
    assert f"{path}, row 4: expected a row of at most 50000 bytes, got 100" in first


def test_row_groups_of_rows_that_are_too_long_are_not_read(tmp_path, monkeypatch):
    write_images(tmp_path)
    rows = [problem(n, teacher_response=RESPONSE.replace("So", f"{n}" * 100_000)) if 4 <= n < 8 else problem(n)
            for n in range(12)]  # fmt: skip
    path = write_table(tmp_path / "rows.parquet", rows, row_group_size=2)
    groups = []
    real = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda self, **k: (groups.extend(k["row_groups"]), real(self, **k))[1]
    )
    options = LoadOptions(max_bytes=50_000, buffer=0, max_skipped=1.0)
    stream = RowStream(path, "problem", options)
    assert [row.id for row in stream] == [f"p{n}" for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert stream.causes == {"too long": 4} and groups == [0, 1, 4, 5]
    # a stream resumes inside and after them
    whole = [raw.row for raw in read_rows(path, max_bytes=50_000)]
    assert whole == list(range(1, 13))
    for start in range(13):
        assert [raw.row for raw in read_rows(path, start, start, max_bytes=50_000)] == list(range(start + 1, 13))


def test_a_value_that_a_dictionary_repeats_does_not_fill_the_memory(tmp_path):
    """A file of a kilobyte stands for rows of gigabytes: 300 rows of 4 MB each."""
    text = arrow.DictionaryArray.from_arrays(arrow.array([0] * 300, arrow.int32()), arrow.array(["a" * 4_000_000]))
    role = arrow.array(["user"] * 300)
    turns = arrow.StructArray.from_arrays([role, text], ["role", "content"])
    messages = arrow.ListArray.from_arrays(arrow.array(range(301), arrow.int32()), turns)
    for name, stored in (("stored", True), ("plain", False)):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(arrow.table({"messages": messages}), path, compression="zstd", store_schema=stored)
        assert path.stat().st_size < 4000
        before, most = arrow.total_allocated_bytes(), 0
        causes = set()
        for raw in read_rows(path, max_bytes=1_000_000):
            most = max(most, arrow.total_allocated_bytes() - before)
            causes.add(raw.content.cause)
        assert causes == {"too long"} and raw.row == 300
        assert most < 300 * 2**20


def test_only_the_columns_of_the_schema_are_read(tmp_path):
    write_images(tmp_path)
    path = write_table(tmp_path / "rows.parquet", [problem(n, note="x" * 100_000) for n in range(3)])
    assert rejected(path, "problem", max_bytes=50_000) == (3, {})


def test_broken_text_in_parquet_is_a_bad_row(tmp_path):
    write_images(tmp_path)
    rows = [chat(n) for n in range(3)]
    table = arrow.Table.from_pylist(rows)
    names = arrow.Array.from_buffers(
        arrow.string(), 3, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), arrow.py_buffer(b"a\xffb")]
    )
    parquet.write_table(table.set_column(0, "id", names), tmp_path / "rows.parquet")
    assert rejected(tmp_path / "rows.parquet", "chat") == (2, {"broken text": 1})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_that_are_shuffled_together_are_limited_in_bytes(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("prism.data.loader.BLOCK_BYTES", 40_000)
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": "a" * 9000}, {"role": "assistant", "content": "b"}]}
        for n in range(30)
    ]
    path = tmp_path / f"rows{suffix}"
    write_lines(path, rows) if suffix == ".jsonl" else write_table(path, rows)
    options = LoadOptions(buffer=100, epochs=2)
    stream = RowStream(path, "chat", options)
    names, sizes, states = [], [], [stream.state_dict()]
    for row in stream:
        names.append(row.id)
        sizes.append(len(stream._block))
        states.append(stream.state_dict())
    assert sorted(names[:30], key=int) == [str(n) for n in range(30)] and max(sizes) == 5
    for given, state in enumerate(states[::7]):
        resumed = RowStream(path, "chat", options)
        resumed.load_state_dict(state)
        assert [row.id for row in resumed] == names[7 * given :]


# --- memory


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_stays_flat_over_a_hundred_thousand_rows(tmp_path, suffix):
    """bench/loader_memory.py measures a million; rows that stayed in memory would take 55 MiB here."""
    # of a parquet file, one row group has 10,000 rows
    few, many = (measure(tmp_path, suffix, count, images=False) for count in (10_000, 100_000))
    assert many["rows"] == 100_000
    assert many["peak"] - few["peak"] < 16 * 2**20
