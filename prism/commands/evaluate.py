"""A model's figures on problems, by data source: `prism eval`."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prism.config import DataSettings
from prism.data.files import DataError
from prism.data.loader import LoadOptions, RowStream
from prism.data.problem import Problem, problem_reader
from prism.evaluation.assessment import JudgedResponse, judge_responses
from prism.models.building import load_causal, load_encoder
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

# problems of a batch
BATCH = 64
Figures = dict[str, float]


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
    """Evaluates one response to each problem; prints the figures by data source as a table, and returns them.

    Args:
        model: folder or hub id of a policy.
        data: a file or folder of problems, or `shapes:` and a split of the embedded world.
        out: JSON file to write the figures to.
        samples: number of problems, from the first on; None: all.
        temperature: sampling temperature; 0 is greedy.
        max_new_tokens: length of the longest response.
        seed: seed of the sampling.
    """
    encoder = load_encoder("--model", model)
    policy = Policy(load_causal("--model", model, "auto"))
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(policy.model, encoder.tokenizer)
    positions = policy.model.config.get_text_config().max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        wanted = f"fewer than the model's {positions} positions"
        raise DataError(f"--max_new_tokens: expected {wanted}, got {max_new_tokens}")
    skipped: Counter[str] = Counter()
    responses: list[JudgedResponse] = []
    sources: list[str] = []
    console = Console()
    with console.status("generating the first responses") as status:
        rest = _problems(data, samples, encoder, room, skipped)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        while batch := list(islice(rest, BATCH)):
            problems = [problem for problem, _ in batch]
            responses += judge_responses(engine, problems, encoder, sampling, seed=seed, first=len(responses))
            sources += [source for _, source in batch]
            status.update(f"{len(responses)} responses")
    if not responses:
        raise DataError(f"{data}: expected prompts of at most {room} tokens, with room for a response; got none")
    result = {
        "model": model,
        "data": data,
        "settings": {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed},
        # number of skipped rows by cause
        "skipped": dict(skipped),
        "all": figures(responses),
        "by_source": {
            name: figures([response for response, source in zip(responses, sources) if source == name])
            for name in sorted(set(sources))
        },
    }
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=2) + "\n")
    _print(console, result)
    return result


def figures(responses: Sequence[JudgedResponse]) -> Figures:
    """Returns the means over the responses, each with its standard error as `<name>_se`."""
    means: Figures = {"samples": len(responses)}
    for name in ("accuracy", "format", "length", "cut", "perception_error", "reasoning_error"):
        values = [getattr(response, name) for response in responses]
        if None not in values:
            means |= {name: fmean(values), f"{name}_se": pstdev(values) / math.sqrt(len(values))}
    return means


def _problems(
    data: str, samples: int | None, encoder: PromptEncoder, room: int, skipped: Counter[str]
) -> Iterator[tuple[Problem, str]]:
    """Yields problems of at most `room` tokens with their data sources, and counts the skipped rows by cause."""
    world, _, split = data.partition(":")
    if world == "shapes" and split:
        for sample in ShapesWorld().samples(split, samples):
            problem = problem_of(sample)
            if len(problem.encoded(encoder).input_ids) <= room:
                yield problem, f"shapes/{sample.question.kind}"
            else:
                skipped["too long"] += 1
        return
    read = problem_reader("test", encoder, DataSettings(prompt_tokens=room))
    stream = RowStream(data, "problem", LoadOptions(buffer=0), take=lambda row: (read(row), row.data_source))
    yield from islice(stream, samples)
    skipped.update(stream.causes)


def _print(console: Console, result: Mapping[str, Any]) -> None:
    names = [name for name in result["all"] if name not in ("samples", "cut") and not name.endswith("_se")]
    console.print(f"{result['model']} on {result['data']}, with standard errors", markup=False, soft_wrap=True)
    # seven columns in a terminal's eighty characters
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("data source", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for name in names:
        word, _, rest = name.partition("_")
        table.add_column(f"{word}\n{'tokens' if name == 'length' else f'{rest} %'.strip()}", justify="right")
    for source, row in (*result["by_source"].items(), ("all", result["all"])):
        scales = [1 if name == "length" else 100 for name in names]
        cells = [f"{row[n] * scale:.1f} ±{row[f'{n}_se'] * scale:.1f}" for n, scale in zip(names, scales)]
        table.add_row(source, str(row["samples"]), *cells)
    console.print(table)
    longest = result["settings"]["max_new_tokens"]
    if result["all"]["cut"]:
        console.print(f"{result['all']['cut']:.1%} of the responses did not end within {longest} tokens")
    for cause, count in result["skipped"].items():
        console.print(f"{count} problems were skipped: {cause}", markup=False, highlight=False)
