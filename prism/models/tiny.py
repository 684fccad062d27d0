"""Tiny Qwen3-VL and Qwen3-VL-MoE models with random weights, and their tokenizer, built offline in seconds.

The tokenizer is a byte-level BPE with Qwen's special tokens, pre-tokenisation and chat template. Plain transformers
loads the models and the tokenizer.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism.models.prompts import PromptEncoder
from prism.models.sizes import TinyMoeSize, TinySize
from prism.models.vocabulary import IMAGE_TOKEN, SPECIAL_TOKENS, VIDEO_TOKEN
from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels import check

# single tokens that a decoder prints as text
TEXT_TOKENS = ("<think>", "</think>")
TERMINAL_TOKEN = "<|im_end|>"
# the file of a model's settings of videos
VIDEOS = "video_preprocessor_config.json"
BYTES = 256

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for item in content -%}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in item -%}
{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def tiny_policy(
    size: TinySize | None = None, *, tokenizer: Qwen2Tokenizer | None = None, seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen2Tokenizer]:
    """Returns a dense Qwen3-VL with random weights, and its tokenizer."""
    size = size or TinySize()
    tokenizer = tokenizer or train_tokenizer(vocab_size=size.vocab_size)
    text = {**_text_config(size, tokenizer), "intermediate_size": size.intermediate_size}
    config = Qwen3VLConfig(text_config=text, vision_config=_vision_config(size), **_token_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer)
    return model.eval(), tokenizer


def tiny_discriminator_base(
    size: TinyMoeSize | None = None, *, tokenizer: Qwen2Tokenizer | None = None, seed: int = 0
) -> tuple[Qwen3VLMoeForConditionalGeneration, Qwen2Tokenizer]:
    """Returns a Qwen3-VL-MoE with random weights, and its tokenizer."""
    size = size or TinyMoeSize()
    tokenizer = tokenizer or train_tokenizer(vocab_size=size.vocab_size)
    text = {
        **_text_config(size, tokenizer),
        "intermediate_size": size.intermediate_size,
        "moe_intermediate_size": size.expert_intermediate_size,
        "num_experts": size.experts,
        "num_experts_per_tok": size.experts_per_token,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_vision_config(size), **_token_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer)
    return model.eval(), tokenizer


def tiny_image_processor(size: TinySize | None = None) -> Qwen2VLImageProcessorPil:
    """Returns Qwen3-VL's image processor for tiny images; it needs only PIL and numpy."""
    size = size or TinySize()
    side = 2 * size.patch_size
    return Qwen2VLImageProcessorPil(
        patch_size=size.patch_size,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": side * side, "longest_edge": size.image_side * size.image_side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_processor(folder: str | Path, encoder: PromptEncoder) -> None:
    """Writes the files of tokenizer, chat template and processors.

    AutoTokenizer and the image processor load them anywhere, AutoProcessor only if torchvision is installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.tokenizer.save_pretrained(folder)
    image = {key: value for key, value in encoder.image_processor.to_dict().items() if key != "image_processor_type"}
    image = {**image, "processor_class": "Qwen3VLProcessor"}
    # written by hand: importing the class needs torchvision
    videos = encoder.videos or {
        **{key: image[key] for key in ("patch_size", "temporal_patch_size", "merge_size", "size")},
        **{key: image[key] for key in ("image_mean", "image_std", "processor_class")},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    files = {
        "preprocessor_config.json": {**image, "image_processor_type": "Qwen2VLImageProcessor"},
        VIDEOS: videos,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_tiny(
    folder: str | Path,
    model: Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    image_processor: Qwen2VLImageProcessorPil | None = None,
) -> Path:
    """Writes a folder that plain transformers and vLLM load, and returns it."""
    folder = Path(folder)
    model.save_pretrained(folder)
    save_processor(folder, PromptEncoder(tokenizer, image_processor or tiny_image_processor()))
    return folder


def train_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = 1024) -> Qwen2Tokenizer:
    """Returns a tokenizer of at most `vocab_size` entries; equal texts give equal tokenizers.

    Args:
        texts: texts to learn the merges from; None: texts of the embedded world, whose words become single tokens.
        vocab_size: number of all entries: the 256 bytes, the merges, and the special tokens, which come last.
    """
    added = len(SPECIAL_TOKENS) + len(TEXT_TOKENS)
    if vocab_size < BYTES + added:
        check.fail("train_tokenizer", f"vocab_size >= {BYTES + added} (bytes and special tokens)", vocab_size)
    # Qwen's normaliser and pre-tokeniser, from the class that will load the result
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = qwen.normalizer
    bpe.pre_tokenizer = qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_world_texts() if texts is None else texts, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    vocabulary = dict(sorted(bpe.get_vocab().items(), key=lambda entry: entry[1]))
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[(left, right) for left, right in merges],  # type: ignore[misc]
        eos_token=TERMINAL_TOKEN,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TEXT_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _world_texts() -> Iterator[str]:
    """Yields texts of the embedded world, and the names of a chat's roles."""
    # fixed rates, since the defaults may change: the shipped base was trained on the tokens of these texts
    rates = Carelessness(
        colour=0.60, dropped=0.60, invented=0.01, kind=0.02, place=0.01, reasoning=0.20, careful_style=0.50
    )
    for text in ShapesWorld(carelessness=rates).texts(500):
        yield text
        yield "user\n"
        yield "assistant\n"


def _text_config(size: TinySize, tokenizer: Qwen2Tokenizer) -> dict:
    section = size.head_dim // 8
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {**rope, "mrope_section": [size.head_dim // 2 - 2 * section, section, section]},
        # an engine that receives weights in place after each step would break tied ones
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision_config(size: TinySize) -> dict:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden_size,
        "patch_size": size.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": (size.image_side // size.patch_size) ** 2,
        "deepstack_visual_indexes": [0],
    }


def _token_ids(tokenizer: Qwen2Tokenizer) -> dict:
    named = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()} | {
        "tie_word_embeddings": False
    }


def _generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (TERMINAL_TOKEN, "<|endoftext|>")]
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=True)
