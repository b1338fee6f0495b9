"""What a threshold without labels promises, and what it does: false alarms and misses on new images, cell by cell.

One stage 1 and one training per cell, as `flawsift fit` makes them, then the table of false alarms that follows, with
and without the first decisions of a person who knows. Beside it the split-conformal threshold of the truly good
training images: the best that is to be had. Counts, not shares, are in the rows, so that cells can be pooled.

Finished cells are rows already and are skipped, so a killed run goes on where it was.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import _rows
from accuracy import ALPHAS, SIZES, cell_of, loaded_sets, protocol_of
from decisions import right_choices
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.executors import Run
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.models.calibration import Calibration
from flawsift.models.plan import calibrate, judge, plan_training
from flawsift.screening.options import FINAL, PRESETS
from flawsift.screening.stage1 import screen

RATES = (0.01, 0.05)
DECISIONS = (0, 10)  # of the highest-ranked images
BANKS = ("quorum", "patchcore", "softpatch", "padim")  # that train in seconds
KEY = ("commit", "data", "detector", "alpha", "seed", "backbone")


def run_cell(
    data: Dataset, images: ImageSet, backbone: Backbone, name: str, alpha: float, seed: int
) -> Iterator[_rows.Row]:
    """A row for each number of decisions and each rate."""
    split = contaminate(data.truth, alpha=alpha, groups=images.groups, seed=seed, **SIZES[data.name])
    train, test = images.select(split.train_ids), images.select(split.test_ids)
    detector, options, run = make_detector(name, seed=seed), PRESETS["default"], Run(seed=seed)
    screener = make_detector(options.screener, seed=seed)
    stage1 = screen(train, screener, options, run)
    common = cell_of(data, images, backbone, detector, alpha, seed)
    common |= {"protocol": protocol_of(train, test), "alpha_reached": split.alpha_reached}
    defective = data.truth.select(test.ids).labels == 1
    for n in DECISIONS:
        choices = right_choices(stage1, data.truth, n)
        plan = plan_training(train, detector, stage1, choices=choices, same_detector=screener.name == name)
        fitted = detector.clone().fit(plan.images)
        judged = judge(plan, fitted, run)
        made = calibrate(plan, judged)
        best = Calibration.of(judged.scores[data.truth.select(judged.ids).labels == 0])
        scores = fitted.predict(test, maps=False).scores
        assert plan.screening is not None
        estimate = plan.screening.contamination
        assert estimate is not None
        shown: dict[str, Any] = {
            "n_decisions": n,
            "alpha_hat": estimate.alpha_hat,
            "alpha_low": None if estimate.interval is None else estimate.interval[0],
            "alpha_high": None if estimate.interval is None else estimate.interval[1],
            "n_suspects": made.n_suspects,
            "warned": int(made.warning is not None),
            "n_good": int((~defective).sum()),
            "n_defective": int(defective.sum()),
        }
        for rate in RATES:
            threshold, ideal = made.threshold(rate), best.threshold(rate)
            assert threshold is not None
            assert ideal is not None
            low, high = threshold.interval or (None, None)
            row = {"asked": rate, "promised": threshold.expected_rate, "promised_low": low, "promised_high": high}
            row |= dict(zip(("missed", "missed_low", "missed_high"), threshold.misses or (None,) * 3, strict=True))
            for title, value in (("", threshold.value), ("best_", ideal.value)):
                row[f"{title}n_false_alarms"] = int((scores[~defective] > value).sum())
                row[f"{title}n_missed"] = int((scores[defective] <= value).sum())
            yield {**common, **shown, **row}


def main() -> None:
    """Fill the table, then print it pooled."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--sets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--detectors", nargs="+", default=[FINAL], choices=BANKS)
    parser.add_argument("--size", type=int, default=256, help="edge length of the network input")
    parser.add_argument("--cache", type=Path, help="folder for features, reused when it exists (default: temporary)")
    args = parser.parse_args()
    path, commit = args.results / "verdict.csv", _rows.commit()
    done = {tuple(row[k] for k in KEY) for row in _rows.read_rows(path)}
    backbone = load_backbone(size=args.size)
    for name, data, images in loaded_sets(args.sets, backbone, args.cache):
        for detector, alpha, seed in ((d, a, s) for d in args.detectors for a in args.alphas for s in args.seeds):
            if (commit, name, detector, f"{alpha:.6g}", str(seed), backbone.key) in done:
                continue
            rows = list(run_cell(data, images, backbone, detector, alpha, seed))
            _rows.append_rows(path, rows)
            shown = "  ".join(
                f"{row['n_false_alarms']}/{row['n_good']} {row['n_missed']}/{row['n_defective']}" for row in rows
            )
            _rows.say(f"{name} {detector} alpha {alpha:g} seed {seed}: {shown}")
    mine = [row for row in _rows.read_rows(path) if row["commit"] == commit]
    _rows.finish("verdict", figures(mine), args)


def figures(rows: list[dict[str, str]]) -> dict[str, float]:
    """False alarms and misses per 100, pooled over sets and seeds, per detector, rate, decisions and contamination."""
    pools: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        pools.setdefault(f"{row['detector']}_{row['asked']}_{row['n_decisions']}_{row['alpha']}", []).append(row)
    found = {}
    for pool, some in pools.items():
        for what, of in (("false_alarms", "good"), ("missed", "defective")):
            shares = [int(row[f"n_{what}"]) / int(row[f"n_{of}"]) for row in some]
            found[f"{pool}_{what}"] = 100 * float(np.mean(shares))
    return found


if __name__ == "__main__":
    main()
