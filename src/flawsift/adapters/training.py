"""What our detectors learn and say under other libraries' interfaces: of images, or of rows of features."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift import pipeline
from flawsift.adapters.rows import LAYER, Columns, as_patches
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.executors import Run
from flawsift.features.backbones import fitting_size, load_backbone
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model
from flawsift.models.plan import judge, plan_training
from flawsift.paths import name_some
from flawsift.types import Floats

BATCH = 32  # rows that are scored at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and how.

    Attributes:
        detector: A registry name or an unfitted detector.
        backbone: A name for `load_backbone`; rows of features have none.
        size: Edge length in pixels of the network's input; None takes what fits the images.
        seed: Of everything random.
        device: "auto" takes a GPU where there is one.
    """

    detector: Detector | str
    backbone: str
    size: int | None
    seed: int
    device: str


@dataclass(frozen=True, eq=False)
class Trained:
    """A detector fitted on N images, or on N rows.

    Attributes:
        detector: Fitted.
        calibration: Thresholds by their false-alarm rates.
        held_out: (N,) scores of the training images, each by a model that has not seen it.
        model: That of images, which can be saved; None of rows.
        columns: Units of rows; None of images.
        device: Where it runs.
    """

    detector: Detector
    calibration: Calibration
    held_out: Floats
    model: Model | None
    columns: Columns | None
    device: str

    def scores(self, given: "ImageSet | npt.NDArray[Any]") -> Floats:
        """(N,) of images or rows, as it was trained on; higher is more anomalous.

        Raises:
            InputError: An image cannot be read, or it was trained on the other kind.
        """
        if isinstance(given, ImageSet):
            if self.model is None:
                raise InputError("This detector was fitted on rows of features, and got images.")
            predictions = self.model.predict(given, device=self.device)
            _all_readable({given.source.name(i): reason for i, reason in predictions.errors.items()})
            return predictions.scores
        if self.columns is None:
            raise InputError("This detector was fitted on images, and got rows of features.")
        rows = self.columns.standardized(given)
        # whole batches, for how a matrix product rounds depends on its number of rows
        padded = as_patches(np.concatenate([rows, rows[-1:].repeat(-len(rows) % BATCH, 0)]))
        scores = self.detector.predict(padded, device=self.device, maps=False, batch_size=BATCH).scores
        return scores[: len(rows)].astype(np.float64)


def images_in(given: Any) -> ImageSet | None:
    """Images where it holds some: a folder, a pattern, a list of files, pictures or arrays, or (N, H, W, 3); else None.

    Raises:
        InputError: An array of three dimensions, which may be one picture or many.
    """
    if isinstance(given, ImageSet | str | os.PathLike):
        return as_images(given)
    if isinstance(given, np.ndarray):
        if given.ndim == 3:
            raise InputError("Give pictures as an array (N, H, W, 3), or as a list of arrays; got three dimensions.")
        return as_images(list(given)) if given.ndim == 4 and len(given) else None
    if isinstance(given, Sequence) and len(given) and _is_picture(given[0]):
        return as_images(list(given))
    return None


def train_on_images(images: ImageSet, settings: Settings) -> Trained:
    """Both stages of `flawsift.fit`, and the held-out scores of the detector, which stage 1 may not have been of.

    Raises:
        InputError: Fewer than two images, or one cannot be read: it would have no score.
    """
    size = settings.size or fitting_size(images)
    backbone = load_backbone(settings.backbone, size=size, device=settings.device)
    fitted = pipeline.fit(images, settings.detector, backbone, seed=settings.seed, device=settings.device)
    model, plan = fitted.model, fitted.plan
    assert fitted.screening is not None, "fit was not told to leave stage 1 out"
    _all_readable(fitted.screening.unreadable)
    judged = judge(plan, model.detector, Run(seed=settings.seed, device=settings.device))
    scores = dict(zip(judged.ids.tolist(), judged.scores.tolist(), strict=True))
    unseen = plan.train.select([i for i in plan.train.ids.tolist() if i not in scores])  # stage 1 set them aside
    predicted = model.detector.predict(unseen, device=settings.device, maps=False)
    scores |= dict(zip(unseen.ids.tolist(), predicted.scores.tolist(), strict=True))
    held_out = np.array([scores[i] for i in plan.train.ids.tolist()])
    return Trained(model.detector, model.calibration, held_out, model, None, settings.device)


def train_on_rows(rows: npt.NDArray[Any], settings: Settings) -> Trained:
    """Stage 2 on standardised rows. There is no stage 1, which judges patches of images by each other.

    The threshold is the split-conformal one, as if all rows were good, so that at most the rate of them is flagged: the
    mixture of good and defective that images get is one of image scores, and fits those of tables badly.

    Raises:
        InputError: Fewer than two rows.
        ParameterError: The detector reads pixels.
    """
    if len(rows) < 2:
        raise InputError(f"A threshold needs at least two rows, got {len(rows)} sample.")
    named = settings.detector
    asked = make_detector(named, seed=settings.seed) if isinstance(named, str) else named
    if asked.reads_pixels:
        raise ParameterError(f"{asked.name} reads pixels, which rows of features have not. Take another detector.")
    columns = Columns.of(rows)
    data, run = as_patches(columns.standardized(rows)), Run(seed=settings.seed, device=settings.device)
    detector = asked.clone(layers=(LAYER,)).fit(data, device=run.device)
    plan = plan_training(data, detector, None)
    judged = judge(plan, detector, run)
    return Trained(detector, Calibration.of(judged.scores), judged.scores, None, columns, run.device)


def _is_picture(item: Any) -> bool:
    return isinstance(item, str | os.PathLike | Image.Image) or (isinstance(item, np.ndarray) and item.ndim >= 2)


def _all_readable(unreadable: "dict[str, str] | Any") -> None:
    if unreadable:
        raise InputError(
            f"{len(unreadable)} images cannot be read and would have no score: {name_some(unreadable)}. Leave them out."
        )
