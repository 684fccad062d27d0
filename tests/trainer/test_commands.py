"""The commands of single stages, and `upcycle`, `eval` and `export`."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes_files import write_problems
from transformers import AutoModelForImageTextToText, AutoTokenizer

from prism import cli
from prism.config import ConfigError, load_config
from prism.discriminator.storage import load_discriminator, save_discriminator
from prism.evaluation import assessment
from prism.models import building
from prism.models.building import build_discriminator, plain_policy
from prism.rollout import batch as rollouts
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

SMALL = """
[model.tiny]
hidden_size = 32
intermediate_size = 48
layers = 2
heads = 2
key_value_heads = 1
vision_hidden_size = 32
[data]
prompt_tokens = 96
response_tokens = 128
[data.shapes]
sft = 64
sft_curated = 8
alignment = 16
rl = 64
validation = 8
test = 8
[rollout]
align = {prompts = 2, group = 3, max_new_tokens = 12}
rlvr = {prompts = 2, group = 3, max_new_tokens = 12}
[optimiser]
sft = {steps = 2, batch = 4}
warmup = {steps = 2, batch = 4}
align = {steps = 2}
rlvr = {steps = 2}
[checkpoint]
every = 1
[evaluation]
samples = 4
max_new_tokens = 12
sampled = false
[log]
console = "quiet"
"""


def texts_of(rollouts, encoder):
    """Responses of a valid form, which an untrained policy does not give. Their text depends on its tokens."""
    texts = []
    for rollout in rollouts:
        number = sum(rollout.token_ids) % 4
        items = "\n".join(["- red star, middle"] * (1 + number))
        answer = ("1", "2", "left", "red")[number]
        texts.append(f"<caption>\n{items}\n</caption>\n<think>\nSo {answer}.\n</think>\n<answer>{answer}</answer>")
    return texts


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folders of a run over all stages, and of the same stages run one command at a time."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "small.toml").write_text(SMALL)

    def prism(command, name, **models):
        flags = [part for key, path in models.items() for part in (f"--model.{key}", str(folder / path))]
        arguments = [command, "--config", str(folder / "small.toml"), "--run.folder", str(folder / name), *flags]
        assert cli.main(arguments) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "decode", texts_of)
        prism("run", "whole")
        prism("upcycle", "base")
        prism("sft", "sft")
        prism("warmup", "warmup", policy="sft/policy", discriminator="base/discriminator")
        prism("align", "align", policy="sft/policy", discriminator="warmup/discriminator")
        prism("rlvr", "rlvr", policy="align/policy")
    return folder


def tensors(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(ours[name], wanted[name]), name


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_single_stages_one_after_the_other_are_the_whole_run(chain):
    assert_equal(tensors(chain / "rlvr/policy"), tensors(chain / "whole/policy"))
    assert_equal(tensors(chain / "align/discriminator"), tensors(chain / "whole/discriminator"))
    # each stage must change something, or equality would show nothing
    for before, after in (("sft", "align"), ("align", "rlvr")):
        assert differ(tensors(chain / before / "policy"), tensors(chain / after / "policy"))
    for before, after in (("base", "warmup"), ("warmup", "align")):
        assert differ(tensors(chain / before / "discriminator"), tensors(chain / after / "discriminator"))
    assert_equal(tensors(chain / "sft/policy"), tensors(chain / "warmup/policy"))
    # a stage without a discriminator neither loads nor writes one
    assert not (chain / "sft/discriminator").exists() and not (chain / "rlvr/discriminator").exists()


def test_upcycle_writes_the_first_discriminator_of_a_run_and_prints_the_change(chain, tmp_path, capsys):
    config = load_config(chain / "small.toml")
    wanted = build_discriminator(config, plain_policy(config)[0])
    assert_equal(load_discriminator(chain / "base/discriminator").state_dict(), wanted.state_dict())
    changes = {}
    for noise in (0.0, 0.01, 0.1):
        flags = ["--discriminator.noise", str(noise), "--run.folder", str(tmp_path / str(noise))]
        assert cli.main(["upcycle", "--config", str(chain / "small.toml"), *flags]) == 0
        changes[noise] = json.loads((tmp_path / str(noise) / "upcycle.json").read_text())
        output = capsys.readouterr().out
        assert f"4 experts, 2 a token, noise {noise:g}" in output and str(tmp_path / str(noise)) in output
        assert f"{changes[noise]['logit_change']:.3%}" in output
    assert changes[0.0]["logit_change"] < 1e-5 < changes[0.01]["logit_change"] < changes[0.1]["logit_change"] < 0.1
    assert cli.main(["upcycle", "--run.folder", str(tmp_path / "0.1")]) == 2
    assert "run.folder: expected another one than that of `prism upcycle`" in capsys.readouterr().err
    assert cli.main(["upcycle", "--discriminator.dense", "--run.folder", str(tmp_path / "new")]) == 2
    assert "discriminator.dense: expected false" in capsys.readouterr().err


def made(chain, folder, wanted, **settings):
    """A discriminator with a value head and biases that are not zero, its folder, and settings that name it."""
    config = load_config(chain / "small.toml", {f"discriminator.{key}": value for key, value in settings.items()})
    model = build_discriminator(config, plain_policy(config)[0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_head" in name or "kind_bias" in name:
                parameter.normal_(generator=generator)
    save_discriminator(model, folder, **wanted)
    return model, {"model.discriminator": str(folder)} | {f"discriminator.{key}": v for key, v in settings.items()}


@pytest.mark.parametrize(
    "settings, wrong",
    [
        ({}, {"experts": 8}),
        ({"kind_bias": True, "experts": 3}, {"kind_bias": False, "top_k": 1}),
        ({"images": False}, {"images": True}),
        ({"dense": True}, {"dense": False}),
    ],
    ids=["moe", "biases", "text", "dense"],
)
def test_a_discriminators_folder_is_loaded_unchanged_and_settings_that_differ_are_errors(
    chain, tmp_path, settings, wrong
):
    model, named = made(chain, tmp_path, {}, **settings)
    config = load_config(chain / "small.toml", named)
    # there is no model that it could be upcycled from
    loaded = build_discriminator(config, None)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert (loaded.images, loaded.kind_bias) == (model.images, model.kind_bias)
    # aligned: results must not depend on whether weights were made or loaded
    policy = building.load_dense("model.policy", str(chain / "whole/policy"), torch.float32)
    assert all(p.data_ptr() % 64 == 0 for m in (model, loaded, policy) for p in m.parameters())
    for key, value in wrong.items():
        other = load_config(chain / "small.toml", {**named, f"discriminator.{key}": value})
        with pytest.raises(ConfigError, match=rf"discriminator.{key}: expected .*got {str(value).lower()}"):
            build_discriminator(other, None)


def test_published_discriminators_are_read_with_either_value_head_also_from_the_hub(chain, tmp_path, monkeypatch):
    model, _ = made(chain, tmp_path, {"layout": "published"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["discriminator_images"], config["discriminator_kind_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tensors(tmp_path)
    weight = weights.pop("v_head.weight")
    fetched = []

    def download(name, allow_patterns, **_):
        fetched.append((name, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(building, "snapshot_download", download)
    settings = load_config(chain / "small.toml", {"model.discriminator": "some/discriminator"})
    save_file({**weights, "v_head.summary.weight": weight}, tmp_path / "model.safetensors")
    assert_equal(build_discriminator(settings, None).state_dict(), model.state_dict())
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({"weight": weight}, tmp_path / "value_head.pt")
    assert_equal(build_discriminator(settings, None).state_dict(), model.state_dict())
    # the weights last
    assert fetched == [("some/discriminator", False), ("some/discriminator", True)] * 2
    del config["expert_layout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model.discriminator: .*expert_layout in config.json, got neither"):
        build_discriminator(settings, None)


def test_folders_without_the_model_are_errors_that_say_what_was_expected(chain, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        assert cli.main(list(arguments)) == 2
        return capsys.readouterr().err

    small = ("--config", str(chain / "small.toml"), "--run.folder", str(tmp_path / "new"))
    whole = str(chain / "whole")
    assert "did you mean" in error("rlvr", *small, "--model.policy", whole)
    assert f"{whole}/discriminator" in error("align", *small, "--model.discriminator", whole)
    assert "with a config.json, got" in error("rlvr", *small, "--model.policy", str(tmp_path / "gone"))
    assert "expected a Qwen3-VL, of type qwen3_vl," in error("rlvr", *small, "--model.policy", f"{whole}/discriminator")
    headless = tmp_path / "headless"
    shutil.copytree(f"{whole}/policy", headless)
    weights = tensors(headless)
    del weights["lm_head.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 tensors, the first is lm_head.weight" in error("rlvr", *small, "--model.policy", str(headless))
    monkeypatch.chdir(chain)
    assert "model.policy: expected a folder with a config.json" in error("rlvr", *small, "--model.policy", "whole/rlvr")
    assert "which it would write over" in error(
        "align", "--run.folder", "warmup", "--model.discriminator", "warmup/discriminator"
    )
    assert "`prism sft` is one stage" in error("sft", *small, "--run.stages", "sft,rlvr")
    assert not (tmp_path / "new").exists()

    def unreachable(name, **_):
        raise OSError("no such repository\nand more")

    monkeypatch.setattr(building, "snapshot_download", unreachable)
    assert "or a model of the hub, got 'some/model': no such repository\n" in error(
        "rlvr", *small, "--model.policy", "some/model"
    )


def test_eval_prints_figures_with_standard_errors_by_source(chain, tmp_path, monkeypatch, capsys):
    samples = list(ShapesWorld().samples("test", 70))
    write_problems(tmp_path / "problems.jsonl", samples)
    with (tmp_path / "problems.jsonl").open("a") as file:
        chat = [{"role": "user", "content": "long " * 5000}]
        too_long = {"data_source": "x", "prompt": chat, "reward_model": {"ground_truth": "1"}}
        file.write("{}\n" + json.dumps(too_long) + "\n")
    # responses of the careful teacher, every third without a valid form
    texts = ["no form" if i % 3 == 0 else sample.response.text for i, sample in enumerate(samples)]
    figures = {}
    for data, flags in ((str(tmp_path / "problems.jsonl"), []), ("shapes:test", ["--samples", "70"])):
        left = iter(texts)
        monkeypatch.setattr(assessment, "decode", lambda rollouts, encoder, left=left: [next(left) for _ in rollouts])
        flags += ["--model", str(chain / "whole/policy"), "--data", data, "--out", str(tmp_path / "figures.json")]
        assert cli.main(["eval", *flags, "--max_new_tokens", "2", "--temperature", "1"]) == 0
        figures[data] = json.loads((tmp_path / "figures.json").read_text())
        table = capsys.readouterr().out.split("standard errors\n")[1]
        assert max(map(len, table.splitlines())) <= 80
        assert ["all", "70", "65.7", "±5.7"] in [line.split()[:4] for line in table.splitlines()]
        assert "shapes/comparison" in table and "…" not in table
    ours, world = figures.values()
    assert ours["skipped"] == {"missing field": 1, "too long": 1} and world["skipped"] == {}
    for part in (ours, world):
        rows = {"all": part["all"], **part["by_source"]}
        assert {name: row["samples"] for name, row in rows.items()} == {"all": 70} | {
            f"shapes/{kind}": sum(s.question.kind == kind for s in samples)
            for kind in sorted({s.question.kind for s in samples})
        }
        for name, row in rows.items():
            valid = [i % 3 != 0 for i, s in enumerate(samples) if name in ("all", f"shapes/{s.question.kind}")]
            share = sum(valid) / len(valid)
            for figure in ("accuracy", "format"):
                assert row[figure] == pytest.approx(share)
                assert row[f"{figure}_se"] == pytest.approx(math.sqrt(share * (1 - share) / len(valid)))
            assert 1 <= row["length"] <= 2
            if part is world:
                assert row["perception_error"] == row["reasoning_error"] == pytest.approx(1 - share)
    # what the scene was is not in the file
    assert "perception_error" not in ours["all"]
    # the same draws, the same images
    assert ours["all"]["length"] == world["all"]["length"]


def test_eval_gives_the_figures_of_the_run(chain, tmp_path):
    arguments = ["--model", str(chain / "whole/policy"), "--data", "shapes:test", "--samples", "8"]
    assert cli.main(["eval", *arguments, "--max_new_tokens", "12", "--out", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["all"]
    known = json.loads((chain / "whole/evaluations.json").read_text())["rlvr"]["test"]
    for name in ("samples", "accuracy", "format", "length", "perception_error", "reasoning_error"):
        assert figures[name] == pytest.approx(known[name]), name


def test_an_exported_policy_gives_the_same_logits_in_plain_transformers(chain, tmp_path, capsys):
    assert cli.main(["export", "--run", str(chain / "whole"), "--to", str(tmp_path / "out")]) == 0
    assert "finished; fill in `license:`" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = load_config(chain / "small.toml", {"model.policy": str(chain / "whole/policy")})
    ours, encoder = plain_policy(config)
    sample = next(ShapesWorld().samples("test", 1))
    prompt = problem_of(sample).encoded(encoder)
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == encoder.image_token_id).int()}
    inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, ours.eval()(**inputs).logits)
    assert tokenizer("<think>red star")["input_ids"] == encoder.tokenizer("<think>red star")["input_ids"]
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# license: to be filled in" in card
    assert "base_model" not in card and "knows nothing else" in card
    assert "| align | adversarial alignment" in card and "| 2 of 2 |" in card
    known = json.loads((chain / "whole/evaluations.json").read_text())
    assert f"| rlvr | test | 8 | {known['rlvr']['test']['accuracy']:.3f} ±" in card
    assert "hidden_size = 32" in card
    # nothing is written over
    assert cli.main(["export", "--run", str(chain / "whole"), "--to", str(tmp_path / "out")]) == 2
    assert "--to: expected a folder that does not exist yet" in capsys.readouterr().err


def test_export_takes_the_newest_undamaged_checkpoint_of_an_unfinished_run(chain, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(chain / "rlvr", run)
    shutil.rmtree(run / "policy")

    def export(to):
        status = cli.main(["export", "--run", str(run), "--to", str(tmp_path / to)])
        output = capsys.readouterr()
        return status, output.out + output.err

    # the figures say that it is finished
    status, output = export("none")
    assert status == 2 and "expected the policy that a finished run leaves" in output
    assert not (tmp_path / "none").exists()
    (run / "evaluations.json").unlink()
    status, output = export("end")
    assert status == 0 and "not finished: this is its checkpoint of the end of rlvr" in output
    assert_equal(tensors(tmp_path / "end"), tensors(chain / "rlvr/policy"))
    newest = sorted(path for path in (run / "checkpoints").iterdir())[-1]
    (newest / "policy.safetensors").write_bytes(b"damaged")
    status, output = export("before")
    assert status == 0 and "not finished: this is its checkpoint of step 1 of rlvr" in output
    assert "step 1 of rlvr" in (tmp_path / "before/README.md").read_text()
    assert newest.exists() and differ(tensors(tmp_path / "before"), tensors(tmp_path / "end"))
    shutil.rmtree(run / "checkpoints")
    status, output = export("nothing")
    assert status == 2 and "expected a finished run or a checkpoint in" in output
