"""Masks against the images that they belong to: brought to how an image is read, or left out with a reason."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flawsift.data.decoding import UnreadableImage, orientation_of
from flawsift.data.images import FileSource, ImageSet, MixedSource
from flawsift.data.listing import read_regular
from flawsift.data.masks import MaskFile, open_masks
from flawsift.data.truth import GroundTruth, files_of
from flawsift.errors import InputError
from flawsift.paths import name_some, show

log = logging.getLogger("flawsift")

MOST = 0.5  # of an image: a mask that covers more may be inverted, as defects are smaller than what they are on
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


class _Seen(NamedTuple):
    """What one mask is like."""

    covered: float  # share of the image
    has_black: bool
    orientation: int  # of the image, by EXIF
    fits_upright: bool
    fits_stored: bool  # has the shape of the pixels before they are turned


def usable_masks(truth: GroundTruth, images: ImageSet) -> GroundTruth:
    """The truth with masks that lie on their images as these are read, and without those that cannot.

    Where an image is turned by EXIF and its mask, which says nothing of it, has the size of the stored pixels, the mask
    is turned too. Masks that are missing, unreadable, blank, or of another shape than their image are left out, and
    told as a warning with a reason each; those that cover most of their image are used, and told.

    Args:
        truth: Labels and masks.
        images: The images of these ids, and perhaps others.
    """
    anomalous = truth.ids[(truth.labels == 1) & np.isin(truth.ids, images.ids)].tolist()
    if not any(i in truth.masks for i in anomalous):
        return truth
    problems: dict[int, str] = {}
    seen: dict[int, _Seen] = {}
    for id_ in anomalous:
        try:
            seen[id_] = _look(truth, images, id_)
        except UnreadableImage:
            continue  # the image counts as unreadable
        except InputError as error:
            problems[id_] = str(error)
    if problems:
        told = name_some(f"{images.source.name(i)} ({reason})" for i, reason in problems.items())
        what = "%d of %d defective images are left out of the pixel metrics, for want of a usable mask: %s."
        log.warning(what, len(problems), len(anomalous), told)
    if large := [f"{_name(truth, i)} ({100 * one.covered:.0f} %)" for i, one in seen.items() if one.covered > MOST]:
        log.warning("%d masks cover most of their image; are they inverted? %s.", len(large), name_some(large))
    if grey := [_name(truth, i) for i, one in seen.items() if not one.has_black]:
        what = "%d masks have no black pixel; their smallest value is taken for the background: %s."
        log.warning(what, len(grey), name_some(grey))
    masks = {i: mask for i, mask in truth.masks.items() if i not in problems}
    return replace(truth, masks=masks, turned={**truth.turned, **_turns(seen, images)})


def _turns(seen: Mapping[int, _Seen], images: ImageSet) -> dict[int, int]:
    """By which orientation masks are turned with their images."""
    of_turned = {i: one for i, one in seen.items() if one.orientation != 1}
    stored = {i: one.orientation for i, one in of_turned.items() if not one.fits_upright}
    unsure = {i: one.orientation for i, one in of_turned.items() if one.fits_upright and one.fits_stored}
    if len(stored) + len(unsure) < len(of_turned):  # some are upright for sure: whoever drew them drew the others so
        return stored
    if unsure and not stored:
        names = name_some(images.source.name(i) for i in unsure)
        what = "%d images are turned by EXIF, and their masks would fit either way: %s. They are taken as upright."
        log.warning(what, len(unsure), names)
        return {}
    return stored | unsure


def _look(truth: GroundTruth, images: ImageSet, id_: int) -> _Seen:
    """Raises InputError, with a reason, where the mask cannot be used."""
    source = truth.masks.get(id_)
    if source is None:
        raise InputError("no mask")
    in_memory = isinstance(source, np.ndarray)
    read = MaskFile(source != 0, True) if isinstance(source, np.ndarray) else open_masks(files_of(source))
    mask = read.defect
    if mask.ndim != 2 or not mask.size:
        raise InputError(f"its mask has the shape {mask.shape}")
    if not mask.any():
        raise InputError(f"{_name(truth, id_)} is blank")
    size, of_mask = images.source.size(id_), (mask.shape[1], mask.shape[0])
    orientation = 1 if in_memory else _orientation(images, id_)
    stored = size[::-1] if orientation in SIDEWAYS else size
    seen = _Seen(float(mask.mean()), read.has_black, orientation, _fit(of_mask, size), _fit(of_mask, stored))
    if not (seen.fits_upright or seen.fits_stored):
        raise InputError(f"{_name(truth, id_)} is {_text(of_mask)}, the image {_text(size)}")
    return seen


def _name(truth: GroundTruth, id_: int) -> str:
    source = truth.masks[id_]
    return "its mask" if isinstance(source, np.ndarray) else f"its mask {show(files_of(source)[0])}"


def _orientation(images: ImageSet, id_: int) -> int:
    source = images.source
    while isinstance(source, MixedSource):
        source = source.sources[id_]
    if not isinstance(source, FileSource):
        return 1
    try:
        return orientation_of(read_regular(source.path(id_)))
    except OSError:
        return 1


def _fit(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask is the image in another size: to the pixel that rounding moves it."""
    (width, height), (w, h) = mask, image
    return abs(width - height * w / h) <= 1 or abs(height - width * h / w) <= 1


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
