"""What a count says of the share behind it."""

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.9
TINY = 1e-9  # parameters of a beta law are positive


def share_interval(
    counts: npt.ArrayLike, n: npt.ArrayLike, confidence: float = CONFIDENCE
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both ends of the Clopper-Pearson interval of shares, by counts of n.

    From quantiles of beta distributions (Clopper and Pearson, "The use of confidence or fiducial limits illustrated in
    the case of the binomial", Biometrika 26, 1934).

    Args:
        counts: Of any shape; expected ones may be fractions.
        n: Of each, more than 0.
        confidence: Probability that the interval holds the share, at least.
    """
    from scipy.stats import beta  # slow to import

    k, n = np.asarray(counts, np.float64), np.asarray(n, np.float64)
    tail = (1 - confidence) / 2
    low = np.where(k > 0, beta.ppf(tail, np.maximum(k, TINY), n - k + 1), 0.0)
    high = np.where(k < n, beta.ppf(1 - tail, k + 1, np.maximum(n - k, TINY)), 1.0)
    return low, high
