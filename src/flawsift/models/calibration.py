"""A decision threshold without labels: a stated rate of false alarms, from scores of images a model had not seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flawsift.errors import ParameterError

DEFAULT_RATE = 0.01  # one good part in a hundred stopped


@dataclass(frozen=True)
class Threshold:
    """Scores above `value` are called anomalous.

    Attributes:
        value: The threshold, on the detector's raw scores.
        false_alarm_rate: What was asked for.
        expected_rate: What the calibration sample supports: r / (n + 1) for a threshold with r of n scores above it.
        n_calibration: Size of the calibration sample.
    """

    value: float
    false_alarm_rate: float
    expected_rate: float
    n_calibration: int

    @property
    def per_hundred(self) -> float:
        """Expected false alarms per 100 good parts."""
        return 100 * self.expected_rate

    @property
    def limited(self) -> bool:
        """Whether the sample was too small for the rate asked for, so that its maximum is the threshold."""
        return self.expected_rate > self.false_alarm_rate


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of presumably good images by models that had not seen them; kept, so that the rate can be changed.

    Attributes:
        scores: (n,) ascending.
    """

    scores: npt.NDArray[np.float64]

    @classmethod
    def of(cls, scores: Sequence[float] | npt.NDArray[np.floating[Any]]) -> Self:
        """From scores in any order."""
        return cls(np.sort(np.asarray(scores, dtype=np.float64)))

    def threshold(self, false_alarm_rate: float = DEFAULT_RATE) -> Threshold | None:
        """The split-conformal threshold, or None without any score.

        A further good image, exchangeable with the n calibration images, scores above the (r + 1)-th highest of them
        with probability at most (r + 1) / (n + 1) (Vovk et al., "Algorithmic Learning in a Random World"); r is the
        largest count that keeps this within the rate. Where n is too small for that, the maximum is taken.

        Raises:
            ParameterError: The rate is not in (0, 1).
        """
        if not 0 < false_alarm_rate < 1:
            raise ParameterError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}.")
        n = len(self.scores)
        if n == 0:
            return None
        above = max(0, math.floor(false_alarm_rate * (n + 1) + 1e-9) - 1)
        return Threshold(float(self.scores[n - 1 - above]), false_alarm_rate, (above + 1) / (n + 1), n)
