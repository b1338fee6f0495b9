"""Which pictures below a folder are no parts to look at: heatmaps that flawsift wrote there, masks of a data set."""

import logging
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from flawsift.errors import OutputError
from flawsift.paths import name_some, show

log = logging.getLogger("flawsift")

TABLE, MAPS = "predictions.csv", "maps"  # what `flawsift predict --out` writes: a table, and a folder of heatmaps
MARK = ".flawsift"  # a file of this name says that a folder MAPS beside it holds heatmaps: it comes before the table
TRUTH_FOLDER = "ground_truth"  # of MVTec AD and those that follow it: nobody sorts parts into such a folder
# Folders that hold masks in many data sets (VisA, MVTec 3D, DAGM) and may hold parts elsewhere: their pictures decide.
MASK_FOLDERS = frozenset({"groundtruth", "gt", "label", "labels", "mask", "masks"})
MASK_ENDINGS = ("_mask", "_gt", "_label")  # after the name of the picture beside it
MASK_COLOURS = 32  # a mask has a colour for each kind of defect, a photograph has hundreds
KINDS = {  # what the type of a file is called, where it is none that can be read to its end
    stat.S_IFIFO: "a named pipe, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
    stat.S_IFDIR: "a folder, not a file",
}


def read_regular(path: Path) -> bytes:
    """The content of a file; what is none is not opened: a pipe would keep its reader waiting for ever.

    Raises:
        OSError: It cannot be read, or is a pipe, a socket, a device or a folder.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise OSError(None, KINDS.get(kind, "not a file"), str(path))
    return path.read_bytes()


def mark_results(folder: Path) -> None:
    """Say of a folder that its `maps` are heatmaps, so that no later listing takes them for parts.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(f"The pictures in the folder {MAPS} are heatmaps: no parts.\n")
    except OSError as error:
        raise OutputError(f"Cannot write '{show(folder)}': {error.strerror or error}.") from error


def is_results(folder: Path) -> bool:
    """Whether a folder holds heatmaps of flawsift: it is marked, or the table of predictions lies beside it."""
    if folder.name != MAPS:
        return False
    try:
        return (folder.parent / MARK).is_file() or read_regular(folder.parent / TABLE).startswith(b"path,score,")
    except OSError:
        return False


def parts_among(root: Path, names: Sequence[str]) -> list[str]:
    """The names without those of masks and of flawsift's own pictures; how many are left out is logged.

    Args:
        root: What the names are relative to. That somebody named this very folder says that its pictures are wanted.
        names: Paths with forward slashes.
    """
    folders = {folder for name in names for folder in PurePosixPath(name).parents} - {PurePosixPath()}
    results = {folder for folder in folders if is_results(root / folder)}
    written = [name for name in names if results.intersection(PurePosixPath(name).parents)]
    rest = sorted(set(names) - set(written))
    masks = masks_among(root, rest)
    _tell(written, "which flawsift wrote there")
    _tell(masks, "which are masks of a data set and show no parts (ground_truth, mask)")
    left_out = {*written, *masks}
    return [name for name in names if name not in left_out]


def masks_among(root: Path, names: Sequence[str]) -> list[str]:
    """Names of masks by the conventions of public data sets.

    Masks lie in a folder `ground_truth` (MVTec AD, LOCO), in a folder of `MASK_FOLDERS` (VisA), beside their picture
    with "_mask" after its name, or beside it as a PNG of the same name (Real-IAD). Where a name alone could be that of
    a part, a picture of few colours is a mask.

    Args:
        root: What the names are relative to.
        names: Paths with forward slashes.
    """
    endings: dict[PurePosixPath, set[str]] = {}
    for name in names:
        endings.setdefault(_stem(name), set()).add(PurePosixPath(name).suffix.lower())
    masks = []
    for name in names:
        stem, folders = _stem(name), {part.lower() for part in PurePosixPath(name).parts[:-1]}
        pictures = [stem.with_name(stem.name.removesuffix(end)) for end in MASK_ENDINGS if stem.name.lower() != end]
        beside = any(picture != stem and picture in endings for picture in pictures)
        may_be = bool(folders & MASK_FOLDERS) or (name.lower().endswith(".png") and endings[stem] - {".png"})
        if TRUTH_FOLDER in folders or beside or (may_be and _has_few_colours(root / name)):
            masks.append(name)
    return masks


def _stem(name: str) -> PurePosixPath:
    """The path without its ending, endings for masks in lower case."""
    path = PurePosixPath(name).with_suffix("")
    low = next((end for end in MASK_ENDINGS if path.name.lower().endswith(end)), "")
    return path.with_name(path.name[: len(path.name) - len(low)] + low) if path.name else path


def _has_few_colours(path: Path) -> bool:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_regular(path))) as picture:
            return picture.getcolors(MASK_COLOURS) is not None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False  # it is told where it is read


def _tell(names: Iterable[str], why: str) -> None:
    if listed := list(names):
        log.warning("%d pictures are left out, %s: %s.", len(listed), why, name_some(listed))
