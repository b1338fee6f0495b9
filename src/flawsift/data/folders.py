"""What lies in an image folder, and which of its images belong together."""

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from flawsift.data import tiff
from flawsift.data.joins import joined, read_table
from flawsift.errors import InputError
from flawsift.paths import PAGED, name_some, page_name, show

log = logging.getLogger("flawsift")

# What a folder scan takes for an image. Content decides how a file is decoded; the ending only whether it is looked at.
EXTENSIONS = frozenset({".bmp", ".dib", ".gif", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".webp"})
EXTENSIONS |= {".apng", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", *tiff.ENDINGS}
EXTENSIONS |= {".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"}  # JPEG 2000
UNOPENED: tuple[type[Exception], ...] = (*tiff.UNREADABLE, Image.DecompressionBombError)
ANIMATED = frozenset({".apng", ".gif", ".mpo", ".webp"})  # whose files may hold several frames
# Raw data of cameras: a picture only once it is developed. What a scan meets of them is told.
RAW = frozenset({".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw"})
RAW |= {".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}


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
    raw: list[str] = []
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
        for file in files:
            ending = "" if file.startswith(".") else Path(file).suffix.lower()
            if ending in EXTENSIONS or ending in RAW:
                (names if ending in EXTENSIONS else raw).append((relative / file).as_posix())
    if raw:
        log.warning("%d files are left out, %s: %s.", len(raw), tiff.RAW, name_some(sorted(raw)))
    names += [name for name in like_images if not any(other.startswith(f"{name}/") for other in names)]
    return sorted(names)


def with_pages(root: Path, names: Iterable[str]) -> list[str]:
    """The names, with one for each page in place of a TIFF of several pictures: "a.tif#page=1", "a.tif#page=2"."""
    listed: list[str] = []
    for name in names:
        pages = tiff.pages_of(root / name) if Path(name).suffix.lower() in tiff.ENDINGS else [0]
        listed += [name] if len(pages) == 1 else [page_name(name, page) for page in pages]
    return listed


def tell_animations(root: Path, names: Iterable[str]) -> None:
    """Say in one line which files have several frames: only the first of each is looked at."""
    animated = [name for name in names if Path(name).suffix.lower() in ANIMATED and _has_frames(root / name)]
    if animated:
        log.warning(
            "%d %s several frames, of which only the first is looked at: %s. Save frames that show parts as files.",
            len(animated),
            "file has" if len(animated) == 1 else "files have",
            name_some(animated),
        )


def _has_frames(path: Path) -> bool:
    """Whether a file holds more than one; one that cannot be read says why when it is decoded."""
    if not path.is_file():  # a pipe of that name would never end
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large sizes
            with Image.open(path) as opened:
                return bool(getattr(opened, "is_animated", False))
    except UNOPENED:
        return False


def read_groups(path: str | Path) -> dict[str, str]:
    """{relative image path: group} from a CSV file with the columns `file` (or `path`) and `group`.

    Raises:
        InputError: The file is missing, lacks a column, names no group, or two of one image.
    """
    read = [(name, group) for name, group in read_joined(path, "Groups file", "group") if group]
    groups = dict(read)
    if not groups:
        raise InputError(
            f"Groups file '{show(path)}' names no group. Write a row for each image of one, or leave it out."
        )
    if twice := sorted({name for name, group in read if groups[name] != group}):
        raise InputError(
            f"{len(twice)} images are in two groups in '{show(path)}': {name_some(twice)}. Leave one row each."
        )
    return groups


def groups_by_id(names: Mapping[int, str], groups: Mapping[str, str]) -> dict[int, str]:
    """{global id: group} of the images that groups by name are about; names without an image are logged,
    and names are understood, as `flawsift.data.joins.images_named` says.

    Pages of one file are a group, called like the file, unless the groups say otherwise of the page or of the file.

    Args:
        names: {global id: name} of the images.
        groups: {name: group}; may be empty.

    Raises:
        InputError: `groups` names none of the images.
    """
    file_of = {name: paged[1] if (paged := PAGED.fullmatch(name)) else name for name in names.values()}
    known = {name: file for name, file in file_of.items() if file != name}  # pages are views of one part
    group_of = joined(groups, list(dict.fromkeys([*file_of, *file_of.values()])), "groups")
    known |= {name: group_of[file] for name, file in file_of.items() if file in group_of}
    known |= {name: group_of[name] for name in file_of if name in group_of}
    if groups and (alone := [name for name in names.values() if name not in known]):
        log.warning(
            "%d of %d images have no group, and are a group each: %s.", len(alone), len(names), name_some(alone)
        )
    return {id_: known[name] for id_, name in names.items() if name in known}


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
