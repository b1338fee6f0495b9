"""Time and memory against the number of images: the feature pass; on a warm cache PaDiM, PatchCore and its two stages.

Each measurement is a process of its own. `peak_mb` is the largest resident size, which counts pages of the feature
cache's memory maps; the kernel takes those back when it needs them. `anonymous_mb` leaves them out.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import _rows

SIZES = (250, 500, 1000, 2000, 4000)
STAGES = ("features", "padim", "patchcore", "two_stage")  # the last: both stages of PatchCore, k = 5
LAYERS = ("stride4", "stride8", "stride16")  # what the two detectors read
BASE = 250  # images that are drawn; the others are those, shifted


def make_images(folder: Path, n: int, size: int) -> None:
    """Write n PNG files of different content, named so that a prefix of them is a smaller set."""
    import numpy as np
    from PIL import Image

    from flawsift.datasets.synthetic import synthetic

    drawn = synthetic(min(n, BASE), 0, size=size, seed=0).images
    arrays = [np.asarray(drawn.image(int(i))) for i in drawn.ids]
    folder.mkdir(parents=True)
    for i in range(n):
        turn, base = divmod(i, len(arrays))
        shifted = np.roll(arrays[base], (turn, 2 * turn), axis=(0, 1))
        Image.fromarray(shifted).save(folder / f"{i:06d}.png", compress_level=1)


def child(stage: str, n: int, folder: Path, cache: Path, size: int) -> dict[str, Any]:
    """One measurement."""
    from flawsift import pipeline
    from flawsift.data.images import ImageSet
    from flawsift.detectors.registry import make_detector
    from flawsift.features.backbones import load_backbone
    from flawsift.features.extraction import attach
    from flawsift.features.store import FeatureStore
    from flawsift.models.model import set_digest

    images = ImageSet.from_folder(folder)
    images = images.select(images.ids[:n])
    backbone = load_backbone(size=size)
    result: dict[str, Any] = {"weights_digest": backbone.weights_digest}
    with _rows.PeakAnonymous() as anonymous:
        started = time.perf_counter()
        data, _ = attach(images, backbone, LAYERS, store=FeatureStore(cache))
        result["seconds_attach"] = result["seconds"] = time.perf_counter() - started
        if stage == "two_stage":
            started = time.perf_counter()
            pipeline.fit(data, "patchcore", backbone, store=FeatureStore(cache))
            result["seconds"] = time.perf_counter() - started
        elif stage != "features":
            detector = make_detector(stage)
            started = time.perf_counter()
            detector.fit(data)
            result["seconds"] = time.perf_counter() - started
            result["params"] = detector.params()
    result |= {"peak_mb": _rows.peak_mb(), "anonymous_mb": anonymous.mb, "data_digest": set_digest(data)}
    return result


def main() -> None:
    """Measure all sizes and report how time and memory grow."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of images")
    parser.add_argument("--size", type=int, default=256, help="edge length in pixels")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--child", nargs=4, metavar=("STAGE", "N", "FOLDER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        stage, n, folder, cache = args.child
        print(json.dumps(child(stage, int(n), Path(folder), Path(cache), args.size)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        folder = Path(scratch) / "images"
        make_images(folder, max(args.sizes), args.size)
        for n in sorted(args.sizes):
            store = Path(scratch) / f"cache-{n}"
            for stage in args.stages:
                result = _rows.run_json(__file__, "--size", args.size, "--child", stage, n, folder, store)
                labels = {"stage": stage, "detector": stage if stage in ("padim", "patchcore") else None, "n_images": n}
                protocol = f"synthetic, {args.size} px, default presets"
                row = {**_rows.provenance(), **labels, "alpha": 0.0, "seed": 0, "protocol": protocol, **result}
                row["seconds_per_image"] = result["seconds"] / n
                rows.append(row)
                anonymous = f"{result['anonymous_mb']:.0f}" if result["anonymous_mb"] is not None else "?"
                _rows.say(
                    f"{stage:10s} n={n:<6d} {result['seconds']:8.2f} s  {1000 * row['seconds_per_image']:7.2f} ms/image"
                    f"  peak {result['peak_mb']:6.0f} MiB, anonymous {anonymous} MiB"
                )
            shutil.rmtree(store, ignore_errors=True)
    _rows.append_rows(args.results / "scale.csv", rows)
    _rows.finish("scale", _figures(rows), args)


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        small, large = mine[0], mine[-1]
        n = large["n_images"]
        figures |= {
            f"{stage}_peak_mb_{n}": large["peak_mb"],
            f"{stage}_anonymous_mb_{n}": large["anonymous_mb"],
            f"{stage}_seconds_{n}": large["seconds"],
            f"{stage}_seconds_per_image_ratio": large["seconds_per_image"] / small["seconds_per_image"],
            f"{stage}_peak_mb_ratio": large["peak_mb"] / small["peak_mb"],
        }
        if large["anonymous_mb"] and small["anonymous_mb"]:
            figures[f"{stage}_anonymous_mb_ratio"] = large["anonymous_mb"] / small["anonymous_mb"]
    return figures


if __name__ == "__main__":
    main()
