"""Types that every room speaks."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, int]  # (height, width)

# Of a network's input in pixels: a number is the edge of a square that every image is squeezed into, as the papers do;
# a shape is a rectangle that images are fitted into with the aspect ratio that they have.
Size: TypeAlias = int | Shape


def as_shape(size: int | Sequence[int]) -> Shape:
    """(height, width) of the input of a network.

    >>> as_shape(256), as_shape([192, 256])
    ((256, 256), (192, 256))
    """
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)  # under a tracer they are tensors
