"""Files that are either whole or absent: atomic writes and early checks of output folders."""

import contextlib
import csv
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flawsift.errors import OutputError
from flawsift.paths import show

log = logging.getLogger("flawsift")

SPARE_BYTES = 16 * 2**20  # an output folder needs at least this much free space for tables and a report
TEMPORARY = ".flawsift-"  # begins the names of what is not complete; hidden files are no results and no images
STALE_SECONDS = 24 * 3600  # what is older and not complete is a dead run's: writing takes seconds
# what systems answer where a file or folder cannot be flushed
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# what systems answer for a lock on a drive that knows none
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


def ensure_folder(path: str | Path, *, need_bytes: int = SPARE_BYTES) -> Path:
    """Make a folder and prove that it can be written, before any work is done.

    Raises:
        OutputError: It is a file, cannot be written, or its disk has less than `need_bytes` free.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"flawsift")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _output_error(folder, error) from error
    if free < need_bytes:
        raise OutputError(
            f"The disk of '{folder}' has {free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} MiB are needed. "
            "Free some space or choose another folder."
        )
    return folder


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or all of the new one.

    Raises:
        OutputError: It cannot be written; nothing half-written is left.
    """
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _output_error(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step; file names that are not UTF-8 appear as backslash escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one step. Not-a-number is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table in one step; None becomes an empty cell."""
    lines = _Lines()
    writer = csv.writer(lines, lineterminator=_CRLF)
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, "".join(f"{line.removesuffix(_CRLF)}\n" for line in lines))


# Python's writer quotes only its own line end: with "\n" alone, a carriage return in a cell would end the row
_CRLF = "\r\n"


class _Lines(list[str]):
    """What a CSV writer writes, line by line."""

    write = list.append


def content_digest(data: bytes) -> str:
    """SHA-256 of a file's content, hex."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def new_folder(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends well, with all that is in it on the disk.

    Args:
        path: Its name.
        keep: Where there is one by then, it stays, and the new one is dropped; else it is replaced.

    Raises:
        OutputError: It cannot be written; nothing half-written is left.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        if not keep and path.exists():
            path.replace(retired := temporary_beside(path))
            temporary.replace(path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            _rename_unless_there(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_unless_there(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError:
        if not path.is_dir():
            raise


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process takes, on this machine or another that shares the disk."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}.tmp")


def sweep(folder: Path, pattern: str = f"{TEMPORARY}*.tmp") -> None:
    """Remove what killed runs left half-written in a folder more than a day ago."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some drives cannot say so of folders."""
    flags = os.O_RDONLY if os.name == "posix" else os.O_RDWR  # Windows flushes only what may be written
    try:
        handle = os.open(path, flags)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder with all that is in it is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def move_aside(paths: Iterable[Path], folder: Path, why: str) -> Path | None:
    """Move what would be taken for a part of a new result into a new folder `earlier-N`, and log where it is.

    Args:
        paths: Files and folders; those that are not there are left out.
        folder: Where the new folder is made, on the same disk.
        why: What the log says of them: "belongs to an earlier model".

    Returns:
        The new folder, or None where there was nothing to move.

    Raises:
        OutputError: Something cannot be moved.
    """
    there = [path for path in paths if os.path.lexists(path)]
    if not there:
        return None
    try:
        number = next(n for n in itertools.count(1) if not os.path.lexists(folder / f"earlier-{n}"))
        aside = folder / f"earlier-{number}"
        aside.mkdir()
        for path in there:
            path.replace(aside / path.name)
            log.warning("'%s' %s. It is now in '%s'.", show(path), why, show(aside))
    except OSError as error:
        raise _output_error(folder, error) from error
    return aside


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other programs that write a file in this way waiting until the block ends.

    The lock is on a hidden file beside it, which stays. Some network drives know no locks: there, nobody waits.

    Raises:
        OutputError: The folder is gone, full, or cannot be written.
    """
    from filelock import FileLock  # takes as long to import as all of flawsift's commands for their help

    # the file of a soft lock, the library's own way out, outlives a program that was killed and keeps all others out
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        path.parent.stat()  # the library would make a folder that is gone
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _output_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _output_error(path: Path, error: OSError) -> OutputError:
    reasons = {
        errno.ENOSPC: "the disk is full. Free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up. Free some space or choose another folder",
        errno.EACCES: "permission denied. Choose a folder that you may write",
        errno.EROFS: "the file system is read-only. Choose a folder that you may write",
        errno.ENOTDIR: "a part of the path is a file. Choose another folder",
        errno.EEXIST: "it is a file, not a folder. Choose another folder",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"Cannot write '{path}': {reason}.")
