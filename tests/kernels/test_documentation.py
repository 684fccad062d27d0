"""What the documentation lists is what the code has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("prism_kernels/**/*.py"), *ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"\bPRISM_KERNELS_[A-Z_]+\b", path.read_text())}
    rows = re.findall(r"^\| `(PRISM_KERNELS_[A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    assert used == set(rows)


def test_no_file_is_long():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("prism_kernels", "csrc", "bench", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long
