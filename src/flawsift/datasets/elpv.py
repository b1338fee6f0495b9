"""ELPV: 2,624 electroluminescence images of solar cells, 300 x 300 grey, from the PyPI package `elpv-dataset`.

Each cell has a probability of being defective: 0 (1,508 cells), 1/3 (295), 2/3 (106) or 1 (715). There are no masks,
no groups are known although cells of one module resemble each other, and there is no official split.

Source: Buerhop-Lutz et al., "A benchmark for visual identification of defective solar cells in electroluminescence
imagery", EU PVSEC 2018; Deitsch et al., Solar Energy 185, 2019. https://github.com/zae-bayern/elpv-dataset
(CC BY-NC-SA 4.0, hence an optional extra).
"""

import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flawsift.datasets.dataset import NORMAL, Dataset, Entry, from_entries
from flawsift.errors import InputError, ParameterError
from flawsift.paths import name_some, show

DEFECTIVE = "defective"
CELL_TYPES = ("mono", "poly")
AMBIGUOUS = ("drop", "threshold")


class _Cell(NamedTuple):
    file: str
    probability: float
    cell_type: str


def load_elpv(
    *,
    threshold: float = 0.5,
    cell_type: Literal["mono", "poly"] | None = None,
    ambiguous: Literal["drop", "threshold"] = "drop",
) -> Dataset:
    """The solar cells. An id is a cell's row in labels.csv, whatever the options leave out.

    Cells of probability 1/3 and 2/3 are those that the raters were unsure of; they are left out unless asked for, so
    that an evaluation measures the detector and not the raters.

    Args:
        threshold: A cell is anomalous if its probability is larger, in [0, 1).
        cell_type: Only monocrystalline or only polycrystalline cells.
        ambiguous: "drop" leaves out the unsure cells, "threshold" labels them like the others.

    Raises:
        InputError: The package is not installed, or its files are not as expected.
        ParameterError: An option is out of its range.
    """
    if not 0 <= threshold < 1:
        raise ParameterError(f"load_elpv.threshold must be in [0, 1), got {threshold}.")
    if cell_type not in (None, *CELL_TYPES):
        raise ParameterError(f"load_elpv.cell_type must be 'mono', 'poly' or None, got '{cell_type}'.")
    if ambiguous not in AMBIGUOUS:
        raise ParameterError(f"load_elpv.ambiguous must be 'drop' or 'threshold', got '{ambiguous}'.")
    root = _find_data()
    cells = _read_cells(root / "labels.csv")
    absent = [c.file for c in cells if not (root / c.file).is_file()]
    if absent:
        raise InputError(f"{len(absent)} images of elpv-dataset are missing: {name_some(absent)}. Install it again.")
    entries = [Entry(c.file, DEFECTIVE if c.probability > threshold else NORMAL) for c in cells]
    wanted = [
        cell_type in (None, c.cell_type) and (ambiguous == "threshold" or c.probability in (0.0, 1.0)) for c in cells
    ]
    return from_entries("elpv", root, entries).select(np.flatnonzero(wanted))


def _find_data() -> Path:
    # find_spec, not import: the package's own loader decodes all images and needs further packages
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("The data set elpv needs the package elpv-dataset: pip install 'flawsift[demo]'.")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _read_cells(path: Path) -> list[_Cell]:
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [_Cell(file, float(probability), kind) for file, probability, kind in rows]
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{show(path)}' must hold one line 'images/cellNNNN.png probability type' per cell: {error}"
        ) from error
