"""Parquet: bytes and paths, row groups, resuming, damaged files, and the message without pyarrow."""

import sys
from itertools import islice

import numpy as np
import pyarrow as arrow
import pytest
from loader_cases import RESPONSE, chat, picture, problem, warmup, write_images
from pyarrow import parquet
from shapes_files import write_problems, write_sft

from prism.data.files import DataError
from prism.data.loader import LoadOptions, RowStream, dry_run
from prism.worlds.shapes.world import ShapesWorld

WORLD = ShapesWorld()


def write(path, rows, group=None):
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_shapes_world_as_problems(tmp_path):
    samples = list(WORLD.samples("rl", 300))
    path = tmp_path / "rl.parquet"
    assert write_problems(path, samples) == 300
    assert parquet.ParquetFile(path).metadata.num_row_groups == 2
    rows = list(RowStream(path, "problem", LoadOptions(buffer=0, on_error="raise")))
    for sample, row in zip(samples, rows, strict=True):
        assert (row.id, row.ground_truth, row.teacher) == (sample.id, sample.answer, sample.response.text)
        assert row.prompt == (("user", f"<image>{sample.question.text}"),)
        assert row.data_source == f"shapes/{sample.question.kind}"
        assert np.array_equal(np.asarray(row.images[0]), sample.image)


def test_shapes_world_as_sft(tmp_path):
    samples = list(WORLD.samples("sft", 20))
    write_sft(tmp_path / "sft.parquet", samples)
    rows = list(RowStream(tmp_path, "chat", LoadOptions(buffer=0)))
    assert [row.messages[1][1] for row in rows] == [sample.response.text for sample in samples]


def test_paths_bytes_and_missing_values(tmp_path):
    write_images(tmp_path)
    paths = write(tmp_path / "paths.parquet", [problem(), problem(1, teacher_response=None)])
    assert [row.teacher for row in RowStream(paths, "problem", LoadOptions(buffer=0))] == [RESPONSE, None]
    # as `datasets` writes images: a field of bytes and a field of a path
    images = [[{"bytes": picture(), "path": None}], [{"bytes": None, "path": "images/good.png"}]]
    both = write(tmp_path / "both.parquet", [problem(i, images=image) for i, image in enumerate(images)])
    assert all(row.images[0].size == (32, 32) for row in RowStream(both, "problem"))
    plain = write(tmp_path / "plain.parquet", [problem(images=[picture()])])
    assert dry_run(plain, "problem").accepted == 1
    mixed = [
        chat(),
        chat(1, images=None, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ]
    assert dry_run(write(tmp_path / "mixed.parquet", mixed), "chat").accepted == 2


@pytest.mark.parametrize("buffer", [0, 11])
def test_resume(tmp_path, buffer):
    write_images(tmp_path)
    rows = [problem(number) for number in range(150)]
    rows[77] = problem(77, images=["images/gone.png"])
    path = write(tmp_path / "rows.parquet", rows, group=20)
    options = LoadOptions(buffer=buffer, epochs=2)
    expected = [row.id for row in RowStream(path, "problem", options)]
    assert len(expected) == 298
    for given in (0, 1, 10, 66, 80, 149, 150, 298):
        stream = RowStream(path, "problem", options)
        assert [row.id for row in islice(stream, given)] == expected[:given]
        resumed = RowStream(path, "problem", options)
        resumed.load_state_dict(stream.state_dict())
        assert [row.id for row in resumed] == expected[given:]


def test_only_the_row_groups_from_the_position_on_are_read(tmp_path, monkeypatch):
    write_images(tmp_path)
    path = write(tmp_path / "rows.parquet", [problem(n) for n in range(100)], group=10)
    stream = RowStream(path, "problem", LoadOptions(buffer=0))
    list(islice(stream, 95))
    groups = []
    real = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda self, **k: (groups.append(k["row_groups"]), real(self, **k))[1]
    )
    resumed = RowStream(path, "problem", LoadOptions(buffer=0))
    resumed.load_state_dict(stream.state_dict())
    assert [row.id for row in resumed] == [f"p{n}" for n in range(95, 100)]
    assert groups[-1] == [9]


def test_malformed_rows_and_files(tmp_path):
    write_images(tmp_path)
    gone = write(tmp_path / "gone.parquet", [problem(n, images=["images/gone.png"]) for n in range(2)])
    with pytest.raises(DataError, match=r"gone\.parquet, row 1: images\.0: expected an image at"):
        list(RowStream(gone, "problem", LoadOptions(buffer=0, on_error="raise")))
    columns = write(tmp_path / "columns.parquet", [{"a": 1}])
    assert "data_source: expected this field" in dry_run(columns, "problem").first["missing field"]
    (tmp_path / "text.parquet").write_text("this is no parquet")
    with pytest.raises(DataError, match=r"text\.parquet: expected a parquet file, row 1 cannot be read"):
        list(RowStream(tmp_path / "text.parquet", "problem"))
    good = write(tmp_path / "cut.parquet", [problem(n) for n in range(50)]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="expected a parquet file"):
        dry_run(tmp_path / "cut.parquet", "problem")
    # the footer is intact, a page in the middle is damaged
    (tmp_path / "cut.parquet").write_bytes(good[:40] + bytes(200) + good[240:])
    with pytest.raises(DataError, match="expected a parquet file"):
        dry_run(tmp_path / "cut.parquet", "problem")


@pytest.mark.parametrize("field", ["videos", "video", "audios", "audio"])
@pytest.mark.parametrize(("schema", "row"), [("chat", chat), ("problem", problem), ("warmup", warmup)])
def test_videos_and_sound_are_seen_among_the_columns(tmp_path, schema, row, field):
    write_images(tmp_path)
    path = write(tmp_path / "rows.parquet", [row(0, **{field: ["a"]}), row(1)])
    assert dry_run(path, schema).rejected == {"unsupported field": 1}


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"rows\.parquet: expected pyarrow, to read parquet: pip install pyarrow"):
        list(RowStream(tmp_path / "rows.parquet", "problem"))
    with pytest.raises(RuntimeError, match="expected pyarrow, to write parquet: pip install pyarrow"):
        write_problems(tmp_path / "new.parquet", WORLD.samples("rl", 1))
