"""Parts that lie anywhere, at any angle: where each lies, and images turned and cropped so that all lie alike.

A part is the largest thing before a plain background. Its second moments tell along which line it lies, the third which
way round; its middle is the mean of its pixels. All images of a set are cropped alike, to what its parts cover, so that
little of the network's input is spent on background. Maps are turned back by `flawsift.data.frames.Frame`: nobody else
need know of it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from flawsift.data.unreadable import UnreadableImage
from flawsift.errors import InputError
from flawsift.types import Ids

ALIGNMENT = "alignment"  # under which a screening and a model keep it
N_MEASURED = 100  # images that parts are measured in, evenly spaced
EDGE = 256  # pixels of the longer edge at which parts are looked for: places are right to a part of any patch
BACKGROUND = 12.0  # grey levels that a plain background may be off from its median: noise and JPEG, not texture
NOISE = 0.95  # share of the border that is background, whose spread a part exceeds twice: parts may touch the border
LEAST_AREA = 0.002  # of an image, that a part covers: less is dirt
FOUND = 0.9  # share of the images that must have a part: one may be missing, or hidden by a defect
ROUND = 1.2  # times as long as wide: below, a part has no direction that noise would not turn
ALIKE = 1.5  # times as long as the parts at the lower decile may those at the upper one be: else they are not one kind
WITHIN = 0.95  # share of the parts that reach no farther than the crop before its margin
ONE_WAY = 0.9  # length of the mean of directions, from which on they are one: they differ by 26 degrees, or less
MARGIN = 0.05  # of the length of the parts, around them


class Pose(NamedTuple):
    """Where a part lies in its image.

    Attributes:
        x: Of its middle, in pixels.
        y: Of its middle, in pixels.
        angle: Of its long line, clockwise from the right, in radians; it points to where the part is longer.
        width: Of the image.
        height: Of the image.
        background: RGB, the median of the image's border: what lies beyond the image is filled with it.
        found: Whether there is a part; where none is, the middle is that of the image.
    """

    x: float
    y: float
    angle: float
    width: int
    height: int
    background: tuple[int, int, int]
    found: bool

    @property
    def longer(self) -> int:
        """Pixels of the image's longer edge, in which a crop is given."""
        return max(self.width, self.height)


@dataclass(frozen=True)
class Alignment:
    """How the images of a set are turned and cropped. Lengths are shares of an image's longer edge.

    Attributes:
        left: From the middle of the part to the crop's edge, along its line.
        right: To the other side.
        top: Across the line.
        bottom: To the other side.
        turned: Whether parts are turned; round ones are only shifted.
        aspect: Width by height of the usual image.
    """

    left: float
    right: float
    top: float
    bottom: float
    turned: bool
    aspect: float

    def __post_init__(self) -> None:
        edges = (self.left, self.right, self.top, self.bottom)
        if not (all(0 < edge <= 2 for edge in edges) and 0 < self.aspect < np.inf):
            raise ValueError(f"an alignment with the edges {edges} and the aspect {self.aspect}")

    @property
    def along(self) -> float:
        """Width of the crop."""
        return self.left + self.right

    @property
    def across(self) -> float:
        """Height of the crop."""
        return self.top + self.bottom

    @property
    def key(self) -> str:
        """All that changes pixels, for caches."""
        return "align:" + ",".join(f"{value!r}" for value in asdict(self).values())

    @property
    def finer(self) -> tuple[float, float]:
        """(down, across): how many times as high and wide as the crop the usual image is."""
        height, width = min(1.0, 1 / self.aspect), min(1.0, self.aspect)
        return height / self.across, width / self.along

    def as_json(self) -> dict[str, Any]:
        """Ready for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Self | None:
        """What `as_json` wrote; None gives None.

        Raises:
            ValueError, KeyError, TypeError: It is damaged.
        """
        if content is None:
            return None
        edges = {name: float(content[name]) for name in ("left", "right", "top", "bottom", "aspect")}
        return cls(**edges, turned=bool(content["turned"]))

    def size(self, picture: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the crop of an image of this (width, height), in its pixels."""
        longer = max(picture)
        return max(1, round(self.along * longer)), max(1, round(self.across * longer))

    def pose(self, image: Image.Image) -> Pose:
        """Where the part of an RGB image lies."""
        part = find_part(image)
        angle = part.angle if self.turned and part.points is not None else 0.0
        return Pose(*part.middle, angle, *image.size, part.background, part.points is not None)

    def crop(self, image: Image.Image, pose: Pose) -> Image.Image:
        """The image with its part in the place that all have."""
        (a, b, c), (d, e, f) = self._to_image(pose)
        size = self.size((pose.width, pose.height))
        turn = (a, b, c, d, e, f)
        return image.transform(size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR, fillcolor=pose.background)

    def _to_image(self, pose: Pose) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """x and y in the image of a place of the crop: each a x' + b y' + c, all in pixels."""
        cos, sin = float(np.cos(pose.angle)), float(np.sin(pose.angle))
        left, top = self.left * pose.longer, self.top * pose.longer
        return (cos, -sin, pose.x - cos * left + sin * top), (sin, cos, pose.y - sin * left - cos * top)

    def to_crop(self, pose: Pose) -> npt.NDArray[np.float64]:
        """(2, 3): x and y in the crop of a place of the image, both from 0 to 1 from edge to edge."""
        cos, sin = np.cos(pose.angle), np.sin(pose.angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        shift = np.array([self.left, self.top]) * pose.longer - turn @ [pose.x, pose.y]
        to_pixels = np.column_stack([turn * [pose.width, pose.height], shift])
        to_crop: npt.NDArray[np.float64] = to_pixels / (np.array([[self.along], [self.across]]) * pose.longer)
        return to_crop


class _Images(Protocol):
    """What is needed of an `ImageSet`, which knows of alignments."""

    @property
    def ids(self) -> Ids: ...
    def __len__(self) -> int: ...
    def image(self, id_: int) -> Image.Image: ...


def learn(images: _Images) -> Alignment:
    """The alignment that fits the parts of some images, good and bad: nearly all of them lie within its crop.

    Args:
        images: Of which up to `2 * N_MEASURED - 1`, evenly spaced, are measured.

    Raises:
        InputError: No image can be read; or in more than one of ten nothing stands before a plain background, or what
            does so is not of one size.
    """
    parts, aspects = [], []
    for id_ in images.ids[:: max(1, len(images) // N_MEASURED)].tolist():
        with contextlib.suppress(UnreadableImage):
            image = images.image(id_)
            aspects.append(image.width / image.height)
            parts.append(find_part(image))
    if not parts:
        raise InputError("No image can be read, so that there is no part to align.")
    return _fitting(parts, float(np.median(aspects)))


def would_help(parts: Sequence["Part"]) -> bool:
    """Whether parts of one kind lie at angles that differ, so that aligning them makes them alike."""
    try:
        alignment = _fitting(parts, 1.0)
    except InputError:
        return False
    lines = np.exp(1j * np.array([part.angle for part in parts if part.points is not None]))
    return alignment.turned and float(abs(lines.mean())) < ONE_WAY


def _fitting(parts: Sequence["Part"], aspect: float) -> Alignment:
    found = [part for part in parts if part.points is not None]
    if not found or len(found) < FOUND * len(parts):
        raise InputError(
            f"--align needs parts before a plain background, and {len(parts) - len(found)} of {len(parts)} images have "
            f"none that covers {100 * LEAST_AREA:g} % of them. Leave it out; the same part of each image is chosen by "
            "--roi."
        )
    turned = float(np.median([part.elongation for part in found])) >= ROUND
    edges = np.array([part.edges(part.angle if turned else 0.0) for part in found])  # left, right, top, bottom
    shortest, longest = np.quantile(edges[:, 0] + edges[:, 1], [0.1, 0.9])
    if longest > ALIKE * shortest:
        raise InputError(
            f"--align needs parts of one size, and what stands before the background is between {100 * shortest:.0f} "
            f"and {100 * longest:.0f} % of an image's longer edge long. Leave it out; the same part of each image is "
            "chosen by --roi."
        )
    left, right, top, bottom = (np.quantile(edges, WITHIN, axis=0) + MARGIN * longest).tolist()
    return Alignment(left, right, top, bottom, turned, aspect)


class Part(NamedTuple):
    """The largest thing before a background.

    Attributes:
        background: RGB, the median of the image's border.
        middle: (x, y) of its middle, in pixels of the image.
        points: (n, 2) x and y of its pixels from its middle, in shares of the longer edge; None where there is none.
    """

    background: tuple[int, int, int]
    middle: tuple[float, float]
    points: npt.NDArray[np.float64] | None

    @property
    def angle(self) -> float:
        """Of its long line, pointing to where it reaches farther out, by the third moment along the line."""
        assert self.points is not None
        line = np.linalg.eigh(self.points.T @ self.points)[1][:, -1]
        if ((self.points @ line) ** 3).sum() < 0:
            line = -line
        return float(np.arctan2(line[1], line[0]))

    @property
    def elongation(self) -> float:
        """How many times as long as wide, by its standard deviations."""
        assert self.points is not None
        short, long = np.linalg.eigvalsh(self.points.T @ self.points)
        return float(np.sqrt(long / max(short, 1e-12 * long)))

    def edges(self, angle: float) -> tuple[float, float, float, float]:
        """How far it reaches to the left, right, top and bottom, seen with the line of an angle lying to the right."""
        assert self.points is not None
        turned = self.points @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        (left, top), (right, bottom) = -turned.min(0), turned.max(0)
        return left, right, top, bottom


def find_part(image: Image.Image) -> Part:
    """The part in an RGB image: the largest thing that differs from the image's border more than most of the border.

    It ends where it differs half as much as in its middle, so that a soft shadow is no part of it.
    """
    scale = min(1.0, EDGE / max(image.size))
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX, reducing_gap=2), np.float32)
    border, colour = background_of(pixels)
    red, green, blue = (int(value) for value in colour)
    differs = np.abs(pixels - colour).max(2)
    level = max(BACKGROUND, 2 * float(np.quantile(np.abs(border - colour).max(1), NOISE)))
    part = _largest(differs > level)
    while part.any() and (higher := float(np.median(differs[part])) / 2) > level:
        part, level = _largest(differs > higher), higher
    if part.sum() < LEAST_AREA * part.size:
        return Part((red, green, blue), (image.width / 2, image.height / 2), None)
    rows, columns = np.nonzero(ndimage.binary_fill_holes(part))
    points = np.column_stack([(columns + 0.5) * image.width / width, (rows + 0.5) * image.height / height])
    x, y = points.mean(0).tolist()
    return Part((red, green, blue), (x, y), (points - [x, y]) / max(image.size))


def background_of(pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(n, 3) pixels of the border of (..., h, w, 3) images, and their (3,) median."""
    ends = [0, -1]
    border = np.concatenate([pixels[..., ends, :, :].reshape(-1, 3), pixels[..., ends, :].reshape(-1, 3)])
    return border, np.median(border, axis=0)


def _largest(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Of some marked pixels, the largest piece that is thicker than noise."""
    labels, n = ndimage.label(ndimage.binary_opening(marked), np.ones((3, 3)))
    largest: npt.NDArray[np.bool_] = labels == 1 + np.bincount(labels.ravel())[1:].argmax() if n else labels > 0
    return largest
