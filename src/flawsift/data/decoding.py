"""Files, arrays and PIL images to pixels: all become upright 8-bit RGB by the same rules, or say why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from flawsift.data import tiff
from flawsift.data.facts import ENCODING, encoding_of
from flawsift.data.unreadable import UnreadableImage as UnreadableImage
from flawsift.data.values import ValueRange, white_of
from flawsift.errors import InputError, one_line
from flawsift.types import Size

if TYPE_CHECKING:
    from torch import Tensor

# The white of whole numbers of more than 8 bits where no range was learned or given.
SIXTEEN_BIT_WHITE = 65535.0
# Cubic resampling of floats overshoots black and white by less than a tenth; what lies farther off has another scale.
OVERSHOOT = 0.1
ARRAYS = "an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of numbers or bool"
DEEP_MODES = ("F", "I")  # of Pillow: floats, and "I", "I;16" and the like
WITH_OPACITY = ("RGBA", "LA", "PA", "La", "RGBa")
ORIENTATION = 0x0112  # the EXIF tag
PNG = b"\x89PNG\r\n\x1a\n"
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands of files that pillow-heif reads


class NotAnImage(InputError, TypeError):
    """Something that is no image where one was expected; the text says what is accepted and what was got."""


@dataclass(frozen=True, eq=False)
class Deep:
    """A picture of more than 8 bits a value, upright, as the numbers that were written.

    Attributes:
        values: (H, W) or (H, W, 3).
        opacity: (H, W), or None.
        encoding: File format and kind of pixels.
    """

    values: npt.NDArray[Any]
    opacity: npt.NDArray[Any] | None = None
    encoding: str = ""

    @classmethod
    def of(cls, array: npt.NDArray[Any], encoding: str = "") -> "Deep":
        """Of an array (H, W) or (H, W, 1 to 4): grey, grey and opacity, colour, colour and opacity."""
        channels = array.shape[2] if array.ndim == 3 else 1
        if channels > 4:
            raise UnreadableImage(f"{channels} channels; 1 (grey), 3 (colour) or these with opacity can be read")
        if array.ndim == 2 or channels == 3:
            return cls(array, None, encoding)
        values = array[..., 0] if channels < 3 else array[..., :3]
        return cls(values, array[..., -1] if channels in (2, 4) else None, encoding)

    def to_rgb(self, value_range: ValueRange | None) -> Image.Image:
        """As 8-bit RGB."""
        value_range = value_range or _usual_range(self.values)
        if not np.isfinite(self.values).any():
            raise UnreadableImage("no finite value: all are nan or infinite")
        eight = value_range.to_bytes(self.values)
        if self.opacity is not None and self.opacity.min() < self.opacity.max():  # else it says nothing
            share = np.clip(np.nan_to_num(self.opacity.astype(np.float64)) / white_of(self.opacity), 0, 1)
            eight = np.rint(eight * (share if eight.ndim == 2 else share[..., None])).astype(np.uint8)
        image = Image.fromarray(eight).convert("RGB")
        image.info[ENCODING] = self.encoding
        return image


def decode(data: bytes, value_range: ValueRange | None = None, page: int | None = None) -> Image.Image:
    """File content as an upright 8-bit RGB image.

    The content decides the format, not the file's ending. EXIF rotation is applied; CMYK and palettes are converted;
    transparent pixels are laid on black, but an opacity that is the same everywhere, such as an unused channel of
    zeros, is left out. Values of more than 8 bits are read by the range. Without one, whole numbers are divided by
    65535, and floats are from 0 to 1 or, where one is larger, from 0 to 255; a tenth more or less, as resampling makes
    it, is cut off. Of an animation the first frame counts.

    Args:
        data: The content of a file.
        value_range: Which values are black and white, of images of more than 8 bits.
        page: Of a TIFF, from 0; None for the first that is no thumbnail.

    Raises:
        UnreadableImage: With the reason.
    """
    return _as_rgb(_read(data, page), value_range)


def from_picture(picture: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """A PIL image of any mode as an upright 8-bit RGB image, by the rules of `decode`.

    Raises:
        UnreadableImage: With the reason: it may not have been read from its file yet.
    """
    with _reasons():
        return _as_rgb(_upright(picture), value_range)


def from_array(array: npt.NDArray[Any], value_range: ValueRange | None = None) -> Image.Image:
    """An array as an 8-bit RGB image, as if it came from a file that holds the same values; see `decode`.

    Args:
        array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGB with opacity, of any real numbers. uint8 and
            bool are 8-bit images; all other numbers are read by the range.
        value_range: Which values are black and white.

    Raises:
        NotAnImage: Another shape or type.
        UnreadableImage: There is no range, and it holds nan or infinity, or numbers of another range.
    """
    with _reasons():
        return _as_rgb(_of_array(array), value_range)


def deep_of(given: bytes | npt.NDArray[Any] | Image.Image, page: int | None = None) -> Deep | None:
    """The numbers of an image of more than 8 bits; None of any other, which is not decoded for this.

    Raises:
        UnreadableImage: With the reason.
    """
    if isinstance(given, bytes):
        image = _read(given, page, deep_only=True)
    elif isinstance(given, np.ndarray):
        image = _of_array(given)
    elif not given.mode.startswith(DEEP_MODES):
        return None
    else:
        with _reasons():
            image = _upright(given)
    return image if isinstance(image, Deep) else None


def size_of(given: bytes | npt.NDArray[Any] | Image.Image, page: int | None = None) -> tuple[int, int]:
    """(width, height) of an image upright, mostly from its head alone.

    Raises:
        UnreadableImage: With the reason.
    """
    if isinstance(given, np.ndarray):
        return given.shape[1], given.shape[0]
    with _reasons():
        if isinstance(given, Image.Image):
            return _size(given)
        if tiff.is_tiff(given):
            width, height = tiff.size_of(given, page)
            if not width * height:
                raise UnreadableImage("damaged: it says that it has no pixels")
            return width, height
        if _is_heic(given):
            return _heic(given).size
        with Image.open(io.BytesIO(given)) as opened:
            return _size(opened)


def orientation_of(data: bytes) -> int:
    """How a file says that it is to be turned, from 1 (not at all) to 8; 1 where that cannot be read."""
    try:
        with _reasons(), Image.open(io.BytesIO(data)) as opened:
            return _orientation(opened)
    except UnreadableImage:
        return 1


def check_array(array: npt.NDArray[Any], what: str = "This") -> None:
    """Refuse an array that is no image.

    Args:
        array: Any.
        what: Its place, for the error.

    Raises:
        NotAnImage: Its shape or type is another one.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    shaped = array.ndim in (2, 3) and channels in (1, 3, 4) and array.size > 0
    if isinstance(array, np.ma.MaskedArray):
        raise NotAnImage(f"{what} is a masked array, whose mask would be forgotten. Fill it first: array.filled(0).")
    if not (shaped and array.dtype.kind in "buif"):
        raise NotAnImage(f"{what} is an array of shape {array.shape} and type {array.dtype}. Give {ARRAYS}.")


@contextmanager
def _reasons() -> Iterator[None]:
    """Errors of Pillow as reasons that a user understands; its warnings, of odd EXIF and large sizes, are silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that are too large raise below
            yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UnreadableImage(f"more than {limit} megapixels; make it smaller or cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image, or a format that Pillow cannot read") from error
    except tiff.DAMAGE as error:  # Pillow's are among them
        raise UnreadableImage(f"damaged or truncated: {one_line(error)}") from error


def _read(data: bytes, page: int | None, *, deep_only: bool = False) -> Image.Image | Deep:
    """A file's picture, upright, of any mode; with `deep_only` one of 8 bits is opened only."""
    if not data:
        raise UnreadableImage("empty file (0 bytes)")
    with _reasons():
        if tiff.is_tiff(data):
            at, array, encoding = tiff.read(data, page)
            if array is not None:
                deep = Deep.of(array, encoding)
                return deep if array.dtype != np.uint8 else Image.fromarray(deep.values)
            page = at
        elif data.startswith(PNG) and data[24:25] == b"\x10":  # 16 bits, of which Pillow keeps 8 where it is colour
            return _deep_png(data)
        elif _is_heic(data):
            return _heic(data)
        with Image.open(io.BytesIO(data)) as opened:
            if page:
                opened.seek(page)
            if deep_only and not opened.mode.startswith(DEEP_MODES):
                return opened
            return _upright(opened)


def _upright(image: Image.Image) -> Image.Image | Deep:
    image.load()
    if not all(image.size):
        raise UnreadableImage(f"no pixels ({image.size[0]} x {image.size[1]})")
    turned, encoding = ImageOps.exif_transpose(image), encoding_of(image)
    if image.mode.startswith(DEEP_MODES):
        return Deep(np.asarray(turned), None, encoding)
    turned.info[ENCODING] = encoding
    return turned


def _as_rgb(image: Image.Image | Deep, value_range: ValueRange | None) -> Image.Image:
    if isinstance(image, Deep):
        return image.to_rgb(value_range)
    with _reasons():
        rgb = _to_rgb(image)
    rgb.info[ENCODING] = image.info.get(ENCODING, "")  # the conversion forgets it
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or image.mode in WITH_OPACITY:
        rgba = image.convert("RGBA")
        low, high = rgba.getchannel("A").getextrema()
        if low == high:  # an unused channel, or nothing to see through
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:  # such as LAB
        raise UnreadableImage(f"colours of the kind {image.mode}; convert it to RGB") from error


def _of_array(array: npt.NDArray[Any]) -> Image.Image | Deep:
    check_array(array)
    values = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if values.dtype == np.bool_:
        return Image.fromarray(values.astype(np.uint8) * np.uint8(255))
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            values = values.astype(np.float32)  # as float files are read
    return Deep.of(values.astype(values.dtype.newbyteorder("="), copy=False))


def _usual_range(values: npt.NDArray[Any]) -> ValueRange:
    """What is black and white where nobody said so."""
    if values.dtype == np.uint16:
        return ValueRange(0, SIXTEEN_BIT_WHITE)
    # other numbers have no stated white: from 0 to 1 for floats, as 8-bit where one is larger, then as 16-bit
    if not np.isfinite(values).all():
        raise UnreadableImage("nan or infinite values")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if values.dtype.kind == "f":
        white = 1.0 if high <= 1 + OVERSHOOT else 255.0
        if low < -OVERSHOOT * white or high > (1 + OVERSHOOT) * white:
            raise UnreadableImage(
                f"floats from {low:.4g} to {high:.4g}; scale them to 0 to 1, or 0 to 255, or train on such images"
            )
        return ValueRange(0, white)
    white = 255.0 if high <= 255 else SIXTEEN_BIT_WHITE
    if low < 0 or high > white:
        raise UnreadableImage(f"whole numbers from {low:.6g} to {high:.6g}, and no range was learned or given")
    return ValueRange(0, white)


def _deep_png(data: bytes) -> Deep:
    import imagecodecs  # slow to import, and rarely needed

    with Image.open(io.BytesIO(data)) as opened:
        opened.verify()  # checksums, which the other reader does not look at
    with Image.open(io.BytesIO(data)) as opened:
        Image._decompression_bomb_check(opened.size)
        orientation, mode = _orientation(opened), opened.mode
    array = tiff.turned(imagecodecs.png_decode(data), orientation)
    kind = "16-bit grey" if array.ndim == 2 or array.shape[2] < 3 else "16-bit colour"
    kind += " with opacity" if mode in WITH_OPACITY else ""
    return Deep.of(array, f"PNG {kind}")


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in HEIC


def _heic(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise UnreadableImage("HEIC, which needs one more package: pip install 'flawsift[heic]'") from error
    image: Image.Image = pillow_heif.open_heif(io.BytesIO(data)).to_pillow()  # turned upright by the library
    image.info = {ENCODING: f"HEIC {'colour' if image.mode == 'RGB' else image.mode}"}
    return image


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ORIENTATION)
    return value if isinstance(value, int) else 1  # damaged EXIF may hold anything


def _size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) in range(5, 9) else image.size


def to_pixels(image: Image.Image, size: Size) -> "Tensor":
    """An RGB image as (3, H, W) uint8 in a network's input, by `flawsift.data.frames.framed`."""
    import torch  # here, so that exported models are run without it

    from flawsift.data.frames import framed

    return torch.from_numpy(framed(image, size)).permute(2, 0, 1).contiguous()
