"""What each part of the default screening is worth: PatchCore on contaminated real sets, one part changed at a time.

One stage 1 per cell, by PatchCore with the default preset; every variant selects from its score matrix and maps, and
the final PatchCore, which draws the same patches in all of them, is trained on what is left. Sets, sizes and splits
are those of `accuracy.py`.

Finished cells are rows already and are skipped, so a killed run goes on where it was.
"""

import argparse
import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import _rows
from accuracy import ALPHAS, LAYERS, SIZES, cell_of, load_set
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.robust import robust_units
from flawsift.detectors.registry import make_detector
from flawsift.executors import Run
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, evaluate, set_digest
from flawsift.screening.consensus import keep_lowest, rejected_patches
from flawsift.screening.options import PRESETS
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen

KEY = ("commit", "data", "alpha", "seed", "variant")
METRICS = ("image_auroc", "aupro")


Select = Callable[[ImageSet, Screening, GroundTruth], ImageSet]


def cut(
    images: float = math.inf, patches: float = math.inf, calm: float | None = None, *, tested: bool = True
) -> Select:
    """Less the images and the patches above so many robust deviations, where defects are in evidence or untested.

    With `calm`, patches up to so many deviations of the images above are learned.
    """

    def select(train: ImageSet, stage1: Screening, _: GroundTruth) -> ImageSet:
        assert stage1.patch_maps is not None
        assert stage1.contamination is not None
        if tested and stage1.contamination.alpha_hat <= 0:
            return train
        calmest = np.inf if calm is None else calm
        kept = robust_units(stage1.consensus) <= images
        rejected = np.where(
            kept[:, None, None],
            rejected_patches(stage1.patch_maps, patches),
            rejected_patches(stage1.patch_maps, calmest),
        )
        learned = kept if calm is None else np.ones_like(kept)
        masks = {int(i): mask for i, mask in zip(stage1.ids, rejected, strict=True) if mask.any()}
        return train.select(stage1.ids[learned]).without_patches(masks)

    return select


def lowest(share: float) -> Select:
    """The lowest share by consensus, as in equation 4, of held-out scores."""
    return lambda train, stage1, _: train.select(keep_lowest(stage1.ids, stage1.consensus, share))


VARIANTS: dict[str, Select] = {
    "all data": lambda train, stage1, truth: train,
    "images above 1, patches above 1": cut(1, 1),
    "images above 2, patches above 1": cut(2, 1),
    "images above 1, patches above 2": cut(1, 2),
    "images above 2, patches above 2": cut(2, 2),
    "images above 2, patches above 2, above 1 in those images": cut(2, 2, 1),  # the default
    "images above 2, patches above 3": cut(2, 3),
    "images above 2": cut(images=2),
    "patches above 2": cut(patches=2),
    "images above 2, patches above 2, untested": cut(2, 2, tested=False),
    "keep the lowest 40 %": lowest(0.4),
    "oracle": lambda train, stage1, truth: train.select(train.ids[truth.select(train.ids).labels == 0]),
}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """(set, alpha, seed) in the order they run."""
    for name in args.sets:
        for alpha in args.alphas:
            for seed in args.seeds:
                yield name, alpha, seed


def run_cell(
    data: Any, images: ImageSet, backbone: Any, alpha: float, seed: int, names: list[str]
) -> Iterator[_rows.Row]:
    """A row for each variant; variants that keep the same share one training."""
    split = contaminate(data.truth, alpha=alpha, groups=images.groups, seed=seed, **SIZES[data.name])
    train, test = images.select(split.train_ids), images.select(split.test_ids)
    detector = make_detector("patchcore", seed=seed)
    stage1 = screen(train, detector, PRESETS["default"], Run(seed=seed))
    common = cell_of(data, images, backbone, detector, alpha, seed)
    chosen = {variant: VARIANTS[variant](train, stage1, data.truth) for variant in names}
    for variant, row in measured(chosen, detector, backbone, len(train), test, data.truth):
        yield {**common, "variant": variant, **row}


def measured(
    chosen: Mapping[str, ImageSet],
    detector: Detector,
    backbone: Backbone,
    n_train: int,
    test: ImageSet,
    truth: GroundTruth,
) -> Iterator[tuple[str, _rows.Row]]:
    """(name, figures) of each selection from n_train images; those that are equal share one training."""
    known: dict[str, _rows.Row] = {}
    for name, learned in chosen.items():
        digest = set_digest(learned)
        if digest not in known:
            model = Model(detector.clone().fit(learned), backbone, Calibration.of([]), {})
            metrics, _ = evaluate(model, test, truth)
            known[digest] = {key: metrics[key] for key in METRICS}
        yield (
            name,
            {
                **known[digest],
                "keep_share": len(learned) / n_train,
                "rejected_patches": learned.rejected_share,
                "kept_anomalous": int(truth.select(learned.ids).labels.sum()),
            },
        )


def main() -> None:
    """Fill the table, then print the mean gain of each variant."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--sets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--cache", type=Path, help="folder for features, reused when it exists (default: temporary)")
    args = parser.parse_args()
    path, commit = args.results / "ablation.csv", _rows.commit()
    done = {tuple(row[k] for k in KEY) for row in _rows.read_rows(path)}
    with contextlib.ExitStack() as stack:
        scratch = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flawsift-bench-")))
        backbone = load_backbone()
        loaded: dict[str, Any] = {}
        for name, alpha, seed in cells(args):
            missing = [v for v in args.variants if (commit, name, f"{alpha:.6g}", str(seed), v) not in done]
            if name not in loaded:
                data = load_set(name)
                loaded = {name: data and (data, attach(data.images, backbone, LAYERS, store=FeatureStore(scratch))[0])}
            if loaded[name] is None or not missing:
                continue
            data, images = loaded[name]
            rows = list(run_cell(data, images, backbone, alpha, seed, missing))
            _rows.append_rows(path, rows)
            shown = "  ".join(f"{row['variant']} {row['image_auroc']:.3f}" for row in rows)
            _rows.say(f"{name} alpha {alpha:g} seed {seed}: {shown}")
    _rows.finish("ablation", figures([r for r in _rows.read_rows(path) if r["commit"] == commit]), args)


def figures(rows: list[dict[str, str]]) -> dict[str, float]:
    """Mean gain in image AUROC over training on everything, per variant and alpha, over sets and seeds."""
    at = {tuple(row[k] for k in KEY[1:]): float(row["image_auroc"]) for row in rows}
    gains: dict[str, list[float]] = {}
    for (data, alpha, seed, variant), value in at.items():
        if (base := at.get((data, alpha, seed, "all data"))) is not None:
            gains.setdefault(f"{variant}, alpha {alpha}", []).append(value - base)
    return {name: statistics.mean(values) for name, values in gains.items()}


if __name__ == "__main__":
    main()
