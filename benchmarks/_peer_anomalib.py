"""anomalib's side of peers.py, run by the python of its own environment; the last line of stdout is JSON.

It stands alone: flawsift is not installed there. Imports are not part of any measured time.
"""

import argparse
import json
import logging
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")


def peak_mb() -> float:
    """The largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def detector(args: argparse.Namespace) -> dict[str, Any]:
    """Fit (with the validation pass that sets its thresholds) and test with metrics."""
    started = time.perf_counter()
    import anomalib.metrics  # noqa: F401  # for the evaluator, so that its import is not in the times below
    import torch
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Padim, Patchcore
    from lightning import seed_everything

    result: dict[str, Any] = {"seconds_import": time.perf_counter() - started}
    logging.getLogger("anomalib").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    seed_everything(0, verbose=False)
    work = Path(args.work)
    # no worker processes: with 60 small images they cost more than they save
    folder = Folder(
        name="synthetic",
        root=work / "data",
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/defect",
        mask_dir="ground_truth/defect",
        train_batch_size=16,
        eval_batch_size=16,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    common: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "visualizer": False}
    common["evaluator"] = evaluator()
    if args.task == "patchcore":
        model = Patchcore(layers=("layer2", "layer3"), coreset_sampling_ratio=args.ratio, **common)
    else:
        model = Padim(layers=["layer1", "layer2", "layer3"], n_features=100, **common)
        # the same 100 channels as flawsift's PaDiM with seed 0
        drawn = torch.randperm(len_all(model), generator=torch.Generator().manual_seed(0))
        model.model.idx.copy_(drawn[:100].sort().values)
    network = model.model.feature_extractor.feature_extractor
    loaded = network.load_state_dict(torch.load(work / "weights.pth", weights_only=True), strict=False)
    if loaded.missing_keys:
        raise RuntimeError(f"weights.pth lacks {loaded.missing_keys[:5]}")
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        engine = Engine(default_root_dir=scratch, accelerator="cpu", enable_progress_bar=False, logger=False)
        started = time.perf_counter()
        engine.fit(model=model, datamodule=folder)
        result["seconds_fit"] = time.perf_counter() - started
        started = time.perf_counter()
        tested = engine.test(model=model, datamodule=folder, verbose=False)[0]
        result["seconds_test"] = time.perf_counter() - started
        result["file_mb"] = sum(p.stat().st_size for p in Path(scratch).rglob("*.ckpt")) / 1e6
    names = {"image_AUROC": "image_auroc", "pixel_AUROC": "pixel_auroc", "pixel_AUPRO": "aupro"}
    result |= {ours: float(tested[theirs]) for theirs, ours in names.items()}
    if args.task == "patchcore":
        result["n_centres"] = int(model.model.memory_bank.shape[0])
    return result


def evaluator() -> Any:
    """The metrics that anomalib computes in its test."""
    from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Score

    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    metrics = [
        AUROC(fields=image, prefix="image_"),
        F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
        AUROC(fields=pixel, prefix="pixel_"),
        F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
        AUPRO(fields=pixel, prefix="pixel_"),
    ]
    return Evaluator(test_metrics=metrics)


def len_all(model: Any) -> int:
    """Number of channels that a PaDiM draws from."""
    return int(model.model.n_features_original)


def aupro(args: argparse.Namespace) -> dict[str, Any]:
    """The metric alone, best of three."""
    started = time.perf_counter()
    import numpy as np
    import torch
    from anomalib.metrics.aupro import _AUPRO

    result: dict[str, Any] = {"seconds_import": time.perf_counter() - started}
    torch.set_num_threads(args.threads)
    maps = torch.from_numpy(np.load(Path(args.work) / "maps.npy"))
    masks = torch.from_numpy(np.load(Path(args.work) / "masks.npy").astype(np.int64))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        metric = _AUPRO()
        for start in range(0, len(maps), 16):
            metric.update(maps[start : start + 16], masks[start : start + 16])
        result["value"] = float(metric.compute())
        seconds.append(time.perf_counter() - started)
    return {**result, "seconds": min(seconds)}


def coreset(args: argparse.Namespace) -> dict[str, Any]:
    """The selection loop of `KCenterGreedy.select_coreset_idxs`, from a given start and on given features."""
    started = time.perf_counter()
    import numpy as np
    import torch
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    result: dict[str, Any] = {"seconds_import": time.perf_counter() - started}
    torch.set_num_threads(args.threads)
    features = torch.from_numpy(np.load(Path(args.work) / "features.npy"))
    sampler = KCenterGreedy(features, args.centres / len(features))
    sampler.features = features
    sampler.reset_distances()
    index = torch.tensor(args.start)
    picks = [index]
    started = time.perf_counter()
    for _ in range(args.centres - 1):
        sampler.update_distances(index)
        index = sampler.get_new_idx()
        sampler.min_distances.scatter_(0, index.unsqueeze(0).unsqueeze(1), 0.0)
        picks.append(index)
    result["seconds"] = time.perf_counter() - started
    return {**result, "picks": torch.stack(picks).tolist()}


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["patchcore", "padim", "aupro", "coreset"])
    parser.add_argument("--work", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--centres", type=int, default=1000)
    parser.add_argument("--start", type=int, default=7)
    args = parser.parse_args()
    run = {"aupro": aupro, "coreset": coreset}.get(args.task, detector)
    print(json.dumps({**run(args), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
