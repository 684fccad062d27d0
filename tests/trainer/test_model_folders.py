"""Folders of models: other families are refused before their weights are read, and no code of a folder runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plain_folder import problem, write_folder, write_rows

from prism import cli
from prism.config import ConfigError
from prism.discriminator.storage import load_discriminator
from prism.discriminator.upcycle import upcycle
from prism.models import building
from prism.models.building import checkpoint_folder

ROOT = Path(__file__).parents[2]
# code of a folder that tells when it runs
HOSTILE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Own:\n    pass\n"
AUTO_MAPS = {
    "config.json": {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.Own", None]},
    "preprocessor_config.json": {"AutoImageProcessor": "own.Own"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_rows(folder / "rlvr.jsonl", [problem("how many?")])
    return write_folder(folder / "model")


def prism(*arguments, cache, answer="y\n"):
    """Runs the command line in a process whose user answers; code that runs in spite of all goes through the cache."""
    command = [sys.executable, "-m", "prism", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    return subprocess.run(
        command, input=answer, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=300
    )


def hostile(plain, folder, file, *, known=True):
    """A copy of a model in which a file names code of the folder."""
    shutil.copytree(plain, folder)
    (folder / "own.py").write_text(HOSTILE.format(marker=str(folder / "ran")))
    named = json.loads((folder / file).read_text()) | {"auto_map": AUTO_MAPS[file]}
    if not known:
        named |= {"model_type": "own"}
    if file == "tokenizer_config.json":
        named |= {"tokenizer_class": "Own"}
    (folder / file).write_text(json.dumps(named))
    return folder


def settings(plain, folder):
    data = ("--data.source", "files", "--data.files.rlvr", plain.parent / "rlvr.jsonl")
    return ("--run.folder", folder / "run", "--log.console", "quiet", *data)


def test_no_code_of_a_folder_runs_and_nobody_is_asked(plain, tmp_path):
    own = hostile(plain, tmp_path / "own", "config.json", known=False)
    for arguments in (
        ("rlvr", *settings(plain, tmp_path), "--model.policy", own),
        ("rlvr", *settings(plain, tmp_path), "--model.policy", own, "--dry-run"),
        ("eval", "--model", own, "--data", plain.parent / "rlvr.jsonl"),
    ):
        done = prism(*arguments, cache=tmp_path / "modules")
        assert done.returncode == 2, done.stderr
        assert not (own / "ran").exists() and "[y/N]" not in done.stdout + done.stderr
        assert "is of type 'own'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("file", AUTO_MAPS)
def test_a_known_model_that_names_code_is_refused_too(plain, tmp_path, file, capsys):
    own = hostile(plain, tmp_path / "own", file)
    named = "names some under auto_map; PRISM never runs it"
    for key, arguments in {
        "model.policy": ("rlvr", *settings(plain, tmp_path), "--model.policy", own),
        "model.discriminator": ("align", "--run.folder", tmp_path / "run", "--model.discriminator", own),
        "--model": ("eval", "--model", own, "--data", plain.parent / "rlvr.jsonl"),
    }.items():
        assert cli.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert f"{key}: expected a model without code of its own, {file} of " in error and named in error
    assert not (own / "ran").exists()


def test_transformers_itself_is_told_to_run_no_code(plain, tmp_path, monkeypatch):
    # what the loaders do where our own check has not seen the file
    monkeypatch.setattr(building, "family_of", lambda *_, **__: "qwen3_vl")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for number, file in enumerate(AUTO_MAPS):
        own = hostile(plain, tmp_path / str(number), file)
        building.load_encoder("model.policy", str(own))
        building.load_dense("model.policy", str(own), "auto")
        assert not (own / "ran").exists()
    own = hostile(plain, tmp_path / "other", "config.json", known=False)
    for load in (load_discriminator, lambda folder: upcycle(folder, 2, 1)):
        with pytest.raises(ValueError, match=r"contains custom code"):
            load(own)
    assert not (own / "ran").exists()


OTHERS = ("qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_omni_moe", "internvl", "internvl_chat", "llava_onevision", None)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_with_what_is_supported(family, tmp_path, capsys):
    # without weights: they are not read
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} if family else {}))
    for key, command in (("model.policy", "sft"), ("model.discriminator", "warmup")):
        arguments = [command, "--run.folder", str(tmp_path / "run"), f"--{key}", str(tmp_path)]
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"{key}: expected a Qwen3-VL, of type qwen3_vl" in error and f"is of type {family!r}" in error
        assert "PRISM trains no other models, and reads images but no videos" in error


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"text_config": 3}'])
def test_a_broken_config_is_named(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["sft", "--run.folder", str(tmp_path / "run"), "--model.policy", str(tmp_path)]) == 2
    assert "model.policy: expected a" in capsys.readouterr().err


def test_a_mixture_of_experts_is_refused_as_a_policy_before_its_weights_are_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    assert cli.main(["sft", "--run.folder", str(tmp_path / "run"), "--model.policy", str(tmp_path)]) == 2
    assert "model.policy: expected a Qwen3-VL, of type qwen3_vl, " in capsys.readouterr().err


def test_weights_of_the_hub_are_downloaded_last_and_of_the_same_version(tmp_path, monkeypatch):
    wanted = []

    def download(name, allow_patterns, revision=None, **_):
        wanted.append((revision, any("safetensors" in pattern for pattern in allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(building, "snapshot_download", download)
    (tmp_path / "config.json").write_text('{"model_type": "internvl"}')
    with pytest.raises(ConfigError, match="'org/name' is of type 'internvl'"):
        checkpoint_folder("model.policy", "org/name")
    with pytest.raises(ConfigError, match="'org/name' is of type 'internvl'"):
        checkpoint_folder("model.policy", "org/name", download=False)
    assert wanted == [(None, False)] * 2
    wanted.clear()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert checkpoint_folder("model.policy", "org/name") == tmp_path
    assert wanted == [(None, False), (tmp_path.name, True)]


def calls_in_text(text):
    """The arguments of each call of from_pretrained in a page or a docstring."""
    for match in re.finditer(r"from_pretrained\(", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[match.end() : end - 1]


def test_every_load_forbids_code_of_the_folder():
    sources = [path for name in ("prism", "prism_kernels", "bench", "docs") for path in (ROOT / name).rglob("*.py")]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    calls, forbidding = 0, "trust_remote_code=False"
    for path in sources:
        tree = ast.parse(path.read_text())
        called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            name = getattr(node, "attr", getattr(node, "id", None))
            if name == "from_pretrained":
                # a loader that is passed on could be called without the argument
                call = called.get(id(node))
                assert call is not None and forbidding in ast.unparse(call), f"{path}:{node.lineno}"
                calls += 1
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and node.value.value), path
        for text in (
            ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if hasattr(node, "body") and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ):
            assert all(forbidding in arguments for arguments in calls_in_text(text)), path
    for path in pages:
        assert all(forbidding in arguments for arguments in calls_in_text(path.read_text())), path
    assert calls >= 5
