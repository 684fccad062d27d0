import numpy as np
import pytest
import torch
from PIL import Image

from prism.models.parity import ImageTextProcessor
from prism.models.prompts import PromptEncoder, chat_messages, join_images, without_images
from prism.models.tiny import tiny_image_processor, train_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(train_tokenizer(), tiny_image_processor())


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("sizes", [[], [(64, 96)], [(33, 70), (200, 41), (32, 32)]])
def test_prompt_equals_transformers_processor(encoder, sizes):
    images = [picture(h, w, i) for i, (h, w) in enumerate(sizes)]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Answer in three parts."}]},
        {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": "How many?"}]},
    ]
    processor = ImageTextProcessor(encoder.image_processor, encoder.tokenizer)
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=images or None, return_tensors="pt")
    got = encoder.encode(messages, images)
    assert got.input_ids == expected["input_ids"][0].tolist()
    if images:
        assert torch.equal(got.pixel_values, expected["pixel_values"])
        assert torch.equal(got.image_grid_thw, expected["image_grid_thw"])
        assert got.input_ids.count(encoder.image_token_id) == int(got.image_grid_thw.prod(-1).sum()) // 4
    else:
        assert got.pixel_values is None and got.image_grid_thw is None


def test_prompt_forms_are_one_prompt(encoder):
    image = picture(64, 64)
    forms = (
        "How many?",
        "<image>How many?",
        [{"role": "user", "content": "<image>How many?"}],
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]}],
    )
    ids = [encoder.encode(form, [image]).input_ids for form in forms]
    assert all(other == ids[0] for other in ids)


def test_prompt_without_images_is_the_text_alone(encoder):
    messages = chat_messages("<image>How many?", 1)
    assert encoder.encode(without_images(messages)).input_ids == encoder.encode("How many?").input_ids


def test_prompt_names_the_sample_whose_images_do_not_match(encoder):
    with pytest.raises(ValueError, match=r"an image for each of the 2 image places of row 7, got 1 images"):
        encoder.encode("<image><image>Compare.", [picture(32, 32)], name="row 7")
    with pytest.raises(ValueError, match=r"1 image tokens in row 8 after the chat template, got 2"):
        encoder.encode("<image>What is <|image_pad|>?", [picture(32, 32)], name="row 8")


def test_images_of_prompts_join_in_order(encoder):
    prompts = [
        encoder.encode("One?", [picture(32, 64)]),
        encoder.encode("None?"),
        encoder.encode("Two?", [picture(64, 32)]),
    ]
    pixels, grids = join_images(prompts)
    assert grids.tolist() == [[1, 2, 4], [1, 4, 2]]
    assert torch.equal(pixels[:8], prompts[0].pixel_values) and torch.equal(pixels[8:], prompts[2].pixel_values)
    assert join_images(prompts[1:2]) == (None, None)
