"""Each test re-creates a defect of the published code, shows its harm, and shows that our code does not have it.

docs/defects.md lists all defects; the tests of the others are beside those of the code that they concern.
"""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from discriminator_cases import IMAGE, SIZE, TOKENIZER, make_backbone
from loader_cases import chat, write_images, write_lines
from score_cases import ENCODER, TERMINAL, make_model, picture, response
from torch.nn.functional import logsigmoid

from bench.end_to_end.discriminator import PackedScheme, PublishedScheme, Shape, make_group
from prism.data.files import DataError
from prism.data.loader import LoadOptions, RowStream
from prism.discriminator.score import Sample, ScoreLimits, TextBranches, prepare_groups, score_groups
from prism.models.prompts import PromptEncoder
from prism.models.tiny import train_tokenizer
from prism_kernels import group_advantage, pair_loss, policy_loss, prism_advantage
from prism_kernels.grammar import TAGS, Reason, parse_response, split_response
from prism_kernels.packing import Kind, plan_tokens
from prism_kernels.segments import find_segments
from prism_kernels.shaping import token_advantage

PAD = TOKENIZER.pad_token_id


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def stock():
    return make_backbone()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def read(stock, model, ids, place, attention_mask=None, **inputs):
    """Returns the score of one row by transformers' forward, read at token `place`."""
    stock.rope_deltas = None
    row = torch.tensor([ids])
    mask = torch.ones_like(row) if attention_mask is None else attention_mask
    hidden = stock(input_ids=row, attention_mask=mask, use_cache=False, **inputs).last_hidden_state
    return float(hidden[0, place] @ model.value_head.weight[0])


TEXTS = [
    ("a red star", "I see one star.", "1"),
    ("- two squares", "2 - 0 = 2", "2"),
    ("", "Nothing.", "0"),
    ("the grid has 5 shapes.", "Step 1: 2 + 3 = 5", "5"),
]


def scored_tokens_published(caption, think, answer):
    """A: returns the token at which each class is scored, when the batch is padded to its longest row."""
    student = [
        ids_of(f"<caption>{caption}</caption>")[-1],
        [*ids_of(f"<think>{think}</think><answer>{answer}</answer>"), TERMINAL][-1],
    ]
    longest = 64
    teacher = []
    for text in (caption, think):
        row = ids_of(text)
        row += [PAD] * (longest - len(row))
        teacher.append(row[-1])
    return student, teacher


def test_a_the_last_token_does_not_separate_the_classes(model):
    # published: the token alone shows whether the teacher or the student wrote the text
    published = [scored_tokens_published(*text) for text in TEXTS]
    students = {token for student, _ in published for token in student}
    teachers = {token for _, teacher in published for token in teacher}
    assert not students & teachers

    sample = Sample("How many?", [response(c or "none", t, a) for c, t, a in TEXTS], teacher=response("x", "y", "z"))
    (part,) = prepare_groups([sample], ENCODER).packs
    pack = part.pack
    ends = pack.input_ids[pack.last_index]
    assert ends.shape == (10,) and set(ends.tolist()) == {TERMINAL}
    # the first token does not separate them either: it is the channel's tag
    begins = pack.input_ids[pack.last_index - pack.cu_branch.diff() + 1]
    assert begins[0::2].unique().numel() == begins[1::2].unique().numel() == 1

    # a student's response that equals the teacher's has the teacher's score
    copied = Sample("How many?", [response("x", "y", "z")], teacher=response("x", "y", "z"))
    with torch.no_grad():
        scores = score_groups(model, [copied], ENCODER)
    torch.testing.assert_close(scores.perception, scores.teacher_perception, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.reasoning, scores.teacher_reasoning, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_b_a_long_teacher_is_never_cut_silently(model):
    long = "Step 1: look. " * 120
    teachers = [response(think=f"{long} The answer is {n}.", answer=str(n)) for n in (1, 2)]
    assert all(512 < len(ids_of(teacher)) < 2000 for teacher in teachers)
    # published: both are cut to the same 512 tokens, which do not contain the answer
    assert ids_of(teachers[0])[:512] == ids_of(teachers[1])[:512]
    assert "answer" not in TOKENIZER.decode(ids_of(teachers[0])[:512])

    samples = [Sample("How many?", [response()], teacher=teacher, name="row 3") for teacher in teachers]
    whole = score_groups(model, samples, ENCODER).teacher_reasoning
    assert whole.isfinite().all() and float((whole[0] - whole[1]).abs()) > 1e-4

    skipped = score_groups(model, samples[:1], ENCODER, ScoreLimits(response_tokens=512))
    assert skipped.teacher_reason[0].startswith("too long: ") and "the limit is 512" in skipped.teacher_reason[0]
    assert skipped.teacher_perception.isnan().all() and skipped.perception.isfinite().all()
    with pytest.raises(ValueError, match=r"at most 512 tokens in the teacher of row 3, got \d+"):
        score_groups(model, samples[:1], ENCODER, ScoreLimits(response_tokens=512, too_long="raise"))
    exact = len(ids_of(teachers[0]))
    kept = score_groups(model, samples[:1], ENCODER, ScoreLimits(response_tokens=exact)).teacher_reasoning
    assert torch.equal(kept, whole[:1])


@torch.no_grad()
def test_c_scores_are_read_at_the_right_token_in_any_batch(stock, model):
    captions = [
        "a star",
        "two red squares in row 1, column 2",
        "a",
        "three blue circles, and one cross in row 4, column 3",
    ]
    prompt = ENCODER.encode("How many?").input_ids
    rows = [[*prompt, *ids_of(f"<caption>{caption}"), TERMINAL] for caption in captions]
    right = [read(stock, model, row, -1) for row in rows]

    # published: the batch is padded on the left, but the token is counted as if padding were on the right
    longest = max(map(len, rows))
    published = []
    for row in rows:
        padding = longest - len(row)
        mask = torch.tensor([[0] * padding + [1] * len(row)])
        published.append(read(stock, model, [PAD] * padding + row, int(mask.sum()) - 1, mask))
    wrong = [abs(p - r) > 1e-3 for p, r in zip(published, right)]
    assert wrong == [len(row) < longest for row in rows] and sum(wrong) == 3

    sample = Sample("How many?", [response(caption) for caption in captions])
    ours = score_groups(model, [sample], ENCODER).perception
    torch.testing.assert_close(ours, torch.tensor(right), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_e_warm_up_and_alignment_score_alike(stock, model):
    image = picture(64, 96)
    caption = "a red star in row 1"
    prompt = ENCODER.encode("How many?", [image])
    ids = [*prompt.input_ids, *ids_of(f"<caption>{caption}"), TERMINAL]
    inputs = {
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
        "mm_token_type_ids": (torch.tensor([ids]) == IMAGE).int(),
    }
    # published: alignment reads the end token, with plain positions; warm-up the token before it, with M-RoPE
    plain = torch.arange(len(ids)).expand(3, 1, -1)
    alignment = read(stock, model, ids, -1, position_ids=plain, **inputs)
    warm_up = read(stock, model, ids, -2, **inputs)
    same_token = read(stock, model, ids, -1, **inputs)
    assert abs(alignment - warm_up) > 1e-3 and abs(alignment - same_token) > 1e-3

    # a warm-up row is one response against its teacher, an alignment group has many
    texts = [response(caption), response("a star", "No.", "3"), "broken", response("5 squares", "5", "5")]
    teacher = response("- a red star", "One.", "1")
    rows = [Sample("How many?", [text], images=[image], teacher=teacher) for text in texts]
    group = Sample("How many?", texts, images=[image], teacher=teacher)
    as_pairs, as_group = score_groups(model, rows, ENCODER), score_groups(model, [group], ENCODER)
    for name in ("perception", "reasoning"):
        pairs, grouped = getattr(as_pairs, name), getattr(as_group, name)
        torch.testing.assert_close(pairs, grouped, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert float(as_group.perception[0]) == pytest.approx(same_token, abs=1e-4)
    torch.testing.assert_close(as_pairs.teacher_reasoning[3:], as_group.teacher_reasoning, rtol=1e-5, atol=1e-5)


def pair_loss_published(teacher, student, valid):
    """G: returns loss and accuracy; invalid students count as 0, and the sum is divided by the micro-batch's count."""
    student = torch.where(valid, student, 0.0)
    kept = valid if valid.any() else torch.ones_like(valid)
    loss = -logsigmoid(teacher - student)[kept].sum() / valid.sum().clamp(min=1)
    return loss, float((teacher > student)[kept].double().mean())


def test_g_a_pair_weighs_the_same_in_any_micro_batch_and_no_pair_gives_no_gradient():
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(8, generator=rng).requires_grad_()
    teacher = torch.randn(8, generator=rng)
    valid = torch.tensor([True, True, True, True, False, False, False, True])
    halves = (slice(0, 4), slice(4, 8))

    # published: the one valid pair of the second half weighs as much as the four of the first together
    total = sum(pair_loss_published(teacher[h], student[h], valid[h])[0] for h in halves) / len(halves)
    (published,) = torch.autograd.grad(total, student)
    slope = torch.sigmoid(student.detach() - teacher)
    torch.testing.assert_close(published[7] / slope[7], 4 * published[0] / slope[0])

    pairs = float(valid.sum())
    parts = [pair_loss(teacher[h], student[h], valid=valid[h], denominator=pairs)[0] for h in halves]
    (ours,) = torch.autograd.grad(sum(parts), student)
    torch.testing.assert_close(ours, torch.where(valid, slope / pairs, 0.0))

    # published: without a valid sample the teachers' scores are pushed up anyway, and the accuracy looks good
    lone = torch.tensor([1.0] * 23 + [-1.0] * 2).requires_grad_()
    students, nothing = torch.randn(25, generator=rng), torch.zeros(25, dtype=torch.bool)
    loss, accuracy = pair_loss_published(lone, students, nothing)
    (pushed,) = torch.autograd.grad(loss, lone)
    assert (pushed < 0).all() and accuracy == pytest.approx(0.92)

    loss, metrics = pair_loss(lone, students, valid=nothing)
    (pushed,) = torch.autograd.grad(loss, lone)
    assert loss.item() == 0 and (pushed == 0).all()
    assert metrics.means()["pairs"] == 0 and np.isnan(metrics.means()["correct"])


def advantage_published(score, valid, penalty=1.5):
    """I: an invalid sample gets the smallest valid score - 1, which enters the group's mean and standard deviation."""
    worst = min([s for s, ok in zip(score, valid) if ok], default=0.0) - 1
    filled = [s if ok else worst for s, ok in zip(score, valid)]
    mean, std = (0.0, 1.0) if len(filled) == 1 else (np.mean(filled), np.std(filled, ddof=1))
    return [(s - mean) / (std + 1e-6) - (0.0 if ok else penalty) for s, ok in zip(filled, valid)]


def test_i_invalid_samples_enter_no_statistics():
    def ours(score, valid):
        score = torch.tensor(score, dtype=torch.float64)
        group = torch.zeros(len(score), dtype=torch.int64)
        return prism_advantage(score, score, group, format_ok=torch.tensor(valid)).tolist()

    # three valid responses and five invalid ones: published, the z-scores of the valid shrink to 0.04 of their size
    score, valid = [2.98, 3.0, 3.02, 0.0, 0.0, 0.0, 0.0, 0.0], [True] * 3 + [False] * 5
    alone = ours(score[:3], valid[:3])
    assert alone == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)
    published = advantage_published(score, valid)
    assert (published[2] - published[0]) / 2 == pytest.approx(0.04, abs=0.005)
    assert ours(score, valid) == pytest.approx([*alone, *[-1.5] * 5])

    # all invalid: published, every sample is pushed down without a baseline; ours, no sample has an advantage
    assert advantage_published(score, [False] * 8) == pytest.approx([-1.5] * 8)
    assert ours(score, [False] * 8) == [0.0] * 8
    # one sample: published, its raw score is its advantage
    assert advantage_published([2.5], [True]) == pytest.approx([2.5], abs=1e-5)
    assert ours([2.5], [True]) == [0.0]


def test_j_prompt_and_image_are_computed_once_a_group():
    shape = Shape(responses=4, prompt=24, image_side=4, caption=4, reasoning=8)
    found = {}
    for scheme in (PublishedScheme, PackedScheme):
        group = make_group(shape, SIZE)
        seen = {"tokens": 0, "patches": 0}

        def count(name, size, seen=seen):
            return lambda _, inputs, __: seen.update({name: seen[name] + size(inputs[0])})

        step = scheme(group)
        group.backbone.language_model.embed_tokens.register_forward_hook(count("tokens", torch.numel))
        group.backbone.visual.patch_embed.register_forward_hook(count("patches", len))
        found[scheme] = step.step(), seen
    lengths = [(len(texts.caption), len(texts.reasoning)) for texts in group.responses]
    plan = plan_tokens(shape.prompt, lengths, (len(group.teacher.caption), len(group.teacher.reasoning)))
    (published, theirs), (packed, ours) = found[PublishedScheme], found[PackedScheme]
    # published: four training forwards and two scoring ones for each response, each padded, with prompt and image
    assert theirs["tokens"] >= plan.published + plan.published_scoring
    assert theirs["patches"] == 6 * shape.responses * shape.image_side**2
    assert ours == {"tokens": plan.packed, "patches": shape.image_side**2}
    assert theirs["tokens"] > 5 * ours["tokens"]
    for name in ("perception", "reasoning"):
        torch.testing.assert_close(getattr(packed, name), getattr(published, name), rtol=1e-4, atol=1e-4)


def spans_published(tokenizer, ids):
    """K: returns the token span of each segment, found by decoding every prefix."""
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    text, starts = tokenizer.decode(ids), [0, *ends[:-1]]
    spans = []
    for tag in TAGS:
        first, last = text.index(f"<{tag}>") + len(tag) + 2, text.index(f"</{tag}>")
        inside = [i for i, start in enumerate(starts) if first <= start < last]
        spans.append((inside[0], inside[-1] + 1))
    return spans


def test_k_segments_are_found_without_decoding(monkeypatch):
    decoded = []
    for name in ("decode", "batch_decode", "convert_ids_to_tokens"):
        original = getattr(TOKENIZER, name)
        counting = lambda ids, *a, f=original, **k: decoded.append(len(ids)) or f(ids, *a, **k)  # noqa: E731
        monkeypatch.setattr(TOKENIZER, name, counting)
    work, texts = [], [response(think="Step 1: 2 + 3 = 5. " * n) for n in (10, 20, 40)]
    for text in texts:
        ids = ids_of(text)
        decoded.clear()
        spans = spans_published(TOKENIZER, ids)
        assert len(decoded) == len(ids) + 1
        work.append(sum(decoded))
        decoded.clear()
        found = find_segments(ids, [0, len(ids)], ENCODER.token_bytes)
        # the published span leaves out a token that ends the tag and begins the text
        (first, last), *others = spans
        assert ids[first - 1] == TOKENIZER.get_vocab()[">Ċ"]
        assert list(zip(found.start[0].tolist(), found.end[0].tolist())) == [(first - 1, last), *others]
        assert not decoded
    # published: twice the text takes nearly four times the work
    assert all(after > 3 * before for before, after in pairwise(work))
    # building packs from texts decodes nothing either
    prepare_groups([Sample("How many?", texts, teacher=texts[0])], ENCODER)
    assert not decoded


def format_published(text):
    """L: returns whether the parts appear in order, with anything between them."""
    return re.search(r"<caption>.*?</caption>.*?<think>.*?</think>.*?<answer>.*?</answer>", text, re.DOTALL) is not None


def answer_published(text):
    return re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)[1]


LOOSE = {
    "two captions": (response().replace("<caption>", "<caption>a</caption><caption>"), "repeated_tag"),
    "two answers": (response(answer="1</answer><answer>2"), "repeated_tag"),
    "an answer inside the thinking": (response(think="so <answer>1</answer>", answer="2"), "repeated_tag"),
    "an empty caption": (response(caption=""), "empty_segment"),
    "empty thinking": (response(think=""), "empty_segment"),
    "an empty answer": (response(answer=""), "empty_segment"),
    "text after the answer": (response() + " Or is it 2?", "text_outside"),
}


@pytest.mark.parametrize(("text", "reason"), LOOSE.values(), ids=LOOSE)
def test_l_the_grammar_is_strict(model, text, reason):
    # both accept a response without any of these faults
    assert format_published(response()) and split_response(response()) is not None
    assert format_published(text)
    ids = ids_of(text)
    found = find_segments(ids, [0, len(ids)], ENCODER.token_bytes)
    assert Reason(int(found.reason[0])) is parse_response(text).reason is Reason[reason.upper()]
    with torch.no_grad():
        scores = score_groups(model, [Sample("How many?", [text, response()])], ENCODER)
    assert scores.reason == (reason.replace("_", " "), None)
    assert scores.perception.isnan().tolist() == scores.reasoning.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["two answers", "an answer inside the thinking"])
def test_l_a_response_with_two_answers_is_invalid(name):
    text, _ = LOOSE[name]
    # published: the first answer wins, so a guess in the thinking is graded
    assert answer_published(text) == "1"
    assert split_response(text) is None


class DatasetPublished:
    """M: a row that fails to load is replaced by its neighbour, and a missing file by made-up rows."""

    def __init__(self, path):
        made_up = [chat(number) for number in range(4)]
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else made_up
        self.folder = path.parent

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            for image in row["images"]:
                (self.folder / image).read_bytes()
        except OSError:
            return self[(index + 1) % len(self.rows)]
        return row["id"]


def test_m_no_row_is_replaced_and_none_made_up(tmp_path):
    write_images(tmp_path)
    rows = [chat(0), chat(1, images=["images/gone.png"]), chat(2), chat(3)]
    path, gone, log = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "gone.jsonl", tmp_path / "skipped.jsonl"

    published = DatasetPublished(path)
    assert [published[i] for i in range(4)] == ["c0", "c2", "c2", "c3"]
    assert len(DatasetPublished(gone).rows) == 4

    stream = RowStream(path, "chat", LoadOptions(buffer=0, max_skipped=0.5, skipped=log))
    assert [row.id for row in stream] == ["c0", "c2", "c3"]
    assert stream.skipped == 1 and stream.causes == {"image not found": 1}
    (entry,) = map(json.loads, log.read_text().splitlines())
    assert (entry["file"], entry["row"], entry["field"]) == (str(path), 2, "images.0")
    with pytest.raises(DataError, match=re.escape(f"{path}, row 2: images.0: ")):
        list(RowStream(path, "chat", LoadOptions(buffer=0, on_error="raise")))
    with pytest.raises(DataError, match=re.escape(f"{gone}: expected a data file, there is none")):
        list(RowStream(gone, "chat"))


def test_token_credit_keeps_the_caption_reward_off_the_thinking():
    """One of two responses has the better caption; their thinking is equally good."""
    kind = torch.tensor([Kind.PERCEPTION] * 3 + [Kind.REASONING] * 4 + [Kind.ANSWER]).repeat(2)
    cu_seqlens = torch.tensor([0, 8, 16], dtype=torch.int32)
    perception, reasoning = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    group = torch.zeros(2, dtype=torch.int64)
    logp = torch.full((16,), -1.0, requires_grad=True)

    # published: one advantage for all tokens of a response
    whole = prism_advantage(perception, reasoning, group)
    (pushed,) = torch.autograd.grad(policy_loss(logp, None, whole, cu_seqlens)[0], logp)
    assert (pushed[kind != Kind.PERCEPTION] != 0).all()

    channels = torch.stack((group_advantage(perception, group), group_advantage(reasoning, group)))
    credit = token_advantage(channels, (kind != Kind.PERCEPTION).long(), cu_seqlens)
    (pushed,) = torch.autograd.grad(policy_loss(logp, None, credit, cu_seqlens)[0], logp)
    assert (pushed[kind != Kind.PERCEPTION] == 0).all() and (pushed[kind == Kind.PERCEPTION] != 0).all()


@torch.no_grad()
def test_q_tokenisation_does_not_separate_the_classes(stock, model):
    caption = "a red star in row 1"
    canonical = ids_of(f"<caption>{caption}")
    # a policy may sample the same text in other tokens, here one byte each
    alphabet = TOKENIZER.get_vocab()
    sampled = [alphabet[c] for c in "<caption>" + caption.replace(" ", "Ġ")]
    assert TOKENIZER.decode(sampled) == TOKENIZER.decode(canonical) and sampled != canonical

    # published: the student is scored on its sampled tokens, the teacher on canonical ones
    prompt = ENCODER.encode("How many?").input_ids
    student, teacher = (read(stock, model, [*prompt, *ids, TERMINAL], -1) for ids in (sampled, canonical))
    assert abs(student - teacher) > 1e-3

    whole = response(caption)
    tokens = [alphabet[c] for c in whole.replace(" ", "Ġ").replace("\n", "Ċ")]
    scores = score_groups(model, [Sample("How many?", [TOKENIZER.decode(tokens), whole], teacher=whole)], ENCODER)
    assert float(scores.perception[0]) == pytest.approx(teacher, abs=1e-4)
    torch.testing.assert_close(scores.perception[0], scores.perception[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.perception[:1], scores.teacher_perception, rtol=1e-6, atol=1e-6)


def test_q_a_token_across_a_tag_loses_no_text():
    """A token may hold the end of a tag and the first word: a cut by tokens would lose that word in one class only."""
    tokenizer = train_tokenizer(["<caption>There is</caption>"] * 50)
    ids = tokenizer("<caption>There is</caption>")["input_ids"]
    assert any(tokenizer.decode([token]) == ">There" for token in ids)
    text = "<caption>There is</caption><think>a</think><answer>b</answer>"
    encoder = PromptEncoder(tokenizer, ENCODER.image_processor)
    ((perception, _),) = TextBranches(encoder, ScoreLimits()).cut([text], ["it"])
    assert tokenizer.decode(perception.token_ids[:-1]) == "<caption>There is"
