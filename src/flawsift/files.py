"""Files that are whole or absent, results whose files are all new or all old, and early checks of output folders."""

import contextlib
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawsift.damage import DAMAGE, json_object
from flawsift.errors import OutputError
from flawsift.occupied import refuse_other_results
from flawsift.paths import show

log = logging.getLogger("flawsift")

SPARE_BYTES = 16 * 2**20  # an output folder needs at least this much free space for tables and a report
TEMPORARY = ".flawsift-"  # begins the names of what is not complete; hidden files are no results and no images
PENDING = f"{TEMPORARY}pending"  # a result that is complete, and whose files are still to take their places
NEW, PLAN = "new", "plan.json"  # in it: these files, and what is to go
MANIFEST = "manifest.json"  # of a result of several files: their SHA-256
STALE_SECONDS = 24 * 3600  # what is older and not complete is a dead run's: writing takes seconds
# what systems answer where a file or folder cannot be flushed
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# what systems answer for a lock on a drive that knows none
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
REASONS = {
    errno.ENOSPC: "the disk is full. Free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up. Free some space or choose another folder",
    errno.EACCES: "permission denied. Choose a folder that you may write",
    errno.EROFS: "the file system is read-only. Choose a folder that you may write",
    errno.ENOTDIR: "a part of the path is a file. Choose another folder",
    errno.EEXIST: "it is a file, not a folder. Choose another folder",
}


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
        sweep(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _output_error(folder, error) from error
    if free < need_bytes:
        raise OutputError(
            f"The disk of '{folder}' has {free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} MiB are needed. "
            "Free some space or choose another folder."
        )
    return folder


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file in one step: readers see the old content or all of the new one.

    Args:
        durable: Wait until it is on the disk, for a power cut may leave it empty else; 10 to 40 ms a file.

    Raises:
        OutputError: It cannot be written; nothing half-written is left.
    """
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(data)
        if durable:
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
        OutputError: It cannot be written, or is a file; nothing half-written is left.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            raise FileExistsError(errno.EEXIST, "it is a file")
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
        for path in (Path(place) / name for name in names):
            None if path.is_symlink() else sync(path)  # what a link points to is somebody else's
        sync(Path(place))


@contextlib.contextmanager
def new_result(
    folder: Path, *, old: Sequence[str] = (), aside: Mapping[str, str] | None = None, adds: bool = False
) -> Iterator[Path]:
    """A result of several files: all of them are new when the block ends well, and none of them before.

    They are written into an empty temporary folder with a manifest of their SHA-256, reach the disk, and get ready by
    one rename. Only then they take their places; where that is interrupted, whoever next reads or writes a result in
    the folder goes on with it (`settle`).

    Args:
        folder: Of the result; what else is in it stays.
        old: Patterns of files that belong to a result of this kind, relative to it: those of an earlier one go.
        aside: {relative path: what is told of it} of what would be taken for a part of the new result, and may hold
            work of a person: moved into a new folder `earlier-N` beside it. What is not there is left out.
        adds: The new files replace some of an earlier result, and the others still belong to it.

    Raises:
        OutputError: It cannot be written, or holds another kind of result; that, or the earlier result, is whole.
    """
    refuse_other_results(None if adds else folder, old)
    folder = ensure_folder(folder)
    temporary = temporary_beside(folder / PENDING)
    new = temporary / NEW
    try:
        new.mkdir(parents=True)
        yield new
        with alone(folder / MANIFEST):
            _settle(folder)
            for place in {path.parent for path in _files_below(new)}:
                _write_manifest(place, folder / place.relative_to(new), adds=adds)
            gone = {path.relative_to(folder) for pattern in old for path in folder.glob(pattern)}
            gone -= {path.relative_to(new) for path in _files_below(new)}
            moves = _moves(folder, aside or {})
            write_json(temporary / PLAN, {"gone": sorted(map(str, gone)), "aside": moves})
            sync_tree(temporary)
            temporary.replace(folder / PENDING)
            sync(folder)
            _settle(folder)
    except OSError as error:
        raise _output_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(folder: Path) -> None:
    """Finish what `new_result` had ready in a folder, or in the one around it, when it was interrupted.

    Raises:
        OutputError: The folder cannot be written.
    """
    for place in (folder.absolute().parent, folder):
        if (place / PENDING).is_dir():
            with alone(place / MANIFEST):
                try:
                    _settle(place)
                except OSError as error:
                    raise _output_error(place, error) from error


def _settle(folder: Path) -> None:
    """Everything here may have happened before, up to any line."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    gone, aside = _plan(pending)
    for source, moved in aside.items():
        if os.path.lexists(folder / source) and not os.path.lexists(folder / moved):
            (folder / moved).parent.mkdir(exist_ok=True)
            (folder / source).replace(folder / moved)
    changed = {folder}
    for path in _files_below(pending / NEW):
        target = folder / path.relative_to(pending / NEW)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        changed.add(target.parent)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    for place in changed:
        sync(place)
    pending.replace(done := temporary_beside(pending))
    shutil.rmtree(done, ignore_errors=True)


def _plan(pending: Path) -> tuple[list[str], dict[str, str]]:
    """Which files are to go, and where others are moved; nobody's plan reaches out of its folder."""
    try:
        plan = json_object((pending / PLAN).read_bytes())
        gone, aside = list(plan["gone"]), dict(plan["aside"])
        for name in (*gone, *aside, *aside.values()):
            if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
                raise ValueError(f"'{name}' leads out of the folder")
    except DAMAGE as error:
        raise OutputError(
            f"'{show(pending)}', which an interrupted run left, cannot be finished: its {PLAN} is damaged: {error}. "
            "Move that folder away."
        ) from error
    return gone, aside


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_manifest(new: Path, folder: Path, *, adds: bool) -> None:
    files = {path.name: content_digest(path.read_bytes()) for path in sorted(new.iterdir()) if path.is_file()}
    if adds and not (folder / MANIFEST).exists():
        return  # the others are of an earlier version
    known = Parts.of(folder).digests if adds else None
    write_json(new / MANIFEST, {"files": {**(known or {}), **files}})


def _moves(folder: Path, aside: Mapping[str, str]) -> dict[str, str]:
    """{relative path: where it is moved}, which is logged with what is told of it."""
    moves = {}
    for name, why in aside.items():
        path = folder / name
        if os.path.lexists(path):
            target = earlier_in(path.parent)
            log.warning("'%s' %s. It is now in '%s'.", show(path), why, show(target))
            moves[name] = str((target / path.name).relative_to(folder))
    return moves


def earlier_in(folder: Path) -> Path:
    """Where what stood in a folder is moved: the first `earlier-N` that is not there yet."""
    return next(path for n in itertools.count(1) if not os.path.lexists(path := folder / f"earlier-{n}"))


class DamagedPart(ValueError):
    """A file is not what was written with the others of its result."""


@dataclass(frozen=True)
class Parts:
    """The files of a result as `new_result` wrote them.

    Attributes:
        folder: Where they are.
        digests: {name: SHA-256}; None of a result of an earlier version, which has no manifest.
    """

    folder: Path
    digests: Mapping[str, str] | None

    @classmethod
    def of(cls, folder: Path) -> "Parts":
        """Those of the result in a folder, which is finished first where a run was killed.

        Raises:
            DamagedPart: The manifest cannot be read.
            OutputError: An interrupted run is to be finished, and the folder cannot be written.
        """
        settle(folder)
        try:
            files = json_object((folder / MANIFEST).read_bytes())["files"]
            return cls(folder, {str(name): str(digest) for name, digest in files.items()})
        except FileNotFoundError:
            return cls(folder, None)
        except DAMAGE as error:
            raise DamagedPart(f"{MANIFEST} cannot be read: {error!r}") from error

    def __contains__(self, name: object) -> bool:
        return name in (self.digests or {}) or (self.folder / str(name)).exists()  # one that is not listed is damage

    def is_unchanged(self, name: str) -> bool:
        """Whether a file is what was written; True where that is not known."""
        return self.digests is None or content_digest((self.folder / name).read_bytes()) == self.digests.get(name)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DamagedPart: It is not what was written with the other files, or not there any more.
            OSError: It cannot be read.
        """
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            if self.digests is None or name not in self.digests:
                raise
            raise DamagedPart(f"{name} is missing") from error
        if self.digests is not None and content_digest(data) != self.digests.get(name):
            was_replaced = Parts.of(self.folder) != self
            why = "replaced while it was read; try again" if was_replaced else "not what was written with the others"
            raise DamagedPart(f"{name} is {why}")
        return data


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
    reason = REASONS.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"Cannot write '{path}': {reason}.")
