"""find_segments against a regular expression on the decoded bytes of each response, and the grammar case by case."""

import re
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism_kernels.segments import TAGS, Reason, TokenBytes, byte_alphabet, find_segments, token_bytes

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of a few merges, with Qwen's kinds of added tokens: special, and plain text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["<caption>a red cube</caption>\n<answer>4</answer> the cubes, the red ones é 中文"] * 3
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    fast.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return fast


# the bytes themselves, then an empty token, then tokens that join them in awkward ways
JOINED = [b"", b"</", b"><", b">\n<", b"<caption>", b"</caption><think>", b"think", b"x</", b">x", b">x<", b"\xe4\xb8"]
BYTES = TokenBytes(
    np.frombuffer(bytes(range(256)) + b"".join(JOINED), dtype=np.uint8),
    np.concatenate((np.arange(256), 256 + np.cumsum([0] + [len(x) for x in JOINED]))),
)
SPECIAL = 256


def join(*responses):
    """Token ids and cumulative lengths; a response is bytes (a token each) or a list of ids."""
    ids = [list(response) for response in responses]
    return np.array(list(chain(*ids)), dtype=np.int64), np.cumsum([0] + [len(x) for x in ids])


def bytes_of(ids, table=BYTES):
    return [bytes(table.data[table.offsets[i] : table.offsets[i + 1]]) for i in ids]


def oracle(ids, tags=TAGS, table=BYTES):
    """One response: the spans of its tokens, and the reason, by regular expressions."""
    pieces = bytes_of(ids, table)
    text = b"".join(pieces)
    starts = np.cumsum([0] + [len(p) for p in pieces])
    any_tag = "|".join(f"</?{tag}>" for tag in tags)
    inner = f"((?:(?!{any_tag}).)*)"
    pattern = r"\s*".join(f"<{tag}>{inner}</{tag}>" for tag in tags)
    match = re.fullmatch(rf"\s*{pattern}\s*".encode(), text, re.DOTALL)
    if match and all(group.strip() for group in match.groups()):
        spans = []
        for g in range(1, len(tags) + 1):
            inside = [i for i, p in enumerate(pieces) if p and match.start(g) <= starts[i] < match.end(g)]
            if not inside:
                return None, Reason.NO_TOKEN
            spans.append((inside[0], inside[-1] + 1))
        return spans, Reason.VALID
    if match:
        return None, Reason.EMPTY_SEGMENT
    found = [m.group().decode() for m in re.finditer(any_tag.encode(), text)]
    wanted = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if set(wanted) - set(found):
        return None, Reason.MISSING_TAG
    if len(found) > len(wanted):
        return None, Reason.REPEATED_TAG
    if found == wanted:
        return None, Reason.TEXT_OUTSIDE
    for tag in tags:
        between = found.index(f"</{tag}>") - found.index(f"<{tag}>")
        if between > 1:
            return None, Reason.NESTED
    return None, Reason.WRONG_ORDER


def check_against_oracle(responses, tags=TAGS, table=BYTES):
    ids, bounds = join(*responses)
    segments = find_segments(ids, bounds, table, tags)
    assert segments.start.shape == segments.end.shape == (len(responses), len(tags))
    for s, response in enumerate(responses):
        spans, reason = oracle(response, tags, table)
        assert Reason(int(segments.reason[s])) == reason, bytes_of(response, table)
        found = list(zip(segments.start[s].tolist(), segments.end[s].tolist()))
        offset = int(bounds[s])
        assert found == ([(a + offset, b + offset) for a, b in spans] if spans else [(0, 0)] * len(tags))
    return segments


GOOD = b"<caption>a cube</caption>\n<think>one</think> <answer>1</answer>"

CASES = [
    (GOOD, Reason.VALID),
    (b" \n" + GOOD + b"\t\r\n", Reason.VALID),
    (GOOD.replace(b"cube", b"\xff\xfe\xe4"), Reason.VALID),
    (GOOD.replace(b"one", b"1 < 2 > 0 </b> <caption <think >"), Reason.VALID),
    (b"", Reason.MISSING_TAG),
    (b"hello", Reason.MISSING_TAG),
    (GOOD[:-1], Reason.MISSING_TAG),
    (GOOD[1:], Reason.MISSING_TAG),
    (GOOD.replace(b"<answer>1</answer>", b""), Reason.MISSING_TAG),
    (GOOD.replace(b"<answer>", b"< answer>"), Reason.MISSING_TAG),
    (GOOD.replace(b"<answer>", b"<Answer>"), Reason.MISSING_TAG),
    (GOOD.replace(b"</think>", b"<think>"), Reason.MISSING_TAG),
    (GOOD + GOOD, Reason.REPEATED_TAG),
    (b"<caption>b</caption>" + GOOD, Reason.REPEATED_TAG),
    (GOOD + b"<answer>2</answer>", Reason.REPEATED_TAG),
    (GOOD.replace(b"one", b"<answer>2</answer>"), Reason.REPEATED_TAG),
    (GOOD.replace(b"one", b"<think>one"), Reason.REPEATED_TAG),
    (GOOD + b"</answer>", Reason.REPEATED_TAG),
    (b"<caption>a</caption><think>b<answer>c</answer></think>", Reason.NESTED),
    (b"<caption>a<think>b</caption>c</think><answer>d</answer>", Reason.NESTED),
    (b"<caption>a<think>b</think><answer>c</answer></caption>", Reason.NESTED),
    (b"<think>b</think><caption>a</caption><answer>c</answer>", Reason.WRONG_ORDER),
    (b"</caption>a<caption><think>b</think><answer>c</answer>", Reason.WRONG_ORDER),
    (b"Sure! " + GOOD, Reason.TEXT_OUTSIDE),
    (GOOD.replace(b"\n", b"so"), Reason.TEXT_OUTSIDE),
    (GOOD + b".", Reason.TEXT_OUTSIDE),
    (GOOD.replace(b"\n", b"\xc2\xa0"), Reason.TEXT_OUTSIDE),
    (b"<" + GOOD, Reason.TEXT_OUTSIDE),
    (GOOD + b">", Reason.TEXT_OUTSIDE),
    (GOOD.replace(b"one", b""), Reason.EMPTY_SEGMENT),
    (GOOD.replace(b"one", b" \n\t\r\v\f"), Reason.EMPTY_SEGMENT),
    (b"x" + GOOD.replace(b"one", b""), Reason.TEXT_OUTSIDE),
]


def test_each_case_alone_and_all_in_one_batch():
    for response, reason in CASES:
        segments = check_against_oracle([response])
        assert Reason(int(segments.reason[0])) == reason, response
    together = check_against_oracle([response for response, _ in CASES])
    assert together.reason.tolist() == [reason for _, reason in CASES]


def test_the_tokens_of_the_text():
    ids, bounds = join(b"no", GOOD)
    segments = find_segments(torch.tensor(ids), torch.tensor(bounds, dtype=torch.int32), BYTES)
    texts = [bytes(ids[a:b].tolist()) for a, b in zip(segments.start[1], segments.end[1])]
    assert texts == [b"a cube", b"one", b"1"]
    assert segments.start[0].tolist() == segments.end[0].tolist() == [0, 0, 0]
    assert segments.start.dtype == segments.end.dtype == segments.reason.dtype == torch.int64


def test_tags_may_be_cut_anywhere():
    """Every way to cut the response in two or three tokens more than its characters' pairs allow."""
    for size in range(1, 12):
        for shift in range(size):
            cuts = sorted({0, *range(shift, len(GOOD), size), len(GOOD)})
            pieces = [GOOD[a:b] for a, b in pairwise(cuts)]
            table = TokenBytes(np.frombuffer(GOOD, dtype=np.uint8), np.array(cuts))
            segments = check_against_oracle([list(range(len(pieces)))], table=table)
            if segments.reason[0] == Reason.VALID:
                continue
            assert segments.reason[0] == Reason.NO_TOKEN


def test_a_straddling_token_is_where_its_first_byte_is():
    pieces = [b"<caption>red", b" cu", b"be</cap", b"tion><think", b">", b"a", b"</think><answer>", b"b", b"</answer>"]
    table = TokenBytes(np.frombuffer(b"".join(pieces), dtype=np.uint8), np.cumsum([0] + [len(p) for p in pieces]))
    segments = check_against_oracle([list(range(9))], table=table)
    assert segments.start.tolist() == [[1, 5, 7]] and segments.end.tolist() == [[3, 6, 8]]
    hidden = [b"<caption>red</caption><think>", b"a", b"</think><answer>", b"b", b"</answer>"]
    table = TokenBytes(np.frombuffer(b"".join(hidden), dtype=np.uint8), np.cumsum([0] + [len(p) for p in hidden]))
    assert check_against_oracle([list(range(5))], table=table).reason.tolist() == [Reason.NO_TOKEN]


def test_no_tag_reaches_over_a_boundary():
    for cut in range(1, len(GOOD)):
        segments = check_against_oracle([GOOD[:cut], b"", GOOD[cut:], GOOD])
        assert segments.reason.tolist() == [*[Reason.MISSING_TAG] * 3, Reason.VALID]


def test_special_tokens_have_no_bytes():
    plain = list(GOOD)
    place = GOOD.index(b"cube")
    for where in range(len(GOOD) + 1):
        response = [*plain[:where], SPECIAL, SPECIAL, *plain[where:]]
        assert check_against_oracle([response]).reason.tolist() == [Reason.VALID]
    middle = find_segments(*join([*plain[:place], SPECIAL, *plain[place:], SPECIAL]), BYTES)
    assert int(middle.end[0, 0] - middle.start[0, 0]) == len(b"a cube") + 1
    first = GOOD.index(b"a cube")
    edge = find_segments(*join([*plain[:first], SPECIAL, *plain[first:]]), BYTES)
    assert int(edge.start[0, 0]) == first + 1


@pytest.mark.parametrize("tags", [("a",), ("x-1", "y"), ("p", "q", "r", "s", "é")])
def test_any_number_of_tags(tags):
    good = "".join(f"<{tag}>text</{tag}>\n" for tag in tags).encode()
    shuffled = "".join(f"<{tag}>text</{tag}>\n" for tag in reversed(tags)).encode()
    segments = check_against_oracle([good, shuffled, GOOD], tags)
    assert segments.reason[0] == Reason.VALID and segments.reason[2] == Reason.MISSING_TAG
    if len(tags) > 1:
        assert segments.reason[1] == Reason.WRONG_ORDER


def test_one_tag_may_begin_another():
    check_against_oracle([b"<a>x</a><ab>y</ab>", b"<ab>x</ab><a>y</a>", b"<a><ab>y</ab></a>"], ("a", "ab"))


MARKS = [f"<{slash}{tag}>".encode() for tag in TAGS for slash in ("", "/")]
FRAGMENTS = st.sampled_from(
    [*map(list, MARKS), *map(list, MARKS), list(b" "), list(b"\n"), list(b"a"), list(b"<"), list(b">"), [SPECIAL]]
    + [[256 + i] for i in range(len(JOINED))]
    + [[0xFF], list(b"</caption"), list(b"think>")]
)


@st.composite
def nearly_valid(draw):
    """A valid response with up to two of its fragments dropped, doubled, swapped or replaced."""
    parts = []
    for tag in TAGS:
        parts += [draw(st.sampled_from([[], list(b"\n"), [SPECIAL]])), list(f"<{tag}>".encode())]
        parts += [draw(st.sampled_from([list(b"ab"), list(b"c"), [266], [263, 1], []])), list(f"</{tag}>".encode())]
    for _ in range(draw(st.integers(0, 2))):
        i, j = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        change = draw(st.sampled_from(["drop", "double", "swap", "replace"]))
        if change == "drop":
            parts[i] = []
        elif change == "double":
            parts[i] = parts[i] * 2
        elif change == "swap":
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = draw(FRAGMENTS)
    return list(chain(*parts))


RANDOM = st.lists(FRAGMENTS, max_size=14).map(lambda parts: list(chain(*parts)))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(nearly_valid(), RANDOM), max_size=5))
def test_equals_the_oracle(responses):
    check_against_oracle(responses)


def test_no_responses():
    segments = find_segments([], [0], BYTES)
    assert segments.start.shape == (0, 3) and segments.reason.shape == (0,)


def test_the_alphabet_is_gpt2s():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    decoder = decoders.ByteLevel()
    for character, byte in byte_alphabet().items():
        if byte < 128:
            assert decoder.decode([character]) == chr(byte)


def test_token_bytes_spell_what_the_tokenizer_decodes(tokenizer):
    table = token_bytes(tokenizer)
    assert len(table.offsets) == len(tokenizer) + 1
    text = "<caption>a red cube, é 中文 \U0001f600</caption>\n<think> the <b> </think>"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(bytes_of(ids, table)).decode() == text == tokenizer.decode(ids)
    # added as plain text, so it has bytes; special, so it has none
    think, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", END))
    assert think in ids and bytes_of([think, end], table) == [b"<think>", b""]


def test_token_bytes_of_a_larger_vocabulary(tokenizer):
    table = token_bytes(tokenizer, size=len(tokenizer) + 7)
    assert bytes_of([len(tokenizer) + 6], table) == [b""]
    with pytest.raises(ValueError, match=f"token_bytes: expected size of at least {len(tokenizer)}, the tokenizer's"):
        token_bytes(tokenizer, size=5)


def test_segments_of_tokenized_responses(tokenizer):
    table = token_bytes(tokenizer)
    texts = [
        "<caption>a red cube</caption>\n<think>\nthe cubes é\n</think>\n<answer>4</answer>" + END,
        "<caption>a red cube</caption>\n<think>the cubes</think>\n<answer>4</answer> done" + END,
    ]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    segments = check_against_oracle(ids, table=table)
    assert segments.reason.tolist() == [Reason.VALID, Reason.TEXT_OUTSIDE]
    found = [tokenizer.decode(ids[0][a:b]) for a, b in zip(segments.start[0], segments.end[0])]
    assert [text.strip() for text in found] == ["a red cube", "the cubes é", "4"]


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    words = Tokenizer(models.WordLevel({"▁the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"token_bytes: expected a byte-level BPE, .*, got '▁the'"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))


BAD = [
    ({"token_ids": [300]}, ValueError, "expected token_ids in [0, 267), the table's ids, got 300 at 0"),
    ({"token_ids": [-1]}, ValueError, "expected token_ids in [0, 267), the table's ids, got -1 at 0"),
    ({"token_ids": [1.5]}, TypeError, "expected token_ids to be integers, got float64"),
    ({"token_ids": [[1]]}, ValueError, "expected token_ids to have one dimension, got (1, 1)"),
    ({"cu_seqlens": [0, 2]}, ValueError, "expected cu_seqlens to rise from 0 to 1, the number of tokens, got [0, 2]"),
    ({"cu_seqlens": [0, 1, 0, 1]}, ValueError, "expected cu_seqlens to rise from 0 to 1"),
    ({"cu_seqlens": []}, ValueError, "expected cu_seqlens to rise from 0 to 1"),
    ({"tags": "think"}, ValueError, "expected tags to be different names, got 'think'"),
    ({"tags": ("a", "a")}, ValueError, "expected tags to be different names, got ('a', 'a')"),
    ({"tags": ()}, ValueError, "expected tags to be different names, got ()"),
    ({"tags": ("<a>",)}, ValueError, "expected each of tags to be a name without <, >, / or white space, got '<a>'"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:50] for _, _, m in BAD])
def test_names_the_bad_argument(changes, error, message):
    arguments = {"token_ids": [1], "cu_seqlens": [0, 1], "table": BYTES, **changes}
    with pytest.raises(error, match=re.escape(f"find_segments: {message}")):
        find_segments(**arguments)
