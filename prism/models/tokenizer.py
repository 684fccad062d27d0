"""A byte-level BPE with Qwen's special tokens, pre-tokenisation and chat template, trained offline in a second."""

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from prism.config import Carelessness
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels import check

# in the order of Qwen's vocabulary; those without <| are ordinary text to a decoder
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT_TOKENS = ("<think>", "</think>")
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
TERMINAL_TOKEN = "<|im_end|>"
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


def train_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = 1024) -> Qwen2Tokenizer:
    """Returns a tokenizer of at most `vocab_size` entries, the same for the same texts.

    Args:
        texts: what the merges are learned from; None: what is said in the embedded world, so that a word is a token.
        vocab_size: all entries together: the 256 bytes, the merges, and the special tokens, which come last.
    """
    added = len(SPECIAL_TOKENS) + len(TEXT_TOKENS)
    if vocab_size < BYTES + added:
        check.fail("train_tokenizer", f"vocab_size >= {BYTES + added} (bytes and special tokens)", vocab_size)
    # Qwen's own pre-tokenisation, from the class that will load the result
    frame = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = frame.normalizer
    learner.pre_tokenizer = frame.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(world_texts() if texts is None else texts, trainer)
    vocabulary = dict(sorted(learner.get_vocab().items(), key=lambda entry: entry[1]))
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges_of(learner),  # type: ignore[arg-type]
        eos_token=TERMINAL_TOKEN,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TEXT_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def world_texts(count: int = 500) -> Iterator[str]:
    """Yields texts of the embedded world, and the names of a chat's roles."""
    # not the defaults, which may change: the shipped base knows the tokens that these texts give
    rates = Carelessness(
        colour=0.60, dropped=0.60, invented=0.01, kind=0.02, place=0.01, reasoning=0.20, careful_style=0.50
    )
    for text in ShapesWorld(carelessness=rates).texts(count):
        yield text
        yield "user\n"
        yield "assistant\n"


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns the merges of a trained BPE, in their order."""
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
