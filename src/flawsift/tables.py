"""CSV tables that a spreadsheet opens without running what a file name says, and that are read as they were written."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flawsift.files import write_text

# What a spreadsheet takes for the beginning of a formula (OWASP, "CSV Injection"); an apostrophe before it says text.
# Apostrophes that stand there already get one more, so that every text is read as it was.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|-?(inf|nan)")
# Python's writer quotes only its own line end: with "\n" alone, a carriage return in a cell would end the row
_CRLF = "\r\n"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table in one step; None becomes an empty cell, and texts that begin a formula an apostrophe before.

    Raises:
        OutputError: It cannot be written.
    """
    lines = _Lines()
    writer = csv.writer(lines, lineterminator=_CRLF)
    writer.writerow(header)
    writer.writerows([escaped(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    write_text(path, "".join(f"{line.removesuffix(_CRLF)}\n" for line in lines))


def cells_of(content: bytes) -> list[list[str]]:
    """The cells of a CSV table in UTF-8, its header first, as they were before `write_csv`; empty lines are left out.

    Raises:
        ValueError, csv.Error: It is none.
    """
    # decoded by hand: a text file's line ends are unified, and a name may hold a carriage return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(str(error)) from None  # its own form repeats all of the content
    if "\0" in text:
        raise ValueError("it holds NUL bytes")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)  # a quotation mark that nothing closes is told
    return [[plain(cell) for cell in row] for row in rows if row]


def escaped(cell: str) -> str:
    """A text as it is written into a cell; `plain` takes it back.

    >>> escaped("=1+2.png"), escaped("'-a"), escaped("-1.5"), escaped("it's.png")
    ("'=1+2.png", "''-a", '-1.5', "it's.png")
    """
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def plain(cell: str) -> str:
    """A text as it was before `escaped`."""
    return cell[1:] if _ESCAPED.match(cell) else cell


class _Lines(list[str]):
    """What a CSV writer writes, line by line."""

    write = list.append
