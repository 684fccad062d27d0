"""The layout that a newcomer relies on: one name for one thing, and imports that flow downwards."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINER = sorted((ROOT / "prism").rglob("*.py"))
SOURCES = [p for name in ("prism", "prism_kernels", "csrc", "bench", "tests", "docs") for p in (ROOT / name).rglob("*")]


def imports(path):
    """The modules that a file imports, whole names of what it imports from them included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(folder, package):
    """The files of a folder that import from a package."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return [str(f.relative_to(ROOT)) for f in files if any(name.startswith(f"{package}.") for name in imports(f))]


def test_no_two_files_of_the_trainer_share_a_name():
    names = Counter(path.name for path in TRAINER if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_classes_of_the_trainer_share_a_name():
    classes = Counter(
        node.name for path in TRAINER for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["evaluation", "report", "data", "worlds", "rewards", "rollout", "models"])
def test_only_commands_import_stages(folder):
    assert importers(f"prism/{folder}", "prism.stages") == []


def test_stages_share_the_update_alone():
    for path in (ROOT / "prism" / "stages").glob("*.py"):
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("prism.stages.")}
        assert siblings <= {"update"}, path.name
        assert not any(name.startswith(("prism.evaluation", "prism.report")) for name in imports(path)), path.name


def test_the_kernels_stand_alone():
    assert importers("prism_kernels", "prism") == []


def test_no_source_file_is_longer_than_500_lines():
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    long = [str(p.relative_to(ROOT)) for p in SOURCES if p.suffix in kinds and p.read_text().count("\n") > 500]
    assert long == []
