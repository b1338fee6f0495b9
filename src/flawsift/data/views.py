"""Derived views: named changes of an image's pixels, whose frozen features are cached like those of the images.

A detector that trains on augmented copies names them (`Detector.views`), so that each passes the backbone once. A view
is a function of the pixels and its name alone.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.data.corruption import PHOTO, corrupted
from flawsift.errors import ParameterError, unknown_name


def derive(pixels: Tensor, view: str) -> Tensor:
    """(3, S, S) uint8 pixels under a view; unchanged under "".

    Raises:
        ParameterError: There is no such view, or its argument does not fit.
    """
    if not view:
        return pixels
    check_view(view)
    kind, _, argument = view.partition(":")
    return _KINDS[kind](pixels, argument)


def check_view(view: str) -> None:
    """Raise ParameterError unless a view is "", or a known kind with an argument that fits."""
    kind, _, argument = view.partition(":")
    if view and kind not in _KINDS:
        raise ParameterError(unknown_name("view", kind, _KINDS))
    if kind == "rotate":
        _angle(argument)


def rotated(pixels: Tensor, degrees: str) -> Tensor:
    """Rotated about the centre, counter-clockwise, bilinearly; what comes from outside repeats the border.

    >>> torch.equal(rotated(torch.arange(12, dtype=torch.uint8).view(3, 2, 2), "90")[0], torch.tensor([[1, 3], [0, 2]]))
    True
    """
    angle = torch.deg2rad(torch.tensor(_angle(degrees), dtype=torch.float64))
    cos, sin = float(angle.cos()), float(angle.sin())
    turn = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
    grid = F.affine_grid(turn, [1, *pixels.shape], align_corners=False)
    turned = F.grid_sample(pixels[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return turned[0].round().clamp(0, 255).to(torch.uint8)


def _angle(degrees: str) -> float:
    try:
        angle = float(degrees)
    except ValueError:
        angle = math.nan
    if not math.isfinite(angle):  # "nan" and "inf" are floats too, and would turn an image into one colour
        raise ParameterError(f"A view 'rotate:DEGREES' needs a finite angle, got 'rotate:{degrees}'.")
    return angle


def perlin(pixels: Tensor, key: str) -> Tensor:
    """With a drawn defect; a key is any text, and every key draws another. See `flawsift.data.corruption`.

    `corrupted(pixels, "perlin:" + key)` gives the mask too. Cached features know a view by its name only, so a change
    of the drawing needs another name: those of `flawsift.data.corruption.drawn_views` have a number for that.
    """
    return corrupted(pixels, f"perlin:{key}").image


def photo(pixels: Tensor, key: str) -> Tensor:
    """As `perlin`, with photographs as textures; the names are those of `flawsift.data.corruption.photo_views`."""
    return corrupted(pixels, f"{PHOTO}:{key}").image


_KINDS: Mapping[str, Callable[[Tensor, str], Tensor]] = {"perlin": perlin, PHOTO: photo, "rotate": rotated}
