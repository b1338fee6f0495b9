"""A benchmark as data: what a TOML file asks for, the cells that follow from it, and how long they take.

    config = read_config("table1.toml")
    cells = plan(config)

`flawsift.benchmark.runner` runs them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from flawsift.benchmark.rows import Row
from flawsift.datasets.realiad import ALPHAS as FUIAD_ALPHAS
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import make_detector
from flawsift.errors import ParameterError, unknown_name
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.screening.options import PRESETS, ScreenOptions

BY_PRESET = "preset"  # the screener that each preset of stage 1 has of its own
NONE, ORACLE = "none", "oracle_clean"  # presets without a selection: all images, and all that are labelled normal
PROTOCOLS = ("no_overlap", "overlap", "official")
# a row's place in tables
ADDRESS = ("data", "category", "detector", "alpha", "protocol", "n_subsets", "seed", "preset")
SIZES = ("n_train", "test_normal", "test_anomalous")  # of `flawsift.data.contamination.contaminate`


def options_of(preset: str, n_subsets: int | None = None) -> ScreenOptions:
    """The options of stage 1 of a preset; "none" and "oracle_clean" have none and get the default's.

    Raises:
        ParameterError: There is no such preset.
    """
    if preset not in (NONE, ORACLE, *PRESETS):
        raise ParameterError(unknown_name("preset of stage 1", preset, (NONE, ORACLE, *PRESETS)))
    options = PRESETS[preset if preset in PRESETS else "default"]
    return options if n_subsets is None else replace(options, n_subsets=n_subsets)


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Arguments of `flawsift.features.backbones.load_backbone`."""

    name: str = "efficientnet_lite0"
    size: int = 256
    weights: str | None = None
    runtime: str = "auto"

    def load(self) -> Backbone:
        """The backbone; see `flawsift.features.backbones.load_backbone`."""
        return load_backbone(self.name, weights=self.weights, size=self.size, runtime=self.runtime)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """A data set of the grid.

    Attributes:
        name: A name for `flawsift.datasets.load`, or a folder.
        categories: Those to run; () for a set without categories.
        protocols: Those to run; () for those of the grid.
        sizes: Pairs of name and value, of `SIZES`: as for `flawsift.data.contamination.contaminate`, whose defaults the
            others have. They are not read by the official protocol.
        options: Pairs of name and value: further options of the loader.
    """

    name: str
    categories: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    sizes: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """A detector of the grid.

    Attributes:
        label: Its name in tables.
        name: Its registry name.
        preset: Of the detector.
        params: Hyper-parameters above the preset's, as JSON.
        backbone: What it reads.
    """

    label: str
    name: str
    preset: str = "default"
    params: str = "{}"
    backbone: BackboneSpec = BackboneSpec()

    def make(self, seed: int) -> Detector:
        """The unfitted detector."""
        return make_detector(self.name, self.preset, **{**json.loads(self.params), "seed": seed})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A benchmark; `read_config` says what each setting means."""

    data: tuple[DataSpec, ...]
    detectors: tuple[DetectorSpec, ...]
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    seeds: tuple[int, ...] = (0, 1, 2)
    presets: tuple[str, ...] = (NONE, "paper", "default", ORACLE)
    protocols: tuple[str, ...] = ("no_overlap",)
    subsets: tuple[int | None, ...] = (None,)
    device: str = "auto"
    executor: str = "serial"
    fan_out: str = "cells"
    examples: int = 3
    screener: str = BY_PRESET
    calibrate: bool = True


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training set and one detector.

    Attributes:
        data: The data set.
        category: Its category, or "".
        detector: The detector.
        alpha: Contamination asked for.
        protocol: How the training set was contaminated.
        n_subsets: k, or None for each preset's own.
        seed: Of split, partition and detector.
        presets: Of stage 1.
    """

    data: DataSpec
    category: str
    detector: DetectorSpec
    alpha: float
    protocol: str
    n_subsets: int | None
    seed: int
    presets: tuple[str, ...]

    def place(self, preset: str) -> tuple[str, ...]:
        """Where a row of this cell stands in tables, as texts in the order of `ADDRESS`."""
        k = "" if self.n_subsets is None else str(self.n_subsets)
        alpha, seed = f"{self.alpha:.6g}", str(self.seed)
        return (self.data.name, self.category, self.detector.label, alpha, self.protocol, k, seed, preset)

    @property
    def address(self) -> Row:
        """The columns that say which cell this is."""
        return dict(zip(ADDRESS[:-1], self.place("")[:-1], strict=True))


def plan(config: Config) -> list[Cell]:
    """All cells in the order they run: what shares features stands together.

    The official protocol has the contaminations that a set was published with: those of FUIAD for Real-IAD, else 0.
    """
    cells = []
    for data in config.data:
        published = FUIAD_ALPHAS if data.name == "realiad" else (0.0,)
        for category, protocol in product(data.categories or ("",), data.protocols or config.protocols):
            alphas = [a for a in config.alphas if protocol != "official" or a in published]
            for detector, alpha, k, seed in product(config.detectors, alphas, config.subsets, config.seeds):
                cell = Cell(
                    data=data,
                    category=category,
                    detector=detector,
                    alpha=float(alpha),
                    protocol=protocol,
                    n_subsets=k,
                    seed=seed,
                    presets=config.presets,
                )
                cells.append(cell)
    return cells


def done_places(rows: Sequence[Mapping[str, str]], commit: str | None = None) -> set[tuple[str, ...]]:
    """Places that have a row without an error, of one commit unless it is None."""
    good = [r for r in rows if not r.get("error") and commit in (None, r.get("commit"))]
    return {tuple(r.get(key, "") for key in ADDRESS) for r in good}


def estimate_seconds(cells: Sequence[Cell], rows: Sequence[Mapping[str, str]]) -> tuple[float, int]:
    """(seconds that these cells take by earlier rows, cells that no earlier row tells about).

    A cell takes what the same detector took on the same data, else on any data, on average.
    """
    earlier: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.get("seconds_cell") and not row.get("error"):
            for key in ((row["detector"], row["data"]), (row["detector"],)):
                earlier.setdefault(key, []).append(float(row["seconds_cell"]))
    total, unknown = 0.0, 0
    for cell in cells:
        seconds = earlier.get((cell.detector.label, cell.data.name)) or earlier.get((cell.detector.label,))
        total += float(np.mean(seconds)) if seconds else 0.0
        unknown += not seconds
    return total, unknown


def describe_plan(config: Config, cells: Sequence[Cell], n_all: int, seconds: float, n_unknown: int) -> list[str]:
    """The plan for people: how many cells of what, and how long they take."""
    lines = [f"{len(cells)} of {n_all} cells to run, {len(config.presets)} presets each: {', '.join(config.presets)}."]
    counts = Counter(
        f"{cell.data.name}{'/' if cell.category else ''}{cell.category}, {cell.protocol}, {cell.detector.label}"
        for cell in cells
    )
    lines += [f"  {where}: {n} cells" for where, n in counts.items()]
    hours, minutes = divmod(round(seconds / 60), 60)
    duration = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    if n_unknown < len(cells):
        lines.append(f"About {duration} by earlier rows, one cell after the other.")
    if n_unknown:
        lines.append(f"No earlier row tells how long {n_unknown} of the cells take.")
    return lines
