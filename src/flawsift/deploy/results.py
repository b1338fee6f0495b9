"""The file of results of a watched folder: a line an image, appended for good before anything else is done with it."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flawsift import tables
from flawsift.damage import DAMAGE, json_object
from flawsift.errors import InputError, OutputError
from flawsift.files import write_bytes

STATUSES = ("ok", "defect", "unreadable", "skipped")
Key = tuple[str, int, int]  # path in the folder, size, time of the last change in ns


@dataclass(frozen=True)
class Row:
    """What became of one image.

    Attributes:
        file: Path in the watched folder.
        size: In bytes.
        mtime_ns: When it was last changed. These three tell an image from another one under its name.
        status: ok, defect, unreadable or skipped.
        score: Higher is more anomalous.
        p_value: The false-alarm rate at which it would just be flagged.
        threshold: Scores above it are anomalous.
        to: Where it is put in the folder, or "".
        reason: Why it has no score, or "".
        model: Begin of the SHA-256 of the file of the model.
        time: When it was scored, UTC.
    """

    file: str
    size: int
    mtime_ns: int
    status: str
    score: float | None = None
    p_value: float | None = None
    threshold: float | None = None
    to: str = ""
    reason: str = ""
    model: str = ""
    time: str = ""

    @property
    def key(self) -> Key:
        """What tells it from other images."""
        return self.file, self.size, self.mtime_ns


COLUMNS = [field.name for field in fields(Row)]
BEGINS = b'{"file": "'  # a row as a JSON line, by which one that was cut off is known


class ResultsFile:
    """Rows in a file, as JSON lines, or as CSV where its name ends in .csv.

    A line is there whole or not at all: what a kill or a full disk left of one is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_csv = self.path.suffix.lower() == ".csv"
        self._size: int | None = None  # up to here it is on the disk: what is beyond may be taken back

    def open(self, skipped: Iterator[Row]) -> list[Row]:
        """All rows. Where the file is not there yet it is made, with the skipped images in it.

        Args:
            skipped: Images that are not to be scored.

        Raises:
            InputError: It holds something else.
            OutputError: It cannot be made.
        """
        if not self.path.exists():
            head = self._head() + "".join(self.line(row) for row in skipped)
            write_bytes(self.path, head.encode())
        rows = [row for row, _ in self.rows()]  # first: nothing is cut off from a file of somebody else
        self._cut_incomplete_line()
        self._size = self.path.stat().st_size
        return rows

    def append(self, row: Row) -> None:
        """Add a row, and wait until it is on the disk.

        Raises:
            OSError: It cannot be written; the file is as it was.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            text = self.line(row) if size else self._head() + self.line(row)  # somebody took the file away
            left = text.encode()
            self._size = size
            try:
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
                self._size = size + len(text.encode())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)

    def rows(self, start: int = 0) -> Iterator[tuple[Row, int]]:
        """The rows from a place in the file on, each with the place where it ends; incomplete lines are left out.

        Raises:
            InputError: A line is no row.
            OSError: It cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(start)
            end = start
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                if self._size is not None and end > self._size:
                    return
                if self.is_csv and line == self._head().encode():
                    continue
                try:
                    yield self._row(line.decode()), end
                except DAMAGE as error:
                    raise self._foreign(end) from error

    def line(self, row: Row) -> str:
        """A row as it is written, with its line end."""
        values = asdict(row)
        if not self.is_csv:
            return json.dumps(values, allow_nan=False) + "\n"
        text = io.StringIO()
        cells = [tables.escaped(one_line_of(value)) if isinstance(value, str) else value for value in values.values()]
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def _head(self) -> str:
        return ",".join(COLUMNS) + "\n" if self.is_csv else ""

    def _row(self, line: str) -> Row:
        if not self.is_csv:
            return _checked(json_object(line))
        (cells,) = csv.reader([line], strict=True)
        given: dict[str, Any] = dict(zip(COLUMNS, map(_text_of, cells), strict=True))
        numbers = {name: float(given[name]) if given[name] else None for name in ("score", "p_value", "threshold")}
        return _checked({**given, **numbers, "size": int(given["size"]), "mtime_ns": int(given["mtime_ns"])})

    def _cut_incomplete_line(self) -> None:
        with open(self.path, "rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if not (cut := content[end:]):
                return
            begins = self._head().encode() or BEGINS
            known = self.is_csv and end > 0  # the lines before it are rows
            if not known and not cut.startswith(begins) and not begins.startswith(cut):
                raise self._foreign(len(content))
            file.truncate(end)

    def _foreign(self, end: int) -> InputError:
        return InputError(
            f"'{self.path}' is no file of results, by the line that ends at byte {end}. Name another one with --out."
        )


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Refuse a second program that would write the same file of results; drives without locks let it in.

    Raises:
        OutputError: There is another one, or the folder is not there.
    """
    from filelock import FileLock, Timeout  # slow to import

    lock = FileLock(path.with_name(f".{path.name}.watch.lock"), timeout=0, fallback_to_soft=False)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"Cannot write '{path}': there is no such folder.")
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"Another program writes '{path}' at present. Name another file with --out.") from error
    except (NotImplementedError, OSError):
        pass
    try:
        yield
    finally:
        lock.release()


def _checked(values: Mapping[str, Any]) -> Row:
    """A row, of values of its types; one of another type would be the row of no image, or of none that is there."""
    row = Row(**values)
    wholes, numbers = (row.size, row.mtime_ns), (row.score, row.p_value, row.threshold)
    texts = (row.file, row.status, row.to, row.reason, row.model, row.time)
    if not all(isinstance(text, str) for text in texts) or not all(type(whole) is int for whole in wholes):
        raise TypeError("a value of another type")
    if not all(number is None or (type(number) in (int, float) and math.isfinite(number)) for number in numbers):
        raise ValueError("a number that is none")
    if row.status not in STATUSES:
        raise ValueError(f"'{row.status}' is no status")
    if any(Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path for path in (row.file, row.to)):
        raise ValueError("a path that leads out of the folder")
    return row


def one_line_of(text: str) -> str:
    """A cell on one line, in UTF-8 whatever the name of a file holds."""
    return text if text.isprintable() and "\\" not in text else json.dumps(text)[1:-1]


def _text_of(cell: str) -> str:
    text = tables.plain(cell)
    return str(json.loads(f'"{text}"')) if "\\" in text else text
