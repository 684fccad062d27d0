"""Which models PRISM trains. A model's files tell before its weights are read, and no code of its folder runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from prism.config import ConfigError

DENSE, MOE = "qwen3_vl", "qwen3_vl_moe"
# files of a model's folder in which transformers looks for the names of code
_NAMING_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def family_of(key: str, folder: Path, families: Sequence[str] = (DENSE, MOE), *, name: str | None = None) -> str:
    """Returns the family of the model in a folder; a family that is not supported is a `ConfigError`.

    Args:
        key: setting or flag that names the model, for errors.
        folder: folder with a config.json.
        families: the supported ones.
        name: name of the model in errors; None: the folder.
    """
    name = str(folder) if name is None else name
    family = _read(key, folder / "config.json").get("model_type")
    if family not in families:
        raise ConfigError(
            f"{key}: expected a Qwen3-VL, of type {' or '.join(families)}, {name!r} is of type {family!r}; "
            "PRISM trains no other models, and reads images but no videos"
        )
    for file in _NAMING_CODE:
        if (folder / file).is_file() and _read(key, folder / file).get("auto_map"):
            raise ConfigError(
                f"{key}: expected a model without code of its own, {file} of {name!r} names some under auto_map; PRISM "
                "never runs it: remove auto_map from a copy if transformers' own Qwen3-VL can read the model"
            )
    return str(family)


def _read(key: str, path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: expected a JSON object in {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: expected a JSON object in {path}, got {type(content).__name__}")
    return content
