"""Many trials from one file: detectors x data sets x contamination x protocol x presets of stage 1 x seeds, as rows.

    run(read_config("table1.toml"), "results")  # results/results.csv, one row per cell of the grid and preset

A cell is everything that shares a training set and sub-models; its presets differ in what they keep of it. Each row
has a `key` made of all that decides its figures (contents of images and labels, weights, parameters, protocol, seed,
versions), so a run that was killed or extended goes on where it was. A cell that fails leaves a row that says why.
"""

import contextlib
import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flawsift.benchmark.grid import NONE, ORACLE, BackboneSpec, Cell, Config, DataSpec, options_of, plan
from flawsift.benchmark.rows import Row, append_rows, machine, peak_mb, read_rows, source_commit
from flawsift.benchmark.trial import Trial, screener_of
from flawsift.data.contamination import contaminate, official
from flawsift.data.images import ImageSet
from flawsift.data.splits import Split
from flawsift.data.truth import GroundTruth, files_of
from flawsift.datasets import Dataset, load
from flawsift.detectors.base import Detector
from flawsift.errors import FlawsiftError
from flawsift.executors import SERIAL, Executor, Run, Serial, make_executor
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.files import ensure_folder, write_bytes
from flawsift.models.model import Model, set_digest
from flawsift.models.provenance import versions
from flawsift.progress import Progress, Stage, silent
from flawsift.types import Ids
from flawsift.workers import Failure

RESULTS = "results.csv"
MAPS = "maps"  # folder of the examples' anomaly maps beside the rows; no picture is in it


@dataclass(frozen=True, eq=False)
class Prepared:
    """A category with features attached, and the backbone."""

    images: ImageSet
    truth: GroundTruth
    dataset: Dataset
    backbone: Backbone
    data_digest: str
    truth_digest: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """What `prepare` needs; equal sources are prepared once."""

    data: DataSpec
    category: str
    alpha: float | None  # of a split file; None where the file is the same for all
    backbone: BackboneSpec
    layers: tuple[str, ...]
    store: Path


@functools.lru_cache(maxsize=2)  # cells that share features stand together
def prepare(source: Source) -> Prepared:
    """Load a category and attach the features that its detectors read; labelled images that can be used only.

    Anomalous images without a mask are left out of sets with masks, since AUPRO needs one of each.
    """
    options = dict(source.data.options)
    if source.category:
        options["category"] = source.category
    if source.alpha is not None:
        options["alpha"] = source.alpha
    dataset = load(source.data.name, **options)
    backbone = source.backbone.load()
    truth = dataset.truth
    if truth.masks:
        truth = truth.select(truth.ids[(truth.labels == 0) | np.isin(truth.ids, list(truth.masks))])
    wanted = dataset.images.select(truth.ids)
    images, _ = attach(wanted, backbone, source.layers, store=FeatureStore(source.store))
    truth = truth.select(images.ids)
    there = set(images.ids.tolist())
    groups = sorted((i, group) for i, group in images.groups.items() if i in there)
    labels = [
        truth.labels.tolist(),
        list(truth.defect_types),
        groups,
        [_mask_digest(truth, i) for i in sorted(truth.masks)],
    ]
    return Prepared(
        images,
        truth,
        dataset.select(images.ids),
        backbone,
        set_digest(images),
        hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
    )


def _mask_digest(truth: GroundTruth, id_: int) -> str:
    mask = truth.masks[id_]
    content = mask.tobytes() if isinstance(mask, np.ndarray) else b"".join(f.read_bytes() for f in files_of(mask))
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a cell gives: rows, and the maps of its examples by row key."""

    rows: list[Row]
    maps: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Runner:
    """Runs a cell, here or in a worker.

    Attributes:
        sources: Where each cell's data come from.
        done: Keys of rows that need not be made again.
        device: Where detectors run.
        executor: Where sub-models run.
        examples: Images of each category whose maps are kept, of the first seed.
        first_seed: That seed.
        screener: Detector of stage 1, as for `compare`.
        calibrate: As for `compare`.
    """

    sources: Mapping[Cell, Source]
    done: frozenset[str]
    device: str
    executor: Executor
    examples: int
    first_seed: int
    screener: str
    calibrate: bool

    def warm(self, source: Source) -> None:
        """Compute the features of a source."""
        prepare(source)

    def warm_all(self, executor: Executor, progress: Progress) -> None:
        """Compute the features of all sources, so that no two workers do; one process alone gets there by itself."""
        if not isinstance(executor, Serial):
            progress(Stage.LOOKING, 0, 1)
            # a source that cannot be prepared fails again in its cells, which say so
            for _ in executor.completed(self.warm, list(dict.fromkeys(self.sources.values()))):
                pass

    def __call__(self, cell: Cell) -> Outcome:
        started = time.perf_counter()
        ready = prepare(self.sources[cell])
        split, train, test = _split(cell, ready)
        detector = cell.detector.make(cell.seed)
        if detector.views:  # of the training images only: nothing else is augmented
            store = FeatureStore(self.sources[cell].store)
            train, _ = attach(train, ready.backbone, detector.layers, views=detector.views, store=store)
        keys = {preset: _key(cell, preset, ready, detector, self) for preset in cell.presets}
        missing = [preset for preset in cell.presets if keys[preset] not in self.done]
        if not missing:
            return Outcome([])
        maps: dict[str, dict[str, npt.NDArray[Any]]] = {}
        shown = _example_ids(test, ready.truth, self.examples) if cell.seed == self.first_seed else test.ids[:0]

        def keep_maps(preset: str, model: Model) -> None:
            if len(shown):
                maps[keys[preset]] = _example_maps(model, test.select(shown), self.device)

        trial = Trial(
            train=train,
            test=test,
            truth=ready.truth,
            detector=detector,
            backbone=ready.backbone,
            run=Run(seed=cell.seed, device=self.device, executor=self.executor),
            n_subsets=cell.n_subsets,
            screener=self.screener,
            calibrate=self.calibrate,
        )
        rows = trial.rows(missing, keep_maps)
        common = {
            "data_digest": ready.data_digest,
            "weights_digest": ready.backbone.weights_digest,
            "backbone": ready.backbone.key,
            "method": cell.detector.name,
            "params": detector.params(),
            "n_train": len(train),
            "n_test": len(test),
            "grouped": int(bool(train.groups)),
            "alpha_reached": split.alpha_reached,
            "alpha_groups": split.alpha_groups,
            "n_threads": torch.get_num_threads(),
            "seconds_cell": time.perf_counter() - started,
            "peak_mb": peak_mb(),
        }
        return Outcome([{**common, **row, "key": keys[row["preset"]]} for row in rows], maps)


def _split(cell: Cell, ready: Prepared) -> tuple[Split, ImageSet, ImageSet]:
    data, truth, groups = ready.dataset, ready.truth, ready.images.groups
    if cell.protocol == "official":
        split = official(truth, data.train_ids, data.test_ids, alpha=cell.alpha, groups=groups)
    else:
        published = data.test_ids if len(data.test_ids) else None
        split = contaminate(
            truth,
            alpha=cell.alpha,
            official_test=published,
            overlap=cell.protocol == "overlap",
            groups=groups,
            seed=cell.seed,
            **dict(cell.data.sizes),
        )
    return split, ready.images.select(split.train_ids), ready.images.select(split.test_ids)


def _key(cell: Cell, preset: str, ready: Prepared, detector: Detector, runner: Runner) -> str:
    """All that decides the figures of a row, in 16 hex digits."""
    screener = None
    if preset not in (NONE, ORACLE):
        screener = screener_of(preset, runner.screener, detector, ready.backbone, cell.seed)
    options = options_of(preset, cell.n_subsets).as_json()
    del options["screener"]  # named beside it, as it was resolved
    decides = [
        ready.data_digest,
        ready.truth_digest,
        ready.backbone.key,
        ready.backbone.weights_digest,
        [detector.name, detector.params()],
        [cell.alpha, cell.protocol, cell.data.sizes if cell.protocol != "official" else None, cell.seed],
        [preset, options, runner.calibrate, screener and [screener.name, screener.params()]],
        versions(),
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _example_ids(test: ImageSet, truth: GroundTruth, n: int) -> Ids:
    """Anomalous test images with a mask, of as many defect types as there are; the same for every detector."""
    known = truth.select(test.ids)
    by_type: dict[str, list[int]] = {}
    for id_, kind in zip(known.ids.tolist(), known.defect_types, strict=True):
        if id_ in known.masks:
            by_type.setdefault(kind, []).append(id_)
    queues = [ids for _, ids in sorted(by_type.items())]
    chosen = [ids[turn] for turn in range(max(map(len, queues), default=0)) for ids in queues if turn < len(ids)]
    return np.array(chosen[:n], np.int64)


def _example_maps(model: Model, images: ImageSet, device: str) -> dict[str, npt.NDArray[Any]]:
    scores, grids = model.detector.predict_patch_maps(images, device=device)
    threshold = model.threshold()
    held_out = model.calibration.scores
    low = float(np.median(held_out)) if len(held_out) else 0.0
    top = threshold.value if threshold is not None else float("nan")
    return {"ids": images.ids, "scores": scores, "grids": grids.half().numpy(), "scale": np.array([low, top])}


def run(
    config: Config,
    folder: str | Path,
    *,
    store: FeatureStore | None = None,
    executor: Executor | None = None,
    fresh: bool = False,
    any_commit: bool = False,
    progress: Progress = silent,
    on_cell: Callable[[Cell, list[Row]], object] | None = None,
) -> list[Row]:
    """Fill `folder/results.csv`, cell by cell.

    Args:
        config: The grid.
        folder: For the rows, and the anomaly maps of the report's examples.
        store: Where features are cached; the default cache unless given.
        executor: Where cells or sub-models run; None for the config's.
        fresh: Make rows again that are there.
        any_commit: Take rows of other commits of flawsift for done.
        progress: Told about each cell.
        on_cell: Called with each cell and its new rows.

    Returns:
        The new rows, those of failed cells among them (their `error` says why).

    Raises:
        OutputError: The folder cannot be written.
    """
    folder = ensure_folder(folder)
    commit = source_commit()
    cells = plan(config)
    executor = make_executor(config.executor) if executor is None else executor
    by_cells = config.fan_out == "cells"
    earlier = [] if fresh else read_rows(folder / RESULTS, ["key"])
    runner = Runner(
        sources=_sources(config, cells, (store or FeatureStore()).root.resolve()),
        done=frozenset(
            row["key"] for row in earlier if not row.get("error") and (any_commit or row.get("commit") == commit)
        ),
        device=config.device,
        executor=SERIAL if by_cells else executor,
        examples=config.examples,
        first_seed=config.seeds[0],
        screener=config.screener,
        calibrate=config.calibrate,
    )
    outer = executor if by_cells else SERIAL
    origin = {"commit": commit, "machine": machine(), "versions": versions()}
    new: list[Row] = []
    runner.warm_all(outer, progress)
    progress(Stage.CELLS, 0, len(cells))
    for number, (position, outcome) in enumerate(outer.completed(runner, cells)):
        cell = cells[position]
        rows = _written(folder, cell, outcome, origin)
        new += rows
        progress(Stage.CELLS, number + 1, len(cells))
        if on_cell is not None:
            on_cell(cell, rows)
    return new


def _written(folder: Path, cell: Cell, outcome: Outcome | Failure, origin: Row) -> list[Row]:
    """The rows and maps of a cell, on disk; those of one that failed say why."""
    if isinstance(outcome, Failure):
        kind = "" if isinstance(outcome.error, FlawsiftError) else f"{type(outcome.error).__name__}: "
        text = " ".join(f"{kind}{outcome.error}".split())
        outcome = Outcome([{"preset": preset, "error": text} for preset in cell.presets])
    for key, arrays in outcome.maps.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its keywords are arrays
        write_bytes(ensure_folder(folder / MAPS) / f"{key}.npz", buffer.getvalue())
    rows = [{**origin, **cell.address, **row} for row in outcome.rows]
    append_rows(folder / RESULTS, rows)
    return rows


def _sources(config: Config, cells: Sequence[Cell], store: Path) -> dict[Cell, Source]:
    """Where each cell's data come from; detectors on one backbone share one pass through it."""
    layers: dict[BackboneSpec, dict[str, None]] = {}
    for spec in dict.fromkeys(cell.detector for cell in cells):
        read = layers.setdefault(spec.backbone, {})
        read.update(dict.fromkeys(spec.make(0).layers))
        with contextlib.suppress(FlawsiftError):  # a backbone that cannot be had: the cells say so
            backbone = spec.backbone.load()
            for preset in set(config.presets) - {NONE, ORACLE}:
                screener = screener_of(preset, config.screener, spec.make(0), backbone, 0)
                read.update(dict.fromkeys(screener.layers))
    return {
        cell: Source(
            data=cell.data,
            category=cell.category,
            alpha=_file_alpha(cell),
            backbone=cell.detector.backbone,
            layers=tuple(layers[cell.detector.backbone]),
            store=store,
        )
        for cell in cells
    }


def _file_alpha(cell: Cell) -> float | None:
    """Real-IAD has a split file for each contamination; other protocols start from the clean one."""
    if cell.data.name != "realiad":
        return None
    return cell.alpha if cell.protocol == "official" else 0.0
