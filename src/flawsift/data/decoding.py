"""File contents to pixels: any format that Pillow reads as an upright 8-bit RGB image, or the reason why not."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flawsift.errors import InputError, one_line

# 16-bit greys are divided by one constant, so that a pixel never depends on the rest of its image.
SIXTEEN_BIT_WHITE = 65535.0


class UnreadableImage(InputError):
    """One image cannot be decoded; the text is the reason without the path."""


def decode(data: bytes) -> Image.Image:
    """File content as an upright 8-bit RGB image.

    The content decides the format, not the file's ending. EXIF rotation is applied, 16-bit grey is divided by
    65535, CMYK and palettes are converted, transparent pixels are laid on black, of an animation the first frame
    counts.

    Raises:
        UnreadableImage: With the reason.
    """
    if not data:
        raise UnreadableImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of large sizes; large ones raise below
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                return _to_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UnreadableImage(f"more than {limit} megapixels; make it smaller or cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image, or a format that Pillow cannot read") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise UnreadableImage(f"damaged or truncated: {one_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey is "I;16*" or, in old files, "I"
        grey = np.asarray(image, dtype=np.float64)
        # float images have no stated white; values in [0, 1] are taken as such, others as 8-bit
        white = SIXTEEN_BIT_WHITE if image.mode != "F" else (1.0 if grey.max(initial=0) <= 1 else 255.0)
        return Image.fromarray(np.clip(np.rint(grey / white * 255), 0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """An RGB image as (3, size, size) uint8: square resize, bilinear with antialiasing, no crop."""
    if image.size != (size, size):
        # reducing_gap keeps a 20,000 px wide image from costing seconds: box-reduce first, then resample
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
