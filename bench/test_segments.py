"""`find_segments` on 64 responses of 1,200 tokens against the published way: decoding their prefixes token by token.

The published way is timed on one pass of prefixes over one response, times 64; the published code makes two passes. The
third way decodes each token once: it is linear, and right as long as no two tokens share a character.
"""

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.versus import Bar, Duel, Rival, Run, Values, duel_test
from prism_kernels.segments import TAGS, Reason, TokenBytes, find_segments, token_bytes

RESPONSES, TOKENS = 64, 1200
# numbers of tokens between the tags
PARTS = {"caption": 240, "think": 920, "answer": 4}
WORDS = (
    "the",
    "a",
    "red",
    "blue",
    "green",
    "cube",
    "ball",
    "lies",
    "left",
    "of",
    "on",
    "under",
    "three",
    "is",
    "so",
    "that",
)


class Data(NamedTuple):
    tokenizer: Any
    table: TokenBytes
    token_ids: np.ndarray
    cu_seqlens: np.ndarray
    # [S, k, 2]
    spans: torch.Tensor


def make_tokenizer():
    """Returns a byte-level BPE that is trained here, without a hub."""
    tokenizers = import_module("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    bpe.train_from_iterator([" " + " ".join(WORDS)] * 4 + ["<caption></caption><think></think><answer>"], trainer)
    return import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")


def make() -> Data:
    tokenizer = make_tokenizer()
    rng = np.random.default_rng(0)
    ids: list[int] = []
    lengths, spans = [], []
    for _ in range(RESPONSES):
        before = len(ids)
        for tag in TAGS:
            ids += tokenizer(f"<{tag}>")["input_ids"]
            # the last part takes the rest
            closing = tokenizer(f"</{tag}>")["input_ids"]
            left = TOKENS - (len(ids) - before) - len(closing)
            count = left if tag == TAGS[-1] else PARTS[tag]
            text = " " + " ".join(rng.choice(WORDS, count))
            spans.append((len(ids), len(ids) + count))
            ids += tokenizer(text)["input_ids"][:count]
            ids += closing
        lengths.append(len(ids) - before)
    assert set(lengths) == {TOKENS}
    cu_seqlens = np.cumsum([0, *lengths])
    table = token_bytes(tokenizer)
    return Data(tokenizer, table, np.array(ids), cu_seqlens, torch.tensor(spans).view(RESPONSES, len(TAGS), 2))


def exact(data: Data) -> Values:
    """Returns the spans with which the responses were made."""
    return {"start": data.spans[..., 0].flatten(), "end": data.spans[..., 1].flatten()}


def ours(data: Data) -> Run:
    def run() -> Values:
        segments = find_segments(data.token_ids, data.cu_seqlens, data.table)
        assert (segments.reason == Reason.VALID).all()
        return {"start": segments.start.flatten(), "end": segments.end.flatten()}

    return run


def _spans(ends: list[int], text: str, offset: int) -> list[tuple[int, int]]:
    """Returns the tokens of each part, from the end of each token's text."""
    starts = [0, *ends[:-1]]
    spans = []
    for tag in TAGS:
        first, last = text.index(f"<{tag}>") + len(tag) + 2, text.index(f"</{tag}>")
        inside = [i for i, start in enumerate(starts) if first <= start < last]
        spans.append((offset + inside[0], offset + inside[-1] + 1))
    return spans


def decoding(prefixes: bool, responses: int):
    def load(data: Data) -> Run:
        def run() -> Values:
            spans = []
            for s in range(responses):
                begin, end = int(data.cu_seqlens[s]), int(data.cu_seqlens[s + 1])
                ids = data.token_ids[begin:end].tolist()
                if prefixes:
                    texts = [data.tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
                    text, ends = texts[-1], [len(t) for t in texts]
                else:
                    texts = [data.tokenizer.decode([i]) for i in ids]
                    text, ends = "".join(texts), np.cumsum([len(t) for t in texts]).tolist()
                spans += _spans(ends, text, begin)
            starts, ends = zip(*spans)
            return {"start": torch.tensor(starts), "end": torch.tensor(ends)}

        return run

    return load


PREFIXES = "decoding prefixes, once"
DUELS = (
    Duel(
        op="find_segments",
        label=f"{RESPONSES} responses of {TOKENS:,} tokens",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, numpy", ours, ours=True),
            Rival(PREFIXES, decoding(True, 1), package="transformers", share=1 / RESPONSES),
            Rival("decoding each token", decoding(False, 8), package="transformers", share=8 / RESPONSES),
        ),
        tolerance=0.0,
        bars=(Bar(PREFIXES, 500),),
    ),
)
test_find_segments = duel_test(DUELS, __name__)
