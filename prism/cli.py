"""The command line. Commands are checked before torch is imported, so that errors and help answer at once."""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism.data.files import SCHEMAS, DataError

if TYPE_CHECKING:
    from prism.config import Config
    from prism.models.prompts import PromptEncoder

INSTALL = "pip install 'prism-kernels[train]'"


class Option(NamedTuple):
    """A flag of a command that takes no settings."""

    name: str
    metavar: str
    help: str
    type: Callable[[str], Any] = str
    required: bool = True
    default: Any = None
    choices: tuple[str, ...] | None = None
    # "+": one value or more
    nargs: str | None = None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the flag to a command."""
        parser.add_argument(f"--{self.name}", **{key: value for key, value in self._asdict().items() if key != "name"})


class Switch(NamedTuple):
    """A flag without a value."""

    name: str
    help: str

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the flag to a command."""
        parser.add_argument(f"--{self.name}", action="store_true", help=self.help)


class Operands(NamedTuple):
    """Arguments without a flag, one or more."""

    name: str
    metavar: str
    help: str

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments to a command."""
        parser.add_argument(self.name, nargs="+", metavar=self.metavar, help=self.help)


class Command(NamedTuple):
    """A command, and the function that it calls."""

    # "module:function", imported when the command is called
    target: str
    summary: str
    # whether the function takes the settings; otherwise it takes the options
    configured: bool = True
    options: tuple[Option | Switch | Operands, ...] = ()
    # the only stage that the command runs
    stage: str | None = None


def positive(text: str) -> int:
    """Parses a whole number > 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parses a whole number >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """Parses a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


RUN = Option("run", "DIR", "folder of the run")
STAGES_RUN = "prism.commands.run:run"
COMMANDS = {
    "run": Command(STAGES_RUN, "run all stages; rerun the same command to resume"),
    "sft": Command(STAGES_RUN, "run one stage: fine-tune model.policy on demonstrations", stage="sft"),
    "upcycle": Command("prism.cli:upcycle", "make a discriminator from a dense model, and measure the change"),
    "warmup": Command(
        STAGES_RUN,
        "run one stage: train model.discriminator to tell model.policy's responses from its teachers'",
        stage="warmup",
    ),
    "align": Command(STAGES_RUN, "run one stage: train model.policy against model.discriminator", stage="align"),
    "rlvr": Command(STAGES_RUN, "run one stage: reinforce right answers of model.policy", stage="rlvr"),
    "eval": Command(
        "prism.cli:evaluate",
        "measure accuracy, format and length of a model's responses to problems, by data source",
        False,
        (
            Option("model", "DIR", "policy: the folder `policy` of a run, or a hub id"),
            Option("data", "FILE", "problems as JSONL or parquet; or shapes:test, a split of the embedded world"),
            Option("out", "FILE", "JSON file for the figures", required=False),
            Option("samples", "N", "evaluate the first N problems; default: all", positive, False),
            Option("temperature", "T", "sampling temperature; default: 0, which is greedy", temperature, False, 0.0),
            Option("max_new_tokens", "N", "tokens of the longest response; default: 1024", positive, False, 1024),
            Option("seed", "N", "seed of the sampling; default: 0", natural, False, 0),
        ),
    ),
    "export": Command(
        "prism.cli:export",
        "write a run's policy as a Hugging Face folder with a model card",
        False,
        (RUN, Option("to", "DIR", "folder to write; it must not exist yet")),
    ),
    "report": Command("prism.report:report", "write a run's report as one HTML file, finished or not", False, (RUN,)),
    "data check": Command(
        "prism.cli:check",
        "check data files without a model: count the rows that a run would skip, by cause",
        False,
        (
            Operands("files", "FILE", "data file, JSONL or parquet, or a folder of them"),
            Option(
                "schema",
                "SCHEMA",
                "chat (sft), warmup, or problem (align, rlvr, validation, test); default: by the file's fields",
                required=False,
                choices=("chat", "warmup", "problem"),
            ),
            Option("image_root", "DIR", "folder that image paths are relative to; default: the file's", required=False),
            Option("model", "DIR", "policy, whose tokens are counted; default: no tokens", required=False),
            Option("prompt_tokens", "N", "the longest prompt, with --model; default: any", positive, False),
            Option("response_tokens", "N", "the longest response, with --model; default: any", positive, False),
            Switch("remote_images", "download images at http and https addresses"),
        ),
    ),
    "score": Command(
        "prism.commands.rescore:rescore",
        "score the rollouts that a run recorded again, and compare",
        False,
        (
            Option("rollouts", "FILE", "a file of a run's folder `rollouts`, or the folder"),
            Option("reward", "PATH", "custom rewards, as package.module:function", required=False, nargs="+"),
            Option("out", "FILE", "JSONL file for the old and new values of each rollout", required=False),
        ),
    ),
    "doctor": Command(
        "prism.cli:doctor",
        "show versions, devices and kernels, and why any is missing; or compare a model's inputs with transformers'",
        False,
        (
            Option("model", "DIR", "with --data: folder or hub id of a model", required=False),
            Option(
                "data",
                "FILE",
                "with --model: rows, of which some are encoded by us and by transformers",
                required=False,
            ),
        ),
    ),
}

# splits of the embedded world whose problems have answers
EVALUATED = ("test", "validation", "rl", "alignment", "sft")
# packages that doctor shows besides those of the kernels
PACKAGES = ("pydantic", "rich", "safetensors", "tokenizers", "pillow", "pyarrow", "math-verify")
# errors that are shown without a traceback; by name, since importing their modules takes long
SHOWN = ("ConfigError", "CheckpointError", "RunFolderError", "NotFiniteError", "NotSavedError")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 0; 1 if training cannot continue; 2 for bad settings, data, checkpoints or folders; 130 after Ctrl-C;
    143 if SIGTERM ended a run after its step; 141 if the reader of the output has closed it.
    """
    # argparse does not know the settings: they stay in `flags`
    parsed, flags = _parser().parse_known_args(arguments)
    command = COMMANDS[parsed.command]
    try:
        status = _run(command, parsed, flags)
        # a closed reader shows here, rather than when the interpreter exits
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _output_is_closed():
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
        # any other error is a defect, which needs its traceback
        if not (isinstance(error, DataError) or type(error).__name__ in SHOWN):
            raise
        print(f"prism {parsed.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _run(command: Command, parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    if command.configured:
        return _configured(command, parsed, flags)
    if flags:
        raise DataError(f"{parsed.command}: expected no further arguments, got {' '.join(flags)}")
    return _called(command, **{option.name: getattr(parsed, option.name) for option in command.options})


def _output_is_closed() -> bool:
    """Returns whether the standard output is closed, as by `| head`, and if so discards the rest of the output."""
    closed = True
    # Windows has no poll
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def doctor(model: str | None = None, data: str | None = None) -> int:
    """Prints versions, devices and kernels; returns 1 if a package of the extra [train] is missing.

    With a model and data it prints instead how their inputs compare with those of transformers.
    """
    if model is not None and data is not None:
        _check_model("--model", model)
        if not Path(data).exists():
            raise DataError(f"--data: expected a file or folder of rows, there is no {data!r}")
        from prism.commands.doctor import show_inputs

        return show_inputs(model, data)
    if model is not None or data is not None:
        raise DataError("doctor: expected --model and --data together, got one of them")
    from importlib.metadata import PackageNotFoundError, version

    from prism_kernels.__main__ import main as kernels

    missing = []
    for package in PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            missing.append(package)
            installed = "not installed"
        print(f"{package:<13} {installed}")
    kernels()
    if missing:
        print(f"\nmissing: {', '.join(missing)}; {INSTALL}")
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "prism", description="Post-training of vision-language models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        group, _, action = name.partition(" ")
        beside = commands
        if action:
            outer = commands.add_parser(group, help=f"{name}: {command.summary}", allow_abbrev=False)
            beside = outer.add_subparsers(dest="action", required=True, metavar="action")
        sub = beside.add_parser(action or name, help=command.summary, description=command.summary, allow_abbrev=False)
        sub.set_defaults(command=name)
        for option in command.options:
            option.add_to(sub)
        if command.configured:
            sub.usage = f"prism {name} [--config FILE] [--dry-run] [--section.key VALUE ...]"
            sub.add_argument("--config", metavar="FILE", help="TOML file of settings; default: the embedded world")
            sub.add_argument(
                "--dry-run", action="store_true", help="print all settings and check all data files, then stop"
            )
            sub.add_argument("--settings", action="store_true", help="list the keys of all settings, then stop")
    return parser


def _configured(command: Command, parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    from prism.config import all_keys, load_config, parse_overrides, to_toml

    if parsed.settings:
        print("\n".join(all_keys()))
        return 0
    overrides = parse_overrides(flags)
    if command.stage is not None and overrides.setdefault("run.stages", command.stage) != command.stage:
        raise DataError(f"run.stages: expected none, `prism {command.stage}` is one stage; use `prism run` for several")
    config = load_config(parsed.config, overrides)
    _check_models(config)
    _check_rewards(config)
    if parsed.dry_run:
        print(to_toml(config), end="")
        return _read_data(config)
    return _called(command, config)


def _called(command: Command, *arguments: Any, **named: Any) -> int:
    module, _, name = command.target.partition(":")
    function: Callable[..., int | None] = getattr(importlib.import_module(module), name)
    return function(*arguments, **named) or 0


def upcycle(config: "Config") -> int:
    """Writes the discriminator that the settings describe."""
    from prism.config import ConfigError
    from prism.runtime.disk import system_errors
    from prism.runtime.lock import locked

    folder = Path(config.run.folder)
    if config.discriminator.dense:
        raise ConfigError("discriminator.dense: expected false, a dense one has no experts, got true")
    with system_errors(folder), locked(folder):
        for name in ("config.json", "metrics.jsonl", "discriminator"):
            if (folder / name).exists():
                raise ConfigError(f"run.folder: expected one without {name}, got {str(folder)!r}; name another one")
        from prism.commands.make_discriminator import write_discriminator

        write_discriminator(config)
    return 0


def evaluate(
    model: str, data: str, out: str | None, samples: int | None, temperature: float, max_new_tokens: int, seed: int
) -> int:
    """Prints a model's figures on problems, and writes them to a file if one is named."""
    _check_model("--model", model)
    world, _, split = data.partition(":")
    if world == "shapes" and split:
        if split not in EVALUATED:
            raise DataError(f"--data: expected shapes: with one of {', '.join(EVALUATED)}, got {data!r}")
    elif not Path(data).exists():
        raise DataError(f"--data: expected a file or folder of problems, or shapes:test; there is no {data!r}")
    if out is not None and not Path(out).parent.is_dir():
        raise DataError(f"--out: expected a file in a folder that exists, got {out!r}")
    from prism.commands.evaluate import examine

    examine(model, data, out, samples, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    return 0


def check(
    files: Sequence[str],
    schema: str | None,
    image_root: str | None,
    model: str | None,
    prompt_tokens: int | None,
    response_tokens: int | None,
    remote_images: bool,
) -> int:
    """Prints which rows of data files a run would skip; returns 1 if there is one."""
    if model is not None:
        _check_model("--model", model)
    else:
        for name, limit in (("prompt_tokens", prompt_tokens), ("response_tokens", response_tokens)):
            if limit is not None:
                raise DataError(f"--{name}: expected with --model, whose tokens are counted, got {limit}")
    from prism.commands.check_data import check_data

    return check_data(files, schema, image_root, model, prompt_tokens, response_tokens, remote_images)


def export(run: str, to: str) -> int:
    """Writes a run's policy as a Hugging Face folder."""
    from prism.report.run_folder import read_run
    from prism.runtime.disk import system_errors

    with system_errors(Path(run)), system_errors(Path(to)):
        record = read_run(run)
        if Path(to).exists():
            raise DataError(f"--to: expected a folder that does not exist yet, got {to!r}")
        from prism.commands.export import write_export

        write_export(record, Path(to))
    return 0


def _check_models(config: "Config") -> None:
    """Raises if a model of the settings cannot be read, or if the run would overwrite it."""
    from prism.config import ConfigError

    for key, model in (("policy", config.model.policy), ("discriminator", config.model.discriminator)):
        if model not in ("tiny", "policy"):
            _check_model(f"model.{key}", model)
        if Path(model).resolve() == (Path(config.run.folder) / key).resolve():
            raise ConfigError(f"run.folder: expected another one than that of model.{key}, which it would write over")
    if (Path(config.run.folder) / "upcycle.json").is_file():
        raise ConfigError(f"run.folder: expected another one than that of `prism upcycle`, got {config.run.folder!r}")


def _check_rewards(config: "Config") -> None:
    """Raises if a custom reward of RLVR cannot be called."""
    paths = config.algorithm.rlvr.rewards
    if not paths or "rlvr" not in config.run.stages:
        return
    from prism.config import ConfigError
    from prism.rewards.custom import find_unusable_rewards

    if problems := find_unusable_rewards(paths):
        raise ConfigError("\n".join(f"algorithm.rlvr.rewards: {problem}" for problem in problems))


def _check_model(key: str, model: str) -> None:
    """Raises for the folder of a run instead of a model's, and for a folder without a model."""
    from prism.config import ConfigError

    # a hub id has one slash at most, and does not begin like a path or with a folder that exists
    folder = model.count("/") > 1 or model.startswith((".", "/", "~")) or Path(model.partition("/")[0]).is_dir()
    inside = Path(model) / ("discriminator" if key.endswith("discriminator") else "policy")
    if (inside / "config.json").is_file():
        raise ConfigError(f"{key}: expected the folder of a model, got that of a run; did you mean {str(inside)!r}?")
    if (Path(model) / "config.json").is_file():
        from prism.models.families import DENSE, MOE, family_of

        family_of(key, Path(model), (DENSE,) if key == "model.policy" else (DENSE, MOE))
    elif folder:
        raise ConfigError(f"{key}: expected a folder with a config.json, got {model!r}")


def _read_data(config: "Config") -> int:
    """Reads all data files and prints the rows that would be skipped, by cause; returns 1 if they are too many."""
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
        # with the checks of the run
        take = None if encoder is None else problem_reader(name, encoder, data, patches=False)
        read = dry_run(files, SCHEMAS[name], options, take=take)
        print(f"\n# data.files.{name}: {read.accepted} of {read.rows} rows can be used")
        for cause, count in read.rejected.items():
            print(f"#   {cause}: {count}; the first: {read.first[cause]}")
        if read.accepted == 0 or read.rows - read.accepted > data.max_skipped * read.rows:
            print(f"#   expected at most data.max_skipped = {data.max_skipped:.0%} skipped rows, and a usable row")
            status = 1
    return status


def _encoder(config: "Config") -> "PromptEncoder | None":
    """Returns the encoder of prompts for the policy; None if it is a hub's model that is not on this machine."""
    from prism.models.building import policy_encoder

    try:
        return policy_encoder(config, download=False)
    except FileNotFoundError:
        return None
