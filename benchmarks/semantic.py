"""Semantic anomalies: one class of images against the rest. Our stand-in, not a published protocol.

The method's authors show semantic anomalies too, on data and with a protocol that are not public. Here the images are
scikit-learn's 8 x 8 digits: one digit is normal, the nine others are anomalous and hide in training at a stated ratio
(additive: n_a = int(ratio n_c)). An image is one patch, its 64 grey values; FUN-AD's head learns on it as on any other
patch, and the nearest neighbour in the same contaminated training set is the baseline. Half of the normal images train,
the others and as many anomalous ones test.
"""

import argparse
import statistics

import numpy as np
from sklearn.datasets import load_digits

import _rows
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Detector
from flawsift.detectors.funad import FUNAD
from flawsift.detectors.patchcore import PatchCore
from flawsift.features.readers import MemoryFeatures
from flawsift.metrics.ranking import image_auroc

LAYER = "grey values"
RATIOS = (0.05, 0.1, 0.2)
SIZE = 8  # pixels


def digits() -> tuple[ImageSet, np.ndarray]:
    """All digits with their grey values as (64, 1, 1) features, and which digit each is."""
    loaded = load_digits()
    images = ImageSet.from_arrays(list((loaded.images * 255 / 16).astype(np.uint8)))
    values = loaded.data.astype(np.float32).reshape(-1, SIZE * SIZE, 1, 1)
    rows = {("", i): i for i in images.ids.tolist()}
    return ImageSet(images.ids, images.source, {}, MemoryFeatures(SIZE, LAYER, rows, {LAYER: values})), loaded.target


def detectors(seed: int, steps: int) -> dict[str, Detector]:
    """The head on whole images, and the baseline."""
    head = FUNAD(
        layers=(LAYER,), patch_size=1, image_branch=False, projection_dim=None, batch_size=128, steps=steps, seed=seed
    )
    return {"funad": head, "nearest": PatchCore(layers=(LAYER,), coreset_ratio=1.0, seed=seed)}


def main() -> None:
    """Fill the table, then print mean and standard deviation of the image AUROC over digits and seeds."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--digits", nargs="+", type=int, default=list(range(10)), choices=range(10))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=FUNAD.steps)
    args = parser.parse_args()
    images, target = digits()
    figures: dict[str, float] = {}
    for ratio in RATIOS:
        rows: list[_rows.Row] = []
        for digit in args.digits:
            labels = (target != digit).astype(np.int8)
            truth = GroundTruth(images.ids, labels, tuple(np.where(labels, "other", "good").tolist()), {})
            n_test = int((labels == 0).sum()) // 2
            for seed in args.seeds:
                sizes = {"test_normal": n_test, "test_anomalous": n_test}
                split = contaminate(truth, alpha=ratio, definition="additive", seed=seed, **sizes)
                train, test = images.select(split.train_ids), images.select(split.test_ids)
                for name, detector in detectors(seed, args.steps).items():
                    scores = detector.fit(train).predict(test, maps=False).scores
                    auroc = image_auroc(scores, truth.select(test.ids).labels)
                    labelled = {"detector": name, "params": detector.params(), "alpha": ratio, "seed": seed}
                    rows.append({**_rows.provenance(), **labelled, "digit": digit, "image_auroc": auroc})
        _rows.append_rows(args.results / "semantic.csv", rows)
        for name in detectors(0, 1):
            values = [row["image_auroc"] for row in rows if row["detector"] == name]
            figures[f"{name}_{ratio}"] = statistics.mean(values)
            _rows.say(f"{ratio:4.0%} {name:9s} {statistics.mean(values):.3f} +- {statistics.pstdev(values):.3f}")
    _rows.finish("semantic", figures, args)


if __name__ == "__main__":
    main()
