"""What a model says of images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flawsift.models.calibration import Threshold
from flawsift.types import Ids


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of a folder.

    Attributes:
        ids: (N,) global ids of all images.
        names: (N,) relative paths.
        scores: (N,) raw scores, nan for unreadable images.
        errors: {id: reason} of unreadable images.
        threshold: In force, or None where the model has no calibration.
    """

    ids: Ids
    names: tuple[str, ...]
    scores: npt.NDArray[np.float64]
    errors: Mapping[int, str]
    threshold: Threshold | None

    @property
    def is_anomalous(self) -> npt.NDArray[np.bool_] | None:
        """(N,) scores above the threshold; False for unreadable images, which say nothing."""
        return None if self.threshold is None else self.scores > self.threshold.value
