"""Data sets: images under global ids and, apart from them, their labels and masks.

    folder          load_folder, load_labelled (normal, defect/TYPE, mask/TYPE), load_sorted (good, KIND),
                    load_unlabelled
    mvtec           load_mvtec: any tree in the layout of MVTec AD, BTAD and MPDD
    published       load_mvtec_ad, load_btad, load_mpdd, load_visa: by category, with official splits
    realiad         load_realiad: the four contaminated splits of Real-IAD (FUIAD)
    elpv            load_elpv: 2,624 solar cells from PyPI
    magnetic_tile   load_magnetic_tile: 1,344 tile surfaces in groups
    piped           load_piped: six papers of PIPED, plain textures with impurities
    synthetic       synthetic.synthetic: procedural, in memory, any size; write_mvtec, write_folder

`load` finds the right one by name or by layout; cookie and screw have a name only.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flawsift.datasets.dataset import Dataset
from flawsift.datasets.elpv import load_elpv
from flawsift.datasets.folder import (
    is_labelled,
    is_sorted,
    load_folder,
    load_labelled,
    load_prepared,
    load_sorted,
    load_unlabelled,
)
from flawsift.datasets.magnetic_tile import load_magnetic_tile
from flawsift.datasets.mvtec import is_mvtec, load_mvtec
from flawsift.datasets.piped import load_piped
from flawsift.datasets.published import CATEGORIES, load_btad, load_mpdd, load_mvtec_ad, load_visa
from flawsift.datasets.realiad import load_realiad
from flawsift.datasets.synthetic import synthetic as draw_synthetic  # the bare name is the module's
from flawsift.datasets.synthetic import write_folder, write_mvtec
from flawsift.errors import InputError, ParameterError, unknown_name

__all__ = [
    "CATEGORIES",
    "Dataset",
    "load",
    "load_btad",
    "load_elpv",
    "load_folder",
    "load_labelled",
    "load_magnetic_tile",
    "load_mpdd",
    "load_mvtec",
    "load_mvtec_ad",
    "load_piped",
    "load_realiad",
    "load_sorted",
    "load_unlabelled",
    "load_visa",
    "write_folder",
    "write_mvtec",
]

COOKIE_SOURCE = "https://github.com/aws-samples/amazon-lookout-for-vision (CC BY-SA 4.0; 45 normal, 32 defective)"
SCREW_SOURCE = "https://www.mvtec.com/company/research/datasets/mvtec-ad (CC BY-NC-SA 4.0; 361 normal, 119 defective)"


def load_cookie(root: str | Path | None = None) -> Dataset:
    """The cookies: 45 normal and 32 defective colour images with masks; no official split.

    Args:
        root: Its folder; by default the folder cookie in the one that the environment variable FLAWSIFT_DATA names.

    Raises:
        InputError: The folder is missing or incomplete.
    """
    return load_prepared("cookie", root, source=COOKIE_SOURCE)


def load_screw(root: str | Path | None = None) -> Dataset:
    """MVTec AD's screws, all in one: 361 normal and 119 defective grey images, five defect types, masks; no split.

    They lie at any angle. With the official split, as published, they are the category "screw" of "mvtec".

    Args:
        root: Its folder; by default the folder screw in the one that the environment variable FLAWSIFT_DATA names.

    Raises:
        InputError: The folder is missing or incomplete.
    """
    return load_prepared("screw", root, source=SCREW_SOURCE)


_LOADERS: dict[str, Callable[..., Dataset]] = {
    "btad": load_btad,
    "cookie": load_cookie,
    "elpv": load_elpv,
    "magnetic_tile": load_magnetic_tile,
    "mpdd": load_mpdd,
    "mvtec": load_mvtec_ad,
    "piped": load_piped,
    "realiad": load_realiad,
    "screw": load_screw,
    "synthetic": draw_synthetic,
    "visa": load_visa,
}


def load(name_or_path: str | Path, **options: Any) -> Dataset:
    """A data set by its name, or from a folder whose layout is recognised.

    A folder with test/TYPE (or with sub-folders that have it) is read in MVTec layout, one with normal/ or defect/, or
    with good/ or ok/ beside bad/, defective/ or nok/, as labelled, one with good/ or ok/ beside other folders as sorted
    into kinds, any other as unlabelled images. A known name wins over a folder of that name: write "./cookie" for the
    latter.

    Args:
        name_or_path: "cookie", "elpv", "magnetic_tile", "screw", "synthetic"; "btad", "mpdd", "mvtec", "piped",
            "realiad" or "visa", which need a category; or a folder.
        **options: Passed to the loader: its parameters by name.

    Raises:
        InputError: The name is unknown, or the folder is missing or incomplete.
        ParameterError: The loader has no such option.

    >>> load("synthetic", n_normal=3, n_anomalous=1).truth.labels.tolist()
    [0, 0, 0, 1]
    """
    label, loader = _find_loader(name_or_path)
    known = inspect.signature(loader).parameters
    for option in options:
        if option not in known:
            raise ParameterError(unknown_name(f"option of {label}", option, known))
    category = known.get("category")
    if category is not None and category.default is category.empty and "category" not in options:
        raise ParameterError(
            f"The data set {name_or_path} needs a category: {', '.join(CATEGORIES[str(name_or_path)])}."
        )
    return loader(**options)


def _find_loader(name_or_path: str | Path) -> tuple[str, Callable[..., Dataset]]:
    if isinstance(name_or_path, str) and name_or_path in _LOADERS:
        return f"the data set {name_or_path}", _LOADERS[name_or_path]
    root = Path(name_or_path)
    if isinstance(name_or_path, str) and not root.exists() and len(root.parts) == 1 and root.name == name_or_path:
        raise InputError(f"{unknown_name('data set', name_or_path, _LOADERS)} It is no folder either.")
    if is_mvtec(root):
        return "the MVTec layout", partial(load_mvtec, root)
    if is_labelled(root):
        return "the labelled layout", partial(load_labelled, root)
    if is_sorted(root):
        return "the layout of one folder per kind", partial(load_sorted, root)
    return "an unlabelled folder", partial(load_unlabelled, root)
