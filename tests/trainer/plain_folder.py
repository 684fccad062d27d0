"""A small Qwen3-VL as a plain transformers folder, with the image processor of the released ones."""

import json

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism.models.sizes import TinySize
from prism.models.tiny import save_tiny, tiny_policy

SIZE = TinySize(
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    key_value_heads=1,
    vision_hidden_size=32,
    max_positions=32768,
)
# pixels of an image: Qwen3-VL's limits
PIXELS = {"shortest_edge": 65536, "longest_edge": 16777216}


def released_processor(**changes):
    halves = [0.5, 0.5, 0.5]
    options = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": dict(PIXELS)}
    return Qwen2VLImageProcessorPil(**options | {"image_mean": halves, "image_std": halves} | changes)


def write_folder(folder):
    """Writes a model with a tied head, weights in bfloat16 and a padded vocabulary, and returns its folder."""
    made, tokenizer = tiny_policy(SIZE)
    config = made.config.to_dict()
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    config["text_config"]["vocab_size"] = 64 * (len(tokenizer) // 64 + 2)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).to(torch.bfloat16)
    model.generation_config = made.generation_config
    return save_tiny(folder, model, tokenizer, released_processor())


def write_picture(path, width, height, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    Image.blend(image, Image.new("RGB", image.size, colour), 0.5).save(path)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem(text, images=(), **columns):
    """A row for alignment or RLVR."""
    return {
        "data_source": "x",
        "prompt": [{"role": "user", "content": text}],
        "images": [str(image) for image in images],
        "reward_model": {"ground_truth": "1"},
        **columns,
    }


def chat(text, images=()):
    """A row for SFT."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "1"}]
    return {"messages": turns, "images": [str(image) for image in images]}
