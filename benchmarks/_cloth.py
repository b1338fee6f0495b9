"""Drawn pictures of a twill cloth with scratches, stains, pulled threads and holes, for the pictures of docs/.

Every picture depends on its number alone, so a longer range begins with a shorter one.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets.dataset import NORMAL, Dataset

Floats = npt.NDArray[np.float64]
SIZE = 256
Y, X = np.mgrid[:SIZE, :SIZE].astype(float)
DYE = np.array([0.42, 0.52, 0.66])  # red, green, blue
VISIBLE = 0.06  # a mask holds what a defect changes by more, of the range of brightness


def cloth(good: range, bad: range) -> Dataset:
    """Pictures without and with a defect; the kinds of defect take turns."""
    arrays = [_pixels(_clean(i)) for i in good]
    kinds, masks = list(DEFECTS), {}
    for j in bad:
        clean = _clean(j, 1)
        light = np.clip(DEFECTS[kinds[j % len(kinds)]](clean, np.random.default_rng((7, 2, j))), 0, 1)
        masks[len(arrays)] = np.abs(light - clean) > VISIBLE
        arrays.append(_pixels(light))
    images = ImageSet.from_arrays(arrays)
    types = (NORMAL,) * len(good) + tuple(kinds[j % len(kinds)] for j in bad)
    truth = GroundTruth(
        ids=images.ids, labels=(images.ids >= len(good)).astype(np.int8), defect_types=types, masks=masks
    )
    return Dataset("cloth", images, truth)


def _clean(*key: int) -> Floats:
    """(SIZE, SIZE) brightness in [0, 1]: diagonal ribs, threads of uneven thickness, light from a side."""
    stream = np.random.default_rng((7, len(key), *key))
    shift = stream.uniform(0, 12, 2)
    warp, weft = (gaussian_filter1d(stream.normal(0, 1, SIZE), 1.2) for _ in range(2))
    bend = 6 * gaussian_filter1d(stream.normal(0, 1, SIZE), 30)  # px: cloth never lies quite straight
    ribs = np.sin(2 * np.pi * (X + shift[0] + Y + bend[:, None]) / 9)
    threads = np.sin(2 * np.pi * (X + shift[1] - 2 * Y) / 5)
    light = 0.08 * (X - Y + stream.normal(0, 40)) / SIZE
    level = 0.55 + 0.11 * ribs + 0.05 * threads + 0.06 * warp[None, :] + 0.04 * weft[:, None] + light
    return np.clip(level + stream.normal(0, 0.025, level.shape), 0, 1)


def _pixels(light: Floats) -> npt.NDArray[np.uint8]:
    return np.round(255 * np.clip(light[..., None] * (0.35 + DYE), 0, 1)).astype(np.uint8)


def _place(stream: np.random.Generator) -> Floats:
    """A place that leaves a margin, in pixels."""
    return stream.uniform(50, SIZE - 50, 2)


def _scratch(clean: Floats, stream: np.random.Generator) -> Floats:
    (x, y), angle, half = _place(stream), stream.uniform(0, np.pi), stream.uniform(20, 45)
    along = np.cos(angle) * (X - x) + np.sin(angle) * (Y - y)
    across = -np.sin(angle) * (X - x) + np.cos(angle) * (Y - y) + stream.normal(0, 0.002) * along**2
    return clean + 0.4 * np.exp(-((across / 1.3) ** 2)) * (np.abs(along) < half)


def _stain(clean: Floats, stream: np.random.Generator) -> Floats:
    (x, y), radius = _place(stream), stream.uniform(9, 18)
    edge = 4 * gaussian_filter(stream.normal(0, 1, clean.shape), 5) / 0.06
    distance = np.hypot(X - x, 1.3 * (Y - y)) + edge
    return clean * (1 - 0.35 / (1 + np.exp((distance - radius) / 1.5)))


def _pulled(clean: Floats, stream: np.random.Generator) -> Floats:
    (x, y), half = _place(stream), stream.uniform(25, 45)
    loose = np.exp(-(((X - x) / 2) ** 2)) * np.exp(-(((Y - y) / half) ** 4))
    return clean + loose * (0.3 * np.sin(2 * np.pi * Y / 14) + 0.15)


def _hole(clean: Floats, stream: np.random.Generator) -> Floats:
    (x, y), radius = _place(stream), stream.uniform(4, 8)
    turn = np.arctan2(Y - y, X - x)
    distance = np.hypot(X - x, Y - y) + 1.5 * np.sin(3 * turn + stream.uniform(0, 6)) + np.sin(7 * turn)
    fringe = 0.25 * np.exp(-(((distance - radius - 2) / 1.5) ** 2))
    return (clean + fringe) * (1 - 0.85 / (1 + np.exp((distance - radius) / 0.7)))


DEFECTS: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "scratch": _scratch,
    "stain": _stain,
    "pulled thread": _pulled,
    "hole": _hole,
}
