"""Whatever a run's folder holds, a command ends well or with an error that names the path."""

import json
import os
import shutil

import pytest

pytest.importorskip("transformers")

from run_cases import flags, rewritten, snapshot

from prism import cli
from prism.commands import run as run_command
from prism.runtime import checkpoint
from prism.runtime.disk import FILES, FOLDERS

pytestmark = pytest.mark.usefixtures("one_tokenizer")


DAMAGES = {
    "missing": None,
    "empty": b"",
    "cut": "half",
    "a table": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "binary": bytes(range(256)) * 9,
    "lines of null": b"null\nnull\n",
    "deep": b"[" * 200_000,
    "deep tables": b'{"a":' * 3000 + b"0" + b"}" * 3000,
    "a folder": "folder",
}
# `make test` leaves out damages whose kind another one has too
FEWER = ("missing", "cut", "null", "binary", "deep", "a folder")
ALL = [name if name in FEWER else pytest.param(name, marks=pytest.mark.full) for name in DAMAGES]
CHECKPOINT = "checkpoints/newest"
STOPPED_FILES = ("config.json", "environment.json", "changes.json", "metrics.jsonl", "evaluations.json", "lock",
                 "report.html", "skipped-rlvr.jsonl", "rollouts/rlvr-000001.jsonl",
                 *(f"{CHECKPOINT}/{name}" for name in ("state.json", "checksums.json", "training.pt",
                                                       "policy.safetensors")))  # fmt: skip
FINISHED_FILES = ("config.json", "metrics.jsonl", "evaluations.json", "policy/config.json",
                  "policy/model.safetensors")  # fmt: skip


def damaged(folder, name, damage):
    """Damages a file of a run."""
    newest = next(checkpoint.checkpoints(folder / "checkpoints"))
    path = folder / name.replace(CHECKPOINT, f"checkpoints/{newest.name}")
    content = path.read_bytes() if path.is_file() else b""
    if path.is_file():
        path.unlink()
    if DAMAGES[damage] == "folder":
        path.mkdir()
    elif DAMAGES[damage] is not None:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else DAMAGES[damage])
    return path


def resumes_only(rt):
    """Restores a run as far as its next step."""
    rt.restore()
    if rt._inside:
        next(rt.steps("rlvr", policy=rt.config.optimiser.rlvr, reference=True))


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(stopped, folder)
    assert cli.main(["run", *flags(folder)]) == 0
    return folder


def tried(folder, path, capsys, monkeypatch):
    """Runs, reports and exports; returns the exit statuses. An error names the file, and no command raises."""
    monkeypatch.setattr(run_command, "run_stages", resumes_only)
    statuses = []
    for command in (["report", "--run", str(folder)], ["export", "--run", str(folder), "--to", str(folder / "../to")],
                    ["run", *flags(folder)]):  # fmt: skip
        statuses.append(cli.main(command))
        told = capsys.readouterr().err
        assert statuses[-1] in (0, 2) and "Traceback" not in told, (command[0], told)
        if statuses[-1]:
            # or the folder around it: a checkpoint is used or refused as a whole
            assert any(str(part) in told for part in (path, path.parent)), (command[0], told)
    return statuses


@pytest.mark.parametrize("damage", ALL)
@pytest.mark.parametrize("name", STOPPED_FILES)
def test_whatever_a_file_of_a_stopped_run_holds_no_command_raises(stopped, tmp_path, name, damage, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    path = damaged(folder, name, damage)
    *_, status = tried(folder, path, capsys, monkeypatch)
    if name.startswith(CHECKPOINT):
        # the one before is used
        assert status == 0 and [p.name for p in folder.glob("checkpoints/damaged-*")] == [f"damaged-{path.parent.name}"]
    else:
        # the run needs none of the others, but it must be able to write them
        assert status == (2 if name == "metrics.jsonl" or (damage == "a folder" and name in FILES) else 0)


@pytest.mark.parametrize("damage", ALL)
@pytest.mark.parametrize("name", FINISHED_FILES)
def test_whatever_a_file_of_a_finished_run_holds_no_command_raises(
    finished, tmp_path, name, damage, capsys, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    tried(tmp_path / "run", damaged(tmp_path / "run", name, damage), capsys, monkeypatch)


@pytest.mark.parametrize("name", ["", "checkpoints", "rollouts", "policy", CHECKPOINT])
def test_a_file_in_the_place_of_a_folder_is_an_error_that_names_it(stopped, tmp_path, name, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    path = folder / name
    if name == CHECKPOINT:
        path = next(checkpoint.checkpoints(folder / "checkpoints"))
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("a file")
    statuses = tried(folder, path, capsys, monkeypatch)
    assert statuses[-1] == (0 if name == CHECKPOINT else 2)


# the parts that the report computes with, each of a wrong type
WRONG = {
    "config.json": [("run", 3), ("run.stages", "sft"), ("run.stages", [1]), ("optimiser.rlvr.steps", "x"),
                    ("model.policy", []), ("data.shapes", 3), ("data.source", None), ("discriminator.experts", "x")],
    "evaluations.json": [("start", 3), ("start", None), ("start.sampled", 3), ("start.test", []),
                         ("start.discriminator", {"pairs": 3}), ("start.accuracy", 7.5), ("start.samples", "x"),
                         ("start.samples", -4), ("start.split", {}), ("start.sampled", {"accuracy": "x"})],
    "environment.json": [("versions", 3), ("device", {"x": []}), ("last_started", None)],
    "changes.json": [("", [3]), ("", [{"key": 3}]), ("", {"a": 1})],
    "metrics.jsonl": [("stage", 3), ("step", "x"), ("step", None), ("loss", "x"), ("non_finite", 3), ("tokens", {}),
                      ("non_finite", [3]), ("d_expert_load", {"image": 3}), ("seconds", []), ("peak_bytes", -1)],
    "rollouts/rlvr-000001.jsonl": [("problem", []), ("problem", {}), ("response", 3), ("reason", []), ("reward", "x"),
                                   ("advantage", {}), ("question", None), ("finish", [])],
}  # fmt: skip


@pytest.mark.parametrize("name, key, value", [(name, *one) for name, all_ in WRONG.items() for one in all_])
def test_a_value_of_a_wrong_type_is_shown_or_an_error(finished, tmp_path, name, key, value, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    path = folder / name
    whole = [json.loads(line) for line in path.read_text().splitlines()] if name.endswith("l") else None
    table = whole[0] if whole else json.loads(path.read_text())
    *parents, last = key.split(".")
    inner = table
    for part in parents:
        inner = inner[part]
    if key:
        inner[last] = value
    else:
        table = value
    path.write_text("".join(json.dumps(one) + "\n" for one in whole) if whole else json.dumps(table))
    for command in (["report", "--run", str(folder)], ["export", "--run", str(folder), "--to", str(tmp_path / "to")]):
        status = cli.main(command)
        told = capsys.readouterr().err
        assert status in (0, 2) and (status == 0 or str(path) in told), told


# state.json with its checksum, so that it is not damaged
STATES = {
    "without log": lambda state: state["extra"].pop("log"),
    "log of a wrong type": lambda state: state["extra"].update(log=3),
    "a negative position": lambda state: state["extra"]["log"].update(bytes=-1),
    "no stage begun": lambda state: state["extra"].update(done=[], stage=None),
    "an unknown stage": lambda state: state["extra"].update(stage="sleep"),
    "without settings": lambda state: state["extra"].pop("settings"),
    "settings of a wrong type": lambda state: state["extra"].update(settings={"run": 3}),
    "evaluations of a wrong type": lambda state: state["extra"].update(evaluations={"start": 3}),
    "without extra": lambda state: state.pop("extra"),
    "without models": lambda state: state.pop("models"),
    "other models": lambda state: state.update(models=["policy"]),
    "a text as step": lambda state: state["extra"].update(step="2"),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_no_run_wrote_is_an_error_that_names_it(stopped, tmp_path, change, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    newest = next(checkpoint.checkpoints(folder / "checkpoints"))
    state = json.loads((newest / "state.json").read_text())
    STATES[change](state)
    rewritten(newest, state)
    statuses = tried(folder, newest, capsys, monkeypatch)
    # a state without its parts is damaged, and the checkpoint before it is used
    assert statuses[-1] == (0 if change in ("without extra", "without models") else 2)


def test_checksums_that_cover_nothing_are_damage(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    newest = next(checkpoint.checkpoints(tmp_path / "run/checkpoints"))
    (newest / "checksums.json").write_text("{}")
    assert "expected a checksum of policy.safetensors, reference.safetensors, state.json" in checkpoint.damage(newest)


def test_stray_files_beside_checkpoints_do_no_harm(stopped, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / "checkpoints/.aside-step-00000009").write_text("a file")
    (folder / "checkpoints/.aside-link").symlink_to(tmp_path)
    (folder / "checkpoints/damaged-step-00000003").write_text("a file")
    (folder / "checkpoints/step-99999999").write_text("a file")
    (folder / "checkpoints/notes.txt").write_text("a file")
    assert cli.main(["run", *flags(folder)]) == 0
    assert tmp_path.exists() and not list(folder.glob("checkpoints/.aside-*"))


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_written_over(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = snapshot(tmp_path / "run")
    assert cli.main(["run", *flags(tmp_path / "run")]) == 2
    assert "got a finished run without checkpoints, which would be written over" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


def test_everything_that_a_run_writes_is_checked_at_its_start(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith("skipped-")}
    assert names <= {*FILES, *FOLDERS}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "checkpoints"])
def test_what_cannot_be_read_is_named(stopped, tmp_path, name, capsys, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / name).chmod(0)
    try:
        assert 2 in tried(tmp_path / "run", tmp_path / "run" / name, capsys, monkeypatch)
    finally:
        (tmp_path / "run" / name).chmod(0o700)
