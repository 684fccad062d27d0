"""Writes the tables of README.md, docs/benchmarks.md and docs/migrating.md. `python -m bench.tables` does it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import migrating
from bench.cases import FORWARD, HALF, TRAIN
from bench.plot import OVERVIEW_NAME, caption, origin
from bench.results import MIB, duels, find, load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS, MIGRATING = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "migrating.md"
MADE_BY = "<!-- made by `python -m bench.tables` from bench/results; edits here are lost -->"
MISSING = "not measured"
VERSUS = (
    "policy_loss",
    "group_advantage",
    "linear_policy_loss",
    "find_segments",
    "prefix_attention",
    "moe_experts",
    "discriminator_step",
)

# on an H200 at T=16384, V=151936, bf16: row of the table, floors and goals in ms at D=2560 and 4096, pass, and the
# contenders, of which the fastest counts
GOALS = (
    ("forward only, cuBLAS tier", (16.1, 25.8), (20, 30.5), FORWARD, ("ours, CUDA",)),
    ("forward only, fused kernel", (16.1, 25.8), (18, 28.5), FORWARD, ("ours, Triton",)),
    ("forward + backward, cuBLAS tier", (48.4, 77.4), (57, 88), TRAIN, ("ours, CUDA", "ours, Triton")),
    ("forward + backward, wgmma tier", (48.4, 77.4), (53, 84), TRAIN, ()),
    (
        "forward + backward, `cache_bytes=0`",
        (64.5, 103.3),
        None,
        TRAIN,
        ("ours, CUDA, cache_bytes=0", "ours, Triton, cache_bytes=0"),
    ),
    ("half of the rows without gradient", (32.2, 51.6), (37, 58), HALF, ("ours, CUDA", "ours, Triton")),
)

# the duels on a GPU: op, row of the table, goal
GPU_DUELS = (
    ("policy_loss_16k", "`policy_loss`, forward + backward, 16,384 tokens", "3 launches, no host sync"),
    ("policy_loss_4m", "`policy_loss`, forward + backward, 4,194,304 tokens", ">= 80 % of a copy's bytes/s"),
    ("group_advantage", "`group_advantage`, 4,096 x 16", "1 launch, no host sync"),
    ("linear_policy_loss", "`linear_policy_loss`, T=16384, V=151936, D=2560, bf16", "<= 4 GB extra"),
    ("prefix_attention", "`prefix_attention`, a group of 13,774 tokens, H=16/8, d=128, bf16", "no host sync"),
    ("moe_layer_8k", "`moe_route` + `moe_experts`, T=8k, E=4, K=2, D=2048, I=6144, bf16", ""),
    ("moe_layer_16k", "the same, T=16k", "<= 13.2 ms"),
    ("moe_layer_32k", "the same, T=32k", ""),
    ("moe_route", "`moe_route`, forward + backward, T=16k", "no host sync"),
    ("discriminator_step", "the discriminator's step, Qwen3-VL-2B x 4 experts, a group of 16, bf16", ">= 6 x faster"),
)


def cpu_table(op: str, content: dict[str, Any] | None) -> Iterator[str]:
    """Yields the lines of an op's table on the CPU: its first case, forward and backward."""
    if content is None:
        yield f"`{op}` on the CPU: {MISSING}; `make bench` measures it."
        return
    case = content["cases"][0]
    times = "three `torch.mm`" if content["reference"] == "torch.mm" else "one copy"
    yield f"**`{op}`**, {TRAIN}, {case['label']}:"
    yield ""
    yield f"| | time | × {times} | peak extra memory | error of logp | gradient error, confident tokens |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in content["rows"]:
        if (row["case"], row["pass"]) == (case["name"], TRAIN):
            yield "| " + " | ".join(_cells(row)) + " |"
    yield ""
    yield f"![{op}: time, memory and error](../bench/results/{content['machine']}/{op}.png)"
    yield ""
    yield (
        f"<sub>{caption(content)} Each error is the largest over all rows, against float64; for confident tokens "
        "(1 − p between 1e-9 and 1e-3) it is relative. The memory of the gradients is not counted.</sub>"
    )


def kept_memory(content: dict[str, Any] | None) -> Iterator[str]:
    """Yields a paragraph: the first case, forward and backward, with a malloc that keeps freed memory."""
    if content is None:
        return
    case = content["cases"][0]
    rows = [r for r in content["rows"] if (r["case"], r["pass"]) == (case["name"], TRAIN) and r.get("ratio")]
    ratios = ", ".join(f"{row['contender']} {row['ratio']:.2f}" for row in rows)
    yield (
        "Much of this time is the first touch of fresh memory, and the peers allocate more of it. With a malloc that "
        f"keeps freed memory (`make bench-kept`) the ratios are: {ratios}. <sub>{origin(content)}</sub>"
    )
    yield ""


def _cells(row: dict[str, Any]) -> list[str]:
    name = f"**{row['contender']}**" if row["ours"] else row["contender"]
    if "median_s" not in row:
        return [name, str(row["status"]).partition(":")[0], "", "", "", ""]
    errors = row["errors"]
    ratio = row["status"] if row["ratio"] is None else f"{row['ratio']:.2f}"
    return [
        name,
        f"{1e3 * row['median_s']:,.0f} ms",
        ratio,
        f"{row['peak_extra_bytes'] / MIB:,.0f} MiB",
        f"{errors['logp']:.1e}",
        f"{errors['gradient_confident']:.2g}",
    ]


def versus_table(op: str, content: dict[str, Any] | None) -> Iterator[str]:
    """Yields the lines of an op's table on the CPU, beside others that compute the same."""
    if content is None:
        yield f"`{op}` on the CPU: {MISSING}; `make bench` measures it."
        return
    memory = any(row.get("peak_extra_bytes") is not None for row in content["versus"])
    yield f"**`{op}`**, {content['label']}:"
    yield ""
    first = content["versus"][0]["contender"]
    yield f"| | time | {first}, alternating with it | × |" + (" peak extra memory |" if memory else "")
    yield "|---|---:|---:|---:|" + ("---:|" if memory else "")
    for row in content["versus"]:
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        cells = [name, str(row["status"]).partition(":")[0], "", "", ""]
        if "median_s" in row:
            slower, peak = row["slower"], row["peak_extra_bytes"]
            cells[1:3] = _milliseconds(row["median_s"]), _milliseconds(row["first_s"])
            cells[3] = row["status"] if slower is None else f"{slower:,.0f}" if slower >= 100 else f"{slower:.2f}"
            cells[4] = "" if peak is None else f"{peak / MIB:,.0f} MiB"
        yield "| " + " | ".join(cells if memory else cells[:4]) + " |"
    yield ""
    parts = [row["contender"] for row in content["versus"] if row.get("share", 1) < 1]
    note = f" Timed on a part of the data and scaled up: {', '.join(parts)}." if parts else ""
    yield f"<sub>{origin(content)} Medians.{note}</sub>"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def gpu_table(content: dict[str, Any] | None) -> Iterator[str]:
    """Yields the lines of the table of goals on an H200, with the measured times."""
    yield (
        "**`linear_logprob`** on one H200, T=16384, V=151936, bf16: milliseconds, and in brackets the share of "
        "`torch.mm`'s speed in the same run:"
    )
    yield ""
    yield "| | D=2560: floor | goal | measured | D=4096: floor | goal | measured |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, floors, goals, pass_, contenders in GOALS:
        cells = [name]
        for index, case in enumerate(("4b", "8b")):
            goal = "" if goals is None else f"<= {goals[index]:g}"
            cells += [f"{floors[index]:g}", goal, _fastest(content, case, pass_, contenders)]
        yield "| " + " | ".join(cells) + " |"
    cells = ["best peer, forward + backward"]
    for case in ("4b", "8b"):
        peers = () if content is None else {r["contender"] for r in content["rows"] if r["package"]}
        cells += ["", "", _fastest(content, case, TRAIN, tuple(sorted(peers)), named=True)]
    yield "| " + " | ".join(cells) + " |"
    if content is not None:
        yield ""
        yield f"<sub>{caption(content)}</sub>"


def gpu_duel_table(contents: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of the table of the other ops on a GPU."""
    yield "**The other ops** on one H200, each beside others that compute the same:"
    yield ""
    yield "| | goal | ours | launches, host syncs | beside | fastest other | × |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for op, what, goal in GPU_DUELS:
        yield "| " + " | ".join((what, goal, *_duel_cells(contents.get(op)))) + " |"
    if contents:
        yield ""
        parts = {row["contender"] for c in contents.values() for row in c["versus"] if row.get("share", 1) < 1}
        note = f" Timed on a part of the data and scaled up: {', '.join(sorted(parts))}." if parts else ""
        yield f"<sub>{origin(next(iter(contents.values())))} Medians; caches cleared before each call.{note}</sub>"


def _duel_cells(content: dict[str, Any] | None) -> list[str]:
    if content is None:
        return [MISSING, "", "", MISSING, ""]
    ours, *others = content["versus"]
    if ours["status"] != "ok":
        return [str(ours["status"]).partition(":")[0], "", "", "", ""]
    cells = [_milliseconds(ours["median_s"]), "", "", MISSING, ""]
    if "launches" in ours:
        cells[1] = f"{ours['launches']}, {ours['syncs']}"
    if "bandwidth_share" in ours:
        cells[2] = f"{ours['bandwidth_share']:.0%} of {content['reference']}"
    elif ours.get("ratio") is not None:
        cells[2] = f"{ours['ratio']:.2f} × {content['reference']}"
    right = [row for row in others if not row["ours"] and row["status"] == "ok"]
    if right:
        best = min(right, key=lambda row: row["median_s"])
        cells[3:] = [f"{best['contender']}, {_milliseconds(best['median_s'])}", f"{best['slower']:.2f}"]
    return cells


def _fastest(
    content: dict[str, Any] | None, case: str, pass_: str, contenders: tuple[str, ...], named: bool = False
) -> str:
    rows = [] if content is None else [find(content["rows"], case, pass_, name) for name in contenders]
    # a wrong result has no ratio
    right = [r for r in rows if r.get("ratio")]
    if not right:
        return MISSING
    best = min(right, key=lambda r: r["median_s"])
    name = f"{best['contender']}, " if named else ""
    return f"{name}{1e3 * best['median_s']:.1f} ({1 / best['ratio']:.0%})"


def block() -> str:
    """Returns the generated part of docs/benchmarks.md."""
    lines = ["<!-- bench:begin -->", MADE_BY, ""]
    for op in ("linear_logprob", "token_logprob"):
        lines += [*cpu_table(op, load(op, "cpu-*")), "", *kept_memory(load(op, "kept-memory-cpu-*"))]
    for op in VERSUS:
        lines += [*versus_table(op, load(op, "cpu-*")), ""]
    lines += [*gpu_table(load("linear_logprob", "h200*")), ""]
    lines += [*gpu_duel_table(duels("h200*")), "", "<!-- bench:end -->"]
    return "\n".join(lines)


def plot_block() -> str:
    """Returns README's plot."""
    content = load("linear_logprob", "cpu-*")
    picture = "`linear_logprob`: not measured; `make bench` measures it."
    if content is not None:
        path = f"bench/results/{content['machine']}/{OVERVIEW_NAME}"
        picture = f"![linear_logprob and others: time, memory, and error of the gradient]({path})"
    return "\n".join(["<!-- plot:begin -->", MADE_BY, "", picture, "", "<!-- plot:end -->"])


def ratio_block() -> str:
    """Returns README's table: each op beside the fastest other program that computes the same."""
    lines = ["<!-- ratios:begin -->", MADE_BY, ""]
    lines += ["| op | fastest other | its time over ours | its peak extra memory | ours |", "|---|---|---:|---:|---:|"]
    for op in ("linear_logprob", "token_logprob"):
        lines += _case_ratio(f"`{op}`", load(op, "cpu-*"))
        lines += _case_ratio(f"`{op}`, malloc keeps freed memory", load(op, "kept-memory-cpu-*"))
    contents = [load(op, "cpu-*") for op in VERSUS]
    for op, content in zip(VERSUS, contents):
        lines += _duel_ratio(f"`{op}`", content)
    measured = next((content for content in contents if content is not None), None)
    if measured is not None:
        lines += ["", f"<sub>{origin(measured)} Medians of alternating runs.</sub>"]
    return "\n".join([*lines, "", "<!-- ratios:end -->"])


def _case_ratio(name: str, content: dict[str, Any] | None) -> list[str]:
    # both are ratios to one reference of the same run; a wrong result has none
    if content is None:
        return []
    case = content["cases"][0]["name"]
    rows = [r for r in content["rows"] if (r["case"], r["pass"]) == (case, TRAIN) and r.get("ratio")]
    ours, others = [r for r in rows if r["ours"]], [r for r in rows if not r["ours"]]
    if not ours or not others:
        return []
    best = min(others, key=lambda row: row["ratio"])
    return [_ratio_line(name, best, best["ratio"] / ours[0]["ratio"], ours[0])]


def _duel_ratio(name: str, content: dict[str, Any] | None) -> list[str]:
    if content is None:
        return []
    ours, *others = content["versus"]
    right = [row for row in others if not row["ours"] and row.get("slower")]
    if ours["status"] != "ok" or not right:
        return []
    best = min(right, key=lambda row: row["slower"])
    return [_ratio_line(name, best, best["slower"], ours)]


def _ratio_line(name: str, other: dict[str, Any], slower: float, ours: dict[str, Any]) -> str:
    memory = [
        "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / MIB:,.0f} MiB" for row in (other, ours)
    ]
    return "| " + " | ".join((name, other["contender"], f"{slower:.2f}", *memory)) + " |"


def insert(text: str, made: str, page: Path) -> str:
    """Returns the page's text with one generated part replaced.

    Args:
        text: the page.
        made: the new part; its first and last line are the markers.
        page: the page's path, for the error.
    """
    begin, *_, end = made.splitlines()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"bench.tables: expected one line {begin} and, after it, one line {end} in {page.name}")
    before, rest = text.split(begin)
    return before + made + rest.split(end)[1]


def pages() -> Iterator[tuple[Path, str]]:
    """Yields each page and its text with the tables of today's results."""
    blocks = {
        README: [plot_block(), ratio_block()],
        BENCHMARKS: [block()],
        MIGRATING: [migrating.block(trainer) for trainer in migrating.TRAINERS],
    }
    for page, parts in blocks.items():
        if not page.exists():
            raise SystemExit(f"bench.tables: {page} does not exist")
        text = page.read_text()
        for part in parts:
            text = insert(text, part, page)
        yield page, text


def main() -> None:
    """Updates the pages."""
    for page, text in pages():
        page.write_text(text)
        print(f"updated {page}")


if __name__ == "__main__":
    main()
