"""The report: one static HTML file of a run, finished or not, that opens without network and without scripts."""

from pathlib import Path

from prism.report.page import page
from prism.report.run_folder import RunRecord, read_run
from prism.report.summary import summary

NAME = "report.html"


def write_report(folder: str | Path) -> Path:
    """Returns the file that it wrote into a run's folder.

    Args:
        folder: of a run; what the run has not reached is left out, and the report says so.
    """
    return _write(read_run(folder))


def report(run: str) -> int:
    """Writes the report of a run's folder, tells what each stage did, names the file; returns the exit status."""
    record = read_run(run)
    path = _write(record)
    if told := summary(record.evaluations):
        print(f"{told}\n")
    print(f"the report: {path}")
    return 0


def _write(record: RunRecord) -> Path:
    path = record.folder / NAME
    # aside and renamed: a reader never sees half a file
    aside = path.with_suffix(".html.part")
    aside.write_text(page(record), encoding="utf-8")
    return aside.replace(path)
