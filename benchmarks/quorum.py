"""What Quorum costs, and what its bfloat16 products change.

cost: time of stage 1 (`fit` and `held_out`) of N images, of scoring one further image with and without its map, size of
the saved model and peak memory, on made-up features of the size of the default network's at 256 pixels: what they are
does not change the work. Each number of images is a process of its own.

precision: image scores and AUROC by products of bfloat16 and of float32, on the development sets at 10 % defective.
On processors without units for bfloat16 both are the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import _rows
from _rows import DEVELOPMENT
from accuracy import LAYERS, SIZES, load_set
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.detectors.parts.groups import has_bfloat16_units
from flawsift.detectors.quorum import Quorum
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.features.store import FeatureStore
from flawsift.metrics.ranking import image_auroc

N_IMAGES = (400, 4000)
N_SCORED = 20  # further images, scored one at a time
ALPHA = 0.1  # of the precision
CHANNELS = {"stride8": (40, 32, 32), "stride16": (112, 16, 16)}  # of the default network at 256 pixels


def made_up(n: int, seed: int) -> ImageSet:
    """Random features of n images."""
    generator = np.random.default_rng(seed)
    arrays = {
        layer: generator.standard_normal((n, *shape), np.float32).astype(np.float16)
        for layer, shape in CHANNELS.items()
    }
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    return ImageSet(
        images.ids, images.source, {}, MemoryFeatures(256, "made up", {("", i): i for i in range(n)}, arrays)
    )


def child(n: int) -> dict[str, Any]:
    """The cost at one number of images."""
    train, further = made_up(n, 0), made_up(N_SCORED, 1)
    detector = Quorum()
    started = time.perf_counter()
    detector.fit(train)
    fitted = time.perf_counter()
    detector.held_out(train)
    result: dict[str, Any] = {"seconds_fit": fitted - started, "seconds_held_out": time.perf_counter() - fitted}
    for name, maps in (("ms_score", False), ("ms_score_and_map", True)):
        taken = []
        for id_ in further.ids.tolist():
            started = time.perf_counter()
            detector.predict(further.select([id_]), maps=maps)
            taken.append(1000 * (time.perf_counter() - started))
        result[name] = statistics.median(taken)
    with tempfile.TemporaryDirectory() as folder:
        detector.save(Path(folder))
        result["model_mb"] = sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6
    return {**result, "k": detector.k_, "peak_mb": _rows.peak_mb()}


def precision(name: str, backbone: Backbone, store: FeatureStore) -> dict[str, Any] | None:
    """How scores by bfloat16 differ from those by float32 on one set."""
    data = load_set(name)
    if data is None:
        return None
    images, _ = attach(data.images, backbone, LAYERS, store=store)
    split = contaminate(data.truth, alpha=ALPHA, groups=images.groups, seed=0, **SIZES[data.name])
    train, test = images.select(split.train_ids), images.select(split.test_ids)
    labels = data.truth.select(split.test_ids).labels
    quick, exact = (d.fit(train).predict(test, maps=False).scores for d in (Quorum(), Quorum(precision="float32")))
    aurocs = [image_auroc(scores, labels) for scores in (quick, exact)]
    return {
        "data": name,
        "alpha": ALPHA,
        "auroc": aurocs[0],
        "auroc_float32": aurocs[1],
        "rank_correlation": float(spearmanr(quick, exact).statistic),
    }


def main() -> None:
    """Measure both."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--n", type=int, nargs="+", default=list(N_IMAGES), help="numbers of images")
    parser.add_argument("--sets", nargs="*", default=list(DEVELOPMENT), help="for the precision")
    parser.add_argument("--cache", type=Path, default=None, help="folder for features")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    common = {**_rows.provenance(), "bfloat16": has_bfloat16_units("cpu")}
    figures: dict[str, Any] = {}
    for n in args.n:
        result = _rows.run_json(__file__, "--child", n)
        _rows.append_rows(args.results / "quorum.csv", [{**common, "kind": "cost", "n": n, **result}])
        _rows.say(f"{n} images: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()))
        figures |= {f"{key}_{n}": value for key, value in result.items()}
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        store, backbone = FeatureStore(args.cache or Path(scratch)), load_backbone()
        for name in args.sets:
            if (row := precision(name, backbone, store)) is not None:
                _rows.append_rows(args.results / "quorum.csv", [{**common, "kind": "precision", **row}])
                _rows.say(
                    f"{name}: AUROC {row['auroc']:.4f}, by float32 {row['auroc_float32']:.4f}, "
                    f"rank correlation {row['rank_correlation']:.5f}"
                )
                figures[f"{name}_rank_correlation"] = row["rank_correlation"]
    _rows.finish("quorum", figures, args)


if __name__ == "__main__":
    main()
