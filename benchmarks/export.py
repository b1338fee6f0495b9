"""What an export changes, and how long a verdict takes: test images of each set by the model and by its files.

One model per set, trained on 10 % contamination as `flawsift fit` does. Scores of the files are compared with those of
the detector with products of float32. Times are of one picture from its pixels in memory to score, verdict and map, one
after the other; the start is that of a new process, from its imports to its first verdict.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import _rows
from _rows import DEVELOPMENT
from accuracy import SIZES, cell_of, loaded_sets
from flawsift.data.contamination import contaminate
from flawsift.deploy.export import export_model, in_float32
from flawsift.detectors.registry import make_detector
from flawsift.executors import Run
from flawsift.features.backbones import load_backbone
from flawsift.metrics.ranking import image_auroc
from flawsift.models.model import Model
from flawsift.models.plan import calibrate, judge, plan_training
from flawsift.runtime import Inspector
from flawsift.screening.options import FINAL, PRESETS
from flawsift.screening.stage1 import screen

ALPHA = 0.1
FORMATS = ("onnx", "openvino")
N_TIMED = 100  # pictures
START = """
import sys, time
started = time.perf_counter()
import numpy as np
from flawsift.runtime import Inspector
Inspector(sys.argv[1])(np.load(sys.argv[2]))
taken = time.perf_counter() - started
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(taken, int(peak) / 1024)
"""


def timed(run: Any, pictures: list[npt.NDArray[np.uint8]]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    run(pictures[0])
    taken = []
    for picture in pictures[:N_TIMED]:
        started = time.perf_counter()
        run(picture)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken), float(np.quantile(taken, 0.99))


def main() -> None:
    """Fill the table."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--sets", nargs="+", default=list(DEVELOPMENT), choices=list(SIZES))
    parser.add_argument("--detectors", nargs="+", default=[FINAL, "patchcore", "padim", "softpatch"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder for features, reused when it exists (default: temporary)")
    args = parser.parse_args()
    path, backbone = args.results / "export.csv", load_backbone()
    figures: dict[str, float] = {}
    for name, data, images in loaded_sets(args.sets, backbone, args.cache):
        split = contaminate(data.truth, alpha=ALPHA, groups=images.groups, seed=args.seed, **SIZES[name])
        train, test = images.select(split.train_ids), images.select(split.test_ids)
        pictures = [np.asarray(test.image(i), np.uint8) for i in test.ids.tolist()]
        labels = data.truth.select(test.ids).labels
        for detector_name in args.detectors:
            detector = make_detector(detector_name, seed=args.seed)
            options, run = PRESETS["default"], Run(seed=args.seed)
            stage1 = screen(train, make_detector(options.screener, seed=args.seed), options, run)
            plan = plan_training(train, detector, stage1, choices={}, same_detector=options.screener == detector_name)
            fitted = detector.clone().fit(plan.images)
            model = Model(fitted, backbone, calibrate(plan, judge(plan, fitted, run)), {"false_alarm_rate": 0.01})
            wanted = in_float32(model).detector.predict(test, maps=False).scores
            ours = timed(lambda picture, model=model: model.predict([picture], maps=True), pictures)
            threshold = model.threshold()
            assert threshold is not None
            with tempfile.TemporaryDirectory() as folder:
                for to in FORMATS:
                    file = export_model(model, Path(folder) / to, to)
                    inspector = Inspector(file)
                    got = np.array([inspector(picture).score for picture in pictures])
                    median, p99 = timed(inspector, pictures)
                    picture = Path(folder) / "picture.npy"
                    np.save(picture, pictures[0])
                    command = [sys.executable, "-c", START, str(file), str(picture)]
                    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                    row = cell_of(data, images, backbone, detector, ALPHA, args.seed) | {
                        "to": to,
                        "n_train": len(plan.images),
                        "n_test": len(test),
                        "largest_difference": float(np.abs(got / wanted - 1).max()),
                        "n_other_verdicts": int(((got > threshold.value) != (wanted > threshold.value)).sum()),
                        "auroc": image_auroc(wanted, labels),
                        "auroc_exported": image_auroc(got, labels),
                        "ms_median": median,
                        "ms_p99": p99,
                        "ms_median_model": ours[0],
                        "seconds_start": float(said[0]),
                        "peak_mb": float(said[1]),
                        "file_mb": sum(part.stat().st_size for part in file.parent.iterdir()) / 1e6,
                    }
                    _rows.append_rows(path, [row])
                    shown = {key: row[key] for key in list(row)[-12:]}
                    _rows.say(f"{name} {detector_name} {to}: {shown}")
                    figures[f"{name}_{detector_name}_{to}_difference"] = row["largest_difference"]
    _rows.finish("export", figures, args)


if __name__ == "__main__":
    main()
