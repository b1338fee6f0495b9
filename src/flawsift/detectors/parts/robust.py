"""Robust statistics: medians, and deviations from them."""

import numpy as np
from numpy.typing import NDArray

from flawsift.types import Floats

MAD_TO_SIGMA = 1.4826  # times the median absolute deviation (MAD) of a Gaussian is its standard deviation


def robust_units(values: Floats, reference: Floats | None = None) -> Floats:
    """Values as distances from the median of a reference, in its MAD as a standard deviation."""
    reference = values if reference is None else reference
    centre = np.median(reference)
    scale = MAD_TO_SIGMA * np.median(np.abs(reference - centre))
    if scale <= 0:  # more than half the values are equal
        scale = np.abs(reference - centre).mean() or 1.0
    result: Floats = (values - centre) / scale
    return result


def group_medians(groups: NDArray[np.int64], values: NDArray[np.float64], n_groups: int) -> NDArray[np.float64]:
    """(n_groups,) medians of (N,) values by the group that each is of; 0 for a group without values."""
    counts = np.bincount(groups, minlength=n_groups)
    ordered = np.append(values[np.lexsort((values, groups))], 0.0)  # one more, for empty groups at the end
    starts = np.cumsum(counts) - counts
    lower, upper = starts + np.maximum(counts - 1, 0) // 2, starts + counts // 2
    return np.where(counts > 0, (ordered[lower] + ordered[upper]) / 2, 0.0)
