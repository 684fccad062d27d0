"""Defects A, B, C, E and Q of the published discriminator: each is re-created, shown to be one, and not ours.

Defect N is in test_upcycle.py.
"""

import pytest
import torch
from discriminator_cases import IMAGE, TOKENIZER, make_backbone
from score_cases import ENCODER, TERMINAL, make_model, picture, response

from prism.discriminator.branches import ScoreLimits, TextBranches
from prism.discriminator.score import Sample, prepare_groups, score_groups
from prism.models.prompts import PromptEncoder
from prism.models.tokenizer import train_tokenizer

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
    """The score of one row of transformers' forward, at a place."""
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
    """A: the token that each class is scored at, when the batch is padded to its longest row."""
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


def test_a_last_token_does_not_tell_the_classes_apart(model):
    # published: whatever either of them writes, the token alone says who wrote it
    published = [scored_tokens_published(*text) for text in TEXTS]
    students = {token for student, _ in published for token in student}
    teachers = {token for _, teacher in published for token in teacher}
    assert not students & teachers

    sample = Sample("How many?", [response(c or "none", t, a) for c, t, a in TEXTS], teacher=response("x", "y", "z"))
    (part,) = prepare_groups([sample], ENCODER).packs
    pack = part.pack
    ends = pack.input_ids[pack.last_index]
    assert ends.shape == (10,) and set(ends.tolist()) == {TERMINAL}
    # nor does the first one, which is the channel's tag
    begins = pack.input_ids[pack.last_index - pack.cu_branch.diff() + 1]
    assert begins[0::2].unique().numel() == begins[1::2].unique().numel() == 1

    # a teacher's text in a student's mouth has the teacher's score
    copied = Sample("How many?", [response("x", "y", "z")], teacher=response("x", "y", "z"))
    with torch.no_grad():
        scores = score_groups(model, [copied], ENCODER)
    torch.testing.assert_close(scores.perception, scores.teacher_perception, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.reasoning, scores.teacher_reasoning, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_b_long_teacher_is_never_cut_in_silence(model):
    long = "Step 1: look. " * 120
    teachers = [response(think=f"{long} The answer is {n}.", answer=str(n)) for n in (1, 2)]
    assert all(512 < len(ids_of(teacher)) < 2000 for teacher in teachers)
    # published: both are the same 512 tokens, and the answer is not in them
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
def test_c_scores_are_read_at_the_right_place_in_any_company(stock, model):
    captions = [
        "a star",
        "two red squares in row 1, column 2",
        "a",
        "three blue circles, and one cross in row 4, column 3",
    ]
    prompt = ENCODER.encode("How many?").input_ids
    rows = [[*prompt, *ids_of(f"<caption>{caption}"), TERMINAL] for caption in captions]
    right = [read(stock, model, row, -1) for row in rows]

    # published: the batch is padded on the left, the place is counted as if on the right
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


@torch.no_grad()
def test_q_tokenisation_does_not_tell_the_classes_apart(stock, model):
    caption = "a red star in row 1"
    canonical = ids_of(f"<caption>{caption}")
    # as a policy may sample it: the same text, a token at a time of one byte each
    alphabet = TOKENIZER.get_vocab()
    sampled = [alphabet[c] for c in "<caption>" + caption.replace(" ", "Ġ")]
    assert TOKENIZER.decode(sampled) == TOKENIZER.decode(canonical) and sampled != canonical

    # published: the student's score is that of its sampled tokens, the teacher's that of canonical ones
    prompt = ENCODER.encode("How many?").input_ids
    student, teacher = (read(stock, model, [*prompt, *ids, TERMINAL], -1) for ids in (sampled, canonical))
    assert abs(student - teacher) > 1e-3

    whole = response(caption)
    tokens = [alphabet[c] for c in whole.replace(" ", "Ġ").replace("\n", "Ċ")]
    scores = score_groups(model, [Sample("How many?", [TOKENIZER.decode(tokens), whole], teacher=whole)], ENCODER)
    assert float(scores.perception[0]) == pytest.approx(teacher, abs=1e-4)
    torch.testing.assert_close(scores.perception[0], scores.perception[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.perception[:1], scores.teacher_perception, rtol=1e-6, atol=1e-6)


def test_q_tokens_that_reach_over_a_tag_lose_nothing():
    """A token may end a tag and begin the text: cut by tokens, one class would lose its first word alone."""
    tokenizer = train_tokenizer(["<caption>There is</caption>"] * 50)
    ids = tokenizer("<caption>There is</caption>")["input_ids"]
    assert any(tokenizer.decode([token]) == ">There" for token in ids)
    text = "<caption>There is</caption><think>a</think><answer>b</answer>"
    encoder = PromptEncoder(tokenizer, ENCODER.image_processor)
    ((perception, _),) = TextBranches(encoder, ScoreLimits()).cut([text], ["it"])
    assert tokenizer.decode(perception.token_ids[:-1]) == "<caption>There is"
