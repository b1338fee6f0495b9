"""Regions of a smooth map: where a defect ends, and lines around cells."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw
from scipy import ndimage

from flawsift import pipeline
from flawsift.data.truth import GroundTruth
from flawsift.datasets.synthetic import TEXTURES, synthetic
from flawsift.features.store import FeatureStore
from flawsift.reports.evidence import map_scale
from flawsift.reports.overlays import Scale
from flawsift.reports.regions import EDGE, Region, hills, normal_level, outlines, outlines_of, regions
from flawsift.screening.result import Screening


def hill(row: float, column: float, height: float, width: float, size: int = 64) -> npt.NDArray[np.float32]:
    y, x = np.mgrid[:size, :size]
    values = height * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))
    return np.asarray(values, np.float32)


def test_a_region_is_the_top_of_its_hill_whatever_the_threshold() -> None:
    radius = 6 * np.sqrt(-2 * np.log(EDGE))  # of a Gaussian of width 6
    for threshold in (0.5, 3.0, 9.0):
        (cells,) = hills(hill(30, 20, 10, 6), threshold, 0.0)
        assert cells.sum() == pytest.approx(np.pi * radius**2, rel=0.1)
        assert ndimage.center_of_mass(cells) == pytest.approx((30, 20), abs=0.2)


def test_heights_count_from_what_is_normal() -> None:
    lifted = hill(30, 20, 10, 6) + 5
    np.testing.assert_array_equal(hills(lifted, 7, 5.0)[0], hills(hill(30, 20, 10, 6), 2, 0.0)[0])


def test_each_peak_above_the_threshold_has_its_region() -> None:
    values = hill(15, 15, 10, 4) + hill(45, 40, 4, 4) + hill(50, 5, 1, 4)
    high, low = hills(values, 2.0, 0.0)
    assert high[15, 15]
    assert low[45, 40]
    assert len(hills(values, 0.5, 0.0)) == 3
    (alone,) = hills(values, 20.0, 0.0)  # none is above: the highest stands for the image
    np.testing.assert_array_equal(alone, high)


def test_a_kept_image_below_the_threshold_has_no_outline() -> None:
    patch_map = hill(6, 5, 10, 1.5, size=12).astype(np.float16)
    high, low = Scale(0.0, 3.0), Scale(0.0, 30.0)
    assert [bool(outlines_of(patch_map, scale, 0.0, (48, 48), kept=True)) for scale in (high, low)] == [True, False]
    expected = [line for one in regions(patch_map, low, 0.0, (48, 48)) for line in one.polygons]
    assert outlines_of(patch_map, low, 0.0, (48, 48)) == expected != []
    assert outlines_of(np.ones((4, 4), np.float16), high, 0.0, (48, 48)) == []


def test_a_shoulder_is_no_peak() -> None:
    values = hill(30, 30, 10, 5) + hill(30, 37, 3.9, 1.2)  # between them it is nearly as high as the lower one
    assert values[30, 37] > values[30, 36] > EDGE * values[30, 37]
    assert values[30, 37] < EDGE * values.max()
    assert len(hills(values, 1.0, 0.0)) == 1


def test_a_flat_map_gives_the_whole_picture() -> None:
    whole = Region([0.0, 0.0, 160.0, 80.0], [[0.0, 0.0, 160.0, 0.0, 160.0, 80.0, 0.0, 80.0]], 160.0 * 80)
    assert regions(np.full((8, 8), 3, np.float16), Scale(1, 2), 0.0, (160, 80)) == [whole]
    assert regions(np.eye(8, dtype=np.float16), None, 0.0, (160, 80)) == [whole]


@settings(max_examples=200, deadline=None)
@given(cells=hnp.arrays(np.bool_, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_lines_enclose_exactly_the_cells(cells: npt.NDArray[np.bool_]) -> None:
    inside, scale = np.zeros(cells.shape, int), 4
    area = 0.0
    for line in outlines(cells):
        assert len(line) >= 4
        x, y = np.array(line, float).T
        area += float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2  # holes run the other way
        canvas = Image.new("L", (cells.shape[1] * scale, cells.shape[0] * scale))
        ImageDraw.Draw(canvas).polygon([(scale * c - 0.5, scale * r - 0.5) for c, r in line], fill=1)
        inside += np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale]
    assert area == cells.sum()
    np.testing.assert_array_equal(inside % 2 == 1, cells)


def best_overlaps(screening: Screening, truth: GroundTruth, size: int) -> list[float]:
    """Of each defective image that was set aside, the best overlap of a box with the box of its defect."""
    assert screening.patch_maps is not None
    scale, level, overlaps = map_scale(screening), normal_level(screening), []
    for position, id_ in enumerate(screening.ids.tolist()):
        mask = truth.mask(id_, (size, size))
        if screening.is_kept[position] or mask is None or not mask.any():
            continue
        rows, columns = ndimage.find_objects(mask.astype(int))[0]
        left, top, right, bottom = columns.start, rows.start, columns.stop, rows.stop
        best = 0.0
        for (x, y, w, h), _, _ in regions(screening.patch_maps[position], scale, level, (size, size)):
            across = max(0, min(x + w, right) - max(x, left)) * max(0, min(y + h, bottom) - max(y, top))
            best = max(best, across / (w * h + (right - left) * (bottom - top) - across))
        overlaps.append(best)
    return overlaps


@pytest.mark.real
@pytest.mark.parametrize("texture", TEXTURES)
def test_boxes_follow_the_defects(texture: str, tmp_path: Path) -> None:
    data = synthetic(40, 10, size=128, seed=3, texture=texture)
    overlaps = best_overlaps(pipeline.screen(data.images, store=FeatureStore(tmp_path)), data.truth, 128)
    assert len(overlaps) >= 5
    assert float(np.median(overlaps)) >= 0.5
