"""Trees in the layout of MVTec AD, which BTAD ("ok" for "good") and MPDD share.

    CATEGORY/train/good/*.png                          optional: absent is fine for evaluation
    CATEGORY/test/good/*.png
    CATEGORY/test/DEFECT_TYPE/*.png
    CATEGORY/ground_truth/DEFECT_TYPE/*[_mask].png     optional
    CATEGORY/ground_truth/DEFECT_TYPE/*/*.png          or several masks of one image, as in MVTec LOCO AD

Source: Bergmann et al., "MVTec AD", CVPR 2019, https://www.mvtec.com/company/research/datasets/mvtec-ad
"""

from pathlib import Path
from typing import Literal

from flawsift.datasets.dataset import (
    NORMAL,
    NORMAL_FOLDERS,
    Dataset,
    Entry,
    from_entries,
    match_masks,
    require_folder,
    require_images,
    sub_folders,
)
from flawsift.errors import InputError, unknown_name
from flawsift.paths import name_some, show

EXPECTED = "Expected train/good (optional), test/good, test/DEFECT_TYPE and ground_truth/DEFECT_TYPE (optional)."


def load_mvtec(root: str | Path, category: str | None = None) -> Dataset:
    """One category of a tree in MVTec layout; ids are sorted by path, training images first.

    An anomalous image without a mask stays in the set and is not in `truth.masks`. A mask without an image is left
    out with a warning.

    Args:
        root: The folder of one category, or the folder that holds several.
        category: Which one, if `root` holds several.

    Raises:
        InputError: A folder is missing, empty or unexpected, masks cannot be matched, or `root` holds several
            categories and none is named.
    """
    folder = _category_folder(require_folder(Path(root)), category)
    test_types = sub_folders(folder / "test")
    normal_test = _normal_folder(test_types)
    defect_types = [t for t in test_types if t != normal_test]
    if normal_test is None or not defect_types:
        missing = "no test/good" if normal_test is None else "no test/DEFECT_TYPE"
        raise InputError(f"'{show(folder)}' has {missing}. {EXPECTED} Found in test: {_list(test_types)}.")
    files = [f"{t}/{name}" for t in defect_types for name in require_images(folder / "test" / t)]
    truth_folder = folder / "ground_truth"
    masks = match_masks(files, truth_folder) if truth_folder.is_dir() else {}
    entries = _normals(folder, _train_folder(folder), "train") + _normals(folder, f"test/{normal_test}", "test")
    entries += [Entry(f"test/{f}", f.split("/")[0], masks.get(f), "test") for f in files]
    return from_entries(folder.name, folder, entries)


def is_mvtec(root: Path) -> bool:
    """Whether a folder looks like one category or several. A folder test with loose images does not."""
    return any(sub_folders(f / part) for f in (root, *_category_folders(root)) for part in ("test", "ground_truth"))


def _category_folders(root: Path) -> list[Path]:
    return [root / name for name in sub_folders(root) if (root / name / "test").is_dir()]


def _category_folder(root: Path, category: str | None) -> Path:
    if category is None and (root / "test").is_dir():
        return root
    known = [f.name for f in _category_folders(root)]
    if category in known:
        return root / category
    if not known:
        raise InputError(
            f"'{show(root)}' has neither a folder test nor categories with one. {EXPECTED} "
            f"Found: {_list(sub_folders(root))}."
        )
    if category is None:
        raise InputError(f"'{show(root)}' holds {len(known)} categories. Name one: {', '.join(known)}.")
    raise InputError(unknown_name("category", category, known))


def _normal_folder(names: list[str]) -> str | None:
    return next((n for n in NORMAL_FOLDERS if n in names), None)


def _train_folder(folder: Path) -> str | None:
    """The folder of training images; None if there is no folder `train`."""
    types = sub_folders(folder / "train")
    normal = _normal_folder(types)
    if normal is not None and len(types) == 1:
        return f"train/{normal}"
    if not (folder / "train").is_dir():
        return None
    # labels are folder names here: an image in train outside of train/good would get a guessed one
    raise InputError(f"'{show(folder / 'train')}' must hold the one folder good. Found: {_list(types)}.")


def _normals(folder: Path, part_folder: str | None, part: Literal["train", "test"]) -> list[Entry]:
    if part_folder is None:
        return []
    return [Entry(f"{part_folder}/{name}", NORMAL, None, part) for name in require_images(folder / part_folder)]


def _list(names: list[str]) -> str:
    return name_some(names) or "no folders"
