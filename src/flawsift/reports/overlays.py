"""Anomaly maps as heatmaps over pictures, with colours that mean the same on every image of a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from torch import Tensor

# Violet, magenta, orange, yellow: lightness rises all the way, as in matplotlib's plasma, so that the order can be read
# without hue, and every colour stands out from the greys of industrial pictures.
RAMP = np.array([(92, 30, 190), (150, 25, 170), (214, 71, 118), (250, 149, 60), (246, 240, 40)], np.float64)
OPACITY = 0.75  # of a saturated pixel: the texture below stays visible
OPACITY_POWER = 0.7  # below 1: what is near the threshold must be seen at thumbnail size
LINE_EDGE = 400  # pixels of a picture's long edge for each pixel of line width
MAX_LINE = 3  # pixels; more costs time and shows no more
TINY = float(np.finfo(np.float32).tiny)  # the width of a scale without one: a step at the threshold
TOP_QUANTILE = 0.99  # stands in for a missing threshold: one good image in a hundred lies above
DARK, LIGHT = (20, 20, 20), (255, 255, 255)  # of a line around something: one of them shows on any background

Outlines = Sequence[Sequence[float]]  # closed lines [x1, y1, x2, y2, ...] in pixels of a picture


@dataclass(frozen=True)
class Scale:
    """What the colours mean: they are anchored to a model, never to the image that is shown.

    Attributes:
        low: Score of a typical good image; transparent up to here.
        threshold: The middle of the colours. They saturate as far above it as `low` is below.
    """

    low: float
    threshold: float

    @classmethod
    def of(cls, scores: npt.ArrayLike, threshold: float | None) -> Self:
        """From a sample of mostly good images' scores.

        Args:
            scores: (n,), any order; what is not finite is left out.
            threshold: In force, or None for the 99 % quantile of the scores.

        Returns:
            A scale with low < threshold, whatever the sample.
        """
        values = np.asarray(scores, dtype=np.float64).reshape(-1)
        values = values[np.isfinite(values)]
        given = threshold is not None and bool(np.isfinite(threshold))
        if not len(values):
            values = np.array([threshold if given else 0.0], np.float64)
        low = float(np.median(values))
        top = float(threshold) if threshold is not None and given else float(np.quantile(values, TOP_QUANTILE))
        if low >= top and given:  # a threshold within the range of the good images stays as it is: it is in force
            low = float(values.min())
        if low >= top:  # constant scores: any width will do, as long as it is one
            width = max(0.1 * abs(top), 1e-6)
            low, top = (top - width, top) if given else (low, low + width)
        return cls(low, top)

    def levels(self, values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Scores on the colour axis: 0 at `low` and below, 0.5 at the threshold, 1 from saturation on; nan is 0."""
        width = max(self.threshold - self.low, TINY)
        with np.errstate(over="ignore", invalid="ignore"):
            levels = (values.astype(np.float64) - self.low) / (2 * width)
        result: npt.NDArray[np.float64] = np.clip(np.nan_to_num(levels, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
        return result


def colours(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Red, green, blue and opacity of levels in [0, 1]: (...) to (..., 4)."""
    stops = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(levels, stops, RAMP[:, c]) for c in range(3)]
    return np.rint(np.stack([*channels, 255 * OPACITY * levels**OPACITY_POWER], axis=-1)).astype(np.uint8)


def overlay(
    image: Image.Image,
    map: "npt.NDArray[Any] | Tensor",
    scale: Scale,
    outlines: Outlines = (),
    *,
    max_edge: int | None = 512,
) -> Image.Image:
    """A heatmap over a picture: the higher a value, the more opaque, but within an outline the picture is bare.

    Args:
        image: The picture, any size.
        map: (h, w), square or not; stretched over the picture.
        scale: What the colours mean.
        outlines: Around what is suspect, in pixels of `image`; see `flawsift.reports.regions`.
        max_edge: Long edge of the result at most; None keeps the picture's size. Small pictures are not enlarged.

    Returns:
        RGB, in the picture's aspect ratio.
    """
    picture = shrink(image, max_edge)
    drawn = moved(outlines, scale=(picture.width / image.width, picture.height / image.height))
    return Image.alpha_composite(picture.convert("RGBA"), layer(picture.size, map, scale, drawn)).convert("RGB")


def layer(
    size: tuple[int, int], map: "npt.NDArray[Any] | Tensor", scale: Scale, outlines: Outlines = ()
) -> Image.Image:
    """The heatmap alone, to be laid over a picture of a size (width, height): RGBA, transparent up to `scale.low`.

    Args:
        size: Of the picture.
        map: (h, w), square or not; stretched over the picture.
        scale: What the colours mean.
        outlines: In pixels of that size.
    """
    return painted(_stretch(map, size, scale), scale, outlines)


def painted(values: npt.NDArray[np.float32], scale: Scale, outlines: Outlines = ()) -> Image.Image:
    """A map that has the picture's size, (H, W), as a heatmap to be laid over it: RGBA, as `layer` makes it."""
    steps = colours(np.linspace(0, 1, 256))  # a table: colouring 256 levels is cheaper than colouring each pixel
    colour = steps[np.rint(255 * scale.levels(values)).astype(np.uint8)]
    within, light, dark = lines(outlines, (values.shape[1], values.shape[0]))
    colour[within] = 0
    colour[light], colour[dark] = (*LIGHT, 255), (*DARK, 255)
    return Image.fromarray(colour)


def moved(outlines: Outlines, scale: tuple[float, float] = (1, 1), by: tuple[float, float] = (0, 0)) -> Outlines:
    """Outlines on another size of the picture, or on a part of it that begins at (x, y) `by`."""
    (across, down), (left, upper) = scale, by
    return [
        [at for x, y in zip(line[::2], line[1::2], strict=True) for at in (x * across - left, y * down - upper)]
        for line in outlines
    ]


def lines(outlines: Iterable[Sequence[float]], size: tuple[int, int]) -> tuple[npt.NDArray[np.bool_], ...]:
    """(H, W) what is within outlines, and the white and the dark line around it: they hide nothing of what is within.

    Args:
        outlines: In pixels of a picture.
        size: Its width and height.
    """
    area = Image.new("L", size)
    for line in outlines:
        ImageDraw.Draw(area).polygon(list(line), fill=1)  # one pixel more at the right and below
    width = min(MAX_LINE, max(1, round(max(size) / LINE_EDGE)))
    grown = area.filter(ImageFilter.MaxFilter(2 * width + 1))
    around = grown.filter(ImageFilter.MaxFilter(2 * width + 1))
    within, light, dark = (np.asarray(one) == 1 for one in (area, grown, around))
    return within, light & ~within, dark & ~light


def shrink(image: Image.Image, max_edge: int | None) -> Image.Image:
    """An RGB copy whose long edge is at most `max_edge`; small pictures keep their size."""
    picture = image.convert("RGB") if image.mode != "RGB" else image.copy()
    if max_edge is not None:
        picture.thumbnail((max_edge, max_edge), Image.Resampling.BILINEAR)
    return picture


def peak_position(map: npt.NDArray[np.floating[Any]]) -> str:
    """Where a map (h, w) is highest, for those who cannot see it."""
    h, w = map.shape
    row, column = divmod(int(np.nan_to_num(map.astype(np.float32), nan=-np.inf).argmax()), w)
    return f"highest {100 * (column + 0.5) / w:.0f} % from the left and {100 * (row + 0.5) / h:.0f} % from the top"


def _stretch(map: "npt.NDArray[Any] | Tensor", size: tuple[int, int], scale: Scale) -> npt.NDArray[np.float32]:
    """(H, W) of a picture from (h, w) over it, bilinear."""
    import torch  # here, so that a machine without it can paint the maps of exported models

    from flawsift.detectors.parts.maps import upsample

    array = map.detach().cpu().float().numpy() if isinstance(map, torch.Tensor) else map
    values = torch.from_numpy(np.array(array, np.float32))  # a copy: torch warns of read-only arrays
    # one nan would spread over its neighbours, one infinity over the whole cell
    values = values.nan_to_num(nan=scale.low, posinf=2 * scale.threshold - scale.low, neginf=scale.low)
    return np.asarray(upsample(values.unsqueeze(0), (size[1], size[0])).squeeze(0).numpy(), np.float32)
