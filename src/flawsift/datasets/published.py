"""Public benchmark sets with official splits, each by category, exactly as their publishers ship them.

    mvtec     CATEGORY/train/good/000.png ...                      15 categories, Bergmann et al., CVPR 2019
    btad      01/train/ok/0000.bmp, test/ok, test/ko, ground_truth/ko    3, Mishra et al., ISIE 2021
    mpdd      CATEGORY/train/good/000.png ...                       6, Jezek et al., ICUMT 2021
    visa      split_csv/1cls.csv, CATEGORY/Data/Images/Normal/0000.JPG    12, Zou et al., ECCV 2022
    realiad   realiad_1024/CATEGORY/OK/S0001/*.jpg and realiad_jsons_fuiad_0.1/CATEGORY.json    30, see `realiad`

One more set has categories but neither an official split nor its publisher's layout: see `piped`.

A set is looked for in the folder of its name below the one that the environment variable FLAWSIFT_DATA names.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from flawsift.data.joins import read_table
from flawsift.data.truth import files_of
from flawsift.datasets.dataset import NORMAL, Dataset, Entry, from_entries, require_folder
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.datasets.mvtec import load_mvtec
from flawsift.errors import InputError, unknown_name
from flawsift.paths import name_some, show

log = logging.getLogger("flawsift")

_MVTEC = "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper"
_MPDD = "bracket_black bracket_brown bracket_white connector metal_plate tubes"
_VISA = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
_REALIAD = (
    "audiojack bottle_cap button_battery end_cap eraser fire_hood mint mounts pcb phone_battery plastic_nut "
    "plastic_plug porcelain_doll regulator rolled_strip_base sim_card_set switch tape terminalblock toothbrush toy "
    "toy_brick transistor1 u_block usb usb_adaptor vcpill wooden_beads woodstick zipper"
)
_PIPED = "PA_BDP01_TL PA_BFT01_TL PA_BRG01_RL PA_BRG02_RL PA_BRG03_TL PA_BTN01_RL"
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "mvtec": tuple(_MVTEC.split()),
    "btad": ("01", "02", "03"),
    "mpdd": tuple(_MPDD.split()),
    "visa": tuple(_VISA.split()),
    "realiad": tuple(_REALIAD.split()),
    "piped": tuple(_PIPED.split()),
}
SOURCES: Mapping[str, str] = {
    "mvtec": "https://www.mvtec.com/company/research/datasets/mvtec-ad (CC BY-NC-SA 4.0)",
    "btad": "http://avires.dimi.uniud.it/papers/btad/btad.zip",
    "mpdd": "https://github.com/stepanje/MPDD (CC BY-NC-SA 4.0)",
    "visa": "https://github.com/amazon-science/spot-diff (CC BY 4.0)",
    "realiad": "https://realiad4ad.github.io/Real-IAD (CC BY-NC-SA 4.0)",
    "piped": "https://github.com/bianconif/PIPED (CC BY 4.0)",
}
VISA_SPLIT = "split_csv/1cls.csv"
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
VISA_LABELS = ("normal", "anomaly")


def load_mvtec_ad(category: str, root: str | Path | None = None) -> Dataset:
    """One category of MVTec AD; ids are sorted by path, training images first.

    Args:
        category: Such as "bottle".
        root: The folder that holds the categories; by default FLAWSIFT_DATA/mvtec.

    Raises:
        InputError: The category is unknown, or files are missing; says where they were looked for.
    """
    return _load_tree("mvtec", category, root, "train/good, test/good, test/DEFECT_TYPE, ground_truth/DEFECT_TYPE")


def load_btad(category: str, root: str | Path | None = None) -> Dataset:
    """One product of BTAD (BeanTech): "01", "02" or "03"; normal images lie in "ok", defective ones in "ko".

    Arguments and errors as for `load_mvtec_ad`.
    """
    return _load_tree("btad", category, root, "train/ok, test/ok, test/ko, ground_truth/ko")


def load_mpdd(category: str, root: str | Path | None = None) -> Dataset:
    """One category of MPDD (metal parts). Arguments and errors as for `load_mvtec_ad`."""
    return _load_tree("mpdd", category, root, "train/good, test/good, test/DEFECT_TYPE, ground_truth/DEFECT_TYPE")


def load_visa(category: str, root: str | Path | None = None) -> Dataset:
    """One category of VisA by its official one-class split; ids in the order of the split file.

    The kinds of defect are not named there: the defect type is "anomaly".

    Args:
        category: Such as "candle".
        root: The folder that holds split_csv and the categories; by default FLAWSIFT_DATA/visa.

    Raises:
        InputError: The category is unknown, or files are missing or not as published.
    """
    folder = find_root("visa", category, root)
    split = folder / VISA_SPLIT
    entries: list[Entry] = []
    for row in _read_split(split):
        if row["object"] != category:
            continue
        if row["label"] not in VISA_LABELS or row["split"] not in ("train", "test"):
            raise InputError(
                f"'{show(split)}' has a row of label '{row['label']}' and split '{row['split']}'. "
                f"Expected normal or anomaly, and train or test: take the file as published, {SOURCES['visa']}."
            )
        kind = NORMAL if row["label"] == "normal" else row["label"]
        part = "train" if row["split"] == "train" else "test"
        entries.append(Entry(row["image"], kind, folder / row["mask"] if row["mask"] else None, part))  # type: ignore[arg-type]
    if not entries:
        raise InputError(f"'{show(split)}' has no row of '{category}'. Take the file as published, {SOURCES['visa']}.")
    if twice := sorted(file for file, n in Counter(e.file for e in entries).items() if n > 1):
        raise InputError(f"'{show(split)}' names {len(twice)} images more than once: {name_some(twice)}.")
    require_files("visa", folder, entries, f"{category}/Data/Images/Normal/0000.JPG, {category}/Data/Masks/Anomaly")
    return from_entries(category, folder, entries)


def require_category(name: str, category: str) -> None:
    """Raise InputError unless a set has such a category; says which it has."""
    if category not in CATEGORIES[name]:
        raise InputError(unknown_name(f"category of {name}", category, CATEGORIES[name]))


def find_root(name: str, category: str, root: str | Path | None) -> Path:
    """The folder of a published set that has such a category.

    Raises:
        InputError: The set has no such category, or the folder is unknown or missing.
    """
    require_category(name, category)
    base = os.environ.get(DATA_VARIABLE)
    if root is None and not base:
        raise InputError(
            f"Where is the data set '{name}'? Get it from {SOURCES[name]} and set {DATA_VARIABLE} to the folder that "
            f"holds {name} (`flawsift benchmark` has --data-root for it), or pass root."
        )
    folder = Path(root) if root is not None else Path(base or "", name)
    if not folder.exists():
        raise InputError(
            f"Data set folder '{show(folder)}' does not exist. Get it from {SOURCES[name]}. {DATA_VARIABLE}, or "
            f"--data-root of `flawsift benchmark`, is the folder that holds {name}."
        )
    return require_folder(folder)


def require_files(name: str, folder: Path, entries: list[Entry], layout: str) -> None:
    """Raise InputError unless all images and masks are there; says which are not, and what was expected."""
    masks = [mask for e in entries if e.mask is not None for mask in files_of(e.mask)]
    wanted = [(e.file, folder / e.file) for e in entries]
    wanted += [(m.relative_to(folder).as_posix() if m.is_relative_to(folder) else str(m), m) for m in masks]
    if absent := [file for file, path in wanted if not path.is_file()]:
        raise InputError(
            f"{len(absent)} of {len(wanted)} files of {name} are not in '{show(folder)}': {name_some(absent)}. "
            f"Expected {layout}, as in {SOURCES[name]}."
        )


def _load_tree(name: str, category: str, root: str | Path | None, layout: str) -> Dataset:
    folder = find_root(name, category, root)
    if absent := [part for part in layout.split(", ") if not _there(folder / category, part)]:
        raise InputError(
            f"'{show(folder / category)}' has no {', no '.join(absent)}. Expected {layout}, as in {SOURCES[name]}."
        )
    data = load_mvtec(folder, category)
    defective = data.truth.ids[data.truth.labels == 1].tolist()
    if bare := [data.images.source.name(i) for i in defective if i not in data.truth.masks]:
        log.warning(
            "%d of %d defective images of %s %s have no mask in '%s': %s. The published set has them: get it again.",
            *(len(bare), len(defective), name, category, show(folder / category / "ground_truth"), name_some(bare)),
        )
    return data


def _there(folder: Path, part: str) -> bool:
    path = folder / part.removesuffix("/DEFECT_TYPE")
    return path.is_dir()


def _read_split(path: Path) -> list[dict[str, str]]:
    try:
        rows = read_table(path, "The split file", [(column,) for column in VISA_COLUMNS])
    except InputError as error:
        raise InputError(f"{error} It comes with {SOURCES['visa']}.") from error
    if bare := [row["image"] for row in rows if row["label"] == "anomaly" and not row["mask"]]:
        raise InputError(
            f"The split file '{show(path)}' has no mask of {len(bare)} defective images: {name_some(bare)}. Was it cut "
            f"off? Take it as published, {SOURCES['visa']}."
        )
    return rows
