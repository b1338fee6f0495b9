"""A benchmark as data: what a TOML file asks for, the cells that follow from it, and how long they take.

config = read_config("table1.toml")
cells = plan(config)
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from flawsift.benchmark.rows import Row
from flawsift.datasets import CATEGORIES
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.datasets.realiad import ALPHAS as FUIAD_ALPHAS
from flawsift.detectors.base import Detector, detector_class, make_detector
from flawsift.errors import InputError, ParameterError, unknown_name
from flawsift.executors import make_executor
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.paths import show
from flawsift.screening.options import OWN, PRESETS, ScreenOptions

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
        n_train, test_normal, test_anomalous: As for `flawsift.data.contamination.contaminate`; () for its defaults.
            They are not read by the official protocol.
        options: Further options of the loader.
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
    """A benchmark; see `read_config`."""

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
        ours = (self.data.name, self.category, self.detector.label, f"{self.alpha:.6g}", self.protocol, k)
        return (*ours, str(self.seed), preset)

    @property
    def address(self) -> Row:
        """The columns that say which cell this is."""
        return dict(zip(ADDRESS[:-1], self.place("")[:-1], strict=True))


def read_config(path: str | Path) -> Config:
    """Read a benchmark from a TOML file.

    Top level: `alphas`, `seeds`, `presets` (none, oracle_clean, paper, default, ...), `protocols` (no_overlap, overlap,
    official), `subsets` (values of k; empty for the presets' own), `device`, `executor` (as for `--executor`),
    `fan_out` ("cells" or "submodels": what the executor gets), `examples` (pictures per category in the report),
    `screener` and `calibrate` (as for `flawsift.benchmark.trial.compare`).
    Tables: `backbone` (name, size, weights, runtime); `[[data]]` (name, categories, protocols, n_train, test_normal,
    test_anomalous, and options of its loader); `[[detectors]]` (name, label, preset, params, backbone).

    Raises:
        InputError: The file cannot be read or is not TOML.
        ParameterError: A key is unknown, or a value is of the wrong type or out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The benchmark '{show(path)}' cannot be read: {error}") from error
    return parse_config(content)


def parse_config(content: Mapping[str, Any]) -> Config:
    """A benchmark from the content of its file; see `read_config`."""
    _known("benchmark", content, [*(f.name for f in fields(Config)), "backbone"])
    backbone = _backbone(content.get("backbone", {}))
    data = tuple(_data(d) for d in _tables(content, "data"))
    detectors = tuple(_detector(d, backbone) for d in _tables(content, "detectors"))
    _distinct("data sets", [d.name for d in data])
    _distinct("detectors", [d.label for d in detectors])
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    given = {k: v for k, v in plain.items() if k not in ("backbone", "data", "detectors")}
    if given.get("subsets") == ():
        del given["subsets"]
    for name, value in given.items():
        wanted: Any = Config.__dataclass_fields__[name].default
        if type(value) is not type(wanted):
            raise ParameterError(f"benchmark: {name} must be a {_kind(wanted)}, got {value!r}.")
    config = Config(data=data, detectors=detectors, **given)  # type: ignore[arg-type]  # checked just above
    _check(config)
    return config


def _check(config: Config) -> None:
    for preset in config.presets:
        options_of(preset)
    for protocol in (*config.protocols, *(p for d in config.data for p in d.protocols)):
        if protocol not in PROTOCOLS:
            raise ParameterError(unknown_name("protocol", protocol, PROTOCOLS))
    if config.fan_out not in ("cells", "submodels"):
        raise ParameterError(f"benchmark: fan_out must be 'cells' or 'submodels', got '{config.fan_out}'.")
    checks = {
        "alphas": ([isinstance(a, float | int) and 0 <= a < 1 for a in config.alphas], "numbers in [0, 1)"),
        "seeds": ([isinstance(s, int) and s >= 0 for s in config.seeds], "whole numbers from 0"),
        "subsets": ([k is None or (isinstance(k, int) and k >= 2) for k in config.subsets], "whole numbers from 2"),
    }
    for name, (holds, what) in checks.items():
        values = list(getattr(config, name))
        if not values or not all(holds):
            raise ParameterError(f"benchmark: {name} must be {what}, got {values}.")
        _distinct(name, [str(v) for v in values])
    make_executor(config.executor)
    if config.screener not in (BY_PRESET, OWN):
        detector_class(config.screener)
    for spec in config.detectors:
        spec.make(0)  # bad parameters are told now, not after hours


def _tables(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = content.get(name)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) and "name" in t for t in tables):
        raise ParameterError(f"benchmark: give at least one table [[{name}]] with a name.")
    return tables


def _data(table: dict[str, Any]) -> DataSpec:
    name = table["name"]
    given = table.get("categories", [])
    categories = CATEGORIES.get(name, ()) if given == "all" or (name in CATEGORIES and not given) else tuple(given)
    sizes = tuple((k, table[k]) for k in SIZES if k in table)
    own = {"name", "categories", "protocols", *SIZES}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k not in own}
    base = os.environ.get(DATA_VARIABLE)
    if name in (*CATEGORIES, "cookie", "magnetic_tile") and base and "root" not in options:
        options["root"] = str(Path(base, name).resolve())  # workers may have another environment
    return DataSpec(
        name=name,
        categories=categories,
        protocols=tuple(table.get("protocols", ())),
        sizes=sizes,
        options=tuple(sorted(options.items())),
    )


def _detector(table: dict[str, Any], default: BackboneSpec) -> DetectorSpec:
    _known("detector", table, ["name", "label", "preset", "params", "backbone"])
    cls = detector_class(table["name"])
    backbone = _backbone({**vars(default), **table["backbone"]}) if "backbone" in table else default
    return DetectorSpec(
        label=table.get("label", table["name"]),
        name=cls.name,
        preset=table.get("preset", "default"),
        params=json.dumps(table.get("params", {}), sort_keys=True),
        backbone=backbone,
    )


def _backbone(table: Mapping[str, Any]) -> BackboneSpec:
    _known("backbone", table, [f.name for f in fields(BackboneSpec)])
    return BackboneSpec(**table)


def _known(what: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in table:
        if key not in names:
            raise ParameterError(unknown_name(f"key of a {what}", key, names))


def _distinct(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ParameterError(f"benchmark: {what} must be distinct, got {', '.join(names)}. Give each a label or name.")


def _kind(value: object) -> str:
    return {tuple: "list", str: "text", int: "whole number", bool: "truth value"}[type(value)]


def plan(config: Config) -> list[Cell]:
    """All cells in the order they run: what shares features stands together.

    The official protocol has the contaminations that a set was published with: those of FUIAD for Real-IAD, else 0.
    """
    cells = []
    for data in config.data:
        for category in data.categories or ("",):
            for protocol in data.protocols or config.protocols:
                published = FUIAD_ALPHAS if data.name == "realiad" else (0.0,)
                alphas = [a for a in config.alphas if protocol != "official" or a in published]
                for detector in config.detectors:
                    for alpha in alphas:
                        for k in config.subsets:
                            for seed in config.seeds:
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
    near: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.get("seconds_cell") and not row.get("error"):
            for key in ((row["detector"], row["data"]), (row["detector"],)):
                near.setdefault(key, []).append(float(row["seconds_cell"]))
    total, unknown = 0.0, 0
    for cell in cells:
        known = near.get((cell.detector.label, cell.data.name)) or near.get((cell.detector.label,))
        total += float(np.mean(known)) if known else 0.0
        unknown += not known
    return total, unknown


def describe_plan(config: Config, cells: Sequence[Cell], n_all: int, seconds: float, n_unknown: int) -> list[str]:
    """The plan for people: how many cells of what, and how long they take."""
    lines = [f"{len(cells)} of {n_all} cells to run, {len(config.presets)} presets each: {', '.join(config.presets)}."]
    counts: dict[tuple[str, str, str], int] = {}
    for cell in cells:
        name = f"{cell.data.name}/{cell.category}" if cell.category else cell.data.name
        key = (name, cell.protocol, cell.detector.label)
        counts[key] = counts.get(key, 0) + 1
    lines += [f"  {name}, {protocol}, {label}: {n} cells" for (name, protocol, label), n in counts.items()]
    hours, minutes = divmod(round(seconds / 60), 60)
    told = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    if n_unknown < len(cells):
        lines.append(f"About {told} by earlier rows, one cell after the other.")
    if n_unknown:
        lines.append(f"No earlier row tells how long {n_unknown} of the cells take.")
    return lines
