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

    def __str__(self) -> str:
        return f"threshold {self.value:.4g}: about {self.per_hundred:.2g} false alarms per 100 good parts expected"


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

    def p_values(self, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """How unusual scores are among the calibration images: conformal p-values, small for anomalies.

        (1 + number of calibration scores that reach the score) / (n + 1), from 1 / (n + 1) to 1; for a further good
        image, exchangeable with the n calibration images, it is at most p with probability at most p (Vovk et al.,
        "Algorithmic Learning in a Random World"). They say the same as the threshold, ties included: for any rate, a
        score is above `threshold(rate).value` exactly when its p-value is at most `threshold(rate).expected_rate`.

        Args:
            scores: Of any shape.

        Returns:
            The p-value of each, in the shape of `scores`; nan for nan, and for all without any calibration score.
        """
        values = np.asarray(scores, dtype=np.float64)
        n = len(self.scores)
        reached = n - np.searchsorted(self.scores, values, side="left")  # by how many calibration scores
        return np.where(np.isnan(values) | (n == 0), np.nan, (1 + reached) / (n + 1))
