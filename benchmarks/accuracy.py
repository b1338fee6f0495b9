"""What screening is worth on real images: detectors trained on contaminated sets, with and without stage 1.

Arms: all_data (no screening), paper and default (the presets of stage 1), oracle_clean (the training set less its
anomalies: what a perfect screening would give). The detector has its default parameters in every arm, or its budget
preset where it has one. Arms with the same screener, subsets and partitions share sub-models. Thresholds come from
held-out scores of the images that are trained on, as `flawsift.benchmark.trial.Trial` has them.
Anomalous images without a mask are left out of sets with masks, since AUPRO needs one of each.

Finished cells are rows already and are skipped, so a killed run goes on where it was.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import _rows
from _rows import CONFIRMATION, DEVELOPMENT
from flawsift.benchmark.trial import Trial
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.datasets import CATEGORIES, Dataset, load
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import DETECTORS, detector_class, make_detector
from flawsift.errors import InputError
from flawsift.executors import Run
from flawsift.features.backbones import Backbone, fitting_size, load_backbone, typical_picture
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models.model import set_digest
from flawsift.screening.options import PRESETS

# sizes that allow alpha 0 to 0.4 for every seed; see flawsift.data.contamination
SIZES: dict[str, dict[str, Any]] = {
    "magnetic_tile": {"n_train": 450},
    "elpv": {"n_train": 400, "test_normal": 200, "test_anomalous": 200},
    "cookie": {"n_train": 30},
    "screw": {},
    **{f"piped/{paper}": {} for paper in CATEGORIES["piped"]},
}
ALPHAS = (0.0, 0.1, 0.2, 0.4)
MAIN = ("patchcore", "padim")  # what is run unless others are asked for
ARMS = ("all_data", "paper", "default", "oracle_clean")
PRESET_OF = {arm: "none" if arm == "all_data" else arm for arm in ARMS}  # as `flawsift.benchmark.trial` calls it
SECONDS = ("seconds_stage2", "seconds_evaluate")
LAYERS = ("stride4", "stride8", "stride16")  # what the detectors read
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
RATES = ("false_alarms_per_100", "missed_per_100", "hits_per_100")
KEY = ("commit", "data", "detector", "alpha", "seed", "arm")
OVERLAP = ", overlap"  # at the end of a row's protocol


def load_set(name: str) -> Dataset | None:
    """A data set under this name, or None with a message when it is not on this machine; SET/CATEGORY names a part."""
    fallback = _rows.ROOT.parent / "shared" / "data"
    if not os.environ.get(DATA_VARIABLE) and fallback.is_dir():
        os.environ[DATA_VARIABLE] = str(fallback)
    set_name, _, category = name.partition("/")
    try:
        data = replace(load(set_name, **({"category": category} if category else {})), name=name)
    except InputError as error:
        _rows.say(f"{name} is skipped: {error}")
        return None
    if not data.truth.masks:
        return data
    usable = (data.truth.labels == 0) | np.isin(data.truth.ids, list(data.truth.masks))
    return data.select(data.truth.ids[usable])


def loaded_sets(
    names: Sequence[str], backbone: Backbone, cache: Path | None
) -> Iterator[tuple[str, Dataset, ImageSet]]:
    """Each set that is on this machine, with its name and its images' features; None caches them for this run only."""
    with contextlib.ExitStack() as stack:
        scratch = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flawsift-bench-")))
        for name in names:
            data = load_set(name)
            if data is not None:
                yield name, data, attach(data.images, backbone, LAYERS, store=FeatureStore(scratch))[0]


def cell_of(
    data: Dataset, images: ImageSet, backbone: Backbone, detector: Detector, alpha: float, seed: int
) -> _rows.Row:
    """What every row says of where it was measured."""
    return {
        **_rows.provenance(),
        "data": data.name,
        "data_digest": set_digest(images),
        "weights_digest": backbone.weights_digest,
        "backbone": backbone.key,
        "detector": detector.name,
        "params": detector.params(),
        "alpha": alpha,
        "seed": seed,
    }


def protocol_of(train: ImageSet, test: ImageSet) -> str:
    """How a set was split, for people."""
    return f"share, {len(train)} train, {len(test)} test" + (", by group" if train.groups else "")


class Combination(NamedTuple):
    """A detector, a contamination and a seed, and the arms to run of it."""

    detector: str
    alpha: float
    seed: int
    arms: list[str]


def run_cell(
    data: Dataset,
    images: ImageSet,
    backbone: Backbone,
    combination: Combination,
    *,
    overlap: bool,
    calibrate: bool,
    store: FeatureStore,
) -> list[_rows.Row]:
    """The rows of some arms of one contaminated set."""
    name, alpha, seed, arms = combination
    split = contaminate(data.truth, alpha=alpha, overlap=overlap, groups=images.groups, seed=seed, **SIZES[data.name])
    train, test = images.select(split.train_ids), images.select(split.test_ids)
    detector = make_detector(name, "budget" if "budget" in detector_class(name).presets else "default", seed=seed)
    if detector.views:
        train, _ = attach(train, backbone, LAYERS, views=detector.views, store=store)
    common = {
        **cell_of(data, images, backbone, detector, alpha, seed),
        "protocol": protocol_of(train, test) + (OVERLAP if overlap else ""),
        "alpha_reached": split.alpha_reached,
        "alpha_groups": split.alpha_groups,
    }
    presets = [PRESET_OF[arm] for arm in arms]
    rows = []
    trial = Trial(
        train=train,
        test=test,
        truth=data.truth,
        detector=detector,
        backbone=backbone,
        run=Run(seed=seed),
        calibrate=calibrate,
    )
    results = trial.rows(presets)
    for arm, measured in zip(arms, results, strict=True):
        row = {**common, "arm": arm, **{key: measured[key] for key in (*METRICS, *RATES, *SECONDS)}}
        row |= {
            "keep_share": measured["keep_share"],
            "alpha_kept": measured["alpha_kept"],
            "rejected_patches": measured["rejected_patches"],
            "peak_mb": _rows.peak_mb(),
        }
        if arm in PRESETS:
            row |= {key: measured[key] for key in ("screener", "seconds_stage1", "stage1_auroc")}
        if arm == "default":
            row |= {key: measured.get(key) for key in ("alpha_hat", "alpha_low", "alpha_high")}  # of few images, none
        rows.append(row)
    return rows


def main() -> None:
    """Fill the table, then print it."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    where = f"default: all; choices are made on {', '.join(DEVELOPMENT)}, and confirmed on {', '.join(CONFIRMATION)}"
    parser.add_argument("--sets", nargs="+", default=list(SIZES), choices=list(SIZES), help=where)
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--detectors", nargs="+", default=list(MAIN), choices=list(DETECTORS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--overlap", action="store_true", help="training anomalies stay in the test set, too")
    parser.add_argument("--no-calibrate", action="store_true", help="cross-fit for no rates of false alarms and misses")
    parser.add_argument("--size", type=int, default=256, help="edge length of the network input")
    framed = (
        "fit images into an input of as many pixels with their aspect ratio, as commands do, instead of squeezing them"
    )
    parser.add_argument("--framed", action="store_true", help=framed)
    parser.add_argument("--cache", type=Path, help="folder for features, reused when it exists (default: temporary)")
    parser.add_argument("--fresh", action="store_true", help="run cells again that have rows of this commit")
    args = parser.parse_args()
    path = args.results / "accuracy.csv"
    commit = _rows.commit()
    with contextlib.ExitStack() as stack:
        scratch = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flawsift-bench-")))
        keys = {_run_set(name, FeatureStore(scratch), commit, path, args) for name in args.sets}
    mine = [row for row in _rows.read_rows(path) if row["commit"] == commit and row["backbone"] in keys]
    mine = [row for row in mine if row["protocol"].endswith(OVERLAP) == args.overlap]
    for name in args.sets:
        _print_table(name, [row for row in mine if row["data"] == name], args)
    _rows.finish("accuracy", _figures(mine, args), args)


def _backbone_for(images: ImageSet, args: argparse.Namespace) -> Backbone:
    if not args.framed:
        return load_backbone(size=args.size)
    width, height = typical_picture(images) or (1, 1)
    return load_backbone(size=fitting_size(images, round(args.size * math.sqrt(max(width / height, height / width)))))


def _run_set(name: str, store: FeatureStore, commit: str, path: Path, args: argparse.Namespace) -> str | None:
    """The key of the backbone that looked at the set; None where it is not on this machine."""
    data = load_set(name)
    if data is None:
        return None
    backbone = _backbone_for(data.images, args)
    earlier = [r for r in _rows.read_rows(path) if r["protocol"].endswith(OVERLAP) == args.overlap]
    done = set() if args.fresh else {tuple(r[k] for k in (*KEY, "backbone")) for r in earlier}
    trials = []
    for detector in args.detectors:
        for alpha in args.alphas:
            for seed in args.seeds:
                key = (commit, name, detector, f"{alpha:.6g}", str(seed))
                arms = [arm for arm in args.arms if (*key, arm, backbone.key) not in done]
                if arms:
                    trials.append(Combination(detector, alpha, seed, arms))
    if not trials:
        return backbone.key
    images, failed = attach(data.images, backbone, LAYERS, store=store)
    if failed:
        _rows.say(f"{name}: {len(failed)} images cannot be read")
    for number, trial in enumerate(trials):
        started = time.perf_counter()
        options = {"overlap": args.overlap, "calibrate": not args.no_calibrate, "store": store}
        rows = run_cell(data, images, backbone, trial, **options)
        _rows.append_rows(path, rows)
        shown = "  ".join(f"{row['arm']} {row['image_auroc']:.3f}" for row in rows)
        at = f"[{number + 1}/{len(trials)}] {name} {trial.detector} alpha {trial.alpha:g} seed {trial.seed}"
        _rows.say(f"{at}: {shown}  ({time.perf_counter() - started:.0f} s)")
    return backbone.key


def _values(rows: Sequence[dict[str, str]], metric: str, **where: object) -> list[float]:
    """A metric of the newest row of each seed."""
    chosen = {r["seed"]: r[metric] for r in rows if all(r[k] == str(v) for k, v in where.items())}
    return [float(v) for v in chosen.values() if v]


def _print_table(name: str, rows: Sequence[dict[str, str]], args: argparse.Namespace) -> None:
    for metric in ("image_auroc", "aupro", "pixel_ap", "hits_per_100"):
        for detector in args.detectors:
            if not _values(rows, metric, detector=detector):
                continue
            _rows.say(f"\n{name}, {detector}, {metric}\n{'alpha':>6s}" + "".join(f"{arm:>18s}" for arm in args.arms))
            for alpha in args.alphas:
                cells = [_values(rows, metric, detector=detector, alpha=f"{alpha:.6g}", arm=arm) for arm in args.arms]
                _rows.say(f"{alpha:6g}" + "".join(f"{_mean_sd(values):>18s}" for values in cells))


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return "-"
    sd = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


def _figures(rows: Sequence[dict[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """Mean image AUROC per set, detector, alpha and arm, and of stage 1 over everything."""
    figures: dict[str, float] = {}
    for name in args.sets:
        for detector in args.detectors:
            for alpha in args.alphas:
                for arm in args.arms:
                    where = {"data": name, "detector": detector, "alpha": f"{alpha:.6g}", "arm": arm}
                    if values := _values(rows, "image_auroc", **where):
                        figures[f"{name}_{detector}_{alpha:g}_{arm}"] = statistics.mean(values)
            for arm in ("paper", "default"):
                if values := [float(r["stage1_auroc"]) for r in rows if _is(r, name, detector, arm)]:
                    figures[f"{name}_{detector}_stage1_auroc_{arm}"] = statistics.mean(values)
    return figures


def _is(row: dict[str, str], name: str, detector: str, arm: str) -> bool:
    return (row["data"], row["detector"], row["arm"]) == (name, detector, arm) and bool(row["stage1_auroc"])


if __name__ == "__main__":
    main()
