"""What users have becomes one `ImageSet`, with the pixels that a file would give, or one line that says why not."""

import os
import pickle
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from flawsift.data.decoding import NotAnImage, UnreadableImage
from flawsift.data.images import FileSource, ImageSet
from flawsift.data.inputs import Images, OneImage, as_images, in_pieces, is_stream
from flawsift.errors import InputError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.files import content_digest

Array = npt.NDArray[Any]


def picture(seed: int, height: int = 6, width: int = 9) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def rgb(images: ImageSet) -> list[Array]:
    return [np.asarray(images.image(int(i))) for i in images.ids]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """parts/a.png, parts/b.png, parts/deep/c.png and a text, with pictures 0, 1 and 2."""
    for seed, name in enumerate(("a.png", "b.png", "deep/c.png")):
        save(tmp_path / "parts" / name, picture(seed))
    (tmp_path / "parts" / "notes.txt").write_text("no image")
    return tmp_path / "parts"


# ---- the same pictures, however they are given -----------------------------------------------------------------------


GIVEN: dict[str, tuple[Callable[[Path], Images], list[str]]] = {
    "folder": (lambda p: p, ["a.png", "b.png", "deep/c.png"]),
    "folder as text": (lambda p: str(p), ["a.png", "b.png", "deep/c.png"]),
    "pattern": (lambda p: f"{p}/**/*.png", ["a.png", "b.png", "deep/c.png"]),
    "paths": (lambda p: [p / "a.png", str(p / "b.png"), p / "deep" / "c.png"], ["a.png", "b.png", "deep/c.png"]),
    "iterator": (lambda p: iter(sorted(p.rglob("*.png"))), ["a.png", "b.png", "deep/c.png"]),
    "arrays": (lambda p: [picture(i) for i in range(3)], ["array-0", "array-1", "array-2"]),
    "PIL": (lambda p: [Image.fromarray(picture(i)) for i in range(3)], ["image-0", "image-1", "image-2"]),
    "opened": (lambda p: (Image.open(f) for f in sorted(p.rglob("*.png"))), ["image-0", "image-1", "image-2"]),
    "mixture": (
        lambda p: [p / "a.png", picture(1), Image.fromarray(picture(2))],
        ["a.png", "array-1", "image-2"],
    ),
    "set": (ImageSet.from_folder, ["a.png", "b.png", "deep/c.png"]),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of "opened": PIL images that nobody closes
@pytest.mark.parametrize("kind", GIVEN)
def test_three_pictures_however_they_are_given(kind: str, parts: Path) -> None:
    make, names = GIVEN[kind]
    images = as_images(make(parts))
    assert images.names == names
    assert images.ids.tolist() == [0, 1, 2]
    for seed, array in enumerate(rgb(images)):
        np.testing.assert_array_equal(array, picture(seed))
    again = pickle.loads(pickle.dumps(images))  # sub-models are trained in other processes
    assert torch.equal(again.pixels(4), images.pixels(4))
    assert [images.source.digest(i) for i in range(3)] == [again.source.digest(i) for i in range(3)]


@pytest.mark.parametrize("give", [Path, str, Image.open, lambda p: np.asarray(Image.open(p))])
def test_one_image_alone(give: Callable[[Path], Any], parts: Path) -> None:
    images = as_images(give(parts / "b.png"))
    assert len(images) == 1
    np.testing.assert_array_equal(rgb(images)[0], picture(1))


def test_a_list_keeps_its_order_and_a_pattern_is_sorted(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_images([parts / "deep" / "c.png", parts / "a.png"]).names == ["deep/c.png", "a.png"]
    monkeypatch.setattr("glob.glob", lambda *_, **__: [str(parts / "b.png"), str(parts / "a.png"), str(parts)])
    assert as_images(f"{parts}/*").names == ["a.png", "b.png"]


def test_names_are_relative_to_what_files_share(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save(tmp_path / "other" / "a.png", picture(9))
    images = as_images([other, parts / "a.png"])
    assert images.names == ["other/a.png", "parts/a.png"]
    assert isinstance(images.source, FileSource)  # what saves and exports a screening asks for its folder
    assert images.source.root == tmp_path
    monkeypatch.chdir(parts)
    assert as_images(["../other/a.png", "a.png"]).names == ["other/a.png", "parts/a.png"]

    def two_drives(_: object) -> str:
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr("os.path.commonpath", two_drives)
    images = as_images([other, parts / "a.png"])
    assert images.names == [other.as_posix(), (parts / "a.png").as_posix()]
    np.testing.assert_array_equal(rgb(images)[0], picture(9))


def test_a_file_or_folder_comes_before_the_pattern_of_that_name(tmp_path: Path) -> None:
    save(tmp_path / "set[1]" / "x.png", picture(0))
    save(tmp_path / "set1" / "y.png", picture(1))
    save(tmp_path / "p[1].png", picture(2))
    assert as_images(str(tmp_path / "set[1]")).names == ["x.png"]
    assert as_images(str(tmp_path / "p[1].png")).names == ["p[1].png"]
    assert as_images(str(tmp_path / "set[1]" / "*.png")).names == ["y.png"]


def test_a_file_of_any_ending_is_taken_when_it_is_named(parts: Path) -> None:
    (parts / "a.png").rename(parts / "a.dat")
    np.testing.assert_array_equal(rgb(as_images(parts / "a.dat"))[0], picture(0))
    assert "a.dat" not in as_images(parts).names
    with pytest.raises(UnreadableImage, match="not an image"):
        as_images(str(parts / "*.txt")).image(0)


def test_groups_by_name(parts: Path) -> None:
    images = as_images(parts, groups={"a.png": "left", "deep/c.png": "left", "gone.png": "right"})
    assert images.groups == {0: "left", 2: "left"}
    assert as_images(images).groups == images.groups
    assert as_images(images, groups={"b.png": "x"}).groups == {1: "x"}
    assert as_images([picture(0), picture(1)], groups={"array-1": "x"}).groups == {1: "x"}


def test_nothing_is_copied() -> None:
    array = picture(0)
    images = as_images([array])
    array[:] = 7
    assert (rgb(images)[0] == 7).all()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (None, "Images cannot be of type NoneType"),
        (3, "of type int. Give a folder, a pattern"),
        (b"parts", "of type bytes"),
        ({"a": 1}, "of type dict"),
        ([picture(0), None], "Image 1 is of type NoneType. Give a path"),
        ([picture(0), [picture(1)]], "Image 1 is of type list"),
        ([picture(0), torch.zeros(3, 4, 4)], "Image 1 is of type Tensor"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"This is an array of shape \(2, 4, 4, 3\)"),
        ([picture(0), np.zeros((4, 4, 2), np.uint8)], r"Image 1 is an array of shape \(4, 4, 2\) and type uint8"),
        ([np.zeros(5, np.uint8)], r"Image 0 is an array of shape \(5,\)"),
        ([np.zeros((0, 5), np.uint8)], r"Image 0 is an array of shape \(0, 5\)"),
        ([np.zeros((4, 4), complex)], "type complex128. Give an array"),
        ([np.full((4, 4), None)], "type object"),
        ([picture(0), np.ma.masked_less(picture(1), 9)], r"Image 1 is a masked array, .* Fill it first: array.filled"),
    ],
)
def test_what_is_no_image_is_told_with_its_place(bad: Any, text: str) -> None:
    with pytest.raises(NotAnImage, match=text) as caught:
        as_images(bad)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    if isinstance(bad, list):
        with pytest.raises(NotAnImage, match=text):
            list(in_pieces(iter(bad), 8))


def test_arrays_of_a_set_are_checked_at_once() -> None:
    with pytest.raises(NotAnImage, match=r"Image 2 is an array of shape \(3, 4, 5\)"):
        ImageSet.from_arrays([picture(0), picture(1), np.zeros((3, 4, 5), np.uint8)], ids=[7, 8, 9])
    with pytest.raises(NotAnImage, match="Image 1 is a masked array"):
        ImageSet.from_arrays([picture(0), np.ma.masked_less(picture(1), 9)])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: [], "list of images is empty"),
        (lambda p: iter([]), "list of images is empty"),
        (lambda p: p / "none", "none' does not exist. Give a folder"),
        (lambda p: f"{p}/*.bmp", r"No file matches '.*\*.bmp'"),
        (lambda p: [p / "a.png", p / "deep"], "1 folders are in a list of images: .*deep"),
        (lambda p: [p / "a.png", *(p / f"{i}.png" for i in range(7))], "7 of 8 images do not exist: .* and 2 more"),
        (lambda p: [f"{p}/*.png"], r"1 of 1 images do not exist: .*\*.png. .* Give a pattern alone, not in a list"),
        (lambda p: [p / "a.png", p / "b.png", p / "deep" / ".." / "a.png"], "1 files come more than once: .*a.png"),
    ],
)
def test_files_that_cannot_be_used_are_told(make: Callable[[Path], Images], text: str, parts: Path) -> None:
    with pytest.raises(InputError, match=text):
        as_images(make(parts))


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 4095.0), (-255.0, 255.0), (-30.0, 200.0), (0.0, 1e9)])
@pytest.mark.parametrize("shape", [(2, 1), (2, 1, 1), (2, 1, 3)])
def test_floats_of_another_scale_are_unreadable(
    values: tuple[float, float], shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.broadcast_to(np.array(values, np.float32).reshape(2, *[1] * (len(shape) - 1)), shape)
    given = [as_images([array])]
    if shape[2:] != (3,):
        Image.fromarray(array.reshape(2, 1)).save(tmp_path / "x.tiff")
        given += [as_images(tmp_path), as_images(Image.open(tmp_path / "x.tiff"))]
    for images in given:
        with pytest.raises(UnreadableImage, match=r"floats from .* to .*; scale them to 0 to 1, or 0 to 255"):
            images.image(0)


def test_floats_that_overshoot_a_little_keep_their_scale() -> None:
    array = np.array([[-0.04, 0.5, 1.0, 1.0000001, 1.06]])
    assert rgb(as_images(array))[0][0, :, 0].tolist() == [0, 128, 255, 255, 255]
    assert rgb(as_images(array * 255))[0][0, :, 0].tolist() == [0, 128, 255, 255, 255]


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_a_picture_without_pixels_is_unreadable(size: tuple[int, int], tiny: Backbone) -> None:
    images = as_images([picture(0), Image.new("RGB", size), picture(1)])
    data, failed = attach(images, tiny, ("stride8",))
    assert data.ids.tolist() == [0, 2]
    assert failed == {1: f"no pixels ({size[0]} x {size[1]})"}


def test_a_broken_link_is_unreadable_however_it_is_given(tiny: Backbone, parts: Path) -> None:
    (parts / "z.png").symlink_to(parts / "gone.png")
    (parts / "zz.png").symlink_to(parts / "zz.png")  # to itself
    for form in (parts, f"{parts}/**/*.png", sorted(parts.rglob("*.png")), parts / "z.png"):
        images = as_images(form)
        last = images.names.index("z.png")
        with pytest.raises(UnreadableImage, match="^a link to a file that is not there$"):
            images.image(last)
        if len(images) > 1:
            assert attach(images, tiny, ("stride8",))[1] == dict.fromkeys(
                [last, images.names.index("zz.png")], "a link to a file that is not there"
            )
    (piece,) = in_pieces(iter([parts / "z.png"]), 8)
    with pytest.raises(UnreadableImage, match="a link to a file that is not there"):
        piece.image(0)


def test_a_link_to_a_folder_is_that_folder(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(picture(7)).save(tmp_path / "elsewhere" / "x.png")
    (parts / "more.png").symlink_to(tmp_path / "elsewhere")  # whatever its name looks like
    (parts / "loop").symlink_to(parts)
    names = as_images(parts).names
    assert "more.png/x.png" in names
    assert len(names) == 4, "the loop adds nothing"
    assert as_images(f"{parts}/*.png").names == ["a.png", "b.png"]
    with pytest.raises(InputError, match="1 folders are in a list of images: .*more.png"):
        as_images([parts / "a.png", parts / "more.png"])


# ---- one code path with files, bit for bit ---------------------------------------------------------------------------


def via_file(array: Array, path: Path) -> Array:
    Image.fromarray(array).save(path)
    return rgb(as_images(path))[0]


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))


def with_channels(dtype: Any, channels: tuple[int, ...], **options: Any) -> st.SearchStrategy[Array]:
    extra = st.sampled_from([(), *((c,) for c in channels)])
    shapes = st.tuples(SHAPES, extra).map(lambda both: both[0] + both[1])
    return shapes.flatmap(lambda shape: hnp.arrays(dtype, shape, **options))


FLOATS = st.floats(-0.0625, 1.0, width=32) | st.floats(-0.0625, 280, width=32)
FAST = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@FAST
@given(array=with_channels(np.uint8, (1, 3, 4)), kind=st.sampled_from(["png", "tiff"]))
def test_eight_bits(array: Array, kind: str, tmp_path: Path) -> None:
    flat = array[..., 0] if array.shape[2:] == (1,) else array
    np.testing.assert_array_equal(rgb(as_images(array))[0], via_file(flat, tmp_path / f"x.{kind}"))


@FAST
@given(
    array=with_channels(np.uint16, (1,)), kind=st.sampled_from(["png", "tiff"]), order=st.sampled_from(["<u2", ">u2"])
)
def test_sixteen_bits(array: Array, kind: str, order: str, tmp_path: Path) -> None:
    flat = array[..., 0] if array.ndim == 3 else array
    np.testing.assert_array_equal(rgb(as_images(array.astype(order)))[0], via_file(flat, tmp_path / f"x.{kind}"))


def png_of(array: npt.NDArray[np.uint16]) -> bytes:
    """16-bit colour as PNG, which Pillow reads and cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@FAST
@given(array=st.sampled_from([3, 4]).flatmap(lambda c: SHAPES.flatmap(lambda s: hnp.arrays(np.uint16, (*s, c)))))
def test_sixteen_bits_of_colour(array: npt.NDArray[np.uint16], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_of(array))
    np.testing.assert_array_equal(rgb(as_images(array))[0], rgb(as_images(tmp_path / "x.png"))[0])


@FAST
@given(array=with_channels(np.float32, (1,), elements=FLOATS), dtype=st.sampled_from(["f4", ">f4", "f8"]))
def test_floats(array: Array, dtype: str, tmp_path: Path) -> None:
    flat = array[..., 0] if array.ndim == 3 else array
    np.testing.assert_array_equal(rgb(as_images(array.astype(dtype)))[0], via_file(flat, tmp_path / "x.tiff"))


@FAST
@given(array=SHAPES.flatmap(lambda s: hnp.arrays(np.float32, (*s, 3), elements=FLOATS)))
def test_float_colours_have_one_white(array: Array, tmp_path: Path) -> None:
    white = 1 if array.max() <= 1.1 else 255
    expected = np.clip(np.rint(array.astype(np.float64) / white * 255), 0, 255)
    np.testing.assert_array_equal(rgb(as_images(array))[0], expected)


def test_float_transparency_is_laid_on_black(tmp_path: Path) -> None:
    eight = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    expected = via_file(eight, tmp_path / "x.png")
    for array in (eight, eight / 255, eight.astype(np.float32), eight.astype(np.uint16) * 257):
        np.testing.assert_array_equal(rgb(as_images(array))[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3)])
def test_nan_is_an_error_of_that_image(value: float, shape: tuple[int, ...], tiny: Backbone, tmp_path: Path) -> None:
    bad = np.zeros(shape)
    bad.flat[3] = value
    images = as_images([picture(0), bad, picture(1), np.full((4, 4), 1e300)])
    for store in (None, FeatureStore(tmp_path)):
        data, failed = attach(images, tiny, ("stride8",), store=store)
        assert data.ids.tolist() == [0, 2]
        assert failed == {1: "nan or infinite values", 3: "nan or infinite values"}
    Image.fromarray(bad[..., 0].astype(np.float32) if bad.ndim == 3 else bad.astype(np.float32)).save(
        tmp_path / "n.tif"
    )
    if shape != (4, 4, 3):
        with pytest.raises(UnreadableImage, match="nan or infinite values"):
            as_images(tmp_path / "n.tif").image(0)


LOSSLESS = {"1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "png", "RGBA": "png", "CMYK": "tiff", "F": "tiff"}
LOSSLESS |= {"I": "tiff", "I;16": "png", "YCbCr": "tiff", "LAB": "tiff"}


@pytest.mark.parametrize("mode", LOSSLESS)
def test_pictures_of_any_mode(mode: str, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (6, 7))
    made = {
        "I": lambda: Image.fromarray(grey.astype(np.int32)),
        "I;16": lambda: Image.fromarray(grey.astype(np.uint16)),
        "F": lambda: Image.fromarray((grey / 65535).astype(np.float32)),
        "LAB": lambda: Image.merge("LAB", Image.fromarray(picture(0)).split()),
    }.get(mode, lambda: Image.fromarray(picture(0)).convert(mode))()
    assert made.mode == mode
    path = tmp_path / f"x.{LOSSLESS[mode]}"
    made.save(path)
    try:
        expected = rgb(as_images(path))[0]
    except UnreadableImage as error:  # Pillow makes no colours of LAB: as a file, so in memory
        with pytest.raises(UnreadableImage, match=str(error)[:30]):
            as_images(made).image(0)
        return
    np.testing.assert_array_equal(rgb(as_images(made))[0], expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(rgb(as_images(opened))[0], expected)
        assert as_images(opened).source.digest(0) == as_images(expected).source.digest(0)


def test_rotation_and_transparency_of_a_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(rgb(as_images(opened))[0], np.rot90(picture(0), -1))
        assert opened.size == (9, 6), "the user's picture is left as it is"
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert rgb(as_images(palette))[0].tolist() == [[[0, 0, 0], [200, 100, 50]]]


def test_a_picture_that_cannot_be_read_is_an_error_of_that_image(parts: Path, tiny: Backbone) -> None:
    (parts / "cut.png").write_bytes(save(parts / "large.png", picture(5, 80, 80)).read_bytes()[:300])
    with Image.open(parts / "cut.png") as cut:
        data, failed = attach(as_images([picture(0), cut]), tiny, ("stride8",))
    assert data.ids.tolist() == [0]
    assert "damaged or truncated" in failed[1]


def test_one_picture_twice_in_a_list(tmp_path: Path, tiny: Backbone) -> None:
    save(tmp_path / "x.png", picture(0, 1500, 1500))  # so large that threads meet while it is read
    with Image.open(tmp_path / "x.png") as lazy:
        data, failed = attach(as_images([lazy] * 16), tiny, ("stride8",))
    assert not failed
    assert len(data) == 16


# ---- features are cached by content ----------------------------------------------------------------------------------


def test_the_digest_of_an_array_is_that_of_its_npy_file(tmp_path: Path) -> None:
    grey, colour = picture(0)[..., 0], picture(0)
    for array in (grey, colour, np.asfortranarray(colour), colour[::2, ::-1]):
        np.save(tmp_path / "x.npy", array)  # the cache keys of version 0.1
        assert as_images([array]).source.digest(0) == content_digest((tmp_path / "x.npy").read_bytes())


def test_equal_pixels_share_features(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opaque = np.dstack([picture(0), np.full(picture(0).shape[:2], 255, np.uint8)])
    same: list[OneImage] = [picture(0), opaque, Image.fromarray(picture(0)), picture(0) / 255]
    images = as_images([*same, opaque // 2])
    assert len({images.source.digest(i) for i in range(4)}) == 1
    assert images.source.digest(4) != images.source.digest(0), "half of it lies on black"
    seen: list[int] = []
    original = tiny.extract

    def extract(pixels: torch.Tensor, layers: Any) -> dict[str, torch.Tensor]:
        seen.append(len(pixels))
        return original(pixels, layers)

    monkeypatch.setattr(tiny, "extract", extract)
    attach(images, tiny, ("stride8",), store=FeatureStore(tmp_path))
    assert sum(seen) == 2


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_what_is_a_stream() -> None:
    assert is_stream(iter([picture(0)]))
    assert is_stream(picture(i) for i in range(3))
    for images in ([picture(0)], (), picture(0), "parts/*.png", Path("x"), ImageSet.from_arrays([picture(0)])):
        assert not is_stream(images)
    assert not is_stream(Image.fromarray(picture(0)))


@pytest.mark.parametrize("size", [1, 4, 10, 50])
def test_pieces_are_the_whole(size: int) -> None:
    arrays = [picture(i) for i in range(10)]
    for images in (arrays, iter(arrays), ImageSet.from_arrays(arrays, ids=range(10))):
        pieces = list(in_pieces(images, size))
        assert [len(p) for p in pieces] == [min(size, 10 - s) for s in range(0, 10, size)]
        assert [i for p in pieces for i in p.ids.tolist()] == list(range(10))
        assert [n for p in pieces for n in p.names] == [f"array-{i}" for i in range(10)]
        for seed, array in enumerate(a for p in pieces for a in rgb(p)):
            np.testing.assert_array_equal(array, picture(seed))


def test_a_stream_is_read_as_it_is_asked_for_and_nothing_is_held() -> None:
    alive: list[weakref.ref[Array]] = []

    def camera() -> Iterator[Array]:
        for i in range(20):
            array = picture(i)
            alive.append(weakref.ref(array))
            yield array
            del array

    pieces = in_pieces(camera(), 4)
    for n in range(1, 6):
        piece = next(pieces)
        assert len(alive) == 4 * n
        assert sum(ref() is not None for ref in alive) <= 5
        assert piece.ids.tolist() == list(range(4 * n - 4, 4 * n))


def test_paths_of_a_stream(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parts)
    outside = save(tmp_path / "other.png", picture(7))
    given: list[OneImage] = ["a.png", picture(1), parts / "deep" / "c.png", outside, "gone.png", "a.png"]
    (piece,) = in_pieces(iter(given), 8)
    assert piece.names == ["a.png", "array-1", "deep/c.png", str(outside)[1:], "gone.png", "a.png"]
    assert not any(os.path.isabs(name) for name in piece.names)
    np.testing.assert_array_equal(rgb(piece.select([3]))[0], picture(7))
    with pytest.raises(UnreadableImage, match="cannot be read: No such file"):
        piece.image(4)


def test_an_exhausted_iterator_is_told(parts: Path) -> None:
    paths = parts.rglob("*.png")
    assert len(list(in_pieces(paths, 8))) == 1
    with pytest.raises(InputError, match="The iterator gave no image. Was it read to its end"):
        list(in_pieces(paths, 8))


# ---- what a set looks like -------------------------------------------------------------------------------------------


def test_the_text_of_a_set(parts: Path, tiny: Backbone) -> None:
    images = as_images(parts, groups={"a.png": "x", "b.png": "x"})
    assert repr(images) == f"ImageSet of 3 images below '{parts}': a.png, b.png, deep/c.png\nwith 2 groups"
    data, _ = attach(as_images([picture(0)] * 9), tiny, ("stride8",))
    assert repr(data.view("rotate:5")) == (
        "ImageSet of 9 images: array-0, array-1, array-2, array-3, array-4 and 4 more\n"
        f"with features of {tiny.key}, derived view 'rotate:5'"
    )
    assert repr(images.select([])).startswith("ImageSet of 0 images")
