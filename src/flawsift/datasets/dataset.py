"""What a loader returns, and the two steps that all folder loaders share: matching masks and numbering images."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from flawsift.data.folders import groups_by_id, scan_folder, tell_animations, with_pages
from flawsift.data.images import FileSource, ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError
from flawsift.paths import name_some, show
from flawsift.types import Ids

log = logging.getLogger("flawsift")

NORMAL = "good"  # the defect type of normal images, as MVTec AD and `GroundTruth` write it
NORMAL_FOLDERS = ("good", "ok")  # BTAD writes "ok"


def no_ids() -> Ids:
    """(0,) ids."""
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and, apart from them, what is known about them.

    Attributes:
        name: Name of the set or category.
        images: All images, under ids that stay the same whatever options leave images out; with groups where they
            are known.
        truth: Labels and masks of the same ids. Of an unlabelled folder it has no ids at all.
        train_ids: (T,) training images of the official split. Empty, like `test_ids`, if the set has no official
            split: then draw one with `flawsift.data.contamination.contaminate`.
        test_ids: (U,) test images of the official split.
    """

    name: str
    images: ImageSet
    truth: GroundTruth
    train_ids: Ids = field(default_factory=no_ids)
    test_ids: Ids = field(default_factory=no_ids)

    def select(self, ids: npt.ArrayLike) -> Self:
        """The part of the data set with these global ids, in their order.

        Args:
            ids: (M,) global ids.

        Raises:
            InputError: An id is unknown or appears twice.
        """
        wanted = np.asarray(ids, np.int64).reshape(-1)
        labelled = wanted if len(self.truth) else no_ids()
        return type(self)(
            self.name,
            self.images.select(wanted),
            self.truth.select(labelled),
            self.train_ids[np.isin(self.train_ids, wanted)],
            self.test_ids[np.isin(self.test_ids, wanted)],
        )


class Entry(NamedTuple):
    """One labelled image file of a tree.

    Attributes:
        file: Path relative to the root, with forward slashes.
        defect_type: "good" for a normal image.
        mask: Its mask file, or several, if there is one.
        part: Its side in the official split, if there is one.
    """

    file: str
    defect_type: str
    mask: Path | Sequence[Path] | None = None
    part: Literal["train", "test"] | None = None


def from_entries(name: str, root: Path, entries: Sequence[Entry], groups: Mapping[str, str] | None = None) -> Dataset:
    """Number files 0..N-1 in the order given, and the pages of a TIFF one by one; its mask may have as many pages.

    Args:
        name: Name of the data set.
        root: The folder that all file names are relative to.
        entries: The files.
        groups: {file: group name}; rows of other files are reported and left out.

    Raises:
        InputError: `groups` names none of the files.
    """
    entries = [page for entry in entries for page in _pages(root, entry)]
    by_id = dict(enumerate(e.file for e in entries))
    tell_animations(root, by_id.values())
    defect_types = tuple(e.defect_type for e in entries)
    truth = GroundTruth(
        ids=np.arange(len(entries), dtype=np.int64),
        labels=np.array([t != NORMAL for t in defect_types], dtype=np.int8),
        defect_types=defect_types,
        masks={i: e.mask for i, e in enumerate(entries) if e.mask is not None},
    )
    images = ImageSet(truth.ids, FileSource(root, by_id), groups_by_id(by_id, groups or {}))
    parts = np.array([e.part or "" for e in entries], dtype=np.str_)
    return Dataset(name, images, truth, truth.ids[parts == "train"], truth.ids[parts == "test"])


def _pages(root: Path, entry: Entry) -> Iterable[Entry]:
    """The entry, or one for each page of its file."""
    names = with_pages(root, [entry.file])
    if len(names) == 1:
        return [entry]
    masks: list[Path | None] = [None] * len(names)
    if isinstance(entry.mask, Path):
        of_pages = with_pages(entry.mask.parent, [entry.mask.name])
        if len(of_pages) == len(names):
            masks = [entry.mask.parent / name for name in of_pages]
    return [entry._replace(file=name, mask=mask) for name, mask in zip(names, masks, strict=True)]


def match_masks(files: Sequence[str], masks: Path) -> dict[str, Path | Sequence[Path]]:
    """Find the mask of each image: the same relative path with any image ending, or with `_mask` before the ending.

    Or several of one image, in a folder that is called like it without the ending, as MVTec LOCO has them. A mask
    without an image is left out with a warning; an image without a mask is not in the result.

    Args:
        files: Image paths relative to their own root, such as "crack/000.png".
        masks: The folder that mirrors that root.

    Returns:
        {image path: mask path, or all of them}.

    Raises:
        InputError: A mask folder has no image folder of that name, or two images would share one mask.
    """
    names = scan_folder(masks)
    folders = _first_folders(files)
    unknown = sorted(_first_folders(names) - folders - set(NORMAL_FOLDERS))
    if unknown:
        raise InputError(
            f"Mask folders in '{show(masks)}' without images of that defect type: {name_some(unknown)}. "
            f"Defect types with images: {name_some(sorted(folders))}."
        )
    by_stem: dict[str, list[str]] = {}
    in_folder: dict[str, list[str]] = {}
    for mask in names:
        by_stem.setdefault(_stem(mask), [mask])
        in_folder.setdefault(mask.rpartition("/")[0], []).append(mask)
    mask_of: dict[str, list[str]] = {}
    for file in files:
        stem = _stem(file)
        mask_names = by_stem.get(f"{stem}_mask") or by_stem.get(stem) or in_folder.get(stem)
        if mask_names is not None:
            mask_of[file] = mask_names
    _refuse_shared(mask_of, masks)
    used = {name for mask_names in mask_of.values() for name in mask_names}
    stray = sorted(m for m in set(names) - used if m.split("/")[0] not in NORMAL_FOLDERS)
    if stray:
        log.warning("%d masks in '%s' have no image and are ignored: %s.", len(stray), show(masks), name_some(stray))
    found = {file: [masks / name for name in mask_names] for file, mask_names in mask_of.items()}
    return {file: paths[0] if len(paths) == 1 else paths for file, paths in found.items()}


def _refuse_shared(mask_of: Mapping[str, Sequence[str]], masks: Path) -> None:
    users: dict[str, list[str]] = {}
    for file, mask_names in mask_of.items():
        users.setdefault(mask_names[0], []).append(file)
    shared = [f"{m} ({' and '.join(sorted(f))})" for m, f in users.items() if len(f) > 1]
    if shared:
        raise InputError(
            f"{len(shared)} masks in '{show(masks)}' belong to more than one image: {name_some(shared)}. "
            "Give images of one folder different names before the ending."
        )


def _stem(file: str) -> str:
    """The path without its ending.

    >>> _stem("crack/exp1.5.png")
    'crack/exp1.5'
    """
    return str(Path(file).with_suffix("").as_posix())


def _first_folders(files: Iterable[str]) -> set[str]:
    return {f.split("/")[0] for f in files if "/" in f}


def sub_folders(root: Path) -> list[str]:
    """Names of the visible folders directly in `root`, sorted; none if `root` is no folder."""
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def require_folder(root: Path) -> Path:
    """`root`, if it is a folder.

    Raises:
        InputError: It is not.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"Data set folder '{show(root)}' {what}.")
    return root


def require_images(folder: Path) -> list[str]:
    """Image paths relative to a folder that must exist and hold some.

    Raises:
        InputError: It is missing or has no image.
    """
    names = scan_folder(folder)
    if not names:
        raise InputError(f"No images in '{show(folder)}'. The data set is incomplete: fill or remove this folder.")
    return names
