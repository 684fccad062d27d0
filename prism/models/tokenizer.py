"""A byte-level BPE with Qwen's special tokens, pre-tokenisation and chat template, trained offline in a second."""

import json
import random
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

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
        texts: what the merges are learned from; None: sentences about coloured shapes on a grid.
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
    learner.train_from_iterator(texts if texts is not None else shape_sentences(), trainer)
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


def shape_sentences(count: int = 2000, seed: int = 0) -> Iterator[str]:
    """Yields responses in the three-part format, of colours, shapes, places and small sums."""
    chance = random.Random(seed)
    colours = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
    shapes = ("circle", "square", "triangle", "star", "cross", "diamond")
    places = ("row 1", "row 2", "row 3", "row 4", "column 1", "column 2", "column 3", "column 4")
    for _ in range(count):
        objects = [
            f"a {chance.choice(colours)} {chance.choice(shapes)} in {chance.choice(places)}, {chance.choice(places)}"
            for _ in range(chance.randint(1, 5))
        ]
        first, second = chance.randint(0, 9), chance.randint(0, 9)
        listing = "\n".join(f"- There is {item}." for item in objects)
        yield (
            f"<caption>\n{listing}\n</caption>\n<think>\nStep 1: How many shapes are there? I count {first} left "
            f"and {second} right.\nStep 2: {first} + {second} = {first + second}, so the answer is "
            f"{first + second}.\n</think>\n<answer>{first + second}</answer>"
        )


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns the merges of a trained BPE, in their order."""
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
