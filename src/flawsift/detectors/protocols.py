"""What some detectors can do beyond fitting and scoring: add up, and leave training images out."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector


@runtime_checkable
class Additive(Protocol):
    """A fitted detector whose learned state is a sum over training images, so that k + 1 fits cost about one."""

    def merged(self, other: Any) -> Detector:
        """The model of both training sets, which must be disjoint."""

    def without(self, data: ImageSet, *, device: str = "auto") -> Detector:
        """The model of the training set less these images, all of which were in it."""

    def held_out_scores(self, data: ImageSet, *, device: str = "auto") -> npt.NDArray[np.float64]:
        """(N,) scores of images of the training set, each as by the model without that image and its group."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a detector says of images of its own training set, each as if it and its group had not been learned.

    Attributes:
        scores: (N,) image scores.
        maps: (N, h, w) patch-grid maps.
        worst: (N,) place of each image's highest patch, row-major on the grid.
        near_ids: (N, n) ids of the images of other groups with the nearest patches to that one, one per group, nearest
            first; -1 where there are fewer groups.
        near_places: (N, n) those patches, row-major; -1 likewise.
        near_distances: (N, n) ascending; nan likewise.
        n_others: (N,) how many images were searched.
    """

    scores: npt.NDArray[np.float64]
    maps: Tensor
    worst: npt.NDArray[np.int64]
    near_ids: npt.NDArray[np.int64]
    near_places: npt.NDArray[np.int64]
    near_distances: npt.NDArray[np.float32]
    n_others: npt.NDArray[np.int64]


@runtime_checkable
class LeavesOut(Protocol):
    """A fitted detector that scores images of its training set without them, so that stage 1 needs no sub-models."""

    def held_out(self, data: ImageSet, *, device: str = "auto") -> HeldOut:
        """Scores, maps and evidence of N images, each without itself and its group."""
