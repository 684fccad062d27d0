"""The lock of a run's folder: one process at a time writes to it."""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

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

    The lock is the system's (flock), so it ends with the process, also after a kill. The file's text only tells others
    who holds it.
    """
    check_folder(folder)
    is_new = not folder.exists()
    with _taken(folder) as file:
        file.truncate(0)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": began}) + "\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                # while it is held: `_taken` makes a new one where another process has opened this one
                (folder / NAME).unlink()
                if is_new:
                    # a run that was refused leaves nothing
                    folder.rmdir()


def _taken(folder: Path) -> TextIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # not "w", which would empty the holder's text; a lock over NFS needs a file that is open for writing
            file = (folder / NAME).open("a+", encoding="utf-8", errors="replace")
        except FileNotFoundError:
            # another process has just removed the folder
            continue
        try:
            _take(file.fileno(), folder)
            if os.path.samestat(os.fstat(file.fileno()), (folder / NAME).stat()):
                return file
        except FileNotFoundError:
            # removed by its holder: the lock is on a file that nobody will find
            pass
        except BaseException:
            file.close()
            raise
        file.close()


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
