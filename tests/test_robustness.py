"""docs/robustness.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs" / "robustness.md").read_text())


def test_every_row_names_a_test():
    rows = [line for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if line.startswith("| ")]
    # each table has a line of titles
    titles = [line for line in rows if line.startswith("| before")]
    assert len(NAMED) == len(rows) - len(titles) > 30


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_the_test_exists(path, name):
    functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
