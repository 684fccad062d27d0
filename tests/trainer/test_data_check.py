"""`prism data check`: it tells what a run would skip, by cause, without a model."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as arrow
import pytest
from loader_cases import chat, problem, warmup, without, write_images, write_lines
from pyarrow import parquet

from prism import cli
from prism.models.sizes import TinySize
from prism.models.tiny import save_tiny, tiny_image_processor, tiny_policy

ROOT = Path(__file__).parents[2]
SIZE = TinySize(hidden_size=32, intermediate_size=48, layers=1, heads=2, key_value_heads=1, vision_hidden_size=32)


def check(capsys, *arguments):
    """Returns the exit status, the output with single spaces, and the errors."""
    status = cli.main(["data", "check", *map(str, arguments)])
    output = capsys.readouterr()
    return status, " ".join(output.out.split()), output.err


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def test_good_files_are_told_apart_by_their_fields(tmp_path, capsys):
    write_images(tmp_path)
    rows = {"sft": chat, "pairs": warmup, "problems": problem}
    files = [write_lines(tmp_path / f"{name}.jsonl", [make(n) for n in range(3)]) for name, make in rows.items()]
    spoken = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    files.append(tmp_path / "spoken.parquet")
    parquet.write_table(arrow.Table.from_pylist([{**chat(messages=None), "conversations": spoken}] * 2), files[-1])
    status, output, errors = check(capsys, *files)
    assert (status, errors) == (0, "")
    kinds = ("chats, for sft", "pairs, for warmup", "problems, for align, rlvr, validation and test", "chats, for sft")
    for path, kind, count in zip(files, kinds, (3, 3, 3, 2)):
        assert f"{path} ({kind}): {count} of {count} rows can be used" in output
    assert "3 of them have a teacher's response, which align needs" in output
    assert "not checked without --model: the tokens of prompts and responses" in output
    assert check(capsys, tmp_path)[0] == 0


def test_bad_rows_are_counted_by_cause(tmp_path, capsys):
    write_images(tmp_path)
    rows = [
        *[problem(n) for n in range(5)],
        without(problem(), "teacher_response"),
        problem(images=["images/gone.png"]),
        problem(images=["images/gone.png"]),
        problem(prompt=[{"role": "user", "content": "<image>[b]<|im_end|>"}]),
        b"{",
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    status, output, errors = check(capsys, path)
    assert (status, errors) == (1, "")
    assert f"{path} (problems, for align, rlvr, validation and test): 6 of 10 rows can be used" in output
    assert f"image not found 2 20.0% row 7: images.0: expected an image at {tmp_path}/images/gone.png" in output
    assert "special token 1 10.0% row 9: prompt.0.content: expected text without <|im_end|>" in output
    assert "got '<image>[b]<|im_end|>'" in output and "not JSON 1 10.0% row 10: " in output
    assert "5 of them have a teacher's response" in output


def test_a_file_whose_fields_name_no_schema_is_an_error(tmp_path, capsys):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}])
    status, output, errors = check(capsys, path)
    assert (status, output) == (2, "")
    assert errors.startswith(f"prism data check: {path}: expected the fields messages or conversations (chat)")
    assert "got text, label; name a --schema" in errors
    status, output, _ = check(capsys, path, "--schema", "chat")
    assert status == 1 and "missing field 1 100.0% row 1: messages: expected this field" in output
    (tmp_path / "rows.jsonl").write_text("")
    assert check(capsys, path)[0] == 2
    assert check(capsys, path, "--schema", "chat")[0] == 1


def test_what_cannot_be_read_is_an_error(tmp_path, capsys):
    (tmp_path / "text.parquet").write_text("this is no parquet")
    for path in (tmp_path / "gone.jsonl", tmp_path / "text.parquet"):
        status, _, errors = check(capsys, path)
        assert status == 2 and errors.startswith(f"prism data check: {path}: expected a")
    path = write_lines(tmp_path / "rows.jsonl", [chat(images=[], messages=chat()["messages"][1:])])
    status, _, errors = check(capsys, path, "--model", tmp_path)
    assert status == 2 and "--model: expected a folder with a config.json" in errors
    status, _, errors = check(capsys, path, "--prompt_tokens", "100")
    assert status == 2 and "--prompt_tokens: expected with --model" in errors
    for arguments in ([], ["x.jsonl", "--schema", "sft"]):
        with pytest.raises(SystemExit) as end:
            check(capsys, *arguments)
        assert end.value.code == 2


def test_images_elsewhere(tmp_path, capsys):
    write_images(tmp_path / "elsewhere")
    path = write_lines(tmp_path / "rows.jsonl", [chat()])
    assert check(capsys, path)[0] == 1
    assert check(capsys, path, "--image_root", tmp_path / "elsewhere")[0] == 0
    path = write_lines(tmp_path / "rows.jsonl", [chat(images=["http://127.0.0.1:9/a.png"])])
    assert "allow_remote_images" in check(capsys, path)[1]
    assert "expected a host with a public address" in check(capsys, path, "--remote_images")[1]


def test_a_model_counts_tokens_without_its_weights(tmp_path, capsys):
    model, tokenizer = tiny_policy(SIZE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CUT]"]})
    save_tiny(tmp_path / "policy", model, tokenizer, tiny_image_processor(SIZE))
    for weights in (tmp_path / "policy").glob("*.safetensors"):
        weights.unlink()
    write_images(tmp_path)
    rows = [problem(0), without(problem(1), "teacher_response"), problem(2, prompt=[{"role": "user", "content":
            "<image>" + "why " * 50}]), problem(3, prompt=[{"role": "user", "content": "<image>[CUT]"}])]  # fmt: skip
    path = write_lines(tmp_path / "rows.jsonl", rows)
    status, output, _ = check(capsys, path, "--model", tmp_path / "policy")
    assert status == 1 and "3 of 4 rows can be used" in output and "special token 1" in output
    longest = int(output.split("the longest prompt has ")[1].split()[0])
    assert longest > 50 and "the longest response has " in output and "not checked" not in output
    status, output, _ = check(capsys, path, "--model", tmp_path / "policy", "--prompt_tokens", longest - 1)
    assert "2 of 4 rows can be used" in output and "too long 1" in output
    status, output, _ = check(capsys, path, "--model", tmp_path / "policy", "--response_tokens", 5)
    assert "1 of 4 rows can be used" in output and "too long 2" in output


def test_without_a_model_torch_is_not_imported(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [without(chat(messages=chat()["messages"]), "images")])
    code = "import sys; from prism import cli; print(cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "data", "check", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert process.stdout.splitlines()[-1] == "1 False" and process.stderr == ""
