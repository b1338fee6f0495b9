"""Decoding, folders and ids: one test per row of docs/inputs.md."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flawsift.data.decoding import UnreadableImage, decode, to_pixels
from flawsift.data.folders import read_groups
from flawsift.data.images import ImageSet
from flawsift.errors import InputError
from flawsift.paths import show


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (encode(noise())[:300], "damaged or truncated"),
        (encode(noise(200, 200), "JPEG")[:900], "damaged or truncated"),
    ],
)
def test_undecodable_content_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_content_decides_not_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(noise()))
    np.testing.assert_array_equal(np.asarray(ImageSet.from_folder(tmp_path).image(0)), np.asarray(noise()))


def test_sixteen_bit_is_divided_by_one_constant() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert np.asarray(decode(encode(Image.fromarray(deep))))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(decode(encode(Image.fromarray(deep), "TIFF")))[0, :, 2].tolist() == [0, 1, 128, 255]


def test_float_images() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    eight = Image.fromarray(np.array([[0.0, 128.0, 255.0]], np.float32))
    assert np.asarray(decode(encode(unit, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(decode(encode(eight, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pixels_become_black() -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    found = np.asarray(decode(encode(Image.fromarray(rgba))))[0]
    assert found[0].tolist() == [200, 100, 50]
    assert found[1].tolist() == [0, 0, 0]
    assert abs(int(found[2, 0]) - 100) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    found = np.asarray(decode(encode(palette, transparency=0)))[0]
    assert found.tolist() == [[0, 0, 0], [200, 100, 50]]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    found = decode(encode(noise().convert(mode), kind))
    assert found.mode == "RGB"
    assert found.size == (30, 20)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to see it upright
    upright = np.asarray(decode(encode(noise(), exif=exif)))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(noise()), -1))


def test_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 20000), (20000, 2)])
def test_extreme_shapes_give_pixels(shape: tuple[int, int]) -> None:
    picture = decode(encode(Image.new("RGB", shape[::-1], (7, 8, 9))))
    pixels = to_pixels(picture, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 3, 3].tolist() == [7, 8, 9]


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(UnreadableImage, match="more than 2 megapixels"):
        decode(encode(Image.new("L", (2000, 2000))))
    assert decode(encode(Image.new("L", (1200, 1000)))).size == (1200, 1000)  # over the warning limit only: no noise


def test_folders_are_searched_and_sorted(tmp_path: Path) -> None:
    for name in ("b/x.png", "a/x.png", "c.PNG", "a/.hidden.png", ".git/y.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise()))
    images = ImageSet.from_folder(tmp_path)
    assert images.names == ["a/x.png", "b/x.png", "c.PNG"]
    assert images.ids.tolist() == [0, 1, 2]


def test_link_loops_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(noise()))
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = ImageSet.from_folder(tmp_path)
    assert images.names == ["gone.png", "in/a.png"]
    with pytest.raises(UnreadableImage, match="a link to a file that is not there"):
        images.image(0)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(encode(noise()))
    images = ImageSet.from_folder(tmp_path)
    assert images.image(0).size == (30, 20)
    assert show(images.names[0]) == "caf\\udce9.png"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: p / "none", "does not exist"),
        (lambda p: p / "file.png", "is not a folder"),
        (lambda p: p / "empty", "No images in"),
    ],
)
def test_unusable_folders_are_told(tmp_path: Path, make: object, text: str) -> None:
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    assert callable(make)
    with pytest.raises(InputError, match=text):
        ImageSet.from_folder(make(tmp_path))


def test_selection_speaks_global_ids() -> None:
    arrays = [np.full((2, 2), i, np.uint8) for i in range(4)]
    images = ImageSet.from_arrays(arrays, ids=[10, 20, 30, 40])
    part = images.select([40, 20])
    assert part.ids.tolist() == [40, 20]
    assert torch.equal(part.pixels(2)[:, 0, 0, 0], torch.tensor([3, 1], dtype=torch.uint8))
    assert part.select([20]).names == ["array-20"]
    with pytest.raises(InputError, match=r"1 ids are not in this set: \[10\]"):
        part.select([10])
    with pytest.raises(InputError, match="distinct"):
        images.select([10, 10])
    with pytest.raises(InputError, match="no features"):
        next(images.batches(["x"]))


def test_groups_come_from_a_table(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("file,group\na.png,7\nb.png,7\nc.png,\n")
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encode(noise()))
    images = ImageSet.from_folder(tmp_path, groups=read_groups(tmp_path / "groups.csv"))
    names = images.group_names
    assert names[0] == names[1] == "7"
    assert names[2] not in names[:2]
    (tmp_path / "bad.csv").write_text("name,set\na,b\n")
    with pytest.raises(InputError, match="needs the columns 'file' and 'group'"):
        read_groups(tmp_path / "bad.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_groups(tmp_path / "none.csv")
