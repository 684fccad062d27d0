"""Our inputs beside those of transformers' own processor: `prism doctor --model --data`, and the start of a run."""

import json
import shutil
import sys

import pytest
import torch
from plain_folder import chat, problem, write_folder, write_picture, write_rows

from prism import cli
from prism.models import parity
from prism.models.parity import Reference
from prism.models.prompts import PromptEncoder

SIZES = ((1600, 1200), (100, 130), (40, 40), (640, 90), (33, 70), (300, 300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and files of every schema: images of mixed sizes, several of them, none."""
    folder = tmp_path_factory.mktemp("parity")
    write_folder(folder / "model")
    pictures = [f"images/{index}.png" for index in range(len(SIZES))]
    for path, (width, height) in zip(pictures, SIZES):
        write_picture(folder / path, width, height)
    system = {"role": "system", "content": "Answer in three parts."}
    with_system = problem("<image>which? (A) 1 (B) 2", [pictures[0]])
    with_system["prompt"].insert(0, system)
    problems = [
        *(problem(f"<image>how many {index}?", [path]) for index, path in enumerate(pictures[1:4])),
        problem("<image>and <image>: which is larger?\n<image>", pictures[3:6]),
        problem("2 + 2?"),
        with_system,
    ]
    write_rows(folder / "rlvr.jsonl", problems)
    turns = chat("<image>?", pictures[:1])
    more = {"role": "user", "content": "<image>and here?"}, {"role": "assistant", "content": "2"}
    turns = {"messages": [system, *turns["messages"], *more], "images": pictures[:2]}
    write_rows(folder / "sft.jsonl", [chat("<image>?", pictures[4:5]), turns, chat("2 + 2?")])
    cot = "<think>t</think><answer>1</answer>"
    pair = {
        f"{who}_{part}": cot if part == "cot" else "c" for who in ("teacher", "student") for part in ("cot", "caption")
    }
    rows = [{"image": pictures[1], "question": "how many?"}, {"images": pictures[2:4], "question": "<image>or<image>?"}]
    write_rows(folder / "warmup.jsonl", [pair | row for row in [*rows, {"question": "2 + 2?"}]])
    return folder


def doctor(folder, name="rlvr", model=None):
    return cli.main(["doctor", "--model", str(model or folder / "model"), "--data", str(folder / f"{name}.jsonl")])


def run(folder, to, *changes):
    return cli.main(
        [
            *("sft", "--model.policy", str(folder / "model"), "--model.dtype", "bfloat16", "--data.source", "files"),
            *("--data.files.sft", str(folder / "sft.jsonl"), "--data.files.rlvr", str(folder / "rlvr.jsonl")),
            *("--data.prompt_tokens", "4096", "--data.response_tokens", "16", "--memory.pack_tokens", "8192"),
            *("--optimiser.sft.steps", "1", "--optimiser.sft.batch", "1", "--run.folder", str(to)),
            *("--rollout.align.max_new_tokens", "8", "--rollout.rlvr.max_new_tokens", "8"),
            *("--evaluation.max_new_tokens", "8", *changes),
        ]
    )


@pytest.mark.parametrize(("name", "rows"), [("rlvr", 6), ("sft", 3), ("warmup", 3)])
def test_doctor_compares_rows_of_every_schema(folder, name, rows, capsys):
    assert doctor(folder, name) == 0
    out = capsys.readouterr().out
    assert out.count(f"{name}.jsonl, row ") == rows and "off" not in out and out.count("equal") == 2 * rows
    assert "ours / transformers' processor with PIL (torchvision is not installed)" in out
    assert "none" in out and ", " in out


def test_a_run_begins_with_the_check(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run") == 0
    out = capsys.readouterr().out
    # three rows of each file: one image, several, none
    assert "the inputs of 6 rows with 7 images equal those of transformers' processor with PIL (torchvision" in out
    # the limit of pixels holds on both sides
    assert run(folder, tmp_path / "limited", "--model.max_image_pixels", "20000") == 0
    assert "the inputs of 6 rows" in capsys.readouterr().out


def wrong_positions(*arguments, **options):
    # the time of every image as in video models: each row of patches one later
    positions = correct_positions(*arguments, **options).clone()
    positions[0] = positions[1]
    return positions


correct_positions = parity.prompt_positions


def without_an_image_token(self, ids, images):
    encoded = correct_patches(self, ids, images)
    if not images:
        return encoded
    place = ids.index(self.image_token_id)
    return encoded._replace(input_ids=ids[:place] + ids[place + 1 :])


def darker(self, ids, images):
    return correct_patches(
        self, ids, [image.convert("RGB").point(lambda level: max(level - 12, 0)) for image in images]
    )


def other_words(self, ids, images):
    return correct_patches(self, [*ids[:-2], 0, ids[-1]], images)


correct_patches = PromptEncoder.with_patches

WRONG = {
    "positions": (parity, "prompt_positions", wrong_positions, "positions differ by up to "),
    "image tokens": (PromptEncoder, "with_patches", without_an_image_token, "image tokens, transformers has"),
    "pixels": (PromptEncoder, "with_patches", darker, "pixels differ by up to 12 of 255 grey levels"),
    "tokens": (PromptEncoder, "with_patches", other_words, "the first different token is the one at"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_difference_stops_the_run_and_says_how_large_it_is(folder, tmp_path, kind, monkeypatch, capsys):
    owner, name, wrong, said = WRONG[kind]
    if kind == "image tokens":
        # our positions refuse such a prompt
        monkeypatch.setattr(parity, "prompt_positions", lambda ids, *_, **__: torch.zeros(3, len(ids)))
    monkeypatch.setattr(owner, name, wrong)
    assert run(folder, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert said in error and "model.policy: expected the inputs of transformers' processor" in error
    assert f"`prism doctor --model {folder / 'model'} --data {folder}" in error
    assert not (tmp_path / "run").exists()
    assert doctor(folder) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "rows differ" in captured.err and "rlvr.jsonl, row 1" in captured.out


def test_another_chat_template_of_the_processor_is_a_difference(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert doctor(folder, model=model) == 0
    (model / "chat_template.json").write_text(
        json.dumps({"chat_template": "<|im_start|>system\nBe kind.\n" + template})
    )
    assert doctor(folder, model=model) == 2
    assert "tokens, transformers has" in capsys.readouterr().err


def test_a_processor_of_another_model_is_refused(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    processor = json.loads((model / "preprocessor_config.json").read_text())
    for name, value in {"patch_size": 14, "temporal_patch_size": 1, "merge_size": 1}.items():
        (model / "preprocessor_config.json").write_text(json.dumps(processor | {name: value}))
        assert doctor(folder, model=model) == 2
        assert (
            f"{name} = {processor[name]}, as in config.json of {str(model)!r}, got {value};" in capsys.readouterr().err
        )


def test_a_torchvision_of_another_torch_is_not_used_and_named(folder, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    reference = Reference("--model", folder / "model")
    assert "with PIL (torchvision cannot be imported: operator torchvision::nms" in reference.made_with
    assert reference.levels == 0.0


def test_doctor_says_what_it_needs(folder, capsys):
    assert cli.main(["doctor", "--model", str(folder / "model")]) == 2
    assert "expected --model and --data together" in capsys.readouterr().err
    assert doctor(folder, "none") == 2
    assert "--data: expected a file or folder of rows" in capsys.readouterr().err
    write_rows(folder / "bad.jsonl", [problem("<image>?")])
    assert doctor(folder, "bad") == 2
    assert "expected a row that can be used, got none among 1" in capsys.readouterr().err
