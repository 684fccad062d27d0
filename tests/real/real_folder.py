"""A small Qwen3-VL in the form of a published one: a plain folder of config, shards, tokenizer and processor files.

It has the habits of the published 4B model that a tiny model lacks: a tied head, bf16 weights in two shards, a
vocabulary padded beyond the tokenizer's, several ends in generation_config, DeepStack from two layers, position
embeddings that are interpolated, heads wider together than the model, settings in the form of transformers 4, and a
byte-level BPE whose tokens go across tags: `>B`, `)</`, `><`.
"""

import json
import random
from pathlib import Path

import torch
from real_data import conversation
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from prism.models.tiny import SPECIAL_TOKENS, train_tokenizer

# ids of the model: a quarter of them name no token, as 267 of the published model's do
VOCABULARY = 512
# of the training before it is published
LEARNING_RATE, STEPS = 4e-3, 300
# after Qwen's special tokens; a decoder prints them as text
TEXT_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
# the published limits of an image, in pixels
SHORTEST, LONGEST = 65536, 16777216

# Qwen3-VL's, without tools: no default system prompt, and pictures are counted if add_vision_id is set
CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
{%- set pictures.count = pictures.count + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ pictures.count ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in item -%}
{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def make_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Writes the tokenizer's files as they are published, and returns what AutoTokenizer makes of them."""
    rng = random.Random(0)
    texts = [part for _ in range(400) for part in conversation(rng)]
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TEXT_TOKENS])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = {str(index): token for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            index: {"content": token.content, "special": token.special}
            | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            for index, token in added.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    files = {
        "tokenizer_config.json": settings,
        "vocab.json": {token: index for token, index in model["vocab"].items() if str(index) not in added},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    _write(folder, files)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def make_folder(folder: Path, *, width: int = 64, layers: int = 3, steps: int = 0) -> Path:
    """Writes a model's folder, and returns it.

    Args:
        folder: the folder, which does not exist yet.
        width: width of the language model.
        layers: its layers, at least three.
        steps: training steps on conversations without images: an untrained model never answers in the right form.
    """
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    image = {
        "size": {"longest_edge": LONGEST, "shortest_edge": SHORTEST},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": pad,
        "dtype": "bfloat16",
        "eos_token_id": end,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 3 * width,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    vision = {
        "deepstack_visual_indexes": [0, 1],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": width,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }
    generation = {"bos_token_id": pad, "pad_token_id": pad, "do_sample": True, "eos_token_id": [end, pad]}
    generation |= {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0, "temperature": 0.7}
    _write(
        folder,
        {
            "config.json": config,
            "generation_config.json": {**generation, "transformers_version": "4.56.0"},
            "preprocessor_config.json": {**image, "image_processor_type": "Qwen2VLImageProcessorFast"},
            "video_preprocessor_config.json": {
                **image,
                "size": {"longest_edge": 25165824, "shortest_edge": 4096},
                "video_processor_type": "Qwen3VLVideoProcessor",
            },
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
        _train(model, tokenizer, steps)
    _write_shards(folder, model)
    return folder


def _train(model: Qwen3VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, steps: int) -> None:
    """Trains on conversations without images."""
    rng = random.Random(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        texts = []
        for _ in range(8):
            question, response = conversation(rng)
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def _write_shards(folder: Path, model: Qwen3VLForConditionalGeneration) -> None:
    """Writes the weights in bf16 as two shards and their index; a tied head is left out, as it is published."""
    weights = {name: value.detach().bfloat16() for name, value in model.state_dict().items() if "lm_head" not in name}
    names = sorted(weights)
    shards = names[: len(names) // 2], names[len(names) // 2 :]
    place = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name].contiguous() for name in shard}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(shard, file)
    size = sum(value.numel() * 2 for value in weights.values())
    _write(folder, {"model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": place}})


def _write(folder: Path, files: dict[str, dict]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
