"""What lies in an image folder, and which of its images belong together."""

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from flawsift.errors import InputError, one_line
from flawsift.paths import name_some, show

log = logging.getLogger("flawsift")

# What a folder scan takes for an image. Content decides how a file is decoded; the ending only whether it is looked at.
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def scan_folder(root: Path) -> list[str]:
    """Relative paths of all image files below `root`, sorted, each real folder visited once.

    A folder that is called like an image and has none in it is listed: it is one that cannot be read.

    Raises:
        InputError: `root` is missing or not a folder, or a folder below it cannot be listed.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"Image folder '{show(root)}' {what}.")
    seen: set[tuple[int, int]] = set()
    names: list[str] = []
    like_images: list[str] = []

    def fail(error: OSError) -> None:
        raise InputError(f"Folder '{show(Path(str(error.filename)))}' cannot be listed: {error.strerror}.") from error

    for folder, children, files in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children[:] = sorted(c for c in children if not c.startswith("."))
        relative = Path(folder).relative_to(root)
        like_images += [(relative / c).as_posix() for c in children if Path(c).suffix.lower() in EXTENSIONS]
        names += [
            (relative / f).as_posix() for f in files if Path(f).suffix.lower() in EXTENSIONS and not f.startswith(".")
        ]
    names += [name for name in like_images if not any(other.startswith(f"{name}/") for other in names)]
    return sorted(names)


def read_groups(path: str | Path) -> dict[str, str]:
    """{relative image path: group} from a CSV file with the columns `file` (or `path`) and `group`.

    Raises:
        InputError: The file is missing, or lacks a column.
    """
    return {name: group for name, group in read_joined(path, "Groups file", "group") if group}


def groups_by_id(names: Mapping[int, str], groups: Mapping[str, str]) -> dict[int, str]:
    """{global id: group} of the images that groups by name are about; names without an image are logged.

    Args:
        names: {global id: name} of the images.
        groups: {name: group}; may be empty.

    Raises:
        InputError: `groups` names none of the images.
    """
    known = {id_: groups[name] for id_, name in names.items() if name in groups}
    unused = sorted(set(groups) - set(names.values()))
    if groups and not known:
        example = next(iter(names.values()), "")
        raise InputError(
            f"The groups name none of the {len(names)} images: one of them is {name_some(unused[:1])}, an image is "
            f"{show(example)}. Write paths relative to the folder."
        )
    if unused:
        log.warning("%d grouped files are not there: %s.", len(unused), name_some(unused))
    return known


def read_joined(path: str | Path, what: str, column: str) -> list[tuple[str, str]]:
    """(relative image path, value) of each row of a CSV file with the columns `file` (or `path`) and one more.

    Args:
        path: The file.
        what: How errors call it.
        column: The column of the values; a missing cell is an empty text.

    Raises:
        InputError: The file is missing, or lacks a column.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{what} '{show(path)}' cannot be read: {one_line(error)}.") from error
    columns = set(rows[0]) if rows else set()
    name = "file" if "file" in columns else "path"
    if not {name, column} <= columns:
        has = ", ".join(sorted(map(str, columns))) or "none"
        raise InputError(f"{what} '{show(path)}' needs the columns 'file' and '{column}', has {has}.")
    return [(row[name] or "", row[column] or "") for row in rows]
