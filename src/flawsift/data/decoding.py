"""Files, arrays and PIL images to pixels: all become upright 8-bit RGB by the same rules, or say why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from flawsift.data.facts import ENCODING, encoding_of
from flawsift.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor

# 16-bit greys are divided by one constant, so that a pixel never depends on the rest of its image.
SIXTEEN_BIT_WHITE = 65535.0
# Cubic resampling of floats overshoots black and white by less than a tenth; what lies farther off has another scale.
OVERSHOOT = 0.1
ARRAYS = "an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16 or float"


class UnreadableImage(InputError):
    """One image cannot be decoded; the text is the reason without the path."""


class NotAnImage(InputError, TypeError):
    """Something that is no image where one was expected; the text says what is accepted and what was got."""


def decode(data: bytes) -> Image.Image:
    """File content as an upright 8-bit RGB image.

    The content decides the format, not the file's ending. EXIF rotation is applied, 16-bit grey is divided by
    65535, CMYK and palettes are converted, transparent pixels are laid on black, of an animation the first frame
    counts. Of 16-bit colour, Pillow reads the high byte. Floats are from 0 to 1 or, where one is larger, from 0 to 255;
    a tenth more or less, as resampling makes it, is cut off.

    Raises:
        UnreadableImage: With the reason.
    """
    if not data:
        raise UnreadableImage("empty file (0 bytes)")
    with _reasons(), Image.open(io.BytesIO(data)) as opened:
        return _upright_rgb(opened)


def from_picture(picture: Image.Image) -> Image.Image:
    """A PIL image of any mode as an upright 8-bit RGB image, by the rules of `decode`.

    Raises:
        UnreadableImage: With the reason: it may not have been read from its file yet.
    """
    with _reasons():
        return _upright_rgb(picture)


def from_array(array: npt.NDArray[Any]) -> Image.Image:
    """An array as an 8-bit RGB image, as if it came from a file that holds the same values; see `decode`.

    Args:
        array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGB with opacity, uint8, uint16 or float.

    Raises:
        NotAnImage: Another shape or type.
        UnreadableImage: It holds nan or infinity, or floats of another range.
    """
    check_array(array)
    values = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            values = values.astype(np.float32)  # as float files are read
        # Pillow has float images of one channel only; what it could do with them, `_upright_rgb` does too
        values = values if values.ndim == 2 else _float_to_bytes(values)
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        values = values.astype(np.uint16) if values.ndim == 2 else (values >> 8).astype(np.uint8)  # native byte order
    with _reasons():
        return _upright_rgb(Image.fromarray(values))


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
    typed = array.dtype.kind == "f" or (array.dtype.kind == "u" and array.dtype.itemsize <= 2)
    if isinstance(array, np.ma.MaskedArray):
        raise NotAnImage(f"{what} is a masked array, whose mask would be forgotten. Fill it first: array.filled(0).")
    if not (shaped and typed):
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
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise UnreadableImage(f"damaged or truncated: {one_line(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if not all(image.size):
        raise UnreadableImage(f"no pixels ({image.size[0]} x {image.size[1]})")
    upright = _to_rgb(ImageOps.exif_transpose(image))
    upright.info[ENCODING] = encoding_of(image)  # the conversion forgets it
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return Image.fromarray(_float_to_bytes(np.asarray(image))).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey is "I;16*" or, in old files, "I"
        return Image.fromarray(_to_bytes(np.asarray(image), SIXTEEN_BIT_WHITE)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _float_to_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    # float images have no stated white; values in [0, 1] are taken as such, others as 8-bit
    if not np.isfinite(values).all():
        raise UnreadableImage("nan or infinite values")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    white = 1.0 if high <= 1 + OVERSHOOT else 255.0
    if low < -OVERSHOOT * white or high > (1 + OVERSHOOT) * white:
        raise UnreadableImage(f"floats from {low:.4g} to {high:.4g}; scale them to 0 to 1, or 0 to 255")
    return _to_bytes(values, white)


def _to_bytes(values: npt.NDArray[Any], white: float) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(values.astype(np.float64) / white * 255), 0, 255).astype(np.uint8)


def to_pixels(image: Image.Image, size: int) -> "Tensor":
    """An RGB image as (3, size, size) uint8: square resize, bilinear with antialiasing, no crop."""
    if image.size != (size, size):
        # reducing_gap keeps a 20,000 px wide image from costing seconds: box-reduce first, then resample
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    import torch  # here, so that exported models are run without it

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
