"""What a person's first decisions are worth: the ten most suspicious images of a contaminated set, judged rightly.

One stage 1 per cell, of the default preset. The arm "decided" trains on what is left when the highest
ranked images have been decided on by their labels, as in `flawsift review`; the others are those of `accuracy.py`. Sets
are small, since that is where ten images are a share that counts, and where screening alone is weakest.

Finished cells are rows already and are skipped, so a killed run goes on where it was.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _rows
from ablation import measured
from accuracy import ALPHAS, cell_of, loaded_sets, protocol_of
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.executors import Run
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.paths import show
from flawsift.screening.options import FINAL, PRESETS
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen

SIZES: dict[str, dict[str, Any]] = {
    "cookie": {"n_train": 30},
    "elpv": {"n_train": 200, "test_normal": 100, "test_anomalous": 100},
    "magnetic_tile": {"n_train": 200, "test_normal": 100, "test_anomalous": 100},
}
KEY = ("commit", "data", "detector", "alpha", "seed", "n_decisions")
BANKS = ("quorum", "patchcore", "softpatch", "padim")  # that train in seconds


def right_choices(stage1: Screening, truth: GroundTruth, n: int) -> dict[str, str]:
    """The decisions of somebody who knows, on the n highest ranked images."""
    names = dict(zip(stage1.ids.tolist(), stage1.names, strict=True))
    top = stage1.ranking[:n]
    return {
        show(names[int(i)]): "remove" if label else "keep"
        for i, label in zip(top, truth.select(top).labels, strict=True)
    }


def run_cell(
    data: Dataset, images: ImageSet, backbone: Backbone, name: str, alpha: float, seed: int, n: int
) -> Iterator[_rows.Row]:
    """A row for each arm; arms that keep the same share one training."""
    split = contaminate(data.truth, alpha=alpha, groups=images.groups, seed=seed, **SIZES[data.name])
    train, test = images.select(split.train_ids), images.select(split.test_ids)
    detector = make_detector(name, seed=seed)
    stage1 = screen(train, make_detector(PRESETS["default"].screener, seed=seed), PRESETS["default"], Run(seed=seed))
    choices = right_choices(stage1, data.truth, n)
    decided, counts = stage1.with_decisions(choices)
    common = cell_of(data, images, backbone, detector, alpha, seed)
    common |= {"protocol": protocol_of(train, test), "n_decisions": n, "n_removed": counts["remove"]}
    arms = {
        "all_data": train,
        "default": stage1.purified(train, detector),
        "decided": decided.purified(train, detector),
        "oracle_clean": train.select(train.ids[data.truth.select(train.ids).labels == 0]),
    }
    for arm, row in measured(arms, detector, backbone, len(train), test, data.truth):
        yield {**common, "arm": arm, **row}


def main() -> None:
    """Fill the table, then print the mean image AUROC of each arm."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--sets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--detectors", nargs="+", default=[FINAL, "patchcore"], choices=BANKS)
    parser.add_argument("--decisions", type=int, default=10, help="images decided on (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for features, reused when it exists (default: temporary)")
    args = parser.parse_args()
    path, commit = args.results / "decisions.csv", _rows.commit()
    done = {tuple(row[k] for k in KEY) for row in _rows.read_rows(path)}
    backbone = load_backbone()
    for name, data, images in loaded_sets(args.sets, backbone, args.cache):
        for detector, alpha, seed in ((d, a, s) for d in args.detectors for a in args.alphas for s in args.seeds):
            if (commit, name, detector, f"{alpha:.6g}", str(seed), str(args.decisions)) in done:
                continue
            rows = list(run_cell(data, images, backbone, detector, alpha, seed, args.decisions))
            _rows.append_rows(path, rows)
            shown = "  ".join(f"{row['arm']} {row['image_auroc']:.3f}" for row in rows)
            _rows.say(f"{name} {detector} alpha {alpha:g} seed {seed}: {shown}")
    mine = [row for row in _rows.read_rows(path) if row["commit"] == commit]
    _rows.finish("decisions", figures([row for row in mine if row["n_decisions"] == str(args.decisions)]), args)


def figures(rows: list[dict[str, str]]) -> dict[str, float]:
    """Mean image AUROC over seeds per set, detector, contamination and arm."""
    values: dict[str, list[float]] = {}
    for row in rows:
        cell = f"{row['data']}_{row['detector']}_{row['alpha']}_{row['arm']}"
        values.setdefault(cell, []).append(float(row["image_auroc"]))
    return {cell: statistics.mean(aurocs) for cell, aurocs in values.items()}


if __name__ == "__main__":
    main()
