"""A decision threshold: a stated rate of false alarms, from scores of images a model had not seen, labelled or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flawsift.errors import InputError, ParameterError
from flawsift.metrics.shares import share_interval
from flawsift.screening.mixture import INTERVAL, UNKNOWN, Mixture, fit_mixture, says_little
from flawsift.types import Floats

DEFAULT_RATE = 0.01  # one good part in a hundred stopped
N_RATES = 200  # of the table of a mixture: neighbours differ by 3 % of their rate
SAVED = 1e-8  # rates are saved with nine digits, and mean the same before and after


@dataclass(frozen=True)
class Threshold:
    """Scores above `value` are called anomalous.

    Attributes:
        value: The threshold, on the detector's raw scores.
        false_alarm_rate: What was asked for.
        expected_rate: Share of good images that are expected above it.
        n_calibration: Number of good images that it rests on.
        interval: Between which shares the true one lies in nine cases of ten; None where that is not known.
        misses: Share of defective images up to it, of defects like those among the training images, or like the
            labelled ones: expected, lowest and highest likely; None where there may be none.
        n_suspects: At least so many of the images that it rests on look defective. Nothing is promised then.
        n_defective: Number of labelled defective images; 0 where no image is labelled.
        contamination: As in `Calibration`. Nothing is promised where it says little.
    """

    value: float
    false_alarm_rate: float
    expected_rate: float
    n_calibration: int
    interval: tuple[float, float] | None = None
    misses: tuple[float, float, float] | None = None
    n_suspects: int = 0
    n_defective: int = 0
    contamination: tuple[float, float] | None = None

    @property
    def warning(self) -> str | None:
        """What a person must know before the threshold is trusted, or None."""
        if self.n_suspects:
            which = "1 image looks" if self.n_suspects == 1 else f"{self.n_suspects:,} images look"
            return (
                f"At least {which} defective and still count for the threshold, which may be too high. Review the "
                "highest-ranked ones and train again; until then no rate of false alarms is promised."
            )
        if self._unknown and self.contamination is not None:
            low, high = (100 * end for end in self.contamination)
            return (
                f"Nobody knows how many training images are defective: between {low:.0f} and {high:.0f} % may be. If "
                "many are, the threshold is too high and misses defects. Review the highest-ranked ones and train "
                "again; until then no rate of false alarms is promised."
            )
        return None

    @property
    def _unknown(self) -> bool:
        return not self.n_defective and self.contamination is not None and says_little(self.contamination)

    @property
    def per_hundred(self) -> float:
        """Expected false alarms per 100 good parts."""
        return 100 * self.expected_rate

    @property
    def limited(self) -> bool:
        """Whether there were too few images for the rate asked for, so that it is the lowest that they support."""
        return self.expected_rate > self.false_alarm_rate * (1 + SAVED)

    @property
    def promise(self) -> str:
        """What is expected of it, in words: "about 1 false alarm per 100 good parts expected (between 0.3 and 2.5)"."""
        if self.n_suspects:
            return "provisional, since defective images still count for it"
        if self._unknown:
            return "provisional, since nobody knows how many training images are defective"
        alarms = of_hundred(self.expected_rate)
        text = f"about {alarms} false {'alarm' if alarms == '1' else 'alarms'} per 100 good parts"
        text += "" if self.n_defective else " expected"
        if self.interval is not None:
            least, most = of_hundred(self.interval[0], digits=1), of_hundred(self.interval[1])
            text += f" (between {least} and {most})" if self.interval[0] >= 0.0005 else f" (at most {most})"
        if self.misses is not None:
            missed, fewest, highest = (100 * share for share in self.misses)
            text += f", and {missed:.0f} of 100 defects missed (between {fewest:.0f} and {highest:.0f})"
        if self.n_defective:
            text += f", by {self.n_calibration:,} good and {self.n_defective:,} defective labelled images"
        return text

    def __str__(self) -> str:
        return f"threshold {self.value:.4g}: {self.promise}"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Which share of good images scores above which threshold; kept, so that the rate can be changed.

    A table: of the good images a share of `rates[j]` at most is expected above `thresholds[j]`.

    Attributes:
        scores: (n,) ascending held-out scores of the images that were judged good.
        thresholds: (m,) ascending.
        rates: (m,) descending.
        intervals: (m, 2) between which shares the true one lies in nine cases of ten.
        n_good: Number of good images that it rests on.
        n_suspects: At least so many of `scores` look defective.
        contamination: 90 % interval of the share of defects among the images; None where it was not estimated.
        misses: (m, 3) share of defective images up to each threshold: expected, and between which it lies; None where
            there may be no defect to tell it by.
        n_defective: Number of labelled defective images that `misses` rests on; 0 where no image is labelled.
    """

    scores: Floats
    thresholds: Floats
    rates: Floats
    intervals: Floats
    n_good: int
    n_suspects: int = 0
    contamination: tuple[float, float] | None = None
    misses: Floats | None = None
    n_defective: int = 0

    @classmethod
    def of(cls, scores: Sequence[float] | npt.NDArray[np.floating[Any]]) -> Self:
        """From scores of good images, in any order: the split-conformal table.

        A further good image, exchangeable with these n, scores above the (r + 1)-th highest of them with probability at
        most (r + 1) / (n + 1) (Vovk et al., "Algorithmic Learning in a Random World"); how often it does for a sample
        at hand follows a beta law.
        """
        from scipy.stats import beta  # slow to import

        ordered = np.sort(np.asarray(scores, dtype=np.float64))
        n = len(ordered)
        above = np.arange(n - 1, -1, -1)
        ends = [beta.ppf(level, above + 1, n - above) for level in ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2)]
        return cls(ordered, ordered, (above + 1) / (n + 1), np.stack(ends, axis=1), n)

    @classmethod
    def of_unlabelled(
        cls,
        scores: Floats,
        ordinary: Floats | None,
        effect: float,
        kept: npt.NDArray[np.bool_],
        known: npt.NDArray[np.int64],
    ) -> Self:
        """From scores of images some of which may be defective, whatever was set aside.

        By a mixture of good and defective images; with too few images for one, by those that were kept, as if all of
        them were good.

        Args:
            scores: (N,) held-out scores.
            ordinary: (N,) as for `fit_mixture`, and so are the others.
            effect: Of groups, by `flawsift.screening.consensus.design_effect`.
            kept: (N,) which images were judged good.
            known: (N,) what a person said.
        """
        mixture = fit_mixture(scores, ordinary, effect, known)
        return cls.of(scores[kept]) if mixture is None else cls.of_mixture(mixture, scores, kept, known)

    @classmethod
    def of_labelled(cls, good: npt.ArrayLike, defective: npt.ArrayLike) -> Self:
        """From scores of labelled images that the model was not trained on: false alarms and misses are measured.

        The table is that of `of` for the good images; the intervals of the misses are Clopper and Pearson's (1934).

        Args:
            good: (n,) scores, in any order.
            defective: (m,) scores, in any order.

        Raises:
            InputError: There is no good image, or no defective one.
        """
        scores = np.sort(np.asarray(defective, dtype=np.float64))
        if not np.size(good) or not len(scores):
            raise InputError("A threshold from labelled images needs good ones and defective ones.")
        table = cls.of(np.asarray(good))
        return replace(table, misses=missed_shares(scores, table.thresholds), n_defective=len(scores))

    @classmethod
    def of_mixture(
        cls, mixture: Mixture, scores: Floats, kept: npt.NDArray[np.bool_], known: npt.NDArray[np.int64]
    ) -> Self:
        """From scores of images of which some are defective, nobody knows which.

        Args:
            mixture: Of all of them.
            scores: (N,) held-out scores.
            kept: (N,) which of them were judged good.
            known: (N,) as for `fit_mixture`: what a person has seen is no suspect any more.
        """
        n_good = float((1 - mixture.probability).sum())
        tried = mixture.spaced(scores, N_RATES)
        rough, _, _ = mixture.false_alarms(tried)
        wanted = np.geomspace(rough[0], max(rough[-1], 1 / (n_good + 1)), N_RATES)
        thresholds = np.interp(-np.log(wanted), -np.log(rough), tried)
        rates, low, high = mixture.false_alarms(thresholds)
        # chance, on top of what the share of defects leaves open: Clopper & Pearson at both ends
        n = n_good * mixture.n_effective / len(scores)
        ends = share_interval(low * n, n, INTERVAL)[0], share_interval(high * n, n, INTERVAL)[1]
        misses = None
        if mixture.interval[0] > 0:
            expected, fewest, most = mixture.misses(thresholds)
            m = (len(scores) - n_good) * mixture.n_effective / len(scores)
            misses = np.stack([expected, share_interval(fewest * m, m)[0], share_interval(most * m, m)[1]], axis=1)
        looks = (1 - mixture.least_good) > 0.5  # defective, even if there are as few as the interval allows
        n_suspects = int((looks & kept & (known == UNKNOWN)).sum())
        return cls(
            scores=np.sort(scores[kept]),
            thresholds=thresholds,
            rates=rates,
            intervals=np.stack(ends, axis=1).round(9),
            n_good=round(n_good),
            n_suspects=n_suspects,
            contamination=mixture.interval,
            misses=misses,
        )

    @property
    def warning(self) -> str | None:
        """`Threshold.warning`, which is the same at any rate."""
        threshold = self.threshold()
        return None if threshold is None else threshold.warning

    def threshold(self, false_alarm_rate: float = DEFAULT_RATE) -> Threshold | None:
        """The lowest threshold of the table that keeps within the rate, or None without any score.

        Where the images are too few for that, the highest of the table is taken.

        Raises:
            ParameterError: The rate is not in (0, 1).
        """
        if not (isinstance(false_alarm_rate, Real) and 0 < false_alarm_rate < 1):
            raise ParameterError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate!r}.")
        if not len(self.thresholds):
            return None
        within = self.rates <= false_alarm_rate * (1 + SAVED)
        at = int(within.argmax()) if within.any() else -1
        low, high = self.intervals[at].tolist()
        rate = float(self.rates[at])
        misses = None if self.misses is None else tuple(self.misses[at].tolist())
        return Threshold(
            value=float(self.thresholds[at]),
            false_alarm_rate=false_alarm_rate,
            expected_rate=rate,
            n_calibration=self.n_good,
            interval=(low, high),
            misses=misses,
            n_suspects=self.n_suspects,
            n_defective=self.n_defective,
            contamination=self.contamination,
        )

    def rate_for_misses(self, misses: float) -> float:
        """The lowest false-alarm rate of the table at which no more than a share of the defects is missed.

        With k = floor(misses * m) of m labelled defective images missed at most, a further one, exchangeable with
        these, is missed with a probability of at most (k + 1) / (m + 1).

        Returns:
            The rate for `threshold`; where even the lowest threshold misses more, that of the lowest threshold.

        Raises:
            ParameterError: The share is not in (0, 1), or nothing is known of misses.
        """
        if not (isinstance(misses, Real) and 0 < misses < 1):
            raise ParameterError(
                f"misses must be in (0, 1), got {misses}. Nothing shows that no defect is ever missed."
            )
        if self.misses is None:
            raise ParameterError("Nothing is known of misses here: without labels there may be no defect.")
        few_enough = np.flatnonzero(self.misses[:, 0] <= misses * (1 + SAVED))  # misses rise with the threshold
        return float(self.rates[few_enough[-1] if len(few_enough) else 0])

    def p_values(self, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """How unusual scores are among good images, small for anomalies: the rate of the highest threshold below.

        Of a table by `of` these are conformal p-values, (1 + number of calibration scores that reach the score) /
        (n + 1): for a further good image, exchangeable with the n, p or less has at most the probability p. They say
        the same as the threshold, ties included: for any rate, a score is above `threshold(rate).value` exactly when
        its p-value is at most `threshold(rate).expected_rate`.

        Args:
            scores: Of any shape.

        Returns:
            The p-value of each, in the shape of `scores`; nan for nan, and for all without any calibration score.
        """
        values = np.asarray(scores, dtype=np.float64)
        below = np.searchsorted(self.thresholds, values, side="left")  # how many thresholds are
        found = np.concatenate([[1.0], self.rates])[below]
        return np.where(np.isnan(values) | (len(self.thresholds) == 0), np.nan, found)

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists, with nine digits."""
        arrays = {name: getattr(self, name) for name in ("scores", "thresholds", "rates", "intervals")}
        arrays["misses"] = np.empty(0) if self.misses is None else self.misses
        rounded = {
            name: np.vectorize(_nine_digits, otypes=[float])(a).tolist() if a.size else [] for name, a in arrays.items()
        }
        counts = {name: getattr(self, name) for name in ("n_good", "n_suspects", "n_defective")}
        ends = None if self.contamination is None else [_nine_digits(end) for end in self.contamination]
        return {**rounded, **counts, "contamination": ends}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | Sequence[float]) -> Self:
        """What `to_json` returned; of earlier versions, a list of scores.

        Raises:
            ValueError, KeyError, TypeError: It is something else.
        """
        if not isinstance(content, Mapping):
            return cls.of(content)
        scores, thresholds, rates = (np.array(content[name], np.float64) for name in ("scores", "thresholds", "rates"))
        intervals = np.array(content["intervals"], np.float64).reshape(len(rates), 2)
        in_order = (np.diff(thresholds) >= 0).all() and (np.diff(rates) <= 0).all()
        if scores.ndim != 1 or thresholds.shape != rates.shape or not in_order:
            raise ValueError("the table of thresholds does not fit together")
        misses = np.array(content["misses"], np.float64).reshape(-1, 3) if content["misses"] else None
        if misses is not None and len(misses) != len(rates):
            raise ValueError("the table of misses does not fit")
        ends = content["contamination"]
        contamination = None if ends is None else (float(ends[0]), float(ends[1]))
        n_good, n_suspects = int(content["n_good"]), int(content["n_suspects"])
        n_defective = int(content["n_defective"])
        return cls(scores, thresholds, rates, intervals, n_good, n_suspects, contamination, misses, n_defective)


def n_needed(rate: float) -> int:
    """Number of good images from which on a false-alarm rate can be set: 1 / (n + 1) is the lowest that n support."""
    return int(np.ceil(1 / rate - 1 - 1e-9))  # 1 / 0.01 may come out above 100


def of_hundred(share: float, *, digits: int = 2) -> str:
    """A share as a number of 100, with so many digits, or those before the point.

    >>> of_hundred(0.0123), of_hundred(0.5812), of_hundred(1.0), of_hundred(0.123, digits=1)
    ('1.2', '58', '100', '12')
    """
    value = 100 * share
    return f"{value:.{digits}g}" if value < 9.5 else f"{value:.0f}"


def missed_shares(defective: Floats, thresholds: npt.ArrayLike) -> Floats:
    """(m, 3) share of defective images up to each of m thresholds, and its interval by Clopper and Pearson.

    Args:
        defective: (n,) ascending scores, n > 0.
        thresholds: (m,).
    """
    n = len(defective)
    missed = np.searchsorted(defective, np.asarray(thresholds, np.float64), side="right")
    return np.stack([missed / n, *share_interval(missed, n, INTERVAL)], axis=1)


def _nine_digits(value: float) -> float:
    return float(f"{value:.9g}")
