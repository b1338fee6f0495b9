"""PIPED: plain papers with impurities; six of its 13, 44 to 48 normal and 48 defective images each, with masks.

The images are patches of 128 x 128 pixels, RGB. Names that differ in the last number only seem to be patches of one
sheet; they are no groups here, since nothing published says so.

Source: Bianconi, Ceccarelli, Fernández and Saetta, "A sequential machine vision procedure for assessing paper
impurities", Computers in Industry 65, 2014, https://github.com/bianconif/PIPED (CC BY 4.0). Sort each paper into the
labelled layout of `flawsift.datasets.folder`. The published masks are black where the impurity is: invert them.
"""

from dataclasses import replace
from pathlib import Path

from flawsift.datasets.dataset import Dataset
from flawsift.datasets.folder import load_prepared
from flawsift.datasets.published import SOURCES, require_category


def load_piped(category: str, root: str | Path | None = None) -> Dataset:
    """One paper of PIPED; no official split.

    Args:
        category: The paper, such as "PA_BDP01_TL".
        root: The folder that holds the papers; by default FLAWSIFT_DATA/piped.

    Raises:
        InputError: The paper is unknown, or its folder is missing or incomplete.
    """
    require_category("piped", category)
    folder = None if root is None else Path(root, category)
    data = load_prepared(f"piped/{category}", folder, source=SOURCES["piped"])
    return replace(data, name=category)
