import copy

import pytest
import torch
from discriminator_cases import (
    GROUPS,
    TEXT_GROUPS,
    make_backbone,
    make_groups,
    make_images,
    make_pair,
    pack_of,
    separate_scores,
    widen,
)

from prism.discriminator.model import Discriminator
from prism_kernels.integrations.transformers.moe_block import collect_routing
from prism_kernels.packing import Branch, Kind, PrefixGroup
from prism_kernels.testing import relative_error

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-10, 1e-10)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_packed_scores_and_gradients_equal_separate_forwards(dense, dtype, monkeypatch):
    if dtype == torch.float64:
        widen(monkeypatch)
    stock, model = make_pair(dense=dense, dtype=dtype)
    groups = make_groups()
    pixels, grids = make_images(groups, dtype)
    value = model.value_head.weight.detach().clone().requires_grad_()
    expected = separate_scores(stock, value, groups, pixels, grids)
    got = model(pack_of(groups), pixels, grids)
    of_scores, of_gradients = TOLERANCE[dtype]
    assert got.dtype == dtype and got.shape == (12,)
    assert (got - expected).abs().max() <= of_scores * max(1.0, float(expected.detach().abs().max()))
    # the scores are not all the same
    assert expected.detach().std() > 0.1

    pull = torch.randn(12, dtype=dtype, generator=torch.Generator().manual_seed(3))
    (expected * pull).sum().backward()
    (got * pull).sum().backward()
    theirs = dict(stock.named_parameters())
    compared = 0
    for name, parameter in model.backbone.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert relative_error(parameter.grad, theirs[name].grad) <= of_gradients, name
        compared += bool(theirs[name].grad.any())
    assert compared > 60
    assert relative_error(model.value_head.weight.grad, value.grad) <= max(of_gradients, 1e-6)


def test_text_only_prompts_need_no_images():
    stock, model = make_pair()
    model.images = False
    groups = make_groups(TEXT_GROUPS)
    expected = separate_scores(stock, model.value_head.weight, groups, None, None)
    torch.testing.assert_close(model(pack_of(groups)), expected, rtol=1e-5, atol=1e-5)
    pixels, grids = make_images(make_groups(), torch.float32)
    with pytest.raises(ValueError, match="no pixel_values, since this discriminator is text-only"):
        model(pack_of(make_groups()), pixels, grids)


def test_scores_do_not_depend_on_the_rest_of_the_pack():
    _, model = make_pair()
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    together = model(pack_of(groups), pixels, grids)
    alone = model(pack_of(groups[:1]), pixels[:24], grids[:1])
    torch.testing.assert_close(together[:4], alone, rtol=1e-5, atol=1e-5)
    first = groups[0]
    fewer = PrefixGroup(first.prompt_ids, [first.branches[2]], image_grids=first.image_grids)
    torch.testing.assert_close(model(pack_of([fewer]), pixels[:24], grids[:1])[0], alone[2], rtol=1e-5, atol=1e-5)


def test_images_and_deepstack_reach_the_scores():
    _, model = make_pair()
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    with torch.no_grad():
        before = model(pack_of(groups), pixels, grids)
        other = pixels.clone()
        other[:24] = torch.randn(24, 1536)
        changed = (model(pack_of(groups), other, grids) - before).abs()
        # only the first group's image changed
        assert changed[:4].min() > 1e-3 and changed[4:].max() < 1e-5
        for parameter in model.backbone.visual.deepstack_merger_list.parameters():
            parameter.zero_()
        without = (model(pack_of(groups), pixels, grids) - before).abs()
        assert without[:4].min() > 1e-3 and without[4:6].max() < 1e-5


def test_each_image_is_encoded_once():
    _, model = make_pair()
    seen = []
    model.backbone.visual.patch_embed.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    model(pack_of(groups), pixels, grids)
    assert seen == [len(pixels)]


def test_bf16_backbone_scores_in_fp32():
    _, model = make_pair(dtype=torch.bfloat16)
    groups = make_groups()
    pixels, grids = make_images(groups, torch.bfloat16)
    scores = model(pack_of(groups), pixels, grids)
    assert scores.dtype == torch.float32 and model.value_head.weight.dtype == torch.float32
    assert scores.isfinite().all()


def test_checkpointed_gradients_reach_the_router():
    _, model = make_pair()
    other = copy.deepcopy(model)
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    model.train()(pack_of(groups), pixels, grids).sum().backward()
    other.checkpoint_layers()
    other.train()(pack_of(groups), pixels, grids).sum().backward()
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_routers_see_kinds_and_weights():
    backbone = make_backbone()
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    plain = Discriminator(copy.deepcopy(backbone), value_weight=weight)
    biased = Discriminator(copy.deepcopy(backbone), value_weight=weight, kind_bias=True)
    groups = make_groups()
    pack, (pixels, grids) = pack_of(groups), make_images(groups, torch.float32)
    with collect_routing(biased) as routings:
        scores = biased(pack, pixels, grids)
    # the initial biases are 0 and change nothing
    torch.testing.assert_close(scores, plain(pack, pixels, grids), rtol=1e-5, atol=1e-6)
    assert [routing.counts.shape for routing in routings] == [(5, 4)] * 3
    kinds = torch.bincount(pack.kind, minlength=5)
    for routing in routings[:-1]:
        assert torch.equal(routing.counts.sum(1), 2.0 * kinds)
    # the top layer computes only the scored tokens
    assert torch.equal(routings[-1].counts.sum(1), 2.0 * torch.bincount(pack.kind[pack.last_index], minlength=5))

    scores.sum().backward()
    for name, parameter in biased.named_parameters():
        if name.endswith("kind_bias"):
            assert parameter.grad[Kind.PERCEPTION].any(), name
    with torch.no_grad():
        for name, parameter in biased.named_parameters():
            if name.endswith("kind_bias"):
                parameter[Kind.PERCEPTION, 0] = 50.0
        with collect_routing(biased) as routings:
            changed = biased(pack, pixels, grids)
    first = routings[0].counts
    assert first[Kind.PERCEPTION, 0] == kinds[Kind.PERCEPTION] and first[Kind.REASONING, 0] < kinds[Kind.REASONING]
    assert (changed - scores).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected a Mixture-of-Experts backbone for kind_bias, got Qwen3VLModel"):
        Discriminator(make_backbone(dense=True), kind_bias=True)


def test_forward_is_bitwise_repeatable():
    _, model = make_pair()
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    runs = []
    for _ in range(2):
        model.zero_grad()
        scores = model(pack_of(groups), pixels, grids)
        scores.square().sum().backward()
        runs.append([scores.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_pack_without_branches_has_no_scores():
    _, model = make_pair()
    pack = pack_of([PrefixGroup([1, 2, 3], [])])
    assert model(pack).shape == (0,)


def test_value_head_is_zero_until_it_is_given():
    model = Discriminator(make_backbone())
    groups = make_groups()
    assert not model(pack_of(groups), *make_images(groups, torch.float32)).any()
    with pytest.raises(ValueError, match=r"Discriminator: expected value_weight of shape \(1, 64\), got \(1, 32\)"):
        Discriminator(make_backbone(), value_weight=torch.zeros(1, 32))
    with pytest.raises(TypeError, match="backbone to be a Qwen3VLModel or Qwen3VLMoeModel, got Linear"):
        Discriminator(torch.nn.Linear(2, 2))


def test_images_that_do_not_match_the_pack_are_refused():
    _, model = make_pair()
    groups = make_groups()
    pixels, grids = make_images(groups, torch.float32)
    with pytest.raises(ValueError, match="expected pixel_values and image_grid_thw for a pack with image tokens"):
        model(pack_of(groups))
    with pytest.raises(ValueError, match=r"expected 7 image tokens in the pack, one for each merged patch, got 21"):
        model(pack_of(groups), pixels[:28], grids[:2])
    text = PrefixGroup([1, 2], [Branch([3], Kind.PERCEPTION)])
    with pytest.raises(ValueError, match=r"expected 21 image tokens in the pack, .* got 0"):
        model(pack_of([text]), pixels, grids)


def test_groups_are_unequal_and_have_one_token_segments():
    lengths = [n for *_, branches in GROUPS for n in branches]
    assert min(lengths) == 1 and len({len(branches) for *_, branches in GROUPS}) > 2
