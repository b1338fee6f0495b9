"""How the scores of k sub-models become one ranking: pure functions of a (M, N) score matrix.

Scale, vote, estimate of the contamination, selection. No detector and no image is seen here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation

from flawsift.detectors.parts.robust import robust_units
from flawsift.screening.mixture import fit_mixture, says_little
from flawsift.screening.options import Consensus, Normalize
from flawsift.types import Floats, Ids

TRIM = 0.25  # share cut off at each end by the trimmed mean: the lowest and highest of four held-out sub-models
EFFECT = "design_effect"  # its name among the evidence
TAIL = 0.05  # share of images whose scores count as the tail
LOW_END = 0.25  # share of the images by which the correlation within groups is told
DILATION_GRID = 8  # a rejected patch takes its eight neighbours along, unless the grid is so coarse that these are much
SUSPECT = 0.8  # probability of a defect above which an image is set aside, so that few good ones are
ORDINARY_PATCHES = 1.0  # robust deviations up to which patches of such an image are ordinary


@dataclass(frozen=True)
class Contamination:
    """An estimate of the share of anomalies.

    Attributes:
        alpha_hat: The estimate, one of `flawsift.screening.mixture.SHARES`.
        method: How it was made.
        interval: 90 % interval; None where nothing was estimated.
        evidence: What it rests on, for the report.
    """

    alpha_hat: float
    method: str
    evidence: Mapping[str, float]
    interval: tuple[float, float] | None = None

    @property
    def is_evident(self) -> bool:
        """Whether there are defects beyond reasonable doubt."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def cannot_tell(self) -> bool:
        """Whether the scores say next to nothing of the share."""
        return self.interval is None or says_little(self.interval)

    @property
    def text(self) -> str:
        """The estimate for people, in per cent."""
        if self.interval is None:
            return f"{100 * self.alpha_hat:.0f} %"
        low, high = (100 * end for end in self.interval)
        if self.cannot_tell:
            return f"between {low:.0f} and {high:.0f} % (the scores tell no more)"
        return f"{100 * self.alpha_hat:.0f} % (between {low:.0f} and {high:.0f} %)"


def own_mask(subset_of: npt.NDArray[np.int64], n_subsets: int) -> npt.NDArray[np.bool_]:
    """(R * k, N): whether sub-model m trained on image i."""
    subsets = np.arange(n_subsets)
    own: npt.NDArray[np.bool_] = subset_of[:, None, :] == subsets[None, :, None]
    return own.reshape(-1, subset_of.shape[1])


def normalize_scores(
    scores: npt.NDArray[np.float32], own: npt.NDArray[np.bool_], how: Normalize
) -> npt.NDArray[np.float64]:
    """Sub-models on one scale, by their held-out scores only: (M, N) to (M, N)."""
    result = scores.astype(np.float64)
    if how == "none":
        return result
    for row, mine in zip(result, own, strict=True):
        reference = row[~mine] if (~mine).any() else row
        if how == "robust":
            row[:] = robust_units(row, reference)
        else:
            ordered = np.sort(reference)
            below = np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right")
            row[:] = below / (2 * len(ordered))  # mid-ranks: ties share theirs
    return result


def combine(
    scores: Floats, own: npt.NDArray[np.bool_], how: Consensus, *, exclude_own: bool
) -> npt.NDArray[np.float64]:
    """One score per image (equation 3): (M, N) to (N,)."""
    if how == "rank_mean":
        scores = normalize_scores(scores.astype(np.float32), own, "rank")
    if not exclude_own:
        return COMBINE[how](scores)
    n = scores.shape[1]
    counts = (~own).sum(0)
    # every image has the same number of own sub-models, one per partition: the others form a rectangle
    held_out = scores.T[~own.T].reshape(n, int(counts[0])).T if n else scores
    return COMBINE[how](held_out)


def _trimmed_mean(scores: Floats) -> Floats:
    cut = int(TRIM * len(scores))
    result: Floats = np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0)
    return result


def _mean(scores: Floats) -> Floats:
    result: Floats = scores.mean(0)
    return result


def _median(scores: Floats) -> Floats:
    result: Floats = np.median(scores, axis=0)
    return result


COMBINE: Mapping[str, Callable[[Floats], Floats]] = {
    "mean": _mean,
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "rank_mean": _mean,
}


def held_out_mean(scores: npt.NDArray[np.float32], own: npt.NDArray[np.bool_]) -> Floats:
    """(N,) mean raw score over the other sub-models; over all of them where there is no other."""
    return combine(scores.astype(np.float64), own, "mean", exclude_own=bool((~own).any(0).all()))


def keep_lowest(ids: Ids, consensus: Floats, share: float) -> Ids:
    """The floor(share * N) ids of lowest consensus (equation 4), at least one, in the order of `ids`.

    The paper keeps all up to a quantile; counting makes ties definite: of equals, the first listed stay.
    """
    # 0.6 * 5 is 2.9999999999999996 in floating point, and means 3
    n_keep = max(1, int(np.floor(share * len(ids) + 1e-9)))
    lowest = np.argsort(consensus, kind="stable")[:n_keep]
    return ids[np.sort(lowest)]


def rejected_patches(grids: npt.NDArray[np.floating[Any]], z: float) -> npt.NDArray[np.bool_]:
    """Patches that stage 2 should not learn from: (N, h, w) held-out maps to (N, h, w) bool.

    A patch is rejected when its score lies more than `z` robust deviations (median and MAD of all patches of the set)
    above the median, or beside such a patch: receptive fields overlap. At one position at most half of the images lose
    their patch, the worse half, so that a part which is always hard, such as an edge, is still learned. What is nan
    does not count, and is not rejected.
    """
    values = grids.astype(np.float64)
    counts = ~np.isnan(values)
    above: npt.NDArray[np.bool_] = robust_units(values, values[counts]) > z
    if min(values.shape[1:], default=0) >= DILATION_GRID:
        above = binary_dilation(above, np.ones((1, 3, 3), bool))
    if counts.all():
        return above & (values > np.median(values, axis=0))
    middle = np.nanmedian(np.where(counts.any(0), values, 0.0), axis=0)  # of a place that never counts: any number
    return above & (values > middle)


def choose(
    probability: Floats, grids: npt.NDArray[np.floating[Any]] | None, z: float, estimate: "Contamination"
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """What stage 2 learns from when nobody says how much to keep: (N,) kept images, (N, h, w) rejected patches.

    On a clean set the patches that lie farthest from all others are rare good ones, and leaving out even the few of
    its most unusual images costs more than can be won. So everything stays unless defects are in evidence: the 90 %
    interval of their share excludes none. Then images that are very probably defective are set aside, and the
    patches of `rejected_patches` are left out of all images, down to `ORDINARY_PATCHES` in those that are set aside:
    a detector that can leave out patches still learns what is ordinary in these. A defective image is mostly good.

    Args:
        probability: (N,) that each image is defective.
        grids: (N, h, w) held-out maps, nan where a place does not count, or None.
        z: Robust deviations above which a patch is rejected; 0 for none.
        estimate: Of the contamination, by `estimate_contamination`.

    Returns:
        None in place of the patches without maps, or with z = 0.
    """
    kept = (probability <= SUSPECT) | (not estimate.is_evident)
    if grids is None or z <= 0:
        return kept, None
    if not estimate.is_evident:
        return kept, np.zeros(grids.shape, bool)
    strict = rejected_patches(grids, min(z, ORDINARY_PATCHES))
    return kept, np.where(kept[:, None, None], rejected_patches(grids, z), strict)


def estimate_contamination(
    consensus: Floats,
    ordinary: Floats | None = None,
    effect: float = 1.0,
    known: npt.NDArray[np.int64] | None = None,
) -> tuple[Contamination, Floats]:
    """The share of anomalies, and the probability of each image, from a mixture of two laws of the scores.

    Args:
        consensus: (N,) consensus of the images.
        ordinary: (N,) of `flawsift.screening.mixture.ordinary_scores`, or None without maps.
        effect: Of groups, by `design_effect`: views of one object count as fewer images.
        known: (N,) what a person said, as for `flawsift.screening.mixture.fit_mixture`.

    Returns:
        The estimate, and the (N,) probability that each image is defective: zeros where nothing was estimated.
    """
    mixture = fit_mixture(consensus, ordinary, effect, known)
    if mixture is None:
        n = len(consensus)
        return Contamination(0.0, "none: too few or constant scores", {"n": float(n)}), np.zeros(n)
    evidence = {"probability_of_none": float(mixture.posterior[0]), EFFECT: effect}
    return Contamination(mixture.share, "mixture of two laws", evidence, mixture.interval), mixture.probability


def design_effect(consensus: Floats, groups: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> float:
    """How many times larger groups make the variance of the tail's share than independent images would (Kish, 1965).

    1 + (k - 1) phi, with k the mean group size that an image sees, and phi the correlation between two images of a
    group in whether they lie in the tail. It is not counted in the upper tail, where the defects are, but at the lower
    end: the share of the pairs of a group that both lie in the lowest quarter says how strongly two normal variables
    would be correlated, and these how often both lie in the tail.
    """
    from scipy.optimize import brentq  # slow to import
    from scipy.stats import multivariate_normal, norm

    n = len(consensus)
    sizes = np.array([len(g) for g in groups], float)
    n_pairs = (sizes * (sizes - 1)).sum()
    if not n_pairs:
        return 1.0
    low = consensus <= np.quantile(consensus, LOW_END)
    counts = np.array([low[np.asarray(g)].sum() for g in groups], float)
    together = (counts * (counts - 1)).sum() / n_pairs

    def both(share: float, correlation: float) -> float:
        """How often two normal variables lie in a tail of this share."""
        edge = norm.ppf(share)
        pair = multivariate_normal(cov=[[1, correlation], [correlation, 1]], allow_singular=True)
        return float(pair.cdf([edge, edge]))

    share = float(low.mean())
    if together <= share**2:
        return 1.0
    correlation = 1.0 if together >= both(share, 1.0) else brentq(lambda r: both(share, r) - together, 0, 1)
    phi = (both(TAIL, correlation) - TAIL**2) / (TAIL * (1 - TAIL))
    return float(1 + n_pairs / n * phi)
