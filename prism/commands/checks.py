"""What is asked of commands before torch is imported, so that their errors come at once."""

from pathlib import Path

from prism.config import Config, ConfigError
from prism.data.files import DataError

# of the embedded world, those that problems with answers can be taken from
SPLITS = ("test", "validation", "rl", "alignment", "sft")


def check_places(config: Config) -> None:
    """Raises where a model of a run cannot be read, or one that is there would be written over."""
    for key, named in (("policy", config.model.policy), ("discriminator", config.model.discriminator)):
        if named not in ("tiny", "policy"):
            _check_model(f"model.{key}", named)
        if Path(named).resolve() == (Path(config.run.folder) / key).resolve():
            raise ConfigError(f"run.folder: expected another one than that of model.{key}, which it would write over")
    if (Path(config.run.folder) / "upcycle.json").is_file():
        raise ConfigError(f"run.folder: expected another one than that of `prism upcycle`, got {config.run.folder!r}")


def check_custom_rewards(config: Config) -> None:
    """Raises where a custom reward of RLVR cannot be called."""
    paths = config.algorithm.rlvr.rewards
    if not paths or "rlvr" not in config.run.stages:
        return
    from prism.rewards.custom import find_unusable_rewards

    if problems := find_unusable_rewards(paths):
        raise ConfigError("\n".join(f"algorithm.rlvr.rewards: {problem}" for problem in problems))


def upcycle(config: Config) -> int:
    """Writes the discriminator that the settings describe; see `prism.commands.make_discriminator`."""
    folder = Path(config.run.folder)
    if config.discriminator.dense:
        raise ConfigError("discriminator.dense: expected false, a dense one has no experts, got true")
    for name in ("config.json", "metrics.jsonl", "discriminator"):
        if (folder / name).exists():
            raise ConfigError(f"run.folder: expected one without {name}, got {str(folder)!r}; name another one")
    from prism.commands.make_discriminator import write_discriminator

    write_discriminator(config)
    return 0


def evaluate(
    model: str, data: str, out: str | None, samples: int | None, temperature: float, max_new_tokens: int, seed: int
) -> int:
    """Prints a model's figures on problems, and writes them where a file is named; see `prism.commands.evaluate`."""
    _check_model("--model", model)
    world, _, split = data.partition(":")
    if world == "shapes" and split:
        if split not in SPLITS:
            raise DataError(f"--data: expected shapes: with one of {', '.join(SPLITS)}, got {data!r}")
    elif not Path(data).exists():
        raise DataError(f"--data: expected a file or folder of problems, or shapes:test; there is no {data!r}")
    if out is not None and not Path(out).parent.is_dir():
        raise DataError(f"--out: expected a file in a folder that exists, got {out!r}")
    from prism.commands.evaluate import examine

    examine(model, data, out, samples, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    return 0


def export(run: str, to: str) -> int:
    """Writes a run's policy for others; see `prism.commands.export`."""
    from prism.report.run_folder import read_run

    record = read_run(run)
    if Path(to).exists():
        raise DataError(f"--to: expected a folder that does not exist yet, got {to!r}")
    from prism.commands.export import write_export

    write_export(record, Path(to))
    return 0


def _check_model(key: str, named: str) -> None:
    # what begins like a folder here, or as no hub id does, is not meant as one
    folder = named.count("/") > 1 or named.startswith((".", "/", "~")) or Path(named.partition("/")[0]).is_dir()
    inside = Path(named) / ("discriminator" if key.endswith("discriminator") else "policy")
    if (inside / "config.json").is_file():
        raise ConfigError(f"{key}: expected the folder of a model, got that of a run; did you mean {str(inside)!r}?")
    if folder and not (Path(named) / "config.json").is_file():
        raise ConfigError(f"{key}: expected a folder with a config.json, got {named!r}")
