"""A resumed run reads the data that it began with, or none."""

import json
import os
import re
import shutil
import time

import pytest

pytest.importorskip("transformers")

from run_cases import flags, stop_in
from shapes_files import write_sft

from prism import cli
from prism.data import fingerprint
from prism.data.files import DataError
from prism.data.fingerprint import FilePrint
from prism.worlds.shapes.world import ShapesWorld


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"0123456789" * 1000)
    return path


def saved(one):
    """Returns a print's state as a checkpoint keeps it, once its sum is known."""
    for _ in range(500):
        if (state := json.loads(json.dumps(one.state())))["sha256"]:
            return state
        time.sleep(0.01)
    pytest.fail("no sum")


@pytest.mark.parametrize("at_once", [0, 2**30])
def test_a_file_with_the_same_content_is_accepted_however_it_was_copied(file, at_once, monkeypatch):
    monkeypatch.setattr(fingerprint, "_AT_ONCE", at_once)
    before = saved(FilePrint(file))
    assert before["sha256"] == fingerprint.hashlib.sha256(file.read_bytes()).hexdigest()
    assert FilePrint(file, before).state() == before
    # another inode and another time
    shutil.copy(file, file.with_name("copy"))
    file.with_name("copy").replace(file)
    os.utime(file, (1, 1))
    after = FilePrint(file, before).state()
    assert after["sha256"] == before["sha256"] and after["stat"] != before["stat"]


@pytest.mark.parametrize("at_once", [0, 2**30])
@pytest.mark.parametrize("place", [0, 5003, -1])
def test_a_file_that_was_edited_at_the_same_size_is_refused(file, at_once, place, monkeypatch):
    monkeypatch.setattr(fingerprint, "_AT_ONCE", at_once)
    before = saved(FilePrint(file))
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    wanted = f"{file}: expected the content that the run was reading, of SHA-256 {before['sha256'][:16]}"
    with pytest.raises(DataError, match=re.escape(wanted)):
        FilePrint(file, before)


def test_an_unchanged_file_is_not_read_again(file, monkeypatch):
    before = saved(FilePrint(file))
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *_: pytest.fail("it was read"))
    assert FilePrint(file, before).state() == before


def test_a_file_written_before_its_sum_was_known_is_refused(file):
    before = {**FilePrint(file).state(), "sha256": None}
    # the same file is read again for its sum
    assert saved(FilePrint(file, before))["sha256"]
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(DataError, match="stopped before its checksum was known"):
        FilePrint(file, before)


def test_a_file_that_changes_while_it_is_read_gets_no_sum(file, monkeypatch):
    digest = fingerprint.hashlib.file_digest

    def changed_meanwhile(opened, name):
        os.utime(file, (5, 5))
        return digest(opened, name)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", changed_meanwhile)
    assert FilePrint(file).state()["sha256"] is None


def test_a_run_on_edited_data_is_refused_and_names_the_file(tmp_path, capsys):
    path = tmp_path / "sft.jsonl"
    write_sft(path, ShapesWorld(3).samples("sft", 9))
    changes = {"run.stages": ["sft"], "data.source": "files", "data.files.sft": [str(path)], "optimiser.sft.steps": 2}
    stop_in(tmp_path / "run", "sft", 1, **changes)
    command = ["run", *flags(tmp_path / "run", **changes)]
    text = path.read_text()
    # one answer is another, of the same length
    edited = text.replace("<answer>", "<Answer>", 1)
    assert edited != text and len(edited) == len(text)
    path.write_text(edited)
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert f"prism run: data.files.sft: {path}: expected the content that the run was reading" in told
    assert "put the old files back, or take another run.folder" in told
    path.write_text(text)
    assert cli.main(command) == 0
