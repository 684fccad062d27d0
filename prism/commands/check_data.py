"""Data files checked as a run would read them, without a model: `prism data check`."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from prism.data.files import DataError, Raw, RowError, data_files, extent, parse, read_rows
from prism.data.images import ImageLimits
from prism.data.loader import DryRun, LoadOptions, dry_run
from prism.data.rows import COLUMNS, ProblemRow

if TYPE_CHECKING:
    from prism.models.prompts import PromptEncoder

# rows that a file's schema is told from
_FIRST = 100
# rows between two updates of the progress
_EVERY = 50
_STAGES = {
    "chat": "chats, for sft",
    "warmup": "pairs, for warmup",
    "problem": "problems, for align, rlvr, validation and test",
}


def check_data(
    files: Sequence[str],
    schema: str | None = None,
    image_root: str | None = None,
    model: str | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    remote_images: bool = False,
) -> int:
    """Prints how many rows of each file can be used, and the others by cause; returns 1 if any cannot be used.

    Args:
        files: data files, or folders of them.
        schema: `chat`, `warmup` or `problem`; None: told from the columns of each file's first rows.
        image_root: the folder to which paths of images are relative; None: the folder of the data file.
        model: folder or hub id of the policy, whose tokens are counted.
        prompt_tokens: the longest prompt; None: any. It needs the model, and so does `response_tokens`.
        response_tokens: the longest response.
        remote_images: whether images at http and https addresses are downloaded.
    """
    paths = data_files(files)
    schemas = [schema or _schema(path) for path in paths]
    lengths = None
    if model is not None:
        from prism.models.building import load_encoder

        try:
            encoder = load_encoder("--model", model)
        except (OSError, ValueError) as error:
            raise DataError(f"--model: expected a model with its tokenizer, got {model!r}: {error}") from None
        lengths = _Lengths(encoder, prompt_tokens, response_tokens)
    root = None if image_root is None else Path(image_root)
    options = LoadOptions(image_root=root, images=ImageLimits(allow_remote=remote_images))
    console = Console()
    whole = True
    for path, name in zip(paths, schemas):
        outcome, taught = _read(path, name, options, lengths)
        whole &= 0 < outcome.rows == outcome.accepted
        _print(console, path, name, outcome)
        if name == "problem":
            console.print(f"  {taught:,} of them have a teacher's response, which align needs", highlight=False)
        if lengths is not None:
            console.print(f"  {lengths.longest()}", highlight=False)
    if model is None:
        print("not checked without --model: the tokens of prompts and responses, and the model's own special tokens")
    return 0 if whole else 1


class _Lengths:
    """Checks rows with a model's tokenizer, and keeps the greatest numbers of tokens."""

    def __init__(self, encoder: "PromptEncoder", prompt_tokens: int | None, response_tokens: int | None) -> None:
        from prism.config import DataSettings
        from prism.data.problem import problem_reader

        # a bound that no row of the greatest size reaches
        no_limit = 2**31
        data = DataSettings(prompt_tokens=prompt_tokens or no_limit, response_tokens=response_tokens or no_limit)
        self.encoder = encoder
        self._most = {"prompt": 0, "response": 0}
        # a problem without a teacher's response is one for rlvr
        self._readers = {use: problem_reader(use, encoder, data, patches=False) for use in ("align", "rlvr")}

    def take(self, row: Any) -> None:
        """Checks a row; raises `RowError`."""
        from prism.models.policy import response_ids

        untaught = isinstance(row, ProblemRow) and row.teacher is None
        problem = self._readers["rlvr" if untaught else "align"](row)
        texts = [text for text in (problem.teacher, problem.student) if text is not None]
        responses = response_ids(texts, self.encoder) if texts else []
        for name, ids in [("prompt", problem.encoded(self.encoder).input_ids)] + [("response", r) for r in responses]:
            self._most[name] = max(self._most[name], len(ids))

    def longest(self) -> str:
        """Returns the greatest numbers of tokens of usable rows, in words, and forgets them."""
        words = ", ".join(f"the longest {name} has {most:,} tokens" for name, most in self._most.items())
        self._most = dict.fromkeys(self._most, 0)
        return words


def _schema(path: Path) -> str:
    """Returns the schema that most of a file's first rows name by their fields."""
    votes: Counter[str] = Counter()
    names: dict[str, None] = {}
    for raw in islice(read_rows(path, columns=frozenset().union(*COLUMNS.values())), _FIRST):
        try:
            row = parse(raw.content)
        except RowError:
            continue
        # in parquet every row has every column
        fields = [name for name, value in row.items() if value is not None]
        names |= dict.fromkeys(fields)
        if any(name.startswith("student_") for name in fields):
            votes["warmup"] += 1
        elif "reward_model" in fields:
            votes["problem"] += 1
        elif "messages" in fields or "conversations" in fields:
            votes["chat"] += 1
    if votes:
        return votes.most_common(1)[0][0]
    wanted = "messages or conversations (chat), student_… (warmup) or reward_model (problem)"
    got = ", ".join(islice(names, 8)) or "none"
    raise DataError(f"{path}: expected the fields {wanted} in one of the first rows, got {got}; name a --schema")


def _read(path: Path, schema: str, options: LoadOptions, lengths: _Lengths | None) -> tuple[DryRun, int]:
    """Reads a file and returns the outcome, and the number of usable rows with a teacher's response."""
    taught = 0
    take: Callable[[Any], Any] | None = None if lengths is None else lengths.take

    def count(row: Any) -> None:
        nonlocal taught
        if take is not None:
            take(row)
        taught += getattr(row, "teacher", None) is not None

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(path.name, total=extent(path))

        def at(_: Path, raw: Raw) -> None:
            if raw.row % _EVERY == 0:
                progress.update(bar, completed=raw.end, description=f"{path.name}, row {raw.row:,}")

        return dry_run(path, schema, options, take=count, at=at), taught


def _print(console: Console, path: Path, schema: str, outcome: DryRun) -> None:
    whole = 0 < outcome.rows == outcome.accepted
    usable = Text(f"{outcome.accepted:,} of {outcome.rows:,} rows can be used", style="green" if whole else "bold red")
    console.print(Text(f"{path} ({_STAGES[schema]}): ") + usable, soft_wrap=True)
    if not outcome.rejected:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cause", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("the first", overflow="fold")
    for cause, count in outcome.rejected.items():
        first = outcome.first[cause].removeprefix(f"{path}, ")
        table.add_row(cause, f"{count:,}", f"{count / outcome.rows:.1%}", Text(first))
    console.print(table)
