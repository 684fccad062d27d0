"""Malformed rows and files: each is skipped and counted, or raises an error that names file, row and field."""

import json

import pytest
from loader_cases import RESPONSE, chat, picture, problem, warmup, without, write_images, write_lines

from prism.data.files import DataError
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, RowStream, dry_run

GOOD = {"chat": chat, "warmup": warmup, "problem": problem}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


SAY, REPLY = ("user", "<image>How many?"), ("assistant", RESPONSE)

# schema, row, cause, field, part of the reason
ROWS = [
    ("chat", b'{"messages": [', "not JSON", "", "expected a JSON object"),
    ("chat", b"\xff\xfe\x00", "not JSON", "", "expected a JSON object"),
    ("chat", b"[1, 2]", "not JSON", "", "got list"),
    ("chat", b"[" * 5000, "not JSON", "", "expected a JSON object"),
    ("chat", without(chat(), "messages"), "missing field", "messages", "it is not there"),
    ("chat", chat(messages=None), "missing field", "messages", "it is not there"),
    ("chat", chat(messages="How many?"), "wrong type", "messages", "got 'How many?'"),
    ("chat", chat(messages=[]), "empty text", "", "at least one message"),
    ("chat", chat(messages=[{"role": "user"}]), "missing field", "messages.0.content", "it is not there"),
    ("chat", chat(messages=turns(SAY, ("tool", "x"))), "unknown role", "messages.1.role", "got 'tool'"),
    ("chat", chat(messages=turns(SAY, ("assistant", "  "))), "empty text", "messages.1.content", "not empty"),
    ("chat", chat(messages=turns(SAY, ("assistant", None))), "wrong type", "messages.1.content", "got None"),
    ("chat", chat(messages=turns(SAY, ("assistant", 7))), "wrong type", "messages.1.content", "got 7"),
    ("chat", chat(messages=turns(SAY, ("assistant", "\ud800"))), "broken text", "", "whole characters"),
    ("chat", chat(messages=turns(SAY)), "order of messages", "", "the last message to be of assistant"),
    ("chat", chat(messages=turns(REPLY)), "order of messages", "", "expected a user's message"),
    ("chat", chat(messages=turns(SAY, ("system", "x"), REPLY)), "order of messages", "", "system's message first"),
    ("chat", chat(messages=[{"role": "user", "content": [{"type": "video"}]}]), "unsupported field", "messages",
     "expected no videos"),
    ("chat", chat(messages=[{"role": "user", "content": [{"type": "file"}]}]), "wrong type", "messages.0.content",
     "text and image items"),
    ("chat", chat(images=[]), "image count", "", "an image for each of 1 places, got 0"),
    ("chat", chat(images=["images/good.png"] * 2), "image count", "", "an image for each of 1 places, got 2"),
    ("chat", chat(images="images/good.png"), "wrong type", "images", "got 'images/good.png'"),
    ("chat", chat(images=[3]), "wrong type", "images.0", "got 3"),
    ("chat", chat(images=[""]), "wrong type", "images.0", "got ''"),
    ("chat", chat(images=[{"bytes": None, "path": None}]), "wrong type", "images.0", "got None"),
    ("chat", chat(images=["images/gone.png"]), "image not found", "images.0", "gone.png: No such file"),
    ("chat", chat(images=["images"]), "image not found", "images.0", "got a folder"),
    ("chat", chat(images=["a\0b"]), "image not found", "images.0", "null"),
    ("chat", chat(images=["images/half.png"]), "broken image", "images.0", "truncated"),
    ("chat", chat(images=["images/text.png"]), "broken image", "images.0", "cannot identify"),
    ("chat", chat(images=["images/thin.png"]), "image size", "images.0", "1 to 200, got (900, 4)"),
    ("chat", chat(images=["images/dot.png"]), "image size", "images.0", "at least 4 pixels, got (1, 1)"),
    ("chat", chat(images=["images/huge.png"]), "image size", "images.0", "at most 40000000 pixels"),
    ("chat", chat(images=["https://example.invalid/a.png"]), "remote image", "images.0", "allow_remote_images = true"),
    ("chat", chat(images=["file:///etc/hostname"]), "remote image", "images.0", "got 'file:///etc/hostname'"),
    ("chat", chat(images=["http://[::1/x.png"]), "remote image", "images.0", "Invalid IPv6 URL"),
    ("chat", chat(messages=turns(("user", "<image>Hi<|im_end|>\n<|im_start|>assistant"), REPLY)), "special token",
     "messages.0.content", "expected text without <|im_end|>"),
    ("chat", chat(messages=turns(SAY, ("assistant", "Two<|endoftext|>"))), "special token", "messages.1.content",
     "remove it"),
    ("chat", chat(system="<|im_start|>system"), "special token", "system", "got '<|im_start|>system'"),
    # two items are one text for the template, and so is a text whose images a discriminator does not see
    ("chat", chat(messages=[{"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text":
     "end|><image>"}]}, *turns(REPLY)]), "special token", "messages.0.content", "without <|im_end|>"),
    ("chat", chat(messages=turns(("user", "<|im_<image>end|>"), REPLY)), "special token", "messages.0.content",
     "without <|im_end|>"),
    ("chat", chat(system="<image>"), "image count", "", "for each of 2 places, got 1"),
    ("chat", chat(videos=["a.mp4"]), "unsupported field", "videos", "expected no videos"),
    ("warmup", without(warmup(), "question"), "missing field", "question", "it is not there"),
    ("warmup", without(warmup(), "teacher_caption"), "missing field", "teacher_caption", "or teacher_response"),
    ("warmup", without(warmup(), "student_cot"), "missing field", "student_cot", "or student_response"),
    ("warmup", warmup(student_caption=" "), "empty text", "student_caption", "not empty"),
    ("warmup", warmup(teacher_cot="So 1."), "response form", "teacher_cot", "in both responses or in neither"),
    ("warmup", warmup(student_cot="<think>a</think><think>b</think><answer>2</answer>"), "response form", "student_cot",
     "tags are in order"),
    ("warmup", {**without(warmup(), "teacher_caption", "teacher_cot"), "teacher_response": "So 1."}, "response form",
     "teacher_response", "got 'So 1.'"),
    ("warmup", warmup(question="<image><image>How many?"), "image count", "", "for each of 2 places, got 1"),
    ("warmup", warmup(images=["images/good.png"]), "image count", "", "image or images, got both"),
    ("warmup", warmup(image="images/text.png"), "broken image", "image", "cannot identify"),
    ("warmup", {**without(warmup(), "image"), "images": ["images/thin.png"]}, "image size", "images.0", "1 to 200"),
    ("warmup", warmup(question="a<|vision_start|>"), "special token", "question", "without <|vision_start|>"),
    ("warmup", warmup(question=turns(("system", "a"), ("user", "<|im_end|>"))), "special token", "question.1.content",
     "without <|im_end|>"),
    ("warmup", warmup(question=turns(("user", "a"), REPLY)), "order of messages", "", "last message to be of user"),
    ("warmup", warmup(question=turns(("user", "<image>"), REPLY, ("user", "<image>"))), "image count", "",
     "of 2 places"),
    ("warmup", warmup(system=3), "wrong type", "system", "got 3"),
    ("warmup", warmup(student_caption="a<|im_end|>"), "special token", "student_caption", "without <|im_end|>"),
    ("problem", problem(prompt=turns(("user", "<image><|vision_pad|>"))), "special token", "prompt.0.content",
     "without <|vision_pad|>"),
    ("problem", problem(teacher_response=f"{RESPONSE}<|im_end|>"), "special token", "teacher_response", "<|im_end|>"),
    ("problem", problem(teacher_response=None, teacher_caption="<|im_end|>", teacher_cot="1"), "special token",
     "teacher_caption", "<|im_end|>"),
    ("problem", problem(system="<|im_end|>"), "special token", "system", "<|im_end|>"),
    ("problem", problem(images=["images/gone.png"]), "image not found", "images.0", "gone.png: No such file"),
    ("problem", without(problem(), "data_source"), "missing field", "data_source", "it is not there"),
    ("problem", without(problem(), "prompt"), "missing field", "prompt", "it is not there"),
    ("problem", without(problem(), "reward_model"), "missing field", "reward_model", "it is not there"),
    ("problem", problem(reward_model={"style": "rule"}), "missing field", "reward_model.ground_truth", "not there"),
    ("problem", problem(reward_model={"ground_truth": [1]}), "wrong type", "reward_model.ground_truth", "got [1]"),
    ("problem", problem(reward_model={"ground_truth": ""}), "empty text", "reward_model.ground_truth", "not empty"),
    ("problem", problem(prompt=turns(SAY, REPLY)), "order of messages", "", "the last message to be of user"),
    ("problem", problem(prompt=turns(("user", "How many?"))), "image count", "", "for each of 0 places, got 1"),
    ("problem", problem(teacher_response="<answer>1</answer>"), "response form", "teacher_response", "each once"),
    ("problem", problem(extra_info="x"), "wrong type", "extra_info", "got 'x'"),
]  # fmt: skip
NAMES = [f"{i}-{schema}-{cause}-{field}" for i, (schema, _, cause, field, _) in enumerate(ROWS)]


@pytest.mark.parametrize(("schema", "row", "cause", "field", "reason"), ROWS, ids=NAMES)
def test_malformed_rows(tmp_path, schema, row, cause, field, reason):
    """A malformed row among good ones is skipped and logged, or raises; all good rows come, none in its stead."""
    write_images(tmp_path)
    good = [GOOD[schema](number) for number in range(30)]
    path = write_lines(tmp_path / "rows.jsonl", [*good[:6], row, *good[6:]])
    log = tmp_path / "run/skipped.jsonl"
    stream = RowStream(path, schema, LoadOptions(buffer=4, skipped=log))
    rows = list(stream)
    assert sorted(got.id for got in rows) == sorted(f"{GOOD[schema].__name__[0]}{number}" for number in range(30))
    assert (stream.read, stream.skipped, stream.causes) == (31, 1, {cause: 1})
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (entry["file"], entry["row"], entry["field"], entry["cause"]) == (str(path), 7, field, cause)
    assert reason in entry["reason"]

    with pytest.raises(DataError) as raised:
        list(RowStream(path, schema, LoadOptions(on_error="raise")))
    where = f"{path}, row 7: {field}: " if field else f"{path}, row 7: "
    assert str(raised.value).startswith(where) and reason in str(raised.value)

    tried = dry_run(path, schema)
    assert (tried.rows, tried.accepted, tried.rejected) == (31, 30, {cause: 1})
    assert tried.first[cause].startswith(where)


def test_the_table_is_long_enough():
    assert len({(schema, cause, field) for schema, _, cause, field, _ in ROWS}) >= 40


FILES = [
    ("gone.jsonl", None, "expected a data file, there is none"),
    ("rows.json", b"[]", "expected a file ending in .jsonl or .parquet, got '.json'; write one object a line"),
    ("rows.pkl", b"\x80\x04.", "expected a file ending in .jsonl or .parquet, got '.pkl'"),
    ("rows.jsonl", b"", "expected a row that can be used, got none of 0"),
    ("rows.jsonl", b"\n \n", "expected a row that can be used, got none of 0"),
    ("rows.jsonl", b"{}\n", "got none of 1: "),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(RowStream(path, "chat"))
    assert str(path) in str(raised.value) and message in str(raised.value)


def test_no_files(tmp_path):
    with pytest.raises(DataError, match="expected at least one"):
        RowStream([], "chat")
    with pytest.raises(DataError, match=r"expected files ending in \.jsonl or \.parquet, got none"):
        RowStream(tmp_path, "chat")


def test_wrong_options(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [without(chat(), "images")])
    with pytest.raises(ValueError, match="expected schema to be one of 'chat', 'warmup', 'problem', got 'sft'"):
        RowStream(path, "sft")
    with pytest.raises(ValueError, match="expected schema to be one of"):
        dry_run(path, "sft")
    for options in ({"on_error": "ignore"}, {"buffer": -1}, {"max_skipped": 1.5}, {"epochs": 0}):
        with pytest.raises(ValueError, match="LoadOptions: expected"):
            LoadOptions(**options)


def many(tmp_path, bad, good):
    write_images(tmp_path)
    return write_lines(tmp_path / "rows.jsonl", [*[chat(i) for i in range(good)], *[{"id": 1}] * bad])


def test_too_many_skipped_rows_stop(tmp_path):
    """The share of skipped rows stops the stream at the end of an epoch, and from the 200th row on."""
    assert len(list(RowStream(many(tmp_path, 5, 95), "chat"))) == 95
    with pytest.raises(DataError, match=r"at most 5% of the rows to be skipped, got 6 of 100 \(missing field 6\)") as e:
        list(RowStream(many(tmp_path, 6, 94), "chat"))
    assert "messages: expected this field" in str(e.value)
    assert len(list(RowStream(tmp_path / "rows.jsonl", "chat", LoadOptions(max_skipped=0.1)))) == 94
    stream = RowStream(many(tmp_path, 300, 200), "chat", LoadOptions(buffer=0))
    with pytest.raises(DataError, match="got 11 of 211"):
        list(stream)


def test_a_line_too_long_for_memory_is_skipped(tmp_path):
    write_images(tmp_path)
    long = chat(99, note="x" * 20000)
    path = write_lines(tmp_path / "rows.jsonl", [*[chat(i) for i in range(25)], long, chat(25)])
    options = LoadOptions(buffer=0, max_bytes=5000)
    stream = RowStream(path, "chat", options)
    assert [row.id for row in stream] == [f"c{i}" for i in range(26)]
    assert stream.causes == {"too long": 1}
    assert (
        dry_run(path, "chat", options)
        .first["too long"]
        .startswith(f"{path}, row 26: expected a line of at most 5000 bytes")
    )


def test_image_limits_are_settings(tmp_path):
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [chat()])
    options = LoadOptions(images=ImageLimits(max_pixels=1000))
    assert dry_run(path, "chat", options).rejected == {"image size": 1}
    assert len(picture()) < 5000
