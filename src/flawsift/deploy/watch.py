"""Images of a folder scored as they appear, each once, over any number of restarts."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from stat import S_IFMT, S_ISREG
from typing import Any, Literal, get_args

from flawsift.data.folders import EXTENSIONS
from flawsift.data.listing import KINDS
from flawsift.deploy.results import Key, ResultsFile, Row
from flawsift.errors import InputError, ParameterError, one_line, unknown_name
from flawsift.paths import show
from flawsift.runtime import Verdict

try:
    import watchfiles
except ImportError as error:
    raise InputError("Watching a folder needs one more package: pip install 'flawsift[watch]'.") from error

log = logging.getLogger("flawsift")

Sort = Literal["none", "move", "link"]
Score = Callable[[bytes], Verdict]
RESCAN = 5.0  # seconds between looks at the whole folder: of changes on network drives a system tells nothing
RESCAN_SHARE = 20  # times as long as a look took is waited for the next, so that a large folder costs 5 % of a core
RETRY = 5.0  # seconds before a full disk or a lost folder is tried again
Stamp = tuple[int, int]  # size, time of the last change in ns


@dataclass
class _Arriving:
    """A file that may still be being written."""

    stamp: Stamp
    since: float  # it has had this stamp, by the monotonic clock
    is_tried: bool = False


class FolderWatch:
    """Scores the images of a folder, a row of results for each.

    The file of results is the memory: an image is done once its row is on the disk, and only then it is put elsewhere.
    An image is known by its path, size and time of change: one that is written anew under its name is a new one.

    Attributes:
        counts: Rows of this run by their status.
    """

    def __init__(
        self,
        score: Score,
        folder: str | Path,
        results: str | Path,
        *,
        sort: Sort = "none",
        new_only: bool = False,
        settle: float = 0.5,
        timeout: float = 30.0,
        model: str = "",
    ) -> None:
        """Read what was done before.

        Args:
            score: Scores the content of a file, such as an `Inspector`.
            folder: With the folders below it, but for hidden ones and, where files are put there, ok and defect.
            results: File of results, .jsonl or .csv; see `Row`.
            sort: Where scored images go: "move" to ok/ and defect/ in the folder, "link" (hard links), or "none".
            new_only: Do not score what is there at the very first start, when there is no file of results yet.
            settle: Seconds for which a file must be unchanged before it is read.
            timeout: Seconds after its last change after which a file that cannot be read is listed as unreadable.
            model: What rows say of the model.

        Raises:
            InputError: The folder is not there, or the file holds no results.
            ParameterError: An unknown way to sort.
            OutputError: The file of results cannot be written.
        """
        if sort not in get_args(Sort):
            raise ParameterError(unknown_name("way to sort", sort, get_args(Sort)))
        self.folder, self.sort, self.model = Path(folder), sort, model
        self.settle, self.timeout = settle, timeout
        if not self.folder.is_dir():
            raise InputError(f"Image folder '{show(self.folder)}' is not there.")
        self.counts: dict[str, int] = {}
        self._score, self._results = score, ResultsFile(results)
        self._arriving: dict[str, _Arriving] = {}
        self._next_scan = 0.0
        self._told: dict[str, str] = {}
        self._targets: set[str] = set()
        there = self._files() if new_only else []
        known = self._results.open(Row(name, *stamp, "skipped") for name, stamp in there)
        self._done: dict[Key, str] = {row.key: row.to for row in known}  # and where it is still to be put
        self._targets = {row.to for row in known if row.to}

    @property
    def results(self) -> ResultsFile:
        """Where rows go."""
        return self._results

    def run(
        self, stop: threading.Event, *, once: bool = False, on_row: Callable[[Row], object] = lambda row: None
    ) -> None:
        """Score images until it is stopped.

        Args:
            stop: Ends it after the image at hand.
            once: End when all that is there has been scored.
            on_row: Called with each row after it is on the disk.

        Raises:
            InputError: The folder is gone, with `once`; else it is waited for.
        """
        changes = self._changes(stop)
        while not stop.is_set():
            for row in self.step(stop):
                on_row(row)
            if once and not self._arriving:
                if not self.folder.is_dir():
                    raise InputError(f"Image folder '{show(self.folder)}' is gone.")
                return
            for name in next(changes, ()):
                self._notice(name)

    def step(self, stop: threading.Event) -> Iterator[Row]:
        """Look once at what may have come, and score what is ready."""
        if time.monotonic() >= self._next_scan:
            self._scan()
        for name in list(self._arriving):
            if stop.is_set():
                return
            row = self._scored(name)
            if row is not None and self._recorded(row, stop):
                del self._arriving[name]
                self.counts[row.status] = self.counts.get(row.status, 0) + 1
                self._put(row.key)
                yield row

    def _changes(self, stop: threading.Event) -> Iterator[list[str]]:
        """Names of files that changed, as the system tells; none after a while, so that files settle."""
        pause = max(int(1000 * self.settle), 1)
        while not stop.is_set():
            try:
                identity = _identity(self.folder)
                for changed in watchfiles.watch(
                    self.folder,
                    watch_filter=None,
                    debounce=pause,
                    step=min(pause, 50),
                    stop_event=stop,
                    rust_timeout=pause,
                    yield_on_timeout=True,
                ):
                    yield [os.path.relpath(path, self.folder) for _, path in changed]
                    if _identity(self.folder) != identity:
                        break  # another folder of that name, of which the system would tell nothing
            except (OSError, RuntimeError):  # the folder is gone, or the system watches no more of them: see RESCAN
                stop.wait(self.settle)
                yield []

    def _files(self) -> list[tuple[str, Stamp]]:
        """All images, oldest first.

        Raises:
            OSError: The folder cannot be listed.
        """
        listed: list[tuple[str, Stamp]] = []

        def fail(error: OSError) -> None:
            if error.filename is None or Path(error.filename) == self.folder:
                raise error
            self._tell(error.filename, f"Folder '{show(error.filename)}' cannot be listed: {error.strerror}.")

        for place, children, names in os.walk(self.folder, onerror=fail):
            relative = Path(place).relative_to(self.folder)
            children[:] = [name for name in children if self._is_wanted(str(relative / name), is_folder=True)]
            for name in names:
                path = str(relative / name)
                stamp = self._stamp(path) if self._is_wanted(path) else None
                if stamp is not None:
                    listed.append((path, stamp))
        return sorted(listed, key=lambda one: (one[1][1], one[0]))

    def _is_wanted(self, name: str, *, is_folder: bool = False) -> bool:
        parts = Path(name).parts
        if any(part.startswith(".") for part in parts):
            return False
        if self.sort != "none" and parts[0] in ("ok", "defect") and (is_folder or len(parts) > 1):
            return False
        return is_folder or (Path(name).suffix.lower() in EXTENSIONS and name not in self._targets)

    def _stamp(self, name: str) -> Stamp | None:
        """None where it is no file, which is told, or gone."""
        try:
            status = os.stat(self.folder / name)
        except OSError:
            if os.path.islink(self.folder / name):
                self._tell(name, f"'{show(name)}' is left out: a link to a file that is not there.")
            return None
        if S_ISREG(status.st_mode):
            return status.st_size, status.st_mtime_ns
        self._tell(name, f"'{show(name)}' is left out: {KINDS.get(S_IFMT(status.st_mode), 'not a file')}.")
        return None

    def _scan(self) -> None:
        started = time.monotonic()
        try:
            listed = self._files()
        except OSError as error:
            self._tell(
                "", f"Folder '{show(self.folder)}' cannot be listed: {error.strerror}. It is tried until it can."
            )
            self._next_scan = time.monotonic() + RETRY
            return
        self._told.pop("", None)
        for name, stamp in listed:
            self._add(name, stamp)
        now = time.monotonic()
        self._next_scan = now + max(RESCAN, RESCAN_SHARE * (now - started))

    def _notice(self, name: str) -> None:
        if self._is_wanted(name) and (stamp := self._stamp(name)) is not None:
            self._add(name, stamp)

    def _add(self, name: str, stamp: Stamp) -> None:
        key = (name, *stamp)
        if key in self._done:
            self._put(key)
        elif name not in self._arriving:
            self._arriving[name] = _Arriving(stamp, time.monotonic())

    def _scored(self, name: str) -> Row | None:
        """The row of a file; None while it is waited for."""
        arriving, now, stamp = self._arriving[name], time.monotonic(), self._stamp(name)
        if stamp is None:
            if self.folder.is_dir():
                del self._arriving[name]
                log.warning("'%s' went before it was scored.", show(name))
            return None
        if (name, *stamp) in self._done:  # written anew, and what was there before came back
            del self._arriving[name]
            return None
        if stamp != arriving.stamp:
            self._arriving[name] = _Arriving(stamp, now)
            return None
        is_last = now - arriving.since >= self.timeout
        if now - arriving.since < self.settle or (arriving.is_tried and not is_last):
            return None
        arriving.is_tried = True
        told: dict[str, Any] = {"model": self.model, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            content = (self.folder / name).read_bytes()
            if self._stamp(name) != stamp:
                return None
            verdict = self._score(content)
        except Exception as error:  # noqa: BLE001  # no picture, of whatever kind, may end the watch
            reason = show(one_line(error))
            return Row(name, *stamp, "unreadable", reason=reason, **told) if is_last else None
        status = "defect" if verdict.anomalous else "ok"
        to = "" if self.sort == "none" else self._free(f"{status}/{name}")
        return Row(name, *stamp, status, verdict.score, verdict.p_value, verdict.threshold, to, **told)

    def _free(self, wanted: str) -> str:
        """A path in the folder that nothing has."""
        path, n = Path(wanted), 1
        while str(path) in self._targets or os.path.lexists(self.folder / path):
            n += 1
            path = Path(wanted).with_stem(f"{Path(wanted).stem}-{n}")
        return str(path)

    def _recorded(self, row: Row, stop: threading.Event) -> bool:
        """Whether the row is on the disk; it is tried until then, or until the end."""
        while True:
            try:
                self._results.append(row)
            except OSError as error:
                why = error.strerror or error
                line = f"'{show(self._results.path)}' cannot be written: {why}. Nothing is scored until it can."
                self._tell("results", line)
                if stop.wait(RETRY):
                    return False
                continue
            self._told.pop("results", None)
            self._done[row.key] = row.to
            if row.to:
                self._targets.add(row.to)
            return True

    def _put(self, key: Key) -> None:
        """Put an image that has its row where the row says, unless it is there."""
        source, to = self.folder / key[0], self._done[key]
        if not to:
            return
        target = self.folder / to
        if self._stamp(key[0]) != key[1:]:  # written anew since: another image, which comes up by itself
            self._done[key] = ""
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.sort == "move":
                if os.path.lexists(target):
                    raise FileExistsError(0, "there is another file of that name")
                source.replace(target)
            elif self.sort == "link" and not (target.exists() and target.samefile(source)):
                os.link(source, target)
        except OSError as error:
            self._tell(to, f"'{show(source)}' cannot be put into '{show(to)}': {error.strerror}. It is tried again.")
            return
        self._done[key] = ""

    def _tell(self, what: str, line: str) -> None:
        """Warn, unless the same was said of it."""
        if self._told.get(what) != line:
            self._told[what] = line
            log.warning("%s", line)


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
