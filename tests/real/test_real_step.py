"""A step of alignment after a resume: layers are computed again in the backward pass, and images keep to the cap."""

import random
import shutil

import pytest
import torch
from PIL import Image
from real_data import PICTURES, Writer, example
from real_folder import VOCABULARY
from real_runs import CAP
from transformers.modeling_layers import GradientCheckpointingLayer

from prism.config import load_config, parse_overrides
from prism.models.building import load_encoder
from prism.runtime.runtime import InterruptedRunError, Runtime, Step
from prism.stages.align import align


def resumed_step(place, stopped, folder, monkeypatch):
    """Resumes a stopped run for a step of alignment; returns its runtime, the recomputed layers, the images' grids."""
    shutil.copytree(stopped.halted, folder)
    _, _, recipe, *flags = place.arguments("run", "halted")
    rt = Runtime(load_config(recipe, {**parse_overrides(flags), "run.folder": str(folder)}))
    recomputed, grids = {}, []
    models = {"policy": rt.policy, "discriminator": rt.discriminator}
    for model, owner in models.items():
        for name, module in owner.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                recomputed[model, name] = 0

                def count(*_, key=(model, name)):
                    # inside a backward pass
                    recomputed[key] += torch._C._current_graph_task_id() != -1

                # before: the second computation ends as soon as the backward pass has what it needs
                module.register_forward_pre_hook(count)
            if name.endswith("visual"):
                module.register_forward_pre_hook(
                    lambda _, inputs, options: grids.extend(options["grid_thw"].tolist()), with_kwargs=True
                )
    finish = Step.finish

    def finish_and_stop(step, *arguments):
        finish(step, *arguments)
        rt.ask_to_stop()

    monkeypatch.setattr(Step, "finish", finish_and_stop)
    rt.restore()
    with rt, pytest.raises(InterruptedRunError):
        align(rt)
    return rt, recomputed, grids


def test_after_a_resume_layers_are_computed_again_and_images_keep_to_the_cap(place, stopped, tmp_path, monkeypatch):
    rt, recomputed, grids = resumed_step(place, stopped, tmp_path / "run", monkeypatch)
    layers = {key for key in recomputed if ".layers." in key[1] or ".blocks." in key[1]}
    assert len(layers) == (3 + 3) + (4 + 3) and recomputed.keys() == layers
    # the top layer is computed for the read rows only, in parts
    tops = {("policy", "model.model.language_model.layers.2"), ("discriminator", "backbone.language_model.layers.3")}
    assert {key for key, times in recomputed.items() if times == 0} == tops
    pixels = [256 * time * height * width for time, height, width in grids]
    # by the engine, the discriminator and the policy's passes
    assert len(pixels) >= 4 and max(pixels) <= CAP
    # ids that name no token, those that stand for images, and a turn's beginning are never drawn; a turn's end is
    tokenizer = rt.encoder.tokenizer
    banned = rt.engine.banned_token_ids(rt.engine._stops(None))
    assert set(range(len(tokenizer), VOCABULARY)) <= banned and len(tokenizer) < VOCABULARY
    names = ("<|image_pad|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>")
    assert [tokenizer.convert_tokens_to_ids(name) in banned for name in names] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("cap", [CAP, 40_000, 1_000_000])
def test_no_image_takes_more_pixels_than_the_cap_and_every_mode_is_read(place, tmp_path, cap):
    encoder = load_encoder("model.policy", str(place.folder / "policy"), cap)
    writer, rng = Writer(tmp_path / "data"), random.Random(0)
    for width, height, mode, _ in PICTURES:
        (name,) = writer.pictures(example(rng), 1, inside=False)
        with Image.open(tmp_path / "data" / name) as image:
            # JPEG knows neither palettes nor transparency
            assert image.size == (width, height) and image.mode == mode
            prompt = encoder.encode("<image>Which?", [image])
        ((_, rows, columns),) = prompt.image_grid_thw.tolist()
        pixels = 256 * rows * columns
        assert pixels <= cap
        # no image is scaled down that need not be, but for rounding to whole merged patches
        if width * height < cap:
            assert pixels > 0.8 * width * height
        assert prompt.input_ids.count(encoder.image_token_id) == rows * columns // 4
        assert prompt.pixel_values.shape == (rows * columns, 3 * 2 * 16 * 16) and prompt.pixel_values.isfinite().all()
