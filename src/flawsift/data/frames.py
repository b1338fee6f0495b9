"""Images in the rectangle of a network's input: with their aspect ratio, and which part of them counts.

An image whose aspect ratio is another than the rectangle's is brought to its upper left corner, as large as it fits,
and its last row or column of pixels is repeated in what remains: a border of another colour would be an edge where the
product has none. What remains counts for nothing: not for a score, not for what is learned by those who can leave out
patches. Maps leave a detector stretched over the whole image again, so that nobody else need know of the frame; nor of
how images were turned and cropped (`flawsift.data.alignment`), which is undone in the same place.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flawsift.errors import InputError
from flawsift.types import Shape, Size, as_shape

# A network's input is a multiple of some pixels on each edge. Up to this much, an image is stretched to fill it: shapes
# survive that, and a frame would cost every image of the set a border.
STRETCH = 1.05
REDUCING_GAP = 3  # times as many pixels as in the result are left by means of blocks: no pixel differs visibly
MOST_FINER = 4.0  # times as many cells as the crop that a grid over a turned image has on an edge at most: memory
_PARTS = 4  # places on an edge of a cell that are asked whether they are marked, where cells are turned
ROI_EDGE = 256  # cells on the longer edge at which a region of interest is kept: finer than any grid of patches


def with_lowest(maps: Tensor, inside: Tensor) -> Tensor:
    """(B, h, w) maps, outside of (B or 1, h, w) as low as the lowest inside."""
    lowest = maps.masked_fill(~inside, torch.inf).flatten(1).amin(1)
    return torch.where(inside, maps, lowest[:, None, None])


def content_of(picture: tuple[int, int], size: Size) -> Shape:
    """(rows, columns) of a network's input that an image takes.

    Args:
        picture: Width and height of the image.
        size: Of the network's input; a square that images are squeezed into is always filled.
    """
    full = as_shape(size)
    if isinstance(size, int):
        return full
    width, height = picture
    down, across = full[0] / height, full[1] / width
    if max(down, across) <= STRETCH * min(down, across):
        return full
    scale = min(down, across)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def framed(image: Image.Image, size: Size) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 of an RGB image: resized bilinearly with antialiasing, never cropped."""
    rows, columns = content_of(image.size, size)
    image = _resized(image, columns, rows)
    pixels = np.array(image, dtype=np.uint8)
    height, width = as_shape(size)
    if (rows, columns) == (height, width):
        return pixels
    return np.pad(pixels, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")


def _resized(image: Image.Image, columns: int, rows: int) -> Image.Image:
    """Across and then down, rounded in between: left to itself, Pillow chooses the order, from version to version."""
    width, height = image.size
    # means of blocks first keep a 20,000 px wide image from costing seconds
    across, down = (max(1, int(n / to / REDUCING_GAP)) for n, to in ((width, columns), (height, rows)))
    if across > 1 or down > 1:
        image = image.reduce((across, down))
    left = image.height
    if width / across != columns:
        image = image.resize((columns, left), Image.Resampling.BILINEAR, (0, 0, width / across, left))
    if height / down != rows:
        image = image.resize((columns, rows), Image.Resampling.BILINEAR, (0, 0, columns, height / down))
    return image


@dataclass(frozen=True, eq=False)
class Region:
    """A region of interest: the same part of every image, given once.

    Attributes:
        cells: (r, c) bool over the whole image, True where it is looked at.
    """

    cells: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.cells.ndim != 2 or not self.cells.any():
            raise InputError("The region of interest is empty: no part of an image would be looked at.")

    @classmethod
    def of_mask(cls, mask: npt.NDArray[np.bool_]) -> Self:
        """Of a mask (H, W) of one image, True where to look; of a large one, at `ROI_EDGE` cells."""
        scale = min(1.0, ROI_EDGE / max(mask.shape))
        rows, columns = (max(1, round(edge * scale)) for edge in mask.shape)
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((columns, rows), Image.Resampling.BOX)
        return cls(np.asarray(small) >= 128)

    @property
    def share(self) -> float:
        """Of the image."""
        return float(self.cells.mean())

    def as_json(self) -> dict[str, Any]:
        """Ready for model.json: rows, columns, and a bit for each cell, row by row."""
        rows, columns = self.cells.shape
        return {"rows": rows, "columns": columns, "bits": base64.b64encode(np.packbits(self.cells).tobytes()).decode()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Self | None:
        """What `as_json` wrote; None gives None.

        Raises:
            ValueError, KeyError, TypeError, InputError: It is damaged.
        """
        if content is None:
            return None
        rows, columns = int(content["rows"]), int(content["columns"])
        bits = np.frombuffer(base64.b64decode(content["bits"], validate=True), np.uint8)
        if min(rows, columns) < 1 or len(bits) != -(-rows * columns // 8):
            raise ValueError(f"a region of {rows} x {columns} cells has {rows * columns} bits")
        return cls(np.unpackbits(bits, count=rows * columns).astype(np.bool_).reshape(rows, columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and np.array_equal(self.cells, other.cells)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Frame:
    """How some images lie in the network's input.

    Attributes:
        shape: (H, W) of the network's input.
        contents: (B, 2) rows and columns of it that each image takes; None where every image takes all.
        region: Of each image, what counts; None for all.
        turns: (B, 2, 3) `Alignment.to_crop` of images that were turned and cropped; None where they were not.
        finer: `Alignment.finer`, of turned images.
    """

    shape: Shape
    contents: Tensor | None = None
    region: Region | None = None
    turns: Tensor | None = None
    finer: tuple[float, float] = (1.0, 1.0)

    def counted(self, h: int, w: int) -> Tensor | None:
        """(B or 1, h, w) bool on a patch grid: True where a patch counts, by its middle; None where all do.

        At least one patch of an image counts: the first one, or the one nearest to the middle of a region.
        """
        if self.turns is not None:
            return self._within_image(h, w)
        if self.contents is None and self.region is None:
            return None
        rows, columns = self._places(h, 0), self._places(w, 1)  # (B, h), (B, w) in [0, 1) within the image
        # an image thinner than a patch ends before the middle of the first one
        first = [torch.arange(n) == 0 for n in (h, w)]
        inside = ((rows < 1) | first[0])[:, :, None] & ((columns < 1) | first[1])[:, None, :]
        if self.region is None:
            return inside
        cells = self._cells
        i, j = (
            (at.clamp_max(1) * n).long().clamp_max(n - 1) for at, n in zip((rows, columns), cells.shape, strict=True)
        )
        inside = inside & cells[i[:, :, None], j[:, None, :]]
        # A region may lie between the middles of patches. Without a branch, since exported models trace this.
        middle = cells.nonzero().double().mean(0) + 0.5
        across = (columns - middle[1] / cells.shape[1])[:, None, :] ** 2
        away = (rows - middle[0] / cells.shape[0])[:, :, None] ** 2 + across
        nearest = away.flatten(1).argmin(1, keepdim=True)
        flat = inside.flatten(1)
        empty = ~flat.any(1, keepdim=True)
        return flat.scatter(1, nearest, empty | flat.gather(1, nearest)).view(-1, h, w)

    def only_counted(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps with what does not count as low as the lowest that does."""
        inside = self.counted(*maps.shape[1:])
        return maps if inside is None else with_lowest(maps, inside.to(maps.device))

    def over_image(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps of the network's input, stretched so that they cover the image and nothing else.

        Those of turned images are turned back, with as many cells as `over_grid` says; what lies beyond the crop is as
        low as the lowest within.
        """
        if self.turns is not None:
            return self._turned_back(maps)
        if self.contents is None:
            return maps
        for axis in (1, 2):
            n = maps.shape[axis]
            contents = self.contents[:, axis - 1, None].to(maps.device)
            cells = contents * n / self.shape[axis - 1]  # that the image takes
            at = (torch.arange(n, device=maps.device) + 0.5) * (cells / n) - 0.5
            at = torch.minimum(at, (cells - 0.5).ceil() - 1).clamp_min(0)  # up to the last cell that counts
            low = at.floor().long()
            share = (at - low).to(maps.dtype)
            shape = [len(contents), n, 1] if axis == 1 else [len(contents), 1, n]
            index = low.view(shape).expand(maps.shape)
            above = (low + 1).clamp_max(n - 1).view(shape).expand(maps.shape)
            share = share.view(shape)
            maps = maps.gather(axis, index) * (1 - share) + maps.gather(axis, above) * share
        return maps

    def from_image(self, marked: Tensor) -> Tensor:
        """(B, h, w) bool over the images, in the network's input on the same grid: what touches one is marked."""
        if self.contents is None:
            return marked
        for axis in (1, 2):
            n = marked.shape[axis]
            ends = torch.arange(n + 1, dtype=torch.float64) * self.shape[axis - 1] / self.contents[:, axis - 1, None]
            first = ends[:, :-1].floor().clamp_max(n - 1).long()
            last = ends[:, 1:].ceil().clamp_max(n).long()
            sums = F.pad(marked.int().cumsum(axis), (0, 0, 1, 0) if axis == 1 else (1, 0))
            shape = [len(first), n, 1] if axis == 1 else [len(first), 1, n]
            up_to, before = (sums.gather(axis, at.view(shape).expand(marked.shape)) for at in (last, first))
            marked = up_to > before
        return marked

    def back_in_input(self, maps: Tensor, h: int, w: int) -> Tensor:
        """(B, H, W) maps over turned images, bilinearly on an (h, w) grid of what was looked at of them."""
        places = self._to_image(_middles(h, w).expand(self._n_turned, -1, -1)).view(-1, h, w, 2)
        return F.grid_sample(maps[:, None], (2 * places - 1).to(maps), "bilinear", "border", align_corners=False)[:, 0]

    def marks_turned(self, marked: Tensor, h: int, w: int) -> Tensor:
        """(B, H, W) bool over turned images, on an (h, w) grid of the network's input, by `_PARTS` x `_PARTS` places of
        each cell."""
        return _marks_at(marked, self._to_image(_middles(_PARTS * h, _PARTS * w).expand(self._n_turned, -1, -1)), h, w)

    def marks_over_image(self, marked: Tensor, height: int, width: int) -> Tensor:
        """The other way: (B, h, w) bool in the network's input, on a grid over the images."""
        places = self._to_seen(_middles(_PARTS * height, _PARTS * width).expand(self._n_turned, -1, -1))
        return _marks_at(marked, places, height, width)

    def place_over_image(self, places: Tensor, h: int, w: int) -> Tensor:
        """(B,) numbers of cells, row by row, of a grid of the network's input, on `over_grid` of it over the image."""
        rows, columns = places // w, places % w
        if self.turns is not None:
            seen = torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], 1).double()
            x, y = self._to_image(seen[:, None, :])[:, 0].T
            height, width = self.over_grid(h, w)
            row, column = ((at * n).long().clamp(0, n - 1) for at, n in ((y, height), (x, width)))
            over_image: Tensor = row * width + column
            return over_image
        if self.contents is None:
            return places
        over = [
            ((at + 0.5) * self.shape[axis] / self.contents[:, axis].to(at)).long().clamp_max(n - 1)
            for axis, (at, n) in enumerate(((rows, h), (columns, w)))
        ]
        return over[0] * w + over[1]

    def over_grid(self, h: int, w: int) -> Shape:
        """(rows, columns) of a map over the image, of one of the network's input on an (h, w) grid."""
        down, across = limited(self.finer)
        return max(1, round(int(h) * down)), max(1, round(int(w) * across))  # numbers, not inputs of a traced graph

    @property
    def map_shape(self) -> Shape:
        """(H, W) of maps over the images, in pixels: over turned ones square, as many as the input has."""
        if self.turns is None:
            return self.shape
        (height, width), (down, across) = self.shape, self.finer
        scale = min(1.0, (down * across) ** -0.5)
        return max(1, round(height * down * scale)), max(1, round(width * across * scale))

    def _within_image(self, h: int, w: int) -> Tensor:
        """(B, h, w) True where the middle of a turned patch is on the image; what was filled in counts for nothing."""
        places = self._to_image(_middles(h, w).expand(self._n_turned, -1, -1))
        inside = ((places >= 0) & (places <= 1)).all(2).view(-1, h, w)
        return inside | (torch.arange(h * w) == h // 2 * w + w // 2).view(h, w)  # one counts at least

    def _turned_back(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps of the network's input over the images, bilinearly."""
        height, width = self.over_grid(*maps.shape[1:])
        places = self._to_seen(_middles(height, width).expand(self._n_turned, -1, -1)).view(-1, height, width, 2)
        inside = ((places >= 0) & (places <= 1)).all(3).to(maps.device)
        grid = (2 * places - 1).to(maps)
        sampled = F.grid_sample(maps[:, None], grid, "bilinear", "border", align_corners=False)[:, 0]
        lowest = maps.flatten(1).amin(1)
        return torch.where(inside, sampled, lowest[:, None, None])

    @property
    def _n_turned(self) -> int:
        assert self.turns is not None
        return len(self.turns)

    def _to_seen(self, places: Tensor) -> Tensor:
        """(B, n, 2) x and y over the image, from 0 to 1, over the network's input."""
        (a, b, c), (d, e, f) = self._turn
        x, y = places.unbind(2)
        return torch.stack([a * x + b * y + c, d * x + e * y + f], 2) * self._filled

    def _to_image(self, seen: Tensor) -> Tensor:
        """The other way."""
        (a, b, c), (d, e, f) = self._turn
        x, y = (seen / self._filled).unbind(2)
        x, y = x - c, y - f
        return torch.stack([e * x - b * y, a * y - d * x], 2) / (a * e - b * d)[..., None]

    @property
    def _turn(self) -> list[list[Tensor]]:
        """The numbers of `turns`, each (B, 1): written out, since graphs know no solver."""
        assert self.turns is not None
        return [[self.turns[:, i, j, None] for j in range(3)] for i in range(2)]

    @property
    def _filled(self) -> Tensor:
        """(B or 1, 1, 2) share of the network's input that a crop takes, across and down."""
        if self.contents is None:
            return torch.ones(1, 1, 2, dtype=torch.float64)
        return (self.contents / torch.tensor(self.shape, dtype=torch.float64)).flip(1)[:, None]

    def _places(self, n: int, axis: int) -> Tensor:
        """(B or 1, n) where the middles of n cells lie, 1 being the end of the image."""
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        if self.contents is None:
            return middles[None]
        return middles * self.shape[axis] / self.contents[:, axis, None]

    @cached_property
    def _cells(self) -> Tensor:
        assert self.region is not None
        return torch.from_numpy(self.region.cells)


def limited(finer: tuple[float, float]) -> tuple[float, float]:
    """(down, across) how many times as many cells a grid over turned images has as one of the crop, so that hardly a
    place is lost."""
    return min(MOST_FINER, finer[0]), min(MOST_FINER, finer[1])


def _marks_at(marked: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) whether (B, h, w) cells are marked at any of `_PARTS` x `_PARTS` places (x, y) of a cell."""
    h, w = marked.shape[1:]
    column, row = ((places[..., axis] * n).floor() for axis, n in ((0, w), (1, h)))
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    index = row.clamp(0, h - 1).long() * w + column.clamp(0, w - 1).long()
    found = (marked.flatten(1).gather(1, index) & inside).view(-1, 1, _PARTS * height, _PARTS * width)
    return F.max_pool2d(found.float(), _PARTS)[:, 0] > 0


def _middles(h: int, w: int) -> Tensor:
    """(1, h w, 2) x and y of the middles of the cells of a grid, from 0 to 1, row by row."""
    rows, columns = ((torch.arange(int(n), dtype=torch.float64) + 0.5) / int(n) for n in (h, w))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], 2).view(1, -1, 2)
