"""docs/tour.md names files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text()
# a station is a line like "1. [`file`](../file): `name`, `name`. Text"
STATION = re.compile(r"^\d+\. \[`([^`]+)`\]\(\.\./(\S+?)\):\s+((?:`[\w.]+`(?:,\s+)?)+)\.\s", re.MULTILINE)
STATIONS = [(path, re.findall(r"`([\w.]+)`", names)) for _, path, names in STATION.findall(TOUR)]


def defined(body, prefix=""):
    """Yields the functions, classes, methods and assigned names of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (f"{prefix}{target.id}" for target in node.targets if isinstance(target, ast.Name))


def test_every_item_of_a_walk_is_a_station():
    items = re.findall(r"^\d+\. ", TOUR, re.MULTILINE)
    assert len(STATIONS) == len(items) > 10


@pytest.mark.parametrize(("path", "names"), STATIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_station_names_a_file_and_its_functions(path, names):
    source = (ROOT / path).read_text()
    known = set(defined(ast.parse(source).body)) if path.endswith(".py") else set(re.findall(r"\w+", source))
    assert names and set(names) <= known


def test_every_task_names_a_file():
    files = re.findall(r"^\| \d+ \| .* \| `([^`]+)` \|$", TOUR, re.MULTILINE)
    assert len(files) == 10 and all((ROOT / file).exists() for file in files)


def test_a_stations_link_shows_its_file():
    for shown, path, _ in STATION.findall(TOUR):
        assert shown == path
