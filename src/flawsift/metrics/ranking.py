"""Metrics of image scores and anomaly maps against labels.

Only this module knows labels (`GroundTruth`). Every metric works on ranks: scores need no range, a strictly increasing
transform of all scores changes nothing, and ties count exactly. One code path serves images and pixels: the normal
scores are sorted once, and each anomalous score is looked up in them.

>>> image_auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
0.75
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawsift.data.truth import GroundTruth, checked_labels
from flawsift.errors import InputError
from flawsift.metrics.aupro import (
    FloatArray,
    IntArray,
    check_limit,
    checked_pair,
    floats,
    ramp_area,
    region_weights,
)


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an anomalous image scores above a normal one, ties counting half.

    Source: Hanley and McNeil 1982, the Mann-Whitney form; equal to scikit-learn's `roc_auc_score`.

    Args:
        scores: (N,), higher is more anomalous, any range.
        labels: 0 or 1, (N,).

    Raises:
        InputError: Only one class is present, a score is not finite, or the lengths differ.
    """
    return _auroc(_image_ranks(scores, labels))


def image_ap(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision, step-wise: the mean, over the anomalous images, of the precision at their score.

    Source: scikit-learn's `average_precision_score`, to which it is equal. Arguments and errors as in `image_auroc`.
    """
    return _ap(_image_ranks(scores, labels))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """The best F1 over all thresholds, and the (highest) threshold that gives it: score >= threshold is anomalous.

    It is an ORACLE threshold, chosen on the labels that judge it: it compares rankings and foretells no F1 in use.
    Source: van Rijsbergen 1979; the field's F1-max. Arguments and errors as in `image_auroc`.
    """
    return _f1_max(_image_ranks(scores, labels))


def pixel_auroc(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> float:
    """`image_auroc` over all pixels of the set. Arguments and errors as in `pixel_metrics`."""
    return _auroc(_pixels(maps, masks).ranks())


def pixel_ap(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> float:
    """`image_ap` over all pixels of the set. Arguments and errors as in `pixel_metrics`."""
    return _ap(_pixels(maps, masks).ranks())


def pixel_f1_max(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> tuple[float, float]:
    """`f1_max` over all pixels of the set: an ORACLE threshold too. Arguments and errors as in `pixel_metrics`."""
    return _f1_max(_pixels(maps, masks).ranks())


def pixel_metrics(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike], *, fpr_limit: float = 0.3) -> dict[str, float]:
    """All pixel metrics from one sort: `pixel_auroc`, `pixel_ap`, `pixel_f1_max` (the value alone) and `aupro`.

    Args:
        maps: Anomaly maps, (N, h, w) or N arrays (h, w) whose sizes may differ. Higher is more anomalous.
        masks: The defect mask of each map, of the shape of its map; non-zero is defect.
        fpr_limit: Where the curve of `aupro` ends, in (0, 1].

    Raises:
        InputError: No defect pixel or no normal pixel, a value that is not finite, or shapes or lengths that differ.
        ParameterError: `fpr_limit` is out of range.
    """
    check_limit(fpr_limit)
    return _pixels(maps, masks).metrics(fpr_limit)


def aupro(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike], *, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false positive rate, divided by that rate; exact.

    A region is an 8-connected component of one mask. At each threshold, the false positive rate is the share of all
    normal pixels of the set (those of anomalous images too) that reach it, and the overlap is the mean, over all
    regions of the set, of the share of the region that reaches it. The curve starts at (0, 0), has a point at each
    distinct score, and is linear between points and up to the limit. Arguments and errors as in `pixel_metrics`.

    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021. Many published figures come from evenly
    spaced thresholds, which one hot spot can make 20 points too low.
    """
    check_limit(fpr_limit)
    return _pixels(maps, masks).aupro(fpr_limit)


def evaluate(
    ids: ArrayLike, scores: ArrayLike, truth: GroundTruth, maps: Iterable[ArrayLike] | None = None
) -> dict[str, float | int | None]:
    """All metrics of one set of predictions; None where a metric is undefined.

    Image metrics need both classes. Pixel metrics need maps and pixels of both kinds; anomalous images without a mask
    are left out of them, and counted as "n_without_mask" (None where there are no maps, or no masks at all).
    `GroundTruth.mask` brings each mask to the size of its map.

    Args:
        ids: Global ids of the scored images, (N,).
        scores: Image scores, (N,).
        truth: Labels and masks of these images at least.
        maps: Anomaly maps (h, w) in the order of `ids`, or None. They are read once, one at a time.

    Raises:
        InputError: An id is unknown or comes twice, a value is not finite, or lengths differ.
    """
    chosen = truth.select(ids)
    values, n_anomalous = _scores(scores, len(chosen)), int(np.sum(chosen.labels))
    names = ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold")
    result: dict[str, float | int | None] = dict.fromkeys((*names, "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"))
    result |= {"n_images": len(chosen), "n_anomalous": n_anomalous, "n_without_mask": None}
    if 0 < n_anomalous < len(chosen):
        ranks = _image_ranks(values, chosen.labels)
        result |= zip(names, (_auroc(ranks), _ap(ranks), *_f1_max(ranks)), strict=True)
    if maps is not None and chosen.has_masks:
        unknown = {i for i in chosen.ids[chosen.labels == 1].tolist() if i not in chosen.masks}
        result["n_without_mask"] = len(unknown)
        pairs = ((m, i) for m, i in _paired(maps, chosen.ids.tolist()) if i not in unknown)
        # A map that is not (h, w) gets a mask of another shape, which is refused where all maps are checked.
        pixels = _gather((m, chosen.mask(i, np.atleast_2d(np.asarray(m)).shape[-2:])) for m, i in pairs)
        result |= pixels.metrics(0.3) if pixels.defined else {}
    return result


class _Ranks(NamedTuple):
    """At each distinct anomalous score, descending, how many lie there or higher; (U,) each."""

    threshold: FloatArray
    hits: IntArray  # anomalous, score >= threshold
    above: IntArray  # normal, score > threshold
    reached: IntArray  # normal, score >= threshold
    n_normal: int


class _Pixels(NamedTuple):
    """All pixels of a set: scores of normal (B,) and defect (D,) ones, ascending, and 1 / size of their region (D,)."""

    normal: FloatArray
    defect: FloatArray
    weight: NDArray[np.float64]
    n_regions: int

    @property
    def defined(self) -> bool:
        return len(self.defect) > 0 and len(self.normal) > 0

    def ranks(self) -> _Ranks:
        return _ranks(self.normal, self.defect)

    def aupro(self, limit: float) -> float:
        # Each defect pixel has a curve of its own: 0 until its score ties with normal ones, rising along the tie, then
        # 1. The weighted sum of their areas is the trapezoid rule, ties and limit exact.
        above, reached = _rates(self.normal, self.defect)
        area = ramp_area(above / len(self.normal), reached / len(self.normal), limit)
        return float(self.weight @ area / (self.n_regions * limit))

    def metrics(self, limit: float) -> dict[str, float]:
        ranks = self.ranks()
        values = {"pixel_auroc": _auroc(ranks), "pixel_ap": _ap(ranks), "pixel_f1_max": _f1_max(ranks)[0]}
        return {**values, "aupro": self.aupro(limit)}


def _pixels(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike]) -> _Pixels:
    pixels = _gather(_paired(maps, masks))
    if not pixels.defined:
        counts = f"{len(pixels.defect)} defect and {len(pixels.normal)} normal pixels"
        raise InputError(f"Pixel metrics need both kinds, got {counts}. Check that the masks belong to these maps.")
    return pixels


def _gather(pairs: Iterable[tuple[Any, Any]]) -> _Pixels:
    normal, defect, weights = [np.empty(0, np.float32)], [np.empty(0, np.float32)], [np.empty(0)]
    n_regions = 0
    for at, (anomaly_map, mask) in enumerate(pairs):
        values, is_defect = checked_pair(anomaly_map, mask, f"Map {at}")
        weight, n_here = region_weights(is_defect)
        normal.append(values[~is_defect])
        defect.append(values[is_defect])
        weights.append(weight)
        n_regions += n_here
    background, scores = np.concatenate(normal), np.concatenate(defect)
    background.sort()
    order = np.argsort(scores)  # neighbours in order hit neighbouring places: 8 times faster look-ups
    return _Pixels(background, scores[order], np.concatenate(weights)[order], n_regions)


def _rates(normal: FloatArray, scores: FloatArray) -> tuple[IntArray, IntArray]:
    """How many of the ascending normal scores (B,) lie above each score, and how many reach it."""
    size = len(normal)
    return size - np.searchsorted(normal, scores, side="right"), size - np.searchsorted(normal, scores, side="left")


def _ranks(normal: FloatArray, anomalous: FloatArray) -> _Ranks:
    threshold, counts = np.unique(anomalous, return_counts=True)
    above, reached = _rates(normal, threshold)
    return _Ranks(threshold[::-1], np.cumsum(counts[::-1]), above[::-1], reached[::-1], len(normal))


def _auroc(ranks: _Ranks) -> float:
    lost = int(np.diff(ranks.hits, prepend=0) @ (ranks.above + ranks.reached))  # in halves: a tie is half lost
    return 1.0 - lost / (2 * int(ranks.hits[-1]) * ranks.n_normal)


def _ap(ranks: _Ranks) -> float:
    return float(np.diff(ranks.hits, prepend=0) @ (ranks.hits / (ranks.hits + ranks.reached)) / ranks.hits[-1])


def _f1_max(ranks: _Ranks) -> tuple[float, float]:
    f1 = 2 * ranks.hits / (ranks.hits + ranks.reached + ranks.hits[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(ranks.threshold[best])


def _image_ranks(scores: ArrayLike, labels: ArrayLike) -> _Ranks:
    label = checked_labels(labels)
    values, n_anomalous = _scores(scores, len(label)), int(np.sum(label))
    if not 0 < n_anomalous < len(label):
        raise InputError(f"The metric needs normal and anomalous images, got {n_anomalous} anomalous of {len(label)}.")
    return _ranks(np.sort(values[label == 0]), values[label == 1])


def _scores(scores: ArrayLike, size: int) -> FloatArray:
    values = floats(scores, "Scores")
    if values.shape != (size,):
        raise InputError(f"Scores must be one per image: {size}, got shape {values.shape}.")
    return values


def _paired(left: Iterable[Any], right: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs, as zip gives them, but unequal lengths are the user's error."""
    end = object()
    for at, (one, other) in enumerate(zip_longest(left, right, fillvalue=end)):
        if one is end or other is end:
            raise InputError(f"There are {at} {'maps' if one is end else 'masks or ids'} only; give as many of both.")
        yield one, other
