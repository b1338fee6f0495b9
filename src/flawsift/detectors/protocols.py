"""What some detectors can do beyond fitting and scoring: add up, and leave training images out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.progress import Progress, silent
from flawsift.types import Ids


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
class Evidence:
    """The worst patch of each image, and the nearest patches that other images have to it.

    Attributes:
        grid: Rows and columns of the patch grid, which covers each image whatever its shape.
        places: (N,) worst patch of each image, row-major on the grid.
        images: (N, k) global ids of the other images, nearest first; -1 where there are fewer than k, or where an image
            is not there any more.
        image_places: (N, k) the patch in each of them, row-major; -1 likewise.
        distances: (N, k) ascending; nan where there is none.
        n_others: (N,) how many other images were searched.
    """

    grid: tuple[int, int]
    places: npt.NDArray[np.int64]
    images: Ids
    image_places: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    n_others: npt.NDArray[np.int64]

    def nearest(self, position: int) -> list[tuple[int, int, float]]:
        """(id of another image, place in it, distance) for the image at a position, nearest first."""
        rows = (self.images[position], self.image_places[position], self.distances[position])
        return [(int(i), int(place), float(d)) for i, place, d in zip(*rows, strict=True) if place >= 0]

    def renamed(self, new: Mapping[int, int]) -> Self:
        """The same under other ids, {id: new id}; an image that is not among them is named no more."""
        ids = np.array([new.get(i, -1) for i in self.images.ravel().tolist()], np.int64).reshape(self.images.shape)
        there = (self.image_places >= 0) & (ids >= 0)
        return replace(
            self,
            images=np.where(there, ids, -1),
            image_places=np.where(there, self.image_places, -1),
            distances=np.where(there, self.distances, np.float32(np.nan)),
        )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a detector says of images of its own training set, each as if it and its group had not been learned.

    Attributes:
        scores: (N,) image scores.
        maps: (N, h, w) patch-grid maps.
        evidence: The highest patch of each image, and the nearest one of each of some other groups.
    """

    scores: npt.NDArray[np.float64]
    maps: Tensor
    evidence: Evidence


@runtime_checkable
class LeavesOut(Protocol):
    """A fitted detector that scores images of its training set without them, so that stage 1 needs no sub-models."""

    def held_out(self, data: ImageSet, *, device: str = "auto", progress: Progress = silent) -> HeldOut:
        """Scores, maps and evidence of N images, each without itself and its group; `progress` is told of images."""
