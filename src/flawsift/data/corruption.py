"""Drawn defects: patches of foreign texture on a good image, each a function of the image's pixels and a name alone.

The shape comes from Perlin noise. The texture is a part of the same image, changed strongly, or drawn: noise of any
roughness, cells, waves, lattices and marble in random colours. They stand for the photographs of textures that the
papers paste; what matters is that they are many and foreign, not what they show. Where there are photographs, such as
the Describable Textures Dataset that the papers use, their folder can be named instead (`photo_views`).
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.decoding import UnreadableImage, decode, to_pixels
from flawsift.data.folders import scan_folder
from flawsift.data.listing import read_regular
from flawsift.errors import InputError
from flawsift.types import Floats

Field = Callable[[int, np.random.Generator], Floats]  # (S, S) levels in [0, 1]

DRAWING = 2  # raised when a name comes to mean another picture: part of what features of views are cached by
SMALLEST_CELL = 8  # pixels: 2^5 cells at the papers' 256 px
NOISE_ABOVE = 0.5  # where the mask lies: on average 5 % of the image
MOST_KEPT = 0.8  # largest share of the image where a texture is blended with it
PHOTO = "photo"  # kind of the names whose textures are photographs
SELF_SHARE = 0.3  # of the textures that are parts of the image itself: near its colours, and near real defects


class Corruption(NamedTuple):
    """An image with a drawn defect.

    Attributes:
        image: (3, S, S) uint8, (1 - kept) texture + kept image in the mask, and the image outside.
        mask: (S, S) bool; empty now and then, which is a good image.
        texture: (3, S, S) uint8.
        kept: Share of the image in the blend, in [0, 0.8].
    """

    image: Tensor
    mask: Tensor
    texture: Tensor
    kept: float


def corrupted(pixels: Tensor, name: str) -> Corruption:
    """(3, H, W) uint8 pixels with a defect that follows from them and the name.

    Raises:
        InputError: It is a name of `photo_views` whose folder has changed, or a photograph cannot be read.
    """
    plain = pixels.contiguous().numpy()
    folder: str | None = None
    if name.startswith(f"{PHOTO}:"):
        kind, key, fingerprint, folder = name.split(":", 3)
        name = f"{kind}:{key}:{fingerprint}"  # where the folder lies changes nothing
    digest = hashlib.sha256(f"{name} {plain.shape} ".encode() + plain.tobytes()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    size = max(plain.shape[1:])  # what is drawn is square, and cut where the image ends
    mask = perlin_mask(size, generator)
    kept = float(generator.uniform(0, MOST_KEPT))
    if folder is not None:
        texture = _photograph(folder, fingerprint, size, generator)
    elif generator.random() < SELF_SHARE:
        texture = _from_itself(plain, generator)
    else:
        texture = _drawn(size, generator)
    height, width = plain.shape[1:]
    mask, texture = mask[:height, :width], texture[:, :height, :width]
    blend = np.rint((1 - kept) * texture + kept * plain).astype(np.uint8)
    image = np.where(mask, blend, plain)
    return Corruption(torch.from_numpy(image), torch.from_numpy(mask), torch.from_numpy(texture), kept)


def drawn_views(keys: Iterable[str]) -> tuple[str, ...]:
    """The names that draw with drawn textures: every key draws another defect."""
    return tuple(f"perlin:{DRAWING}.{key}" for key in keys)


def photo_views(keys: Iterable[str], folder: str) -> tuple[str, ...]:
    """The names that draw with photographs: of keys, the folder and what it holds, since features are cached by them.

    Args:
        keys: Texts without a colon; every key draws another defect.
        folder: Photographs, flat or nested.

    Raises:
        InputError: The folder is missing or holds no image.
    """
    fingerprint = _fingerprint(folder, _photographs(folder))
    return tuple(f"{PHOTO}:{key}:{fingerprint}:{folder}" for key in keys)


def _photographs(folder: str) -> list[str]:
    if not (names := scan_folder(Path(folder))):
        raise InputError(f"The folder of textures '{folder}' holds no image.")
    return names


def _fingerprint(folder: str, names: Sequence[str]) -> str:
    listed = "\n".join(f"{name} {(Path(folder) / name).stat().st_size}" for name in names)
    listed = f"{DRAWING}\n{listed}"
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _listed(folder: str, fingerprint: str) -> Sequence[str]:
    names = _photographs(folder)
    if _fingerprint(folder, names) != fingerprint:
        raise InputError(f"The folder of textures '{folder}' has changed since this view of it was named.")
    return names


def _photograph(folder: str, fingerprint: str, size: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    names = _listed(folder, fingerprint)
    path = Path(folder) / names[int(generator.integers(len(names)))]
    try:
        drawn: npt.NDArray[np.uint8] = to_pixels(decode(read_regular(path)), size).numpy()
    except (OSError, UnreadableImage) as error:
        raise InputError(f"The texture '{path}' cannot be read: {error}. Remove it from the folder.") from error
    return drawn


# ---- the shape -------------------------------------------------------------------------------------------------------


def perlin_mask(size: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(size, size): where turned Perlin noise, with 2^a by 2^b cells, is high."""
    finest = max(0, int(np.log2(size / SMALLEST_CELL)))
    rows, columns = (int(n) for n in 2 ** generator.integers(0, finest + 1, 2))
    mask: npt.NDArray[np.bool_] = perlin_noise(size, rows, columns, generator.uniform(-90, 90), generator) > NOISE_ABOVE
    return mask


def perlin_noise(size: int, rows: int, columns: int, degrees: float, generator: np.random.Generator) -> Floats:
    """(size, size) in [-1, 1], 0 at the nodes of a lattice of rows x columns cells, turned about the centre.

    What lies outside of the turned square is 0, as in DRAEM's recipe, which DeSTSeg takes over: no defect is there.
    """
    axis = np.arange(size) / size - 0.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    v, u = (sin * x + cos * y + 0.5) * rows, (cos * x - sin * y + 0.5) * columns
    edge = 1e-9  # a quarter turn is rounded, and must not lose a row of pixels
    inside = (v > -edge) & (v < rows) & (u > -edge) & (u < columns)
    angle = generator.uniform(0, 2 * np.pi, (rows + 1, columns + 1))
    north, west = np.cos(angle), np.sin(angle)
    i, j = (np.clip(np.floor(at).astype(np.int64), 0, n - 1) for at, n in ((v, rows), (u, columns)))
    dv, du = v - i, u - j

    def corner(a: int, b: int) -> Floats:
        height: Floats = north[i + a, j + b] * (dv - a) + west[i + a, j + b] * (du - b)
        return height

    fade_v, fade_u = (t**3 * (t * (6 * t - 15) + 10) for t in (dv, du))
    top = corner(0, 0) + fade_u * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + fade_u * (corner(1, 1) - corner(1, 0))
    plain = np.sqrt(2) * (top + fade_v * (bottom - top))  # without the root they reach 1 / sqrt(2)
    return np.where(inside, plain, 0.0)


# ---- the texture -----------------------------------------------------------------------------------------------------


def _from_itself(pixels: npt.NDArray[np.uint8], generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A part of the image, enlarged, turned or mirrored, with other contrast and colour."""
    shorter, size = min(pixels.shape[1:]), max(pixels.shape[1:])
    edge = max(1, int(shorter * generator.uniform(0.2, 1.0)))
    top, left = generator.integers(0, shorter - edge + 1, 2)
    near = np.arange(size) * edge // size
    part = pixels[:, top + near][:, :, left + near].astype(np.float64)
    part = np.rot90(part, int(generator.integers(4)), (1, 2))
    if generator.random() < 0.5:
        part = part[:, ::-1]
    middle = part.mean()
    # a contrast below 0 is a negative; colours shift together by up to a quarter of the range, apart by a tenth
    contrast = generator.choice([-1, 1], p=[0.25, 0.75]) * generator.uniform(0.5, 1.5)
    shift = generator.uniform(-64, 64) + generator.uniform(-26, 26, (3, 1, 1))
    drawn: npt.NDArray[np.uint8] = np.clip(np.rint((part - middle) * contrast + middle + shift), 0, 255).astype(
        np.uint8
    )
    return drawn


def _drawn(size: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One of the fields, or a mixture of two, in random colours."""
    first, second = (FIELDS[k](size, generator) for k in generator.integers(0, len(FIELDS), 2))
    share = generator.uniform() if generator.random() < 0.5 else 1.0
    return _coloured(share * first + (1 - share) * second, generator)


def _coloured(level: Floats, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(3, S, S) by a palette of 2 to 5 colours between grey and full saturation, in steps or continuous."""
    palette = generator.uniform(0, 255, (int(generator.integers(2, 6)), 3))
    grey = palette.mean(1, keepdims=True)
    palette = grey + generator.uniform() * (palette - grey)
    at = np.clip(level, 0, 1) * (len(palette) - 1)
    if generator.random() < 0.3:
        at = np.rint(at)
    channels = [np.interp(at, np.arange(len(palette)), palette[:, c]) for c in range(3)]
    drawn: npt.NDArray[np.uint8] = np.rint(np.stack(channels)).astype(np.uint8)
    return drawn


def _noise(size: int, generator: np.random.Generator) -> Floats:
    """Noise with a spectrum of 1 / f^b in power: from white (0) to clouds (3)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1 / size
    spectrum = np.fft.rfft2(generator.normal(size=(size, size))) * frequency ** -(generator.uniform(0, 3) / 2)
    field = np.fft.irfft2(spectrum, (size, size))
    return _spread(field)


def _cells(size: int, generator: np.random.Generator) -> Floats:
    """Worley cells: distance to the nearest of some points, or a level for each cell."""
    points = generator.uniform(0, size, (int(generator.integers(6, 40)), 2))
    levels = generator.uniform(size=len(points))
    axis = np.arange(size)
    nearest, owner = np.full((size, size), np.inf), np.zeros((size, size))
    for (y, x), level in zip(points, levels, strict=True):
        distance = (axis[:, None] - y) ** 2 + (axis - x) ** 2
        owner[distance < nearest] = level
        np.minimum(nearest, distance, out=nearest)
    return owner if generator.random() < 0.5 else _spread(np.sqrt(nearest))


def _waves(size: int, generator: np.random.Generator) -> Floats:
    """Stripes of one direction, smooth to sharp, straight to bent."""
    angle = generator.uniform(0, np.pi)
    periods = 2 * np.exp(generator.uniform(0, np.log(max(1, size / 12))))  # from two to a sixth of the edge's pixels
    axis = np.arange(size) / size
    along = np.cos(angle) * axis[:, None] + np.sin(angle) * axis
    across = np.cos(angle) * axis - np.sin(angle) * axis[:, None]
    bend = generator.uniform(0, 0.5) * np.sin(2 * np.pi * (generator.uniform(0, 3) * across + generator.uniform()))
    wave = np.sin(2 * np.pi * (periods * along + bend + generator.uniform()))
    drawn: npt.NDArray[np.float64] = 0.5 + 0.5 * np.tanh(generator.uniform(0.5, 8) * wave)
    return drawn


def _lattice(size: int, generator: np.random.Generator) -> Floats:
    """Dots or checks: two waves at once."""
    first, second = _waves(size, generator), _waves(size, generator)
    return first * second if generator.random() < 0.5 else np.abs(first - second)


def _marble(size: int, generator: np.random.Generator) -> Floats:
    """Veins: a wave of a cloud."""
    return 0.5 + 0.5 * np.sin(generator.uniform(5, 25) * _noise(size, generator))


def _spread(field: Floats) -> Floats:
    """Two standard deviations about the mean on [0, 1]."""
    drawn: npt.NDArray[np.float64] = np.clip(0.5 + (field - field.mean()) / (4 * max(float(field.std()), 1e-12)), 0, 1)
    return drawn


FIELDS: tuple[Field, ...] = (_noise, _cells, _waves, _lattice, _marble)
