"""Measures contenders on one case: values against float64, time beside the reference, peak extra memory."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import FORWARD, HALF, PASSES, Case, Truth, errors, is_green, reference, truth
from bench.memory import MemoryChild
from bench.registry import MISSING, Call, Contender
from bench.stage import Stage
from bench.timing import Timed, interleave

REFERENCE = "reference"
MOST_ROUNDS = 20
LONGEST_REASON = 160


@dataclass
class Ready:
    """A loaded contender with checked values and measured memory."""

    contender: Contender
    timed: Timed
    errors: dict[str, float]
    green: bool
    peak_bytes: int


class Bench:
    """One case on one device, and its exact results."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.stage = case, Stage(case, device)
        self._truths: dict[bool, Truth] = {}
        self._calls: dict[str, Call] = {}
        self._child = MemoryChild(case) if device == "cpu" else None

    def truth(self, pass_: str) -> Truth:
        half = pass_ == HALF
        if half not in self._truths:
            self._truths[half] = truth(self.case, self.stage.inputs(pass_))
        return self._truths[half]

    def prepare(self, contender: Contender, pass_: str) -> Ready:
        """Loads a contender, checks its values and measures its memory; passes on its exceptions."""
        stage, destroys = self.stage, contender.destroys
        if contender.name not in self._calls:
            self._calls[contender.name] = contender.load()
        call = self._calls[contender.name]
        exact = self.truth(pass_)
        try:
            stage.setup(destroys)
            logp, entropy = stage.run(call, pass_)
            found = errors(self.case, exact, stage.inputs(pass_), logp, entropy, pass_ != FORWARD)
            del logp, entropy
            stage.setup(destroys)
            if self._child is None:
                peak = stage.peak_extra(call, destroys, pass_)
            else:
                peak = self._child.peak_extra(contender, pass_)
        finally:
            stage.setup(destroys)
        timed = Timed(lambda: stage.run(call, pass_), lambda: stage.setup(destroys))
        return Ready(contender, timed, found, is_green(self.case, found), peak)

    def row(self, ready: Ready, pass_: str, durations: list[float], against: list[float]) -> dict[str, Any]:
        """Returns the row of the result file; it has a ratio to the reference only if the values are right."""
        taken, reference_s = statistics.median(durations), statistics.median(against)
        return {
            **_key(self.case, ready.contender, pass_),
            "status": "ok" if ready.green else "wrong values",
            "median_s": taken,
            "reference_s": reference_s,
            "ratio": taken / reference_s if ready.green else None,
            "samples_s": durations,
            "reference_samples_s": against,
            "tflops": self.case.flops(pass_) / taken / 1e12,
            "gbytes_per_s": self.case.bytes(pass_) / taken / 1e9,
            "peak_extra_bytes": ready.peak_bytes,
            "errors": ready.errors,
        }

    def close(self) -> None:
        if self._child is not None:
            self._child.close()


def absent(case: Case, contender: Contender, pass_: str, error: Exception) -> dict[str, Any]:
    """Returns the row of an unmeasured contender, with the reason."""
    return {**_key(case, contender, pass_), "status": absent_status(error, contender.ours)}


def absent_status(error: Exception, ours: bool) -> str:
    """Returns the reason why something could not be measured."""
    text = str(error).strip().partition("\n")[0]
    # torch's message lists every backend
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON] + " …"
    if isinstance(error, ImportError):
        return f"{'not available' if ours else MISSING}: {text}"
    return f"failed: {type(error).__name__}: {text}"


def _key(case: Case, contender: Contender, pass_: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "pass": pass_,
        "contender": contender.name,
        "ours": contender.ours,
        "package": contender.package,
    }


def measure_together(
    bench: Bench, contenders: list[Contender], limit: float, passes: tuple[str, ...] = PASSES
) -> list[dict[str, Any]]:
    """Returns the rows of a case; all contenders of a pass alternate with the reference in one loop.

    `limit` bounds the seconds of each pass's loop. The bench is closed afterwards.
    """
    case, device = bench.case, bench.stage.device
    rows = []
    for pass_ in passes:
        ready: dict[str, Ready] = {}
        for contender in [c for c in contenders if pass_ in c.passes]:
            try:
                ready[contender.name] = bench.prepare(contender, pass_)
            except Exception as error:
                # a peer may fail in any way: its row records the failure, and the others are still measured
                rows.append(absent(case, contender, pass_, error))
            if device == "cuda":
                torch.cuda.empty_cache()
        if not ready:
            continue
        calls = {name: r.timed for name, r in ready.items()}
        calls[REFERENCE] = Timed(reference(case, device, pass_), lambda: bench.stage.setup(False))
        durations = interleave(calls, device, rounds=MOST_ROUNDS, limit=limit)
        rows += [bench.row(r, pass_, durations[name], durations[REFERENCE]) for name, r in ready.items()]
        # the reference's buffers are as large as the logits
        del calls
    bench.close()
    order = [c.name for c in contenders]
    return sorted(rows, key=lambda row: (PASSES.index(row["pass"]), order.index(row["contender"])))
