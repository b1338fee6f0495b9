"""Where a defect ends in a smooth anomaly map: regions with boxes and outlines, for other tools.

A map is wide around a defect: a patch that touches it is unlike the normal ones, and features see beyond their patch. A
line at the image threshold is then many times as large as the defect. What lies within is the top of its own hill.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from flawsift.reports.overlays import Scale

if TYPE_CHECKING:
    from flawsift.screening.result import Screening  # with torch, which a machine that runs exported models lacks

Floats = npt.NDArray[np.float32]
Cells = npt.NDArray[np.bool_]

# Height of a defect's edge between what is normal and its peak. A step that is blurred evenly has its edge at one half;
# distances between features rise faster, since a patch of which a part is defective is nearly as unlike. Of synthetic
# defects of four textures, and of tiles, screws, cookies and papers, boxes overlap best from 0.75 to 0.82 (median
# intersection over union 0.7 to 0.6, and 0.3 to 0.4), and smaller defects better at the upper end.
EDGE = 0.8
GRID = 96  # cells a side in which regions of a prediction are searched: twice as fine as any detector sees
NEIGHBOURS = np.ones((3, 3))  # cells that touch at a corner are one region


class Region(NamedTuple):
    """One region of a picture, in pixels.

    Attributes:
        box: [x, y, width, height].
        polygons: Outlines [x1, y1, x2, y2, ...]; several where parts touch at corners only. Holes are filled.
        area: Of the polygons.
    """

    box: list[float]
    polygons: list[list[float]]
    area: float


def normal_level(screening: "Screening") -> float:
    """What an ordinary place of an ordinary image scores: the median of the maps of kept images."""
    maps = screening.counted_maps
    assert maps is not None
    kept = maps[screening.is_kept].astype(np.float32)
    kept = kept[~np.isnan(kept)]
    return float(np.median(kept)) if kept.size else 0.0


def regions(
    patch_map: npt.NDArray[np.float16], scale: Scale | None, level: float, size: tuple[int, int]
) -> list[Region]:
    """The regions of one image that are suspect; the whole picture where its map is flat.

    Each is around a peak above the threshold, or the highest one where none is: all that is connected with it and
    reaches `EDGE` of its height above what is normal. A peak whose region has a higher one in it is no peak of its own.

    Args:
        patch_map: (h, w), as stage 1 stores it.
        scale: With the threshold.
        level: See `normal_level`.
        size: (width, height) of the picture.
    """
    from flawsift.reports.evidence import smoothed

    values = smoothed(patch_map).numpy()
    if scale is None or values.min() == values.max():
        return [_region(np.ones((1, 1), np.bool_), size)]
    return regions_of(values, scale.threshold, min(level, float(values.max())), size)


def outlines_of(
    patch_map: npt.NDArray[np.float16], scale: Scale | None, level: float, size: tuple[int, int], *, kept: bool = False
) -> list[list[float]]:
    """The outlines of all `regions` of one image; none where its map is flat.

    Nor on one that is kept and stays below the threshold: every image has a highest place.
    """
    from flawsift.reports.evidence import smoothed

    if np.ptp(patch_map) == 0 or (kept and scale is not None and not smoothed(patch_map).max() > scale.threshold):
        return []
    return [line for one in regions(patch_map, scale, level, size) for line in one.polygons]


def regions_of_prediction(map_: Floats, threshold: float, size: tuple[int, int]) -> list[Region]:
    """The regions of an image that is called anomalous, by its map (h, w), on a picture of a size (width, height).

    An ordinary place is the median of the map: defects cover less than half of one.
    """
    values = np.nan_to_num(map_.astype(np.float32))
    if max(values.shape) > GRID:
        height, width = (max(1, round(edge * GRID / max(values.shape))) for edge in values.shape)
        values = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BOX), np.float32)
    return regions_of(values, threshold, float(np.median(values)), size)


def outlines_of_prediction(
    map_: Floats, score: float, threshold: float | None, size: tuple[int, int]
) -> list[list[float]]:
    """The outlines of all regions of an image; none unless its score is above the threshold.

    Args:
        map_: (h, w), whose highest place is the score.
        score: Of the image.
        threshold: In force, or None.
        size: (width, height) of the picture.
    """
    if threshold is None or not score > threshold:
        return []
    return [line for one in regions_of_prediction(map_, threshold, size) for line in one.polygons]


def regions_of(values: Floats, threshold: float, level: float, size: tuple[int, int]) -> list[Region]:
    """The regions of a map (h, w) on a picture of a size (width, height), by the rule of `regions`."""
    return [_region(cells, size) for cells in hills(values, threshold, level)]


def hills(values: Floats, threshold: float, level: float) -> list[Cells]:
    """The cells (h, w) of each region of a map (h, w), by the rule of `regions`; the highest peak first."""
    is_peak = ndimage.maximum_filter(values, 3) == values
    is_peak &= (values > threshold) if (values > threshold).any() else values == values.max()
    places = sorted(zip(*np.nonzero(is_peak), strict=True), key=lambda at: -float(values[at]))
    taken = np.zeros(values.shape, np.bool_)
    found: list[Cells] = []
    for at in places:
        if taken[at]:
            continue
        parts, _ = ndimage.label(values >= level + EDGE * (values[at] - level), NEIGHBOURS)
        cells: Cells = ndimage.binary_fill_holes(parts == parts[at])
        if not (cells & taken).any():
            taken |= cells
            found.append(cells)
    return found


def _region(cells: Cells, size: tuple[int, int]) -> Region:
    """Cells of a grid over the whole picture."""
    per_x, per_y = size[0] / cells.shape[1], size[1] / cells.shape[0]
    rows, columns = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
    x, y = columns[0] * per_x, rows[0] * per_y
    width, height = (columns[-1] + 1) * per_x - x, (rows[-1] + 1) * per_y - y
    polygons = [[round(v, 2) for c, r in line for v in (c * per_x, r * per_y)] for line in outlines(cells)]
    area = float(cells.sum()) * per_x * per_y
    return Region([round(float(v), 2) for v in (x, y, width, height)], polygons, round(area, 2))


def outlines(cells: Cells) -> list[list[tuple[int, int]]]:
    """Closed lines (column, row) along the edges of cells (h, w), the cells on their right, corners only."""
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    padded = np.pad(cells, 1)
    for row, column in zip(*np.nonzero(cells), strict=True):
        r, c = int(row), int(column)
        corners = [(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1)]
        # clockwise from above
        beyond = [padded[r, c + 1], padded[r + 1, c + 2], padded[r + 2, c + 1], padded[r + 1, c]]
        for start, is_inside in enumerate(beyond):
            if not is_inside:
                edges.setdefault(corners[start], []).append(corners[(start + 1) % 4])
    lines = []
    while edges:
        first = at = next(iter(edges))
        line: list[tuple[int, int]] = []
        while True:
            ends = edges[at]
            following = ends.pop()
            if not ends:
                del edges[at]
            line.append(at)
            at = following
            if at == first:
                break
        around = zip(line[-1:] + line[:-1], line, line[1:] + line[:1], strict=True)
        lines.append([here for before, here, after in around if not _is_straight(before, here, after)])
    return lines


def _is_straight(before: tuple[int, int], here: tuple[int, int], after: tuple[int, int]) -> bool:
    return before[0] == here[0] == after[0] or before[1] == here[1] == after[1]
