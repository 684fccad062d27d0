"""The layout of the source: unique names, and imports that flow downwards."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINER = sorted((ROOT / "prism").rglob("*.py"))
SOURCES = [p for name in ("prism", "prism_kernels", "csrc", "bench", "tests", "docs") for p in (ROOT / name).rglob("*")]


def imports(path):
    """Yields the modules that a file imports, and the full names that it imports from modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(folder, package):
    """Returns the files of a folder that import from a package."""
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


def test_a_stage_imports_no_other_stage_but_the_shared_update():
    for path in (ROOT / "prism" / "stages").glob("*.py"):
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("prism.stages.")}
        assert siblings <= {"update"}, path.name
        assert not any(name.startswith(("prism.evaluation", "prism.report")) for name in imports(path)), path.name


def test_the_kernels_do_not_import_the_trainer():
    assert importers("prism_kernels", "prism") == []


def test_no_source_file_is_longer_than_500_lines():
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    long = [str(p.relative_to(ROOT)) for p in SOURCES if p.suffix in kinds and p.read_text().count("\n") > 500]
    assert long == []
