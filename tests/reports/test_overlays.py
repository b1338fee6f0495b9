"""Heatmaps over pictures: sizes, places, and that colours mean the same on every image."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from flawsift.reports.overlays import Scale, overlay
from tests.reports.material import noise

SCALE = Scale(1.0, 2.0)


def grey(size: tuple[int, int], value: int = 128) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def opacity(map_: npt.NDArray[np.floating[Any]], size: tuple[int, int] = (64, 64)) -> npt.NDArray[np.float64]:
    """What an overlay takes away from the difference between black and white, in [0, 1]."""
    black, white = (np.asarray(overlay(grey(size, v), map_, SCALE), np.float64) for v in (0, 255))
    result: npt.NDArray[np.float64] = 1 - (white - black).mean(2) / 255
    return result


@pytest.mark.parametrize("size", [(64, 64), (90, 30), (31, 77), (1, 1)])
def test_overlay_has_the_size_of_the_picture(size: tuple[int, int]) -> None:
    for shape in ((8, 8), (5, 9), (128, 128), (1, 1)):
        assert overlay(grey(size), np.full(shape, 1.5), SCALE).size == size


def test_large_pictures_are_shrunk_in_their_aspect_ratio() -> None:
    assert overlay(grey((1200, 600)), np.zeros((4, 4)), SCALE).size == (512, 256)
    assert overlay(grey((1200, 600)), np.zeros((4, 4)), SCALE, max_edge=None).size == (1200, 600)


def test_overlay_leaves_good_places_and_marks_bad_ones() -> None:
    image = Image.fromarray(noise(1, edge=64)[0])
    before = np.asarray(image).copy()
    map_ = np.zeros((64, 64), np.float32)
    map_[20:40, 10:50] = 2.5
    map_[50:60, 50:60] = 1.4  # above typical, below the threshold
    after = np.asarray(overlay(image, map_, SCALE))
    assert not (after == 255).all(2)[20:40, 10:50].any(), "no line that nobody asked for"
    changed = (after != before).any(2)
    assert not changed[map_ == 0].any()
    assert changed[map_ > 2].mean() > 0.99
    assert changed[map_ == np.float32(1.4)].mean() > 0.95
    assert (np.asarray(image) == before).all()


def test_a_line_runs_around_what_is_suspect_and_leaves_it_bare() -> None:
    image = Image.fromarray(noise(1, edge=128)[0])
    corners = [40, 40, 80, 40, 80, 60, 40, 60]  # in pixels of the image
    after = np.asarray(overlay(image, np.full((8, 8), 2.5), SCALE, [corners]))
    before = np.asarray(image)
    assert (after[40:60, 40:80] == before[40:60, 40:80]).all()
    assert (after[39, 39:80] == 255).all()
    assert (after[38, 38:80] == 20).all()
    assert (after[:38] != before[:38]).any(2).mean() > 0.99
    half = np.asarray(overlay(image, np.zeros((8, 8)), SCALE, [corners], max_edge=64))
    shown = np.argwhere((half == 255).all(2))
    assert shown.min(0).tolist() == [19, 19], "shrunk with the picture"
    assert shown.max(0).tolist() == [31, 41], "shrunk with the picture"


def test_the_place_is_right_on_pictures_that_are_not_square() -> None:
    map_ = np.zeros((8, 8), np.float32)
    map_[1, 6] = 9
    difference = np.abs(np.asarray(overlay(grey((160, 40)), map_, SCALE), int) - 128).sum(2)
    row, column = (float(np.average(np.indices(difference.shape)[axis], weights=difference)) for axis in (0, 1))
    assert abs(column - 6.5 / 8 * 160) < 3
    assert abs(row - 1.5 / 8 * 40) < 2


def test_opacity_rises_with_the_value() -> None:
    levels = [opacity(np.full((4, 4), value)).mean() for value in (0.5, 1.0, 1.2, 1.5, 1.9, 2.0)]
    assert levels[0] == 0
    assert levels[1] == 0
    assert (np.diff(levels[1:]) > 0.01).all()
    above = [opacity(np.full((4, 4), value))[32, 32] for value in (2.0, 2.5, 3.0, 30.0)]
    assert above[0] < above[1] < above[2] == above[3] < 0.9  # saturated, and the picture still shines through


def test_colours_are_anchored_to_the_scale_not_to_the_image() -> None:
    map_ = np.linspace(0, 3, 64).reshape(8, 8)
    low = overlay(grey((64, 64)), map_, SCALE)
    with_peak = map_.copy()
    with_peak[7, 7] = 1000
    same = np.asarray(low)[:40] == np.asarray(overlay(grey((64, 64)), with_peak, SCALE))[:40]
    assert same.all()
    dark, bright = (np.asarray(overlay(grey((64, 64), v), map_, SCALE), int) for v in (60, 180))
    alpha = opacity(map_)[..., None]
    # the same map on two pictures adds the same colour; what differs is the picture below
    assert np.abs((bright - dark) - 120 * (1 - alpha)).max() <= 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 7.0])
def test_constant_and_non_finite_maps(value: float) -> None:
    result = np.asarray(overlay(grey((32, 32)), np.full((4, 4), value, np.float32), SCALE))
    assert (result == 128).all() == (not value > SCALE.low)
    one_bad = np.zeros((4, 4), np.float32)
    one_bad[0, 0] = value
    assert (np.asarray(overlay(grey((32, 32)), one_bad, SCALE))[16:, 16:] == 128).all()


def test_one_odd_cell_does_not_spoil_its_neighbours() -> None:
    # cell centres are at 16 and 48: between them the hot cell fades out, beyond them it stays
    assert opacity(np.array([[np.nan, 3.0]]))[32, 40] > 0.3
    assert opacity(np.array([[1.0, np.inf]]))[32, 60] == opacity(np.array([[1.0, 3.0]]))[32, 60] > 0.7


def test_tensors_and_half_precision_are_maps_too() -> None:
    map_ = np.linspace(0, 3, 16).reshape(4, 4)
    expected = overlay(grey((32, 32)), map_.astype(np.float32), SCALE).tobytes()
    assert overlay(grey((32, 32)), torch.from_numpy(map_), SCALE).tobytes() == expected
    read_only = map_.astype(np.float32)
    read_only.flags.writeable = False
    assert overlay(grey((32, 32)), read_only, SCALE).tobytes() == expected
    assert overlay(grey((32, 32)), torch.from_numpy(map_).bfloat16(), SCALE).size == (32, 32)
    assert overlay(grey((32, 32)).convert("L"), map_.astype(np.float16), SCALE).mode == "RGB"


def test_scale_of_a_sample() -> None:
    scores = np.append(np.arange(101.0), [np.nan, np.inf])
    assert Scale.of(scores, None) == Scale(50.0, 99.0)
    assert Scale.of(scores, 80.0) == Scale(50.0, 80.0)
    assert Scale.of(scores, 50.0) == Scale(0.0, 50.0)  # a threshold no higher than the median: up from the lowest score
    assert Scale.of(scores, 0.0).threshold == 0.0
    levels = Scale(50.0, 80.0).levels(np.array([-9.0, 50.0, 80.0, 110.0, 999.0, np.nan, np.inf, -np.inf]))
    assert levels.tolist() == [0, 0, 0.5, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("threshold", [None, 3.0, -3.0, 0.0, np.nan])
@pytest.mark.parametrize("scores", [[], [3.0], [3.0] * 5, [np.nan], [-1.0, 9.0, 9.0], [0.0, 0.0]])
def test_scale_is_never_empty(scores: list[float], threshold: float | None) -> None:
    scale = Scale.of(scores, threshold)
    assert scale.low < scale.threshold
    if threshold is not None and np.isfinite(threshold):
        assert scale.threshold == threshold
    assert np.isfinite([scale.low, scale.threshold]).all()


@pytest.mark.parametrize("scale", [Scale(2.0, 2.0), Scale(3.0, 2.0), Scale(np.nan, 2.0)])
def test_a_scale_without_width_still_draws(scale: Scale) -> None:
    assert overlay(grey((16, 16)), np.linspace(0, 9, 16).reshape(4, 4), scale).size == (16, 16)
