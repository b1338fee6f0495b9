"""Images in a rectangle with their aspect ratio, and maps that lie over the images again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flawsift.data.decoding import to_pixels
from flawsift.data.frames import STRETCH, Frame, Region, content_of
from flawsift.data.images import ImageSet
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError
from flawsift.features.backbones import load_backbone
from flawsift.features.extraction import attach
from flawsift.types import as_shape


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([(64, 64), (96, 160), (160, 96)]))
def test_the_aspect_ratio_is_kept(width: int, height: int, shape: tuple[int, int]) -> None:
    rows, columns = content_of((width, height), shape)
    assert 1 <= rows <= shape[0]
    assert 1 <= columns <= shape[1]
    assert rows == shape[0] or columns == shape[1]
    if min(rows, columns) > 20:
        assert (columns / rows) / (width / height) == pytest.approx(1, abs=STRETCH - 1 + 0.03)
    assert content_of((width, height), 64) == (64, 64), "the papers' square is always filled"


def test_what_remains_repeats_the_last_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 20, 3)).astype(np.uint8)
    made = to_pixels(Image.fromarray(picture), (40, 50)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(made[:, :20], picture)
    np.testing.assert_array_equal(made[:, 20:], np.repeat(picture[:, 19:], 30, axis=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 64), st.integers(8, 96), st.integers(0, 9))
def test_maps_cover_the_image_again(rows: int, columns: int, seed: int) -> None:
    """A map that is linear over the image stays so, between its first and last cell."""
    frame = Frame((64, 96), torch.tensor([[rows, columns]], dtype=torch.float64))
    slope = np.random.default_rng(seed).normal(size=2)
    down, across = ((torch.arange(n) + 0.5) * 8 for n in (8, 12))  # pixels of the input
    line = (slope[0] * down[:, None] / rows + slope[1] * across / columns)[None]
    over = frame.over_image(line)[0]
    wanted = slope[0] * ((torch.arange(8) + 0.5) / 8)[:, None] + slope[1] * (torch.arange(12) + 0.5) / 12
    counted = frame.counted(8, 12)
    assert counted is not None
    last = counted[0].any(1).sum() - 1, counted[0].any(0).sum() - 1
    ends = torch.stack([(last[0] + 0.5) * 8 / rows, (last[1] + 0.5) * 8 / columns])
    inner = torch.ones(8, 12, dtype=torch.bool)
    for axis, n in enumerate((8, 12)):
        at = (torch.arange(n) + 0.5) / n
        within = (at >= 4 / (rows, columns)[axis]) & (at <= ends[axis])
        inner &= within[:, None] if axis == 0 else within
    torch.testing.assert_close(over[inner].double(), wanted[inner].double(), rtol=0, atol=1e-5)
    assert torch.equal(Frame((64, 96), torch.tensor([[64.0, 96.0]])).over_image(line), line)


def test_cells_over_the_image_and_in_the_input_are_each_others_inverse() -> None:
    frame = Frame((64, 64), torch.tensor([[64, 32], [32, 64]], dtype=torch.float64))
    over = torch.zeros(2, 8, 8, dtype=torch.bool)
    over[0, 2, 6] = over[1, 6, 2] = True  # three quarters to the right, and down
    counted = frame.counted(8, 8)
    assert counted is not None
    inside = frame.from_image(over) & counted
    assert inside[0].nonzero().tolist() == [[2, 3]]
    assert inside[1].nonzero().tolist() == [[3, 2]]
    places = torch.tensor([2 * 8 + 3, 3 * 8 + 2])
    assert frame.place_over_image(places, 8, 8).tolist() == [2 * 8 + 7, 7 * 8 + 2]


def test_what_does_not_count_is_as_low_as_the_lowest_that_does() -> None:
    frame = Frame((32, 32), torch.tensor([[32, 16]], dtype=torch.float64))
    maps = torch.arange(16.0).view(1, 4, 4)
    assert frame.only_counted(maps)[0].tolist() == [[0, 1, 0, 0], [4, 5, 0, 0], [8, 9, 0, 0], [12, 13, 0, 0]]


def test_an_image_thinner_than_a_patch_has_patches_that_count() -> None:
    counted = Frame((64, 64), torch.tensor([[64, 1], [1, 64], [1, 1]], dtype=torch.float64)).counted(4, 4)
    assert counted is not None
    column, row = torch.zeros(2, 4, 4).bool()
    column[:, 0], row[0] = True, True
    assert torch.equal(counted, torch.stack([column, row, column & row]))


def test_a_region_counts_by_the_middles_of_patches_and_one_at_least() -> None:
    cells = np.zeros((8, 8), np.bool_)
    cells[:4, 4:] = True
    frame = Frame((32, 32), None, Region(cells))
    counted = frame.counted(4, 4)
    assert counted is not None
    assert counted[0].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    thin = np.zeros((100, 100), np.bool_)
    thin[49, 10] = True
    small = Frame((32, 32), None, Region(thin)).counted(4, 4)
    assert small is not None
    assert small[0].nonzero().tolist() == [[1, 0]], "the nearest, where it lies between their middles"
    with pytest.raises(InputError, match="empty"):
        Region(np.zeros((3, 3), np.bool_))


def test_a_region_survives_json() -> None:
    cells = np.random.default_rng(0).random((17, 5)) > 0.5
    again = Region.from_json(Region(cells).as_json())
    assert again == Region(cells)
    assert Region.from_json(None) is None
    with pytest.raises(ValueError, match="bits"):
        Region.from_json({**Region(cells).as_json(), "rows": 99})


SHAPES = [(96, 96), (96, 128), (128, 96), (60, 200), (200, 60), (300, 300), (97, 131), (240, 320), (64, 256), (333, 77)]


@pytest.mark.parametrize("detector", ["quorum", "patchcore", "padim"])
def test_a_mark_peaks_where_it_is_in_images_of_ten_shapes(detector: str) -> None:
    """Each mark is in the part of the image that the map says, to the width of a patch."""
    generator = np.random.default_rng(0)

    def plain(h: int, w: int) -> np.ndarray:
        return (120 + generator.normal(0, 2, (h, w, 3))).clip(0, 255).astype(np.uint8)

    good = [plain(*shape) for shape in SHAPES for _ in range(3)]
    backbone = load_backbone("tiny", size=(96, 128), runtime="torch")
    made = make_detector(detector, layers=["stride4", "stride8"])
    train, _ = attach(ImageSet.from_arrays(good), backbone, made.layers)
    assert train.contents, "some are framed"
    made.fit(train)
    for h, w in SHAPES:
        for y, x in ((0.25, 0.3), (0.75, 0.6)):
            marked = plain(h, w)
            scale = max(1, round(2 * max(h / 96, w / 128)))  # as small as it can be seen
            top, left = int(y * h), int(x * w)
            marked[top : top + scale, left : left + scale] = 255
            data, _ = attach(ImageSet.from_arrays([marked]), backbone, made.layers)
            prediction = made.predict(data)
            assert prediction.maps is not None
            found = np.unravel_index(prediction.maps[0].argmax(), prediction.maps[0].shape)
            reach = [12 / edge for edge in content_of((w, h), (96, 128))]  # a patch of stride 8 and half another
            where = [(at + 0.5) / edge for at, edge in zip(found, as_shape((96, 128)), strict=True)]
            assert abs(where[0] - (top + scale / 2) / h) <= reach[0], (h, w)
            assert abs(where[1] - (left + scale / 2) / w) <= reach[1], (h, w)


@pytest.mark.parametrize("detector", ["quorum", "patchcore", "padim", "softpatch"])
def test_what_lies_outside_a_region_changes_no_score(detector: str) -> None:
    generator = np.random.default_rng(0)
    good = [(120 + generator.normal(0, 3, (64, 64, 3))).clip(0, 255).astype(np.uint8) for _ in range(12)]
    marked = good[0].copy()
    marked[50:56, 50:56] = 255
    cells = np.zeros((4, 4), np.bool_)
    cells[:2, :2] = True
    backbone = load_backbone("tiny", size=(64, 64), runtime="torch")
    made = make_detector(detector, layers=["stride4", "stride8"])
    train, _ = attach(ImageSet.from_arrays(good[2:]), backbone, made.layers)
    new, _ = attach(ImageSet.from_arrays([good[0], marked]), backbone, made.layers)
    made.fit(train.looked_at(Region(cells)))
    plain = made.predict(new.looked_at(Region(cells)))
    assert plain.scores[0] == plain.scores[1]
    everything = made.predict(new)
    assert everything.scores[1] > 1.5 * everything.scores[0], "it is seen without a region"
    assert plain.maps is not None
    assert plain.maps[1, 40:, 40:].max() <= plain.maps[1, :32, :32].max()
