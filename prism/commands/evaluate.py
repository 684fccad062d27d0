"""A model's figures on problems, by data source: `prism eval`."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from prism.config import DataSettings, Sampling
from prism.data.files import DataError
from prism.data.loader import LoadOptions, RowStream
from prism.data.problem import Problem, problem_reader
from prism.models.building import load_causal, load_encoder
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.rewards import score_batch
from prism.rollout.batch import decode
from prism.rollout.engine import Engine
from prism.worlds.shapes.counters import judge
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

# problems that are answered together
BATCH = 64
Figures = dict[str, float]


class Asked(NamedTuple):
    """A problem and where it comes from."""

    problem: Problem
    source: str


@dataclass(frozen=True)
class Outcome:
    """What one response was; the errors are those of the embedded world, None elsewhere."""

    source: str
    accuracy: float
    format: float
    # in tokens
    length: int
    # 1: it was still going on at the limit
    cut: float
    perception_error: float | None = None
    reasoning_error: float | None = None


def examine(
    model: str,
    data: str,
    out: str | Path | None = None,
    samples: int | None = None,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the figures of one response to each problem, of all and by data source, and prints them as a table.

    Args:
        model: folder or hub id of a policy.
        data: a file or folder of problems, or `shapes:` and a split of the embedded world.
        out: a file that gets what is returned, as JSON.
        samples: the first so many; None: all.
        temperature: 0 is greedy.
        max_new_tokens: the longest response.
        seed: of the sampling.
    """
    policy = Policy(load_causal("--model", model, "auto"))
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(model)
    engine = Engine(policy.model, encoder.tokenizer)
    positions = policy.model.config.get_text_config().max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        wanted = f"fewer than the model's {positions} positions"
        raise DataError(f"--max_new_tokens: expected {wanted}, got {max_new_tokens}")
    skipped: Counter[str] = Counter()
    outcomes: list[Outcome] = []
    console = Console()
    with console.status("the first responses") as status:
        source = _problems(data, samples, encoder, room, skipped)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        while chunk := list(islice(source, BATCH)):
            outcomes += _answered(engine, encoder, chunk, sampling, seed, first=len(outcomes))
            status.update(f"{len(outcomes)} responses")
    if not outcomes:
        raise DataError(f"{data}: expected prompts of at most {room} tokens, with room for a response; got none")
    found = {
        "model": model,
        "data": data,
        "settings": {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed},
        # of rows that were not used, how many for each cause
        "skipped": dict(skipped),
        "all": figures(outcomes),
        "by_source": {
            name: figures([one for one in outcomes if one.source == name])
            for name in sorted({one.source for one in outcomes})
        },
    }
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=2) + "\n")
    _print(console, found)
    return found


def figures(outcomes: Iterable[Outcome]) -> Figures:
    """Returns the means over the responses, each followed by its standard error under `<name>_se`."""
    rows = list(outcomes)
    found: Figures = {"samples": len(rows)}
    for name in ("accuracy", "format", "length", "cut", "perception_error", "reasoning_error"):
        values = [getattr(row, name) for row in rows]
        if None not in values:
            found |= {name: fmean(values), f"{name}_se": pstdev(values) / math.sqrt(len(values))}
    return found


def _problems(
    data: str, samples: int | None, encoder: PromptEncoder, room: int, skipped: Counter[str]
) -> Iterator[Asked]:
    """Yields problems of at most `room` tokens, and counts the rows that are not used."""
    world, _, split = data.partition(":")
    if world == "shapes" and split:
        for sample in ShapesWorld().samples(split, samples):
            problem = problem_of(sample)
            if len(problem.encoded(encoder).input_ids) <= room:
                yield Asked(problem, f"shapes/{sample.question.kind}")
            else:
                skipped["too long"] += 1
        return
    read = problem_reader("test", encoder, DataSettings(prompt_tokens=room))
    stream = RowStream(data, "problem", LoadOptions(buffer=0), take=lambda row: Asked(read(row), row.data_source))
    yield from islice(stream, samples)
    skipped.update(stream.causes)


def _answered(
    engine: Engine, encoder: PromptEncoder, asked: Sequence[Asked], sampling: Sampling, seed: int, first: int
) -> list[Outcome]:
    """Returns what one response to each problem was; `first` numbers them through, so that each has its own draws."""
    problems = [one.problem for one in asked]
    keys = range(first, first + len(asked))
    rollouts = engine.generate([problem.encoded(encoder) for problem in problems], sampling, seed=seed, keys=keys)
    texts = decode(rollouts, encoder)
    verdicts = score_batch(texts, [p.answer or "" for p in problems], [p.equivalent_answers for p in problems])
    found = []
    for one, rollout, text, verdict in zip(asked, rollouts, texts, verdicts):
        errors: dict[str, float] = {}
        if (shape := one.problem.shape) is not None:
            judged = judge(text, shape.scene, shape.question)
            errors = {
                "perception_error": float(judged.perception.wrong),
                "reasoning_error": float(judged.reasoning.wrong),
            }
        cut = float(rollout.finish_reason == "length")
        found.append(Outcome(one.source, verdict.accuracy, verdict.format, len(rollout.token_ids), cut, **errors))
    return found


def _print(console: Console, found: Mapping[str, Any]) -> None:
    names = [name for name in found["all"] if name not in ("samples", "cut") and not name.endswith("_se")]
    console.print(f"{found['model']} on {found['data']}, with standard errors", markup=False, soft_wrap=True)
    # seven columns in a terminal's eighty characters
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("data source", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for name in names:
        word, _, rest = name.partition("_")
        table.add_column(f"{word}\n{'tokens' if name == 'length' else f'{rest} %'.strip()}", justify="right")
    for source, row in (*found["by_source"].items(), ("all", found["all"])):
        scales = [1 if name == "length" else 100 for name in names]
        cells = [f"{row[n] * scale:.1f} ±{row[f'{n}_se'] * scale:.1f}" for n, scale in zip(names, scales)]
        table.add_row(source, str(row["samples"]), *cells)
    console.print(table)
    longest = found["settings"]["max_new_tokens"]
    if found["all"]["cut"]:
        console.print(f"{found['all']['cut']:.1%} of the responses were not at their end after {longest} tokens")
    for cause, count in found["skipped"].items():
        console.print(f"{count} problems were skipped: {cause}", markup=False, highlight=False)
