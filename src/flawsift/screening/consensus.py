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
from flawsift.screening.options import Consensus, Normalize
from flawsift.types import Floats, Ids

MIN_KEEP = 0.4  # the paper's share; keep="auto" never goes below it
TRIM = 0.25  # share cut off at each end by the trimmed mean: the lowest and highest of four held-out sub-models
FIT_QUANTILES = (0.1, 0.5)  # the fit sees no score above the median: half the set may be anomalous
TAIL_CUT = 3.0  # in Gumbel scales above the location: 5 % of normal images lie there
EXPECTED_TAIL = float(1 - np.exp(-np.exp(-TAIL_CUT)))  # share of normal images above the cut
LOW_END = 0.25  # share of the images by which the correlation within groups is told
TAIL_SIGMAS = 2.0  # the excess must exceed this many standard errors to count
DILATION_GRID = 8  # a rejected patch takes its eight neighbours along, unless the grid is so coarse that these are much
SUSPECT = 2.0  # robust deviations of the consensus above which an image is set aside, where defects are in evidence
N_BOOTSTRAP, INTERVAL = 400, (0.05, 0.95)
MIN_FOR_ESTIMATE = 20  # quantiles of fewer scores say nothing


@dataclass(frozen=True)
class Contamination:
    """An estimate of the share of anomalies.

    Attributes:
        alpha_hat: The estimate in [0, 1 - MIN_KEEP].
        method: How it was made.
        interval: 90 % interval of the estimate over bootstrap samples of the groups (of the images, where there are
            none). It says how far chance moves the estimate, not how far the model behind it is from the truth; None
            where nothing was estimated.
        evidence: What it rests on, for the report.
    """

    alpha_hat: float
    method: str
    evidence: Mapping[str, float]
    interval: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        """The estimate for people, in per cent."""
        shown = f"{100 * self.alpha_hat:.0f} %"
        if self.interval is None:
            return shown
        return f"{shown} ({100 * self.interval[0]:.0f} to {100 * self.interval[1]:.0f} % by chance alone)"


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
    their patch, the worse half, so that a part which is always hard, such as an edge, is still learned.
    """
    values = grids.astype(np.float64)
    above: npt.NDArray[np.bool_] = robust_units(values) > z
    if min(values.shape[1:], default=0) >= DILATION_GRID:
        above = binary_dilation(above, np.ones((1, 3, 3), bool))
    return above & (values > np.median(values, axis=0))


def choose(
    consensus: Floats, grids: npt.NDArray[np.floating[Any]], z: float, estimate: "Contamination"
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What stage 2 learns from when nobody says how much to keep: (N,) kept images, (N, h, w) rejected patches.

    On a clean set the patches that lie farthest from all others are rare good ones, and leaving out even the few of
    its most unusual images costs more than can be won. So everything stays unless the consensus has more in its upper
    tail than chance explains. Then images more than `SUSPECT` robust deviations above the median are set aside, and
    the patches of `rejected_patches` are left out of all images, with half of `SUSPECT` in those that are set aside:
    a detector that can leave out patches still learns what is ordinary in these. A defective image is mostly good.

    Args:
        consensus: (N,) consensus of the images.
        grids: (N, h, w) held-out maps.
        z: Robust deviations above which a patch is rejected.
        estimate: Of the contamination, by `estimate_contamination`.

    Returns:
        Half of the images stay at least: those up to the median.
    """
    if estimate.alpha_hat <= 0:
        return np.ones(len(consensus), bool), np.zeros(grids.shape, bool)
    kept = robust_units(consensus) <= SUSPECT
    return kept, np.where(kept[:, None, None], rejected_patches(grids, z), rejected_patches(grids, min(z, SUSPECT) / 2))


def estimate_contamination(consensus: Floats, members: Sequence[Sequence[int]] | None = None) -> Contamination:
    """The share of anomalies, from the upper tail of the consensus.

    An image's score is a maximum over patches, so normal images follow roughly a Gumbel law. One is fitted to the
    lower part of the consensus, where anomalies are rare, by its quantiles; what lies above its upper tail beyond
    expectation is counted as anomalous. It underestimates when anomalies score like normals, which is the safe side.

    Args:
        consensus: (N,) consensus of the images.
        members: Positions of the images of each group. Views of one object score alike, so that chance puts them into
            the tail together: the variance of the tail grows by `design_effect`. None takes the images as independent.
    """
    n = len(consensus)
    location, scale = _gumbel(consensus) if n else (0.0, 0.0)
    if n < MIN_FOR_ESTIMATE or scale <= 0:
        return Contamination(0.0, "none: too few or constant scores", {"n": float(n)})
    observed = float((consensus > location + scale * TAIL_CUT).mean())
    groups = [np.asarray(m) for m in members] if members is not None else list(np.arange(n)[:, None])
    if len(groups) == 1:
        return Contamination(0.0, "none: all images are of one group", {"n": float(n)})
    effect = design_effect(consensus, groups)
    generator = np.random.default_rng(0)  # the same scores have the same interval
    drawn = generator.choice(len(groups), (N_BOOTSTRAP, len(groups)))
    alone = len(groups) == n
    samples = (consensus[row if alone else np.concatenate([groups[g] for g in row])] for row in drawn)
    low, high = np.quantile([_tail_excess(sample, effect) for sample in samples], INTERVAL)
    evidence = {
        "location": float(location),
        "scale": float(scale),
        "cut": TAIL_CUT,
        "observed": observed,
        "expected": EXPECTED_TAIL,
        "design_effect": effect,
    }
    return Contamination(_tail_excess(consensus, effect), "Gumbel tail excess", evidence, (float(low), float(high)))


def _gumbel(consensus: Floats) -> tuple[float, float]:
    """Location and scale of the Gumbel law with the quantiles `FIT_QUANTILES` of the scores."""
    low, high = np.quantile(consensus, FIT_QUANTILES)
    gumbel = -np.log(-np.log(np.asarray(FIT_QUANTILES)))
    scale = (high - low) / (gumbel[1] - gumbel[0])
    return low - scale * gumbel[0], scale


def design_effect(consensus: Floats, groups: Sequence[npt.NDArray[np.int64]]) -> float:
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
    counts = np.array([low[g].sum() for g in groups], float)
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
    phi = (both(EXPECTED_TAIL, correlation) - EXPECTED_TAIL**2) / (EXPECTED_TAIL * (1 - EXPECTED_TAIL))
    return float(1 + n_pairs / n * phi)


def _tail_excess(consensus: Floats, effect: float) -> float:
    """The share above the tail's cut beyond expectation; 0 where chance explains it."""
    location, scale = _gumbel(consensus)
    if scale <= 0:
        return 0.0
    excess = float((consensus > location + scale * TAIL_CUT).mean()) - EXPECTED_TAIL
    noise = np.sqrt(effect * EXPECTED_TAIL * (1 - EXPECTED_TAIL) / len(consensus))
    return float(min(excess / (1 - EXPECTED_TAIL), 1 - MIN_KEEP)) if excess > TAIL_SIGMAS * noise else 0.0
