"""The command line: a table of commands, imported when they are called: help and bad settings answer at once."""

import argparse
import importlib
import importlib.util
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism.data.files import DataError

if TYPE_CHECKING:
    from prism.config import Config
    from prism.models.prompts import PromptEncoder

INSTALL = "pip install 'prism-kernels[train]'"


class Option(NamedTuple):
    """A flag of a command without settings."""

    name: str
    metavar: str
    told: str
    kind: Callable[[str], Any] = str
    required: bool = True
    default: Any = None


class Command(NamedTuple):
    """What a name on the command line calls."""

    # "module:function"; the command exists where the module does
    target: str
    summary: str
    # called with the settings; else with its options
    configured: bool = True
    options: tuple[Option, ...] = ()
    # the one that is run, of a command that is one stage of the settings
    stage: str | None = None


def positive(text: str) -> int:
    """Returns a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Returns a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """Returns a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


RUN = Option("run", "DIR", "the run's folder")
STAGES_RUN = "prism.commands.run:run"
COMMANDS = {
    "run": Command(STAGES_RUN, "all stages one after the other; the same command goes on where it was ended"),
    "sft": Command(STAGES_RUN, "one stage: fine-tunes model.policy on demonstrations", stage="sft"),
    "upcycle": Command(
        "prism.commands.checks:upcycle", "makes a discriminator of a dense model; tells what that changes"
    ),
    "warmup": Command(
        STAGES_RUN,
        "one stage: trains model.discriminator on model.policy against its teachers",
        stage="warmup",
    ),
    "align": Command(STAGES_RUN, "one stage: model.policy plays against model.discriminator", stage="align"),
    "rlvr": Command(STAGES_RUN, "one stage: reinforces right answers of model.policy", stage="rlvr"),
    "eval": Command(
        "prism.commands.checks:evaluate",
        "accuracy, format and length of a model's responses to problems, by data source",
        False,
        (
            Option("model", "DIR", "a policy: a folder as a run leaves it, or a hub id"),
            Option("data", "FILE", "problems, JSONL or parquet; or shapes:test, a split of the embedded world"),
            Option("out", "FILE", "JSON for the figures", required=False),
            Option("samples", "N", "the first N problems; all without it", positive, False),
            Option("temperature", "T", "0, which is greedy, without it", temperature, False, 0.0),
            Option("max_new_tokens", "N", "the longest response; 1024 without it", positive, False, 1024),
            Option("seed", "N", "of the sampling; 0 without it", natural, False, 0),
        ),
    ),
    "export": Command(
        "prism.commands.checks:export",
        "a Hugging Face folder of a run's policy, with a model card",
        False,
        (RUN, Option("to", "DIR", "the folder to write, which must not exist yet")),
    ),
    "report": Command("prism.report:report", "one static HTML file of a run, finished or not", False, (RUN,)),
    "doctor": Command("prism.cli:doctor", "versions, devices, kernels, and why those that are missing are", False),
}

# what doctor looks for beyond what the kernels need
PACKAGES = ("pydantic", "rich", "safetensors", "tokenizers", "pillow", "pyarrow", "math-verify")
# errors whose message says all, by name: their modules import much
TOLD = ("ConfigError", "CheckpointError", "NotFiniteError")
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
    """Runs a command and returns the exit status.

    1 where training cannot go on, 2 for bad settings, data or checkpoints, 130 after Ctrl-C, 141 where nobody reads on.
    """
    # flags of settings are not argparse's: it sees the rest
    parsed, flags = _parser().parse_known_args(arguments)
    command = COMMANDS[parsed.command]
    try:
        status = _run(command, parsed, flags)
        # here, and not at the interpreter's end, a reader shows that reads no further
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 141
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("prism"):
            raise
        print(
            f"prism {parsed.command}: expected the package {error.name}, which is missing; {INSTALL}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        # anything else than these is a defect, whose traceback is wanted
        if not (isinstance(error, DataError) or type(error).__name__ in TOLD):
            raise
        print(f"prism {parsed.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _run(command: Command, parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    if command.configured:
        return _configured(command, parsed, flags)
    if flags:
        raise DataError(f"{parsed.command}: expected no further arguments, got {' '.join(flags)}")
    return _called(command, **{option.name: getattr(parsed, option.name) for option in command.options})


def _nobody_reads() -> bool:
    """Returns whether it is the standard output that is closed, as by `| head`; what is left then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


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
        for name_, metavar, told, kind, required, default in command.options:
            sub.add_argument(f"--{name_}", metavar=metavar, help=told, type=kind, required=required, default=default)
        if command.configured:
            sub.usage = f"prism {name} [--config FILE] [--dry-run] [--section.key VALUE ...]"
            sub.add_argument("--config", metavar="FILE", help="settings in TOML; without it, the embedded world's")
            sub.add_argument("--dry-run", action="store_true", help="print all settings, read all data files, and stop")
            sub.add_argument("--settings", action="store_true", help="list the keys that may be set, and stop")
    return parser


def _configured(command: Command, parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    from prism.commands.checks import check_custom_rewards, check_places
    from prism.config import all_keys, load_config, parse_overrides, to_toml

    if parsed.settings:
        print("\n".join(all_keys()))
        return 0
    overrides = parse_overrides(flags)
    if command.stage is not None and overrides.setdefault("run.stages", command.stage) != command.stage:
        raise DataError(f"run.stages: expected none, `prism {command.stage}` is one stage; several are `prism run`")
    config = load_config(parsed.config, overrides)
    check_places(config)
    check_custom_rewards(config)
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
    from prism.data.images import ImageLimits
    from prism.data.loader import LoadOptions, dry_run
    from prism.data.problem import problem_reader

    data, root = config.data, config.data.image_root
    encoder = _encoder(config)
    if encoder is None:
        print(f"\n# lengths are not checked: there is no tokenizer of {config.model.policy!r} on this machine")
    images = ImageLimits(allow_remote=data.allow_remote_images)
    options = LoadOptions(image_root=None if root is None else Path(root), images=images)
    status = 0
    for name, files in data.files:
        if not files:
            continue
        # as the run reads them
        take = None if encoder is None else problem_reader(name, encoder, data)
        found = dry_run(files, SCHEMAS[name], options, take=take)
        print(f"\n# data.files.{name}: {found.accepted} of {found.rows} rows can be used")
        for cause, count in found.rejected.items():
            print(f"#   {cause}: {count}; the first: {found.first[cause]}")
        if found.accepted == 0 or found.rows - found.accepted > data.max_skipped * found.rows:
            print(f"#   expected at most data.max_skipped = {data.max_skipped:.0%} to be skipped, and a row to be left")
            status = 1
    return status


def _encoder(config: "Config") -> "PromptEncoder | None":
    """Returns what reads prompts for the policy; None: a hub's model may not be on this machine."""
    from prism.models.building import load_encoder
    from prism.models.prompts import PromptEncoder
    from prism.models.tiny import tiny_image_processor, train_tokenizer

    if config.model.policy == "tiny":
        tokenizer = train_tokenizer(vocab_size=config.model.tiny.vocab_size)
        return PromptEncoder(tokenizer, tiny_image_processor(config.model.tiny))
    try:
        return load_encoder(config.model.policy, config.model.max_image_pixels, local_files_only=True)
    except OSError:
        return None
