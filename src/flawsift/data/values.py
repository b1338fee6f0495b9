"""Numbers of more than 8 bits as greys from black to white: by one range for all images of a set, never by image.

A range of its own for each image would even out what a darker or brighter defect is, and a fixed one loses what a
10-bit camera writes into 16-bit files. So the range is learned from all training images, or given, and stays with the
screening and the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from flawsift.errors import InputError, ParameterError

VALUE_RANGE = "value_range"  # under which a screening and a model keep it
# The largest value of cameras of 8 to 16 bits, and of what is scaled to one.
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
FILLED = 0.5  # the share of such a range that values fill where it is theirs; one bit is lost at most
MARGIN = 0.1  # of the width, beyond both ends of another range: new images are never exactly as the training images
SAMPLED = 4096  # values of an image that are looked at, evenly spaced, beside the smallest and largest
TAIL = 0.001  # share of values at each end that may be dead pixels, and count only where they lie near the others
MANY = 16  # distinct values make a picture; fewer are a drawing, where none of them is a sign of "nothing measured"


@dataclass(frozen=True)
class ValueRange:
    """Which values are black and white.

    Attributes:
        low: Black, and whatever is smaller or not a number.
        high: White, and whatever is larger.

    Raises:
        ParameterError: They are not finite, or not in this order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ParameterError(f"A range of values needs two finite numbers, the lower first, got {self}.")

    def __str__(self) -> str:
        return f"{self.low:.6g} to {self.high:.6g}"

    @property
    def line(self) -> str:
        """What is told of it."""
        return f"Values of images of more than 8 bits are read from {self.low:.6g} (black) to {self.high:.6g} (white)."

    def as_json(self) -> list[float]:
        """Ready for JSON."""
        return [self.low, self.high]

    @classmethod
    def from_json(cls, kept: Any) -> Self | None:
        """Back from JSON; None where there was none.

        Raises:
            InputError: It is damaged.
        """
        if kept is None:
            return None
        try:
            low, high = map(float, kept)
            return cls(low, high)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"The range of values {kept!r} is damaged: give two numbers.") from error

    def to_bytes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Any numbers as 0 to 255, of the same shape."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.rint((values.astype(np.float64) - self.low) / (self.high - self.low) * 255)
        greys: npt.NDArray[np.uint8] = np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255).astype(np.uint8)
        return greys


def kept(value_range: ValueRange | None) -> dict[str, list[float]]:
    """What a screening and a model write down of a range: nothing where there is none."""
    return {} if value_range is None else {VALUE_RANGE: value_range.as_json()}


class Sample(NamedTuple):
    """Some values of an image.

    Attributes:
        values: (S,) finite ones, ascending, the smallest and the largest of the image among them.
        are_floats: Whether they are not whole by their type.
    """

    values: npt.NDArray[np.float64]
    are_floats: bool

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Self:
        """Of an image (H, W) or (H, W, 3)."""
        flat = values.reshape(-1)
        if values.dtype.kind == "f":
            flat = flat[np.isfinite(flat)]
        if not len(flat):
            return cls(np.empty(0), True)
        some = flat[:: max(1, len(flat) // SAMPLED)]
        ends = [flat.min(), flat.max()]
        return cls(np.sort(np.concatenate([some, ends]).astype(np.float64)), values.dtype.kind == "f")


def learn_range(samples: Iterable[Sample]) -> ValueRange | None:
    """The range of a whole set.

    It is 0 to 1, 255, 1023, 4095, 16383 or 65535 where the values fill half of it, else from the smallest to the
    largest and a tenth more on both sides. Left out are a single value that lies farther away from all others than
    these among each other, such as -9999 where nothing was measured, and dead pixels: fewer than one in a thousand,
    farther away than the width of the rest.

    Args:
        samples: Of the images of more than 8 bits.

    Returns:
        The range, or None where no image has a value.

    Raises:
        InputError: Some images hold floats and others whole numbers, so that one range is not for all.
    """
    listed = [sample for sample in samples if len(sample.values)]
    if not listed:
        return None
    n_floats = sum(sample.are_floats for sample in listed)
    if 0 < n_floats < len(listed):
        raise InputError(
            f"{n_floats} images hold floats and {len(listed) - n_floats} whole numbers of more than 8 bits: one range "
            "of values is not for both. Write all of one kind, or give the range that is right for all with --range "
            "LOW HIGH (value_range=(LOW, HIGH) in Python)."
        )
    values = _without_sentinels(np.sort(np.concatenate([sample.values for sample in listed])))
    values = _without_dead_pixels(values)
    low, high = float(values[0]), float(values[-1])
    white = next((white for white in WHITES if white >= high), 0.0)
    if low >= 0 and (high - low >= FILLED * white > 0 or high == low):
        return ValueRange(0.0, white or 2 * high)
    width = high - low or abs(high)
    step = 10.0 ** np.floor(np.log10(width)) / 10  # round numbers: one image more or less changes nothing
    lowest = low - MARGIN * width if low < 0 else max(0.0, low - MARGIN * width)
    return ValueRange(float(np.floor(lowest / step) * step), float(np.ceil((high + MARGIN * width) / step) * step))


def _without_sentinels(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sorted values without a lowest or highest one that says "nothing here"."""
    while True:
        above, below = values[values > values[0]], values[values < values[-1]]
        if _is_far(values[0], above):
            values = above
        elif _is_far(values[-1], below):
            values = below
        else:
            return values


def _is_far(value: float, others: npt.NDArray[np.float64]) -> bool:
    if len(np.unique(others)) < MANY:
        return False
    gap = max(others[0] - value, value - others[-1])
    return bool(gap > others[-1] - others[0])


def _without_dead_pixels(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = np.quantile(values, [TAIL, 1 - TAIL], method="nearest")
    width = high - low
    near = values[(values >= low - width) & (values <= high + width)]
    return near if width > 0 else values


def white_of(values: npt.NDArray[Any]) -> float:
    """The smallest usual white that holds all values; the largest of them where none does."""
    high = float(values.max())
    return next((white for white in WHITES if white >= high), high)
