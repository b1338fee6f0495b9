"""Magnetic tile surfaces: 952 normal and 392 defective grey images of tile regions, five defect types, with masks.

Each region was taken under up to six exposures, so images are not independent: `images.groups` says which belong
together, approximately (269 groups of 1 to 7 images, 6 of them with normal and defective images). Split and screen by
group, or results leak. Masks of "uneven" cover 24 % of the image on average and behave unlike the other types.

Source: Huang, Qiu and Yuan, "Saliency of magnetic tile surface defects", The Visual Computer 36, 2020,
https://github.com/abin24/Magnetic-tile-defect-datasets. (no licence file; academic use). Sort it into the labelled
layout of `flawsift.datasets.folder`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from flawsift.data.images import FileSource
from flawsift.datasets.dataset import Dataset
from flawsift.datasets.folder import load_prepared
from flawsift.errors import InputError
from flawsift.paths import show

SOURCE = "https://github.com/abin24/Magnetic-tile-defect-datasets."
BLANK_MASKS = "empty_masks.txt"  # masks without a defect pixel, relative to the root: the annotation is missing
SUSPECTS = "suspect_normals.txt"  # normal images that may show a defect, relative to the root


def load_magnetic_tile(root: str | Path | None = None, *, drop_suspects: bool = False) -> Dataset:
    """The magnetic tiles; no official split.

    Images whose mask is blank, listed in empty_masks.txt, count as anomalous without a mask.

    Args:
        root: Its folder; by default the folder magnetic_tile in the one that the environment variable FLAWSIFT_DATA
            names.
        drop_suspects: Leave out the files listed in suspect_normals.txt. The other images keep their ids.

    Raises:
        InputError: The folder is missing or incomplete, or a list is needed and missing.
    """
    data = load_prepared("magnetic_tile", root, source=SOURCE)
    assert isinstance(data.images.source, FileSource)
    folder = data.images.source.root
    if (folder / BLANK_MASKS).is_file():
        blank = {folder / name for name in _read_list(folder / BLANK_MASKS)}
        masks = {i: m for i, m in data.truth.masks.items() if m not in blank}
        data = replace(data, truth=replace(data.truth, masks=masks))
    if drop_suspects:
        suspects = _read_list(folder / SUSPECTS)
        data = data.select(data.images.ids[~np.isin(data.images.names, sorted(suspects))])
    return data


def _read_list(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list '{show(path)}' cannot be read: one path relative to the root per line.") from error
    return {line.strip() for line in lines if line.strip()}
