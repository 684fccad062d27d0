import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from discriminator_cases import TOKENIZER
from PIL import Image

from prism.config import DiscriminatorSettings
from prism.discriminator.controls import VIEWS, shortcut_controls, swap_images
from prism.discriminator.model import Discriminator
from prism.discriminator.score import GroupScores, Sample, ScoreLimits, prepare_groups, score_groups, score_prepared
from prism.discriminator.training import channel_report, discriminator_step, within_group_auc
from prism.models.prompts import PromptEncoder
from prism.models.sizes import TinyMoeSize
from prism.models.tiny import tiny_discriminator_base, tiny_image_processor
from prism.runtime.optimiser import GuardedOptimiser
from prism_kernels.integrations.transformers.moe_block import MoeBlock

SIZE = TinyMoeSize(hidden_size=64, layers=2, intermediate_size=96, expert_intermediate_size=48)
ENCODER = PromptEncoder(TOKENIZER, tiny_image_processor(SIZE))
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def make_model(seed=0, images=True):
    base, _ = tiny_discriminator_base(SIZE, tokenizer=TOKENIZER, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, SIZE.hidden_size, generator=generator) * 0.1
    return Discriminator(base.model, images=images, value_weight=weight)


def response(colour, result):
    return f"<caption>one {colour} square</caption><think>it is {result}</think><answer>{result}</answer>"


def sample(index, responses=2, teacher=True, colour="red"):
    other = {"red": "blue", "blue": "red"}[colour]
    pixels = np.full((32, 32, 3), COLOURS[colour], dtype=np.uint8)
    texts = [response(other, f"wrong {index + r}") for r in range(responses)]
    return Sample(
        f"question {index}", texts, [Image.fromarray(pixels)], response(colour, f"right {index}") if teacher else None
    )


def optimiser_of(model, lr=2e-3):
    return GuardedOptimiser(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))


def still(model):
    """Returns an optimiser that changes no weight, so that gradients can be compared."""
    return GuardedOptimiser(torch.optim.SGD(model.parameters(), lr=0.0), clip_norm=1e9)


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_step_returns_the_scores_before_it_and_updates_the_weights():
    model, samples = make_model(), [sample(0, 3), sample(1, 1), sample(2, 2)]
    with torch.no_grad():
        before = score_groups(model, samples, ENCODER)
    weights = parameters_of(model)
    result = discriminator_step(model, prepare_groups(samples, ENCODER), optimiser_of(model), DiscriminatorSettings())
    for name in ("perception", "reasoning", "teacher_perception", "teacher_reasoning"):
        torch.testing.assert_close(getattr(result.scores, name), getattr(before, name))
        assert not getattr(result.scores, name).requires_grad
    assert result.skipped is None and math.isfinite(result.grad_norm)
    assert float(result.pairs["perception"].pairs) == 6
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    assert "value_head.weight" in moved
    assert any("visual" in name for name in moved) and any("experts" in name for name in moved)


def test_the_number_of_packs_does_not_change_the_step():
    samples = [sample(0, 3), sample(1, 1), sample(2, 2), sample(3, 2, teacher=False)]
    # the load-balance loss depends on the packs
    settings = DiscriminatorSettings(aux_coef=0.0)
    results = []
    for budget in (16384, 1):
        model = make_model()
        if budget == 1:
            budget = max(len(part.pack.input_ids) for part in prepare_groups([samples[0]], ENCODER).packs)
        prepared = prepare_groups(samples, ENCODER, ScoreLimits(budget=budget))
        result = discriminator_step(model, prepared, still(model), settings)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((len(prepared.packs), result, gradients))
    (one, whole, wanted), (many, parts, got) = results
    assert one == 1 and many > 1
    torch.testing.assert_close(parts.pair_loss, whole.pair_loss)
    torch.testing.assert_close(parts.scores.perception, whole.scores.perception)
    assert not parts.scores.perception.isnan().any()
    assert wanted.keys() == got.keys() and len(got) > 40
    for name in wanted:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert parts.pairs["reasoning"].totals.tolist() == pytest.approx(whole.pairs["reasoning"].totals.tolist(), rel=1e-4)


def test_without_a_valid_pair_the_step_is_skipped_with_a_reason():
    # the published loss (defect G) pushes the teacher's score up here, without a student to compare it with
    invalid = [replace(sample(0), responses=["no tags", "<caption>a</caption>"]), sample(1, teacher=False)]
    model = make_model()
    weights = parameters_of(model)
    result = discriminator_step(model, prepare_groups(invalid, ENCODER), optimiser_of(model), DiscriminatorSettings())
    assert result.skipped == "no valid pair" and math.isnan(result.grad_norm)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert result.scores.perception[:2].isnan().all() and not result.scores.perception[2:].isnan().any()
    assert not result.scores.teacher_perception[0].isnan()
    assert math.isnan(result.pairs["perception"].means()["correct"])

    teacher = torch.zeros(2, requires_grad=True)
    masked_student = torch.zeros(2)
    published = (-torch.nn.functional.logsigmoid(teacher - masked_student)).sum() / 1
    published.backward()
    assert (teacher.grad < 0).all()


def test_a_group_without_any_valid_text_is_not_computed():
    prepared = prepare_groups([replace(sample(0), responses=["x"], teacher="y")], ENCODER)
    assert prepared.packs == ()
    result = discriminator_step(make_model(), prepared, optimiser_of(make_model()), DiscriminatorSettings())
    assert result.skipped == "no valid pair" and result.scores.perception.isnan().all()


@pytest.mark.parametrize("where", ["score", "gradient"])
def test_a_non_finite_score_or_gradient_skips_the_step(where):
    model = make_model()
    if where == "score":
        with torch.no_grad():
            model.backbone.language_model.norm.weight[0] = torch.nan
    else:
        model.value_head.weight.register_hook(lambda g: g * torch.inf)
    weights = parameters_of(model)
    result = discriminator_step(
        model, prepare_groups([sample(0)], ENCODER), optimiser_of(model), DiscriminatorSettings()
    )
    # a NaN score is invalid, so the reason may also be that there is no valid pair
    assert result.skipped in ("the gradient's norm is not finite: inf", "the gradient's norm is not finite: nan") or (
        where == "score" and result.skipped is not None
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], equal_nan=True, rtol=0, atol=0)


def test_the_balance_losses_reach_the_router_of_every_layer():
    model = make_model()
    settings = DiscriminatorSettings(aux_coef=1.0, z_coef=0.0, regularisation=0.0)
    gradients = []
    for aux in (1.0, 0.0):
        prepared = prepare_groups([sample(0), sample(1)], ENCODER)
        step = settings.model_copy(update={"aux_coef": aux})
        result = discriminator_step(model, prepared, still(model), step)
        gradients.append([m.gate.weight.grad.clone() for m in model.modules() if isinstance(m, MoeBlock)])
    assert len(gradients[0]) == SIZE.layers
    for with_aux, without in zip(*gradients):
        assert not torch.allclose(with_aux, without)
    assert result.expert_counts.shape == (SIZE.layers, 5, SIZE.experts)
    # each token has its number of experts; the last layer computes only the scored tokens
    pack = prepared.packs[0].pack
    tokens = torch.tensor([len(pack.input_ids), len(pack.last_index)])
    torch.testing.assert_close(result.expert_counts.sum((1, 2)), (tokens * SIZE.experts_per_token).float())
    assert (result.expert_counts[0].sum(1) > 0).all()


def train(model, steps=30, view=None, seed=0):
    optimiser = optimiser_of(model)
    for step in range(steps):
        samples = [sample(100 * step + i, 2, colour=("red", "blue")[i % 2]) for i in range(4)]
        result = discriminator_step(
            model, prepare_groups(samples, ENCODER, view=view), optimiser, DiscriminatorSettings()
        )
        assert result.skipped is None
    return result


def test_training_separates_held_out_pairs_and_the_controls_find_no_shortcut():
    model = make_model()
    train(model)
    held_out = [sample(9000 + i, 2, colour=("red", "blue")[i % 2]) for i in range(8)]
    found = shortcut_controls(model, held_out, ENCODER)
    assert found["as it is"]["perception"].accuracy >= 0.8
    assert found["as it is"]["reasoning"].accuracy >= 0.8
    # a caption is right for its own image only: on the other image the wrong colour wins
    assert found["swapped images"]["perception"].accuracy <= 0.2
    for name in ("last token alone", "first token alone"):
        assert found[name]["perception"].accuracy == 0.5 and found[name]["reasoning"].accuracy == 0.5
        assert found[name]["perception"].pairs == 16


@pytest.mark.parametrize("name", ["last token alone", "first token alone"])
def test_a_discriminator_of_one_token_stays_at_chance(name):
    model = make_model()
    train(model, steps=6, view=VIEWS[name])
    held_out = [sample(9000 + i) for i in range(4)]
    with torch.no_grad():
        prepared = prepare_groups(held_out, ENCODER, view=VIEWS[name])
        reports = channel_report(score_prepared(model, prepared))
    assert [report.accuracy for report in reports.values()] == [0.5, 0.5]


def test_text_only_and_dense_discriminators_train_with_the_same_step():
    model = make_model(images=False)
    samples = [sample(0), sample(1)]
    result = discriminator_step(
        model, prepare_groups(samples, ENCODER, images=False), optimiser_of(model), DiscriminatorSettings()
    )
    assert result.skipped is None
    assert "swapped images" not in shortcut_controls(model, samples, ENCODER)


def test_swapping_images_leaves_out_samples_without_a_partner():
    samples = [sample(0), sample(1, colour="blue"), replace(sample(2), images=[])]
    swapped = swap_images(samples)
    assert [s.images[0].getpixel((0, 0)) for s in swapped] == [COLOURS["blue"], COLOURS["red"]]
    assert [s.prompt for s in swapped] == ["question 0", "question 1"]
    assert swap_images(samples[:1]) == []


def test_within_group_auc_counts_pairs_of_one_group_and_a_tie_as_half():
    rng = np.random.default_rng(0)
    score = torch.tensor(rng.integers(0, 4, 60), dtype=torch.float32)
    right, group = torch.tensor(rng.random(60) < 0.5), torch.tensor(rng.integers(0, 7, 60))
    score[5] = torch.nan
    won = pairs = 0.0
    for i in range(60):
        for j in range(60):
            if right[i] and not right[j] and group[i] == group[j] and not score[[i, j]].isnan().any():
                pairs += 1
                won += 1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
    auc, compared = within_group_auc(score, right, group)
    assert compared == pairs and auc == pytest.approx(won / pairs)
    nothing, none = within_group_auc(score, torch.ones(60, dtype=torch.bool), group)
    assert none == 0 and math.isnan(nothing)


def test_scores_that_differ_by_rounding_are_ties():
    score = torch.tensor([3.0, 3.0 + 3e-7, -2.0, -2.0 + 1e-3])
    right = torch.tensor([True, False, False, True])
    assert within_group_auc(score, right, torch.tensor([0, 0, 1, 1])) == (0.75, 2)


def test_the_report_leaves_out_samples_without_a_score():
    nan = torch.nan
    scores = GroupScores(
        perception=torch.tensor([1.0, nan, 3.0, 0.0]),
        reasoning=torch.tensor([nan, nan, nan, nan]),
        teacher_perception=torch.tensor([2.0, 0.0]),
        teacher_reasoning=torch.tensor([1.0, nan]),
        group=torch.tensor([0, 0, 0, 1]),
        reason=(None,) * 4,
        teacher_reason=(None,) * 2,
    )
    reports = channel_report(scores, {"perception": torch.tensor([True, True, False, True])})
    perception = reports["perception"]
    assert perception.pairs == 3 and perception.accuracy == 0.5 and perception.gap == pytest.approx(0.0)
    assert perception.compared == 1 and perception.auc == 0.0
    assert reports["reasoning"].pairs == 0 and math.isnan(reports["reasoning"].accuracy)
    with pytest.raises(ValueError, match="expected right of shape"):
        channel_report(scores, {"perception": torch.tensor([True])})


def test_bad_settings_and_samples_are_named():
    with pytest.raises(ValueError, match=r"aux_coef\n.*greater than or equal to 0.*input_value=-1"):
        DiscriminatorSettings(aux_coef=-1)
    with pytest.raises(ValueError, match="GuardedOptimiser: expected clip_norm > 0"):
        GuardedOptimiser(torch.optim.SGD(make_model().parameters(), lr=0.0), clip_norm=0)
    with pytest.raises(ValueError, match="shortcut_controls: expected samples with a teacher"):
        shortcut_controls(make_model(), [sample(0, teacher=False)], ENCODER)


def test_hard_clipped_scores_lose_their_gradient_and_softly_clipped_ones_do_not():
    # published scores are clipped at 10 (defect F): a clipped score has no gradient and never returns
    from prism_kernels import pair_loss

    student = torch.tensor([25.0], requires_grad=True)
    teacher = torch.tensor([0.0])
    published = -torch.nn.functional.logsigmoid(teacher.clamp(-10, 10) - student.clamp(-10, 10)).sum()
    (gone,) = torch.autograd.grad(published, student)
    assert gone == 0
    ours, _ = pair_loss(teacher, student, soft_clip=10.0, regularisation=1e-3)
    (left,) = torch.autograd.grad(ours, student)
    assert left > 0.05
