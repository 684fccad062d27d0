"""No image takes more pixels than `model.max_image_pixels`, and the limit is part of the saved processor."""

import itertools
import json
import random

import pytest
from PIL import Image
from plain_folder import PIXELS, chat, problem, released_processor, write_folder, write_picture, write_rows
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism import cli
from prism.config import ConfigError, load_config
from prism.models.building import limit_images, policy_encoder
from prism.models.prompts import ImageSizeError, PromptEncoder
from prism.models.tiny import tiny_image_processor, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def pixels(processor, width, height):
    """The pixels of an image after scaling, by transformers' own rule."""
    return processor.get_number_of_image_patches(height, width) * processor.patch_size**2


def sizes(most, seed):
    """Images of every aspect up to 200, around the limit and the other sizes where the rule changes."""
    rng = random.Random(seed)
    for area, aspect in itertools.product((most / 300, most / 40, most / 3, most, 3 * most), (1, 1.3, 2, 7, 40, 199)):
        short = max(4, int((area * rng.uniform(0.7, 1.4) / aspect) ** 0.5))
        yield int(short * aspect), short
        yield short, int(short * aspect)


PROCESSORS = {
    "qwen3": released_processor,
    "qwen2": lambda: released_processor(patch_size=14, size={"shortest_edge": 3136, "longest_edge": 1003520}),
    "tiny": tiny_image_processor,
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("most", [1024, 1500, 5000, 20000, 65535, 65536, 70000, 131072, 262144, 1000000])
def test_no_image_takes_more_pixels_than_the_limit(name, most, tokenizer):
    processor = limit_images(PROCESSORS[name](), most)
    factor = processor.patch_size * processor.merge_size
    for width, height in sizes(most, most):
        taken = pixels(processor, width, height)
        if max(width, height) / min(width, height) <= most / factor**2:
            assert taken <= most, (width, height)
        if taken > most:
            with pytest.raises(ImageSizeError, match=rf"at most {most} pixels, .* got {taken} for {width}x{height}"):
                PromptEncoder(tokenizer, processor).encode("?", [Image.new("RGB", (width, height))])


def test_the_limit_keeps_the_processors_own_treatment_of_small_images_where_both_fit():
    for most in (183_000, 262144, 1000000):
        assert limit_images(released_processor(), most).size["shortest_edge"] == PIXELS["shortest_edge"]
    # scaled up as far as the limit allows for any aspect
    assert 10_000 < limit_images(released_processor(), 65536).size["shortest_edge"] < 65536
    assert limit_images(released_processor(), None).size == PIXELS


def test_encoded_images_are_within_the_limit(tokenizer):
    encoder = PromptEncoder(tokenizer, limit_images(released_processor(), 20000))
    images = [Image.new("RGB", size) for size in ((20, 20), (100, 130), (1600, 1200), (640, 90))]
    prompt = encoder.encode("<image>" * 4, images)
    taken = (prompt.image_grid_thw.prod(-1) * 256).tolist()
    assert max(taken) <= 20000 and len(prompt.pixel_values) == sum(taken) // 256
    assert prompt.input_ids.count(encoder.image_token_id) == sum(taken) // 1024


def test_the_limit_holds_for_the_tiny_policy_too_and_one_token_is_its_least_value():
    limited = policy_encoder(load_config(None, {"model.max_image_pixels": 4096}))
    assert limited.image_processor.size["longest_edge"] == 4096
    assert limited.encode("?", [Image.new("RGB", (256, 256))]).image_grid_thw.tolist() == [[1, 4, 4]]
    with pytest.raises(ConfigError, match=r"model.max_image_pixels: expected at least 1024, the pixels of one image"):
        policy_encoder(load_config(None, {"model.max_image_pixels": 1023}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and data files with images of mixed sizes."""
    folder = tmp_path_factory.mktemp("limit")
    write_folder(folder / "model")
    for index, (width, height) in enumerate(((1600, 1200), (100, 130), (40, 40), (640, 90))):
        write_picture(folder / f"{index}.png", width, height)
    write_picture(folder / "narrow.png", 3000, 20)
    rows = [chat(f"<image>how many {index}?", [f"{index}.png"]) for index in range(4)]
    write_rows(folder / "sft.jsonl", [*rows, chat("<image><image>?", ["0.png", "2.png"]), chat("how many?")])
    write_rows(folder / "narrow.jsonl", [problem("<image>?", ["narrow.png"]), problem("?")])
    return folder


def settings(folder, most):
    return (
        *("--model.policy", str(folder / "model"), "--model.dtype", "bfloat16", "--model.max_image_pixels", str(most)),
        *("--data.source", "files", "--data.files.sft", str(folder / "sft.jsonl"), "--data.prompt_tokens", "60"),
        *("--data.response_tokens", "16", "--optimiser.sft.steps", "1", "--optimiser.sft.batch", "4"),
        *("--memory.pack_tokens", "256", "--rollout.align.max_new_tokens", "8", "--rollout.rlvr.max_new_tokens", "8"),
        *("--log.console", "quiet", "--evaluation.max_new_tokens", "8", "--memory.activation_checkpointing", "true"),
    )


def test_a_limited_run_saves_and_exports_its_processor(folder, tmp_path, capsys):
    run = ("sft", *settings(folder, 20000), "--run.folder", str(tmp_path / "run"))
    assert cli.main([*run, "--dry-run"]) == 0
    assert "6 of 6 rows can be used" in capsys.readouterr().out
    assert cli.main(list(run)) == 0
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    wanted = dict(limit_images(released_processor(), 20000).size)
    for saved in (tmp_path / "run" / "policy", tmp_path / "out"):
        assert json.loads((saved / "preprocessor_config.json").read_text())["size"] == wanted
        assert Qwen2VLImageProcessorPil.from_pretrained(saved, trust_remote_code=False).size == wanted
    # the saved model goes on with the same limit, also if it is limited anew
    config = load_config(None, {"model.policy": str(tmp_path / "out")})
    assert policy_encoder(config).image_processor.size == wanted


def test_wrong_limits_and_narrow_images_are_named(folder, tmp_path, capsys):
    run = ("sft", *settings(folder, 1000), "--run.folder", str(tmp_path / "run"))
    for arguments in ((*run, "--dry-run"), run):
        assert cli.main(list(arguments)) == 2
        assert "model.max_image_pixels: expected at least 1024" in capsys.readouterr().err
    rows = ("--run.stages", "rlvr", "--data.files.rlvr", str(folder / "narrow.jsonl"))
    assert cli.main(["run", *settings(folder, 20000), *rows, "--run.folder", str(tmp_path), "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 rows can be used" in out and "image size: 1; the first: " in out
