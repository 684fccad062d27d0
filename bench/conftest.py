from bench import results
from bench.cases import cases
from bench.entry import BOOK, DEVICE
from bench.versus import RINGS, document, table


def pytest_terminal_summary(terminalreporter):
    """Prints the measured rows, and writes the results of each completely measured op."""
    BOOK.close()
    for op, rows in BOOK.rows.items():
        content = results.document(op, DEVICE, cases(op, DEVICE), rows)
        terminalreporter.write_line(results.table(content))
        _keep(terminalreporter, content, len(rows), BOOK.planned[op])
    for ring in RINGS.values():
        content = document(ring.duel, ring.rows)
        terminalreporter.write_line(table(content))
        _keep(terminalreporter, content, len(ring.rows), len(ring.duel.rivals))


def _keep(terminalreporter, content, measured, planned):
    path = results.RESULTS / content["machine"] / f"{content['op']}.json"
    if measured == planned:
        results.write(path, content)
        terminalreporter.write_line(f"wrote {path}")
    else:
        terminalreporter.write_line(f"{path} not written: {measured} of {planned} rows were measured")
