"""Regions of interest: which part of every image is looked at, from a mask, a drawing or the images themselves."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from flawsift.damage import DAMAGE, json_object
from flawsift.data.alignment import BACKGROUND, background_of
from flawsift.data.frames import ROI_EDGE, Region
from flawsift.data.images import ImageSet
from flawsift.data.masks import read_mask
from flawsift.data.unreadable import UnreadableImage
from flawsift.errors import InputError
from flawsift.paths import show

REGION = "region"  # under which a screening and a model keep it
AUTO = "auto"
N_SEEN = 32  # images that a constant background is looked for in, evenly spaced
CONSTANT = 0.95  # share of the border's pixels that must be so
CIRCLE = 64  # corners that a circle is drawn with: off by a thousandth of its radius
MARGIN = 0.03  # of the longer edge, added around what was seen: the next part may lie a little elsewhere


def read_region(given: str, images: ImageSet) -> Region:
    """What --roi says.

    Args:
        given: "auto" for `foreground`; else a file. A mask is an image, white where to look. JSON is what labelme
            writes, or {"size": [width, height], "polygons": [[[x, y], ...], ...]}, the polygons in pixels of images of
            that size; what is in any of them is looked at.
        images: For "auto".

    Raises:
        InputError: It is not there, cannot be read, or holds no region.
    """
    if given == AUTO:
        return foreground(images)
    path = Path(given)
    if not path.is_file():
        raise InputError(f"The region of interest '{show(path)}' is not there. Give a mask, a JSON file, or auto.")
    return drawn(_content(path), show(path)) if path.suffix.lower() == ".json" else Region.of_mask(read_mask([path]))


def _content(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes())
    except (OSError, *DAMAGE) as error:
        raise InputError(_no_region(show(path), error)) from error


def _no_region(where: str, error: Exception) -> str:
    return (
        f'{where} holds no region: {error}. It must be what labelme writes, or {{"size": [width, height], '
        '"polygons": [[[x, y], [x, y], [x, y]]]}.'
    )


def drawn(content: Mapping[str, Any], where: str) -> Region:
    """The region that polygons hold.

    Args:
        content: As `read_region` takes it from JSON.
        where: What holds it, for errors.

    Raises:
        InputError: It is none.
    """
    try:
        if "shapes" in content:  # of labelme
            size = content["imageWidth"], content["imageHeight"]
            polygons = [_outline(shape) for shape in content["shapes"]]
        else:
            size, polygons = content["size"], content["polygons"]
        width, height = (int(edge) for edge in size)
        corners = [[(float(x), float(y)) for x, y in polygon] for polygon in polygons]
        if (
            min(width, height) < 1
            or max(width, height) > 2**16
            or not np.isfinite([at for polygon in corners for point in polygon for at in point]).all()
        ):
            raise ValueError("sizes and points must be numbers of pixels")
    except DAMAGE as error:
        raise InputError(_no_region(where, error)) from error
    mask = Image.new("1", (width, height))
    for polygon in corners:
        if len(polygon) < 3:
            raise InputError(f"{where} has a polygon of {len(polygon)} points. A region needs three at least.")
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    if not np.asarray(mask).any():
        raise InputError(f"The polygons of {where} hold no pixel of {width} x {height}.")
    return Region.of_mask(np.asarray(mask))


def _outline(shape: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    """The polygon of a shape of labelme: of a rectangle it keeps two corners, of a circle the middle and a point."""
    kind, points = shape.get("shape_type", "polygon"), shape["points"]
    if kind == "polygon":
        return points  # type: ignore[no-any-return]
    if kind not in ("rectangle", "circle"):
        raise ValueError(f"a shape of the kind {kind!r} is no polygon, rectangle or circle")
    (x, y), (other_x, other_y) = points
    if kind == "rectangle":
        return [(x, y), (other_x, y), (other_x, other_y), (x, other_y)]
    radius, angles = math.hypot(other_x - x, other_y - y), np.linspace(0, 2 * math.pi, CIRCLE, endpoint=False)
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles.tolist()]


def sample(images: ImageSet) -> NDArray[np.float32]:
    """(n, h, w, 3) of up to 2 * `N_SEEN` - 1 images, evenly spaced, in the size of the first at `ROI_EDGE` pixels.

    Raises:
        InputError: None can be read.
    """
    every = max(1, len(images) // N_SEEN)
    pictures: list[NDArray[np.float32]] = []
    for id_ in images.ids[::every].tolist():
        with contextlib.suppress(UnreadableImage):
            picture = images.image(id_)
            if pictures:
                picture = picture.resize(pictures[0].shape[1::-1], Image.Resampling.BOX)
            else:
                picture.thumbnail((ROI_EDGE, ROI_EDGE), Image.Resampling.BOX)
            pictures.append(np.asarray(picture, np.float32))
    if not pictures:
        raise InputError("No image can be read, so that there is nothing to take a region of interest of.")
    return np.stack(pictures)


def foreground(images: ImageSet) -> Region:
    """Where any of some images differs from their background, which must be of one colour all along their borders.

    Raises:
        InputError: It is not, or nothing differs, or no image can be read.
    """
    stack = sample(images)
    border, colour = background_of(stack)
    share = float((np.abs(border - colour).max(1) <= BACKGROUND).mean())
    if share < CONSTANT:
        raise InputError(
            f"--roi auto needs a background of one colour, but only {100 * share:.0f} % of the borders of the images "
            "have it. Give a mask or polygons."
        )
    differs = (np.abs(stack - colour).max(3) > BACKGROUND).any(0)
    differs = ndimage.binary_opening(differs)  # single noisy pixels are no part
    if not differs.any():
        raise InputError("--roi auto finds nothing before the background. Give a mask or polygons, or leave it out.")
    grown = ndimage.binary_dilation(differs, iterations=max(1, round(MARGIN * max(differs.shape))))
    return Region(ndimage.binary_fill_holes(grown))
