"""Lists the test files that need a missing package, or that add nothing on a machine with a GPU."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
# modules that tests import by their bare names, besides those in their own folder
HELPERS = ROOT / "tests/peers"
ON_A_GPU = {
    "tests/kernels/test_triton_interpreter.py": "the kernels run on the GPU itself",
    "tests/kernels/test_triton_aot.py": "the kernels are compiled for this GPU",
    "tests/kernels/test_triton_aot_moe.py": "the kernels are compiled for this GPU",
}


@cache
def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def left_out(tests: list[str], root: Path = ROOT) -> dict[str, str]:
    """Returns, for each test file that should not be collected, the reason."""
    reasons = {}
    for folder in tests:
        for path in sorted((root / folder).rglob("test_*.py")):
            name = str(path.relative_to(root))
            missing = missing_packages(path, root)
            if missing:
                reasons[name] = f"not installed: {', '.join(sorted(missing))}"
            elif name in ON_A_GPU:
                reasons[name] = ON_A_GPU[name]
    return reasons


def missing_packages(path: Path, root: Path = ROOT) -> set[str]:
    """Returns the missing packages that importing a file needs; our own modules are followed."""
    missing: set[str] = set()
    seen: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in imports(file):
            ours = own_files(module, file.parent, root)
            todo += ours
            package = module.partition(".")[0]
            if not ours and not (root / package).is_dir() and not is_installed(package):
                missing.add(package)
    return missing


@cache
def imports(file: Path) -> tuple[str, ...]:
    return tuple(dict.fromkeys(imported(ast.parse(file.read_text()))))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the imports that run with the module's import: not those in functions, nor those in a try."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield from imported(node)


def own_files(module: str, beside: Path, root: Path) -> list[Path]:
    """Returns the repository's files that importing a module runs, those of its packages first."""
    parts = module.split(".")
    files = []
    for base in (root, beside, HELPERS):
        for count in range(1, len(parts) + 1):
            path = base.joinpath(*parts[:count])
            files += [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        if files:
            break
    return files
