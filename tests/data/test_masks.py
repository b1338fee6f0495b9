"""Masks are read as images are, and one that is bad or missing is told and hides nothing of the others."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.data.mask_checks import usable_masks
from flawsift.data.masks import read_mask
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError
from flawsift.metrics.ranking import evaluate

Mask = npt.NDArray[np.bool_]
SHAPE = (12, 20)


def spot(row: int = 3, column: int = 8) -> Mask:
    mask = np.zeros(SHAPE, bool)
    mask[row : row + 3, column : column + 5] = True
    return mask


def write(path: Path, array: npt.NDArray[Any], mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def rgba(colours: Sequence[int], others: Sequence[int], opacity: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Colours of defect and other pixels, and their opacity."""
    mask = spot()[..., None]
    colour = np.where(mask, np.array(colours), np.array(others))
    return np.dstack([colour, np.where(mask[..., 0], *opacity)]).astype(np.uint8)


ARRAYS: dict[str, npt.NDArray[Any]] = {
    "0 and 255": spot() * np.uint8(255),
    "0 and 1": spot() * np.uint8(1),
    "numbers of kinds": np.where(spot(), np.where(np.arange(20) < 10, 1, 7), 0).astype(np.uint8),
    "16 bits": spot() * np.uint16(3),
    "floats": spot() * np.float32(0.5),
    "background 1": np.where(spot(), 255, 1).astype(np.uint8),
    "one bit": spot(),
    "red": np.dstack([spot() * np.uint8(255), *[np.zeros(SHAPE, np.uint8)] * 2]),
    "opaque everywhere": rgba([255] * 3, [0] * 3, [255, 255]),
    "unused opacity": rgba([255] * 3, [0] * 3, [0, 0]),
    "opacity alone, black": rgba([0] * 3, [0] * 3, [255, 0]),
    "opacity alone, white": rgba([255] * 3, [255] * 3, [90, 0]),
    "white under transparent": rgba([255, 0, 0], [255] * 3, [255, 0]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_whatever_a_mask_is_written_as(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"m.{'tiff' if kind == 'floats' else 'png'}", ARRAYS[kind])
    np.testing.assert_array_equal(read_mask([path]), spot())


def test_masks_in_lossy_files_and_palettes(tmp_path: Path) -> None:
    big = np.kron(spot(), np.ones((8, 8), bool))
    found = read_mask([write(tmp_path / "m.jpg", big * np.uint8(255), quality=60)])
    assert (found != big).mean() < 0.01
    palette = Image.fromarray(spot() * np.uint8(1)).convert("P")
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask([tmp_path / "p.png"]), spot())
    np.testing.assert_array_equal(read_mask([write(tmp_path / "c.tif", spot() * np.uint8(255), "CMYK")]), spot())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_an_image_is(orientation: int, tmp_path: Path) -> None:
    array = spot() * np.uint8(255)
    path = write(tmp_path / "m.png", array, exif=exif(orientation))
    upright = np.asarray(as_images(path).image(0))[..., 0] > 0
    np.testing.assert_array_equal(read_mask([path]), upright)
    np.testing.assert_array_equal(read_mask([write(tmp_path / "n.png", array)], orientation), upright)


def test_several_masks_of_one_image_add_up(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.png", mask) for i, mask in enumerate((spot(), spot(8, 2)))]
    np.testing.assert_array_equal(read_mask(files), spot() | spot(8, 2))
    truth = GroundTruth(np.array([4]), np.array([1], np.int8), ("x",), {4: files})
    found = truth.mask(4, SHAPE)
    assert found is not None
    np.testing.assert_array_equal(found, spot() | spot(8, 2))
    files.append(write(tmp_path / "other.png", spot().T))
    with pytest.raises(InputError, match=r"different sizes: 0.png 20 x 12, 1.png 20 x 12, other.png 12 x 20"):
        read_mask(files)


def test_a_page_of_masks(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "m.tif") as writer:
        for mask in (spot(), spot(8, 2)):
            writer.write(mask * np.uint8(255), photometric="minisblack")
    np.testing.assert_array_equal(read_mask([tmp_path / "m.tif#page=2"]), spot(8, 2))


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_mask_that_cannot_be_read_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(data)
    with pytest.raises(InputError, match=r"The mask .*m.png cannot be read"):
        read_mask([tmp_path / "m.png"])


# ---- against their images --------------------------------------------------------------------------------------------


def pictures(folder: Path, n: int = 4, **options: Any) -> ImageSet:
    (folder / "images").mkdir()
    for i in range(n):
        grey = np.random.default_rng(i).integers(0, 256, SHAPE, dtype=np.uint8)
        write(folder / "images" / f"{i}.png", grey, **options)
    return as_images(folder / "images")


def truth_of(masks: dict[int, Any], n: int = 4) -> GroundTruth:
    labels = np.array([0] + [1] * (n - 1), np.int8)
    return GroundTruth(np.arange(n), labels, tuple("good" if not one else "x" for one in labels), masks)


BAD: dict[str, tuple[npt.NDArray[Any] | None, str]] = {
    "missing": (None, r"2.png \(no mask\)"),
    "blank": (np.zeros(SHAPE, np.uint8), r"2.png \(its mask .*bad.png is blank\)"),
    "transposed": (spot().T, r"bad.png is 12 x 20, the image 20 x 12"),
    "cropped": (spot()[:, :12], r"bad.png is 12 x 12, the image 20 x 12"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_mask_is_named_and_hides_nothing(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, (array, text) = pictures(tmp_path), BAD[kind]
    good = {i: write(tmp_path / f"m{i}.png", spot()) for i in (1, 3)}
    truth = truth_of(good if array is None else good | {2: write(tmp_path / "bad.png", array)})
    usable = usable_masks(truth, images)
    assert sorted(usable.masks) == [1, 3]
    assert "1 of 3 defective images are left out of the pixel metrics" in caplog.text
    assert re.search(text, caplog.text)
    maps = [np.random.default_rng(i).random(SHAPE) + spot() for i in range(4)]
    result = evaluate(usable.ids, [0.0, 1, 2, 3], usable, maps)
    without = [0, 1, 3]
    expected = evaluate(without, [0.0, 1, 3], truth_of(good).select(without), [maps[i] for i in without])
    assert result["n_without_mask"] == 1
    assert expected["n_without_mask"] == 0
    for key in ("aupro", "pixel_auroc", "pixel_ap", "pixel_f1_max"):
        assert result[key] == expected[key] is not None


def test_a_damaged_mask_and_sizes_that_differ_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    several = [write(tmp_path / "a.png", spot()), write(tmp_path / "b.png", spot()[:5])]
    usable = usable_masks(truth_of({1: spot(), 2: tmp_path / "bad.png", 3: several}), images)
    assert sorted(usable.masks) == [1]
    assert "bad.png cannot be read" in caplog.text
    assert "have different sizes" in caplog.text


@pytest.mark.parametrize("array", [~spot(), np.ones(SHAPE, bool)])
def test_a_mask_that_covers_most_is_used_and_told(
    array: Mask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pictures(tmp_path)
    truth = truth_of({1: spot(), 2: write(tmp_path / "big.png", array * np.uint8(255)), 3: spot()})
    assert sorted(usable_masks(truth, images).masks) == [1, 2, 3]
    assert "1 masks cover most of their image; are they inverted? its mask" in caplog.text
    assert "big.png (" in caplog.text


def test_a_mask_without_black_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path)
    usable = usable_masks(
        truth_of({1: write(tmp_path / "grey.png", ARRAYS["background 1"]), 2: spot(), 3: spot()}), images
    )
    assert "1 masks have no black pixel; their smallest value is taken for the background: its mask" in caplog.text
    assert "grey.png" in caplog.text
    mask = usable.mask(1, SHAPE)
    assert mask is not None
    np.testing.assert_array_equal(mask, spot())


def test_masks_of_another_size_fit_and_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path)
    half, double = spot()[::2, ::2], np.kron(spot(), np.ones((3, 3), bool))
    truth = truth_of({1: half, 2: double, 3: spot()[::5, ::5]})  # 4 x 3: rounding moves it by a third of a pixel
    assert sorted(usable_masks(truth, images).masks) == [1, 2, 3]
    assert usable_masks(truth_of({}), images).masks == {}  # a set without masks is no mistake
    assert not caplog.text


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_a_mask_of_stored_pixels_is_turned_with_its_image(
    orientation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pictures(tmp_path, exif=exif(orientation))
    files = {i: write(tmp_path / f"m{i}.png", spot() * np.uint8(255)) for i in (1, 2, 3)}
    usable = usable_masks(truth_of(files), images)
    width, height = images.source.size(1)
    mask = usable.mask(1, (height, width))
    assert mask is not None
    if orientation >= 5:
        expected = read_mask([files[1]], orientation)
        assert not caplog.text
    else:  # it would fit either way
        expected = spot()
        assert "3 images are turned by EXIF, and their masks would fit either way: 1.png, 2.png, 3.png" in caplog.text
    np.testing.assert_array_equal(mask, expected)


def test_a_mask_of_the_upright_image_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path, exif=exif(6))
    files = {i: write(tmp_path / f"m{i}.png", np.rot90(spot(), -1) * np.uint8(255)) for i in (1, 2, 3)}
    mask = usable_masks(truth_of(files), images).mask(2, (20, 12))
    assert mask is not None
    np.testing.assert_array_equal(mask, np.rot90(spot(), -1))
    assert not caplog.text


def test_masks_that_fit_either_way_follow_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path, exif=exif(6))
    write(tmp_path / "images" / "3.png", np.random.default_rng(3).integers(0, 256, (12, 12), np.uint8), exif=exif(6))
    files = {
        i: write(tmp_path / f"m{i}.png", (spot()[:, :12] if i == 3 else spot()) * np.uint8(255)) for i in (1, 2, 3)
    }
    usable = usable_masks(truth_of(files), images)
    assert usable.turned == {1: 6, 2: 6, 3: 6}
    assert replace(usable, turned={}).mask(3, (12, 12)) is not None
    assert not caplog.text
