"""The content of data files, by which a resumed run knows that they are the ones that it began with."""

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism.data.files import DataError, open_regular

# larger files are read by a thread, smaller ones at once
_AT_ONCE = 64 * 2**20


class FilePrint:
    """A file's size, time and inode when its reading began, and the SHA-256 of all its bytes.

    A large file is read once more by a thread, beside the training. A later run compares size, time and inode, and
    reads the file only if they differ.

    Args:
        path: the file.
        before: the `state` of an earlier run, which the file must still match; None: there was none.
    """

    def __init__(self, path: Path, before: Mapping[str, Any] | None = None) -> None:
        self.path, self.stat = path, _stat(path)
        self._sum: str | None = None
        if before is not None and before["stat"] == self.stat:
            self._sum = before["sha256"]
        elif before is not None:
            self._compare(before["sha256"])
        if self._sum is None:
            self._start()

    def state(self) -> dict[str, Any]:
        """Returns the print for a checkpoint, as JSON can write it; the sum is None while it is being computed."""
        return {"file": str(self.path), "stat": self.stat, "sha256": self._sum}

    def _compare(self, wanted: str | None) -> None:
        if wanted is None:
            raise DataError(
                f"{self.path}: expected the file that the run was reading, got one that was written since; the run "
                "was stopped before its checksum was known"
            )
        self._read()
        if self._sum != wanted:
            raise DataError(
                f"{self.path}: expected the content that the run was reading, of SHA-256 {wanted[:16]}…, got "
                f"{(self._sum or 'a file that is being written')[:16]}…"
            )

    def _start(self) -> None:
        if self.stat[0] <= _AT_ONCE:
            self._read()
        else:
            threading.Thread(target=self._read, daemon=True, name="checksum").start()

    def _read(self) -> None:
        try:
            with open_regular(self.path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            # a sum of half the old and half the new bytes would fit neither
            if _stat(self.path) == self.stat:
                self._sum = found
        except OSError:
            # the stream that reads the file for training says so
            return


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
