"""Peak memory of reading files of ten thousand to a million rows: it must not grow with the file.

Run: python -m bench.loader_memory
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".jsonl", ".parquet")
# suffix, rows, whether each has an image of 32 x 32 pixels
CASES = [
    *((suffix, rows, False) for suffix in SUFFIXES for rows in (10_000, 1_000_000)),
    *((suffix, rows, True) for suffix in SUFFIXES for rows in (10_000, 100_000)),
]
GROUP = 10_000


def png(side: int = 32) -> bytes:
    """Returns an image of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def chats(count: int, image: Any) -> Iterator[dict[str, Any]]:
    """Yields chats that differ; image None makes them text only."""
    place = "" if image is None else "<image>"
    for number in range(count):
        question = f"{place}How many stars are there in picture {number}?"
        answer = f"<caption>\n- star {number}\n</caption>\n<think>\n1. I see it.\n</think>\n<answer>{number}</answer>"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"id": f"row-{number}", "messages": messages, "images": [] if image is None else [image]}


def write(path: Path, count: int, images: bool) -> None:
    """Writes a data file: images beside JSONL, or inside parquet."""
    if path.suffix == ".jsonl":
        if images:
            (path.parent / "image.png").write_bytes(png())
        with path.open("w") as file:
            for row in chats(count, "image.png" if images else None):
                file.write(json.dumps(row) + "\n")
        return
    import pyarrow as arrow
    from pyarrow import parquet

    rows = chats(count, {"bytes": png()} if images else None)
    writer = None
    while group := list(islice(rows, GROUP)):
        table = arrow.Table.from_pylist(group, schema=writer.schema if writer else None)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def status(name: str) -> int:
    """Returns a figure of this process's memory in bytes, such as VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def read(path: Path) -> None:
    """Reads a file in this process, and prints the figures as JSON."""
    from prism.data.loader import LoadOptions, RowStream

    stream = RowStream(path, "chat", LoadOptions(on_error="raise"))
    before, start = status("VmRSS"), time.perf_counter()
    count = sum(1 for _ in stream)
    seconds = time.perf_counter() - start
    print(json.dumps({"rows": count, "before": before, "peak": status("VmHWM"), "seconds": round(seconds, 2)}))


def measure(folder: Path, suffix: str, count: int, images: bool) -> dict[str, Any]:
    """Returns the figures of a process that reads a new file of `count` rows."""
    path = folder / f"rows{suffix}"
    write(path, count, images)
    command = [sys.executable, "-m", "bench.loader_memory", "--read", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    figures = {"format": suffix[1:], "file_bytes": path.stat().st_size, **json.loads(process.stdout)}
    path.unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read is not None:
        read(given.read)
        return
    from bench.results import RESULTS, header, machine
    from bench.results import write as write_results

    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, count, images in CASES:
            measured.append({"images": images, **measure(Path(folder), suffix, count, images)})
            print(measured[-1], flush=True)
    content = {**header("loader_memory", "cpu"), "measured": measured}
    write_results(RESULTS / machine("cpu") / "loader_memory.json", content)


if __name__ == "__main__":
    main()
