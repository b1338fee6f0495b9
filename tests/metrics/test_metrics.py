"""Metrics against scikit-learn, brute force, values worked out by hand, and their own invariances."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError, ParameterError
from flawsift.metrics.aupro import StreamingAUPRO
from flawsift.metrics.ranking import (
    aupro,
    evaluate,
    f1_max,
    image_ap,
    image_auroc,
    pixel_ap,
    pixel_auroc,
    pixel_f1_max,
    pixel_metrics,
)

Array = NDArray[Any]
Set = tuple[Array, Array]

# ---- references ----------------------------------------------------------------------------------------------------


def regions_of(mask: Array) -> list[Array]:
    """8-connected components by flood fill, written apart from scipy."""
    todo = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    regions = []
    while todo:
        front, region = [todo.pop()], np.zeros(mask.shape, bool)
        while front:
            row, column = front.pop()
            region[row, column] = True
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
            todo -= near
            front += near
        regions.append(region)
    return regions


def brute_aupro(maps: Iterable[Array], masks: Iterable[Array], limit: float) -> float:
    """Each distinct score is a threshold; trapezoids; a straight line to the limit."""
    pairs = [(np.asarray(m, np.float64), np.asarray(d) > 0) for m, d in zip(maps, masks, strict=True)]
    regions = [(m, region) for m, d in pairs for region in regions_of(d)]
    normal = np.concatenate([m[~d] for m, d in pairs])
    area, last_fpr, last_pro = 0.0, 0.0, 0.0
    for threshold in sorted({float(v) for m, _ in pairs for v in m.ravel()}, reverse=True):
        fpr = float(np.mean(normal >= threshold))
        pro = float(np.mean([np.mean(m[region] >= threshold) for m, region in regions]))
        if fpr > limit:
            at_limit = last_pro + (pro - last_pro) * (limit - last_fpr) / (fpr - last_fpr)
            return (area + (limit - last_fpr) * (last_pro + at_limit) / 2) / limit
        area += (fpr - last_fpr) * (last_pro + pro) / 2
        last_fpr, last_pro = fpr, pro
    return area / limit


def oracle_f1_max(scores: Array, labels: Array) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)))


def smooth_set(seed: int, n: int = 6, size: int = 48) -> Set:
    """Blurred noise with defects that raise it; every third image has none."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for i in range(n):
        for _ in range(i % 3):
            row, column, h, w = *rng.integers(0, size - 9, 2), *rng.integers(1, 9, 2)
            masks[i, row : row + h, column : column + w] = True
    maps = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2)) * 5 + gaussian_filter(masks * 1.5, (0, 1, 1))
    return maps.astype(np.float32), masks


@st.composite
def small_sets(draw: st.DrawFn, levels: int = 6) -> Set:
    """Small maps of few levels (many ties), with at least one pixel of each kind."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
    maps = draw(hnp.arrays(np.float64, shape, elements=st.integers(-levels, levels).map(float)))
    masks = draw(hnp.arrays(np.bool_, shape))
    assume(masks.any() and not masks.all())
    return maps, masks


limits = st.sampled_from([0.05, 0.3, 0.5, 1.0])
quick = settings(max_examples=40, deadline=None)

# ---- image metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_image_metrics_equal_scikit_learn(dtype: type, levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 200)
    scores: Array = (rng.integers(0, levels, 200) % 30000 + labels * levels // 4 % 30000).astype(dtype)
    wide = scores.astype(np.float64)
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, wide), abs=1e-12)
    assert image_ap(scores, labels) == pytest.approx(average_precision_score(labels, wide), abs=1e-12)
    best, threshold = f1_max(scores, labels)
    assert best == pytest.approx(oracle_f1_max(wide, labels), abs=1e-12)
    called = wide >= threshold
    assert 2 * np.sum(called & (labels == 1)) / (np.sum(called) + np.sum(labels)) == pytest.approx(best)


def test_image_metrics_by_hand() -> None:
    scores, labels = [9, 5, 5, 5, 1], [1, 1, 0, 0, 1]
    # 9 beats both normals, 5 ties with both, 1 loses to both: (2 + 1 + 0) / 6.
    assert image_auroc(scores, labels) == 0.5
    # Precision at 9, 5, 1: 1/1, 2/4, 3/5; each adds a third of the recall.
    assert image_ap(scores, labels) == pytest.approx((1 + 1 / 2 + 3 / 5) / 3)
    # F1 at 9: 2/4; at 5: 4/7; at 1: 6/8.
    assert f1_max(scores, labels) == (0.75, 1.0)


def test_f1_max_gives_the_highest_of_equal_thresholds() -> None:
    # F1 at 3: 2 * 1 / (1 + 2) = 2/3; at 1: 2 * 2 / (4 + 2) = 2/3.
    assert f1_max([3, 2, 2, 1], [1, 0, 0, 1]) == (2 / 3, 3.0)


def test_large_scores_that_hardly_differ() -> None:
    """A sigmoid, or a cast of float64 to float32, would tie these."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    scores = 1e6 + 5 * np.clip(rng.normal(labels, 1), -1, 1) + rng.normal(size=300) * 1e-4
    assert len(np.unique(scores.astype(np.float32))) < 250
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert image_ap(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("metric", [image_auroc, image_ap, f1_max])
def test_image_metrics_refuse(metric: Callable[[Any, Any], object]) -> None:
    with pytest.raises(InputError, match="got 0 anomalous of 2"):
        metric([1.0, 2.0], [0, 0])
    with pytest.raises(InputError, match="got 2 anomalous of 2"):
        metric([1.0, 2.0], [1, 1])
    with pytest.raises(InputError, match="2 nan or infinite of 3"):
        metric([1.0, np.nan, np.inf], [0, 1, 1])
    with pytest.raises(InputError, match="one per image: 3"):
        metric([1.0, 2.0], [0, 1, 1])
    with pytest.raises(InputError, match="1 kinds of label"):
        metric([1.0, 2.0], [0, 2])
    with pytest.raises(InputError, match="real numbers"):
        metric(["a", "b"], [0, 1])


# ---- pixel metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_metrics_equal_scikit_learn(seed: int) -> None:
    maps, masks = smooth_set(seed)
    maps = np.round(maps, 2)  # ties
    scores, labels = maps.ravel(), masks.ravel()
    result = pixel_metrics(maps, masks)
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert result["pixel_f1_max"] == pytest.approx(oracle_f1_max(scores, labels), abs=1e-12)
    assert result["aupro"] == aupro(maps, masks)
    assert pixel_auroc(maps, masks) == result["pixel_auroc"]
    assert pixel_ap(maps, masks) == result["pixel_ap"]
    assert pixel_f1_max(maps, masks) == f1_max(scores, labels)
    assert pixel_metrics(maps, masks, fpr_limit=0.1)["aupro"] == aupro(maps, masks, fpr_limit=0.1) != result["aupro"]


@given(small_sets(), limits)
@quick
def test_aupro_equals_brute_force_with_ties(data: Set, limit: float) -> None:
    assert aupro(*data, fpr_limit=limit) == pytest.approx(brute_aupro(*data, limit), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_aupro_equals_brute_force_on_smooth_maps(dtype: type) -> None:
    maps, masks = smooth_set(3, size=16)
    maps = maps.astype(dtype)
    assert aupro(maps, masks) == pytest.approx(brute_aupro(maps, masks, 0.3), abs=1e-12)


def test_aupro_is_one_when_defects_come_first() -> None:
    maps, masks = smooth_set(0)
    assert aupro(np.where(masks, 100, maps), masks) == pytest.approx(1.0, abs=1e-12)
    assert aupro(np.where(masks, -100, maps), masks) == 0.0


@pytest.mark.parametrize("limit", [0.1, 0.3, 1.0])
def test_aupro_of_constant_maps_is_half_the_limit(limit: float) -> None:
    """One threshold: a straight line from (0, 0) to (1, 1)."""
    _, masks = smooth_set(0)
    assert aupro(np.full(masks.shape, 7.0), masks, fpr_limit=limit) == pytest.approx(limit / 2)


def test_aupro_is_a_mean_over_regions_and_not_over_pixels() -> None:
    # A region of one pixel is found first, one of three pixels last: overlap 1/2 from FPR 0 to 1.
    assert aupro([[[9, 5, 1], [4, 3, 1], [6, 7, 1]]], [[[1, 0, 1], [0, 0, 1], [0, 0, 1]]]) == pytest.approx(0.5)


def test_aupro_by_hand_with_a_tie_across_the_limit() -> None:
    # The defect ties with 2 of 10 normal pixels: overlap rises from 0 to 1 while FPR goes from 0 to 0.2.
    scores = np.array([[5, 5, 5, 4, 4, 4, 3, 2, 2, 1, 0]])
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert aupro([scores], [mask], fpr_limit=0.3) == pytest.approx((0.2 / 2 + 0.1) / 0.3)
    assert aupro([scores], [mask], fpr_limit=0.2) == pytest.approx(1 / 2)
    # At the limit 0.1 the line has come to 1/2.
    assert aupro([scores], [mask], fpr_limit=0.1) == pytest.approx((0.1 * 0.5 / 2) / 0.1)


def test_aupro_counts_normal_pixels_of_the_whole_set() -> None:
    # Alone: 1 of 4 normal pixels is above the defect, so FPR is 1/4 when it is found: (0.3 - 0.25) / 0.3.
    defect_map, mask = np.array([[3, 2, 1, 0, 0]]), np.array([[0, 1, 0, 0, 0]])
    assert aupro([defect_map], [mask]) == pytest.approx(0.05 / 0.3)
    # With a normal image of 6 low pixels: 1 of 10.
    low = np.zeros((2, 3))
    assert aupro([defect_map, low], [mask, np.zeros((2, 3))]) == pytest.approx(0.2 / 0.3)


def test_regions_that_touch_diagonally_are_one() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]])
    maps = np.array([[9, 3, 2, 1], [0, 9, 0, -1], [0, 0, 0, -1]])
    # Two regions, one found at once: 1/2. With 4 neighbours there would be three: 2/3.
    assert aupro([maps], [mask]) == pytest.approx(1 / 2)


def test_regions_of_neighbouring_images_are_apart() -> None:
    maps = np.array([[[9.0, 0.0]], [[-1.0, 0.0]]])
    assert aupro(maps, np.array([[[1, 0]], [[1, 0]]])) == pytest.approx(0.5)


def test_maps_of_different_sizes_and_dtypes() -> None:
    maps, masks = smooth_set(5, n=4, size=20)
    cut_maps: list[Array] = [maps[0], maps[1][:7].astype(np.float64), maps[2][:, :13].astype(np.float16), maps[3][:3]]
    cut_masks: list[Array] = [masks[0], masks[1][:7], masks[2][:, :13] * np.uint8(255), masks[3][:3]]
    assert any(m.any() for m in cut_masks)
    assert aupro(cut_maps, iter(cut_masks)) == pytest.approx(brute_aupro(cut_maps, cut_masks, 0.3), abs=1e-12)


def test_float64_pixels_are_not_tied_by_rounding() -> None:
    maps = 1 + 1e-12 * np.array([[[4.0, 3.0, 2.0, 1.0]]])
    assert aupro(maps, np.array([[[1, 0, 0, 0]]])) == pytest.approx(1.0)
    assert pixel_auroc(maps, np.array([[[1, 0, 0, 0]]])) == 1.0


@given(small_sets())
@quick
def test_strictly_increasing_transforms_change_nothing(data: Set) -> None:
    maps, masks = data
    expected = pixel_metrics(maps, masks)
    for transformed in (1e6 + maps / 8, np.exp(maps), -1 / (maps + 100), maps.astype(np.float16)):
        assert pixel_metrics(transformed, masks) == expected
    labels = masks.ravel()
    for metric in (image_auroc, image_ap):
        assert metric(np.exp(maps).ravel(), labels) == metric(maps.ravel(), labels)


@given(small_sets(), st.randoms(use_true_random=False))
@quick
def test_the_order_of_images_changes_nothing(data: Set, rng: random.Random) -> None:
    maps, masks = data
    order = rng.sample(range(len(maps)), len(maps))
    assert pixel_metrics(maps[order], masks[order]) == pytest.approx(pixel_metrics(maps, masks), abs=1e-12)


@pytest.mark.parametrize("metric", [pixel_auroc, pixel_ap, pixel_f1_max, pixel_metrics, aupro])
def test_pixel_metrics_refuse(metric: Callable[[Any, Any], object]) -> None:
    maps, masks = np.arange(8.0).reshape(2, 2, 2), np.eye(2)[None].repeat(2, axis=0)
    with pytest.raises(InputError, match="0 defect and 8 normal"):
        metric(maps, masks * 0)
    with pytest.raises(InputError, match="8 defect and 0 normal"):
        metric(maps, masks * 0 + 1)
    with pytest.raises(InputError, match="0 defect and 0 normal"):
        metric([], [])
    with pytest.raises(InputError, match="Map 1 must be finite, got 1 nan or infinite of 4"):
        metric(np.where(maps == 5, np.nan, maps), masks)
    with pytest.raises(InputError, match=r"Map 0 has shape \(2, 2\) and its mask \(2, 3\)"):
        metric(maps, np.ones((2, 2, 3)))
    with pytest.raises(InputError, match=r"Map 0 has shape \(2,\)"):
        metric(maps[0], masks[0])
    with pytest.raises(InputError, match="There are 1 maps only"):
        metric(maps[:1], masks)
    with pytest.raises(InputError, match="There are 1 masks or ids only"):
        metric(maps, masks[:1])


@pytest.mark.parametrize("limit", [0.0, -1.0, 1.1, np.nan])
def test_fpr_limit_out_of_range(limit: float) -> None:
    maps, masks = smooth_set(0, n=2)
    for call in (
        lambda: aupro(maps, masks, fpr_limit=limit),
        lambda: pixel_metrics(maps, masks, fpr_limit=limit),
        lambda: StreamingAUPRO(fpr_limit=limit),
    ):
        with pytest.raises(ParameterError, match=r"fpr_limit must be in \(0, 1\]"):
            call()


# ---- streaming -----------------------------------------------------------------------------------------------------


def streamed(maps: Iterable[Array], masks: Iterable[Array], **settings: Any) -> StreamingAUPRO:
    stream = StreamingAUPRO(**settings)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        stream.update(anomaly_map, mask)
    return stream


@given(small_sets(levels=40), limits, st.integers(2, 12))
@quick
def test_streaming_is_within_its_bound(data: Set, limit: float, bins: int) -> None:
    maps, masks = data
    stream = streamed(maps / 3, masks, fpr_limit=limit, bins=bins)
    exact = aupro(maps / 3, masks, fpr_limit=limit)
    assert abs(stream.compute() - exact) <= stream.error_bound() + 1e-12
    if len(np.unique(maps)) <= bins:
        assert stream.error_bound() == 0.0


def test_streaming_bound_is_reached_at_worst() -> None:
    """Three scores in two bins: {-5} and {1, 1.1}. In the latter the defect comes first, which no bin can tell."""
    maps, mask = np.array([[-5, 1, 1.1]]), np.array([[0, 0, 1]])
    stream = streamed([maps], [mask], bins=2, fpr_limit=1.0)
    # Exact 1. Counted: a ramp to FPR 1/2, then 1: 3/4. The truth may lie a triangle of 1/4 away.
    assert (stream.compute(), stream.error_bound()) == pytest.approx((3 / 4, 1 / 4))
    stream = streamed([maps], [mask], bins=2, fpr_limit=0.3)
    # To 0.3 the ramp covers 0.3^2 / (2 * 0.5) = 0.09.
    assert (stream.compute(), stream.error_bound()) == pytest.approx((0.09 / 0.3, 0.21 / 0.3))


@pytest.mark.parametrize("kind", ["plain", "hot spot", "far from zero", "many zeros", "tiny"])
def test_streaming_is_close_at_the_default(kind: str) -> None:
    maps, masks = smooth_set(7, n=9, size=128)
    if kind == "hot spot":  # ruins evenly spaced bins
        maps[3, :3, :3] *= 1e4
    elif kind == "far from zero":
        maps = maps.astype(np.float64) + 1e6
    elif kind == "many zeros":
        maps = np.maximum(maps, 0)
    elif kind == "tiny":
        maps = maps.astype(np.float64) * 1e-200
    stream = streamed(maps, masks)
    assert len(np.unique(maps)) > stream.bins
    assert abs(stream.compute() - aupro(maps, masks)) <= stream.error_bound()
    assert 0 < stream.error_bound() < 1e-3
    assert sum(len(part.low) for part in stream._parts) <= stream.bins


def test_streaming_takes_both_zeros_for_one() -> None:
    maps, masks = np.array([[0.0, -0.0, -1.0, -1.0]]), np.array([[1, 0, 0, 0]])
    assert streamed([maps], [masks], fpr_limit=1.0).compute() == pytest.approx(aupro([maps], [masks], fpr_limit=1.0))


def test_streaming_in_any_order_and_merged() -> None:
    maps, masks = smooth_set(8, n=9)
    order = np.random.default_rng(0).permutation(9)
    whole = streamed(maps, masks, bins=500)
    shuffled = streamed(maps[order], masks[order], bins=500)
    first, second = streamed(maps[:1], masks[:1], bins=500), streamed(maps[1:], masks[1:], bins=500)
    before = second.compute()
    first.merge(second)
    assert second.compute() == before
    for other in (shuffled, first):
        assert other.compute() == pytest.approx(whole.compute(), abs=1e-12)
        assert other.error_bound() == pytest.approx(whole.error_bound(), abs=1e-12)
    assert whole.compute() != pytest.approx(before, abs=1e-3)


def test_merging_coarse_bins_into_fine_ones_keeps_the_bound() -> None:
    maps, masks = smooth_set(8)
    fine, coarse = streamed(maps[:2], masks[:2], bins=20_000), streamed(maps[2:], masks[2:], bins=20)
    assert coarse.error_bound() > fine.error_bound() == 0.0
    fine.merge(coarse)
    assert abs(fine.compute() - aupro(maps, masks)) <= fine.error_bound()
    assert np.all(fine._parts[0].high[:-1] < fine._parts[0].low[1:])  # the bound rests on bins that do not overlap


def test_streaming_memory_is_constant() -> None:
    stream = StreamingAUPRO(bins=100)
    for seed in range(20):
        maps, masks = smooth_set(seed, n=3, size=24)
        for anomaly_map, mask in zip(maps, masks, strict=True):
            stream.update(anomaly_map, mask)
            assert sum(len(part.low) for part in stream._parts) <= 500


def test_streaming_refuses() -> None:
    with pytest.raises(ParameterError, match="bins must be at least 2, got 1"):
        StreamingAUPRO(bins=1)
    stream = StreamingAUPRO()
    for call in (stream.compute, stream.error_bound):
        with pytest.raises(InputError, match="0 regions and 0 normal"):
            call()
    stream.update(np.ones((2, 2)), np.ones((2, 2)))
    with pytest.raises(InputError, match="1 regions and 0 normal"):
        stream.compute()
    with pytest.raises(InputError, match="nan"):
        stream.update([[np.nan]], [[0]])
    with pytest.raises(InputError, match="shape"):
        stream.update([[1.0]], [[0, 1]])


# ---- ground truth --------------------------------------------------------------------------------------------------


def some_truth() -> GroundTruth:
    return GroundTruth(
        ids=np.array([40, 10, 30, 20]),
        labels=np.array([0, 1, 1, 0], np.int8),
        defect_types=("good", "scratch", "dent", "good"),
        masks={10: np.eye(4, dtype=bool), 30: np.zeros((4, 4), bool)},
    )


def test_select_speaks_ids_in_the_order_asked() -> None:
    truth = some_truth()
    part = truth.select([30, 40])
    assert part.ids.tolist() == [30, 40]
    assert part.labels.tolist() == [1, 0]
    assert part.defect_types == ("dent", "good")
    assert set(part.masks) == {30}
    assert (len(part), len(truth), len(truth.select([]))) == (2, 4, 0)


def test_select_names_five_unknown_ids_and_the_total() -> None:
    with pytest.raises(InputError, match=r"There are 7 unknown ids: 0, 1, 2, 3, 4, \.\.\.\."):
        some_truth().select([10, *range(7)])
    with pytest.raises(InputError, match="1 unknown ids: 5"):
        some_truth().mask(5, (2, 2))


def test_has_masks_and_contamination() -> None:
    truth = some_truth()
    assert truth.has_masks
    assert truth.contamination == 0.5
    assert truth.select([10, 30, 20]).contamination == pytest.approx(2 / 3)
    lacking = GroundTruth(truth.ids, truth.labels, truth.defect_types, {10: np.eye(4, dtype=bool)})
    assert lacking.has_masks
    assert not lacking.select([30, 20]).has_masks
    assert lacking.select([10, 20]).has_masks
    assert lacking.mask(30, (4, 4)) is None
    with pytest.raises(InputError, match="no images"):
        _ = truth.select([]).contamination


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array([1, 2, 3])}, "3 ids, 4 labels and 4 defect types"),
        ({"defect_types": ("good",)}, "4 ids, 4 labels and 1 defect types"),
        ({"ids": np.array([40, 10, 30, 40])}, "1 ids that come more than once: 40"),
        ({"labels": np.array([0, 1, 3, -1])}, "2 kinds of label that are neither 0 nor 1: -1, 3"),
        ({"masks": {99: np.eye(4, dtype=bool)}}, "1 masks of no image: 99"),
    ],
)
def test_ground_truth_refuses(changes: dict[str, Any], message: str) -> None:
    truth = some_truth()
    fields: dict[str, Any] = {
        "ids": truth.ids,
        "labels": truth.labels,
        "defect_types": truth.defect_types,
        "masks": truth.masks,
    }
    with pytest.raises(InputError, match=message):
        GroundTruth(**(fields | changes))


def truth_of(mask: Path | Array) -> GroundTruth:
    return GroundTruth(np.array([3]), np.array([1], np.int8), ("hole",), {3: mask})


def resized(mask: Path | Array, shape: tuple[int, int]) -> Array:
    result = truth_of(mask).mask(3, shape)
    assert result is not None
    assert result.shape == shape
    assert result.dtype == np.bool_
    return result


def test_masks_of_normal_images_are_empty() -> None:
    mask = some_truth().mask(40, (3, 5))
    assert mask is not None
    assert mask.shape == (3, 5)
    assert not mask.any()


@given(st.tuples(*[st.integers(1, 40)] * 4), st.data())
@quick
def test_a_defect_of_one_pixel_survives_downsizing(sizes: tuple[int, ...], data: st.DataObject) -> None:
    rows, columns = max(sizes[:2]), max(sizes[2:])
    small = min(sizes[:2]), min(sizes[2:])
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    mask = np.zeros((rows, columns), bool)
    mask[row, column] = True
    centre = int((row + 0.5) * small[0] / rows + 1e-9), int((column + 0.5) * small[1] / columns + 1e-9)
    assert np.argwhere(resized(mask, small)).tolist() == [list(centre)]


def test_downsizing_by_hand() -> None:
    mask = np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    assert resized(mask, (2, 3)).tolist() == [[False, False, True], [True, False, False]]
    assert resized(mask, (4, 6)).tolist() == (mask > 0).tolist()
    assert resized(mask, (1, 1)).tolist() == [[True]]


@pytest.mark.parametrize("shape", [(10, 14), (7, 16), (11, 7), (5, 21)])
def test_upsizing_takes_the_nearest_pixel(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    nearest = Image.fromarray(mask.astype(np.uint8)).resize(shape[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(resized(mask, shape), np.asarray(nearest) > 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_are_read_from_files_of_any_mode(tmp_path: Path, mode: str) -> None:
    mask = np.random.default_rng(0).random((6, 9)) < 0.3
    path = tmp_path / "mask.png"
    if mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16))  # 1 of 65535: any non-zero value counts
    elif mode == "RGB":
        image = Image.fromarray(np.stack([mask * 0, mask * 0, mask], axis=2).astype(np.uint8))
    elif mode == "P":
        image = Image.fromarray(np.where(mask, 0, 1).astype(np.uint8), mode="L").convert("P")
        image.putpalette([255, 0, 0, 0, 0, 0])  # colour 0 is red: a palette's order says nothing
    else:
        image = Image.fromarray(mask.astype(np.uint8) * 255).convert(mode)
    image.save(path)
    assert np.array_equal(resized(path, (6, 9)), mask)


def test_unreadable_masks(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    for path in (broken, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=path.name):
            truth_of(path).mask(3, (2, 2))
    with pytest.raises(InputError, match=r"image 3 has shape \(2, 2, 2\)"):
        truth_of(np.ones((2, 2, 2), bool)).mask(3, (2, 2))


# ---- evaluate ------------------------------------------------------------------------------------------------------

IMAGE_KEYS = {"image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold"}
PIXEL_KEYS = {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}


def defined(result: dict[str, float | int | None]) -> set[str]:
    counts = {"n_images", "n_anomalous", "n_without_mask"}
    assert set(result) == IMAGE_KEYS | PIXEL_KEYS | counts
    return {name for name, value in result.items() if value is not None} - counts


def test_evaluate_gives_every_metric_by_id() -> None:
    maps, masks = smooth_set(9)
    labels = np.array([mask.any() for mask in masks], np.int8)
    types = tuple("bad" if label else "good" for label in labels)
    ids = np.arange(6) * 11 + 5
    truth = GroundTruth(ids, labels, types, {int(i): m for i, m in zip(ids, masks, strict=True) if m.any()})
    order = [4, 0, 5, 1, 3]  # neither all images nor the order of the ground truth
    scores = np.array([3.0, 1.0, 1.0, 5.0, 2.0])
    result = evaluate(ids[order], scores, truth, iter(maps[order]))
    assert defined(result) == IMAGE_KEYS | PIXEL_KEYS
    assert {type(value) for value in result.values()} == {int, float}
    assert result["image_auroc"] == image_auroc(scores, labels[order])
    assert result["image_ap"] == image_ap(scores, labels[order])
    assert (result["image_f1_max"], result["image_f1_max_threshold"]) == f1_max(scores, labels[order])
    assert (result["n_images"], result["n_anomalous"]) == (5, 3)
    for name, value in pixel_metrics(maps[order], masks[order]).items():
        assert result[name] == value


def test_evaluate_brings_masks_to_the_size_of_the_maps() -> None:
    maps = np.array([[[9.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = np.zeros((64, 64), bool)
    mask[1, 1] = True
    truth = GroundTruth(np.array([0, 1]), np.array([1, 0], np.int8), ("dot", "good"), {0: mask})
    assert evaluate([0, 1], [9, 0], truth, maps)["aupro"] == pytest.approx(1.0)


def test_evaluate_leaves_out_what_is_undefined() -> None:
    truth, maps = some_truth(), np.zeros((4, 4, 4))
    assert defined(evaluate([10, 20], [1, 0], truth)) == IMAGE_KEYS
    assert defined(evaluate([10, 20], [1, 0], truth, maps[:2])) == IMAGE_KEYS | PIXEL_KEYS
    assert defined(evaluate([10, 30], [1, 0], truth, maps[:2])) == PIXEL_KEYS  # only anomalous images
    assert defined(evaluate([20, 40], [1, 0], truth, maps[:2])) == set()  # only normal images
    assert defined(evaluate([30, 40], [1, 0], truth, maps[:2])) == IMAGE_KEYS  # the one mask is empty
    lacking = GroundTruth(truth.ids, truth.labels, truth.defect_types, {10: np.eye(4, dtype=bool)})
    assert defined(evaluate([30, 20], [1, 0], lacking, maps[:2])) == IMAGE_KEYS
    assert evaluate([30, 20], [1, 0], lacking, maps[:2])["n_without_mask"] is None
    assert defined(evaluate([10, 30, 20], [1, 0, 0], lacking, maps[:3])) == IMAGE_KEYS | PIXEL_KEYS
    assert evaluate([10, 30, 20], [1, 0, 0], lacking, maps[:3])["n_without_mask"] == 1
    full = GroundTruth(np.array([1]), np.array([1], np.int8), ("all",), {1: np.ones((4, 4), bool)})
    assert defined(evaluate([1], [1], full, maps[:1])) == set()


def test_evaluate_refuses() -> None:
    truth, maps = some_truth(), np.zeros((4, 4, 4))
    with pytest.raises(InputError, match="1 unknown ids: 11"):
        evaluate([10, 11], [1, 0], truth)
    with pytest.raises(InputError, match="more than once: 10"):
        evaluate([10, 10], [1, 0], truth)
    with pytest.raises(InputError, match="1 nan or infinite"):
        evaluate([20, 40], [np.nan, 0], truth)
    with pytest.raises(InputError, match="one per image: 2"):
        evaluate([10, 20], [1, 0, 3], truth)
    with pytest.raises(InputError, match="There are 1 maps only"):
        evaluate([10, 20], [1, 0], truth, maps[:1])
    with pytest.raises(InputError, match="There are 2 masks or ids only"):
        evaluate([10, 20], [1, 0], truth, maps)
    for bad in (maps[0], maps[None]):
        with pytest.raises(InputError, match="Map 0 has shape"):
            evaluate([10, 20], [1, 0], truth, [bad[0], bad[0]])


def test_importing_metrics_is_cheap() -> None:
    code = "import sys, flawsift.metrics.ranking; print({'torch', 'scipy', 'sklearn', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
