"""The shared part of the pytest-benchmark entry points: a row's runs alternate with the reference's."""

from typing import Any

import pytest
import torch

from bench.cases import Case, reference
from bench.measure import Bench, absent
from bench.registry import Contender
from bench.timing import seconds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# seconds for a row of the first case and of another one, with the reference; at least the first of ROUNDS are made
LIMITS_S = (3.0, 1.0)
ROUNDS = (5, 40)


class Book:
    """The rows measured in this session, and the number of rows to measure, by op."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.planned: dict[str, int] = {}
        self._bench: Bench | None = None

    def bench(self, case: Case) -> Bench:
        """Returns the inputs of a case; only one case's inputs are kept at a time."""
        if self._bench is None or self._bench.case != case:
            self.close()
            self._bench = Bench(case, DEVICE)
        return self._bench

    def add(self, row: dict[str, Any], op: str) -> None:
        self.rows.setdefault(op, []).append(row)

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()
        self._bench = None


BOOK = Book()


def measure_row(case: Case, contender: Contender, pass_: str, benchmark: Any) -> None:
    """Checks a contender's values and memory, times it, and records the row in the benchmark and in the book.

    The reference is timed in the setup of each round, so the two alternate.
    """
    bench = BOOK.bench(case)
    try:
        ready = bench.prepare(contender, pass_)
    except Exception as error:
        # a peer may fail in any way: its row records the failure, and the others are still measured
        row = absent(case, contender, pass_, error)
        BOOK.add(row, case.op)
        if contender.ours and not isinstance(error, ImportError):
            raise
        pytest.skip(row["status"])
    products = reference(case, DEVICE, pass_)
    setup = ready.timed.setup
    assert setup is not None
    durations: list[float] = []
    against: list[float] = []

    def before_round() -> None:
        against.append(seconds(products, DEVICE))
        setup()

    def one_round() -> None:
        durations.append(seconds(ready.timed.run, DEVICE))

    # the warm-up decides the number of rounds
    before_round()
    one_round()
    limit = LIMITS_S[0] if case.is_first() else LIMITS_S[1]
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(limit / (durations.pop() + against.pop()))))
    benchmark.group = f"{case.op}, {pass_}, {case.label()}"
    benchmark.pedantic(one_round, setup=before_round, rounds=rounds)
    setup()
    row = bench.row(ready, pass_, durations, against)
    BOOK.add(row, case.op)
    benchmark.extra_info |= {key: row[key] for key in ("status", "ratio", "peak_extra_bytes", "errors")}
    assert ready.green or not contender.ours, f"{contender.name}: the values are wrong: {ready.errors}"
