"""Plain folders: unlabelled ones, and labelled ones with normal and defective images apart.

ROOT/normal/*.jpg
ROOT/defect/DEFECT_TYPE/*.jpg
ROOT/mask/DEFECT_TYPE/*[_mask].png     optional: same name as the image, any image ending
ROOT/groups.csv                        optional: columns file (relative to ROOT) and group

The folders may be called good or ok, and bad, defective or nok, in any case of the letters.

Or, of any number of kinds:

ROOT/good/*.jpg                        or ok, in upper or lower case
ROOT/KIND/*.jpg                        such as bad, nok or scratch; mask folders are not looked at
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flawsift.data.folders import read_groups, scan_folder
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets.dataset import (
    NORMAL,
    NORMAL_FOLDERS,
    Dataset,
    Entry,
    from_entries,
    match_masks,
    no_ids,
    require_folder,
    require_images,
    sub_folders,
)
from flawsift.errors import InputError
from flawsift.paths import name_some, show

DATA_VARIABLE = "FLAWSIFT_DATA"  # the environment variable that names the folder with downloaded sets
NORMAL_NAMES = ("normal", "good", "ok")  # of the two folders of a labelled set
DEFECT_NAMES = ("defect", "defective", "bad", "nok")
LAYOUTS = (
    "Expected normal (or good, ok) and defect (or bad, nok), perhaps with sub-folders DEFECT_TYPE, a folder mask that "
    "mirrors defect and groups.csv; or the layout of MVTec AD: test/good and test/DEFECT_TYPE"
)
FLAT_DEFECT = "defect"  # defect type of images that lie directly in the defect folder
MASK_FOLDERS = ("mask", "masks", "ground_truth")  # no kinds of images


def load_folder(
    normal: str | Path,
    *,
    defect: str | Path | None = None,
    masks: str | Path | None = None,
    groups: str | Path | None = None,
    name: str | None = None,
) -> Dataset:
    """Normal images from one folder, defective ones from another; ids are sorted by path, normal images first.

    The sub-folders of `defect` are the defect types. Names are relative to the deepest folder that holds both.

    Args:
        normal: Folder of normal images, nested or flat.
        defect: Folder of defective images; None if there are only normal ones.
        masks: Folder that mirrors `defect`.
        groups: CSV file with the columns `file` (relative to that deepest folder) and `group`.
        name: Name of the data set; by default that of the deepest folder.

    Raises:
        InputError: A folder is missing or empty, one lies within the other, or masks or groups cannot be matched.
    """
    normal_folder = _absolute(normal)
    root = normal_folder
    normals = require_images(normal_folder)
    entries: list[Entry] = []
    if defect is not None:
        defect_folder = _absolute(defect)
        root = _common_root(normal_folder, defect_folder)
        files = require_images(defect_folder)
        _refuse_normal_types(defect_folder, files)
        mask_of = match_masks(files, _absolute(masks)) if masks is not None else {}
        prefix = defect_folder.relative_to(root)
        entries = [Entry((prefix / f).as_posix(), _defect_type(f), mask_of.get(f)) for f in files]
    elif masks is not None:
        raise InputError("masks without a defect folder: name the folder of the images that they belong to.")
    prefix = normal_folder.relative_to(root)
    entries = [Entry((prefix / f).as_posix(), NORMAL) for f in normals] + entries
    return from_entries(name or root.name, root, entries, read_groups(groups) if groups is not None else None)


def load_labelled(root: str | Path, *, name: str | None = None) -> Dataset:
    """A folder in the layout normal, defect/DEFECT_TYPE and, optionally, mask/DEFECT_TYPE and groups.csv.

    Args:
        root: The folder; normal and defect may have another of their usual names, such as good and bad.
        name: Name of the data set; by default that of the folder.

    Raises:
        InputError: A folder is missing or empty, there are two of one kind, or masks or groups cannot be matched.
    """
    root = require_folder(_absolute(root))
    normal, defect = _named(root, NORMAL_NAMES), _named(root, DEFECT_NAMES)
    for kind, there in (("normal", normal), ("defect", defect)):
        if len(there) != 1:
            has = f"has more than one folder {kind}: {name_some(there)}" if there else f"has no folder {kind}"
            listed = name_some(sub_folders(root)) or "no folders"
            raise InputError(f"'{show(root)}' {has}. {LAYOUTS}. Found: {listed}.")
    masks, groups = root / "mask", root / "groups.csv"
    return load_folder(
        root / normal[0],
        defect=root / defect[0],
        masks=masks if masks.is_dir() else None,
        groups=groups if groups.is_file() else None,
        name=name,
    )


def is_labelled(root: Path) -> bool:
    """Whether a folder has the labelled layout, or was meant to: with other names, nothing else may lie beside them."""
    folders = sub_folders(root)
    if {"normal", "defect"}.intersection(folders):
        return True
    named = [*_named(root, NORMAL_NAMES), *_named(root, DEFECT_NAMES)]
    others = [folder for folder in folders if folder not in named and folder.lower() not in MASK_FOLDERS]
    loose = any("/" not in name for name in scan_folder(root))
    return bool(_named(root, NORMAL_NAMES) and _named(root, DEFECT_NAMES)) and not others and not loose


def _named(root: Path, names: Sequence[str]) -> list[str]:
    return [folder for folder in sub_folders(root) if folder.lower() in names]


def is_sorted(root: Path) -> bool:
    """Whether a folder looks sorted into kinds of which one is good."""
    return any(_is_good(kind) for kind in sub_folders(root))


def load_sorted(root: str | Path) -> Dataset:
    """A folder whose sub-folders are kinds of images: good (or ok), and any kinds of defects; ids are sorted by path.

    Args:
        root: The folder.

    Raises:
        InputError: It is missing, none of its folders is called good or ok, one is empty, or images lie beside them.
    """
    root = require_folder(_absolute(root))
    kinds = [kind for kind in sub_folders(root) if kind.lower() not in MASK_FOLDERS]
    if not is_sorted(root):
        raise InputError(f"'{show(root)}' has no folder good or ok. Found: {name_some(kinds) or 'no folders'}.")
    if loose := [name for name in scan_folder(root) if "/" not in name]:  # each may be good or not
        raise InputError(
            f"{len(loose)} images lie beside the folders {name_some(kinds)} in '{show(root)}': {name_some(loose)}. "
            "Move each into the folder of its kind."
        )
    kind_of = {
        f"{kind}/{name}": NORMAL if _is_good(kind) else kind for kind in kinds for name in require_images(root / kind)
    }
    return from_entries(root.name, root, [Entry(file, kind_of[file]) for file in sorted(kind_of)])


def load_unlabelled(root: str | Path) -> Dataset:
    """All images below a folder, nothing known about them: `truth` has no ids.

    Args:
        root: The folder.

    Raises:
        InputError: It is missing or has no image.
    """
    root = _absolute(root)
    nothing = GroundTruth(ids=no_ids(), labels=np.empty(0, np.int8), defect_types=(), masks={})
    return Dataset(root.name, ImageSet.from_folder(root), nothing)


def load_prepared(name: str, root: str | Path | None = None, *, source: str) -> Dataset:
    """A public set that was downloaded and sorted into the labelled layout.

    Args:
        name: Name of the set, and path of its folder below the one that the environment variable FLAWSIFT_DATA names.
        root: Its folder, if not that one.
        source: Where to get it, for the error.

    Raises:
        InputError: The folder is unknown, missing or incomplete.
    """
    base = os.environ.get(DATA_VARIABLE)
    if root is None and not base:
        raise InputError(
            f"Where is the data set '{name}'? Get it from {source}, sort it into {name}/normal, "
            f"{name}/defect/DEFECT_TYPE and {name}/mask/DEFECT_TYPE, and set {DATA_VARIABLE} to the folder that holds "
            f"{name} (`flawsift benchmark` has --data-root for it), or pass root."
        )
    folder = Path(root) if root is not None else Path(base or "", name)
    if not folder.exists():
        raise InputError(
            f"Data set folder '{show(folder)}' does not exist. Get it from {source}. {DATA_VARIABLE}, or --data-root "
            f"of `flawsift benchmark`, is the folder that holds {name}."
        )
    return load_labelled(folder, name=name)


def _absolute(path: str | Path) -> Path:
    # not resolve(): a link's target would put machine-specific folders into the names
    return Path(os.path.abspath(path))


def _common_root(normal: Path, defect: Path) -> Path:
    if normal.is_relative_to(defect) or defect.is_relative_to(normal):
        raise InputError(
            f"The folders of normal and of defective images lie within each other: '{show(normal)}' and "
            f"'{show(defect)}'. An image would be both; use two folders side by side."
        )
    try:
        return Path(os.path.commonpath([normal, defect]))
    except ValueError as error:  # two drives of Windows
        raise InputError(f"'{show(normal)}' and '{show(defect)}' have no folder in common.") from error


def _refuse_normal_types(folder: Path, files: list[str]) -> None:
    wrong = sorted({_defect_type(f) for f in files}.intersection(NORMAL_FOLDERS))
    if wrong:
        raise InputError(f"'{show(folder / wrong[0])}' holds defective images under a name that means normal. Move it.")


def _defect_type(file: str) -> str:
    return file.split("/")[0] if "/" in file else FLAT_DEFECT


def _is_good(kind: str) -> bool:
    return kind.lower() in NORMAL_FOLDERS
