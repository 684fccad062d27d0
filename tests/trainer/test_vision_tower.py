import copy

import pytest
import torch
from torch.nn import functional

from prism.models.packed import batch_images, encode_images
from prism.models.tiny import tiny_discriminator_base, tiny_policy

GRIDS = {"equal": [[1, 4, 6]] * 3, "unequal": [[1, 2, 2], [1, 4, 6], [1, 8, 2]], "one": [[1, 4, 4]]}


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("build", [tiny_policy, tiny_discriminator_base])
def test_batched_vision_tower_equals_the_stock_one(build, grids):
    model, _ = build()
    stock, batched = model.model.visual.double(), copy.deepcopy(model.model.visual).double()
    batch_images(batched)
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(-1).sum()), 1536, dtype=torch.float64)
    expected = stock(pixels, grid_thw=grid)
    got = encode_images(batched, pixels, grid)
    torch.testing.assert_close(got.merged, expected.pooler_output, rtol=1e-10, atol=1e-12)
    assert len(got.deepstack) == len(expected.deepstack_features) == 1
    torch.testing.assert_close(got.deepstack[0], expected.deepstack_features[0], rtol=1e-10, atol=1e-12)

    pull = torch.randn_like(got.merged)
    (expected.pooler_output * pull).sum().backward()
    (got.merged * pull).sum().backward()
    for (name, mine), theirs in zip(batched.named_parameters(), stock.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    assert batched.state_dict().keys() == stock.state_dict().keys()


def test_images_of_one_size_take_one_attention_call(monkeypatch):
    model, _ = tiny_policy()
    visual = model.model.visual
    batch_images(visual)
    calls = []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "prism.models.packed.scaled_dot_product_attention",
        lambda *args, **options: calls.append(args[0].shape) or attention(*args, **options),
    )
    grid = torch.tensor([[1, 4, 4]] * 5)
    encode_images(visual, torch.randn(80, 1536), grid)
    assert calls == [(5, 2, 16, 32)] * 2


def test_vision_tower_counts_patches():
    model, _ = tiny_policy()
    with pytest.raises(ValueError, match=r"encode_images: expected pixel_values with the 16 patches .* got 12"):
        encode_images(model.model.visual, torch.randn(12, 1536), torch.tensor([[1, 4, 4]]))
