"""The lock of a run's folder: one process at a time writes to it."""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from prism.runtime.disk import RunFolderError, check_folder

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
NAME = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made if it does not exist; raises if another process holds it.

    The lock is the system's (flock): it ends with the process, also after a kill, and the file stays. Its text only
    tells others who holds the lock.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # not "w", which would empty the holder's text; a lock over NFS needs a file that is open for writing
    with (folder / NAME).open("a+", encoding="utf-8", errors="replace") as file:
        _take(file.fileno(), folder)
        file.truncate(0)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": began}) + "\n")
        file.flush()
        yield


def _take(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        LOG.warning("%s: this system has no flock, so nothing keeps a second run out of this folder", folder)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(
            f"run.folder: expected a folder that no other process writes to, {str(folder)!r} is in use by "
            f"{_holder(folder / NAME)}; wait for its end, stop it, or take another run.folder"
        ) from None
    except OSError as error:
        # some network file systems have no locks
        LOG.warning("%s: nothing keeps a second run out of this folder: %s", folder, error.strerror)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return f"process {holder['process']} on host {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # it has not yet written its name
        return "another process"
