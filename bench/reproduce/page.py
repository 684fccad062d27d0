"""Writes tables and statements into docs/reproducing.md; every statement is computed from the figures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.reproduce.arms import ABLATION, MAIN
from bench.reproduce.figures import BETTER, DRAWS, SHARES, Figures, ahead, compare

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "reproduce"
PAGE = ROOT / "docs" / "reproducing.md"
# relative to the page
PICTURES = "../bench/results/reproduce"
BEGIN, END = "<!-- reproduce:begin -->", "<!-- reproduce:end -->"
# further columns of a table: key, heading, decimals
OTHERS = (
    ("format", "format", 3),
    ("length", "tokens", 1),
    ("drift_perception", "drift, caption items", 3),
    ("drift_reasoning", "drift, reasoning steps", 3),
)
# the arms that end with RLVR
ENDS = ("prism", "rlvr", "long_rlvr", "distill_rlvr")


def block(contents: Sequence[Figures]) -> str:
    """Returns the generated part of the page.

    Args:
        contents: the results files, in the order of the page.
    """
    lines = [
        BEGIN,
        "<!-- made by `python -m bench.reproduce` from bench/results/reproduce; edits here are lost -->",
        "",
    ]
    if not contents:
        lines += ["Not measured yet: `make reproduce` does it.", ""]
    for position, content in enumerate(contents):
        # arms without RLVR are the same for all algorithms, so the first section has them alone
        if position:
            content = {**content, "halved": {}, "curve": []}
        lines += [f"### RLVR by {content['algorithm'].upper()}", "", *_section(content)]
    return "\n".join([*lines, END])


def load_all(folder: Path) -> list[Figures]:
    """Returns the results files of a folder, GRPO's first."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(contents, key=lambda content: content["algorithm"] != "grpo")


def insert(text: str, made: str) -> str:
    """Returns the page with the text between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"bench.reproduce: expected one line {BEGIN} and, after it, one line {END} in {PAGE}")
    before, rest = text.split(BEGIN)
    return before + made + rest.split(END)[1]


def _section(content: Figures) -> Iterator[str]:
    arms = content["arms"]
    yield _origin(content)
    yield ""
    yield from _statements(content)
    if any(arm["part"] == MAIN for arm in arms.values()):
        yield f"![perception error and accuracy of each arm]({PICTURES}/{content['algorithm']}_arms.svg)"
        yield ""
        yield from _tables(content, MAIN)
        yield from _by_seed(arms)
        yield from _comparisons(content["comparisons"])
    if any(one["points"] for one in content["curve"]):
        yield "**Alignment against distillation on the same demonstrations**, after SFT without them; no RLVR:"
        yield ""
        yield f"![alignment and distillation by number of demonstrations]({PICTURES}/{content['algorithm']}_curve.svg)"
        yield ""
        yield from _curve(content)
    if any(arm["part"] == ABLATION for arm in arms.values()):
        yield "**Ablations**"
        yield ""
        yield from _tables(content, ABLATION)


def _origin(content: Figures) -> str:
    versions = ", ".join(f"{name} {content['versions'][name]}" for name in ("torch", "transformers"))
    seeds = sorted({int(seed) for arm in content["arms"].values() for seed in arm["seeds"]})
    samples = sorted({one["samples"] for arm in content["arms"].values() for one in arm["seeds"].values()})
    return (
        f"{_listed('Seed', seeds)}; {' or '.join(f'{n:,}' for n in samples)} test problems for each arm and seed. "
        f"<sub>{content['machine']}, {content['at_once']} arms at a time; {versions}; {content['date']}.</sub>"
    )


def _listed(noun: str, numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"{noun} {listed}" if len(numbers) == 1 else f"{noun}s {listed}"


def _statements(content: Figures) -> Iterator[str]:
    """Yields the figures' answer to each question."""
    for draw, by_seed in content["halved"].items():
        right = [seed for seed, one in by_seed.items() if one["halved"]]
        verdict = "yes, on every seed" if len(right) == len(by_seed) else f"on {len(right)} of {len(by_seed)} seeds"
        verdict = "no, on no seed" if not right else verdict
        each = "; ".join(
            f"seed {seed}: {one['sft']:.3f} → {one['align']:.3f}, {'yes' if one['halved'] else 'no'}"
            for seed, one in by_seed.items()
        )
        question = "Is perception error after alignment at most half of SFT's?"
        yield f"- **{question}** {_upper(DRAWS[draw])}: {verdict} ({each})."
    ends = [name for name in ENDS if name in content["arms"]]
    if len(ends) > 1:
        for draw in DRAWS:
            for share in ("perception_error", "accuracy"):
                yield f"- {_leader(content['arms'], ends, draw, share)}"
    for one in content["curve"]:
        if len(one["points"]) > 1 and one["share"] in ("perception_error", "accuracy"):
            yield f"- {_crossing(one)}"
    yield ""


def _leader(arms: Mapping[str, Figures], ends: Sequence[str], draw: str, share: str) -> str:
    """Returns the best of the arms that end with RLVR, and its distance from the next."""
    ranked = sorted(ends, key=lambda name: -BETTER[share] * arms[name]["mean"][draw][share][0])
    first, second = ranked[:2]
    difference = compare(arms, first, second, draw, share)
    best = f"**Best {SHARES[share]} {_when(draw)}**: {arms[first]['title']} with {_value(arms[first], draw, share)}"
    if not difference["seeds"]:
        return f"{best}; it has no seed in common with the next."
    if not difference["mean"]:
        return f"{best}; {arms[second]['title']} is as good."
    by = f"by {abs(difference['mean']):.3f}"
    if difference["standard_error"] is None:
        return f"{best}; the next, {arms[second]['title']}, is worse {by} on the only seed."
    by += f" ± {difference['standard_error']:.3f}{_in_errors(difference)}"
    if ahead(difference) == 1:
        return f"{best}, ahead of the next, {arms[second]['title']}, {by}."
    return f"{best}; the next, {arms[second]['title']}, is worse {by}, within two standard errors."


def _crossing(curve: Figures) -> str:
    """Returns the numbers of demonstrations at which alignment and distillation are equally good."""
    head = f"**Alignment against distillation, {SHARES[curve['share']]} {_when(curve['draw'])}**"
    sides = []
    for one in curve["points"]:
        gain = BETTER[curve["share"]] * one["mean"]
        better = "alignment" if gain > 0 else "distillation" if gain < 0 else "neither"
        sure = ", within two standard errors" if one["standard_error"] is not None and not ahead(one) else ""
        sides.append(f"{better} at {one['demonstrations']} ({_difference(one)}{sure})")
    where = "no crossing"
    if curve["crossings"]:
        where = f"the lines cross at about {' and '.join(f'{at:.0f}' for at in curve['crossings'])} demonstrations"
    return f"{head}: {where}; the better one is {', '.join(sides)}."


def _tables(content: Figures, part: str) -> Iterator[str]:
    shown = {name: arm for name, arm in content["arms"].items() if arm["part"] == part}
    if part == ABLATION:
        shown = {name: content["arms"][name] for name in ("align", "prism") if name in content["arms"]} | shown
    for draw in DRAWS:
        yield f"{_upper(DRAWS[draw])}:"
        yield ""
        heads = (*SHARES.values(), *(head for _, head, _ in OTHERS), "RLVR steps", "seconds after SFT")
        yield f"| | {' | '.join(heads)} |"
        yield f"|---|{'---:|' * len(heads)}"
        for arm in shown.values():
            cells = [_value(arm, draw, share) for share in SHARES]
            cells += [_value(arm, draw, key, decimals) for key, _, decimals in OTHERS]
            steps = sorted({one["steps"].get("rlvr", 0) for one in arm["seeds"].values()})
            cells.append("" if steps == [0] else "–".join(map(str, dict.fromkeys((steps[0], steps[-1])))))
            cells.append(f"{arm['seconds_after_sft'][0]:,.0f}")
            yield f"| {arm['title']} | {' | '.join(cells)} |"
        yield ""


def _by_seed(arms: Mapping[str, Figures]) -> Iterator[str]:
    shown = {name: arm for name, arm in arms.items() if arm["part"] == MAIN}
    seeds = list(dict.fromkeys(seed for arm in shown.values() for seed in arm["seeds"]))
    yield "Perception error / accuracy of each seed, greedy:"
    yield ""
    yield f"| | {' | '.join(f'seed {seed}' for seed in seeds)} |"
    yield f"|---|{'---:|' * len(seeds)}"
    for arm in shown.values():
        figures = [arm["seeds"][seed]["greedy"] if seed in arm["seeds"] else None for seed in seeds]
        cells = ["" if one is None else f"{one['perception_error']:.3f} / {one['accuracy']:.3f}" for one in figures]
        yield f"| {arm['title']} | {' | '.join(cells)} |"
    yield ""


def _comparisons(comparisons: Sequence[Figures]) -> Iterator[str]:
    known = [one for one in comparisons if one["seeds"]]
    if not known:
        return
    yield "Differences between two arms: mean of the seeds' differences ± standard error (in standard errors):"
    yield ""
    yield f"| | | {' | '.join(SHARES.values())} |"
    yield f"|---|---|{'---:|' * len(SHARES)}"
    for one, other, draw in dict.fromkeys((row["arm"], row["than"], row["draw"]) for row in known):
        rows = {r["share"]: r for r in known if (r["arm"], r["than"], r["draw"]) == (one, other, draw)}
        cells = [f"{_difference(rows[share])}{_in_errors(rows[share])}" for share in SHARES]
        yield f"| `{one}` minus `{other}` | {DRAWS[draw]} | {' | '.join(cells)} |"
    yield ""


def _curve(content: Figures) -> Iterator[str]:
    arms = content["arms"]
    points = {(one["draw"], one["share"]): one["points"] for one in content["curve"]}
    heads = [f"{SHARES[share]}, {what}" for share in SHARES for what in ("aligned", "distilled")]
    yield f"| demonstrations | | {' | '.join(heads)} |"
    yield f"|---:|---|{'---:|' * len(heads)}"
    parent = str(arms[points["greedy", "accuracy"][0]["arm"]]["parent"])
    for draw in DRAWS:
        if parent in arms:
            cells = [f"{_value(arms[parent], draw, share)} | " for share in SHARES]
            yield f"| none: {arms[parent]['title']} | {DRAWS[draw]} | {' | '.join(cells)} |"
        for one in points[draw, "accuracy"]:
            cells = [_value(arms[one[side]], draw, share) for share in SHARES for side in ("arm", "than")]
            yield f"| {one['demonstrations']} | {DRAWS[draw]} | {' | '.join(cells)} |"
    yield ""


def _value(arm: Figures, draw: str, key: str, decimals: int = 3) -> str:
    measured = arm["mean"][draw].get(key)
    if measured is None:
        return "not measured"
    mean, error = measured
    return f"{mean:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _difference(difference: Figures) -> str:
    error = difference["standard_error"]
    return f"{difference['mean']:+.3f}".replace("-", "−") + ("" if error is None else f" ± {error:.3f}")


def _in_errors(difference: Figures) -> str:
    error = difference["standard_error"]
    # if all seeds differ by the same amount, the error is zero or rounding
    return "" if error is None or error < 1e-9 else f" ({abs(difference['mean']) / error:.1f})"


def _when(draw: str) -> str:
    return {"greedy": "of greedy responses", "sampled": "at temperature 1"}[draw]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
