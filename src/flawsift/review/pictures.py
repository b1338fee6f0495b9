"""The pictures of the review page, encoded anew and asked for by id; the last ones are remembered."""

import functools
import io
import stat
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import FileSource, ImageSet
from flawsift.reports.evidence import map_scale, smoothed
from flawsift.reports.overlays import Scale, layer, shrink
from flawsift.reports.places import crop
from flawsift.reports.regions import normal_level, outlines_of
from flawsift.screening.result import Screening

THUMB, PREVIEW = 256, 1200  # pixels of the long edge: a card on a dense screen, a laptop's window
LAYER = 512  # pixels; a heatmap is smooth, the browser stretches it
JPEG_QUALITY = 88
FULL_QUALITY = 95  # of what is looked at pixel by pixel
FULL = 16384  # pixels of the long edge: what browsers draw
THUMBS, PREVIEWS = 4000, 64  # encoded pictures in memory: about 60 and 20 MB
FULLS = 2  # likewise: 10 MB each; the one that is looked at, and one beside it


@dataclass(eq=False)
class Pictures:
    """Those of one screening.

    Attributes:
        screening: With the maps.
        images: Under the same ids.
    """

    screening: Screening
    images: ImageSet

    @functools.cached_property
    def _position(self) -> dict[int, int]:
        return {i: p for p, i in enumerate(self.screening.ids.tolist())}

    def has_place(self, place: int) -> bool:
        """Whether there is such a patch in the images."""
        evidence = self.screening.evidence
        return evidence is not None and 0 <= place < evidence.grid[0] * evidence.grid[1]

    @functools.lru_cache(maxsize=THUMBS)  # noqa: B019
    def place_picture(self, id_: int, place: int, stamp: str) -> bytes | None:
        """One place of an image as JPEG; None where the image cannot be read.

        Args:
            id_: Of the image.
            place: Of the patch grid, row-major.
            stamp: From `stamp`: an image that was changed is made anew.
        """
        if self.screening.evidence is None or not stamp:
            return None
        try:
            picture = crop(self.images.image(id_), self.screening.evidence.grid, place)
        except UnreadableImage:
            return None
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    @functools.cached_property
    def _scale(self) -> Scale | None:
        return map_scale(self.screening)

    def stamp(self, id_: int) -> str:
        """What changes when an image's file does; "" where there is no such file."""
        source = self.images.source
        assert isinstance(source, FileSource)
        try:
            status = source.path(id_).stat()
        except OSError:
            return ""
        # reading a pipe of that name would never end
        return f"{status.st_mtime_ns:x}-{status.st_size:x}" if stat.S_ISREG(status.st_mode) else ""

    def picture(self, kind: str, id_: int, stamp: str) -> bytes | None:
        """An image as JPEG, or its heatmap as PNG; None where there is none.

        Args:
            kind: "thumb", "preview", "full", "thumb-map" or "preview-map".
            id_: Of the image.
            stamp: From `stamp`: an image that was changed is made anew.
        """
        if not stamp:
            return None
        if kind == "full":
            return self._full(id_, stamp)
        return self._thumb(kind, id_, stamp) if kind.startswith("thumb") else self._preview(kind, id_, stamp)

    @functools.lru_cache(maxsize=FULLS)  # noqa: B019
    def _full(self, id_: int, stamp: str) -> bytes | None:
        try:
            picture = shrink(self.images.image(id_), FULL)
        except UnreadableImage:
            return None
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=FULL_QUALITY, subsampling=0)
        return buffer.getvalue()

    def shape(self, id_: int) -> dict[str, Any] | None:
        """Size of an image in pixels, and outlines of what is suspect in it; None where it cannot be read.

        An outline is [x1, y1, x2, y2, ...]; see `flawsift.reports.regions`. A flat map has none.
        """
        try:
            size = self.images.source.size(id_)
        except UnreadableImage:
            return None
        maps = self.screening.patch_maps
        outlines = [] if maps is None else outlines_of(maps[self._position[id_]], self._scale, self._level, size)
        return {"size": size, "outlines": outlines}

    @functools.cached_property
    def _level(self) -> float:
        return normal_level(self.screening)

    @functools.lru_cache(maxsize=THUMBS)  # noqa: B019  # one lives as long as its server
    def _thumb(self, kind: str, id_: int, stamp: str) -> bytes | None:
        return self._make(kind, id_)

    @functools.lru_cache(maxsize=PREVIEWS)  # noqa: B019
    def _preview(self, kind: str, id_: int, stamp: str) -> bytes | None:
        return self._make(kind, id_)

    def _make(self, kind: str, id_: int) -> bytes | None:
        try:
            image = self.images.image(id_)
        except UnreadableImage:
            return None
        buffer = io.BytesIO()
        if kind in ("thumb", "preview"):
            shrink(image, THUMB if kind == "thumb" else PREVIEW).save(buffer, "JPEG", quality=JPEG_QUALITY)
            return buffer.getvalue()
        if self.screening.patch_maps is None or self._scale is None:
            return None
        edge = THUMB if kind == "thumb-map" else LAYER
        position, size = self._position[id_], _fitted(image, edge)
        patch_map, kept = self.screening.patch_maps[position], bool(self.screening.is_kept[position])
        outlines = outlines_of(patch_map, self._scale, self._level, size, kept=kept)
        layer(size, smoothed(patch_map), self._scale, outlines).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()


def _fitted(image: Image.Image, edge: int) -> tuple[int, int]:
    """The picture's shape with this long edge, whether the picture is smaller or larger."""
    ratio = edge / max(image.size)
    return max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
