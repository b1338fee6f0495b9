"""Whether it pays to turn and crop parts so that all lie alike (`--align`): screws at any angle.

Detectors see the images as they are and aligned, with the same splits and seeds, in inputs of as many pixels, of which
aligned screws take more. Arms: all_data, without thresholds.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import _rows
import accuracy
from flawsift.data.alignment import learn
from flawsift.data.images import ImageSet
from flawsift.detectors.registry import DETECTORS
from flawsift.features.backbones import MULTIPLE, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore

NAME = "screw"
AS_THEY_ARE, ALIGNED = "as they are", "aligned"


def main() -> None:
    """Fill the table."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--detectors", nargs="+", default=["quorum", "patchcore", "padim"], choices=list(DETECTORS))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(accuracy.ALPHAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--positions", nargs="+", default=[AS_THEY_ARE, ALIGNED], choices=[AS_THEY_ARE, ALIGNED])
    parser.add_argument("--edge", type=int, default=256, help="of a square input that has as many pixels")
    args = parser.parse_args()
    data = accuracy.load_set(NAME)
    if data is None:
        return
    figures: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        store = FeatureStore(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flawsift-bench-"))))
        for kind in args.positions:
            images = data.images.aligned(learn(data.images) if kind == ALIGNED else None)
            backbone = load_backbone(size=_as_many_pixels(images, args.edge))
            images, _ = attach(images, backbone, accuracy.LAYERS, store=store)
            for detector in args.detectors:
                for alpha in args.alphas:
                    for seed in args.seeds:
                        cell = accuracy.Combination(detector, alpha, seed, ["all_data"])
                        options = {"overlap": False, "calibrate": False, "store": store}
                        [row] = accuracy.run_cell(data, images, backbone, cell, **options)
                        _rows.append_rows(args.results / "align.csv", [{**row, "position": kind, "edge": args.edge}])
                        shown = "  ".join(f"{key} {row[key]:.3f}" for key in accuracy.METRICS if row[key] is not None)
                        _rows.say(f"{kind}, {detector}, alpha {alpha:g}, seed {seed}: {shown}")
                        figures.setdefault(f"{kind}_{detector}_{alpha:g}", []).append(row["image_auroc"])
    _rows.finish("align", {name: sum(values) / len(values) for name, values in figures.items()}, args)


def _as_many_pixels(images: ImageSet, edge: int) -> int | tuple[int, int]:
    """The size of an input for what is looked at of the images, of as many pixels as a square."""
    if images.alignment is None:
        return edge
    width, height = images.alignment.size(images.source.size(int(images.ids[0])))
    down, across = (round(edge * ratio**0.5 / MULTIPLE) * MULTIPLE for ratio in (height / width, width / height))
    return down, across


if __name__ == "__main__":
    main()
