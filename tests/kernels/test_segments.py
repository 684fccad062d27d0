"""find_segments against a regular expression on the decoded bytes of each response, and the grammar case by case."""

import re
from functools import cache
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

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
    """One response: its spans in tokens and in bytes, and the reason, by regular expressions and brute force."""
    pieces = bytes_of(ids, table)
    text = b"".join(pieces)
    starts = np.cumsum([0] + [len(p) for p in pieces])
    any_tag = "|".join(f"</?{tag}>" for tag in tags)
    inner = f"((?:(?!{any_tag}).)*)"
    pattern = r"\s*".join(f"<{tag}>{inner}</{tag}>" for tag in tags)
    match = re.fullmatch(rf"\s*{pattern}\s*".encode(), text, re.DOTALL)
    if match and all(group.strip() for group in match.groups()):
        spans = []
        for first, last in match.regs[1:]:
            held = [i for i, p in enumerate(pieces) if {*range(first, last)} & {*range(starts[i], starts[i] + len(p))}]
            # what lies between the first and the last of them has no bytes or belongs to them
            assert all(i in held or not pieces[i] for i in range(held[0], held[-1] + 1))
            spans.append((held[0], held[-1] + 1, first, last))
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
    assert all(column.shape == (len(responses), len(tags)) for column in segments[:2] + segments[3:])
    tokens, place = 0, 0
    for s, response in enumerate(responses):
        spans, reason = oracle(response, tags, table)
        assert Reason(int(segments.reason[s])) == reason, bytes_of(response, table)
        rows = (segments.start, segments.end, segments.byte_start, segments.byte_end)
        found = list(zip(*(row[s].tolist() for row in rows)))
        if spans:
            assert found == [(a + tokens, b + tokens, c + place, d + place) for a, b, c, d in spans]
        else:
            assert found == [(0, 0, 0, 0)] * len(tags)
        tokens += len(response)
        place += len(b"".join(bytes_of(response, table)))
    return segments


def vocabulary(pieces):
    """A table whose tokens are the given byte strings, in order."""
    return TokenBytes(np.frombuffer(b"".join(pieces), dtype=np.uint8), np.cumsum([0] + [len(p) for p in pieces]))


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


def test_the_tokens_and_the_bytes_of_the_text():
    ids, bounds = join(b"no", GOOD)
    segments = find_segments(torch.tensor(ids), torch.tensor(bounds, dtype=torch.int32), BYTES)
    texts = [bytes(ids[a:b].tolist()) for a, b in zip(segments.start[1], segments.end[1])]
    assert texts == [b"a cube", b"one", b"1"]
    whole = b"".join(bytes_of(ids))
    assert [whole[a:b] for a, b in zip(segments.byte_start[1], segments.byte_end[1])] == texts
    assert all(column[0].tolist() == [0, 0, 0] for column in segments[:2] + segments[3:])
    assert all(column.dtype == torch.int64 for column in segments)


def test_tags_may_be_cut_anywhere():
    for size in range(1, len(GOOD) + 1):
        for shift in range(size):
            cuts = sorted({0, *range(shift, len(GOOD), size), len(GOOD)})
            pieces = [GOOD[a:b] for a, b in pairwise(cuts)]
            segments = check_against_oracle([list(range(len(pieces)))], table=vocabulary(pieces))
            assert segments.reason.tolist() == [Reason.VALID]


def test_a_token_belongs_to_each_segment_whose_text_it_holds():
    pieces = [b"<caption>red", b" cu", b"be</cap", b"tion><think", b">", b"a", b"</think><answer>b", b"</answer>"]
    segments = check_against_oracle([list(range(8))], table=vocabulary(pieces))
    assert segments.start.tolist() == [[0, 5, 6]] and segments.end.tolist() == [[3, 6, 7]]
    # bytes of two segments in a token
    pieces = [b"<caption>red", b" cube</caption><think>a", b"</think><answer>", b"b</answer>"]
    segments = check_against_oracle([list(range(4))], table=vocabulary(pieces))
    assert segments.start.tolist() == [[0, 1, 3]] and segments.end.tolist() == [[2, 2, 4]]
    # a whole response in a token, between others and tokens without bytes
    pieces = [b"", GOOD, b"x"]
    segments = check_against_oracle([[2], [0, 1, 0], [], [1]], table=vocabulary(pieces))
    assert segments.reason.tolist() == [Reason.MISSING_TAG, Reason.VALID, Reason.MISSING_TAG, Reason.VALID]
    assert segments.start[[1, 3]].tolist() == [[2] * 3, [4] * 3] and segments.end[[1, 3]].tolist() == [[3] * 3, [5] * 3]


def test_white_space_at_the_ends_belongs_to_the_text():
    pieces = [b"<caption", b">\n", b" a", b"\n\n", b"</caption>\n<think>", b"b", b"</think>", b"<answer>", b"\t", b"c"]
    pieces += [b"\n</", b"answer>"]
    segments = check_against_oracle([list(range(len(pieces)))], table=vocabulary(pieces))
    assert segments.start.tolist() == [[1, 5, 8]] and segments.end.tolist() == [[4, 6, 11]]
    whole = b"".join(pieces)
    texts = [whole[a:b] for a, b in zip(segments.byte_start[0], segments.byte_end[0])]
    assert texts == [b"\n a\n\n", b"b", b"\tc\n"]


def test_characters_may_be_cut_anywhere():
    response = "<caption>红色</caption><think>\U0001f600</think><answer>é</answer>".encode()
    for size in range(1, 5):
        pieces = [response[a : a + size] for a in range(0, len(response), size)]
        segments = check_against_oracle([list(range(len(pieces)))], table=vocabulary(pieces))
        texts = [response[a:b].decode() for a, b in zip(segments.byte_start[0], segments.byte_end[0])]
        assert texts == ["红色", "\U0001f600", "é"]


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
    # they count as tokens, not as bytes
    for found in (middle, edge):
        assert [int(found.byte_start[0, 0]), int(found.byte_end[0, 0])] == [first, first + len(b"a cube")]
    # and are no text
    empty = GOOD.replace(b"one", b"")
    place = empty.index(b"</think>")
    check = check_against_oracle([[*empty[:place], SPECIAL, *empty[place:]]])
    assert check.reason.tolist() == [Reason.EMPTY_SEGMENT]


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


CROSSING = (
    "<caption>a red cube (left)</caption><think>it is red.</think><answer>B</answer>",
    '<caption>\n- a\n</caption>\n<think>\n<a href="x"><b>so 红色"</think>\n<answer>red</answer>',
    "<caption>a</caption><think>b</think>\n<answer>C</answer>",
)
# tokens of the vocabularies below that hold bytes of a tag and of a text, or of two texts
CROSSED = {"qwen": {">B", ">red", ")</", '"><', '"</', ".</", ">\n"}, "free": {"a</caption><think>b", ">B</answer>"}}


@cache
def crossing(name):
    """A byte-level BPE whose merges cross tags: `qwen` splits text as Qwen's tokenizers do, `free` does not split."""
    bpe = Tokenizer(models.BPE())
    free = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer if name == "qwen" else free
    bpe.decoder = decoders.ByteLevel()
    # without the last texts, merges of whole tags would come first
    texts = [*CROSSING, "a</caption><think>b", ">B</answer>", ">B</answer>"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    table = token_bytes(tokenizer)
    assert CROSSED[name] <= {piece.decode(errors="replace") for piece in bytes_of(range(len(tokenizer)), table)}
    return tokenizer, table


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("answer", ["A", "B", "C", "(B)", "B.", "red", "4", '"B"', "红", " B", "B\n"])
def test_an_answer_that_shares_tokens_with_its_tags_is_an_answer(name, answer):
    tokenizer, table = crossing(name)
    for text in CROSSING:
        text = re.sub("<answer>.*</answer>", lambda _: f"<answer>{answer}</answer>", text)
        ids = tokenizer(text + END)["input_ids"]
        segments = check_against_oracle([ids], table=table)
        assert segments.reason.tolist() == [Reason.VALID], tokenizer.convert_ids_to_tokens(ids)
        whole = b"".join(bytes_of(ids, table))
        found = [whole[a:b].decode() for a, b in zip(segments.byte_start[0], segments.byte_end[0])]
        assert found == re.findall(r"<(?:caption|think|answer)>(.*?)</(?:caption|think|answer)>", text, re.DOTALL)
        # all tokens of the text, and at most one token on each side that is only partly of it
        inner = whole[int(segments.byte_start[0, 2]) : int(segments.byte_end[0, 2])]
        tokens = bytes_of(ids[int(segments.start[0, 2]) : int(segments.end[0, 2])], table)
        assert inner in b"".join(tokens) and b"".join(tokens[1:-1]) in inner


PIECES = ["a", "B", "red", ")", ".", '"', "<b>", "红色", "é", " ", "\n", "\n\n", "</", "><", END]
TEXTS = st.lists(st.sampled_from([*(mark.decode() for mark in MARKS), *PIECES]), max_size=12).map("".join)
WORDS = st.text(st.sampled_from('aB.)"> \n红\U0001f600'), max_size=4)


@pytest.mark.parametrize("name", CROSSED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_the_oracle_where_merges_cross_tags(name, data):
    tokenizer, table = crossing(name)
    good = st.tuples(WORDS, WORDS, WORDS, st.sampled_from(["", " ", "\n"])).map(
        lambda w: f"<caption>{w[0]}</caption>{w[3]}<think>{w[1]}</think>{w[3]}<answer>{w[2]}</answer>"
    )
    texts = data.draw(st.lists(st.one_of(good, good, TEXTS), max_size=4))
    check_against_oracle([tokenizer(text)["input_ids"] for text in texts], table=table)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_oracle_wherever_tokens_are_cut(data):
    """Each response is cut into tokens at random places, tokens without bytes among them."""
    responses, pieces = [], []
    for text in data.draw(st.lists(st.one_of(st.tuples(WORDS, WORDS, WORDS), TEXTS), max_size=3)):
        if isinstance(text, tuple):
            text = "<caption>{}</caption><think>{}</think><answer>{}</answer>".format(*text)
        whole = text.encode()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
        cut = [whole[a:b] for a, b in pairwise([0, *cuts, len(whole)])]
        responses.append(list(range(len(pieces), len(pieces) + len(cut))))
        pieces += cut
    check_against_oracle(responses, table=vocabulary(pieces))


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
