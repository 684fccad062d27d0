"""Samples with images, and a discriminator, for the tests of scores."""

import numpy as np
import torch
from discriminator_cases import SIZE, TOKENIZER, make_backbone
from PIL import Image

from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor

ENCODER = PromptEncoder(TOKENIZER, tiny_image_processor(SIZE))
TERMINAL = TOKENIZER.eos_token_id


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def response(caption="a red star", think="I see one star.", answer="1"):
    return f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n<answer>{answer}</answer>"


def make_model(seed=0, **options):
    weight = torch.randn(1, SIZE.hidden_size, generator=torch.Generator().manual_seed(5))
    return Discriminator(make_backbone(seed=seed), value_weight=weight, **options)


def make_samples():
    return [
        Sample(
            "How many stars are there?",
            [response(), response("two blue squares in row 2", "No star at all.", "0"), response(answer="2")],
            images=[picture(64, 96)],
            teacher=response("- a red star in row 1, column 1", "There is one star. So the answer is 1.", "1"),
            name="stars",
        ),
        Sample("What is 3 + 4?", [response(think="3 + 4 = 7", answer="7")], teacher=response("no image", "7", "7")),
        Sample(
            "Compare the two.",
            [response("a circle", "Step 1: look.", "same"), "no tags at all"],
            images=[picture(32, 64, 1), picture(64, 64, 2)],
            name="pair",
        ),
    ]
