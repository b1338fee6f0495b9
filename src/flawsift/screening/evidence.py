"""Evidence on disk: an archive of arrays, every number of which is checked when it is read."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawsift.detectors.protocols import Evidence
from flawsift.files import write_bytes
from flawsift.types import Ids


def save_evidence(evidence: Evidence | None, order: npt.NDArray[np.int64], path: Path) -> None:
    """Write the file, with the images in the order of `order`, where there is evidence."""
    if evidence is None:
        return
    rows = {name: values[order] for name, values in vars(evidence).items() if name != "grid"}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, grid=np.array(evidence.grid, np.int64), **rows)
    write_bytes(path, buffer.getvalue())


def load_evidence(data: bytes, name: str, ids: Ids) -> Evidence:
    """From the content of a file, with every id and every place checked: pages look pictures up by them."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        grid, places, n_others = (np.asarray(file[key], np.int64) for key in ("grid", "places", "n_others"))
        images, image_places = (np.asarray(file[key], np.int64) for key in ("images", "image_places"))
        distances = np.asarray(file["distances"], np.float32)
    n, k = len(ids), images.shape[-1] if images.ndim else 0
    shapes = [values.shape for values in (grid, places, n_others, images, image_places, distances)]
    if shapes != [(2,), (n,), (n,), (n, k), (n, k), (n, k)]:
        raise ValueError(f"{name} has the shapes {shapes}, {n} images are listed")
    n_places, is_none = int(grid[0]) * int(grid[1]), images == -1
    if grid.min() < 1 or not _within(places, 0, n_places) or not _within(image_places[~is_none], 0, n_places):
        raise ValueError(f"{name} names a place off the grid")
    if not np.isin(images[~is_none], ids).all():
        raise ValueError(f"{name} names an image that is not in the table")
    if (image_places[is_none] != -1).any() or (np.isfinite(distances) == is_none).any() or n_others.min() < 0:
        raise ValueError(f"{name} does not fit together")
    return Evidence((int(grid[0]), int(grid[1])), places, images, image_places, distances, n_others)


def _within(values: npt.NDArray[np.int64], low: int, end: int) -> bool:
    return bool(((low <= values) & (values < end)).all())
