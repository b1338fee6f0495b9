"""What each part of the default screening is worth: PatchCore on contaminated real sets, one part changed at a time.

One stage 1 per cell, by PatchCore with the default preset; every variant selects from its score matrix and maps, and
the final PatchCore, which draws the same patches in all of them, is trained on what is left. Sets, sizes and splits
are those of `accuracy.py`.

Finished cells are rows already and are skipped, so a killed run goes on where it was.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _rows
from accuracy import ALPHAS, LAYERS, SIZES, load_set
from flawsift import pipeline
from flawsift.backbones import load_backbone
from flawsift.calibration import Calibration
from flawsift.consensus import SUSPECT, keep_lowest, rejected_patches, robust_units
from flawsift.contamination import contaminate
from flawsift.detector import make_detector
from flawsift.features import FeatureStore, attach
from flawsift.images import ImageSet
from flawsift.metrics import GroundTruth
from flawsift.screening import PRESETS, Screening, screen

KEY = ("commit", "data", "alpha", "seed", "variant")
METRICS = ("image_auroc", "aupro")


def without(train: ImageSet, stage1: Screening, z: float) -> ImageSet:
    """All images, less their patches above z."""
    assert stage1.grids is not None
    masks = zip(stage1.ids.tolist(), rejected_patches(stage1.grids, z), strict=True)
    return train.without_patches({i: mask for i, mask in masks if mask.any()})


def ordinary(stage1: Screening, above: float = SUSPECT) -> Any:
    """Ids of the images that are not suspects, defects in evidence or not."""
    return stage1.ids[robust_units(stage1.consensus) <= above]


def good(train: ImageSet, truth: GroundTruth) -> ImageSet:
    """What nobody has: the good images."""
    return train.select(train.ids[truth.select(train.ids).labels == 0])


Select = Callable[[ImageSet, Screening, GroundTruth], ImageSet]
VARIANTS: dict[str, Select] = {
    "all data": lambda train, s, truth: train,
    "default": lambda train, s, truth: s.purified(train),
    "without the test for defects": lambda train, s, truth: without(train, s, 2.0).select(ordinary(s)),
    "images only": lambda train, s, truth: train.select(s.kept),
    "patches only": lambda train, s, truth: without(train, s, 2.0) if len(s.removed) else train,
    "patches above 3": lambda train, s, truth: without(train, s, 3.0).select(s.kept) if len(s.removed) else train,
    "patches above 1": lambda train, s, truth: without(train, s, 1.0).select(s.kept) if len(s.removed) else train,
    "images above 1": lambda train, s, truth: (
        without(train, s, 2.0).select(ordinary(s, 1.0)) if len(s.removed) else train
    ),
    "keep 40 %": lambda train, s, truth: train.select(keep_lowest(s.ids, s.consensus, 0.4)),
    "keep 80 %": lambda train, s, truth: train.select(keep_lowest(s.ids, s.consensus, 0.8)),
    "oracle": lambda train, s, truth: good(train, truth),
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
    cut = contaminate(data.truth, alpha=alpha, groups=images.groups, seed=seed, **SIZES[data.name])
    train, test = images.select(cut.train_ids), images.select(cut.test_ids)
    detector = make_detector("patchcore", seed=seed)
    stage1 = screen(train, detector, **PRESETS["default"], seed=seed)
    known: dict[str, dict[str, Any]] = {}
    for variant in names:
        chosen = VARIANTS[variant](train, stage1, data.truth)
        digest = pipeline.set_digest(chosen)
        if digest not in known:
            model = pipeline.Model(detector.clone().fit(chosen), backbone, Calibration.of([]), {})
            found, _ = pipeline.evaluate(model, test, data.truth)
            known[digest] = {key: found[key] for key in METRICS}
        yield {
            **_rows.provenance(),
            "data": data.name,
            "data_digest": pipeline.set_digest(images),
            "weights_digest": backbone.weights_digest,
            "backbone": backbone.key,
            "detector": "patchcore",
            "params": detector.params(),
            "alpha": alpha,
            "seed": seed,
            "variant": variant,
            **known[digest],
            "keep_share": len(chosen) / len(train),
            "rejected_patches": chosen.rejected_share,
            "kept_anomalous": int(data.truth.select(chosen.ids).labels.sum()),
        }


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
            rows = list(run_cell(*loaded[name], backbone, alpha, seed, missing))
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
