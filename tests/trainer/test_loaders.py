"""The loaders on good files: every schema, the shapes world written and read back, order, resuming, memory."""

import json
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice

import numpy as np
import pytest
from loader_cases import RESPONSE, chat, picture, problem, warmup, without, write_images, write_lines
from shapes_files import write_sft, write_warmup

from prism.data.files import DataError
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, RowStream, dry_run
from prism.worlds.shapes.counters import judge
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels.grammar import Sections, split_response

WORLD = ShapesWorld()


def read(tmp_path, schema, *rows, **options):
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    return list(RowStream(path, schema, LoadOptions(buffer=0, on_error="raise", **options)))


def test_sharegpt_in_all_its_spellings(tmp_path):
    user, assistant = "<image>How many?", RESPONSE
    items = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    spoken = [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
    rows = read(
        tmp_path,
        "chat",
        chat(),
        {**without(chat(), "messages"), "conversations": spoken},
        {**chat(messages=None), "conversations": spoken},
        chat(messages=[{"role": "user", "content": items}, {"role": "assistant", "content": assistant}]),
    )
    for row in rows:
        assert row.messages == (("user", user), ("assistant", assistant))
        (image,) = row.images
        assert image.mode == "RGB" and image.size == (32, 32)
    (system,) = read(tmp_path, "chat", chat(system="Be short."))
    assert system.messages[0] == ("system", "Be short.")
    with_own = [{"role": "system", "content": "Own."}, *chat()["messages"]]
    (own,) = read(tmp_path, "chat", chat(system="Be short.", messages=with_own))
    assert [role for role, _ in own.messages] == ["system", "user", "assistant"] and own.messages[0][1] == "Own."


def test_characters_that_json_spells_in_halves(tmp_path):
    """An escaped pair of surrogates is one character and is kept."""
    turns = [chat()["messages"][0], {"role": "assistant", "content": "\U0001f600"}]
    (row,) = read(tmp_path, "chat", chat(messages=turns))
    assert row.messages[1][1] == "\U0001f600"


def test_plain_chat(tmp_path):
    plain = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    more = {"messages": plain["messages"] * 2, "images": None, "other": 3}
    one, two = read(tmp_path, "chat", plain, more)
    assert one.images == two.images == () and len(two.messages) == 4
    # a row without an id is named by its file and number
    assert one.id == "rows-1" and two.id == "rows-2"


@pytest.mark.parametrize(
    "row",
    [
        warmup(),
        warmup(teacher_cot="1. So 1.</think><answer>1</answer>", student_cot="So 2.<answer>2</answer>"),
        warmup(teacher_caption="<caption>\n- red circle north\n</caption>"),
        {**without(warmup(), "question"), "prompt": "How many?"},
        {**warmup(question=None), "prompt": "How many?"},
        {**without(warmup(), "teacher_caption", "teacher_cot"), "teacher_response": RESPONSE},
        {**without(warmup(), "teacher_cot"), "teacher_response": RESPONSE},
        {**without(warmup(), "teacher_caption"), "teacher_response": RESPONSE},
    ],
)
def test_warmup_and_its_fallbacks(tmp_path, row):
    (got,) = read(tmp_path, "warmup", row)
    assert got.teacher == Sections("- red circle north", "1. So 1.", "1")
    assert got.student == Sections("- red circle south", "So 2.", "2")


def test_warmup_without_answers(tmp_path):
    (row,) = read(tmp_path, "warmup", warmup(teacher_cot="So 1.", student_cot="So 2."))
    assert row.teacher.answer == row.student.answer == ""


def test_problems(tmp_path):
    reward = {"ground_truth": 3, "style": "rule", "equivalent_answers": ["three", 3.0]}
    one, parts, bare = read(
        tmp_path,
        "problem",
        problem(reward_model=reward),
        problem(teacher_response=None, teacher_caption="- red circle north", teacher_cot="1. So 1."),
        problem(teacher_response=None, extra_info=None, reward_model={"ground_truth": "1", "equivalent_answers": None}),
    )
    assert (one.ground_truth, one.equivalent_answers) == ("3", ("three", "3.0"))
    assert one.id == "p0" and one.data_source == "shapes/count" and one.teacher == RESPONSE
    assert split_response(parts.teacher) == Sections("- red circle north", "1. So 1.", "1")
    assert bare.teacher is None and bare.id == "rows-3" and bare.equivalent_answers == ()


def test_shapes_world_as_sft_file(tmp_path):
    samples = list(WORLD.samples("sft", 60))
    assert write_sft(tmp_path / "sft.jsonl", samples) == 60
    rows = list(RowStream(tmp_path / "sft.jsonl", "chat", LoadOptions(buffer=0)))
    for sample, row in zip(samples, rows, strict=True):
        (_, question), (_, response) = row.messages
        assert row.id == sample.id and question == f"<image>{sample.question.text}"
        assert np.array_equal(np.asarray(row.images[0]), sample.image)
        assert judge(response, sample.scene, sample.question).perception.wrong == bool(sample.response.perception_error)


def test_shapes_world_as_warmup_file(tmp_path):
    samples = list(WORLD.samples("alignment", 40))
    trios = [(s, s.response.sections, WORLD.respond("public", s).sections) for s in samples]
    assert write_warmup(tmp_path / "warmup.jsonl", trios) == 40
    rows = list(RowStream(tmp_path / "warmup.jsonl", "warmup", LoadOptions(buffer=0)))
    for (sample, teacher, student), row in zip(trios, rows, strict=True):
        assert (row.teacher, row.student) == (teacher, student)
        assert np.array_equal(np.asarray(row.images[0]), sample.image)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a name ending in \.jsonl or \.parquet, got 'a\.csv'"):
        write_sft(tmp_path / "a.csv", [])


def plain(number):
    return {
        "id": str(number),
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    }


def write_many(tmp_path, *sizes, bad=()):
    start = 0
    for i, size in enumerate(sizes):
        rows = [{"id": n} if n in bad else plain(n) for n in range(start, start + size)]
        write_lines(tmp_path / f"part-{i}.jsonl", rows)
        start += size
    return tmp_path


def ids(stream, count=None):
    return [int(row.id) for row in islice(stream, count)]


def test_order_is_seeded_and_complete(tmp_path):
    folder = write_many(tmp_path, 70, 30, 1)
    for buffer in (1, 7, 16, 500):
        order = ids(RowStream(folder, "chat", LoadOptions(seed=3, buffer=buffer)))
        assert sorted(order) == list(range(101))
        assert order == ids(RowStream(folder, "chat", LoadOptions(seed=3, buffer=buffer)))
        assert order != ids(RowStream(folder, "chat", LoadOptions(seed=4, buffer=buffer))) or buffer == 1
    assert ids(RowStream(folder, "chat", LoadOptions(buffer=0))) == list(range(101))
    # rows far apart are mixed, not only neighbours
    order = ids(RowStream(folder, "chat", LoadOptions(buffer=500)))
    assert np.mean(np.abs(np.diff(order))) > 20
    twice = ids(RowStream(folder, "chat", LoadOptions(epochs=2, buffer=16)))
    assert sorted(twice[:101]) == sorted(twice[101:]) == list(range(101)) and twice[:101] != twice[101:]
    assert len(ids(RowStream(folder, "chat", LoadOptions(epochs=None)), 500)) == 500


@pytest.mark.parametrize("buffer", [0, 1, 9, 1000])
def test_resume_at_every_row(tmp_path, buffer):
    """A stream that resumes from a position, saved as JSON, gives the same rows and counts."""
    folder = write_many(tmp_path, 24, 17, bad={11, 30})
    options = LoadOptions(epochs=2, buffer=buffer, seed=5)
    whole = RowStream(folder, "chat", options)
    expected, states = [], [whole.state_dict()]
    for row in whole:
        expected.append(int(row.id))
        states.append(whole.state_dict())
    states.append(whole.state_dict())
    assert len(expected) == 78
    for given, state in enumerate(states):
        text = json.dumps(state)
        assert len(text) < 600
        resumed = RowStream(folder, "chat", options)
        resumed.load_state_dict(json.loads(text))
        assert ids(resumed) == expected[given:]
        assert (resumed.read, resumed.skipped, resumed.causes) == (41, 2, {"missing field": 2})


def test_resume_does_not_log_twice(tmp_path):
    folder = write_many(tmp_path, 100, bad={5, 50, 90})
    log = tmp_path / "skipped.log"
    options = LoadOptions(epochs=2, buffer=10, skipped=log)
    log.write_text("from an older run\n")
    stream = RowStream(folder, "chat", options)
    ids(stream, 40)
    state = stream.state_dict()
    # these rows are read after the checkpoint and lost
    ids(stream)
    whole = log.read_text()
    assert len(whole.splitlines()) == 3 and "older" not in whole
    resumed = RowStream(folder, "chat", options)
    resumed.load_state_dict(state)
    ids(resumed)
    assert log.read_text() == whole


def test_resume_elsewhere_is_refused(tmp_path):
    folder = write_many(tmp_path, 20)
    stream = RowStream(folder, "chat")
    ids(stream, 3)
    state = stream.state_dict()
    for options in (LoadOptions(seed=1), LoadOptions(buffer=3)):
        with pytest.raises(DataError, match=r"load_state_dict: expected the same (seed|buffer)"):
            RowStream(folder, "chat", options).load_state_dict(state)
    write_many(tmp_path, 21)
    with pytest.raises(DataError, match="expected the same files"):
        RowStream(folder, "chat").load_state_dict(state)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak allocation over a file ten times longer stays the same, within a tenth."""

    def peak(rows):
        path = write_lines(tmp_path / f"{rows}.jsonl", ({**plain(n), "note": "x" * 2000} for n in range(rows)))
        stream = RowStream(path, "chat", LoadOptions(buffer=64))
        tracemalloc.start()
        assert sum(1 for _ in stream) == rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(4000) < 1.1 * peak(400)


def test_images_are_searched_where_one_says(tmp_path):
    write_images(tmp_path / "elsewhere")
    path = write_lines(tmp_path / "rows.jsonl", [chat()])
    assert dry_run(path, "chat").rejected == {"image not found": 1}
    assert dry_run(path, "chat", LoadOptions(image_root=tmp_path / "elsewhere")).accepted == 1


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/good.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(picture() if found else b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_remote_images_only_where_allowed(tmp_path, server):
    rows = [chat(0, images=[f"{server}/good.png"]), chat(1, images=[f"{server}/gone.png"])]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert dry_run(path, "chat").rejected == {"remote image": 2}
    trusted = (server.removeprefix("http://"),)
    allowed = LoadOptions(images=ImageLimits(allow_remote=True, trusted=trusted))
    tried = dry_run(path, "chat", allowed)
    assert tried.accepted == 1 and "404" in tried.first["image not found"]
    small = LoadOptions(images=ImageLimits(allow_remote=True, max_bytes=100, trusted=trusted))
    assert "at most 100 bytes" in dry_run(path, "chat", small).first["image size"]
