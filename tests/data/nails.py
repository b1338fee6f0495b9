"""Drawn nails at any angle before a plain background."""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from flawsift.data.images import ImageSet

SIZE = 200  # edge of the pictures
LENGTH = 90
# of a nail that lies to the right, its head on the left; its middle is where x is 0
NAIL = np.array([(-12, -14), (-6, -14), (-6, -5), (60, -5), (78, 0), (60, 5), (-6, 5), (-6, 14), (-12, 14)]) - (22.0, 0)


def nail(
    angle: float = 0.0, x: float = 100.0, y: float = 100.0, *, mark: tuple[float, float] | None = None, grey: int = 60
) -> Image.Image:
    """A nail at an angle, clockwise from the right; `mark` is a red dot at a place along and across it."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    picture = Image.new("RGB", (4 * SIZE, 4 * SIZE), (200, 200, 200))
    draw = ImageDraw.Draw(picture)
    draw.polygon([tuple(4 * (corner @ turn + [x, y])) for corner in NAIL], fill=(grey, grey, grey + 20))
    if mark is not None:
        cx, cy = 4 * (np.array(mark) @ turn + [x, y])
        draw.ellipse((cx - 16, cy - 16, cx + 16, cy + 16), fill=(250, 60, 20))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def nails(n: int, *, seed: int = 0, marked: int = 0) -> ImageSet:
    """Nails at any angle, the last ones with a mark."""
    generator = np.random.default_rng(seed)
    pictures = []
    for i in range(n):
        angle, x, y = generator.uniform(-math.pi, math.pi), *generator.uniform(85, 115, 2)
        pictures.append(noisy(nail(angle, x, y, mark=(20, 0) if i >= n - marked else None), generator))
    return ImageSet.from_arrays(pictures)


def noisy(picture: Image.Image, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """As a camera takes it."""
    values = np.asarray(picture, float)
    return (values + generator.normal(0, 2, values.shape)).clip(0, 255).astype(np.uint8)
