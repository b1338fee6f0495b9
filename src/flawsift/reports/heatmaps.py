"""An image beside its heatmap: as files hold it, and as pages show it with a part at the image's own pixels."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from flawsift.files import ensure_folder, write_bytes
from flawsift.reports.overlays import DARK, LIGHT, Outlines, Scale, lines, moved, overlay, peak_position, shrink
from flawsift.reports.pages import THUMB, data_uri

MAX_EDGE = 512  # pixels of each of both pictures of a file
GAP = 8  # pixels between what a file shows
FONT = 15  # pixels: read without zooming
BAR = 3  # pixels that a scale bar is thick
BAR_SHARE = 3  # a scale bar is at most the width of the image by this
CLOSE = 320  # pixels of each edge of the part at 1:1: as wide as a card


def bar_length(width: int) -> int:
    """Pixels of an image of a width that a scale bar spans: 1, 2 or 5 times a power of ten."""
    longest = max(1.0, width / BAR_SHARE)
    power = 10 ** math.floor(math.log10(longest))
    return int(power * max(step for step in (1, 2, 5) if step * power <= longest))


def sheet(image: Image.Image, map_: npt.NDArray[Any], scale: Scale, outlines: Outlines, text: str) -> Image.Image:
    """An image, its heatmap on the right, and below them a text and a scale bar in pixels of the image.

    Args:
        image: Any size; shown with a longer edge of at most `MAX_EDGE`.
        map_: (h, w), stretched over it.
        scale: What the colours mean.
        outlines: Around what is suspect, in pixels of the image.
        text: One line.
    """
    plain, heat = shrink(image, MAX_EDGE), overlay(image, map_, scale, outlines, max_edge=MAX_EDGE)
    font, span = ImageFont.load_default(FONT), bar_length(image.width)
    length, label = max(1, round(span * plain.width / image.width)), f"{span:,} px"
    text_width, label_width = (math.ceil(font.getlength(one)) for one in (text, label))
    width = max(2 * plain.width + GAP, text_width + length + label_width + 4 * GAP)
    strip = FONT + 2 * GAP
    whole = Image.new("RGB", (width, plain.height + strip), DARK)
    whole.paste(plain, (0, 0))
    whole.paste(heat, (plain.width + GAP, 0))
    draw = ImageDraw.Draw(whole)
    middle = plain.height + strip // 2
    draw.text((GAP, middle), text, LIGHT, font, anchor="lm")
    draw.text((width - GAP, middle), label, LIGHT, font, anchor="rm")
    end = width - 2 * GAP - label_width
    draw.rectangle((end - length, middle - BAR // 2, end - 1, middle + BAR // 2), fill=LIGHT)
    return whole


def save(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG in one step, and the folders above it.

    Raises:
        OutputError: It cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    if not path.parent.is_dir():
        ensure_folder(path.parent)
    write_bytes(path, buffer.getvalue(), durable=False)  # pictures are many, and made again from the same command


@dataclass(frozen=True)
class Shown:
    """An image as a page shows it; pictures are data URIs, "" where there is none.

    Attributes:
        picture: The image.
        heatmap: The same under its heatmap.
        peak_position: Where the map is highest, in words.
        close: A part around that place, outlined, a pixel of the page for each of the image.
        close_size: Its width and height.
        bar: Pixels of the image that the scale bar spans.
        bar_percent: How long it is, of a square that the heatmap fits into.
    """

    picture: str
    heatmap: str = ""
    peak_position: str = ""
    close: str = ""
    close_size: tuple[int, int] = (0, 0)
    bar: int = 0
    bar_percent: float = 0

    @classmethod
    def of(
        cls,
        image: Image.Image,
        map_: npt.NDArray[Any] | None,
        scale: Scale | None,
        outlines: Outlines = (),
        *,
        edge: int = THUMB,
    ) -> Self:
        """An image with its map (h, w); without a map or a scale, the image alone.

        Args:
            image: Any size.
            map_: Stretched over it.
            scale: What the colours mean.
            outlines: Around what is suspect, in pixels of the image.
            edge: Pixels of the longer edge of both pictures.
        """
        picture = data_uri(shrink(image, edge))
        if map_ is None or scale is None:
            return cls(picture)
        part, bar = close_up(image, map_, outlines), bar_length(image.width)
        return cls(
            picture,
            # full chroma resolution: the line is one pixel wide
            data_uri(overlay(image, map_, scale, outlines, max_edge=edge), subsampling=0),
            peak_position(map_),
            data_uri(part),
            part.size,
            bar,
            100 * bar / max(image.size),
        )

    @property
    def n_bytes(self) -> int:
        """How much it adds to the page."""
        return len(self.picture) + len(self.heatmap) + len(self.close)


def close_up(image: Image.Image, map_: npt.NDArray[Any], outlines: Outlines) -> Image.Image:
    """The part of an image around the highest place of its map, unscaled, with a line around what is suspect."""
    row, column = divmod(int(np.nan_to_num(map_.astype(np.float32), nan=-np.inf).argmax()), map_.shape[1])
    places = ((column + 0.5) / map_.shape[1], (row + 0.5) / map_.shape[0])
    starts = [
        min(max(round(place * edge - CLOSE / 2), 0), max(edge - CLOSE, 0))
        for place, edge in zip(places, image.size, strict=True)
    ]
    left, upper = starts
    part = image.crop((left, upper, min(left + CLOSE, image.width), min(upper + CLOSE, image.height))).convert("RGB")
    pixels = np.array(part)
    _, light, dark = lines(moved(outlines, by=(left, upper)), part.size)
    pixels[light], pixels[dark] = LIGHT, DARK
    return Image.fromarray(pixels)
