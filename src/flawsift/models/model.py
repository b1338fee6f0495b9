"""A trained model: a detector with its backbone and calibration. It is saved, loaded, asked and measured here.

    predictions = load_model("model").predict("new_parts")

`flawsift.pipeline.fit` makes one.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flawsift
from flawsift.data.alignment import ALIGNMENT, Alignment
from flawsift.data.decoding import UnreadableImage
from flawsift.data.frames import Region
from flawsift.data.images import ImageSet
from flawsift.data.inputs import Images, as_images, is_stream
from flawsift.data.mask_checks import usable_masks
from flawsift.data.roi import REGION
from flawsift.data.truth import GroundTruth
from flawsift.data.values import VALUE_RANGE, ValueRange
from flawsift.detectors.base import Detector, Prediction
from flawsift.detectors.registry import load_detector
from flawsift.errors import FlawsiftError, ModelError, ParameterError
from flawsift.features.backbones import UNSAID, Backbone, load_backbone
from flawsift.features.extraction import SHARD, stream
from flawsift.features.readers import StoredFeatures
from flawsift.files import DamagedPart, new_result, write_json
from flawsift.models.calibration import DEFAULT_RATE, Calibration, Threshold
from flawsift.models.evaluation import MapCollector, measure
from flawsift.models.notices import Observed
from flawsift.models.predictions import ImagePrediction, Predictions, with_scores
from flawsift.models.profile import Profile
from flawsift.models.record import FORMAT, JSON, calibration_of, content_of, fit_record, model_id, told_damage
from flawsift.paths import show
from flawsift.progress import Progress, ProgressOption, Stage, as_progress, silent
from flawsift.types import Ids

FILES = (JSON, "detector.json", "state-*.safetensors")  # patterns of what a model folder holds
LEARNED_DIGITS = 16  # of a digest: 64 bits tell ten million images apart, in a quarter of the room


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A fitted detector with the backbone that it reads and the scores that its threshold comes from.

    Attributes:
        detector: Fitted.
        backbone: The frozen backbone.
        calibration: Which share of good images scores above which threshold.
        training: What it was trained on, for people: counts, digests, options.
        profile: What the training images are like, so that others are noticed; None where it is not known.
        learned: Beginnings of the content digests of the images that it was trained on, see `learned_digests`; None
            where they are not known.
    """

    detector: Detector
    backbone: Backbone
    calibration: Calibration
    training: Mapping[str, Any]
    profile: Profile | None = None
    learned: frozenset[str] | None = None

    @property
    def id(self) -> str:
        """Twelve letters that tell it from other models, whatever its threshold."""
        return model_id(self.training)

    @property
    def rate(self) -> float:
        """The false-alarm rate that it was fitted or calibrated with."""
        return float(self.training.get("false_alarm_rate", DEFAULT_RATE))

    @property
    def value_range(self) -> ValueRange | None:
        """By which it reads images of more than 8 bits; None where it was trained on none."""
        return ValueRange.from_json(self.training.get(VALUE_RANGE))

    @property
    def region(self) -> Region | None:
        """The part of each image that it looks at; None for all."""
        return Region.from_json(self.training.get(REGION))

    @property
    def alignment(self) -> Alignment | None:
        """How it turns and crops images before it looks at them; None leaves them as they are."""
        return Alignment.from_json(self.training.get(ALIGNMENT))

    def threshold(self, false_alarm_rate: float | None = None) -> Threshold | None:
        """The threshold at a false-alarm rate; None takes the model's."""
        return self.calibration.threshold(self.rate if false_alarm_rate is None else false_alarm_rate)

    def predict(
        self,
        images: Images,
        *,
        false_alarm_rate: float | None = None,
        device: str = "auto",
        maps: bool = False,
        on_maps: Callable[[ImageSet, Prediction], None] | None = None,
        progress: ProgressOption = None,
    ) -> Predictions:
        """Score new images. Memory stays flat: images go through in pieces and nothing but scores is kept.

        Where they are not like the training images, `Predictions.notices` says in what.

        Args:
            images: A folder, an image file, a pattern such as "parts/*.png", a PIL image, an array, a list or an
                iterator of these, or a set; see `flawsift.data.inputs.as_images`. An iterator is read piece by piece
                and never held. Of one image, `Predictions.item` gives what is said.
            false_alarm_rate: For the threshold; None takes the model's.
            device: Where the detector runs.
            maps: Keep the anomaly maps too, (H, W) float32 on the network's input grid: a quarter of a megabyte per
                image at 256 x 256, all in memory. For many images take `stream`, or `on_maps`.
            on_maps: Called with each piece and its scores and maps, which are not kept.
            progress: True for a bar, or a callable that is told about each piece.

        Raises:
            InputError: There are no images, or one is missing.
            NotAnImage: Something else was given, alone or in a list; it is a TypeError too.
        """
        given = images if is_stream(images) else as_images(images).within(self.value_range)
        threshold, observed = self.threshold(false_alarm_rate), Observed()
        with as_progress(progress) as tell:
            pieces = self._pieces(
                given, threshold, device, maps=maps, on_maps=on_maps, progress=tell, observed=observed
            )
            parts = list(pieces)
        return Predictions(
            ids=np.concatenate([np.empty(0, np.int64), *(part.ids for part in parts)]),
            names=tuple(name for part in parts for name in part.names),
            scores=np.concatenate([np.empty(0), *(part.scores for part in parts)]),
            errors={id_: reason for part in parts for id_, reason in part.errors.items()},
            threshold=threshold,
            calibration=self.calibration,
            maps={id_: one for part in parts for id_, one in (part.maps or {}).items()} if maps else None,
            images=given if isinstance(given, ImageSet) else None,
            notices=observed.notices(self.profile, self.calibration),
            model_id=self.id,
        )

    def stream(
        self,
        images: Images,
        *,
        false_alarm_rate: float | None = None,
        device: str = "auto",
        maps: bool = True,
        batch_size: int = SHARD,
    ) -> Iterator[ImagePrediction]:
        """Score new images one after the other, with maps, however many there are: nothing is kept.

        Args:
            images: As for `predict`, and so are false_alarm_rate and device.
            maps: Make anomaly maps.
            batch_size: Images that are read before the first of them is answered. More are faster, 1 answers each at
                once, as a camera needs it; scores are the same, rounding aside.

        Yields:
            What is said of each image, in order.

        Raises:
            InputError, NotAnImage: As for `predict`.
            ParameterError: `batch_size` is smaller than 1.
        """
        if batch_size < 1:
            raise ParameterError(f"batch_size must be at least 1, got {batch_size}.")
        given = images if is_stream(images) else as_images(images)
        threshold = self.threshold(false_alarm_rate)
        return itertools.chain.from_iterable(self._pieces(given, threshold, device, maps=maps, size=batch_size))

    def evaluate(
        self,
        images: Images,
        truth: GroundTruth,
        *,
        device: str = "auto",
        exact_pixels: int | None = None,
        progress: ProgressOption = None,
    ) -> tuple[dict[str, Any], Predictions]:
        """Metrics of the model on labelled images; it never sees the labels.

        Args:
            images: Test images, as for `predict`; an iterator is read to its end first.
            truth: Labels and masks by global id.
            device: Where the detector runs.
            exact_pixels: With more map pixels than this, AUPRO is streamed instead of holding all maps: it gets an
                `aupro_bound`, and the other pixel metrics are None. None is always exact.
            progress: As for `predict`.

        Returns:
            As `flawsift.metrics.ranking.evaluate`, with false_alarms_per_100 and missed_per_100 at the model's
            threshold; hits_per_100, of how many in 100 found defective images with a mask the highest place of the map
            lies in it; and n_trained_on, the number of images that the model was trained on, which flatter it; and the
            predictions.

        Raises:
            InputError: No image can be read, or an image has no label.
        """
        with as_progress(progress) as tell:
            return self._evaluated(as_images(images), truth, device, exact_pixels, tell)

    def _evaluated(
        self, images: ImageSet, truth: GroundTruth, device: str, exact_pixels: int | None, progress: Progress
    ) -> tuple[dict[str, Any], Predictions]:
        chosen = images.within(self.value_range)
        truth = usable_masks(truth.select(chosen.ids), chosen)
        maps = MapCollector(truth, exact_pixels, len(chosen)) if truth.has_masks else None
        predictions = self.predict(chosen, device=device, on_maps=maps, progress=progress)
        progress(Stage.MEASURING, 0, 1)
        n_trained_on = None if self.learned is None else len(self.trained_on(content_digests(chosen)))
        return {**measure(predictions, truth, maps), "n_trained_on": n_trained_on}, predictions

    def trained_on(self, digests: Mapping[int, str]) -> Ids:
        """(K,) ids of images that the model was trained on, as far as it knows: to it they are not new.

        Args:
            digests: {id: content digest} of images, from `content_digests`.
        """
        learned = self.learned or frozenset()
        return np.array([i for i, digest in digests.items() if digest[:LEARNED_DIGITS] in learned], np.int64)

    def _pieces(
        self,
        images: Images,
        threshold: Threshold | None,
        device: str,
        *,
        maps: bool,
        on_maps: Callable[[ImageSet, Prediction], None] | None = None,
        size: int = SHARD,
        progress: Progress = silent,
        observed: Observed | None = None,
    ) -> Iterator[Predictions]:
        """Predictions of one piece after the other, as they are made."""
        region, seen = self.region, (self.value_range, self.alignment)
        for piece in stream(images, self.backbone, self.detector.layers, *seen, size=size, progress=progress):
            piece = piece._replace(data=piece.data.looked_at(region))
            scores: dict[int, float] = {}
            kept: dict[int, npt.NDArray[np.float32]] = {}
            failed = piece.failed
            if len(piece.data):
                predicted = self.detector.predict(piece.data, device=device, maps=maps or on_maps is not None)
                prediction, without = with_scores(predicted)
                failed = {**failed, **without}
                scores.update(zip(prediction.ids.tolist(), prediction.scores.tolist(), strict=True))
                if maps and prediction.maps is not None:
                    kept.update(zip(prediction.ids.tolist(), prediction.maps, strict=True))
                if on_maps is not None:
                    on_maps(piece.data.select(prediction.ids), prediction)
                if observed is not None:
                    observed.add(piece.facts, prediction)
            ids, names = piece.images.ids, tuple(piece.images.names)
            values = np.array([scores.get(id_, np.nan) for id_ in ids.tolist()], np.float64)
            calibration, all_maps = self.calibration, kept if maps else None
            yield Predictions(ids, names, values, failed, threshold, calibration, all_maps)

    def __repr__(self) -> str:
        n_kept, n_images = (self.training.get(key, "?") for key in ("n_kept", "n_images"))
        network = f"{self.backbone.name} at {self.backbone.size} pixels"
        threshold = self.threshold() or "no threshold"
        return f"Model: {self.detector.name} on {network}, trained on {n_kept} of {n_images} images\n{threshold}"

    def save(self, folder: str | Path) -> Path:
        """Write a model folder: JSON and safetensors. The old model stays valid until the new one is complete.

        Raises:
            OutputError: It cannot be written.
        """
        with new_result(Path(folder), old=FILES) as new:
            self.write_files(new)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """Write what a model folder holds into an empty folder, of `flawsift.files.new_result`."""
        content = {
            "format": FORMAT,
            "flawsift": flawsift.__version__,
            "backbone": {"spec": self.backbone.spec, "weights_digest": self.backbone.weights_digest},
            **self._threshold_content(),
            "profile": None if self.profile is None else self.profile.as_json(),
            "learned": None if self.learned is None else sorted(self.learned),
        }
        content["detector_digest"] = self.detector.save(folder)
        write_json(folder / JSON, content)

    def save_threshold(self, folder: str | Path) -> Path:
        """Give a saved model the threshold of this one, which was made of it, in one step.

        Raises:
            ModelError: The folder holds no model, or another one by now.
            OutputError: It cannot be written.
        """
        folder = Path(folder)
        with told_damage(folder):
            content = content_of(folder)
            same = fit_record(content["training"]) == fit_record(self.training)
        if not same:
            raise ModelError(f"'{folder}' holds another model by now, which was left as it is. Calibrate it anew.")
        with new_result(folder, adds=True) as new:
            write_json(new / JSON, {**content, **self._threshold_content()})
        return folder

    def _threshold_content(self) -> dict[str, Any]:
        threshold = self.threshold()
        return {
            "threshold": None if threshold is None else {**vars(threshold), "per_hundred": threshold.per_hundred},
            "training": dict(self.training),
            "calibration": self.calibration.to_json(),
        }


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
    with told_damage(folder):
        content = content_of(folder)
        spec, digest = content["backbone"]["spec"], str(content["backbone"]["weights_digest"])
        training, told = dict(content["training"]), content.get("profile")  # models of before have none
        calibration = calibration_of(content)
        profile = None if told is None else Profile.from_json(told)
        Region.from_json(training.get(REGION)), Alignment.from_json(training.get(ALIGNMENT))  # damage is told now
        known = content.get("learned")
        learned = None if known is None else frozenset(map(str, known))
        detector = load_detector(folder, digest=str(content["detector_digest"]))
        _check_same(detector, training.get("detector"))
        of_backbone = {**UNSAID, **spec, "runtime": runtime, **({"weights": weights} if weights else {})}
        inspect.signature(load_backbone).bind(**of_backbone)
    try:
        backbone = load_backbone(**of_backbone)
    except FlawsiftError as error:
        raise type(error)(f"The backbone of the model in '{show(folder)}': {error}") from error
    if backbone.weights_digest != digest:
        raise ModelError(
            f"The model in '{folder}' was fitted with other weights of {backbone.name} "
            f"({digest[:12]}, these are {backbone.weights_digest[:12]}). Give them with --weights."
        )
    return Model(detector, backbone, calibration, training, profile, learned)


def _check_same(detector: Detector, told: Mapping[str, Any] | None) -> None:
    """Refuse a detector with other parameters than were trained; earlier versions did not know all of today's."""
    params = json.loads(json.dumps(detector.params()))
    if told is not None and any(params.get(name) != value for name, value in told["params"].items()):
        raise DamagedPart(f"detector.json has other parameters than {JSON}")


def set_digest(images: ImageSet) -> str:
    """SHA-256 over ids, relative paths and, where they are known, contents of a set, in order."""
    digests = images.reader.digests if isinstance(images.reader, StoredFeatures) else {}
    listed = zip(images.ids.tolist(), images.names, strict=True)
    lines = "\n".join(f"{i} {show(name)} {digests.get(i, '')}" for i, name in listed)
    sha256 = hashlib.sha256(lines.encode())
    for i, mask in sorted(images.rejected.items()):
        sha256.update(f"{i} {mask.shape} ".encode() + np.packbits(mask).tobytes())
    return sha256.hexdigest()


def content_digests(images: ImageSet) -> dict[int, str]:
    """{id: SHA-256 of the content} of the images that can be read."""
    if isinstance(images.reader, StoredFeatures):
        return {i: images.reader.digests[i] for i in images.ids.tolist()}
    digests = {}
    for i in images.ids.tolist():
        with contextlib.suppress(UnreadableImage):
            digests[i] = images.source.digest(i)
    return digests


def learned_digests(images: ImageSet) -> frozenset[str]:
    """Of training images, the beginnings of their content digests, by which they are known again."""
    return frozenset(digest[:LEARNED_DIGITS] for digest in content_digests(images).values())


# The methods of `Model` as functions, whose first argument is the model.
predict = Model.predict
evaluate = Model.evaluate
