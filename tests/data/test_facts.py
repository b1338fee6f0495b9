"""What is known of a picture: its size, how it was stored, how bright it is."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.data.decoding import decode, from_picture, to_pixels
from flawsift.data.facts import ImageFacts, facts_of


def facts(image: Image.Image, size: int = 128, **save: object) -> ImageFacts:
    """Of an image that comes from a file in memory."""
    file = io.BytesIO()
    image.save(file, **save)  # type: ignore[arg-type]
    decoded = decode(file.getvalue())
    return facts_of(decoded, to_pixels(decoded, size))


@pytest.mark.parametrize("size", [8, 64, 100, 256])
def test_size_brightness_and_contrast(size: int) -> None:
    values = np.full((40, 80), 50, np.uint8)
    values[:, 40:] = 150
    known = facts(Image.fromarray(values), size, format="PNG")
    assert (known.width, known.height) == (80, 40)
    assert known.brightness == pytest.approx(100, abs=3)  # the edge between the halves is blurred
    assert known.contrast == pytest.approx(100, abs=3)
    constant = facts(Image.new("RGB", (9, 9), (30, 60, 90)), size, format="PNG")
    assert (constant.brightness, constant.contrast) == (60, 0)


def test_a_defect_hardly_moves_the_contrast() -> None:
    values = np.random.default_rng(0).normal(120, 10, (64, 64)).clip(0, 255).astype(np.uint8)
    broken = values.copy()
    broken[:13, :13] = 0  # 4 % of the picture
    plain, defective = (facts(Image.fromarray(v), 64, format="PNG").contrast for v in (values, broken))
    assert plain == pytest.approx(13.5, abs=1.5)  # the quartiles of a normal law are 1.35 deviations apart
    assert abs(plain - defective) <= 1


@pytest.mark.parametrize(
    ("mode", "kind", "encoding"),
    [
        ("L", "PNG", "PNG grey"),
        ("RGB", "PNG", "PNG colour"),
        ("RGBA", "PNG", "PNG colour with opacity"),
        ("P", "PNG", "PNG palette"),
        ("I;16", "PNG", "PNG 16-bit grey"),
        ("L", "JPEG", "JPEG grey"),
        ("RGB", "JPEG", "JPEG colour"),
        ("CMYK", "JPEG", "JPEG CMYK"),
        ("1", "TIFF", "TIFF black and white"),
    ],
)
def test_how_it_was_stored(mode: str, kind: str, encoding: str, tmp_path: Path) -> None:
    picture = Image.new(mode, (8, 8))
    assert facts(picture, format=kind).encoding == encoding
    picture.save(tmp_path / "picture", kind)
    with Image.open(tmp_path / "picture") as opened:  # a PIL image that a user has opened
        made = from_picture(opened)
    assert facts_of(made, to_pixels(made, 8)).encoding == encoding
    made = from_picture(picture)
    assert facts_of(made, to_pixels(made, 8)).encoding == "", "it was never in a file"


def test_the_size_is_that_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    known = facts(Image.new("RGB", (20, 10)), format="JPEG", exif=exif)
    assert (known.width, known.height, known.encoding) == (10, 20, "JPEG colour")
