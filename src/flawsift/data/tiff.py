"""TIFF as cameras and microscopes write it: pages, and the values that Pillow cannot read."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from flawsift.data.unreadable import UnreadableImage

if TYPE_CHECKING:
    import tifffile

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of either byte order; + is of files over 4 GB
ENDINGS = (".tif", ".tiff", ".btf", ".tf8")
# What readers raise on damaged files.
DAMAGE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
DAMAGE += (AttributeError, ArithmeticError)
DAMAGE += (MemoryError, RuntimeError, AssertionError, struct.error, zlib.error)
UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, UnreadableImage)
REDUCED, MASK = 1, 4  # bits of NewSubfileType: a thumbnail, and a mask of another page
DNG_VERSION, ORIENTATION = 50706, 274  # tags
SENSOR = (32803, 34892)  # kinds of pixels that are not developed yet: of a colour filter array, and linear raw
MULTIPLIED = 1  # a kind of extra channel: opacity, and the colours are multiplied by it
GREY, COLOUR = (0, 1), 2  # kinds of pixels that are read: white is zero, black is zero; RGB
RAW = "raw data of a sensor (Bayer), which is not developed; save it as PNG or TIFF in the camera's software"

# EXIF's orientation: how stored rows and columns are brought upright.
UPRIGHT: Mapping[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def turned(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """An array (H, W, ...) upright, by EXIF's orientation from 1 to 8."""
    turn = UPRIGHT.get(orientation)
    return array if turn is None else np.ascontiguousarray(turn(array))


def is_tiff(data: bytes) -> bool:
    """Whether a file's content is TIFF."""
    return data.startswith(MAGIC)


def pages_of(path: Path) -> list[int]:
    """Numbers, from 0, of the pages that are pictures of their own: neither thumbnails nor masks.

    One that cannot be read has the page 0, which says why when it is decoded.
    """
    if not path.is_file():  # a pipe of that name would never end
        return [0]
    try:
        with path.open("rb") as file:
            if not is_tiff(file.read(4)):
                return [0]
            file.seek(0)
            with _opened(file) as opened:
                return _pictures(opened)
    except UNREADABLE:
        return [0]


def read(data: bytes, page: int | None) -> tuple[int, npt.NDArray[Any] | None, str]:
    """A page, where Pillow would lose something of it.

    Args:
        data: The file's content.
        page: Its number, from 0; None for the first picture.

    Returns:
        The number of the page; its values, upright, (H, W) or (H, W, C), or None where Pillow reads it as it is; how
        it is stored.

    Raises:
        UnreadableImage: It is of a kind that nobody reads, or damaged.
    """
    with _opened(io.BytesIO(data)) as opened:
        at = _pictures(opened)[0] if page is None else page
        chosen: Any = opened.pages[at]
        kind, is_deep = chosen.photometric, chosen.bitspersample > 8 or chosen.dtype not in (np.uint8, np.bool_)
        first: Any = opened.pages[0]
        if kind in SENSOR or DNG_VERSION in first.tags:
            raise UnreadableImage(RAW)
        if not is_deep and _has_unused_opacity(chosen):  # its colours are multiplied by it: Pillow would lose them
            return at, turned(_checked(chosen)[..., :3], _orientation(chosen)), "TIFF colour with opacity"
        if not is_deep and _pillow_reads(data, at):
            return at, None, ""
        if kind not in GREY and kind != COLOUR:
            name = getattr(kind, "name", kind)
            raise UnreadableImage(f"colours of the kind {name}, {chosen.bitspersample} bits; convert it to grey or RGB")
        Image._decompression_bomb_check((chosen.imagewidth, chosen.imagelength))
        array = _checked(chosen)
        if chosen.axes == "SYX":  # one plane for each channel
            array = np.moveaxis(array, 0, -1)
        if kind == 0 and array.dtype.kind == "u":  # white is zero
            array = (2**chosen.bitspersample - 1 - array).astype(array.dtype)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        names = {"f": "floats", "i": "signed numbers"}
        told = names.get(array.dtype.kind, f"{array.dtype.itemsize * 8}-bit grey")
        told = told.replace("grey", "colour") if array.ndim == 3 and array.shape[2] > 2 else told
        return at, turned(array, _orientation(chosen)), f"TIFF {told}"


def size_of(data: bytes, page: int | None) -> tuple[int, int]:
    """(width, height) of a page upright."""
    with _opened(io.BytesIO(data)) as opened:
        chosen: Any = opened.pages[_pictures(opened)[0] if page is None else page]
        width, height = int(chosen.imagewidth), int(chosen.imagelength)
        return (height, width) if _orientation(chosen) in range(5, 9) else (width, height)


@contextmanager
def _opened(file: BinaryIO) -> Iterator["tifffile.TiffFile"]:
    import tifffile  # slow to import, and rarely needed

    try:
        with tifffile.TiffFile(file) as opened:
            yield opened
    except tifffile.TiffFileError as error:
        raise UnreadableImage(f"damaged or truncated: {error}") from error


def _pictures(opened: "tifffile.TiffFile") -> list[int]:
    pages: list[Any] = [opened.pages[at] for at in range(len(opened.pages))]
    wanted = [at for at, page in enumerate(pages) if not int(page.subfiletype) & (REDUCED | MASK)]
    return wanted or [0]


def _orientation(page: Any) -> int:
    tag = page.tags.get(ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _checked(page: Any) -> npt.NDArray[Any]:
    size = page.parent.filehandle.size
    ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or max(ends) > size:  # missing parts would be filled with zeros
        raise UnreadableImage(f"damaged or truncated: {size} bytes, the pixels end at {max(ends, default=0)}")
    array = np.asarray(page.asarray())
    if array.ndim not in (2, 3) or not array.size:
        raise UnreadableImage(f"an array of shape {array.shape}, which is no picture")
    return array


def _has_unused_opacity(page: Any) -> bool:
    return (
        page.photometric == COLOUR
        and tuple(map(int, page.extrasamples)) == (MULTIPLIED,)
        and page.axes == "YXS"
        and not _checked(page)[..., 3].any()
    )


def _pillow_reads(data: bytes, page: int) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.seek(page)
            return True
    except (UnidentifiedImageError, EOFError):
        return False
