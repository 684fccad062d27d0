"""Reads the arms' folders: figures by arm and seed, means with standard errors, and comparisons."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.reproduce.arms import curve
from bench.reproduce.jobs import FINISHED, Experiment, Job, JobError, dotted, time_of

# the ways to draw a response
DRAWS = {"greedy": "greedy", "sampled": "at temperature 1"}
# perception comes first, because the experiment is about its repair
SHARES = {"perception_error": "perception error", "reasoning_error": "reasoning error", "accuracy": "accuracy"}
# 1: more is better
BETTER = {"perception_error": -1, "reasoning_error": -1, "accuracy": 1}

Figures = dict[str, Any]


def seed_figures(experiment: Experiment, job: Job) -> Figures:
    """Returns a finished arm's figures on the test split, and its seconds and steps."""
    folder = experiment.folder(job)
    evaluations = json.loads((folder / FINISHED).read_text())
    last = evaluations[job.arm.stages[-1]]
    if "test" not in last or "sampled" not in last["test"]:
        raise JobError(f"{folder / FINISHED}: expected figures on test, greedy and sampled, got {', '.join(last)}")
    seconds, steps = time_of(folder)
    return {
        "samples": last["test"]["samples"],
        "greedy": _numbers(last["test"]),
        "sampled": _numbers(last["test"]["sampled"]),
        "validation": {
            after: {**_numbers(one), "sampled": _numbers(one["sampled"])} for after, one in evaluations.items()
        },
        "discriminator": {after: one["discriminator"] for after, one in evaluations.items() if "discriminator" in one},
        "seconds": seconds,
        "steps": steps,
    }


def collect(experiment: Experiment, seeds: Sequence[int], tell: Callable[[str], None]) -> Figures:
    """Returns the measured part of a results file: settings, and each seed's figures of each finished arm.

    Args:
        experiment: the experiment.
        seeds: the seeds that count.
        tell: gets a line for each finished arm that is left out because it was made with other settings.
    """
    measured_arms: Figures = {}
    for arm in experiment.arms.values():
        by_seed = {}
        for seed in seeds:
            job = Job(seed, arm)
            if not experiment.finished(job):
                continue
            try:
                experiment.check(job)
            except JobError as error:
                tell(f"left out: {error}")
            else:
                by_seed[str(seed)] = seed_figures(experiment, job)
        if by_seed:
            description = {"title": arm.title, "part": arm.part, "parent": arm.parent, "stages": list(arm.stages)}
            measured_arms[arm.name] = {**description, "changes": dict(arm.changes), "seeds": by_seed}
    settings = dotted(experiment.base.model_dump(mode="json"))
    return {
        "algorithm": experiment.algorithm,
        "settings": {key: value for key, value in settings.items() if key != "run.folder"},
        "curve_arms": {str(n): list(names) for n, names in curve(experiment.base).items()},
        "arms": measured_arms,
    }


def summarise(measured: Figures) -> Figures:
    """Returns a results file: the measured part with its means and comparisons."""
    arms = {
        name: {**arm, "mean": means(arm["seeds"].values()), "seconds_after_sft": _after_sft(measured["arms"], name)}
        for name, arm in measured["arms"].items()
    }
    return {
        **measured,
        "arms": arms,
        "halved": halved(arms),
        "comparisons": [
            compare(arms, one, other, draw, share)
            for one, other in (
                ("align", "sft"),
                ("prism", "rlvr"),
                ("prism", "long_rlvr"),
                ("prism", "distill_rlvr"),
                ("align", "distill"),
                ("rlvr", "sft"),
                ("prism", "align"),
            )
            if one in arms and other in arms
            for draw in DRAWS
            for share in SHARES
        ],
        "curve": [crossing(arms, measured["curve_arms"], draw, share) for draw in DRAWS for share in SHARES],
    }


def means(seeds: Iterable[Figures]) -> Figures:
    """Returns mean and standard error over seeds of the figures that every seed has."""
    rows = list(seeds)
    by_draw: Figures = {}
    for draw in DRAWS:
        keys = [key for key in rows[0][draw] if all(key in row[draw] for row in rows)]
        by_draw[draw] = {key: mean_and_error([row[draw][key] for row in rows]) for key in keys if key != "samples"}
    return by_draw


def _after_sft(arms: Mapping[str, Figures], name: str) -> list[float | None]:
    """Returns mean and standard error of the seconds in the steps of an arm and its parents after SFT."""
    chain = []
    while name in arms and "sft" not in arms[name]["stages"]:
        chain.append(arms[name]["seeds"])
        name = arms[name]["parent"]
    if not chain:
        return [0.0, None]
    return mean_and_error([sum(sum(one[seed]["seconds"].values()) for one in chain) for seed in chain[0]])


def mean_and_error(values: Sequence[float]) -> list[float | None]:
    """Returns the mean and its standard error; None for the error of one value."""
    middle, count = sum(values) / len(values), len(values)
    if count < 2:
        return [middle, None]
    variance = sum((value - middle) ** 2 for value in values) / (count - 1)
    return [middle, math.sqrt(variance / count)]


def halved(arms: Mapping[str, Figures]) -> dict[str, dict[str, Figures]]:
    """Returns, by draw and seed, perception error after SFT and after alignment, and whether it was at least halved."""
    if not {"sft", "align"} <= arms.keys():
        return {}
    by_draw: dict[str, dict[str, Figures]] = {}
    for draw in DRAWS:
        by_draw[draw] = {}
        for seed, one in arms["align"]["seeds"].items():
            if seed in arms["sft"]["seeds"]:
                before = arms["sft"]["seeds"][seed][draw]["perception_error"]
                after = one[draw]["perception_error"]
                by_draw[draw][seed] = {"sft": before, "align": after, "halved": after <= before / 2}
    return by_draw


def compare(arms: Mapping[str, Figures], one: str, other: str, draw: str, share: str) -> Figures:
    """Returns the difference of two arms for each seed, because arms of one seed share SFT and test problems."""
    pair = arms[one]["seeds"], arms[other]["seeds"]
    seeds = [seed for seed in pair[0] if seed in pair[1]]
    per_seed = [pair[0][seed][draw][share] - pair[1][seed][draw][share] for seed in seeds]
    comparison: Figures = {
        "arm": one,
        "than": other,
        "draw": draw,
        "share": share,
        "seeds": seeds,
        "differences": per_seed,
    }
    if per_seed:
        comparison["mean"], comparison["standard_error"] = mean_and_error(per_seed)
    return comparison


def crossing(arms: Mapping[str, Figures], curve_arms: Mapping[str, Sequence[str]], draw: str, share: str) -> Figures:
    """Returns alignment minus distillation by number of demonstrations, and the numbers at which their lines cross.

    Between two numbers the means are straight lines over the logarithm, as in the picture.
    """
    points = []
    for n, (align, distill) in sorted(curve_arms.items(), key=lambda item: int(item[0])):
        if align in arms and distill in arms:
            difference = compare(arms, align, distill, draw, share)
            if difference["seeds"]:
                points.append({"demonstrations": int(n), **difference})
    return {
        "draw": draw,
        "share": share,
        "points": points,
        "crossings": crossings([(one["demonstrations"], one["mean"]) for one in points]),
    }


def crossings(points: Sequence[tuple[float, float]]) -> list[float]:
    """Returns the zeros of a line through points that is straight over the logarithm of x and changes its sign.

    Args:
        points: (x, y), sorted, x > 0.
    """
    changes = []
    signed = [(x, y) for x, y in points if y != 0]
    for (x, y), (next_x, next_y) in pairwise(signed):
        if (y > 0) == (next_y > 0):
            continue
        zeros = [at for at, value in points if value == 0 and x < at < next_x]
        # if several points are zero, the first one
        changes.append(float(zeros[0]) if zeros else x * (next_x / x) ** (y / (y - next_y)))
    return changes


def ahead(difference: Figures) -> int:
    """Returns 1 if an arm is better than the other by more than two standard errors, -1 if worse, else 0."""
    error = difference.get("standard_error")
    if error is None or abs(difference["mean"]) <= 2 * error:
        return 0
    return BETTER[difference["share"]] * (1 if difference["mean"] > 0 else -1)


def line(figures: Figures) -> str:
    """Returns a seed's figures for the progress line."""
    parts = []
    for draw, when in DRAWS.items():
        shares = [f"{SHARES[key]} {figures[draw][key]:.3f}" for key in ("perception_error", "accuracy")]
        parts.append(f"{when}: {', '.join(shares)}")
    return f"{'; '.join(parts)} ({figures['samples']} of test)"


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, (int, float))}
