"""A tiny policy, prompts of unequal lengths with and without images, and transformers' forward over responses."""

import pytest
import torch

from prism.models.prompts import EncodedPrompt
from prism.models.sizes import TinyMoeSize
from prism.models.tiny import tiny_discriminator_base, tiny_policy, train_tokenizer

TOKENIZER = train_tokenizer(vocab_size=320)
IMAGE, START, END, STOP = TOKENIZER.convert_tokens_to_ids(
    ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
)
SIZE = TinyMoeSize(hidden_size=64, layers=3, intermediate_size=96, expert_intermediate_size=48, vision_hidden_size=32)
# tokens before and after the images, and the images' grids in patches
SHAPES = ((5, [(1, 4, 6)], 7), (9, [], 4), (2, [(1, 2, 2), (1, 8, 4)], 3), (1, [], 2))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs torch on one thread: the tensors are so small that more would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(dtype=torch.float32, dense=True, seed=0):
    build = tiny_policy if dense else tiny_discriminator_base
    model, _ = build(SIZE, tokenizer=TOKENIZER, seed=seed)
    # larger weights than at initialisation, so that every part matters and distributions are far from uniform
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6 if "lm_head" in name else 3)
            elif "norm" in name and "bias" not in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.to(dtype)


def make_prompts(shapes=SHAPES, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(0, 250, (length,), generator=rng).tolist()

    prompts = []
    for before, grids, after in shapes:
        ids = text(before)
        for _, h, w in grids:
            ids += [START, *[IMAGE] * (h * w // 4), END, *text(2)]
        pixels = torch.randn(sum(h * w for _, h, w in grids), 1536, generator=rng) if grids else None
        prompts.append(EncodedPrompt(ids + text(after), pixels, torch.tensor(grids) if grids else None))
    return prompts


def model_inputs(prompt, response=()):
    """Returns the arguments of transformers' forward over one prompt and response."""
    ids = torch.tensor([[*prompt.input_ids, *response]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    if prompt.pixel_values is not None:
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    return inputs


@torch.no_grad()
def stock_logits(model, prompt, response=()):
    """Returns the logits (L + 1, V) from the prompt's last token to the response's last, by transformers' forward."""
    model.model.rope_deltas = None
    logits = model(**model_inputs(prompt, response), use_cache=False).logits[0]
    return logits[len(prompt.input_ids) - 1 :]
