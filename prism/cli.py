"""The command line: a table of commands, imported when they are called: help and bad settings answer at once."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism.data.errors import DataError

if TYPE_CHECKING:
    from prism.config import Config

INSTALL = "pip install 'prism-kernels[train]'"


class Command(NamedTuple):
    """What a name on the command line calls."""

    # "module:function"; the command exists where the module does
    target: str
    summary: str
    # called with the settings; else without arguments
    configured: bool = True
    # of a command without settings: its flags, all required, as (name, metavar, help)
    options: tuple[tuple[str, str, str], ...] = ()


COMMANDS = {
    "run": Command("prism.run:run", "all stages one after the other; the same command goes on where it was ended"),
    "report": Command(
        "prism.report:report",
        "one static HTML file of a run, finished or not",
        False,
        (("run", "DIR", "the run's folder"),),
    ),
    "doctor": Command("prism.cli:doctor", "versions, devices, kernels, and why those that are missing are", False),
}

# what doctor looks for beyond what the kernels need
PACKAGES = ("pydantic", "rich", "safetensors", "tokenizers", "pillow", "pyarrow", "math-verify")
# the schema of each stage's files
SCHEMAS = {
    "sft": "chat",
    "warmup": "warmup",
    "align": "problem",
    "rlvr": "problem",
    "validation": "problem",
    "test": "problem",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 2 for bad settings or data, 130 after Ctrl-C."""
    # flags of settings are not argparse's: it sees the rest
    parsed, flags = _parser().parse_known_args(arguments)
    command = COMMANDS[parsed.command]
    try:
        if not command.configured:
            if flags:
                raise DataError(f"{parsed.command}: expected no further arguments, got {' '.join(flags)}")
            return _called(command, **{name: getattr(parsed, name) for name, _, _ in command.options})
        return _configured(command, parsed, flags)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        # anything else than these two is a defect, whose traceback is wanted
        if not (isinstance(error, DataError) or type(error).__name__ == "ConfigError"):
            raise
        print(f"prism {parsed.command}: {error}", file=sys.stderr)
        return 2


def available() -> dict[str, Command]:
    """Returns the commands whose modules exist; none of them is imported."""
    return {name: command for name, command in COMMANDS.items() if _exists(command.target.partition(":")[0])}


def doctor() -> int:
    """Prints versions, devices and kernels, and returns 1 where a package of the extra [train] is missing."""
    from importlib.metadata import PackageNotFoundError, version

    from prism_kernels.__main__ import main as kernels

    missing = []
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            missing.append(package)
            found = "not installed"
        print(f"{package:<13} {found}")
    kernels()
    if missing:
        print(f"\nmissing: {', '.join(missing)}; {INSTALL}")
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "prism", description="Post-training of vision-language models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in available().items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        for flag, metavar, told in command.options:
            sub.add_argument(f"--{flag}", metavar=metavar, help=told, required=True)
        if command.configured:
            sub.usage = f"prism {name} [--config FILE] [--dry-run] [--section.key VALUE ...]"
            sub.add_argument("--config", metavar="FILE", help="settings in TOML; without it, the embedded world's")
            sub.add_argument("--dry-run", action="store_true", help="print all settings, read all data files, and stop")
            sub.add_argument("--settings", action="store_true", help="list the keys that may be set, and stop")
    return parser


def _configured(command: Command, parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    try:
        from prism.config import all_keys, load_config, parse_overrides, to_toml
    except ModuleNotFoundError as error:
        print(
            f"prism {parsed.command}: expected the package {error.name}, which is missing; {INSTALL}", file=sys.stderr
        )
        return 2
    if parsed.settings:
        print("\n".join(all_keys()))
        return 0
    config = load_config(parsed.config, parse_overrides(flags))
    if parsed.dry_run:
        print(to_toml(config), end="")
        return _read_data(config)
    return _called(command, config)


def _called(command: Command, *arguments: Any, **named: Any) -> int:
    module, _, name = command.target.partition(":")
    function: Callable[..., int | None] = getattr(importlib.import_module(module), name)
    return function(*arguments, **named) or 0


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # its package does not exist
        return False


def _read_data(config: "Config") -> int:
    """Reads all data files, prints what would be rejected and why, and returns 1 where it is more than allowed."""
    if config.data.source == "shapes":
        return 0
    from pathlib import Path

    from prism.data.images import ImageLimits
    from prism.data.loader import LoadOptions, dry_run
    from prism.data.rows import RowLimits

    length, counted = _token_length(config)
    data, root = config.data, config.data.image_root
    if not counted:
        print(f"\n# lengths are not checked: there is no tokenizer of {config.model.policy!r} on this machine")
    options = LoadOptions(
        image_root=None if root is None else Path(root),
        limits=RowLimits(
            prompt=data.prompt_tokens if counted else None,
            response=data.response_tokens if counted else None,
            length=length,
            images=ImageLimits(allow_remote=data.allow_remote_images),
        ),
    )
    status = 0
    for name, files in data.files:
        if not files:
            continue
        found = dry_run(files, SCHEMAS[name], options)
        print(f"\n# data.files.{name}: {found.accepted} of {found.rows} rows can be used")
        for cause, count in found.rejected.items():
            print(f"#   {cause}: {count}; the first: {found.first[cause]}")
        if found.accepted == 0 or found.rows - found.accepted > data.max_skipped * found.rows:
            print(f"#   expected at most data.max_skipped = {data.max_skipped:.0%} to be skipped, and a row to be left")
            status = 1
    return status


def _token_length(config: "Config") -> tuple[Callable[[str], int], bool]:
    """Returns what counts a text's tokens, and whether it does: a hub's tokenizer may not be on this machine."""
    if config.model.policy == "tiny":
        from prism.models.tokenizer import train_tokenizer

        tokenizer: Any = train_tokenizer(vocab_size=config.model.tiny.vocab_size)
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model.policy, local_files_only=True)
        except OSError:
            return len, False
    return (lambda text: len(tokenizer(text)["input_ids"])), True
