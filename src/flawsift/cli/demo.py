"""The whole chain on real solar cells, with the labels used only at the end, to say how well it went."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawsift import pipeline
from flawsift.data.contamination import contaminate
from flawsift.data.listing import MAPS
from flawsift.data.truth import GroundTruth
from flawsift.datasets import load
from flawsift.detectors.registry import make_detector
from flawsift.features.backbones import load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.files import write_json
from flawsift.models import model as models
from flawsift.models.calibration import Calibration
from flawsift.progress import Progress, Stage, silent
from flawsift.reports.pages import REPORT
from flawsift.reports.predictions import OverlayWriter, move_earlier_maps, write_predictions
from flawsift.screening.result import Screening

# Sizes that end within five minutes on two cores, features of all images included.
N_TRAIN = 400
N_TEST = 150  # good and defective each
ALPHA = 0.2  # every fifth training image is defective
TOP = 20  # suspects that an engineer would look at first
N_OVERLAYS = 12


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        out: Its folder.
        report: The screening's page.
        n_train: Training images.
        n_defective: How many of them are defective.
        top: Suspects looked at.
        top_defective: How many of those are truly defective.
        removed: Images set aside.
        removed_defective: How many of those are truly defective.
        detector: The class of the model's detector.
        without_screening: Metrics on the test images of PatchCore trained on everything.
        with_screening: Metrics of the model that `flawsift fit` trains.
        seconds: All of it.
    """

    out: Path
    report: Path
    n_train: int
    n_defective: int
    top: int
    top_defective: int
    removed: int
    removed_defective: int
    detector: str
    without_screening: Mapping[str, Any]
    with_screening: Mapping[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All fields, paths as texts."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}

    def lines(self) -> list[str]:
        """For people."""
        share = 100 * self.n_defective / self.n_train
        before, after = self.without_screening["image_auroc"], self.with_screening["image_auroc"]
        return [
            f"{self.n_train} real solar cells, {self.n_defective} of them defective ({share:.0f} %), unlabelled.",
            f"Of its top {self.top} suspects, {self.top_defective} are truly defective.",
            f"It set {self.removed} images aside, {self.removed_defective} of them truly defective.",
            f"Image AUROC on {2 * N_TEST} new cells: {before:.3f} by PatchCore, {after:.3f} by {self.detector}, both "
            "trained without labels.",
            f"Took {self.seconds:.0f} s.",
            f"Heatmaps: {self.out / MAPS}",
            f"Next:     flawsift predict {self.out / 'model'} YOUR_IMAGES --out predictions",
            f"Report:   {self.report}",
            f"Decide image by image: flawsift review {self.out / 'model'}",
        ]


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    store: FeatureStore | None = None,
    progress: Progress = silent,
) -> DemoResult:
    """Screen, fit with and without screening, evaluate, write everything to `out`.

    Raises:
        InputError: The package elpv-dataset is not installed.
        OutputError: `out` cannot be written.
    """
    started = time.monotonic()
    out = Path(out)
    progress(Stage.FINDING, 0, 1)
    data = load("elpv")
    split = contaminate(data.truth, alpha=ALPHA, n_train=N_TRAIN, test_normal=N_TEST, test_anomalous=N_TEST, seed=seed)
    train, test = data.images.select(split.train_ids), data.images.select(split.test_ids)
    progress(Stage.LOADING, 0, 1)
    backbone, detector = load_backbone(device=device), make_detector("patchcore", seed=seed)
    common: dict[str, Any] = {"store": store or FeatureStore(), "seed": seed, "device": device, "progress": progress}
    fitted = pipeline.fit(train, backbone=backbone, out=out / "model", **common)
    model, screening = fitted.model, fitted.screening
    assert screening is not None
    progress(Stage.TRAINING, 0, 1)
    features, _ = attach(train, backbone, detector.layers, store=common["store"])  # cached by now
    plain = detector.clone().fit(features, device=device)
    unscreened = models.Model(plain, backbone, Calibration.of([]), {})
    test, _ = attach(test, backbone, detector.layers, store=common["store"], progress=progress)  # once for both models
    before, _ = models.evaluate(unscreened, test, data.truth, device=device, progress=progress)
    after, predictions = models.evaluate(model, test, data.truth, device=device, progress=progress)
    progress(Stage.WRITING, 0, 1)
    worst = test.select(predictions.ids[np.argsort(-predictions.scores)[:N_OVERLAYS]])
    move_earlier_maps(out, worst.names)
    write_predictions(predictions, out, data.truth, heatmaps=worst.ids.tolist())
    models.predict(model, worst, device=device, on_maps=OverlayWriter(out / MAPS, model.calibration, model.threshold()))
    write_json(out / "metrics.json", {"without_screening": before, "with_screening": after})
    return DemoResult(
        out=out,
        report=out / "model" / "screening" / REPORT,
        detector=type(model.detector).__name__,
        without_screening=before,
        with_screening=after,
        seconds=round(time.monotonic() - started, 1),
        **_counts(screening, data.truth),
    )


def _counts(screening: Screening, truth: GroundTruth) -> dict[str, int]:
    top, removed = screening.ranking[:TOP], screening.removed
    return {
        "n_train": len(screening.ids),
        "n_defective": int(truth.select(screening.ids).labels.sum()),
        "top": len(top),
        "top_defective": int(truth.select(top).labels.sum()),
        "removed": len(removed),
        "removed_defective": int(truth.select(removed).labels.sum()) if len(removed) else 0,
    }
