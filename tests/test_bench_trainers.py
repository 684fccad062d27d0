"""The benchmarks of trainers with and without our patch: turns, values, results and pages."""

import math

import pytest

from bench import migrating, results, tables
from bench.end_to_end import head_patch, turns
from bench.end_to_end.head_patch import BOTH, LOGP, Sizes


class Recorded:
    """A side that records the order of the steps."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def step(self, wanted):
        self.order.append(self.name)
        return {"seconds": float(len(self.order)), "wanted": wanted}


def test_sides_take_turns():
    order = []
    taken = turns.take_turns({name: Recorded(name, order) for name in "ab"}, 3, "case")
    assert order == list("ab" + "ba" + "ab")
    assert [said["seconds"] for said in taken["b"]] == [2, 3, 6]
    memory = {name: {"case": {"peak_bytes": 5, "peak_extra_bytes": 2}} for name in "ab"}
    _, b = turns.rows(taken, memory, "case")
    # the first step is a warm-up and does not count
    assert b == {
        **{"case": "case", "contender": "b", "median_s": 4.5, "samples_s": [3, 6]},
        **{"peak_bytes": 5, "peak_extra_bytes": 2},
    }


@pytest.mark.parametrize("wrong", [1.0002, -1.0, math.nan])
def test_different_values_of_the_two_sides_are_an_error(wrong):
    def said(factor):
        return [{"values": {"log-probabilities": [-3.0, -4.0], "the gradient": [3.0 * factor, 4.0 * factor]}}]

    head_patch.agree(LOGP, {"theirs": said(1.0), "ours": said(1.00005)})
    with pytest.raises(RuntimeError, match="log-probabilities: the two sides differ in the gradient by"):
        head_patch.agree(LOGP, {"theirs": said(1.0), "ours": said(wrong)})


@pytest.mark.slow
@pytest.mark.full
def test_a_small_run_becomes_a_table(tmp_path, monkeypatch):
    """Runs the whole benchmark in separate processes; checks no times, because the machine may be busy."""
    sizes = Sizes("transformers", vocabulary=30_000, width=64, layers=1, tokens=384)
    content = head_patch.measure(sizes, rounds=1)
    theirs, ours = head_patch.sides(sizes)
    assert [(row["case"], row["contender"]) for row in content["rows"]] == [
        *((LOGP, theirs), (LOGP, ours)),
        *((BOTH, theirs), (BOTH, ours)),
    ]
    logits = 4 * 384 * 30_000
    for row in content["rows"]:
        assert row["median_s"] == row["samples_s"][0] > 0
        assert row["peak_bytes"] > row["peak_extra_bytes"] > 0
        if row["contender"] == theirs:
            # log_softmax, and the gradient of it or of the logits
            assert row["peak_extra_bytes"] > 1.8 * logits
    assert [bar["met"] for bar in content["bars"]] == [True, True]
    assert f"{ours}  " in turns.table(content, "a step")

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert "not measured" in migrating.block("transformers")
    results.write(tmp_path / content["machine"] / f"{content['op']}.json", content)
    made = migrating.block("transformers")
    assert "not measured" not in made
    assert f"| transformers, {BOTH} | " in made
    assert f"| **transformers with our patch**, {LOGP} | " in made
    ratio = turns.over(content["rows"][:2], "peak_extra_bytes")
    assert f", × {ratio:.2f} |\n| transformers, {BOTH}" in made
    results.write(tmp_path / "cpu-x" / "openrlhf_patch.json", {**content, "stand_in": True})
    assert migrating.STAND_IN in migrating.block("openrlhf")
    assert migrating.STAND_IN not in made


def test_the_pages_match_the_committed_results():
    for page, text in tables.pages():
        assert page.read_text() == text, f"{page.name}: run `python -m bench.tables`, or put back the page's results"


@pytest.mark.parametrize("trainer", migrating.TRAINERS)
def test_a_page_without_markers_is_refused(trainer):
    made = migrating.block(trainer)
    page = f"a\n<!-- {trainer}:begin -->\nold\n<!-- {trainer}:end -->\nb\n"
    assert tables.insert(page, made, tables.MIGRATING) == f"a\n{made}\nb\n"
    with pytest.raises(SystemExit, match=rf"<!-- {trainer}:begin --> .* in migrating\.md"):
        tables.insert("no markers", made, tables.MIGRATING)
