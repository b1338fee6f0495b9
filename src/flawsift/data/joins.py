"""Tables that people write about images (groups, labels, decisions), and which image each of their rows is about."""

import csv
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from flawsift.data.listing import read_regular
from flawsift.errors import InputError
from flawsift.paths import name_some, show
from flawsift.tables import cells_of

log = logging.getLogger("flawsift")


def read_table(path: Path, what: str, columns: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8; a cell that is missing at the end of a row is an empty text.

    Cells are as they were before `flawsift.tables.write_csv`, which writes an apostrophe before what begins a formula.

    Args:
        path: The file.
        what: How errors call it.
        columns: That it needs; each may be called by several names.

    Raises:
        InputError: The file is missing, empty, no such table, lacks a column, or has a row with too many cells.
    """
    where = f"{what} '{show(path)}'"
    try:
        rows = cells_of(read_regular(path))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}.") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{where} is not a CSV table in UTF-8: {error}. Save it as 'CSV UTF-8'.") from error
    if not rows:
        raise InputError(f"{where} is empty: it has not even a line with the names of its columns. Was it cut off?")
    header = [name.strip() for name in rows[0]]
    if lacking := [names[0] for names in columns if not set(names).intersection(header)]:
        needs = " and ".join(f"'{names[0]}'" for names in columns)
        raise InputError(
            f"{where} needs the columns {needs}, has {name_some(filter(None, header)) or 'none'}: no '{lacking[0]}'. "
            "Cells are parted by commas."
        )
    if long := [line for line, row in enumerate(rows[1:], 2) if len(row) > len(header)]:
        raise InputError(
            f"{where}, row {long[0]}, has more cells than the {len(header)} columns, as {len(long)} in all have. "
            'Put a name that holds a comma between quotation marks: "a,b.png".'
        )
    return [dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=True)) for row in rows[1:]]


def images_named(wanted: Iterable[str], names: Iterable[str], what: str, *, quiet: bool = False) -> dict[str, str]:
    """{name in a table: name of the image that it is about}; how many are about none is logged.

    A name is that of an image, as `show` prints it, or, where that is of no image and of one only in this way: with
    backslashes for slashes, in another Unicode form, or without its first folders.

    Args:
        wanted: Names in the table.
        names: Of the images.
        what: What errors and the log call the rows: "groups".
        quiet: Log nothing, since the caller refuses names of no image.

    Raises:
        InputError: There are names, and none is of an image; or two names are of one image.
    """
    rows, listed = list(dict.fromkeys(wanted)), list(names)
    found = find_images(rows, listed, what)
    missing = [row for row in rows if row not in found]
    if missing and not found:
        raise InputError(
            f"The {what} name none of the {len(listed)} images: one of them is {name_some(missing[:1])}, an image is "
            f"{name_some(listed[:1])}. Write paths relative to the folder of the images, or give that folder."
        )
    if missing and not quiet:
        some = name_some(missing)
        log.warning("%d of %d %s are about no image here: %s. They are left out.", len(missing), len(rows), what, some)
    return found


def find_images(rows: Iterable[str], names: Iterable[str], what: str) -> dict[str, str]:
    """`images_named`, where names of no image are not in the result, and nothing else.

    Raises:
        InputError: Two names are of one image.
    """
    shown = {show(name): name for name in names}
    endings: dict[str, list[str]] = {}
    for name in shown.values():
        parts = _plain(name).split("/")
        for start in range(len(parts)):
            endings.setdefault("/".join(parts[start:]), []).append(name)
    found = {}
    for row in rows:
        if show(row) in shown:
            found[row] = shown[show(row)]
        elif len(same := endings.get(_plain(row), [])) == 1:
            found[row] = same[0]
    if twice := [name for name, n in Counter(found.values()).items() if n > 1]:
        raise InputError(f"{len(twice)} images are named twice by the {what}, in two ways: {name_some(twice)}.")
    return found


def joined(values: Mapping[str, str], names: Sequence[str], what: str) -> dict[str, str]:
    """{name of an image: value} from {name in a table: value}; see `images_named`."""
    return {name: values[row] for row, name in images_named(values, names, what).items()}


def _plain(name: str) -> str:
    """A name without what systems write in different ways."""
    slashes = unicodedata.normalize("NFC", show(name)).replace("\\", "/")
    return str(PurePosixPath(slashes)) if slashes else slashes
