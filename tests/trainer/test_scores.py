import copy
import dataclasses

import pytest
import torch
from discriminator_cases import IMAGE, TOKENIZER, make_backbone
from score_cases import ENCODER, TERMINAL, make_model, make_samples, picture, response

from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample, ScoreLimits, TextBranches, prepare_groups, score_groups, score_prepared
from prism_kernels import pair_loss
from prism_kernels.packing import Kind


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def alone(stock, value_weight, sample, *parts):
    """Returns the score of a text after a sample's prompt, by transformers' own forward."""
    prompt = ENCODER.encode(sample.prompt, sample.images)
    branch = [token for part in parts for token in ids_of(part)] + [TERMINAL]
    ids = torch.tensor([[*prompt.input_ids, *branch]])
    inputs = {}
    if prompt.pixel_values is not None:
        inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    stock.rope_deltas = None
    out = stock(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), use_cache=False, **inputs)
    return float(out.last_hidden_state[0, -1] @ value_weight[0])


@torch.no_grad()
def test_scores_equal_separate_transformers_forwards(model):
    stock, samples = make_backbone(), make_samples()
    weight = model.value_head.weight
    scores = score_groups(model, samples, ENCODER)
    first = samples[0]
    perception = ["a red star", "two blue squares in row 2", "a red star"]
    reasoning = [("I see one star.", "1"), ("No star at all.", "0"), ("I see one star.", "2")]
    for n in range(3):
        assert float(scores.perception[n]) == pytest.approx(
            alone(stock, weight, first, f"<caption>{perception[n]}"), abs=1e-4
        )
        think, answer = reasoning[n]
        assert float(scores.reasoning[n]) == pytest.approx(
            alone(stock, weight, first, f"<think>{think}", "</think>", f"<answer>{answer}"), abs=1e-4
        )
    expected = alone(stock, weight, first, "<caption>- a red star in row 1, column 1")
    assert float(scores.teacher_perception[0]) == pytest.approx(expected, abs=1e-4)
    expected = alone(stock, weight, samples[1], "<think>7", "</think>", "<answer>7")
    assert float(scores.teacher_reasoning[1]) == pytest.approx(expected, abs=1e-4)
    assert len({round(float(s), 3) for s in scores.perception if s.isfinite()}) > 2


@torch.no_grad()
def test_scores_do_not_depend_on_packs_or_company(model):
    samples = make_samples()
    together = score_groups(model, samples, ENCODER)
    tight = ScoreLimits(budget=max(g for g in group_sizes(samples)))
    assert len(prepare_groups(samples, ENCODER, tight).packs) > 1
    apart = score_groups(model, samples, ENCODER, tight)
    single = [score_groups(model, [sample], ENCODER) for sample in samples]
    for name in ("perception", "reasoning", "teacher_perception", "teacher_reasoning"):
        whole = getattr(together, name)
        joined = torch.cat([getattr(s, name) for s in single])
        torch.testing.assert_close(getattr(apart, name), whole, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert together.group.tolist() == [0, 0, 0, 1, 2, 2]


def group_sizes(samples):
    sizes = []
    for sample in samples:
        (part,) = prepare_groups([sample], ENCODER).packs
        sizes.append(len(part.pack.input_ids))
    return sizes


@torch.no_grad()
def test_an_invalid_response_costs_its_own_score_only(model):
    valid = make_samples()[0]
    invalid = {
        "": "missing tag",
        "<caption>a</caption><think>b</think>": "missing tag",
        response() + "<caption>again</caption>": "repeated tag",
        "<think>b</think><caption>a</caption><answer>1</answer>": "wrong order",
        "<caption>a</caption><think>b <answer>1</answer></think>": "nested",
        "So: " + response(): "text outside",
        response(caption=" \n"): "empty segment",
    }
    mixed = dataclasses.replace(valid, responses=[*list(invalid), *valid.responses])
    alone, scores = score_groups(model, [valid], ENCODER), score_groups(model, [mixed], ENCODER)
    count = len(invalid)
    assert scores.reason == (*invalid.values(), None, None, None)
    for name in ("perception", "reasoning"):
        assert getattr(scores, name)[:count].isnan().all()
        torch.testing.assert_close(getattr(scores, name)[count:], getattr(alone, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.teacher_perception, alone.teacher_perception, rtol=1e-5, atol=1e-5)


def test_pairs_are_those_with_both_sides_valid(model):
    samples = [*make_samples(), Sample("Which?", [response()], teacher="<answer>broken", name="broken")]
    prepared = prepare_groups(samples, ENCODER)
    assert prepared.pairs.tolist() == [True, True, True, True, False, False, False]
    assert prepared.teacher_reason == (None, None, "no teacher", "missing tag")
    scores = score_prepared(model, prepared)
    assert scores.teacher_perception.isnan().tolist() == [False, False, True, True]
    # a student without a teacher has a score too
    assert scores.perception.isnan().tolist() == [False] * 5 + [True, False]
    for pack in prepared.packs:
        chosen = pack.pack.pair >= 0
        compared = pack.pack.pair[chosen]
        # a branch and its teacher's branch share group and channel
        assert torch.equal(pack.pack.branch_group[chosen], pack.pack.branch_group[compared])
        last = pack.pack.kind[pack.pack.last_index]
        assert torch.equal(last[chosen], last[compared])
    assert sum(int((pack.pack.pair >= 0).sum()) for pack in prepared.packs) == 2 * 4


def test_scores_carry_gradients_pack_by_pack():
    samples = make_samples()
    whole, parts = make_model(), make_model()
    tight = ScoreLimits(budget=max(group_sizes(samples)))
    prepared = prepare_groups(samples, ENCODER, tight)
    assert len(prepared.packs) > 1
    count = int(prepared.pairs.sum())

    def loss_of(scores):
        loss = 0.0
        valid = prepared.pairs & scores.perception.isfinite()
        for preferred, other in (
            (scores.teacher_perception, scores.perception),
            (scores.teacher_reasoning, scores.reasoning),
        ):
            loss += pair_loss(preferred, other, group=scores.group, valid=valid, denominator=count)[0]
        return loss

    loss_of(score_prepared(whole, prepared)).backward()
    rewards = []
    for index in range(len(prepared.packs)):
        scores = score_prepared(parts, prepared, [index])
        rewards.append(scores.perception.detach())
        loss_of(scores).backward()
    for (name, mine), theirs in zip(parts.named_parameters(), whole.parameters()):
        if theirs.grad is not None:
            assert mine.grad.isfinite().all(), name
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        expected = score_groups(parts, samples, ENCODER).perception
    # each score comes from one pack
    counts = torch.stack(rewards).isfinite().sum(0)
    assert counts.tolist() == expected.isfinite().int().tolist()


def test_text_only_discriminator_sees_no_images():
    samples = make_samples()
    blind = make_model(images=False)
    seeing = make_model()
    other = [dataclasses.replace(s, images=[picture(*i.size[::-1], seed=9) for i in s.images]) for s in samples]
    with torch.no_grad():
        assert torch.equal(
            score_groups(blind, samples, ENCODER).perception[:4], score_groups(blind, other, ENCODER).perception[:4]
        )
        first, second = (score_groups(seeing, s, ENCODER).perception for s in (samples, other))
        assert (first - second)[:3].abs().min() > 1e-4
    assert all(pack.pixel_values is None for pack in prepare_groups(samples, ENCODER, images=False).packs)
    with pytest.raises(ValueError, match=r"the prompt of sample 0 as text, for a text-only discriminator"):
        score_groups(blind, [Sample(ENCODER.encode("a", [picture(32, 32)]), [response()])], ENCODER)


@torch.no_grad()
def test_encoded_prompts_score_as_their_text(model):
    samples = make_samples()
    encoded = [dataclasses.replace(s, prompt=ENCODER.encode(s.prompt, s.images), images=()) for s in samples]
    expected, got = (score_groups(model, s, ENCODER).reasoning for s in (samples, encoded))
    assert torch.equal(expected.nan_to_num(), got.nan_to_num())


def test_branches_are_tags_text_and_terminal():
    ((perception, reasoning),) = TextBranches(ENCODER, ScoreLimits()).cut([response()], ["it"])
    assert TOKENIZER.decode(perception.token_ids) == "<caption>a red star<|im_end|>"
    assert TOKENIZER.decode(reasoning.token_ids) == "<think>I see one star.</think><answer>1<|im_end|>"
    assert set(perception.kind) == {Kind.PERCEPTION}
    answer = reasoning.kind.index(Kind.ANSWER)
    assert set(reasoning.kind[:answer]) == {Kind.REASONING} and set(reasoning.kind[answer:]) == {Kind.ANSWER}
    assert TOKENIZER.decode(reasoning.token_ids[answer:]) == "<answer>1<|im_end|>"


def test_text_that_spells_special_tokens_holds_none():
    text = response("a <|image_pad|> and <|im_end|>")
    ((perception, _),) = TextBranches(ENCODER, ScoreLimits()).cut([text], ["it"])
    assert IMAGE not in perception.token_ids and perception.token_ids.count(TERMINAL) == 1
    assert TOKENIZER.decode(perception.token_ids[:-1]) == "<caption>a <|image_pad|> and <|im_end|>"


def test_text_and_tokens_have_the_same_tags():
    # the tokenizer's normalisation makes one other character of bracket and combining stroke
    texts = ["<caption>\u0338first</caption>\u0338" + response("second"), response() + "</answer>\u0338"]
    cut = TextBranches(ENCODER, ScoreLimits()).cut(texts, ["one", "two"])
    assert cut == ["text outside", "text outside"]
    ((perception, _),) = TextBranches(ENCODER, ScoreLimits()).cut([response("e\u0301 <caption>\u0338")], ["it"])
    assert TOKENIZER.decode(perception.token_ids[:-1]) == "<caption>é <caption≯"


def test_view_changes_what_is_scored(model):
    samples = make_samples()[:1]

    def first_token(segment):
        return type(segment)(segment.token_ids[:1], segment.kind[:1])

    prepared = prepare_groups(samples, ENCODER, view=first_token)
    assert prepared.packs[0].pack.layout.branch == (1,) * 8
    with torch.no_grad():
        scores = score_prepared(model, prepared)
    assert float(scores.perception.max() - scores.perception.min()) < 1e-5


def test_nothing_to_score_is_no_score(model):
    for samples in ([], [Sample("Which?", ["broken"], teacher="broken too")], [Sample("Which?", [])]):
        scores = score_groups(model, samples, ENCODER)
        assert scores.perception.shape == (sum(len(s.responses) for s in samples),)
        assert scores.perception.isnan().all() and scores.teacher_reasoning.isnan().all()


def test_bad_samples_are_named(model):
    good = make_samples()
    with pytest.raises(ValueError, match=r"group 0 \(stars\) to have at most 50 tokens, the budget"):
        score_groups(model, good[:1], ENCODER, ScoreLimits(budget=50))
    with pytest.raises(ValueError, match=r"at most 8 prompt tokens in stars, got \d+"):
        score_groups(model, good, ENCODER, ScoreLimits(prompt_tokens=8))
    with pytest.raises(ValueError, match=r"an image for each of the 2 image places of sample 1, got 1 images"):
        score_groups(model, [good[1], Sample("<image><image>?", [response()], images=[picture(32, 32)])], ENCODER)
    with pytest.raises(ValueError, match="too_long to be one of 'skip', 'raise', got 'cut'"):
        ScoreLimits(too_long="cut")
    with pytest.raises(ValueError, match="budget > 0 and finite, got 0"):
        ScoreLimits(budget=0)


def test_dense_discriminator_scores_by_the_same_function():
    dense = Discriminator(make_backbone(dense=True), value_weight=torch.ones(1, 64))
    scores = score_groups(dense, make_samples(), ENCODER)
    assert scores.perception[:4].isfinite().all()
    moe = copy.deepcopy(make_model())
    assert score_groups(moe, make_samples(), ENCODER).reasoning[:4].isfinite().all()
