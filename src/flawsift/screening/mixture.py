"""Good and defective images among unlabelled ones: a mixture of two laws of their held-out scores.

    scores of images by models that have not seen them -> share of defects, probability of each image, false alarms

The score of an image is that of its worst patch, and maxima of many values follow a Gumbel law (Fisher & Tippett,
1928). How high it lies depends on the image: a coarse texture scores higher all over. So the law of a good image is
given the score of its ordinary patches, which a defect hardly moves as long as it covers less than three quarters:

    log score_i = mu + beta b_i + sigma_i u_i,   sigma_i = exp(lambda + gamma b_i),   u_i ~ Gumbel   if i is good
                                                                                      u_i ~ N(m, tau^2)   otherwise

with b_i the standardised logarithm of the lower quartile of the patches' scores. Without b, good scores are far from
Gumbel where there are several kinds of good parts. The share of defects alpha has a prior, the other parameters are
those of highest likelihood for each alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.types import Floats

SHARES = np.array(
    [0, 0.005, 0.01, 0.02, 0.03, *np.arange(0.05, 0.601, 0.025)]
)  # alpha: half may be defective, and some
IS_CLEAN = 0.5  # prior probability that there is no defect
LIKELY_SHARE = 0.4  # the prior of the other shares is exp(-alpha / 0.4): a fifth is 1.6 times as likely as two fifths
LOWEST_DEFECTS = 3.0  # m at least, in sigma: 5 % of good images score higher; lower ones cannot be told from these
SPREAD = np.log(3.0), 0.7  # of log tau: mean and deviation of a normal prior. Defects vary more than good images (1.3)
SLOPE_OF_SCALE = 0.2  # deviation of the normal prior of gamma, around 0
ORDINARY = 0.25  # quantile of an image's patch scores that tells how its ordinary patches score
FARTHEST = 3.0  # robust deviations at which b is cut off: defects that cover much of an image must not set the slopes
INTERVAL = 0.9
NEGLIGIBLE = 1e-4  # posterior probability of a share
CANNOT_TELL = 0.3  # width of the interval of the share
ROOM = 3.0  # robust deviations: a good image scores higher than all of a few hundred by less
MIN_FOR_MIXTURE = 20  # fewer images have no tail
STARTS = ((-0.3, -0.4, 0.5, 0.0, 4.0, 1.0), (-0.3, -0.7, 0.1, 0.0, 8.0, 1.0))  # (mu, lambda, beta, gamma, m, log tau)
# beta: an image that scores twice as high all over does so at its worst patch at most. gamma: it varies no more, or a
# defect that raises b would explain itself. log tau: defects vary no less than good images
BOUNDS = ((-4, 3), (-3, 1.5), (0, 1), (-0.6, 0), (LOWEST_DEFECTS, 60), (0.25, 3))
UNKNOWN, GOOD, DEFECTIVE = 0, 1, 2  # what a person says of an image


@dataclass(frozen=True, eq=False)
class Mixture:
    """The two laws, for each share of defects.

    Attributes:
        posterior: (A,) probability of each of `SHARES`.
        probability: (N,) that each image is defective.
        parameters: (A, 6) mu, lambda, beta, gamma, m and log tau of highest likelihood for each share.
        ordinary: (N,) b.
        weights: (A, N) probability that each image is good, for each share.
        center: Median of the logarithms of the scores.
        unit: Robust deviation of these.
        logarithmic: Whether they are logarithms, or the scores themselves where some are not positive.
        n_effective: Number of independent images that are worth as much as these.
    """

    posterior: Floats
    probability: Floats
    parameters: Floats
    ordinary: Floats
    weights: Floats
    center: float
    unit: float
    logarithmic: bool
    n_effective: float

    @property
    def share(self) -> float:
        """The estimate of the share of defects: the median of the posterior."""
        return self._quantile(0.5)

    @property
    def interval(self) -> tuple[float, float]:
        """The shares between which 90 % of the posterior lie."""
        return self._quantile((1 - INTERVAL) / 2), self._quantile((1 + INTERVAL) / 2)

    @property
    def least_good(self) -> Floats:
        """(N,) probability that each image is good, for the lowest share of the interval."""
        result: Floats = self.weights[int(np.searchsorted(SHARES, self.interval[0]))]
        return result

    def _quantile(self, level: float) -> float:
        return float(SHARES[int((self.posterior.cumsum() >= level - 1e-9).argmax())])

    def spaced(self, scores: Floats, n: int) -> Floats:
        """(n,) thresholds from the lowest score to `ROOM` robust deviations above the highest, equally spaced."""
        shown = scores[scores > 0] if self.logarithmic else scores
        low, high = self._value(np.array([shown.min(), shown.max()]))
        values: Floats = np.linspace(low, high + ROOM * self.unit, n)
        return np.exp(values) if self.logarithmic else values

    def false_alarms(self, thresholds: Floats) -> Floats:
        """(3, T) shares of good images above each threshold: expected, and for the lowest and highest likely share.

        Of a further good image, whose b is that of one of these images, weighted by how probably that one is good.
        """
        return self._over_shares(thresholds, self.weights, lambda u, _: -np.expm1(-np.exp(-np.maximum(u, -50))))

    def misses(self, thresholds: Floats) -> Floats:
        """(3, T) shares of defective images up to each threshold, likewise; nan where no share but 0 is likely.

        Of defects such as there are among these images.
        """
        from scipy.special import ndtr  # slow to import

        return self._over_shares(thresholds, 1 - self.weights, lambda u, theta: ndtr((u - theta[4]) / np.exp(theta[5])))

    def _over_shares(self, thresholds: Floats, weights: Floats, rate: Callable[[Floats, Floats], Floats]) -> Floats:
        """The mean over the posterior, and both ends over the likely shares, of a rate at (T, N) values of u."""
        low, high = self.interval
        z = (self._value(thresholds) - self.center) / self.unit
        expected, total, ends = np.zeros(len(z)), 0.0, []
        for share, p, theta, weight in zip(SHARES, self.posterior, self.parameters, weights, strict=True):
            if not (weight > 0).any() or p < NEGLIGIBLE:  # no image is of this kind
                continue
            location, scale = _law(theta, self.ordinary)
            found = rate((z[:, None] - location) / scale, theta) @ (weight / weight.sum())
            expected += p * found
            total += p
            ends += [found] if low <= share <= high else []
        if not total:
            return np.full((3, len(z)), np.nan)
        ends = ends or [expected / total]
        result: Floats = np.stack([expected / total, np.min(ends, axis=0), np.max(ends, axis=0)])
        return np.clip(result, 0, 1)  # rounding apart

    def _value(self, scores: Floats) -> Floats:
        return np.log(np.maximum(scores, 1e-300)) if self.logarithmic else scores


def says_little(interval: tuple[float, float]) -> bool:
    """Whether an interval of the share of defects is so wide that it says next to nothing."""
    return interval[1] - interval[0] > CANNOT_TELL


def ordinary_scores(maps: npt.NDArray[np.floating[Any]]) -> Floats:
    """(N,) score of the ordinary patches of each image: the lower quartile of its (N, h, w) map, nan aside."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    result: Floats = (np.nanquantile if np.isnan(flat).any() else np.quantile)(flat, ORDINARY, axis=1)
    return result


def fit_mixture(
    scores: Floats, ordinary: Floats | None, design_effect: float = 1.0, known: npt.NDArray[np.int64] | None = None
) -> Mixture | None:
    """Fit both laws; None where there are too few images, or all score the same.

    Args:
        scores: (N,) held-out scores.
        ordinary: (N,) of `ordinary_scores`, of the same detector or another one; None where there are no maps.
        design_effect: How many times larger groups make variances; the likelihood counts N / design_effect images.
        known: (N,) `UNKNOWN`, `GOOD` or `DEFECTIVE`: what a person said, of images chosen by their scores or at will.
    """
    from scipy.optimize import minimize  # slow to import

    n = len(scores)
    logarithmic = n > 0 and bool(scores.min() >= 0 and scores.max() > 0)
    # an exact copy scores 0: it counts as the lowest of the others
    x = np.log(np.maximum(scores, scores[scores > 0].min())) if logarithmic else np.asarray(scores, np.float64)
    center = float(np.median(x)) if n else 0.0
    unit = 1.4826 * float(np.median(np.abs(x - center))) if n else 0.0
    if n < MIN_FOR_MIXTURE or not unit > 0 or not np.isfinite(x).all():
        return None
    z = (x - center) / unit
    b = np.zeros(n) if ordinary is None else _standardised(ordinary, unit if logarithmic else None)
    known = np.zeros(n, np.int64) if known is None else known
    values: list[float] = []
    fitted: list[Floats] = []
    some = bool((known == DEFECTIVE).any())
    for share in SHARES:
        if some and share == 0:
            values.append(-np.inf)
            fitted.append(np.array(STARTS[0]))
            continue
        starts = [*STARTS, *fitted[-1:]]
        best = min(
            (
                minimize(_loss, s, (share, z, b, known, design_effect), "L-BFGS-B", jac=True, bounds=BOUNDS)
                for s in starts
            ),
            key=lambda found: float(found.fun),
        )
        alone = -float(best.fun)
        # without a defect the scores may as well be normal: maxima of few or of dependent patches are
        values.append(np.logaddexp(alone, _normal(z, b) / design_effect) - np.log(2) if share == 0 else alone)
        fitted.append(best.x)
    prior = np.gradient(SHARES) * np.exp(-SHARES / LIKELY_SHARE)
    prior[0] = 0
    prior *= (1 - IS_CLEAN) / prior.sum()
    prior[0] = IS_CLEAN
    posterior = prior * np.exp(np.array(values) - max(values))
    posterior /= posterior.sum()
    bad = np.array([_defective(theta, share, z, b, known) for share, theta in zip(SHARES, fitted, strict=True)])
    probability = np.clip(posterior @ bad, 0, 1)  # rounding apart
    return Mixture(posterior, probability, np.array(fitted), b, 1 - bad, center, unit, logarithmic, n / design_effect)


def _standardised(ordinary: Floats, unit: float | None) -> Floats:
    """b: on the scale of the logarithms of the scores where both have some, else on its own."""
    own = unit is None or ordinary.min() <= 0
    values = np.asarray(ordinary, np.float64) if own else np.log(ordinary)
    values = values - np.median(values)
    deviation = 1.4826 * float(np.median(np.abs(values)))
    if not deviation > 0:
        return np.zeros(len(values))
    result: Floats = np.clip(values, -FARTHEST * deviation, FARTHEST * deviation)
    return result / (deviation if unit is None or own else unit)


def _law(theta: Floats, b: Floats) -> tuple[Floats, Floats]:
    """(N,) locations and scales of the law of good images."""
    return theta[0] + theta[2] * b, np.exp(theta[1] + theta[3] * b)


def _densities(theta: Floats, z: Floats, b: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(N,) u, 1 / sigma and the logarithms of both densities of z."""
    location, scale = _law(theta, b)
    u = (z - location) / scale
    good = -u - np.exp(np.minimum(-u, 50)) - np.log(scale)
    tau = np.exp(theta[5])
    bad = -0.5 * ((u - theta[4]) / tau) ** 2 - theta[5] - 0.5 * np.log(2 * np.pi) - np.log(scale)
    return u, 1 / scale, good, bad


def _normal(z: Floats, b: Floats) -> float:
    """The highest log likelihood of a normal law around a line in b, whose slope has the bounds of beta."""
    off = b - b.mean()
    spread = float(off @ off)
    slope = np.clip(off @ z / spread, *BOUNDS[2]) if spread > 0 else 0.0
    variance = float(np.var(z - slope * b))
    return float(-0.5 * len(z) * (np.log(2 * np.pi * max(variance, NEGLIGIBLE)) + 1))


def _defective(theta: Floats, share: float, z: Floats, b: Floats, known: npt.NDArray[np.int64]) -> Floats:
    """(N,) probability that each image is defective.

    Below the location of good images it is that at the location: there the normal law has more than the Gumbel law, and
    an image that scores lower than all others, such as one of which there is a copy, is not defective for it.
    """
    _, _, good, bad = _densities(theta, np.maximum(z, _law(theta, b)[0]), b)
    odds = np.log1p(-share) + good - (np.log(share) + bad) if share > 0 else np.full(len(z), np.inf)
    return np.select([known == GOOD, known == DEFECTIVE], [0.0, 1.0], 1 / (1 + np.exp(np.clip(odds, -500, 500))))


def _loss(
    theta: Floats, share: float, z: Floats, b: Floats, known: npt.NDArray[np.int64], design_effect: float
) -> tuple[float, Floats]:
    """Minus the logarithm of likelihood and prior, and its gradient."""
    u, slope, good, bad = _densities(theta, z, b)
    with np.errstate(divide="ignore"):
        good, bad = good + np.log1p(-share), bad + np.log(share)
    good, bad = np.where(known == DEFECTIVE, -np.inf, good), np.where(known == GOOD, -np.inf, bad)
    total = np.logaddexp(good, bad)
    p = np.exp(bad - total)
    tau = np.exp(theta[5])
    off = (u - theta[4]) / tau
    by_u = (1 - p) * np.expm1(np.minimum(-u, 50)) - p * off / tau
    by_scale = -by_u * u - 1
    gradient = [
        (-by_u * slope).sum(),
        by_scale.sum(),
        (-by_u * slope * b).sum(),
        (by_scale * b).sum(),
        (p * off / tau).sum(),
        (p * (off**2 - 1)).sum(),
    ]
    mean, deviation = SPREAD
    penalty = 0.5 * ((theta[5] - mean) / deviation) ** 2 + 0.5 * (theta[3] / SLOPE_OF_SCALE) ** 2
    by_penalty = np.array([0, 0, 0, theta[3] / SLOPE_OF_SCALE**2, 0, (theta[5] - mean) / deviation**2])
    return float(-total.sum() / design_effect + penalty), -np.array(gradient) / design_effect + by_penalty
