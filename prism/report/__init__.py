"""The report of a run, finished or not: one static HTML file that needs no network and no scripts."""

from pathlib import Path

from prism.report.page import page
from prism.report.run_folder import RunRecord, read_run
from prism.report.summary import summary
from prism.runtime.disk import system_errors, write_whole

NAME = "report.html"


def write_report(folder: str | Path) -> Path:
    """Writes the report into a run's folder and returns its file.

    Args:
        folder: the folder of a run; the report says which parts the run has not reached.
    """
    return _write(read_run(folder))


def report(run: str) -> int:
    """Writes the report of a run's folder, prints a summary and the file's name, and returns the exit status."""
    with system_errors(Path(run)):
        record = read_run(run)
        path = _write(record)
    if text := summary(record.evaluations):
        print(f"{text}\n")
    print(f"the report: {path}")
    return 0


def _write(record: RunRecord) -> Path:
    # a file may spell half of a surrogate pair, which UTF-8 cannot express
    text = page(record).encode("utf-8", "xmlcharrefreplace").decode()
    return write_whole(record.folder / NAME, text)
