"""Detectors that compare a place with the same part of other images: one memory for each tile of a large input.

Features of tiles are stitched, so that a tile is a part of the patch grid: it answers for the places that lie in no
other tile, or farther from its edges than from those of others, and compares them with all places within its edges.
What it shares with its neighbours leaves room for parts that do not lie exactly alike.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flawsift.detectors.base import Detector
from flawsift.detectors.parts.groups import GroupNeighbors
from flawsift.detectors.parts.neighbors import NearestNeighbors
from flawsift.errors import InputError, ParameterError
from flawsift.features.tiling import Span, Tiles, spans, tiles_of
from flawsift.types import Shape

PARAMETER = "tiles_by_position"  # of the detectors that can do it: "EDGE:OVERLAP" in pixels, or None


class Window(NamedTuple):
    """A tile on a patch grid.

    Attributes:
        own: (n,) places that it answers for, row-major.
        seen: (m,) places that they are compared with.
    """

    own: Tensor
    seen: Tensor


def is_tiling(text: str | None) -> bool:
    """Whether it says how an input is cut, or is None."""
    return text is None or re.fullmatch(r"[0-9]+:[0-9]+", text) is not None


def are_edges(value: object) -> bool:
    """Whether it is a height and a width, as they are learned."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 1 for n in value)


def compared_by_tile(detector: Detector, tiles: Tiles | None) -> Detector:
    """A detector, unfitted, that compares within each of the tiles that the input is cut into.

    Raises:
        ParameterError: It cannot, compares place by place anyway, or the input is not cut.
    """
    if not hasattr(detector, PARAMETER):
        raise ParameterError(f"The detector {detector.name} has no memory for each tile: use quorum or patchcore.")
    if tiles is None:
        raise ParameterError("The images are looked at in one piece: tiles by position need smaller --tiles.")
    return detector.clone(**{PARAMETER: f"{tiles.edge}:{tiles.overlap}"})


def windows(given: str, size: Shape, grid: Sequence[int]) -> list[Window]:
    """The tiles on a patch grid (h, w) over an input of a size in pixels; their own places are each place once.

    Args:
        given: "EDGE:OVERLAP".
        size: Of the network's input.
        grid: Rows and columns.

    Raises:
        ParameterError: Such tiles cannot be had.
    """
    tiles = Tiles.of(tiles_of(given), size)
    cut = [[Span(0, 0, edge)] for edge in size] if tiles is None else [spans(edge, tiles) for edge in size]
    reach = max(size) if tiles is None else tiles.edge
    rows, columns = ([_along(span, reach, *of) for span in some] for some, *of in zip(cut, size, grid, strict=True))
    return [Window(*map(_places, row, column)) for row in rows for column in columns]


def _along(span: Span, reach: int, edge: int, n: int) -> tuple[Tensor, Tensor]:
    """(n,) bool of the cells along an edge: those whose middle a tile answers for, and those within it."""
    middles = (torch.arange(n) + 0.5) * edge / n
    own = (span.first <= middles) & (middles < span.end)
    return own, (span.start <= middles) & (middles < span.start + reach)


def _places(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] & columns).flatten().nonzero()[:, 0]


def tile_of(tiles: Sequence[Window]) -> Tensor:
    """(P,) number of the tile that answers for each place."""
    numbers = torch.empty(sum(len(one.own) for one in tiles), dtype=torch.int64)
    for number, one in enumerate(tiles):
        numbers[one.own] = number
    return numbers


def check_grid(fitted: Sequence[int], grid: Sequence[int]) -> None:
    """Raise InputError where features have another patch grid than those that tiles were laid over."""
    if list(fitted) != list(grid):
        raise InputError(
            f"Tiles lie on a patch grid of {tuple(fitted)}, these features have {tuple(grid)}. Use the input size that "
            "the detector was fitted with."
        )


class PlacedGroups:
    """`GroupNeighbors` that know where a query lies.

    Args:
        tiles: That places are compared within; None for anywhere.
        make: The search among some places of the bank.
    """

    def __init__(self, tiles: Sequence[Window] | None, make: Callable[[Tensor | slice], GroupNeighbors]) -> None:
        self._tiles = tiles
        self._searches = [make(slice(None))] if tiles is None else [make(one.seen) for one in tiles]
        self._tile = None if tiles is None else tile_of(tiles)
        self.n_groups = self._searches[0].n_groups

    def query(self, queries: Tensor, places: Tensor, k: int, own: Tensor | None = None) -> Tensor:
        """As `GroupNeighbors.query`, of queries at (Q,) places."""
        if self._tile is None:
            return self._searches[0].query(queries, k, own)
        result = torch.full((len(queries), k), torch.inf)
        for mine, search, _ in self._by_tile(places):
            result[mine] = search.query(queries[mine], k, None if own is None else own[mine]).cpu()
        return result

    def nearest_patches(self, queries: Tensor, places: Tensor, k: int, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `GroupNeighbors.nearest_patches`, of queries at (Q,) places."""
        if self._tile is None:
            return self._searches[0].nearest_patches(queries, k, own)
        distances = torch.full((len(queries), k), torch.nan)
        images, found = torch.full((2, len(queries), k), -1)
        for mine, search, tile in self._by_tile(places):
            near = [part.cpu() for part in search.nearest_patches(queries[mine], k, own[mine])]
            distances[mine], images[mine] = near[:2]
            found[mine] = torch.where(near[2] < 0, -1, tile.seen[near[2].clamp_min(0)])
        return distances, images, found

    def _by_tile(self, places: Tensor) -> list[tuple[Tensor, GroupNeighbors, Window]]:
        """Which of the (Q,) places each tile answers for, of those that any is in."""
        assert self._tiles is not None
        assert self._tile is not None
        numbers = self._tile[places]
        there = [(numbers == number).nonzero()[:, 0] for number in range(len(self._tiles))]
        return [one for one in zip(there, self._searches, self._tiles, strict=True) if len(one[0])]


class PlacedNeighbors:
    """`NearestNeighbors` with a bank for each tile.

    Args:
        bank: (M, C).
        tile: (M,) number of the tile that each entry is in.
        tiles: The tiles.
    """

    def __init__(self, bank: Tensor, tile: Tensor, tiles: Sequence[Window]) -> None:
        self._tiles = tiles
        self._rows = [(tile == number).nonzero()[:, 0] for number in range(len(tiles))]
        self._searches = [NearestNeighbors(bank[rows]) if len(rows) else None for rows in self._rows]
        self._least = min(len(rows) for rows in self._rows if len(rows))

    def query_grid(self, embedding: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
        """As `flawsift.detectors.parts.neighbors.query_grid`; k is at most the smallest bank.

        A tile without a bank, where nothing was to be learned, is infinitely far from everything.
        """
        b, c, h, w = embedding.shape
        k, patches = min(k, self._least), embedding.flatten(2).transpose(1, 2)  # (B, P, C)
        distances = patches.new_full((b, h * w, k), torch.inf)
        entries = torch.zeros_like(distances, dtype=torch.int64)
        for tile, rows, search in zip(self._tiles, self._rows, self._searches, strict=True):
            if search is not None:
                found, which = search.query(patches[:, tile.own].reshape(-1, c), k=k)
                distances[:, tile.own] = found.view(b, -1, k)
                entries[:, tile.own] = rows.to(which.device)[which].view(b, -1, k)
        return distances.view(b, h, w, k), entries.view(b, h, w, k)
