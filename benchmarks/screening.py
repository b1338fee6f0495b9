"""What screening costs: both stages (k = 5) against one plain fit on everything, from a cold feature cache.

Stage 1 is by the detector itself (`--screener own`), as the goals mean it: by sub-models, or by Quorum's own held-out
scores. Screening by PatchCore is timed for PaDiM too. Repeats alternate between the arms, each in a process of its own.
The backbone is compiled before the clock starts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _rows

DETECTORS = ("patchcore", "padim", "quorum")
ARMS = {
    "patchcore": ("plain", "two_stage"),
    "padim": ("plain", "two_stage", "by_patchcore"),
    "quorum": ("plain", "two_stage"),
}
GOALS = {"patchcore": 3.0, "padim": 1.5}
ANOMALOUS = 0.1  # share of the images


def make_images(folder: Path, n: int, size: int) -> None:
    """Write n synthetic images, a tenth of them defective, as PNG."""
    from flawsift.datasets.synthetic import synthetic, write_folder

    n_anomalous = round(ANOMALOUS * n)
    write_folder(synthetic(n - n_anomalous, n_anomalous, size=size, seed=0), folder)


def child(arm: str, detector_name: str, folder: Path, size: int) -> dict[str, Any]:
    """One timed run."""
    import torch

    from flawsift import pipeline
    from flawsift.data.images import ImageSet
    from flawsift.detectors.registry import make_detector
    from flawsift.features.backbones import load_backbone
    from flawsift.features.extraction import attach
    from flawsift.features.store import FeatureStore
    from flawsift.models.model import set_digest
    from flawsift.screening.options import ScreenOptions

    images = ImageSet.from_folder(folder)
    backbone = load_backbone(size=size)
    detector = make_detector(detector_name)
    backbone.extract(images.select(images.ids[:1]).pixels(size), detector.layers)  # compiles
    passes = 0
    extract = backbone.extract

    def counted(pixels: torch.Tensor, layers: Any) -> dict[str, torch.Tensor]:
        nonlocal passes
        passes += len(pixels)
        return extract(pixels, layers)

    backbone.extract = counted  # type: ignore[method-assign]
    screened: float | None = None
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as cache:
        store = FeatureStore(Path(cache))
        started = time.perf_counter()
        if arm == "plain":
            data, _ = attach(images, backbone, detector.layers, store=store)
            features = time.perf_counter() - started
            detector.fit(data)
        else:
            features = None

            def watch(stage: str, done: int, total: int) -> None:
                nonlocal screened
                if stage == "detector" and screened is None:  # stage 2 begins
                    screened = time.perf_counter() - started

            options = ScreenOptions(screener="own" if arm == "two_stage" else "patchcore")
            pipeline.fit(images, detector, backbone, options=options, store=store, progress=watch)
        seconds = time.perf_counter() - started
        peak = _rows.peak_mb()
        digest = set_digest(attach(images, backbone, detector.layers, store=store)[0])  # all cached by now
    return {
        "seconds": seconds,
        "seconds_features": features,
        "seconds_features_and_stage1": screened,
        "passes_per_image": passes / len(images),
        "peak_mb": peak,
        "params": detector.params(),
        "weights_digest": backbone.weights_digest,
        "data_digest": digest,
    }


def main() -> None:
    """Run all arms and report the ratios."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--child", nargs=3, metavar=("ARM", "DETECTOR", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        arm, detector, folder = args.child
        print(json.dumps(child(arm, detector, Path(folder), args.size)))
        return
    figures: dict[str, Any] = {}
    passes: list[float] = []
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        folder = Path(scratch) / "images"
        make_images(folder, args.n, args.size)
        for detector in args.detectors:
            rows = []
            for repeat in range(args.repeats):
                for arm in ARMS[detector]:
                    result = _rows.run_json(__file__, "--size", args.size, "--child", arm, detector, folder)
                    passes.append(result["passes_per_image"])
                    protocol = f"synthetic {args.n} x {args.size}, k=5, cold cache"
                    labels = {"detector": detector, "arm": arm, "repeat": repeat, "seed": 0, "protocol": protocol}
                    rows.append({**_rows.provenance(), **labels, "alpha": ANOMALOUS, **result})
                    _rows.say(f"{detector:10s} {arm:12s} {result['seconds']:7.2f} s  {result['peak_mb']:6.0f} MiB")
            _rows.append_rows(args.results / "screening.csv", rows)
            medians = {a: statistics.median(r["seconds"] for r in rows if r["arm"] == a) for a in ARMS[detector]}
            plain = medians["plain"]
            figures[f"{detector}_plain_seconds"] = plain
            figures[f"{detector}_peak_mb"] = max(r["peak_mb"] for r in rows)
            if both := medians.get("two_stage"):
                figures |= {f"{detector}_cost_ratio": both / plain, f"{detector}_two_stage_seconds": both}
                goal = f" (goal: at most {GOALS[detector]})" if detector in GOALS else ""
                _rows.say(f"{detector}: both stages cost {both / plain:.2f} plain fits{goal}")
            if by := medians.get("by_patchcore"):
                figures |= {
                    f"{detector}_cost_ratio_by_patchcore": by / plain,
                    f"{detector}_by_patchcore_seconds": by,
                }
                _rows.say(f"{detector}: screened by PatchCore, both stages cost {by / plain:.2f} plain fits")
    figures["backbone_passes_per_image"] = max(passes, key=lambda p: abs(p - 1.0))
    _rows.finish("screening", figures, args)


if __name__ == "__main__":
    main()
