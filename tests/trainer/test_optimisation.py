"""The optimiser of a stage: updates that bf16 would lose, states, and the guard against non-finite numbers."""

import copy

import pytest
import torch
from torch import nn

from prism.config import StageAdam, WarmupAdam
from prism.runtime import checkpoint
from prism.runtime.optimiser import GuardedOptimiser, MasterAdamW, NotFiniteError, StageOptimiser

# an update is about 1e-6, and bf16 numbers between 1 and 2 lie 1/128 apart
SETTINGS = StageAdam(lr=1e-6, steps=1000, weight_decay=0.0, clip_norm=1e9)


class Mixed(nn.Module):
    """A bf16 model with an fp32 head, and a parameter that is not trained."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.body = nn.Parameter((1 + torch.rand(64, 64, generator=rng)).bfloat16().to(dtype))
        self.head = nn.Parameter(torch.rand(8, generator=rng))
        self.still = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, sign):
        return (self.body.float() * sign).sum() + self.head.sum() * sign


def train(model, optimiser, steps, first=0):
    for step in range(first, first + steps):
        with optimiser.step() as update:
            # every fifth step goes the other way
            update.backward(model(-1.0 if step % 5 == 4 else 1.0))
        assert update.skipped is None
        optimiser.next_rate()


def test_a_thousand_small_updates_of_bf16_weights_are_not_lost():
    halves, wide, plain = Mixed(), Mixed(torch.float32), Mixed()
    optimiser, exact = StageOptimiser(halves, SETTINGS, 1000), StageOptimiser(wide, SETTINGS, 1000)
    assert isinstance(optimiser.optimiser, MasterAdamW) and type(exact.optimiser) is torch.optim.AdamW
    before = halves.body.detach().clone()
    lost = torch.optim.AdamW([plain.body], lr=1e-6, weight_decay=0.0)
    train(halves, optimiser, 1000)
    train(wide, exact, 1000)
    for _ in range(1000):
        plain.body.grad = torch.ones_like(plain.body)
        lost.step()
    assert torch.equal(plain.body, before), "plain bf16 must lose these updates, or this test shows nothing"
    (copied,) = optimiser.state_dict()["optimiser"]["copies"]
    moved = (before.float() - copied).double()
    assert 3e-4 < float(moved.mean()) < 1e-3
    # bf16 holds these gradients exactly, so the fp32 copies equal fp32 weights bit for bit
    assert torch.equal(copied, wide.body) and torch.equal(halves.head, wide.head)
    assert torch.equal(halves.body, copied.bfloat16())
    # a larger rate shows in the weights themselves
    larger = StageOptimiser(halves, SETTINGS.model_copy(update={"lr": 1e-4}), 1000)
    train(halves, larger, 200)
    assert float((before.float() - halves.body.detach().float()).mean()) == pytest.approx(0.012, abs=0.004)


def fail(optimiser, batch=None):
    """An update that is skipped because of a non-finite number."""
    with optimiser.step(batch) as update:
        update.skip("the loss is not finite")


class Headed(Mixed):
    """Mixed with a value head, as a discriminator has one."""

    def __init__(self):
        super().__init__()
        self.value_head = nn.Linear(8, 1, bias=False)

    def forward(self, sign):
        return super().forward(sign) + self.value_head(self.head)[0]


def test_a_value_head_keeps_its_learning_rate_after_a_resume(tmp_path):
    settings = WarmupAdam(lr=1e-3, steps=40, schedule="cosine", warmup=0.1, weight_decay=0.0, head_rate=25)

    def begun():
        torch.manual_seed(0)
        model = Headed()
        return model, StageOptimiser(model, settings, 40)

    whole, optimiser = begun()
    before = whole.value_head.weight.detach().clone(), whole.head.detach().clone()
    assert isinstance(optimiser.optimiser, MasterAdamW)
    train(whole, optimiser, 1)
    # Adam's first step is as long as the learning rate, which rises over four steps
    assert torch.allclose(before[0] - whole.value_head.weight, torch.full((1, 8), 25 * 2.5e-4), rtol=1e-3)
    assert torch.allclose(before[1] - whole.head, torch.full((8,), 2.5e-4), rtol=1e-3)
    assert optimiser.lr * 25 == pytest.approx(optimiser.optimiser.param_groups[1]["lr"])
    train(whole, optimiser, 39, first=1)
    first, earlier = begun()
    train(first, earlier, 17)
    checkpoint.save(tmp_path, 17, {"model": first}, {"stage": earlier}, {})
    torch.manual_seed(1)
    other = Headed()
    resumed = StageOptimiser(other, settings, 40)
    assert checkpoint.load(tmp_path, {"model": other}, {"stage": resumed}) is not None
    train(other, resumed, 23, first=17)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_fp32_copies_are_saved_in_the_checkpoint(tmp_path):
    whole, first = Mixed(), Mixed()
    optimiser = StageOptimiser(whole, SETTINGS, 1000)
    train(whole, optimiser, 40)
    begun = StageOptimiser(first, SETTINGS, 1000)
    train(first, begun, 17)
    checkpoint.save(tmp_path, 17, {"model": first}, {"stage": begun}, {})
    other = Mixed()
    with torch.no_grad():
        other.body.zero_()
    resumed = StageOptimiser(other, SETTINGS, 1000)
    assert checkpoint.load(tmp_path, {"model": other}, {"stage": resumed}).step == 17
    train(other, resumed, 23, first=17)
    torch.testing.assert_close(resumed.state_dict(), optimiser.state_dict(), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), whole.state_dict().values()))


def test_a_step_leaves_parameters_without_a_gradient_alone():
    model = Mixed()
    optimiser = StageOptimiser(model, SETTINGS, 10)
    before = copy.deepcopy(model.state_dict())
    with optimiser.step() as update:
        update.backward(model.head.sum())
    assert torch.equal(model.body, before["body"]) and not torch.equal(model.head, before["head"])


@pytest.mark.parametrize("name", ["adamw8bit", "adamw_bf16"])
def test_torchao_optimisers_preserve_small_updates_in_expectation_and_resume_to_the_bit(tmp_path, name):
    pytest.importorskip("torchao")
    settings = StageAdam(name=name, lr=1e-4, steps=40, schedule="linear", weight_decay=0.0, clip_norm=1e9)
    with torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        whole = Mixed()
        before = whole.body.detach().clone()
        optimiser = StageOptimiser(whole, settings, 40)
        train(whole, optimiser, 20)
        checkpoint.save(tmp_path, 20, {"model": whole}, {"stage": optimiser}, {})
        train(whole, optimiser, 20, first=20)
        # with rounding to nearest no weight would have moved
        moved = float((before.float() - whole.body.float()).mean())
        assert 5e-4 < moved < 3e-3
        other = Mixed()
        resumed = StageOptimiser(other, settings, 40)
        checkpoint.load(tmp_path, {"model": other}, {"stage": resumed})
        train(other, resumed, 20, first=20)
        assert resumed.lr == optimiser.lr < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), whole.state_dict().values()))


def test_the_batches_of_skipped_steps_are_saved(tmp_path):
    model = nn.Linear(2, 1)
    optimiser = StageOptimiser(model, StageAdam(lr=1.0, steps=20), 20, failures=tmp_path / "not_finite")
    for step in range(StageOptimiser.MOST_FAILED - 1):
        with optimiser.step(lambda step=step: {"x": torch.ones(1, 2), "step": step}) as update:
            update.backward(model(torch.ones(1, 2)).sum() * (torch.nan if step != 3 else 1.0))
        assert (update.skipped is None) == (step == 3)
        optimiser.next_rate()
    saved = sorted(path.name for path in (tmp_path / "not_finite").iterdir())
    assert saved == [f"step-{n + 1:06d}.pt" for n in range(9) if n != 3]
    found = torch.load(tmp_path / "not_finite" / "step-000003.pt", weights_only=True)
    assert (found["skipped"], found["step"], found["lr"]) == ("the loss is not finite", 2, 1.0)
    # two skipped updates in one step of the stage
    for _ in range(2):
        fail(optimiser, dict)
    assert (tmp_path / "not_finite" / "step-000010-2.pt").exists()
    with pytest.raises(
        NotFiniteError, match=r"10 updates in a row were skipped: .*; their batches are in .*not_finite"
    ):
        for _ in range(3):
            fail(optimiser, dict)


def test_the_count_of_failures_in_a_row_is_saved():
    optimiser, other = (StageOptimiser(nn.Linear(2, 1), StageAdam(lr=1.0, steps=20), 20) for _ in range(2))
    for _ in range(StageOptimiser.MOST_FAILED - 1):
        fail(optimiser)
    other.load_state_dict(optimiser.state_dict())
    with pytest.raises(NotFiniteError):
        fail(other)


def test_a_skip_that_is_no_failure_is_not_counted():
    optimiser = StageOptimiser(nn.Linear(2, 1), StageAdam(lr=1.0, steps=20), 20)
    fail(optimiser)
    with optimiser.step() as update:
        update.skip("nothing to compare", failed=False)
    assert (update.skipped, optimiser.failed_in_a_row, optimiser.tries) == ("nothing to compare", 1, 1)


def test_a_guard_around_copies_looks_at_the_gradients_of_the_parameters():
    model = Mixed()
    guard = GuardedOptimiser(MasterAdamW([{"params": [model.body, model.head]}], lr=1e-3))
    before = copy.deepcopy(model.state_dict())
    with guard.step() as update:
        update.backward(model(1.0) * torch.nan)
    assert "not finite" in update.skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with guard.step() as update:
        update.backward(model(1.0))
    assert update.skipped is None and update.grad_norm > 1
