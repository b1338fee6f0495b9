"""What lies in an image folder, and which of its images belong together."""

import os
from collections.abc import Mapping
from pathlib import Path

from flawsift.data.joins import joined, read_table
from flawsift.errors import InputError
from flawsift.paths import show

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
    """{global id: group} of the images that groups by name are about; names without an image are logged,
    and names are understood, as `flawsift.data.joins.images_named` says.

    Args:
        names: {global id: name} of the images.
        groups: {name: group}; may be empty.

    Raises:
        InputError: `groups` names none of the images.
    """
    group_of = joined(groups, list(names.values()), "groups")
    return {id_: group_of[name] for id_, name in names.items() if name in group_of}


def read_joined(path: str | Path, what: str, column: str) -> list[tuple[str, str]]:
    """(relative image path, value) of each row of a CSV file with the columns `file` (or `path`) and one more.

    Args:
        path: The file.
        what: How errors call it.
        column: The column of the values; a missing cell is an empty text.

    Raises:
        InputError: See `flawsift.data.joins.read_table`.
    """
    rows = read_table(Path(path), what, [("file", "path"), (column,)])
    name = "file" if rows and "file" in rows[0] else "path"
    return [(row[name], row[column]) for row in rows]
