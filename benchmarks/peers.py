"""flawsift beside anomalib 2.7.0: the same images, network, weights, layers, channels and threads.

Each library runs in a process and an environment of its own; imports are timed apart. Both sides decode the images and
run the network themselves, and "fit" ends with a pass over the test images and a model on disk on both sides, because
anomalib's fit does so to set its thresholds. Its test then sends these images through the network again; flawsift
finds their features in its store, as its users do. The weights are random, so AUROC and AUPRO only show that both
compute alike. `--install-peers` makes the environment in .bench/peers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import _rows

PEERS = _rows.ROOT / ".bench" / "peers"
PACKAGES = ("torch==2.14.1", "torchvision==0.29.1", "anomalib==2.7.0")
TASKS = ("patchcore", "padim", "aupro", "coreset")
BACKBONE = "random:0:resnet18"
SPARSE_DIM = 272  # what anomalib's projection (eps 0.9) gives for 61,440 patches
START = 7  # first centre of the selection alone
N_BLOBS = 200  # clusters of the features for the selection alone

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def draw_normal(generator: np.random.Generator, size: int) -> Pixels:
    """Slanted stripes under uneven light, with noise."""
    from PIL import Image

    y, x = np.mgrid[0:size, 0:size]
    wave = np.sin(2 * np.pi * (x + 0.15 * y) / generator.normal(12, 0.3) + generator.uniform(0, 2 * np.pi))
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
    light = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64) - 127
    grey = 120 + 18 * wave + 0.15 * light + generator.normal(0, 4, (size, size))
    return np.clip(grey[..., None] * (1.0, 0.95, 0.85), 0, 255).astype(np.uint8)


def draw_mask(generator: np.random.Generator, size: int) -> Mask:
    """One to three random polygons."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (size, size))
    for _ in range(generator.integers(1, 4)):
        centre = generator.integers(size // 8, size - size // 8, 2)
        angles, radii = np.sort(generator.uniform(0, 2 * np.pi, 9)), generator.uniform(size / 43, size / 11, 9)
        corners = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        ImageDraw.Draw(image).polygon([(float(a), float(b)) for a, b in corners], fill=255)
    return np.asarray(image) > 0


def draw_defect(generator: np.random.Generator, size: int) -> tuple[Pixels, Mask]:
    """A normal image with soft-edged stains of one colour."""
    from scipy.ndimage import gaussian_filter

    mask = draw_mask(generator, size)
    weight = generator.uniform(0.35, 0.9) * gaussian_filter(mask.astype(np.float64), 1)[..., None]
    image = (1 - weight) * draw_normal(generator, size) + weight * generator.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_data(root: Path, n_train: int, n_test: int, size: int) -> None:
    """train/good, test/good, test/defect and ground_truth/defect; half of the test images are defective."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train/good", "test/good", "test/defect", "ground_truth/defect"):
        (root / part).mkdir(parents=True)
    for part, n in (("train/good", n_train), ("test/good", n_test // 2)):
        for i in range(n):
            Image.fromarray(draw_normal(generator, size)).save(root / part / f"{i:03d}.png")
    for i in range(n_test // 2):
        image, mask = draw_defect(generator, size)
        Image.fromarray(image).save(root / "test/defect" / f"{i:03d}.png")
        Image.fromarray(mask).convert("L").save(root / "ground_truth/defect" / f"{i:03d}.png")


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Everything that both sides read."""
    import torch
    from scipy.ndimage import gaussian_filter

    from flawsift.features.backbones import load_backbone

    if {"patchcore", "padim"} & set(args.only):
        write_data(work / "data", args.train, args.test, 256)
        backbone = load_backbone(BACKBONE, runtime="torch")
        torch.save(backbone._trunk.model.state_dict(), work / "weights.pth")
    generator = np.random.default_rng(0)
    if "aupro" in args.only:
        shape = (args.maps, 256, 256)
        masks = np.zeros(shape, np.uint8)
        for i in range(args.maps // 2):
            masks[i] = draw_mask(generator, 256)
        noise = np.stack([gaussian_filter(generator.standard_normal(shape[1:]), 4) for _ in masks])
        signal = np.stack([gaussian_filter(mask.astype(np.float64), 3) for mask in masks])
        np.save(work / "maps.npy", (noise / noise.std() + 1.2 * signal).astype(np.float32))
        np.save(work / "masks.npy", masks)
    if "coreset" in args.only:
        middles = generator.standard_normal((N_BLOBS, SPARSE_DIM), np.float32)
        spread = 0.5 * generator.standard_normal((args.patches, SPARSE_DIM), np.float32)
        np.save(work / "features.npy", middles[generator.integers(0, N_BLOBS, args.patches)] + spread)


def ours(task: str, work: Path, threads: int, centres: int) -> dict[str, Any]:
    """flawsift's side of one task."""
    started = time.perf_counter()
    import torch

    # all that the tasks import, so that none of it is in their times
    import flawsift.datasets
    import flawsift.detectors.padim
    import flawsift.detectors.patchcore
    import flawsift.models.model  # noqa: F401

    result = {"seconds_import": time.perf_counter() - started}
    torch.set_num_threads(threads)
    if task == "aupro":
        return result | ours_aupro(work)
    return result | (ours_coreset(work, centres) if task == "coreset" else ours_detector(task, work))


def ours_aupro(work: Path) -> dict[str, Any]:
    """The metric alone, best of three."""
    from flawsift.metrics.ranking import aupro

    maps, masks = np.load(work / "maps.npy"), np.load(work / "masks.npy")
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        value = aupro(maps, masks)
        seconds.append(time.perf_counter() - started)
    return {"value": value, "seconds": min(seconds)}


def ours_coreset(work: Path, centres: int) -> dict[str, Any]:
    """The selection alone, and that of a tenth of the patches."""
    import torch

    from flawsift.detectors.parts.coreset import k_center_greedy

    features = torch.from_numpy(np.load(work / "features.npy"))
    started = time.perf_counter()
    picks = k_center_greedy(features, centres, torch.Generator(), start=START)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    k_center_greedy(features, len(features) // 10, torch.Generator(), start=START)
    return {"seconds": seconds, "seconds_tenth": time.perf_counter() - started, "picks": picks.tolist()}


def ours_detector(task: str, work: Path) -> dict[str, Any]:
    """Fit, with a pass over the test images and a model on disk, and test with metrics."""
    from flawsift.datasets import load_mvtec
    from flawsift.detectors.base import Detector
    from flawsift.detectors.padim import PaDiM
    from flawsift.detectors.patchcore import PatchCore
    from flawsift.features.backbones import load_backbone
    from flawsift.features.extraction import attach
    from flawsift.features.store import FeatureStore
    from flawsift.models.calibration import Calibration
    from flawsift.models.model import Model, evaluate, predict, set_digest

    # num_neighbors=9 and the smaller constants are anomalib's defaults, so that both do the same work
    detector: Detector
    if task == "patchcore":
        exact: dict[str, Any] = {"coreset_ratio": 0.1, "max_patches": None, "projection_dim": SPARSE_DIM}
        detector = PatchCore(layers=("layer2", "layer3"), reweight_neighbors=9, **exact)
    else:
        detector = PaDiM(**{**PaDiM.presets["paper"], "layers": ("layer1", "layer2", "layer3")})
    data = load_mvtec(work / "data")
    train, test = data.images.select(data.train_ids), data.images.select(data.test_ids)
    backbone = load_backbone(BACKBONE)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        started = time.perf_counter()
        train, _ = attach(train, backbone, detector.layers, store=FeatureStore(Path(scratch) / "cache"))
        result["seconds_features"] = time.perf_counter() - started
        detector.fit(train)
        model = Model(detector, backbone, Calibration.of([]), {})
        # anomalib's fit ends with a pass over the test images: so does this one, which leaves their features stored
        test, _ = attach(test, backbone, detector.layers, store=FeatureStore(Path(scratch) / "cache"))
        predict(model, test)
        model.save(Path(scratch) / "model")
        result["seconds_fit"] = time.perf_counter() - started
        started = time.perf_counter()
        metrics, _ = evaluate(model, test, data.truth)
        result["seconds_test"] = time.perf_counter() - started
        files = [p for p in (Path(scratch) / "model").rglob("*") if p.is_file()]
        result["file_mb"] = sum(p.stat().st_size for p in files) / 1e6
    result |= {key: metrics[key] for key in ("image_auroc", "pixel_auroc", "aupro")}
    result |= {"params": detector.params(), "weights_digest": backbone.weights_digest, "runtime": backbone.runtime}
    return {**result, "data_digest": set_digest(train)}


def install() -> None:
    """Make the environment of the peers, if it is not there."""
    if not (PEERS / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
    subprocess.run([PEERS / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)


def installed() -> bool:
    """Whether anomalib is in its environment."""
    python = PEERS / "bin" / "python"
    check = "from importlib.metadata import version; assert version('anomalib') == '2.7.0'"
    return python.exists() and not subprocess.run([python, "-c", check], capture_output=True, check=False).returncode


def compare(task: str, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The figures of one task."""
    figures = {f"{task}_import_seconds_{k}": v["seconds_import"] for k, v in (("ours", mine), ("anomalib", theirs))}
    if task == "aupro":
        same = abs(mine["value"] - theirs["value"]) < 1e-6
        difference = mine["value"] - theirs["value"]
        return {
            **figures,
            "aupro_speedup": theirs["seconds"] / mine["seconds"],
            "aupro_equal": same,
            "aupro_difference": difference,
        }
    if task == "coreset":
        equal = np.mean(np.array(mine["picks"]) == np.array(theirs["picks"]))
        n = len(mine["picks"])
        return {
            **figures,
            "coreset_speedup": theirs["seconds"] / mine["seconds"],
            "coreset_equal_picks": float(equal),
            "coreset_equal_set": len(set(mine["picks"]) & set(theirs["picks"])) / n,
            "coreset_ms_per_centre_ours": 1000 * mine["seconds"] / n,
            "coreset_ms_per_centre_anomalib": 1000 * theirs["seconds"] / n,
            "coreset_tenth_seconds_ours": mine["seconds_tenth"],
        }
    for label, side in (("ours", mine), ("anomalib", theirs)):
        figures |= {f"{task}_{k}_{label}": side[k] for k in ("image_auroc", "pixel_auroc", "aupro", "peak_mb")}
        figures |= {f"{task}_{k}_{label}": side[k] for k in ("seconds_fit", "seconds_test", "file_mb")}
    mine_total, theirs_total = (side["seconds_fit"] + side["seconds_test"] for side in (mine, theirs))
    return {
        **figures,
        f"{task}_speedup": theirs_total / mine_total,
        f"{task}_file_ratio": mine["file_mb"] / theirs["file_mb"],
    }


def main() -> None:
    """Run both sides of each task and compare."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--install-peers", action="store_true", help="make the environment with anomalib if missing")
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--train", type=int, default=60, help="training images")
    parser.add_argument("--test", type=int, default=40, help="test images, half of them defective")
    parser.add_argument("--maps", type=int, default=100, help="maps for AUPRO")
    parser.add_argument("--patches", type=int, default=61_440, help="rows for the selection alone")
    parser.add_argument("--centres", type=int, default=1000, help="centres for the selection alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("TASK", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measured = ours(args.child[0], Path(args.child[1]), args.threads, args.centres)
        print(json.dumps({**measured, "peak_mb": _rows.peak_mb()}))
        return
    if args.install_peers:
        install()
    if not installed():
        _rows.say(f"anomalib is not installed beside flawsift; run: python {Path(__file__).name} --install-peers")
        print(json.dumps({"skipped": "anomalib is not installed; use --install-peers"}))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        work = Path(scratch)
        prepare(work, args)
        common = ("--threads", args.threads, "--centres", args.centres)
        peer = Path(__file__).with_name("_peer_anomalib.py")
        offline = {"HF_HUB_OFFLINE": "1"}
        for task in args.only:
            mine = _rows.run_json(__file__, *common, "--child", task, work)
            _rows.say(f"{task}: flawsift {_brief(mine)}")
            python = PEERS / "bin" / "python"
            theirs = _rows.run_json(
                peer, task, "--work", work, "--start", START, *common, python=python, environment=offline
            )
            _rows.say(f"{task}: anomalib {_brief(theirs)}")
            figures |= compare(task, mine, theirs)
            for library, side in (("flawsift", mine), ("anomalib 2.7.0", theirs)):
                row = {**_rows.provenance(), "task": task, "library": library, "alpha": 0.0, "seed": 0}
                row |= {"protocol": f"{args.train} + {args.test} images of 256 x 256", "n_threads": args.threads}
                _rows.append_rows(args.results / "peers.csv", [row | {k: v for k, v in side.items() if k != "picks"}])
    _rows.finish("peers", figures, args)


def _brief(side: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in side.items() if isinstance(v, float))


if __name__ == "__main__":
    main()
