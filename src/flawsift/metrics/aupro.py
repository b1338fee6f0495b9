"""Per-region overlap: weights of regions, the area under its curve, and the curve of a set that is streamed."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawsift.errors import InputError, ParameterError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class StreamingAUPRO:
    """`aupro` of a set that does not fit in memory: one image at a time, constant memory, a proven error bound.

    Scores are counted in bins of an order-preserving integer form of float64: the resolution is relative, so one hot
    spot costs nothing. A bin starts as one value; whenever more than `bins` are occupied, all bins double in width. Up
    to `bins` distinct scores the value is exact. The order of updates and merges changes nothing.

    Args:
        fpr_limit: Where the curve ends, in (0, 1].
        bins: The most bins kept, at least 2. Each takes 32 bytes at rest and about 1 kB while images are added.

    Raises:
        ParameterError: `fpr_limit` or `bins` is out of range.
    """

    def __init__(self, *, fpr_limit: float = 0.3, bins: int = 1 << 16) -> None:
        check_limit(fpr_limit)
        if bins < 2:
            raise ParameterError(f"StreamingAUPRO.bins must be at least 2, got {bins}.")
        self.fpr_limit = fpr_limit
        self.bins = bins
        self._shift = 0  # a bin holds 2**shift neighbouring float64 values
        self._n_regions = 0
        self._parts: list[_Bins] = []

    def update(self, anomaly_map: ArrayLike, mask: ArrayLike) -> None:
        """Adds one image.

        Args:
            anomaly_map: (h, w), higher is more anomalous.
            mask: Defect pixels, (h, w); non-zero is defect.

        Raises:
            InputError: A value is not finite, or the shapes differ.
        """
        values, defect = checked_pair(anomaly_map, mask, "The map")
        weight = np.zeros(values.shape)
        weight[defect], n_regions = region_weights(defect)
        keys = _ordered_keys(values.ravel())
        self._n_regions += n_regions
        self._add(_Bins(keys, keys, (~defect).ravel().astype(np.int64), weight.ravel()))

    def merge(self, other: "StreamingAUPRO") -> None:
        """Adds all images of another stream, which keeps its own."""
        self._n_regions += other._n_regions
        self._shift = max(self._shift, other._shift)
        for part in other._parts:
            self._add(part)

    def compute(self) -> float:
        """AUPRO of the images so far, each bin taken as one tied score; InputError if it is undefined."""
        above, reached, bins = self._curve()
        return float(bins.weight @ ramp_area(above, reached, self.fpr_limit) / (self._n_regions * self.fpr_limit))

    def error_bound(self) -> float:
        """The most by which `compute` can differ from `aupro`, rounding of floats aside; InputError if undefined.

        At the edges of a bin the counted curve is the true one. Inside, the true curve rises from one edge to the
        other, at the latest at the end and at the earliest at once; the latter is the farther from a straight line.
        """
        above, reached, bins = self._curve()
        width = np.clip(self.fpr_limit - above, 0.0, reached - above)
        ramp = ramp_area(above, reached, self.fpr_limit) - np.maximum(self.fpr_limit - reached, 0.0)
        unsure = bins.low < bins.high  # a bin of one value is a true tie
        return float((bins.weight * unsure) @ (width - ramp) / (self._n_regions * self.fpr_limit))

    def _add(self, part: "_Bins") -> None:
        self._parts.append(part)
        if sum(len(p.low) for p in self._parts) > 5 * self.bins:  # rarely: each folding costs a sort
            self._fold()

    def _fold(self) -> None:
        merged = _Bins(*(np.concatenate(column) for column in zip(*self._parts, strict=True))).grouped(self._shift)
        while len(merged.low) > self.bins:
            self._shift += 1
            merged = merged.grouped(self._shift)
        self._parts = [merged]

    def _curve(self) -> tuple[FloatArray, FloatArray, "_Bins"]:
        if self._parts:
            self._fold()
        total = int(np.sum(self._parts[0].normal)) if self._parts else 0
        if not total or not self._n_regions:
            raise InputError(f"AUPRO is undefined with {self._n_regions} regions and {total} normal pixels.")
        bins = self._parts[0]
        reached = np.cumsum(bins.normal[::-1])[::-1]
        return (reached - bins.normal) / total, reached / total, bins


class _Bins(NamedTuple):
    """Lowest and highest key, number of normal pixels and summed region weight of each bin; (M,) each."""

    low: IntArray
    high: IntArray
    normal: IntArray
    weight: NDArray[np.float64]

    def grouped(self, shift: int) -> "_Bins":
        """In ascending order, with bins joined whose keys agree without their last `shift` bits."""
        order = np.argsort(self.low)
        low, high, normal, weight = self.low[order], self.high[order], self.normal[order], self.weight[order]
        key = low >> shift  # an arithmetic shift: it keeps the order of negative keys
        new = key[1:] != key[:-1]
        last = np.append(np.flatnonzero(new), len(key) - 1)
        return _Bins(
            low[np.append(0, last[:-1] + 1)],
            np.maximum.accumulate(high)[last],  # a group ends before the next begins, so no high leaks into the next
            np.diff(np.cumsum(normal)[last], prepend=0),
            np.bincount(np.append(0, np.cumsum(new)), weight).astype(np.float64),
        )


def region_weights(mask: BoolArray) -> tuple[NDArray[np.float64], int]:
    """1 / size of its region for each defect pixel in row-major order, and the number of regions."""
    if not mask.any():
        return np.empty(0), 0
    from scipy.ndimage import label  # slow to import

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # labelling costs by area
    regions, n_regions = label(box, structure=np.ones((3, 3)))
    region = regions[box]
    return 1.0 / np.bincount(region, minlength=1)[region], int(n_regions)


def ramp_area(start: FloatArray, stop: FloatArray, limit: float) -> FloatArray:
    """Area left of `limit` under curves that are 0 up to `start`, rise linearly to 1 at `stop`, and stay there."""
    width = stop - start
    covered = np.clip(limit - start, 0.0, width)
    area: FloatArray = np.maximum(limit - stop, 0.0) + covered**2 / (2 * np.where(width > 0, width, 1.0))
    return area


def _ordered_keys(values: FloatArray) -> IntArray:
    """Integers in the order of the values, equal for equal values."""
    bits = (values.astype(np.float64) + 0.0).view(np.int64)  # + 0.0 turns -0.0 into 0.0
    # The bits of positive floats are ordered as integers, those of negative ones the other way round.
    return bits ^ ((bits >> 63) & np.iinfo(np.int64).max)


def floats(values: ArrayLike, what: str) -> FloatArray:
    """Finite values as float32 or float64, whichever holds them without loss, so that no tie comes or goes."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{what} must hold real numbers, got {array.dtype}.")
    array = array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64, copy=False)
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise InputError(f"{what} must be finite, got {bad} nan or infinite of {array.size} values.")
    return array


def checked_pair(anomaly_map: ArrayLike, mask: ArrayLike, what: str) -> tuple[FloatArray, BoolArray]:
    """A map and its mask as arrays of one shape, (h, w)."""
    values, defect = floats(anomaly_map, what), np.asarray(mask) != 0
    if values.ndim != 2 or values.shape != defect.shape:
        raise InputError(f"{what} has shape {values.shape} and its mask {defect.shape}; give (h, w) for both.")
    return values, defect


def check_limit(limit: float) -> None:
    """Refuse an end of the curve outside (0, 1]."""
    if not 0.0 < limit <= 1.0:
        raise ParameterError(f"fpr_limit must be in (0, 1], got {limit}.")
