"""Reads settings from a file and from flags, and writes them as a file."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prism.config.sections import ConfigError, Section
from prism.config.settings import Config
from prism.ranges import Ranged

Table = type[Section] | type[Ranged]


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of a TOML file with overrides; raises `ConfigError` with a line for every problem.

    Args:
        path: the file; None: the defaults.
        overrides: values by dotted key, such as `{"optimiser.align.lr": 1e-6}`; see `parse_overrides` for flags.
    """
    name = "settings" if path is None else str(path)
    tables = {} if path is None else _read(Path(path))
    for key, value in (overrides or {}).items():
        _put(tables, key, value)
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        problems = [line for one in error.errors() for line in _lines(dict(one))]
        raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems)) from None


def parse_overrides(flags: Sequence[str]) -> dict[str, Any]:
    """Returns values by dotted key from flags: `--key value`, `--key=value`, or `--key` for true.

    A value is read as TOML, with commas as a list, or else as a text.
    """
    overrides: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise ConfigError(f"flags: expected --section.key value, got {flag!r}")
        key, equals, text = flag[2:].partition("=")
        if equals:
            overrides[key] = _value(text)
        elif rest and not rest[0].startswith("--"):
            overrides[key] = _value(rest.pop(0))
        else:
            overrides[key] = True
    return overrides


def to_toml(config: Config) -> str:
    """Returns the text of a file that `load_config` reads as these settings."""
    return "\n".join(_table((), config.model_dump())).strip() + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a TOML file, there is none{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected a TOML file, got {error}") from None


def _nearest_file(path: Path) -> str:
    return _hint(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    table = tables
    for depth, parent in enumerate(parents, 1):
        # a flag below a table that is "none" switches it on
        if table.get(parent, "none") == "none":
            table[parent] = {}
        if not isinstance(table[parent], dict):
            raise ConfigError(f"{key}: expected a table at {'.'.join(parents[:depth])!r}, got {table[parent]!r}")
        table = table[parent]
    table[last] = value


def _value(text: str) -> Any:
    for toml in (text, f"[{text}]" if "," in text else text):
        try:
            return tomllib.loads(f"value = {toml}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text


def _lines(error: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of one of pydantic's errors."""
    # indices of lists are not keys
    keys = [str(part) for part in error["loc"] if not isinstance(part, int)]
    key = ".".join(keys)
    kind, given = error["type"], error["input"]
    # pydantic names an unknown field of a dataclass differently
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(_fields(keys[:-1]))
        yield f"{key}: expected a known key, got an unknown one{_hint(keys[-1], known) or _elsewhere(keys[-1])}"
    elif kind == "too_long" or (kind == "missing" and isinstance(error["loc"][-1], int)):
        yield f"{key}: expected two numbers, got {len(given)}"
    elif kind == "missing":
        yield f"{key}: expected a value, got none"
    elif kind == "value_error":
        for line in str(error["ctx"]["error"]).splitlines():
            yield f"{key}.{line}" if key else line
    else:
        expected = error["msg"].replace("Input should be ", "").replace("Input should have", "to have")
        expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
        choices = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
        hint = _hint(given, choices) if kind == "literal_error" and isinstance(given, str) else ""
        if kind in ("model_type", "dataclass_type"):
            expected = f"a table: [{key}]"
        yield f"{key}: expected {expected}, got {given!r}{hint}"


def _fields(keys: Sequence[str]) -> dict[str, Any]:
    """Returns the types of the fields of the table at a key."""
    types = _types(Config)
    for key in keys:
        table = _table_of(types.get(key))
        types = {} if table is None else _types(table)
    return types


def _types(table: Table) -> dict[str, Any]:
    """Returns the types of a table's fields, by name."""
    if issubclass(table, Section):
        return {name: field.annotation for name, field in table.model_fields.items()}
    return {field.name: field.type for field in fields(table)}


def _table_of(annotation: Any) -> Table | None:
    """Returns the class of a field that is a table, optional or not."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, (Section, Ranged)):
            return kind
    return None


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _elsewhere(word: str) -> str:
    """Returns a hint if another table has a key of this name."""
    others = [key for key in all_keys() if key.rsplit(".", 1)[-1] == word]
    return f"; did you mean {' or '.join(map(repr, others[:3]))}?" if others else ""


def all_keys(parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the dotted keys of all settings."""
    for name, annotation in _fields(parents).items():
        if _table_of(annotation) is None:
            yield ".".join((*parents, name))
        else:
            yield from all_keys((*parents, name))


def _table(keys: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[str]:
    values = {name: value for name, value in table.items() if not isinstance(value, dict)}
    if values:
        if keys:
            yield f"\n[{'.'.join(keys)}]"
        yield from (f"{name} = {_spelled(value)}" for name, value in values.items())
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _table((*keys, name), value)


def _spelled(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spelled, value))}]"
    # JSON's spelling of texts, numbers, true and false is TOML's, as no number is infinite
    return json.dumps(value)
