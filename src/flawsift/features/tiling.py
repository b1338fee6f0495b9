"""Features of large inputs tile by tile: the memory of a network does not grow with the picture.

Tiles overlap, and each cell is taken from the tile in which it lies farthest from an edge that the picture does not
have. A convolutional network gives there what it gives for the whole picture, as far as it sees: the features have no
seams. A transformer sees its tile and nothing else.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flawsift.errors import ParameterError
from flawsift.features.runtimes import Engine
from flawsift.features.trunks import LayerInfo
from flawsift.types import Shape

GRID = 32  # tiles begin at multiples of the coarsest stride, so that their cells are cells of the whole
# Of the longer edge of inputs that are tiled unless asked otherwise, and of their tiles: the default network then takes
# half a gigabyte.
LARGEST = 1024
# Pixels that neighbouring tiles share. The default network sees 160 pixels to each side in its layers of stride 16, but
# hardly the outermost: features differ by 0.2 % from those of the whole picture, by 1 % with 192 and by 3 % with 128.
OVERLAP = 256
STEP = 2 * GRID  # of overlaps: half of one is a border between cells


class Tiles(NamedTuple):
    """How large inputs are cut.

    Attributes:
        edge: Of a tile, in pixels.
        overlap: Pixels that neighbours share.
    """

    edge: int
    overlap: int = OVERLAP

    @classmethod
    def of(cls, given: Sequence[int] | None, shape: Shape) -> "Tiles | None":
        """Checked tiles for an input of a shape; None where it is not cut.

        Raises:
            ParameterError: They cannot be had.
        """
        if given is None:
            return cls(LARGEST) if max(shape) > LARGEST else None
        edge = given[0]
        tiles = cls(edge, given[1] if len(given) > 1 else min(OVERLAP, edge // 2 // STEP * STEP))
        if tiles.edge < 2 * GRID or tiles.edge % GRID:
            raise ParameterError(
                f"tiles need an edge of a multiple of {GRID} pixels, at least {2 * GRID}, got {tiles.edge}."
            )
        if not 0 <= tiles.overlap <= tiles.edge // 2 or tiles.overlap % STEP:
            raise ParameterError(
                f"tiles of {tiles.edge} pixels need an overlap of a multiple of {STEP} up to half of that, "
                f"got {tiles.overlap}."
            )
        return tiles if max(shape) > tiles.edge else None


def tiles_of(given: str | None) -> tuple[int, ...] | None:
    """What --tiles says: an edge, or "edge:overlap"; None for nothing and for "auto".

    Raises:
        ParameterError: It is something else.
    """
    if given is None or given == "auto":
        return None
    parts = given.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ParameterError(
            f"tiles must be auto, an edge such as 512, or an edge and an overlap 512:128, got '{given}'."
        )
    return tuple(map(int, parts))


class Span(NamedTuple):
    """Along one edge: a tile from `start` on, of which [first, end) is used."""

    start: int
    first: int
    end: int


def spans(n: int, tiles: Tiles) -> list[Span]:
    """The tiles along an edge of n pixels, which they cover once, each as far from its artificial ends as can be."""
    edge, step = min(tiles.edge, n), tiles.edge - tiles.overlap
    starts = [*range(0, max(1, n - edge), step), n - edge] if n > edge else [0]
    starts = sorted(set(starts))
    borders = [(left + edge + right) // (2 * GRID) * GRID for left, right in pairwise(starts)]
    return [Span(*one) for one in zip(starts, [0, *borders], [*borders, n], strict=True)]


class TiledEngine:
    """Runs an engine of the size of a tile over larger inputs."""

    def __init__(self, engine: Engine, layers: Sequence[LayerInfo], shape: Shape, tiles: Tiles) -> None:
        self._engine, self._layers, self._shape = engine, layers, shape
        self._edges = [min(tiles.edge, edge) for edge in shape]
        self._spans = [spans(edge, tiles) for edge in shape]
        self.name = engine.name

    def run(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """As `Engine.run`; a class token is the mean of those of the tiles."""
        strides = [self._layers[tap].stride for tap in taps]
        whole = []
        for tap, stride in zip(taps, strides, strict=True):
            grid = [-(-edge // stride) for edge in self._shape] if stride else [1, 1]
            whole.append(torch.zeros(len(pixels), self._layers[tap].channels, *grid))
        n_tiles = len(self._spans[0]) * len(self._spans[1])
        (height, width), (down, across) = self._edges, self._spans
        for row in down:
            for column in across:
                tile = pixels[:, :, row.start : row.start + height, column.start : column.start + width]
                for out, part, stride in zip(whole, self._engine.run(tile.contiguous(), taps), strides, strict=True):
                    if not stride:
                        out += part / n_tiles
                        continue
                    i, j = (_cells(span, stride, part.shape[axis]) for axis, span in ((2, row), (3, column)))
                    out[:, :, i[0], j[0]] = part[:, :, i[1], j[1]]
        return whole


def _cells(span: Span, stride: int, n: int) -> tuple[slice, slice]:
    """The cells of a tile that are used, in the whole and in the tile of n cells."""
    first, end, start = span.first // stride, -(-span.end // stride), span.start // stride
    end = min(end, start + n)
    return slice(first, end), slice(first - start, end - start)
