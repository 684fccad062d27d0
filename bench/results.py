"""Results as JSON files, one for each machine and op, and the bars that they must reach."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases import TRAIN, Case, cases
from prism_kernels import __version__

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "trl",
    "verl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)
OURS = "ours, C++"
TRL = "TRL ChunkedLogProbFunction"
MIB = 2**20


def machine(device: str) -> str:
    """Returns a short name of this machine, such as cpu-2core-avx2 or h200."""
    if device == "cuda":
        name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    width = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    return f"{'kept-memory-' if keeps_memory() else ''}cpu-{torch.get_num_threads()}core-{width}"


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages."""
    numbers = {"prism_kernels": __version__}
    for package in PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        numbers["cuda"] = torch.version.cuda
    return numbers


def keeps_memory() -> bool:
    """Returns whether malloc keeps freed memory, as under `make bench-kept`.

    By default each large tensor is fresh memory, whose first touch can cost more than the computation.
    """
    return "glibc.malloc.mmap_max=0" in os.environ.get("GLIBC_TUNABLES", "")


def memory_environment() -> dict[str, str]:
    """Returns the environment of a process that measures memory: there malloc must return freed memory."""
    return {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}


def header(op: str, device: str) -> dict[str, Any]:
    """Returns the first entries of every result file."""
    return {
        "op": op,
        "machine": machine(device),
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "keeps_memory": keeps_memory(),
    }


def document(
    op: str, device: str, measured: Iterable[Case], rows: list[dict[str, Any]], with_bars: bool = True
) -> dict[str, Any]:
    """Returns the content of a result file."""
    return {
        **header(op, device),
        "reference": "copy of the logits" if op == "token_logprob" else "torch.mm",
        "cases": [case.as_json() for case in measured],
        "rows": rows,
        "bars": bars(rows) if with_bars and op == "linear_logprob" and device == "cpu" else [],
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON; a crash leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def load(op: str, machine_glob: str) -> dict[str, Any] | None:
    """Returns the newest result file of an op on machines whose names match, such as cpu-* or h200; or None."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{machine_glob}/{op}.json"))]
    return max(contents, key=lambda content: content["date"], default=None)


def duels(machine_glob: str) -> dict[str, dict[str, Any]]:
    """Returns, by op, the newest duel on machines whose names match, such as h200."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"{machine_glob}/*.json")):
        for content in json.loads(path.read_text()).get("duels", ()):
            if content["date"] >= latest.get(content["op"], content)["date"]:
                latest[content["op"]] = content
    return latest


def find(rows: list[dict[str, Any]], case: str, pass_: str, contender: str) -> dict[str, Any]:
    """Returns a row; a row that does not exist gets the status "not measured"."""
    for row in rows:
        if (row["case"], row["pass"], row["contender"]) == (case, pass_, contender):
            return row
    return {"case": case, "pass": pass_, "contender": contender, "status": "not measured"}


def bars(rows: list[dict[str, Any]], case: str = "main") -> list[dict[str, Any]]:
    """Returns the bars of `linear_logprob` on the CPU, with the measured values (None: not measured)."""
    cached = find(rows, case, TRAIN, OURS)
    flat = find(rows, case, TRAIN, f"{OURS}, cache_bytes=0")
    first_peer = find(rows, case, TRAIN, TRL)
    faster = None
    if cached.get("ratio") and first_peer.get("ratio"):
        faster = first_peer["ratio"] / cached["ratio"]
    logits = next(c.logits_bytes for c in cases("linear_logprob", "cpu") if c.name == case)
    memory = cached.get("peak_extra_bytes")
    flat_memory = flat.get("peak_extra_bytes")
    checks = [
        ("time over three torch.mm, with the cache", "<=", 1.10, cached.get("ratio")),
        ("time over three torch.mm, cache_bytes=0", "<=", 1.45, flat.get("ratio")),
        ("times faster than TRL's op", ">=", 2.5, faster),
        ("peak extra memory over E, with the cache", "<=", 1.1, None if memory is None else memory / logits),
        ("peak extra memory in MiB, cache_bytes=0", "<=", 96.0, None if flat_memory is None else flat_memory / MIB),
    ]
    return [bar(*check) for check in checks]


def bar(name: str, sign: str, limit: float, value: float | None) -> dict[str, Any]:
    """Returns a bar and whether it is met; an unmeasured bar is not met."""
    met = value is not None and (value <= limit if sign == "<=" else value >= limit)
    return {"bar": name, "limit": f"{sign} {limit:g}", "value": value, "met": met}


def table(content: dict[str, Any]) -> str:
    """Returns a plain text table of a result file, and its bars."""
    lines = []
    for case in content["cases"]:
        for pass_ in dict.fromkeys(row["pass"] for row in content["rows"] if row["case"] == case["name"]):
            lines.append(f"\n{content['op']}, {pass_}, {case['label']} (ratio to {content['reference']})")
            for row in content["rows"]:
                if (row["case"], row["pass"]) == (case["name"], pass_):
                    lines.append("  " + _line(row))
    return "\n".join([*lines, *bar_lines(content["bars"])])


def bar_lines(bars: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line for each bar."""
    for one in bars:
        verdict = "not measured" if one["value"] is None else "met" if one["met"] else "MISSED"
        value = "" if one["value"] is None else f"{one['value']:.3f} "
        yield f"  {verdict:<13}{one['bar']}: {value}(required {one['limit']})"


def _line(row: dict[str, Any]) -> str:
    if "median_s" not in row:
        return f"{row['contender']:<42} {row['status']}"
    ratio = "wrong values" if row["ratio"] is None else f"x {row['ratio']:.2f}"
    errors = row["errors"]
    confident = errors.get("gradient_confident", errors["logp_confident"])
    return (
        f"{row['contender']:<42} {1e3 * row['median_s']:9.2f} ms {ratio:>12} {row['peak_extra_bytes'] / MIB:9.1f} MiB "
        f"logp {errors['logp']:.1e} confident {confident:.1e}"
    )
