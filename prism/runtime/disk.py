"""Writing a run's folder so that a kill, a full disk or a stray file never leaves half a file or an odd error."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# no more room: a full disk, a quota, the largest file that the system allows
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# prefix of what is not yet, or no longer, a file or folder of the run
ASIDE = ".aside-"
FOLDERS = ("checkpoints", "policy", "discriminator", "rollouts", "failed_rewards", "not_finite")
FILES = ("lock", "config.json", "environment.json", "changes.json", "metrics.jsonl", "evaluations.json", "report.html")


class RunFolderError(ValueError):
    """A run.folder that cannot be used."""


class NotSavedError(RuntimeError):
    """Something of a run could not be written."""


def write_whole(path: Path, text: str | Iterable[str]) -> Path:
    """Writes a file under another name and renames it, so that a reader or a kill never meets half of it.

    Args:
        path: the file.
        text: its content, whole or in parts; the file stays as it was if an error ends the parts.
    """
    # the process's number keeps two writers apart
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        return aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Raises if something that a run writes as a folder is a file, or the other way round."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"run.folder: expected a folder, {str(folder)!r} is a file; name another one")
    for names, wanted, usable in ((FOLDERS, "a folder", Path.is_dir), (FILES, "a file", Path.is_file)):
        for path in (folder / name for name in names):
            # a dangling link does not exist, and writing through it would
            if (path.exists() or path.is_symlink()) and not usable(path):
                raise RunFolderError(f"{path}: expected {wanted} or nothing, got something else; move it away")


@contextmanager
def system_errors(folder: Path) -> Iterator[None]:
    """Says which file of a run's folder, or which full disk, an error of the system is about."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            full = error.filename or folder
            raise NotSavedError(f"{full}: {error.strerror}; make room, and rerun the same command to resume") from error
        name = error.filename
        # anything else is a defect, which needs its traceback
        if not isinstance(name, (str, Path)) or not _inside(Path(name), folder):
            raise
        raise RunFolderError(f"{name}: expected to read and write it, got: {error.strerror}") from error


def _inside(path: Path, folder: Path) -> bool:
    path, folder = path.absolute(), folder.absolute()
    # a folder that cannot be made is named by its first part that cannot be
    return path.is_relative_to(folder) or folder.is_relative_to(path)
