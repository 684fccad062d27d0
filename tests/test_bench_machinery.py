"""The machinery of the benchmarks: exact results, memory, timing, tables and plots."""

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from bench import results, tables, tuning, versus
from bench.cases import FORWARD, HALF, TRAIN, Case, errors, is_green, make_inputs, truth
from bench.measure import Bench, absent, measure_together
from bench.memory import MemoryChild
from bench.plot import draw
from bench.registry import MISSING, Contender, contenders
from bench.timing import PeakMemory, Timed, interleave
from prism_kernels.ops.linear_logprob.reference import linear_logprob_reference
from prism_kernels.ops.token_logprob.reference import token_logprob_reference
from tests import memory_duel

LINEAR = Case("tiny", "linear_logprob", 96, 700, 48, "float32")
TOKEN = Case("tiny", "token_logprob", 96, 700, 0, "float32")
PLAIN = "PyTorch"


def contender(case, name):
    return next(c for c in contenders(case.op, "cpu") if c.name == name)


@pytest.mark.parametrize("case", [LINEAR, TOKEN], ids=lambda c: c.op)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_truth_agrees_with_autograd_in_float64(case, with_entropy):
    inputs = make_inputs(case, "cpu")
    exact = truth(case, inputs, block=40)
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    program = linear_logprob_reference if case.width else token_logprob_reference
    dense = program(*leaves, inputs.target, entropy=True)
    outputs, grads = [dense.logp], [inputs.grad_logp.double()]
    if with_entropy:
        outputs, grads = [*outputs, dense.entropy], [*grads, inputs.grad_entropy.double()]
    torch.autograd.backward(outputs, grads)
    torch.testing.assert_close(exact.logp, dense.logp.detach())
    torch.testing.assert_close(exact.entropy, dense.entropy.detach())
    torch.testing.assert_close(exact.grad_rows[with_entropy], leaves[0].grad[exact.rows])
    if case.width:
        torch.testing.assert_close(exact.grad_columns[with_entropy], leaves[1].grad[exact.columns])


@pytest.mark.parametrize("case", [LINEAR, TOKEN], ids=lambda c: c.op)
def test_inputs_contain_confident_tokens(case):
    missing = truth(case, make_inputs(case, "cpu")).missing[::8]
    inside = (missing >= 1e-9) & (missing <= 1e-3)
    assert inside.float().mean() > 0.7


def test_a_wrong_result_is_red_and_has_no_ratio():
    bench = Bench(LINEAR, "cpu")
    call = contender(LINEAR, PLAIN).load()
    logp, _ = bench.stage.run(call, TRAIN)
    found = errors(LINEAR, bench.truth(TRAIN), bench.stage.full, logp, None, True)
    assert is_green(LINEAR, found)
    bench.stage.full.leaves[1].grad.mul_(1.01)
    assert not is_green(LINEAR, errors(LINEAR, bench.truth(TRAIN), bench.stage.full, logp, None, True))
    logp[3] = math.nan
    assert not is_green(LINEAR, errors(LINEAR, bench.truth(TRAIN), bench.stage.full, logp, None, False))

    wrong = Contender("wrong", lambda: lambda x: (call(x)[0] * 1.01, None), (FORWARD,))
    wrong_ready = bench.stage.run(wrong.load(), FORWARD)
    assert not is_green(LINEAR, errors(LINEAR, bench.truth(FORWARD), bench.stage.full, *wrong_ready, False))


def test_the_half_pass_has_a_gradient_in_half_of_the_rows():
    big = Case("tiny", "linear_logprob", 512, 300, 16, "float32")
    inputs = make_inputs(big, "cpu").without_gradient_in_half()
    assert (inputs.grad_logp == 0).sum() == 256
    assert big.flops(HALF) * 3 == big.flops(TRAIN) * 2


def test_interleave_alternates_the_order_and_calls_setup_each_time():
    seen = []
    calls = {name: Timed(lambda name=name: seen.append(name), lambda: seen.append("setup")) for name in "ab"}
    durations = interleave(calls, "cpu", rounds=3, warmup=1)
    assert [len(d) for d in durations.values()] == [3, 3]
    assert [s for s in seen if s != "setup"] == list("ab" + "ab" + "ba" + "ab")
    assert seen.count("setup") == 8


def test_interleave_stops_at_its_time_limit():
    durations = interleave({"a": Timed(lambda: None)}, "cpu", rounds=100, limit=0)
    assert len(durations["a"]) == 1


def test_peak_memory_counts_memory_that_was_freed():
    with PeakMemory("cpu") as peak:
        torch.ones(64 * 2**18)
    assert 60 * 2**20 < peak.bytes < 90 * 2**20


def test_memory_child_measures_and_reports_failures():
    case = Case("tiny", "linear_logprob", 512, 16384, 16, "float32")
    child = MemoryChild(case)
    try:
        forward = child.peak_extra(contender(case, PLAIN), FORWARD)
        train = child.peak_extra(contender(case, PLAIN), TRAIN)
        with pytest.raises(RuntimeError, match="memory measurement failed: KeyError"):
            child.peak_extra(Contender("nobody", lambda: None), FORWARD)
    finally:
        child.close()
    logits = case.logits_bytes
    # forward keeps logits and log_softmax; training adds the gradient of one of them
    assert 1.9 * logits < forward < 2.6 * logits
    assert 1.9 * logits < train < 3.6 * logits


def test_an_absent_contender_has_a_reason():
    peer = Contender("peer", lambda: None, package="peer")
    assert absent(LINEAR, peer, TRAIN, ImportError("No module named 'peer'"))["status"].startswith(
        MISSING + ": No module"
    )
    ours = Contender("ours, C++", lambda: None, ours=True)
    assert absent(LINEAR, ours, TRAIN, ImportError("no compiler"))["status"] == "not available: no compiler"
    assert absent(LINEAR, peer, TRAIN, ValueError("x\ny"))["status"] == "failed: ValueError: x"


def test_measurements_become_tables_and_plots(tmp_path, monkeypatch):
    def broken():
        raise ImportError("No module named 'peer'")

    pair = [contender(LINEAR, PLAIN), contender(LINEAR, "ours, torch"), Contender("peer", broken, package="peer")]
    rows = measure_together(Bench(LINEAR, "cpu"), pair, limit=0.1)
    assert {r["contender"] for r in rows if r["pass"] == TRAIN} == {PLAIN, "ours, torch", "peer"}
    content = results.document("linear_logprob", "cpu", [LINEAR], rows)
    path = tmp_path / content["machine"] / "linear_logprob.json"
    results.write(path, content)
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    assert "not installed: No module named 'peer'" in results.table(content)
    draw(content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    draw(content, tmp_path / "overview.png", only=(PLAIN,))
    assert (tmp_path / "overview.png").stat().st_size > 10_000
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    made = tables.block()
    assert "| peer | not installed |" in made
    assert made.count("not measured") >= 14
    page = Path("page.md")
    assert tables.insert("a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nb\n", made, page) == f"a\n{made}\nb\n"
    with pytest.raises(SystemExit, match=r"expected one line .* in page\.md"):
        tables.insert("no markers", made, page)
    # the quotient of both contenders' ratios to torch.mm
    plain, ours = (results.find(rows, "tiny", TRAIN, name) for name in (PLAIN, "ours, torch"))
    assert f"| {PLAIN} | {plain['ratio'] / ours['ratio']:.2f} |" in tables.ratio_block()
    assert f"bench/results/{content['machine']}/overview.png" in tables.plot_block()


def test_bars_compare_time_with_a_peer_and_memory_with_the_logits():
    def row(name, ratio, peak):
        return {"case": "main", "pass": TRAIN, "contender": name, "ratio": ratio, "peak_extra_bytes": peak}

    logits = 4 * 2048 * 32768
    rows = [
        row(results.OURS, 1.05, 1.05 * logits),
        row(f"{results.OURS}, cache_bytes=0", 1.5, 90 * 2**20),
        row(results.TRL, 2.1, 0),
    ]
    found = results.bars(rows)
    assert [bar["met"] for bar in found] == [True, False, False, True, True]
    assert found[2]["value"] == pytest.approx(2.0)
    assert all(bar["value"] is None and not bar["met"] for bar in results.bars([]))


def small_duel(**changes):
    def load(factor, share=1.0):
        return lambda data: lambda: {"sum": data[: int(data.numel() * share)] * factor}

    def missing(data):
        raise ImportError("No module named 'peer'")

    rivals = (
        versus.Rival("ours", load(2.0), ours=True),
        versus.Rival("wrong", load(2.1)),
        versus.Rival("part", load(2.0, 0.25), share=0.25),
        versus.Rival("peer", missing, package="peer"),
    )
    rivals = changes.pop("rivals", rivals)
    settings = {"bars": (versus.Bar("part", slower=0.01), versus.Bar("wrong", slower=0.01)), "limit_s": 0.01} | changes
    make = lambda: torch.arange(1.0, 4097.0)  # noqa: E731
    return versus.Duel("doubling", "tiny", make, lambda data: {"sum": 2 * data.double()}, rivals, 1e-6, **settings)


class PlainBenchmark:
    """A stand-in for pytest-benchmark's fixture, without statistics."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, setup, rounds):
        for _ in range(rounds):
            setup()
            run()


def test_a_duel_checks_values_scales_up_parts_and_names_missing_peers(tmp_path, monkeypatch):
    duel = small_duel()
    ring = versus.Ring(duel)
    for rival in duel.rivals[:3]:
        ring.fight(rival, PlainBenchmark(), __name__)
    with pytest.raises(pytest.skip.Exception, match="not installed: No module named 'peer'"):
        ring.fight(duel.rivals[3], PlainBenchmark(), __name__)
    ours, wrong, part, peer = ring.rows
    assert ours["status"] == "ok" and ours["errors"]["sum"] < 1e-6
    assert wrong["status"] == "wrong values" and wrong["slower"] is None
    assert part["median_s"] == pytest.approx(4 * statistics.median(part["samples_s"]))
    assert "median_s" not in peer
    content = versus.document(duel, ring.rows)
    assert [bar["met"] for bar in content["bars"]] == [True, False]
    assert "wrong values" in versus.table(content) and "not measured" in versus.table(content)
    made = "\n".join(tables.versus_table("doubling", content))
    assert "| **ours** |" in made and "scaled up: part" in made and "| peer | not installed |" in made


def test_a_wrong_result_of_ours_fails_its_benchmark():
    duel = small_duel(rivals=(versus.Rival("ours", lambda data: lambda: {"sum": data * 2.1}, ours=True),))
    with pytest.raises(AssertionError, match="ours: the values are wrong"):
        versus.Ring(duel).fight(duel.rivals[0], PlainBenchmark(), __name__)


def test_a_duel_measures_memory_in_a_separate_process():
    duel = memory_duel.DUELS[0]
    in_place, by_copies = (versus.peak_in_child("tests.memory_duel", duel, rival) for rival in duel.rivals)
    size = 4 * memory_duel.ELEMENTS
    # the result is not counted; one of the two copies exists beside it
    assert abs(in_place) < 0.1 * size
    assert 0.9 * size < by_copies < 1.1 * size


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_tuned_settings_include_the_declared_tiles():
    from prism_kernels.ops.anchored_rows import kernels as row_kernels
    from prism_kernels.ops.linear_logprob import kernels as fused

    for table in (row_kernels.FORWARD_TILES, row_kernels.BACKWARD_TILES):
        settings = tuning.row_settings(table, 90)
        assert table[90] in [value for *_, value in settings]
    assert fused.TILES[90] in [value for *_, value in tuning.fused_settings(fused.TILES, 90)]


def test_tuning_reports_each_setting_and_restores_the_old_one():
    table, rows = {"size": 1}, []

    def run():
        if table["size"] == 3:
            raise ValueError("too large")
        return torch.full((2,), float(table["size"]))

    tuning._try(rows.append, "size", [(str(n), table, "size", n) for n in (1, 2, 3)], run)
    assert table == {"size": 1}
    assert [row["in_force"] for row in rows] == [True, False, False]
    assert [row.get("difference") for row in rows] == [0.0, 1.0, None]
    assert rows[2]["failed"] == "ValueError: too large"
