"""`prism doctor --model DIR --data FILE`, and the start of a run: rows as we and as transformers encode them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from prism.config import Config, DataSettings
from prism.data.files import SCHEMAS, DataError, RowError, data_files, parse, read_rows
from prism.data.images import ImageLimits
from prism.data.problem import problem_reader
from prism.data.rows import READERS
from prism.models.building import checkpoint_folder, load_encoder, policy_encoder
from prism.models.families import DENSE
from prism.models.parity import Comparison, Reference, compare, inputs_of
from prism.models.prompts import PromptEncoder

# rows that `prism doctor` compares, and rows of each data file at the start of a run
DOCTOR_ROWS = 8
RUN_ROWS = 3
# rows of a file among which those are chosen
WINDOW = 64
# stands for lengths that nothing limits
ANY_LENGTH = 2**40


class Candidate(NamedTuple):
    """A row of a file."""

    path: Path
    row: int
    content: Mapping[str, Any]


def show_inputs(model: str, data: str) -> int:
    """Prints a table of some rows' inputs, and raises `DataError` if ours differ from transformers'.

    Args:
        model: folder or hub id of a model.
        data: a file or folder of rows for any stage.
    """
    folder = checkpoint_folder("--model", model, weights=False)
    encoder, reference = load_encoder("--model", str(folder)), Reference("--model", folder)
    rows = list(candidates([data]))
    if not rows:
        raise DataError(f"--data: expected rows, there is none that can be read in {data!r}")
    limits = DataSettings(prompt_tokens=ANY_LENGTH, response_tokens=ANY_LENGTH)
    made = comparisons(rows, _schema(rows[0].content), "rlvr", encoder, reference, limits)
    compared = list(islice(made, DOCTOR_ROWS))
    if not compared:
        raise DataError(f"--data: expected a row that can be used, got none among {len(rows)} of {data!r}")
    _print(compared, f"ours / {reference.made_with}")
    _check(compared, reference, "--model", model, data)
    return 0


def check_inputs(config: Config) -> str | None:
    """Compares a few rows of each data file of a run, and returns a line for its log.

    Raises `DataError` if our inputs differ from transformers'. Returns None without data files, and for the tiny
    policy, whose processor is ours. No weights are read.
    """
    name, files = config.model.policy, [(key, paths) for key, paths in config.data.files if paths]
    if name == "tiny" or config.data.source != "files" or not files:
        return None
    encoder = policy_encoder(config)
    folder = checkpoint_folder("model.policy", name, (DENSE,), weights=False)
    reference = Reference("model.policy", folder, config.model.max_image_pixels)
    compared: list[Comparison] = []
    for key, paths in files:
        rows = candidates(paths)
        made = list(islice(comparisons(rows, SCHEMAS[key], key, encoder, reference, config.data), RUN_ROWS))
        _check(made, reference, "model.policy", name, paths[0])
        compared += made
    images = sum(len(one.images) for one in compared)
    return f"the inputs of {len(compared)} rows with {images} images equal those of {reference.made_with}"


def candidates(paths: Sequence[str]) -> Iterator[Candidate]:
    """Yields the first rows of each file: one of each number of images, then a second one of each, and so on."""
    by_images: dict[int, list[Candidate]] = {}
    for path in data_files(paths):
        for raw in islice(read_rows(path), WINDOW):
            try:
                content = parse(raw.content)
            except RowError:
                continue
            several, one = content.get("images"), content.get("image")
            images = len(several) if isinstance(several, list) else int(one is not None)
            by_images.setdefault(images, []).append(Candidate(path, raw.row, content))
    ordered = chain.from_iterable(zip_longest(*by_images.values()))
    yield from (row for row in ordered if row is not None)


def comparisons(
    rows: Iterator[Candidate] | Sequence[Candidate],
    schema: str,
    use: str,
    encoder: PromptEncoder,
    reference: Reference,
    data: DataSettings,
) -> Iterator[Comparison]:
    """Yields the comparison of each row that can be used.

    Args:
        rows: the rows.
        schema: their schema.
        use: the stage, or the held-out split.
        encoder: our encoder.
        reference: transformers' side.
        data: settings of lengths and images.
    """
    limits, read = ImageLimits(allow_remote=data.allow_remote_images), problem_reader(use, encoder, data)
    for path, number, content in rows:
        root = path.parent if data.image_root is None else Path(data.image_root)
        try:
            row = READERS[schema](content, "", root, limits)
            problem = read(row)
        except RowError:
            # the stage skips it too, and says why
            continue
        ours, theirs = inputs_of(encoder, problem.encoded(encoder)), reference.inputs(problem.prompt, row.images)
        sizes = tuple((image.width, image.height) for image in row.images)
        yield compare(f"{path.name}, row {number}", sizes, ours, theirs, reference)


def _schema(content: Mapping[str, Any]) -> str:
    if content.get("reward_model") is not None:
        return "problem"
    return "chat" if {"messages", "conversations"} & content.keys() else "warmup"


def _check(compared: Sequence[Comparison], reference: Reference, key: str, model: str, data: str) -> None:
    differing = [one for one in compared if one.problem]
    if differing:
        raise DataError(
            f"{key}: expected the inputs of {reference.made_with} for {model!r}, {len(differing)} of {len(compared)} "
            f"rows differ; {differing[0].row}: {differing[0].problem}; "
            f"`prism doctor --model {model} --data {data}` shows more rows"
        )


def _print(compared: Sequence[Comparison], title: str) -> None:
    console = Console()
    console.print(title, markup=False, soft_wrap=True, highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("row", overflow="fold")
    table.add_column("images", overflow="fold")
    for name in ("tokens", "image tokens", "pixels", "positions"):
        table.add_column(name, justify="right")
    for one in compared:
        sizes = ", ".join(f"{width}x{height}" for width, height in one.images) or "none"
        pairs = [f"{ours} / {theirs}" for ours, theirs in (one.tokens, one.image_tokens)]
        pixels = f"{one.levels:.3g} off" if one.levels > min(one.allowed_levels, 0.5) else "equal"
        positions = (
            "equal" if one.positions == 0 else "other tokens" if one.positions is None else f"{one.positions} off"
        )
        table.add_row(one.row, sizes, *pairs, pixels, positions)
    console.print(table)
