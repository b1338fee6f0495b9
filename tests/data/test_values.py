"""Values of more than 8 bits: one range for a whole set, learned or given, whatever wrote them."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flawsift.data.checks import ready_to_train
from flawsift.data.decoding import UnreadableImage, decode, deep_of, size_of
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images, in_pieces
from flawsift.data.tiff import pages_of
from flawsift.data.values import MARGIN, Sample, ValueRange, learn_range
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone, fitting_size
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore

Array = npt.NDArray[Any]


def grey(seed: int = 0, height: int = 24, width: int = 32) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def colour(seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def tiff(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png16(array: Array) -> bytes:
    return bytes(imagecodecs.png_encode(array.astype(np.uint16)))


def learned(*arrays: Array) -> ValueRange:
    found = learn_range([Sample.of(array) for array in arrays])
    assert found is not None
    return found


# ---- the range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_camera_of_fewer_bits_fills_its_own_range(bits: int) -> None:
    top = 2**bits - 1
    values = np.linspace(0.03 * top, 0.97 * top, 5000).astype(np.uint16)
    assert learned(values) == ValueRange(0, top)
    assert learned(values.astype(np.float32)) == ValueRange(0, top)
    assert learned(values.astype(np.int32)) == ValueRange(0, top)


def test_a_narrow_range_is_learned_with_a_margin_and_round_ends() -> None:
    celsius = np.linspace(20.3, 79.6, 5000)
    found = learned(celsius)
    width = celsius[-1] - celsius[0]
    assert celsius[0] - 2 * MARGIN * width < found.low <= celsius[0] - MARGIN * width
    assert celsius[-1] + MARGIN * width <= found.high < celsius[-1] + 2 * MARGIN * width
    assert found == learned(np.append(celsius, 79.7))  # features stay valid when an image is added
    assert learned(np.linspace(-1, 1, 5000)).low < -1
    assert learned(np.linspace(1.0, 10.0, 5000)).low >= 0  # what has no negative values gets none


@pytest.mark.parametrize("sentinel", [-9999.0, -32768.0, 65535.0, 1e20, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [0.0005, 0.3])
def test_what_says_nothing_was_measured_is_left_out(sentinel: float, share: float) -> None:
    depth = np.random.default_rng(0).uniform(400, 900, 20000)
    holes = depth.copy()
    holes[: int(share * len(depth))] = sentinel
    assert learned(holes.reshape(100, 200)) == learned(depth.reshape(100, 200))


def test_dead_pixels_are_left_out_and_small_defects_are_not() -> None:
    rows = np.random.default_rng(0).integers(100, 900, (100, 200)).astype(np.uint16)
    dead = rows.copy()
    dead.flat[[4, 8, 12]] = 65535, 40000, 20000
    assert learned(dead) == learned(rows) == ValueRange(0, 1023)
    narrow = np.random.default_rng(0).uniform(300, 310, (100, 200))
    hot = narrow.copy()
    hot[3, 4] = 318  # within a width of the rest: it is not cut off
    assert learned(hot).high > 318


@pytest.mark.parametrize("values", [[0.0, 1.0], [0, 128, 255], [7], [0], [-5]])
def test_drawings_and_constants_have_a_range(values: list[float]) -> None:
    found = learned(np.array(values * 50))
    assert found.low <= min(values)
    assert found.high >= max(values)


def test_the_range_is_of_the_whole_set_and_not_of_an_image() -> None:
    dark, bright = np.full((8, 8), 100, np.uint16), np.full((8, 8), 900, np.uint16)
    images = ready_to_train(as_images([dark, bright, np.arange(1024, dtype=np.uint16).reshape(32, 32)]))
    assert images.value_range == ValueRange(0, 1023)
    levels = [int(np.asarray(images.image(i))[0, 0, 0]) for i in (0, 1)]
    assert levels == [25, 224]


@settings(max_examples=50, deadline=None)
@given(
    low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), dtype=st.sampled_from([np.float32, np.float64, np.float16])
)
def test_whatever_the_scale_no_order_is_lost(low: float, width: float, dtype: Any) -> None:
    values = np.linspace(low, low + width, 64)
    with np.errstate(over="ignore"):
        values = values.astype(dtype).astype(np.float64)
    if not np.isfinite(values).all() or len(np.unique(values)) < 64:
        return
    found = learned(values)
    greys = found.to_bytes(values).astype(int)
    assert (np.diff(greys) >= 0).all()
    assert len(np.unique(greys)) >= 32


def test_floats_and_whole_numbers_do_not_share_a_range() -> None:
    given_images = as_images([np.full((4, 4), 0.5), grey().astype(np.uint16)])
    with pytest.raises(InputError, match=r"1 images hold floats and 1 whole numbers .* --range LOW HIGH"):
        ready_to_train(given_images)
    given_images = as_images(given_images, value_range=(0, 255))
    assert ready_to_train(given_images).value_range == ValueRange(0, 255)


def test_a_range_that_nothing_reads_is_told() -> None:
    with pytest.raises(InputError, match="no image has more than 8 bits"):
        ready_to_train(as_images([grey()], value_range=(0, 1023)))
    assert ready_to_train(as_images([grey(), grey(1)])).value_range is None


@pytest.mark.parametrize("ends", [(1, 0), (1, 1), (0, np.inf), (np.nan, 1)])
def test_a_range_needs_two_numbers_in_order(ends: tuple[float, float]) -> None:
    with pytest.raises(ParameterError, match="two finite numbers, the lower first"):
        as_images([grey()], value_range=ends)


def test_a_damaged_range_is_told() -> None:
    for damaged in ([1], "x", [2, 1], {"a": 1}):
        with pytest.raises(InputError, match="is damaged"):
            ValueRange.from_json(damaged)
    assert ValueRange.from_json(ValueRange(0, 7).as_json()) == ValueRange(0, 7)


# ---- 8 bits stay as they are, and everything else follows one rule ---------------------------------------------------


def test_eight_bits_follow_no_range(tmp_path: Path) -> None:
    Image.fromarray(colour()).save(tmp_path / "a.png")
    Image.fromarray(grey()).save(tmp_path / "b.jpg")
    plain = as_images(tmp_path)
    ranged = plain.within(ValueRange(100, 120))
    for id_ in plain.ids.tolist():
        np.testing.assert_array_equal(np.asarray(plain.image(id_)), np.asarray(ranged.image(id_)))


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i2", "u4", "i4", "i8", "u8", "f2", "f4", ">f4", "f8"])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_arrays_of_any_numbers_follow_the_range(dtype: str, channels: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 1024, (5, 6, *channels)).astype(dtype)
    found = np.asarray(as_images(array, value_range=(0, 1023)).image(0))
    expected = np.rint(array.astype(np.float64) / 1023 * 255).astype(np.uint8).reshape(5, 6, -1)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (5, 6, 3)))


def test_bool_arrays_are_black_and_white() -> None:
    assert np.asarray(as_images(np.array([[True, False]])).image(0))[0].tolist() == [[255] * 3, [0] * 3]


def test_whole_numbers_without_a_range() -> None:
    assert np.asarray(as_images(np.array([[0, 128, 255]])).image(0))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(as_images(np.array([[0, 257, 65535]])).image(0))[0, :, 0].tolist() == [0, 1, 255]
    for bad in (np.array([[-1, 5]]), np.array([[0, 70000]])):
        with pytest.raises(UnreadableImage, match=r"whole numbers from .* no range was learned or given"):
            as_images(bad).image(0)


def test_pixels_that_were_not_measured_are_black_and_infinity_is_an_end() -> None:
    array = np.array([[np.nan, -np.inf, np.inf, 300.0]], np.float32)
    found = np.asarray(as_images(array, value_range=(200, 400)).image(0))[0, :, 0]
    assert found.tolist() == [0, 0, 255, 128]
    with pytest.raises(UnreadableImage, match="no finite value"):
        as_images(np.full((2, 2), np.nan), value_range=(0, 1)).image(0)


def test_features_are_kept_by_the_range(tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(grey().astype(np.uint16) * 4))
    images, store = as_images(tmp_path), FeatureStore(tmp_path / "cache", dtype="float32")
    first, _ = attach(images.within(ValueRange(0, 1023)), tiny, ("stride8",), store=store)
    second, _ = attach(images.within(ValueRange(0, 65535)), tiny, ("stride8",), store=store)
    exact, _ = attach(
        images.within(ValueRange(0, 65535)), tiny, ("stride8",), store=FeatureStore(tmp_path / "new", "float32")
    )
    parts = [next(s.batches(["stride8"])).features["stride8"] for s in (first, second, exact)]
    assert not np.allclose(parts[0], parts[1])
    np.testing.assert_array_equal(parts[1], parts[2])


def test_the_size_of_the_network_does_not_need_the_range(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(tiff(np.full((400, 500), 4000.0 + i, np.float32)))
    assert fitting_size(as_images(tmp_path)) == (336, 432)


# ---- what is told before training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([np.zeros((8, 8), np.uint8), grey(), grey(1)], "1 of 3 images are of one colour and show nothing: array-0"),
        ([np.where(grey() > 254, 0, 255).astype(np.uint8), grey()], "1 of 2 images are black or white nearly everywh"),
        ([grey(), grey(1), grey()], "2 of 3 images are the same as another, pixel by pixel: array-0 = array-2"),
        ([grey(), grey(1).astype(np.uint16) * 4], "1 of 2 images have 8 bits; no range"),
    ],
)
def test_images_that_show_nothing_are_named(arrays: list[Array], text: str, caplog: pytest.LogCaptureFixture) -> None:
    ready_to_train(as_images(arrays))
    assert text in caplog.text
    caplog.clear()
    ready_to_train(as_images([grey(), grey(1), colour()]))
    assert not caplog.text


# ---- files -----------------------------------------------------------------------------------------------------------


COMPRESSIONS = (None, "zlib", "lzw", "packbits", "zstd")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("factor", [1, 257])
def test_tiff_of_either_byte_order_and_any_packing(order: Any, compression: Any, factor: int) -> None:
    options: dict[str, Any] = {"byteorder": order, "compression": compression}
    dtype: Any = np.uint8 if factor == 1 else np.uint16
    one = decode(tiff(grey().astype(dtype) * dtype(factor), photometric="minisblack", **options))
    np.testing.assert_array_equal(np.asarray(one)[..., 0], grey())
    planes = np.moveaxis(colour(), -1, 0).astype(dtype) * dtype(factor)
    for array, kind in ((colour().astype(dtype) * dtype(factor), "contig"), (planes, "separate")):
        found = decode(tiff(array, photometric="rgb", planarconfig=kind, **options))
        np.testing.assert_array_equal(np.asarray(found), colour())


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "i4", "i8", "u4", "u8"])
def test_tiff_of_any_numbers(dtype: str) -> None:
    array = (grey() / 2).astype(dtype)
    found = decode(tiff(array, photometric="minisblack"), ValueRange(0, 127.5))
    np.testing.assert_array_equal(np.asarray(found)[..., 0], np.clip(np.rint(array.astype(float) * 2), 0, 255))


def test_white_is_zero_and_ten_bits_of_colour() -> None:
    found = decode(tiff(65535 - grey().astype(np.uint16) * 257, photometric="miniswhite"))
    np.testing.assert_array_equal(np.asarray(found)[..., 0], grey())
    ten = np.rint(colour() / 255 * 1023).astype(np.uint16)
    for data in (tiff(ten, photometric="rgb"), png16(ten)):
        np.testing.assert_array_equal(np.asarray(decode(bytes(data), ValueRange(0, 1023))), colour())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_upright_too(orientation: int) -> None:
    tags = [(274, "H", 1, orientation, True)]
    eight = tiff(grey(), photometric="minisblack", extratags=tags)
    deep = tiff(grey().astype(np.uint16) * 257, extratags=tags)
    np.testing.assert_array_equal(np.asarray(decode(deep)), np.asarray(decode(eight)))
    assert size_of(deep) == size_of(eight) == decode(eight).size
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(grey().astype(np.uint16) * 257).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(decode(eight)))


FIVE = np.dstack([colour(), colour()])[..., :5].astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(grey().astype(np.uint16))[:5], "damaged or truncated"),
        (tiff(grey().astype(np.uint16))[:100], "damaged or truncated"),
        (tiff(grey().astype(np.uint16))[:-10], "damaged or truncated: .* bytes, the pixels end at"),
        (tiff(colour().astype(np.uint16), compression="lzw", photometric="rgb")[:2000], "damaged or truncated"),
        (png16(colour().astype(np.uint16))[:900], "damaged or truncated"),
        (tiff(FIVE, photometric="minisblack", planarconfig="contig"), "5 channels"),
        (tiff(FIVE.astype(np.uint8), photometric="minisblack", planarconfig="contig"), "5 channels"),
        (
            tiff(FIVE[..., :4], photometric="separated", planarconfig="contig"),
            "colours of the kind SEPARATED",
        ),
        (tiff(grey(), photometric="cfa"), r"raw data of a sensor \(Bayer\)"),
        (tiff(grey().astype(np.uint16), extratags=[(50706, "B", 4, b"\1\4\0\0", True)]), "raw data of a sensor"),
    ],
)
def test_what_cannot_be_read_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)
    with pytest.raises(UnreadableImage):
        deep_of(data)


def test_bombs_of_many_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = np.zeros((1200, 2000), np.uint16)
    files = [tiff(deep), png16(np.dstack([deep] * 3))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    for data in files:
        with pytest.raises(UnreadableImage, match="more than 2 megapixels"):
            decode(data)


def pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_opacity(opacity: int) -> Image.Image:
    return Image.fromarray(np.dstack([colour(), np.full((24, 32), opacity, np.uint8)]))


@pytest.mark.parametrize("opacity", [0, 1, 128, 255])
@pytest.mark.parametrize(
    "write",
    [
        lambda p: pillow(p, "PNG"),
        lambda p: pillow(p, "TIFF"),
        lambda p: pillow(p, "WEBP", lossless=True, exact=True),
        lambda p: tiff(np.asarray(p).astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        lambda p: png16(np.asarray(p).astype(np.uint16) * 257),
    ],
)
def test_an_opacity_that_says_nothing_is_left_out(write: Callable[[Image.Image], bytes], opacity: int) -> None:
    np.testing.assert_array_equal(np.asarray(decode(write(with_opacity(opacity)))), colour())


def test_an_unused_opacity_of_other_kinds() -> None:
    for kind in ("unassalpha", "assocalpha", "unspecified"):
        array = np.dstack([colour(), np.zeros((24, 32), np.uint8)])
        found = decode(tiff(array, photometric="rgb", extrasamples=[kind]))
        np.testing.assert_array_equal(np.asarray(found), colour())
    for array in (np.asarray(with_opacity(0)), np.asarray(with_opacity(0)) / 255.0):
        np.testing.assert_array_equal(np.asarray(as_images(array).image(0)), colour())


def test_opacity_that_differs_is_laid_on_black_whatever_the_bits() -> None:
    opacity = np.where(np.arange(32) < 16, 255, 0)[None].repeat(24, 0).astype(np.uint8)
    array = np.dstack([colour(), opacity])
    expected = np.where(opacity[..., None] > 0, colour(), 0)
    for data in (
        tiff(array.astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        png16(array.astype(np.uint16) * 257),
        pillow(Image.fromarray(array), "PNG"),
    ):
        np.testing.assert_array_equal(np.asarray(decode(data)), expected)


ENDINGS = ("jfif", "JPE", "JPEG", "jp2", "j2k", "TIF", "TIFF", "dib", "pnm", "pbm", "webp", "avif", "tga")


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_that_are_looked_at(ending: str, tmp_path: Path) -> None:
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "j2k": "JPEG2000", "tif": "TIFF", "dib": "BMP"}
    kinds |= {"pnm": "PPM", "pbm": "PPM"}
    kind = kinds.get(ending.lower(), ending.upper())
    mode = "1" if ending == "pbm" else "RGB"
    Image.fromarray(colour()).convert(mode).save(tmp_path / f"a.{ending}", kind)
    images = ImageSet.from_folder(tmp_path)
    assert images.names == [f"a.{ending}"]
    assert images.image(0).size == (32, 24)


def test_raw_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(grey()).save(tmp_path / "a.png")
    (tmp_path / "b.DNG").write_bytes(b"II*\0")
    (tmp_path / ".c.nef").write_bytes(b"II*\0")
    assert ImageSet.from_folder(tmp_path).names == ["a.png"]
    assert "1 files are left out, raw data of a sensor (Bayer)" in caplog.text
    assert "b.DNG" in caplog.text


def test_heic_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3))
    heif.from_pillow(Image.fromarray(np.ascontiguousarray(smooth))).save(tmp_path / "a.heic", quality=100)
    found = np.asarray(as_images(tmp_path).image(0)).astype(int)
    assert np.abs(found - smooth).mean() < 4
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(UnreadableImage, match=r"HEIC, which needs one more package: pip install 'flawsift\[heic\]'"):
        as_images(tmp_path).image(0)


# ---- pages -----------------------------------------------------------------------------------------------------------


def two_pages(path: Path, first: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for seed in (first, first + 1):
            writer.write(grey(seed), photometric="minisblack", **options)


def test_pages_are_images_and_views_of_one_part(tmp_path: Path) -> None:
    two_pages(tmp_path / "s" / "a.tif")
    two_pages(tmp_path / "s" / "b.tif", 2)
    Image.fromarray(grey(4)).save(tmp_path / "s" / "c.tif")
    names = ["a.tif#page=1", "a.tif#page=2", "b.tif#page=1", "b.tif#page=2", "c.tif"]
    files = [tmp_path / "s" / f"{name}.tif" for name in "abc"]
    forms = [as_images(tmp_path / "s"), as_images(files), as_images(f"{tmp_path}/s/*.tif")]
    for images in forms:
        assert images.names == names
        assert [np.asarray(images.image(i))[0, 0, 0] for i in range(5)] == [grey(i)[0, 0] for i in range(5)]
        assert list(images.members.values()) == [[0, 1], [2, 3], [4]]
        assert len({images.source.digest(i) for i in range(5)}) == 5
    assert as_images([files[0], grey(9)]).names == ["a.tif#page=1", "a.tif#page=2", "array-2"]
    pieces = list(in_pieces(iter(files), 2))
    assert [piece.ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [4]]
    grouped = as_images(tmp_path / "s", groups={"a.tif": "x", "b.tif#page=1": "x"})
    assert grouped.groups == {0: "x", 1: "x", 2: "x", 3: "b.tif"}


def test_thumbnails_are_no_pages_and_a_name_may_look_like_one(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(grey(0, 4, 4), photometric="minisblack", subfiletype=1)
        writer.write(grey(1), photometric="minisblack")
    images = as_images(tmp_path)
    assert images.names == ["a.tif"]
    assert images.image(0).size == (32, 24)
    Image.fromarray(grey(3)).save(tmp_path / "a.tif#page=2", "PNG")
    np.testing.assert_array_equal(np.asarray(as_images(tmp_path / "a.tif#page=2").image(0))[..., 0], grey(3))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tif")
    assert pages_of(tmp_path / "a.tif") == [0]


def test_pages_of_many_bits_follow_the_range(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for seed in (0, 1):
            writer.write(grey(seed).astype(np.uint16) * 4, photometric="minisblack")
    images = ready_to_train(as_images(tmp_path))
    assert images.value_range == ValueRange(0, 1023)
    found = [np.asarray(images.image(i))[..., 0] for i in range(2)]
    for seed in (0, 1):
        np.testing.assert_array_equal(found[seed], np.rint(grey(seed).astype(float) * 4 / 1023 * 255))


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength"])
def test_a_head_that_claims_no_pixels_is_damage(tag: str, tmp_path: Path) -> None:
    data = bytearray(tiff(grey(), photometric="minisblack"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as opened:
        page: Any = opened.pages[0]
        at = page.tags[tag].valueoffset
    data[at : at + 2] = bytes(2)
    with pytest.raises(UnreadableImage, match="no pixels"):
        size_of(bytes(data))
    (tmp_path / "parts").mkdir()
    for i in range(3):
        Image.fromarray(grey(i)).save(tmp_path / "parts" / f"{i}.png")
    (tmp_path / "parts" / "a.tif").write_bytes(data)
    height, width = fitting_size(ImageSet.from_folder(tmp_path / "parts"))
    assert width > height, "the others tell the shape"
