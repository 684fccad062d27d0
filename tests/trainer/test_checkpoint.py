"""Checkpoints are bit-exact and survive a kill at any moment; damaged ones are recognised."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

import torch
from torch import nn

from prism.runtime.checkpoint import CHECKSUMS, CheckpointError, checkpoints, damage, load, newest, save
from prism.runtime.optimiser import learning_rate

HERE = Path(__file__).parent


class Tied(nn.Module):
    """A model with the features of real ones: tied weights, a buffer, dropout, two dtypes."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.head = nn.Linear(4, 7, bias=False)
        self.scale = nn.Parameter(torch.randn(4).bfloat16())
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.drop(self.norm(self.embed(x))) * self.scale.float())


class Training:
    """A small training: two models, each with AdamW and a schedule, and noise from all three random generators."""

    def __init__(self, seed=0):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        self.models = {"policy": Tied(), "judge": nn.Linear(7, 1)}
        self.optimisers = {k: torch.optim.AdamW(m.parameters(), lr=1e-2) for k, m in self.models.items()}
        schedules = {
            f"{k} schedule": learning_rate(o, "cosine", warmup_steps=2, steps=9) for k, o in self.optimisers.items()
        }
        self.training = {**self.optimisers, **schedules}
        self.step = 0

    def run(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.from_numpy(np.random.randint(0, 7, 8))
            loss = self.models["judge"](self.models["policy"](x)).square().mean() * random.random()
            loss.backward()
            for one in self.training.values():
                one.step()
            for one in self.optimisers.values():
                one.zero_grad()
            self.step += 1
            losses.append(loss.item())
        return losses

    def state(self):
        weights = {f"{k}.{n}": v for k, m in self.models.items() for n, v in m.state_dict().items()}
        return weights, {k: one.state_dict() for k, one in self.training.items()}

    def save(self, folder, **options):
        return save(folder, self.step, self.models, self.training, {"data": {"next": self.step}}, **options)

    def load(self, folder, **options):
        found = load(folder, self.models, self.training, **options)
        self.step = found.step
        return found


def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = Training()
    losses = whole.run(9)
    first = Training()
    assert first.run(4) == losses[:4]
    path = first.save(tmp_path)
    assert path.name == "step-00000004"
    resumed = Training(seed=99)
    found = resumed.load(tmp_path)
    assert (found.step, found.extra, found.path) == (4, {"data": {"next": 4}}, path)
    assert resumed.models["policy"].head.weight is resumed.models["policy"].embed.weight
    assert resumed.run(5) == losses[4:]
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)
    # the learning rate is restored too: it falls towards the end
    rate = resumed.optimisers["judge"].param_groups[0]["lr"]
    assert 0 <= rate < 1e-3 and rate == whole.optimisers["judge"].param_groups[0]["lr"]


def test_the_newest_are_kept_and_a_step_may_be_saved_again(tmp_path):
    training = Training()
    for _ in range(4):
        training.run(1)
        training.save(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000003"]
    training.run(1)
    training.step = 4
    again = training.save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [again.name] == ["step-00000004.1"]
    other = Training(1)
    assert other.load(tmp_path).path == again
    torch.testing.assert_close(other.state(), training.state(), rtol=0, atol=0)


def test_loading_without_a_checkpoint_returns_none(tmp_path):
    assert load(tmp_path / "new", {}, {}) is None


@pytest.mark.parametrize("file", ["policy.safetensors", "training.pt", "state.json", CHECKSUMS])
@pytest.mark.parametrize("how", ["flipped", "short", "empty", "gone"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(tmp_path, file, how):
    training = Training()
    training.run(1)
    good = training.save(tmp_path)
    expected = training.state()[0]["policy.embed.weight"].clone()
    training.run(1)
    path = training.save(tmp_path) / file
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flipped": flipped, "short": content[:-1], "empty": b""}[how])
    said = []
    assert newest(tmp_path, tell=said.append).extra == {"data": {"next": 1}}
    other = Training(1)
    assert other.load(tmp_path, tell=said.append).path == good
    assert torch.equal(other.state()[0]["policy.embed.weight"], expected)
    (message,) = said
    assert "step-00000002 is damaged: " in message and "the checkpoint before it is used" in message
    # it is renamed, so that it is neither read again nor lost
    assert [p.name for p in checkpoints(tmp_path)] == [good.name]
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_damage_to_every_checkpoint_is_an_error(tmp_path):
    training = Training()
    (training.save(tmp_path) / "policy.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected an intact checkpoint, but all 1 are damaged"):
        training.load(tmp_path, tell=lambda text: None)


def test_loading_a_checkpoint_of_another_training_names_the_difference(tmp_path):
    training = Training()
    training.save(tmp_path)
    with pytest.raises(CheckpointError, match="expected models policy, got judge, policy"):
        load(tmp_path, {"policy": training.models["policy"]}, training.training)
    with pytest.raises(CheckpointError, match="expected training none, got judge"):
        load(tmp_path, training.models, {})
    with pytest.raises(CheckpointError, match=r"expected weights that fit the model .judge.(.|\n)*size mismatch"):
        load(tmp_path, {**training.models, "judge": nn.Linear(6, 1)}, training.training)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "owned"),))

    training = Training()
    path = training.save(tmp_path)
    torch.save({"training": Evil()}, path / "training.pt")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    (path / CHECKSUMS).write_text(json.dumps({name: value for name, value in sums.items() if name != CHECKSUMS}))
    assert damage(path) is None
    with pytest.raises(Exception, match="Weights only load failed"):
        training.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="save: expected keep >= 1 and step >= 0, got 0 and 1"):
        save(tmp_path, 1, {}, {}, {}, keep=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, {}, {}, {"x": object()})
    # a failed save leaves no checkpoint and does not disturb the next one
    assert load(tmp_path, {}, {}) is None
    save(tmp_path, 1, {}, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def filled(step):
    """Returns a model and an optimiser whose weights and moments all equal the step."""
    model = nn.Linear(200, 50)
    optimiser = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
            optimiser.state[p]["exp_avg"].fill_(step)
    return {"model": model}, {"optimiser": optimiser}


def writes_until_killed(folder):
    """Resumes from the newest checkpoint, and prints each step after its checkpoint is written."""
    found = load(folder, *filled(0))
    step = found.step if found else 0
    while True:
        step += 1
        save(folder, step, *filled(step), {"step": step}, keep=2)
        os.write(1, f"{step}\n".encode())


def forks_writers(folder):
    """Forks a writer for each line of standard input, one after the other; prints its process id and exit status."""
    # a fork copies no threads
    torch.set_num_threads(1)
    filled(0)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                writes_until_killed(folder)
            finally:
                os._exit(1)
        os.write(1, f"process {child}\n".encode())
        os.write(1, f"end {os.waitpid(child, 0)[1]}\n".encode())


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = [str(HERE), str(HERE.parents[1])]
    code = f"import sys; sys.path[:0] = {path}; import {__name__} as t; t.forks_writers({str(tmp_path)!r})"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    rng = random.Random(0)
    cut = 0
    for _ in range(25):
        driver.stdin.write("another\n")
        # wait until it has saved a step, so that each round makes progress
        said = [driver.stdout.readline(), driver.stdout.readline()]
        (process,) = (int(line.split()[1]) for line in said if line.startswith("process"))
        time.sleep(rng.random() * 0.03)
        os.kill(process, signal.SIGKILL)
        while not said[-1].startswith("end"):
            said.append(driver.stdout.readline())
        assert os.WTERMSIG(int(said[-1].split()[1])) == signal.SIGKILL
        last = max(int(line) for line in said if line.strip().isdigit())
        cut += any(path.name.startswith(".aside-") for path in tmp_path.iterdir())
        assert all(damage(path) is None for path in checkpoints(tmp_path))
        models, training = filled(0)
        found = load(tmp_path, models, training, tell=pytest.fail)
        # a checkpoint that was reported is not lost, and all its numbers are of one step
        assert found.step == found.extra["step"] and last <= found.step <= last + 1
        for p in models["model"].parameters():
            assert (p == found.step).all() and (training["optimiser"].state[p]["exp_avg"] == found.step).all()
    driver.stdin.close()
    assert driver.wait(20) == 0
    driver.stdout.close()
    # enough kills came in the middle of a save
    assert cut >= 8
