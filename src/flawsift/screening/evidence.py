"""Evidence on disk: an archive of arrays, every number of which is checked when it is read."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawsift.detectors.protocols import Evidence
from flawsift.files import write_bytes
from flawsift.types import Ids


def save_evidence(evidence: Evidence | None, order: npt.NDArray[np.int64], path: Path) -> None:
    """Write the file, with the images in the order of `order`, or remove it where there is no evidence."""
    if evidence is None:
        path.unlink(missing_ok=True)  # of an earlier screening
        return
    rows = {name: values[order] for name, values in vars(evidence).items() if name != "grid"}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, grid=np.array(evidence.grid, np.int64), **rows)
    write_bytes(path, buffer.getvalue())


def load_evidence(path: Path, ids: Ids) -> Evidence | None:
    """From disk, with every id and every place checked: pages look pictures up by them."""
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        grid, places, n_others = (np.asarray(file[name], np.int64) for name in ("grid", "places", "n_others"))
        images, image_places = (np.asarray(file[name], np.int64) for name in ("images", "image_places"))
        distances = np.asarray(file["distances"], np.float32)
    n, k = len(ids), images.shape[-1] if images.ndim else 0
    shapes = [values.shape for values in (grid, places, n_others, images, image_places, distances)]
    if shapes != [(2,), (n,), (n,), (n, k), (n, k), (n, k)]:
        raise ValueError(f"{path.name} has the shapes {shapes}, {n} images are listed")
    n_places, is_none = int(grid[0]) * int(grid[1]), images == -1
    if grid.min() < 1 or not _within(places, 0, n_places) or not _within(image_places[~is_none], 0, n_places):
        raise ValueError(f"{path.name} names a place off the grid")
    if not np.isin(images[~is_none], ids).all():
        raise ValueError(f"{path.name} names an image that is not in the table")
    if (image_places[is_none] != -1).any() or (np.isfinite(distances) == is_none).any() or n_others.min() < 0:
        raise ValueError(f"{path.name} does not fit together")
    return Evidence((int(grid[0]), int(grid[1])), places, images, image_places, distances, n_others)


def _within(values: npt.NDArray[np.int64], low: int, end: int) -> bool:
    return bool(((low <= values) & (values < end)).all())
