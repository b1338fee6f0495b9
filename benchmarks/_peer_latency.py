"""anomalib's side of latency.py, run by the python of its own environment; the last line of stdout is JSON.

It stands alone: flawsift is not installed there.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
EDGE = 256


def exported(work: Path, name: str) -> Path:
    """Fit on work/data/good and export to OpenVINO; the file."""
    import torch
    from anomalib.data import Folder
    from anomalib.deploy import ExportType
    from anomalib.engine import Engine
    from anomalib.models import Padim, Patchcore
    from lightning import seed_everything

    logging.getLogger("anomalib").setLevel(logging.WARNING)
    torch.set_num_threads(2)
    seed_everything(0, verbose=False)
    folder = Folder(
        name="made_up",
        root=work / "data",
        normal_dir="good",
        train_batch_size=16,
        eval_batch_size=16,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="from_train",
    )
    common: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "visualizer": False, "evaluator": False}
    layers = ["layer2", "layer3"]
    model = (
        Padim(layers=layers, **common)
        if name == "padim"
        else Patchcore(layers=layers, coreset_sampling_ratio=0.01, **common)
    )
    engine = Engine(default_root_dir=work / name, accelerator="cpu", enable_progress_bar=False, logger=False)
    engine.fit(model=model, datamodule=folder)
    path = engine.export(model, ExportType.OPENVINO, export_root=work / name, input_size=(EDGE, EDGE))
    assert path is not None
    return Path(path)


def shrunk(picture: Any) -> Any:
    """The file takes one size only, so a client resizes."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((EDGE, EDGE), Image.Resampling.BILINEAR))


def timed(path: Path, pictures: Path, precision: str | None) -> dict[str, float]:
    """From a new process to the first answer, and then picture by picture; None for the precision that it takes."""
    started = time.perf_counter()
    import numpy as np
    from anomalib.deploy import OpenVINOInferencer

    config = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    inferencer = OpenVINOInferencer(path, device="CPU", config=config)
    given = np.load(pictures)
    prepare = inferencer.pre_process
    # the file was written for batches of two, which its own inferencer does not send: each picture goes twice, and
    # half of the time is counted
    inferencer.pre_process = lambda picture: np.concatenate([prepare(picture)] * 2)
    inferencer.predict(shrunk(given[0]))
    first = time.perf_counter() - started
    taken = []
    for picture in given:
        started = time.perf_counter()
        inferencer.predict(shrunk(picture))
        taken.append(500 * (time.perf_counter() - started))
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # noqa: SIM115
    return {
        "seconds_start": first,
        "ms_median": statistics.median(taken),
        "ms_p99": float(np.quantile(taken, 0.99)),
        "peak_mb": int(peak) / 1024,
        "file_mb": sum(part.stat().st_size for part in path.parent.iterdir()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fit")
    parser.add_argument("--time", type=Path)
    parser.add_argument("--precision")
    args = parser.parse_args()
    if args.fit:
        print(json.dumps({"path": str(exported(args.work, args.fit))}))
    else:
        print(json.dumps(timed(args.time, args.work / "pictures.npy", args.precision)))


if __name__ == "__main__":
    main()
