"""`make gpu`, tested on the CPU: its duels on tiny shapes, time limits, skipped tests and result files."""

import dataclasses
import functools
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import (
    gpu,
    gpu_trace,
    left_out,
    moe_layer,
    results,
    tables,
    test_discriminator_step,
    test_group_advantage,
    test_linear_policy_loss,
    test_policy_loss,
    test_prefix_attention,
    versus,
)
from bench.cases import Case
from bench.end_to_end import discriminator

ATTENTION = test_prefix_attention.Shape(12, 3, 5, 4, 4, 2, 8, torch.float32)
LAYER = moe_layer.Shape(64, 32, 48, torch.float32)
HEAD = Case("tiny", "linear_policy_loss", 256, 300, 32, "float32")
DUELS = {
    "policy_loss": lambda: test_policy_loss.cuda_duel("policy_loss", 512, 5, "cpu"),
    "group_advantage": lambda: test_group_advantage.cuda_duel("cpu"),
    "linear_policy_loss": lambda: test_linear_policy_loss.cuda_duel(HEAD, "cpu"),
    "prefix_attention": lambda: test_prefix_attention.cuda_duel(ATTENTION, "cpu"),
    "moe_layer": lambda: moe_layer.cuda_duel("moe_layer", LAYER, device="cpu"),
    "moe_route": lambda: moe_layer.cuda_route_duel(LAYER, "cpu"),
}


def quick(duel, **changes):
    # torch.compile would take seconds
    rivals = tuple(rival for rival in duel.rivals if "compile" not in rival.name)
    return dataclasses.replace(
        duel, **({"rivals": rivals, "memory": False, "limit_s": 0.01, "rounds": (1, 2)} | changes)
    )


@pytest.mark.parametrize("name", DUELS)
def test_the_gpu_duels_compute_right_values(name):
    *_, content = versus.fight_all(quick(DUELS[name]()), __name__)
    rows = {row["contender"]: row for row in content["versus"]}
    wrong = {who: row["status"] for who, row in rows.items() if row["status"] != "ok"}
    # flash attention needs a GPU, and the peers may not be installed
    assert all(status.startswith(("not installed", "failed: NotImplementedError")) for status in wrong.values()), wrong
    assert len(rows) - len(wrong) >= 2 or name == "prefix_attention"
    assert not [who for who in wrong if rows[who]["ours"]]
    assert max(max(row["errors"].values()) for row in rows.values() if "errors" in row) < 1e-4


def test_prefix_attention_branch_by_branch_equals_its_specification():
    data = test_prefix_attention.make(ATTENTION)
    wanted, found = test_prefix_attention.exact(data), test_prefix_attention.exact_by_branch(data)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def tiny_true_group(responses):
    # M-RoPE's default sections need a head size of 128
    text = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": discriminator.TRUE_IMAGE_TOKEN + 1}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0]}
    shape = discriminator.Shape(responses, prompt=16, image_side=4, image_width=8, caption=4, reasoning=6)
    return shape, functools.partial(discriminator.make_true_group, shape, "cpu", 0, text, vision)


def test_the_published_step_at_true_size_runs_on_a_part_and_is_scaled_up():
    shape, make = tiny_true_group(8)
    duel = quick(test_discriminator_step.cuda_duel(make, shape, "cpu"), rounds=(1, 1))
    *_, content = versus.fight_all(duel, __name__)
    ours, published, *others = content["versus"]
    assert [row["status"] for row in content["versus"]] == ["ok"] * 4
    assert max(max(row["errors"].values()) for row in content["versus"]) < 0.1
    assert ours["slower"] == 1 and published["share"] == 0.5
    assert published["slower"] == pytest.approx(2 * published["samples_s"][0] / ours["median_s"])
    assert all(row["first_samples_s"] == [] for row in others)


def test_the_true_size_model_has_the_planned_size():
    group = discriminator.make_true_group(device="meta")
    counts = {False: 0, True: 0}
    for name, parameter in group.backbone.named_parameters():
        counts["experts" in name] += parameter.numel()
        assert parameter.dtype == torch.bfloat16
    assert counts[True] == 28 * 4 * 3 * 2048 * 6144
    # Qwen3-VL-2B without its MLPs: attention, embeddings and vision tower
    assert 1.0e9 < counts[False] < 1.2e9
    assert discriminator.TRUE_SHAPE.image_tokens == 600
    assert "13,774 tokens against 134,304" in test_discriminator_step.CUDA_DUELS[0].label
    assert abs(discriminator.token_counts(group)["packed"] - 13774) < 20


def doubling(**changes):
    def load(factor):
        return lambda data: lambda: {"sum": data * factor}

    settings = {
        "rivals": (versus.Rival("ours", load(2.0), ours=True), versus.Rival("theirs", load(2.0))),
        "reference": versus.Reference("a copy", lambda data: data.clone, 2_000_000),
        "goals": (
            versus.Goal("host syncs", "syncs", "<=", 0),
            versus.Goal("share", "bandwidth_share", ">=", 0.8),
            versus.Goal("launches a thousand times", "launches", "<=", 2000, unit=1000),
        ),
    }
    make = lambda: torch.arange(1.0, 4097.0)  # noqa: E731
    exact = lambda data: {"sum": 2 * data.double()}  # noqa: E731
    return versus.Duel(
        **({"op": "doubling", "label": "tiny", "make": make, "exact": exact, "tolerance": 1e-6, "limit_s": 0.01}
        | settings | changes)
    )  # fmt: skip


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Replaces a GPU's measurements: a call takes 2 ms, the reference 1 ms."""
    clears = []
    traces = iter([gpu_trace.Trace(3, 2e-3, 0, {"kernel": 3}), gpu_trace.Trace(1, 1e-3, 0, {"copy": 1})] * 2)
    monkeypatch.setattr(versus, "trace", lambda run: next(traces))
    monkeypatch.setattr(versus, "clear_cache", lambda: clears.append(1))
    monkeypatch.setattr(versus, "seconds", lambda run, device: run() is None or 1e-3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(results, "machine", lambda device: "h200")
    return clears


def test_gpu_measurements_become_goals_and_tables(pretended_gpu, tmp_path, monkeypatch):
    *_, content = versus.fight_all(doubling(device="cuda", op="policy_loss_4m"), __name__)
    ours = content["versus"][0]
    assert pretended_gpu
    assert (ours["launches"], ours["syncs"], ours["kernels"]) == (3, 0, {"kernel": 3})
    assert ours["gbytes_per_s"] == pytest.approx(1.0) and ours["bandwidth_share"] == pytest.approx(0.5)
    assert ours["ratio"] == pytest.approx(1.0)
    assert [bar["met"] for bar in content["bars"]] == [True, False, False]
    assert "3 launches 0 syncs" in versus.table(content) and "(50%)" in versus.table(content)

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    before = "\n".join(tables.gpu_duel_table(results.duels("h200*")))
    assert before.count("not measured") == 2 * len(tables.GPU_DUELS)
    results.write(tmp_path / "h200" / "losses.json", {"duels": [content]})
    older = {**content, "date": "2020-01-01", "versus": []}
    results.write(tmp_path / "h200" / "older.json", {"duels": [older]})
    made = "\n".join(tables.gpu_duel_table(results.duels("h200*")))
    assert "| 1 ms | 3, 0 | 50% of a copy | theirs, 1 ms | 1.00 |" in made
    # docs/benchmarks.md names every duel
    fought = {duel.op for name in gpu.DUELS.values() for duel in sys.modules[name].CUDA_DUELS}
    assert fought == {op for op, *_ in tables.GPU_DUELS}


def test_a_failing_contender_of_ours_keeps_the_other_results(pretended_gpu, tmp_path, monkeypatch, capsys):
    def broken(data):
        raise RuntimeError("CUDA error: out of memory")

    def no_data():
        raise ValueError("no data")

    module = ModuleType("pretended")
    fails = (*doubling(device="cuda").rivals, versus.Rival("ours too", broken, ours=True))
    module.CUDA_DUELS = (doubling(op="none", make=no_data), doubling(device="cuda", rivals=fails))
    monkeypatch.setitem(sys.modules, "pretended", module)
    results.write(tmp_path / gpu.DUELS_FILE, {"duels": [{"op": "earlier", "versus": []}]})
    with pytest.raises(SystemExit) as stopped:
        gpu.fight("pretended", tmp_path)
    assert "none: ValueError: no data" in str(stopped.value)
    assert "doubling, ours too: failed: RuntimeError: CUDA error" in str(stopped.value)
    earlier, kept = gpu.fought(tmp_path)
    assert earlier == {"op": "earlier", "versus": []}
    assert [row["status"] for row in kept["versus"]][:2] == ["ok", "ok"]


def test_peak_memory_counts_gradients_that_a_call_replaces():
    leaf = torch.ones(16 * 2**20, requires_grad=True)

    def run():
        leaf.grad = None
        leaf.grad = torch.ones(leaf.shape)
        return {"leaf": leaf.grad}

    # the call allocates only its result; freeing the earlier gradient must not be subtracted
    assert abs(versus.peak_extra(run, "cpu")) < 16 * 2**20


def test_only_device_events_count_as_launches():
    def event(name, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: 5.0)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    events = [event("a"), event("a"), event("cudaLaunchKernel", DeviceType.CPU), event("step", annotation=True)]
    done = gpu_trace.launched([*events, event("Memset (Device)")])
    assert [name for name, _ in done] == ["a", "a", "Memset (Device)"]
    assert sum(seconds for _, seconds in done) == pytest.approx(15e-6)


def test_host_synchronisations_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(2):
            warnings.warn(f"{gpu_trace.WAITING} (function operator())", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu_trace.syncs(run) == 2
    assert modes == ["warn", "default"]


def test_the_phases_fit_the_limit_and_leave_later_phases_their_shares():
    assert sum(phase.share_s for phase in gpu.PHASES) <= gpu.LIMIT_S < 9 * 60
    first, *_, last = gpu.PHASES
    assert gpu.limits(gpu.LIMIT_S) == first.share_s + gpu.LIMIT_S - sum(phase.share_s for phase in gpu.PHASES)
    # time that the build does not use goes to the tests
    assert gpu.limits(gpu.LIMIT_S - 30, gpu.PHASES[1:]) == gpu.limits(gpu.LIMIT_S, gpu.PHASES[1:]) - 30
    assert gpu.limits(123.0, [last]) == 123.0 and gpu.limits(-5.0, [last]) == 1.0
    # the result files, at most eight: one for all duels, phases.json, and one for each other phase
    assert len({phase.name for phase in gpu.PHASES} - {"build", "tests", *gpu.DUELS}) + 2 <= 8


def test_a_hanging_phase_is_killed_and_its_output_is_kept(tmp_path):
    hangs = gpu.Phase("hangs", 1, ("-c", "import time; print('so far', flush=True); time.sleep(60)"))
    summary = gpu.run_phase(hangs, 3.0, tmp_path)
    assert summary["timed_out"] and not summary["ok"] and "so far" in summary["output_end"]
    fails = gpu.Phase("fails", 1, ("-c", "raise SystemExit(3)"))
    assert gpu.run_phase(fails, 30.0, tmp_path)["exit_code"] == 3
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_imported_are_left_out(tmp_path, monkeypatch):
    files = {
        "product/__init__.py": "",
        "product/deep.py": "import no_such_package",
        "product/lazy.py": "def f():\n    import missing\ntry:\n    import missing\nexcept ImportError:\n    pass",
        "tests/a/helper.py": "from product import deep",
        "tests/a/test_helped.py": "import json\nfrom helper import x",
        "tests/a/test_direct.py": "if True:\n    from another_missing.part import x",
        "tests/a/test_lazy.py": "import product.lazy\nimport numpy.linalg",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert left_out.left_out(["tests"], tmp_path) == {
        "tests/a/test_direct.py": "not installed: another_missing",
        "tests/a/test_helped.py": "not installed: no_such_package",
    }


def test_the_gpu_run_needs_none_of_the_trainers_packages(monkeypatch):
    absent = {"pydantic", "pydantic_core", "math_verify", "sympy", "trl", "verl", "datasets", "tyro"}
    installed = left_out.is_installed
    monkeypatch.setattr(left_out, "is_installed", lambda package: package not in absent and installed(package))
    for name in gpu.DUELS.values():
        path = left_out.ROOT / f"{name.replace('.', '/')}.py"
        assert left_out.missing_packages(path) == set()
    without = left_out.left_out(gpu.TESTS)
    assert "tests/trainer/test_config.py" in without and "tests/trainer/test_discriminator.py" not in without
    assert not [name for name, why in without.items() if "kernels" in name and why.startswith("not installed")]


def test_the_tests_phase_prints_the_files_that_it_leaves_out(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(gpu, "left_out", lambda tests: {"tests/trainer/test_config.py": "not installed: pydantic"})
    monkeypatch.setattr(gpu.subprocess, "call", lambda command, **_: commands.append(command) or 7)
    assert gpu.run_tests() == 7
    assert "left out: tests/trainer/test_config.py: not installed: pydantic" in capsys.readouterr().out
    assert "--ignore=tests/trainer/test_config.py" in commands[0] and "tests/kernels" in commands[0]
