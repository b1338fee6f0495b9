"""Neither importing nor fitting on the CPU starts CUDA, which costs seconds and memory where there is a GPU."""

import os
import subprocess
import sys

SCRIPT = """
import torch

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was started")

torch.cuda._lazy_init = refuse
import numpy as np
from flawsift import pipeline
from flawsift.cli import main as cli
from flawsift.reports import diagnostics
from flawsift.detectors.registry import DETECTORS, detector_class
from flawsift.features.readers import MemoryFeatures
from flawsift.data.images import ImageSet

for name in DETECTORS:
    detector_class(name)
images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 12)
features = np.random.default_rng(0).normal(size=(12, 4, 4, 4)).astype(np.float32)
reader = MemoryFeatures(32, "t", {("", i): i for i in range(12)}, {"a": features})
data = ImageSet(images.ids, images.source, {}, reader)
small = {"softpatch": {}, "inreach": {"spread": 50.0}, "funad": {"steps": 2, "hidden": (4,)}}
for name, params in small.items():
    detector_class(name)(layers=("a",), **params).fit(data, device="cpu").predict(data, device="cpu")
diagnostics.diagnose(data, "a")
try:
    torch.zeros(1, device="cuda")
except AssertionError as error:
    print(error)
"""


def test_the_cpu_path_never_starts_cuda() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA was started" in done.stdout, "the guard does not guard"
