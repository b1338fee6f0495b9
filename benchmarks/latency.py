"""How soon an exported model answers, beside the inferencer of anomalib 2.7.0 in the same run.

Both sides train on the same made-up images, with a ResNet-18 of random weights at 256 px and layers 2 and 3: times do
not depend on what was learned. A picture of 512 x 512 pixels in memory goes in, score, verdict and map come out, one
picture after the other on two cores. The start is that of a new process, from its imports to its first answer.
Quorum is there as well, with the default network, and a bank of as many images.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import _rows
from export import START
from flawsift.data.images import ImageSet
from flawsift.deploy.export import export_model
from flawsift.detectors.padim import PaDiM
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.quorum import Quorum
from flawsift.features.backbones import load_backbone
from flawsift.features.extraction import attach
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model
from flawsift.runtime import Inspector
from peers import PEERS, draw_normal

N_TIMED = 100
PEER = Path(__file__).with_name("_peer_latency.py")


def main() -> None:
    """One row for each detector and library."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--images", type=int, default=400, help="to train on (default: %(default)s)")
    parser.add_argument(
        "--peer-python", type=Path, default=PEERS / "bin" / "python", help="of an environment with anomalib"
    )
    args = parser.parse_args()
    args.peer_python = args.peer_python.absolute()
    generator, figures = np.random.default_rng(0), dict[str, float]()
    train = [draw_normal(generator, 256) for _ in range(args.images)]
    pictures = np.stack([draw_normal(generator, 512) for _ in range(N_TIMED)])
    layers = ("layer2", "layer3")
    detectors = {
        "quorum": (Quorum(n_groups=16), load_backbone(size=256)),
        "patchcore": (PatchCore(layers=layers), load_backbone("random:0:resnet18", size=256)),
        "padim": (PaDiM(layers=layers), load_backbone("random:0:resnet18", size=256)),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.save(work / "pictures.npy", pictures)
        np.save(work / "picture.npy", pictures[0])
        (work / "data" / "good").mkdir(parents=True)
        for i, picture in enumerate(train):
            Image.fromarray(picture).save(work / "data" / "good" / f"{i:03}.png")
        for name, (detector, backbone) in detectors.items():
            images, _ = attach(ImageSet.from_arrays(train), backbone, detector.layers)
            fitted = detector.fit(images)
            scores = fitted.predict(images, maps=False).scores
            model = Model(fitted, backbone, Calibration.of(scores), {"false_alarm_rate": 0.05})
            sides = {}
            for to in ("onnx", "openvino"):
                sides[f"flawsift, {to}"] = _ours(export_model(model, work / f"{name}-{to}", to), work, pictures)
            if name != "quorum" and args.peer_python.exists():
                path = _peer(args, work, "--fit", name)["path"]
                sides["anomalib 2.7.0, openvino"] = _peer(args, work, "--time", path)
                sides["anomalib 2.7.0, openvino in float32"] = _peer(args, work, "--time", path, "--precision", "f32")
            for library, figure in sides.items():
                row = {**_rows.provenance(), "detector": name, "library": library, "n_train": args.images, **figure}
                _rows.append_rows(args.results / "latency.csv", [row])
                _rows.say(f"{name} {library}: {figure}")
                figures[f"{name}_{library}_ms"] = figure["ms_median"]
    _rows.finish("latency", figures, args)


def _ours(path: Path, work: Path, pictures: Any) -> dict[str, float]:
    command = [sys.executable, "-c", START, str(path), str(work / "picture.npy")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    inspector, taken = Inspector(path), []
    inspector(pictures[0])
    for picture in pictures:
        started = time.perf_counter()
        inspector(picture)
        taken.append(1000 * (time.perf_counter() - started))
    return {
        "seconds_start": float(said[0]),
        "ms_median": statistics.median(taken),
        "ms_p99": float(np.quantile(taken, 0.99)),
        "peak_mb": float(said[1]),
        "file_mb": sum(part.stat().st_size for part in path.parent.iterdir()) / 1e6,
    }


def _peer(args: argparse.Namespace, work: Path, *flags: str) -> dict[str, Any]:
    command = [str(args.peer_python), str(PEER), "--work", str(work), *flags]
    # there, since anomalib's inferencer leaves a cache of tens of MB in the folder where it runs
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"anomalib could not do {' '.join(flags)}:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


if __name__ == "__main__":
    main()
