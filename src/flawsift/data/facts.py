"""What is known of a picture before anybody judges it: its size, how it was stored, how bright it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "flawsift encoding"  # the key under which `flawsift.data.decoding` notes it in `Image.info`
SAMPLED = 64  # points a side: thousands of grey values tell how bright a picture is, and cost microseconds
# Pillow's modes in words; whatever begins with "I" is grey of 16 bits
MODES = {"1": "black and white", "L": "grey", "LA": "grey with opacity", "P": "palette", "PA": "palette"}
MODES |= {"RGB": "colour", "RGBA": "colour with opacity", "F": "floats"}


@dataclass(frozen=True)
class ImageFacts:
    """Of one image.

    Attributes:
        width: In pixels, upright.
        height: In pixels, upright.
        encoding: File format and kind of pixels, such as "PNG grey"; "" for what was in memory.
        brightness: Mean grey value, from 0 to 255.
        contrast: Distance between the quartiles of its grey values, which a defect hardly moves.
    """

    width: int
    height: int
    encoding: str
    brightness: float
    contrast: float


def encoding_of(image: Image.Image) -> str:
    """How an image was stored, such as "JPEG colour"; "" where it does not come from a file."""
    if not image.format:
        return ""
    return f"{image.format} {'16-bit grey' if image.mode.startswith('I') else MODES.get(image.mode, image.mode)}"


def facts_of(image: Image.Image, pixels: "Tensor") -> ImageFacts:
    """The facts of an image.

    Args:
        image: In its own size, from a `flawsift.data.images.Source`.
        pixels: (3, H, W) uint8, the same in the size of the network: of a large picture that is much less to read.
    """
    step = max(1, min(pixels.shape[1:]) // SAMPLED)
    sums = pixels[:, ::step, ::step].numpy().astype(np.uint16).sum(0)  # of three channels, 0 to 765
    reached = np.bincount(sums.ravel(), minlength=766).cumsum()
    low, high = np.searchsorted(reached, [0.25 * sums.size, 0.75 * sums.size])
    return ImageFacts(
        width=image.width,
        height=image.height,
        encoding=str(image.info.get(ENCODING, "")),
        brightness=float(sums.mean() / 3),
        contrast=float(high - low) / 3,
    )
