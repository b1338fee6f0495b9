"""A trained model: a detector with its backbone and calibration. It is saved, loaded, asked and measured here.

found = predict(load_model("model"), "new_parts")
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flawsift
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Detector, Prediction, load_detector
from flawsift.errors import InputError, ModelError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.store import StoredFeatures, stream
from flawsift.files import content_digest, ensure_folder, write_json
from flawsift.metrics import ranking as metrics
from flawsift.metrics.aupro import StreamingAUPRO
from flawsift.models.calibration import DEFAULT_RATE, Calibration, Threshold
from flawsift.models.predictions import Predictions
from flawsift.paths import show
from flawsift.progress import Progress, silent

FORMAT = 1  # of the model folder
VERSIONED = ("torch", "timm", "openvino", "numpy", "pillow")  # packages whose version can change a score


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted detector with the backbone that it reads and the scores that its threshold comes from.

    Attributes:
        detector: Fitted.
        backbone: The frozen backbone.
        calibration: Held-out scores of the kept training images.
        training: What it was trained on, for people: counts, digests, options.
    """

    detector: Detector
    backbone: Backbone
    calibration: Calibration
    training: Mapping[str, Any]

    def threshold(self, false_alarm_rate: float | None = None) -> Threshold | None:
        """The threshold at a false-alarm rate; None takes the rate it was fitted with."""
        rate = self.training.get("false_alarm_rate", DEFAULT_RATE) if false_alarm_rate is None else false_alarm_rate
        return self.calibration.threshold(rate)

    def save(self, folder: str | Path) -> Path:
        """Write a model folder: JSON and safetensors. The old model stays valid until the new one is complete.

        Raises:
            OutputError: It cannot be written.
        """
        folder = ensure_folder(folder)
        backbone = {"spec": self.backbone.spec, "weights_digest": self.backbone.weights_digest}
        threshold = self.threshold()
        content = {
            "format": FORMAT,
            "flawsift": flawsift.__version__,
            "backbone": backbone,
            "threshold": None if threshold is None else {**vars(threshold), "per_hundred": threshold.per_hundred},
            "training": dict(self.training),
            "calibration": [float(f"{s:.9g}") for s in self.calibration.scores],
        }
        content["detector_digest"] = self.detector.save(folder)
        write_json(folder / "model.json", content)
        return folder


def load_model(folder: str | Path, *, weights: str | Path | None = None, runtime: str = "auto") -> Model:
    """Read a model folder.

    Args:
        folder: What `Model.save` wrote.
        weights: The backbone's weights file, where it was fitted with one.
        runtime: As for `load_backbone`.

    Raises:
        ModelError: The folder is missing, damaged or newer than this version, or the backbone is another one.
        WeightsError: The backbone's weights are not to be had.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "model.json").read_text("utf-8"))
        if content["format"] > FORMAT:
            raise ModelError(f"'{folder}' was written by flawsift {content['flawsift']}; update flawsift to read it.")
        spec, digest = content["backbone"]["spec"], content["backbone"]["weights_digest"]
        calibration = Calibration.of(content["calibration"])
        training = content["training"]
        torn = content_digest((folder / "detector.json").read_bytes()) != content["detector_digest"]
    except OSError as error:
        raise ModelError(f"'{folder}' is not a model folder: {error.strerror} ({error.filename}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{folder}' holds a damaged model.json: {error!r}. Fit the model again.") from error
    if torn:
        raise ModelError(f"'{folder}' holds parts of two models: a fit was interrupted. Fit the model again.")
    backbone = load_backbone(**{**spec, "runtime": runtime, **({"weights": weights} if weights else {})})
    if backbone.weights_digest != digest:
        raise ModelError(
            f"The model in '{folder}' was fitted with other weights of {backbone.name} "
            f"({digest[:12]}, these are {backbone.weights_digest[:12]}). Give them with --weights."
        )
    return Model(load_detector(folder), backbone, calibration, training)


def versions() -> dict[str, str]:
    """Versions of what can change a score."""
    found = {"flawsift": flawsift.__version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def set_digest(images: ImageSet) -> str:
    """SHA-256 over ids, relative paths and, where they are known, contents of a set, in order."""
    digests = images.reader.digests if isinstance(images.reader, StoredFeatures) else {}
    listed = zip(images.ids.tolist(), images.names, strict=True)
    lines = "\n".join(f"{i} {show(name)} {digests.get(i, '')}" for i, name in listed)
    found = hashlib.sha256(lines.encode())
    for i, mask in sorted(images.rejected.items()):
        found.update(f"{i} {mask.shape} ".encode() + np.packbits(mask).tobytes())
    return found.hexdigest()


def predict(
    model: Model,
    images: ImageSet | str | Path,
    *,
    false_alarm_rate: float | None = None,
    device: str = "auto",
    on_maps: Callable[[ImageSet, Prediction], None] | None = None,
    progress: Progress = silent,
) -> Predictions:
    """Score new images. Memory stays flat: images go through in pieces and nothing but scores is kept.

    Args:
        model: From `fit` or `load_model`.
        images: A folder or a set.
        false_alarm_rate: For the threshold; None takes the model's.
        device: Where the detector runs.
        on_maps: Called with each piece and its scores and maps.
        progress: Told about each piece.

    Raises:
        InputError: The folder has no images.
    """
    found = images if isinstance(images, ImageSet) else ImageSet.from_folder(images)
    threshold = model.threshold(false_alarm_rate)
    scores: dict[int, float] = {}
    errors: dict[int, str] = {}
    for data, failed in stream(found, model.backbone, model.detector.layers, progress=progress):
        errors |= failed
        if len(data):
            prediction = model.detector.predict(data, device=device, maps=on_maps is not None)
            scores.update(zip(prediction.ids.tolist(), prediction.scores.tolist(), strict=True))
            if on_maps is not None:
                on_maps(data, prediction)
    values = np.array([scores.get(int(i), np.nan) for i in found.ids])
    return Predictions(found.ids, tuple(found.names), values, errors, threshold)


def evaluate(
    model: Model,
    images: ImageSet,
    truth: GroundTruth,
    *,
    device: str = "auto",
    exact_pixels: int | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Predictions]:
    """Metrics of a fitted model on labelled images; the model never sees the labels.

    Args:
        model: From `fit` or `load_model`.
        images: Test images.
        truth: Labels and masks by global id.
        device: Where the detector runs.
        exact_pixels: With more map pixels than this, AUPRO is streamed instead of holding all maps: it gets an
            `aupro_bound`, and the other pixel metrics are None. None is always exact.
        progress: Told about each piece.

    Returns:
        As `flawsift.metrics.ranking.evaluate`, with false_alarms_per_100 and missed_per_100 at the model's threshold;
        and the predictions.

    Raises:
        InputError: No image can be read, or an image has no label.
    """
    maps = _Maps(truth, exact_pixels, len(images)) if truth.select(images.ids).has_masks else None
    found = predict(model, images, device=device, on_maps=maps, progress=progress)
    readable = np.isfinite(found.scores)
    if not readable.any():
        raise InputError(f"None of the {len(images)} test images can be read.")
    ids, scores = found.ids[readable], found.scores[readable]
    result: dict[str, Any] = dict(metrics.evaluate(ids, scores, truth, None if maps is None else maps.kept))
    if maps is not None and maps.stream is not None and result["n_anomalous"] > 0:
        result |= {"aupro": maps.stream.compute(), "aupro_bound": maps.stream.error_bound()}
    labels = truth.select(ids).labels
    stopped = None if found.threshold is None else scores > found.threshold.value
    for key, cls, wrong in (("false_alarms_per_100", 0, stopped), ("missed_per_100", 1, stopped)):
        mine = labels == cls
        share = None if wrong is None or not mine.any() else float((wrong[mine] != bool(cls)).mean())
        result[key] = None if share is None else 100 * share
    result["n_unreadable"] = int((~readable).sum())
    return result, found


@dataclass
class _Maps:
    """Keeps maps as they come, or streams them where they are too many."""

    truth: GroundTruth
    exact_pixels: int | None
    n_images: int
    kept: list[npt.NDArray[np.float32]] | None = field(default_factory=list)
    stream: StreamingAUPRO | None = None

    def __call__(self, images: ImageSet, prediction: Prediction) -> None:
        assert prediction.maps is not None
        if self.exact_pixels is not None and self.n_images * prediction.maps[0].size > self.exact_pixels:
            self.kept, self.stream = None, self.stream or StreamingAUPRO()
        if self.kept is not None:
            self.kept.extend(prediction.maps)
        if self.stream is None:
            return
        for id_, found in zip(prediction.ids.tolist(), prediction.maps, strict=True):
            mask = self.truth.mask(id_, found.shape)
            assert mask is not None  # every anomalous image has one
            self.stream.update(found, mask)
