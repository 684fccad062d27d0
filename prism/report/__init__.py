"""The report of a run, finished or not: one static HTML file that needs no network and no scripts."""

from pathlib import Path

from prism.report.page import page
from prism.report.run_folder import RunRecord, read_run
from prism.report.summary import summary

NAME = "report.html"


def write_report(folder: str | Path) -> Path:
    """Writes the report into a run's folder and returns its file.

    Args:
        folder: the folder of a run; the report says which parts the run has not reached.
    """
    return _write(read_run(folder))


def report(run: str) -> int:
    """Writes the report of a run's folder, prints a summary and the file's name, and returns the exit status."""
    record = read_run(run)
    path = _write(record)
    if text := summary(record.evaluations):
        print(f"{text}\n")
    print(f"the report: {path}")
    return 0


def _write(record: RunRecord) -> Path:
    path = record.folder / NAME
    # written under another name and renamed: a reader never sees half a file
    part = path.with_suffix(".html.part")
    # a file may spell half of a surrogate pair, which UTF-8 cannot express
    part.write_text(page(record), encoding="utf-8", errors="xmlcharrefreplace")
    return part.replace(path)
