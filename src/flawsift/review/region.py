"""The region of interest that a reviewer draws over the mean of the images: roi.json, beside decisions.csv."""

import functools
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flawsift.damage import DAMAGE, json_object
from flawsift.data.frames import Region
from flawsift.data.images import ImageSet
from flawsift.data.roi import drawn, read_region, sample
from flawsift.errors import InputError, ParameterError
from flawsift.files import alone, write_json
from flawsift.paths import show
from flawsift.screening import decisions

NAME = "roi.json"
ALIGNED = "The parts of this screening are aligned: a region of interest has no fixed place in its images."
MAX_POLYGONS, MAX_POINTS = 50, 500  # of a drawing; nobody clicks as many
DIMMED = 140  # of 255: what a screening did not look at stays visible under it


@dataclass(eq=False)
class Drawing:
    """A region on disk, and what it is drawn on.

    Attributes:
        path: The file; it may not exist.
        images: Those that were screened.
        screened: The region that the screening looked at; None for all.
    """

    path: Path
    images: ImageSet
    screened: Region | None

    @functools.cached_property
    def _mean(self) -> Image.Image:
        return Image.fromarray(np.rint(sample(self.images).mean(0)).astype(np.uint8))

    @functools.cached_property
    def mean(self) -> bytes:
        """The mean of some images as PNG, its longer edge as long as a region has cells.

        Raises:
            InputError: No image can be read.
        """
        return _png(self._mean)

    @functools.cached_property
    def layer(self) -> bytes | None:
        """What lies outside of the region of the screening, to be laid over an image, as PNG; None without a region."""
        if self.screened is None:
            return None
        pixels = np.zeros((*self.screened.cells.shape, 4), np.uint8)
        pixels[..., 3] = np.where(self.screened.cells, 0, DIMMED)
        return _png(Image.fromarray(pixels))

    def state(self) -> dict[str, Any]:
        """What the page shows: size of the drawing, polygons in it, and whether a refit looks elsewhere than before.

        Raises:
            InputError: No image can be read.
        """
        polygons: list[list[list[float]]] = []
        region, problem = self.screened, None
        is_drawn, is_aligned = self.path.exists(), self.images.alignment is not None
        if is_drawn and is_aligned:
            problem = ALIGNED
        elif is_drawn:
            try:
                region, polygons = read_region(str(self.path), self.images), self._scaled()
            except (InputError, OSError, *DAMAGE) as error:
                problem = show(str(error))
        return {
            "size": self._mean.size,
            "polygons": polygons,
            "share": None if region is None else region.share,
            "screened": None if self.screened is None else self.screened.share,
            "is_new": region != self.screened,
            "problem": problem,
            "command": self._command() if is_drawn and not is_aligned else None,
        }

    def _scaled(self) -> list[list[list[float]]]:
        """The polygons of the file in pixels of the mean image."""
        content = json_object(self.path.read_bytes())
        x_scale, y_scale = (to / edge for to, edge in zip(self._mean.size, content["size"], strict=True))
        return [[[x * x_scale, y * y_scale] for x, y in polygon] for polygon in content["polygons"]]

    def _command(self) -> str:
        root = getattr(self.images.source, "root", "FOLDER")
        decided = self.path.with_name(decisions.NAME)
        also = f" --decisions {shlex.quote(show(decided))}" if decided.exists() else ""
        return f"flawsift fit {shlex.quote(show(root))} --roi {shlex.quote(show(self.path))}{also} --out MODEL"

    def save(self, polygons: Any) -> dict[str, Any]:
        """Write polygons, in pixels of the mean image; none takes the file away. Returns the state then.

        Raises:
            ParameterError: They are none, or hold nothing; or the images are aligned.
            OutputError: The file cannot be written; it is as before then.
        """
        width, height = self._mean.size
        if not isinstance(polygons, list) or len(polygons) > MAX_POLYGONS:
            raise ParameterError(f"Polygons must be a list of {MAX_POLYGONS} at most.")
        if polygons and self.images.alignment is not None:
            raise ParameterError(ALIGNED)
        for polygon in polygons:
            if not isinstance(polygon, list) or not 3 <= len(polygon) <= MAX_POINTS:
                raise ParameterError(f"A polygon needs 3 points at least, and {MAX_POINTS} at most.")
            for point in polygon:
                if not (isinstance(point, list) and len(point) == 2 and all(type(at) in (int, float) for at in point)):
                    raise ParameterError("A point must be two numbers, [x, y].")
                if not (0 <= point[0] <= width and 0 <= point[1] <= height):
                    raise ParameterError(f"A point must lie in the drawing of {width} x {height} pixels.")
        content = {"size": [width, height], "polygons": polygons}
        try:
            if polygons:
                drawn(content, "the drawing")
        except InputError as error:
            raise ParameterError(str(error)) from error
        with alone(self.path):
            if polygons:
                write_json(self.path, content)
            else:
                self.path.unlink(missing_ok=True)
        return self.state()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
