"""What a model says of images."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.data.notebook import data_frame, rows_html
from flawsift.detectors.base import Prediction
from flawsift.errors import InputError
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.notices import RESERVATION, Notice
from flawsift.paths import show
from flawsift.types import Ids

if TYPE_CHECKING:
    import pandas as pd

WORST = 3  # images that a text names


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """What a model says of one image.

    Attributes:
        id: Global id.
        name: Relative path.
        score: Raw score, higher is more anomalous; nan if unreadable.
        is_anomalous: Whether the score is above the threshold; None if unreadable, or without a threshold.
        p_value: How unusual the score is, see `flawsift.models.calibration.Calibration.p_values`; None if unreadable,
            or without a calibration.
        map: (H, W) float32 on the network's input grid; None if unreadable or not asked for.
        error: Why it is unreadable; None if it is not.
    """

    id: int
    name: str
    score: float
    is_anomalous: bool | None
    p_value: float | None
    map: npt.NDArray[np.float32] | None = field(repr=False)
    error: str | None

    @property
    def verdict(self) -> str:
        """What is said of it: "anomalous", "normal", or "" without a threshold or an image."""
        return {None: "", True: "anomalous", False: "normal"}[self.is_anomalous]


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What a model says of images: arrays, or one `ImagePrediction` after the other.

    Attributes:
        ids: (N,) global ids of all images.
        names: (N,) relative paths.
        scores: (N,) raw scores, nan for unreadable images.
        errors: {id: reason} of unreadable images, and of those that got no number for a score.
        threshold: In force, or None where the model has no calibration.
        calibration: What p-values come from.
        maps: {id: (H, W) float32} on the network's input grid, without unreadable images; None if not asked for.
        images: The images, for pictures in a notebook; None if they came from an iterator.
        notices: How these images differ, as a whole, from those that the model was trained on; empty where they do
            not. The threshold's rate of false alarms does not hold for images that differ.
        model_id: `Model.id` of the model; "" where it is not known.
    """

    ids: Ids
    names: tuple[str, ...]
    scores: npt.NDArray[np.float64]
    errors: Mapping[int, str]
    threshold: Threshold | None
    calibration: Calibration = field(default_factory=lambda: Calibration.of([]))
    maps: Mapping[int, npt.NDArray[np.float32]] | None = None
    images: ImageSet | None = None
    notices: tuple[Notice, ...] = ()
    model_id: str = ""

    @property
    def is_anomalous(self) -> npt.NDArray[np.bool_] | None:
        """(N,) scores above the threshold; False for unreadable images, which say nothing."""
        return None if self.threshold is None else self.scores > self.threshold.value

    @property
    def p_values(self) -> npt.NDArray[np.float64]:
        """(N,) how unusual each score is, see `Calibration.p_values`; nan if unreadable, or without a calibration."""
        return self.calibration.p_values(self.scores)

    @property
    def ranking(self) -> Ids:
        """All ids, the most anomalous first, unreadable images last."""
        return self.ids[np.argsort(-self.scores, kind="stable")]

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.ids)

    def __getitem__(self, position: SupportsIndex) -> ImagePrediction:
        """What is said of the image at a position of `ids`, as in a list."""
        at = operator.index(position)
        id_, score = int(self.ids[at]), float(self.scores[at])
        p_value = float(self.calibration.p_values(score))
        error = self.errors.get(id_)
        return ImagePrediction(
            id=id_,
            name=self.names[at],
            score=score,
            is_anomalous=None if self.threshold is None or error is not None else score > self.threshold.value,
            p_value=None if np.isnan(p_value) else p_value,
            map=None if self.maps is None else self.maps.get(id_),
            error=error,
        )

    def __iter__(self) -> Iterator[ImagePrediction]:
        return (self[position] for position in range(len(self)))

    def item(self) -> ImagePrediction:
        """What is said of the one image that there is.

        Raises:
            InputError: There is none, or more than one.
        """
        if len(self) != 1:
            raise InputError(f"item() is for predictions of one image; these are of {len(self)}. Use an index.")
        return self[0]

    def to_pandas(self) -> "pd.DataFrame":
        """A table of id (the index), name, score, is_anomalous, p_value and error.

        Raises:
            FlawsiftError: pandas is not installed.
        """
        flagged = self.is_anomalous
        columns = {
            "name": [show(name) for name in self.names],
            "score": self.scores.tolist(),
            "is_anomalous": [None] * len(self) if flagged is None else flagged.tolist(),
            "p_value": self.p_values.tolist(),
            "error": [self.errors.get(id_) for id_ in self.ids.tolist()],
        }
        return data_frame(columns, self.ids.tolist())

    def __repr__(self) -> str:
        counts = [f"{len(self)} images"]
        counts += [] if self.is_anomalous is None else [f"{int(self.is_anomalous.sum())} anomalous"]
        counts += [f"{len(self.errors)} unreadable"] if self.errors else []
        above = "no threshold" if self.threshold is None else str(self.threshold)
        above += f"; {RESERVATION}" if self.threshold is not None and self.notices else ""
        worst = [f"{show(one.name)} {one.score:.4g}" for one in self._ranked(WORST) if one.error is None]
        highest = f"\nhighest scores: {', '.join(worst)}" if worst else ""
        told = "".join(f"\n{notice}" for notice in self.notices)
        return f"Predictions of {', '.join(counts)}{told}\n{above}{highest}"

    def _repr_html_(self) -> str:
        rows = ((one.id, _row(one)) for one in self._ranked(len(self)))
        return rows_html(self.images, rows, title=repr(self), total=len(self))

    def _ranked(self, n: int) -> Iterator[ImagePrediction]:
        """The n most anomalous images, unreadable ones last."""
        return (self[position] for position in np.argsort(-self.scores, kind="stable")[:n])


def with_scores(prediction: Prediction) -> tuple[Prediction, dict[int, str]]:
    """The images that got a number for a score, and {id: reason} of the others: below no threshold, they are not good.

    Weights or features that are damaged give such scores.
    """
    has_score = np.isfinite(prediction.scores)
    if has_score.all():
        return prediction, {}
    reasons = {
        int(id_): f"the model gives it the score {score}: its weights, or the image's features, are damaged"
        for id_, score in zip(prediction.ids[~has_score], prediction.scores[~has_score], strict=True)
    }
    maps, medians = (
        None if values is None else values[has_score] for values in (prediction.maps, prediction.map_medians)
    )
    return Prediction(prediction.ids[has_score], prediction.scores[has_score], maps, medians), reasons


def _row(one: ImagePrediction) -> dict[str, object]:
    return {"name": one.name, "score": one.score, "p-value": one.p_value, "verdict": one.error or one.verdict}
