"""Procedural products with procedural defects, in memory: for tests, examples and studies that need no download.

Every image is drawn from its own random stream, keyed by the seed and its place among the images of its kind, so that
a larger set begins with exactly the images of a smaller one. No global random state is read or changed.

Every defect is visible, by construction: see `MIN_CONTRAST`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets.dataset import NORMAL, Dataset
from flawsift.errors import OutputError, ParameterError, unknown_name
from flawsift.files import new_folder
from flawsift.paths import show
from flawsift.types import Ids

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Mean absolute difference of grey inside the mask, in grey levels of 255, between a defective image and the same image
# without the defect. 30 is five standard deviations of the pixel noise below, and plain to the eye.
MIN_CONTRAST = 30.0
NOISE = 6.0  # standard deviation of the pixel noise, grey levels: about that of an industrial camera at some gain
LIGHT = 0.06  # brightness differs by up to this share between images
SHIFT_ALIGNED = 0.004  # jitter of an aligned product, share of the edge: a fixture has play too
MIN_SIZE = 16  # below, a defect is a few pixels
REDRAWS = 64  # draws before a defect is forced
FORCED = 64.0  # grey levels by which a defect is forced; no pixel clips, as it is moved away from its nearer end

_PRODUCT, _NORMAL, _ANOMALOUS, _RECURRING = range(4)  # random streams of one seed


class Pair(NamedTuple):
    """A defective image and its twin without the defect.

    Attributes:
        clean: (H, W, 3).
        defective: (H, W, 3), equal to `clean` outside of the mask.
        mask: (H, W), at least one pixel.
        defect_type: One of `DEFECTS`.
    """

    clean: Pixels
    defective: Pixels
    mask: Mask
    defect_type: str


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is drawn. Its fields are the parameters of `synthetic`, which explains them."""

    size: int = 64
    seed: int = 0
    texture: str = "stripes"
    align: bool = True
    rare_share: float = 0.0
    recurring: bool = False

    def __post_init__(self) -> None:
        if self.size < MIN_SIZE:
            raise ParameterError(f"synthetic.size must be at least {MIN_SIZE}, got {self.size}.")
        if self.seed < 0:
            raise ParameterError(f"synthetic.seed must be 0 or larger, got {self.seed}.")
        if self.texture not in TEXTURES:
            raise ParameterError(unknown_name("texture", self.texture, TEXTURES))
        if not 0 <= self.rare_share <= 1:
            raise ParameterError(f"synthetic.rare_share must be in [0, 1], got {self.rare_share}.")

    def normal(self, index: int) -> Pixels:
        """The normal image of this index, (size, size, 3)."""
        return self._clean(self._stream(_NORMAL, index), rare=_is_rare(index, self.rare_share))

    def anomalous(self, index: int) -> Pair:
        """The anomalous image of this index and its clean twin. Anomalous images are never of the rare variant."""
        clean = self._clean(self._stream(_ANOMALOUS, index, 0), rare=False)
        # what recurs is one event of production: kind, place and size; the product around it differs as ever
        key = (_RECURRING, 0) if self.recurring else (_ANOMALOUS, index, 1)
        number = 0 if self.recurring else index
        defect_type = tuple(DEFECTS)[(self.seed + number) % len(DEFECTS)]
        defective, mask = _draw_visible(clean, DEFECTS[defect_type], self._stream(*key))
        return Pair(clean, defective, mask, defect_type)

    def _stream(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, *key]))

    def _clean(self, stream: np.random.Generator, *, rare: bool) -> Pixels:
        shift = stream.uniform(-SHIFT_ALIGNED, SHIFT_ALIGNED, 2) if self.align else stream.uniform(0, 1, 2)
        angle = 0.0 if self.align else stream.uniform(0, 2 * np.pi)
        light = 1 + stream.uniform(-LIGHT, LIGHT)
        product = self._stream(_PRODUCT, int(rare))
        level = TEXTURES[self.texture](*_coordinates(self.size, shift, angle), product)
        dark, bright = product.uniform(50, 90, 3), product.uniform(150, 200, 3)
        image = (dark + (bright - dark) * level[..., None]) * light
        # one noise value for the three channels: a grey sensor; colour noise would need a larger MIN_CONTRAST
        image += stream.normal(0, NOISE, level.shape)[..., None]
        return _to_bytes(image)


def synthetic(
    n_normal: int = 100,
    n_anomalous: int = 20,
    *,
    size: int = 64,
    seed: int = 0,
    texture: str = "stripes",
    align: bool = True,
    rare_share: float = 0.0,
    recurring: bool = False,
) -> Dataset:
    """Images of one procedural product, all with masks; no official split.

    Ids are 0..n_normal-1 for normal images, then the anomalous ones. Neither the i-th normal nor the j-th anomalous
    image depends on how many there are. The defect types take turns: spot, scratch, missing, swap.

    Args:
        n_normal: Number of normal images.
        n_anomalous: Number of anomalous images.
        size: Edge length in pixels, at least 16.
        seed: Draws the product and everything on it.
        texture: "stripes", "weave", "blobs" or "plate" (an object on a background).
        align: Whether the product lies in a fixture; otherwise it is shifted and turned freely.
        rare_share: Share of normal images in a second normal variant, with other numbers of the same texture and
            other colours: rare and yet good. `rare_ids` tells which.
        recurring: Whether all anomalous images have the same defect at the same place, as a worn tool leaves it.

    Raises:
        ParameterError: A parameter is out of its range.
    """
    if n_normal < 0 or n_anomalous < 0 or n_normal + n_anomalous == 0:
        raise ParameterError(f"synthetic needs at least one image, got {n_normal} normal and {n_anomalous} anomalous.")
    product = Product(size=size, seed=seed, texture=texture, align=align, rare_share=rare_share, recurring=recurring)
    pairs = [product.anomalous(j) for j in range(n_anomalous)]
    arrays = [product.normal(i) for i in range(n_normal)] + [p.defective for p in pairs]
    images = ImageSet.from_arrays(arrays)
    truth = GroundTruth(
        ids=images.ids,
        labels=(images.ids >= n_normal).astype(np.int8),
        defect_types=(NORMAL,) * n_normal + tuple(p.defect_type for p in pairs),
        masks={n_normal + j: p.mask for j, p in enumerate(pairs)},
    )
    return Dataset("synthetic", images, truth)


def rare_ids(n_normal: int, rare_share: float) -> Ids:
    """Global ids of the normal images of `synthetic` that are of the rare variant.

    >>> rare_ids(10, 0.2)
    array([4, 9])
    """
    return np.array([i for i in range(n_normal) if _is_rare(i, rare_share)], dtype=np.int64)


def _is_rare(index: int, share: float) -> bool:
    # evenly spaced: exact shares, and independent of the number of images. The addend absorbs 0.1 * 30 < 3
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


# ---- textures: coordinates in units of the edge -> level in [0, 1] ---------------------------------------------------


def _coordinates(size: int, shift: Floats, angle: float) -> tuple[Floats, Floats]:
    """(size, size) coordinates about the centre, turned by `angle`, then shifted."""
    axis = (np.arange(size) + 0.5) / size - 0.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    u = np.cos(angle) * x - np.sin(angle) * y + shift[0]
    v = np.sin(angle) * x + np.cos(angle) * y + shift[1]
    return u, v


def _stripes(u: Floats, v: Floats, product: np.random.Generator) -> Floats:
    angle, count, phase = product.uniform(0, np.pi), product.uniform(4, 8), product.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * count * (np.cos(angle) * u + np.sin(angle) * v) + phase)
    return np.asarray(0.5 + 0.5 * np.tanh(2 * wave))


def _weave(u: Floats, v: Floats, product: np.random.Generator) -> Floats:
    count, phase = product.uniform(4, 7), product.uniform(0, 2 * np.pi, 2)
    warp = np.sin(2 * np.pi * count * u + phase[0])
    weft = np.sin(2 * np.pi * count * v + phase[1])
    return np.asarray(0.5 + 0.5 * np.tanh(2 * warp * weft))


def _blobs(u: Floats, v: Floats, product: np.random.Generator) -> Floats:
    """A sum of plane waves of random directions: mottled, without a period."""
    angles, phases = product.uniform(0, 2 * np.pi, 12), product.uniform(0, 2 * np.pi, 12)
    counts = product.uniform(2, 6, 12)
    wave = sum(
        np.sin(2 * np.pi * n * (np.cos(a) * u + np.sin(a) * v) + p)
        for n, a, p in zip(counts, angles, phases, strict=True)
    )
    return np.asarray(0.5 + 0.5 * np.tanh(wave / 2))


def _plate(u: Floats, v: Floats, product: np.random.Generator) -> Floats:
    """A round plate with a ring of holes, on a dark ground."""
    u, v = (u + 0.5) % 1 - 0.5, (v + 0.5) % 1 - 0.5  # a free shift wraps, so that the plate stays in view
    holes, turn = int(product.integers(3, 7)), product.uniform(0, 2 * np.pi)
    radius, ring, bore = product.uniform(0.36, 0.42), product.uniform(0.2, 0.25), product.uniform(0.05, 0.07)
    level = 0.85 * _edge(radius - np.hypot(u, v))
    for k in range(holes):
        angle = turn + 2 * np.pi * k / holes
        level = level * (1 - _edge(bore - np.hypot(u - ring * np.cos(angle), v - ring * np.sin(angle))))
    return level


def _edge(distance: Floats) -> Floats:
    """1 inside (positive), 0 outside, with a soft border."""
    return np.asarray(np.clip(0.5 + distance * 40, 0, 1))


TEXTURES: dict[str, Callable[[Floats, Floats, np.random.Generator], Floats]] = {
    "stripes": _stripes,
    "weave": _weave,
    "blobs": _blobs,
    "plate": _plate,
}

# ---- defects: clean image -> what lies there now, and where ----------------------------------------------------------


def _spot(clean: Pixels, stream: np.random.Generator) -> tuple[Floats, Mask]:
    """An elliptic stain of one colour, half transparent."""
    size = len(clean)
    radii = stream.uniform(0.05, 0.11, 2)
    u, v = _coordinates(size, -_place(stream), 0.0)
    mask = (u / radii[0]) ** 2 + (v / radii[1]) ** 2 < 1
    colour = stream.uniform(0, 255, 3)
    return 0.3 * clean + 0.7 * colour, mask


def _scratch(clean: Pixels, stream: np.random.Generator) -> tuple[Floats, Mask]:
    """A bent line, bright or dark."""
    size = len(clean)
    start, angle = _place(stream), stream.uniform(0, 2 * np.pi)
    length, bend, half_width = stream.uniform(0.15, 0.35), stream.uniform(-0.06, 0.06), stream.uniform(0.012, 0.02)
    u, v = _coordinates(size, np.zeros(2), 0.0)
    along = np.cos(angle) * (u - start[0]) + np.sin(angle) * (v - start[1])
    across = -np.sin(angle) * (u - start[0]) + np.cos(angle) * (v - start[1])
    across = across - bend * np.sin(np.pi * along / length)
    mask = (np.abs(along) < length / 2) & (np.abs(across) < max(half_width, 1 / size))
    return np.full(clean.shape, stream.choice([15.0, 240.0])), mask


def _missing(clean: Pixels, stream: np.random.Generator) -> tuple[Floats, Mask]:
    """A patch with the product's surface gone: nearly one dark grey."""
    u, v = _coordinates(len(clean), -_place(stream), stream.uniform(0, np.pi))
    radii = stream.uniform(0.06, 0.12, 2)
    mask = (np.abs(u) < radii[0]) & (np.abs(v) < radii[1])
    return stream.uniform(10, 30) + stream.normal(0, NOISE, (*mask.shape, 1)) + np.zeros(3), mask


def _swap(clean: Pixels, stream: np.random.Generator) -> tuple[Floats, Mask]:
    """A square patch turned by 90 degrees and put back: its pixels are all normal, their place is not."""
    size = len(clean)
    edge = int(size * stream.uniform(0.16, 0.28))
    y, x = stream.integers(0, size - edge, 2)
    patch = (slice(y, y + edge), slice(x, x + edge))
    painted = clean.astype(np.float64)
    painted[patch] = np.rot90(painted[patch])
    mask = np.zeros((size, size), np.bool_)
    mask[patch] = True
    return painted, mask


def _place(stream: np.random.Generator) -> Floats:
    """A point well inside the image, as (x, y) about the centre."""
    return stream.uniform(-0.32, 0.32, 2)


DEFECTS: dict[str, Callable[[Pixels, np.random.Generator], tuple[Floats, Mask]]] = {
    "spot": _spot,
    "scratch": _scratch,
    "missing": _missing,
    "swap": _swap,
}


def _draw_visible(
    clean: Pixels, draw: Callable[[Pixels, np.random.Generator], tuple[Floats, Mask]], stream: np.random.Generator
) -> tuple[Pixels, Mask]:
    """Redraw until the defect is visible, then force it."""
    for _ in range(REDRAWS):
        painted, mask = draw(clean, stream)
        defective = np.where(mask[..., None], _to_bytes(painted), clean)
        if mask.any() and contrast(clean, defective, mask) >= MIN_CONTRAST:
            return defective, mask
    if not mask.any():
        mask[len(mask) // 2, len(mask) // 2] = True
    away = np.where(clean.mean(axis=2, keepdims=True) < 128, FORCED, -FORCED)
    return np.where(mask[..., None], _to_bytes(clean + away), clean), mask


def contrast(clean: Pixels, defective: Pixels, mask: Mask) -> float:
    """Mean absolute difference of grey (the mean of the channels) inside a mask, in grey levels.

    Args:
        clean: (H, W, 3).
        defective: (H, W, 3).
        mask: (H, W), at least one pixel.
    """
    difference = np.abs(defective.mean(axis=2) - clean.mean(axis=2))
    return float(difference[mask].mean())


def _to_bytes(image: Floats | Pixels) -> Pixels:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def write_mvtec(data: Dataset, root: str | Path, *, train_share: float = 0.6) -> Path:
    """Write a labelled data set as PNG files in the layout that `flawsift.datasets.mvtec` describes.

    Args:
        data: The data set.
        root: A folder that is missing or empty.
        train_share: Share of the normal images, the first ones, that become train/good; 0 writes no folder train.

    Returns:
        The folder.

    Raises:
        OutputError: The folder has content or cannot be written.
        ParameterError: `train_share` is not in [0, 1].
    """
    if not 0 <= train_share <= 1:
        raise ParameterError(f"write_mvtec.train_share must be in [0, 1], got {train_share}.")
    n_train = round(train_share * int(np.sum(data.truth.labels == 0)))
    with _fresh_folder(root) as folder:
        for id_, defect_type in zip(data.truth.ids.tolist(), data.truth.defect_types, strict=True):
            part = "train" if defect_type == NORMAL and n_train > 0 else "test"
            n_train -= part == "train"
            image = data.images.image(id_)
            _save(image, folder / part / defect_type / f"{id_:06d}.png")
            mask = data.truth.mask(id_, (image.height, image.width)) if defect_type != NORMAL else None
            if mask is not None:
                _save(Image.fromarray(mask), folder / "ground_truth" / defect_type / f"{id_:06d}_mask.png")
    return Path(root)


def write_folder(data: Dataset, root: str | Path) -> Path:
    """Write the images alone as PNG files of one flat folder, named by id, so that reading it gives the same order.

    Args:
        data: The data set.
        root: A folder that is missing or empty.

    Returns:
        The folder.

    Raises:
        OutputError: The folder has content or cannot be written.
    """
    with _fresh_folder(root) as folder:
        for id_ in data.images.ids.tolist():
            _save(data.images.image(id_), folder / f"{id_:06d}.png")
    return Path(root)


def _fresh_folder(root: str | Path) -> AbstractContextManager[Path]:
    root = Path(root)
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise OutputError(f"'{show(root)}' is not an empty folder. Choose another one.")
    return new_folder(root)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
