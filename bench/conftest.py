from bench import results
from bench.cases import cases
from bench.entry import BOOK, DEVICE


def pytest_terminal_summary(terminalreporter):
    """Prints what was measured and writes the results of each op that was measured whole."""
    BOOK.close()
    for op, rows in BOOK.rows.items():
        content = results.document(op, DEVICE, cases(op, DEVICE), rows)
        terminalreporter.write_line(results.table(content))
        path = results.RESULTS / content["machine"] / f"{op}.json"
        if len(rows) == BOOK.planned[op]:
            results.write(path, content)
            terminalreporter.write_line(f"wrote {path}")
        else:
            terminalreporter.write_line(f"{path} not written: {len(rows)} of {BOOK.planned[op]} rows were measured")
