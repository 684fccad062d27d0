import copy

import pytest
import torch
from discriminator_cases import GROUPS, IMAGE, SIZE, TEXT_GROUPS, TOKENIZER, make_groups, make_images, pack_of

from prism.models.policy import Policy, response_rows
from prism.models.tiny import tiny_policy
from prism_kernels.packing import Branch, Kind, PrefixGroup
from prism_kernels.testing import relative_error


def make_policy(seed=0):
    model, _ = tiny_policy(SIZE, tokenizer=TOKENIZER, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
    return model


def separate_logps(stock, groups, pixels, grids, temperature):
    """Returns the log-probabilities of each response by transformers' forward over a copy of its prompt and images."""
    found = []
    patches = images = 0
    for group in groups:
        own = torch.tensor(group.image_grids, dtype=torch.int64).reshape(-1, 3)
        count = int(own.prod(-1).sum())
        inputs = {}
        if len(own):
            inputs = {"pixel_values": pixels[patches : patches + count], "image_grid_thw": own}
        patches, images = patches + count, images + len(own)
        for branch in group.branches:
            ids = torch.tensor([[*group.prompt_ids, *branch.token_ids]])
            stock.model.rope_deltas = None
            kinds = (ids == IMAGE).int()
            logits = stock(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs).logits[0].float()
            start = len(group.prompt_ids)
            logp = (logits[start - 1 : -1] / temperature).log_softmax(-1)
            found.append(logp.gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("shapes", [GROUPS, TEXT_GROUPS], ids=["images", "text"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logps_and_gradients_equal_separate_forwards(shapes, temperature):
    stock = make_policy()
    policy = Policy(copy.deepcopy(stock))
    groups = make_groups(shapes)
    pixels, grids = make_images(groups, torch.float32)
    expected = separate_logps(stock, groups, pixels, grids, temperature)
    got = policy(pack_of(groups), pixels, grids, temperature=temperature, entropy=True)
    assert got.logp.shape == expected.shape
    assert (got.logp - expected).abs().max() <= 1e-4
    assert expected.detach().std() > 0.1
    pull = torch.randn(len(expected), generator=torch.Generator().manual_seed(3))
    (expected * pull).sum().backward()
    (got.logp * pull).sum().backward()
    theirs, compared = dict(stock.named_parameters()), 0
    for name, parameter in policy.model.named_parameters():
        if theirs[name].grad is None or parameter.grad is None:
            assert not any(g is not None and g.any() for g in (theirs[name].grad, parameter.grad)), name
            continue
        assert relative_error(parameter.grad, theirs[name].grad) <= 1e-4, name
        compared += bool(theirs[name].grad.any())
    assert compared > 30


def test_the_rows_of_each_response_start_from_its_prompts_last_token():
    groups = [
        PrefixGroup([1, 2, 3], [Branch([4, 5], Kind.REASONING), Branch([6], Kind.REASONING)]),
        PrefixGroup([7], []),
        PrefixGroup([8, 9], [Branch([10], Kind.ANSWER), Branch([11, 12, 13], Kind.ANSWER)]),
    ]
    rows = response_rows(pack_of(groups))
    # 1 2 3 | 4 5 | 6 | 7 | 8 9 | 10 | 11 12 13
    assert rows.token.tolist() == [3, 4, 5, 9, 10, 11, 12]
    assert rows.source.tolist() == [2, 3, 2, 8, 8, 10, 11]
    empty = response_rows(pack_of([PrefixGroup([1, 2], [])]))
    assert empty.token.tolist() == empty.source.tolist() == []
