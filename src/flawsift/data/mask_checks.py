"""Masks against the images that they belong to: brought to how an image is read, or left out with a reason."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flawsift.data.decoding import UnreadableImage, orientation_of
from flawsift.data.images import FileSource, ImageSet, MixedSource
from flawsift.data.masks import read_mask
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError
from flawsift.paths import name_some, show

log = logging.getLogger("flawsift")

MOST = 0.5  # of an image: a mask that covers more may be inverted, as defects are smaller than what they are on
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


class _Seen(NamedTuple):
    """What one mask is like."""

    size: tuple[int, int]  # (width, height)
    covered: float


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
    problems = {i: "no mask" for i in anomalous if i not in truth.masks}
    stored, upright, large = [], [], []
    unsure: dict[int, int] = {}
    for id_ in anomalous:
        if id_ in problems:
            continue
        try:
            seen, size = _look(truth, id_), images.source.size(id_)
        except UnreadableImage:
            continue  # the image counts as unreadable
        except InputError as error:
            problems[id_] = str(error)
            continue
        orientation = 1 if isinstance(truth.masks[id_], np.ndarray) else _orientation(images, id_)
        turned = size[::-1] if orientation in SIDEWAYS else size
        fits, fits_stored = _fit(seen.size, size), _fit(seen.size, turned)
        if not seen.covered:
            problems[id_] = f"{_name(truth, id_)} is blank"
        elif not fits and not fits_stored:
            problems[id_] = f"{_name(truth, id_)} is {_text(seen.size)}, the image {_text(size)}"
        elif orientation != 1:
            (unsure.update({id_: orientation}) if fits and fits_stored else (upright if fits else stored).append(id_))
        if seen.covered > MOST and id_ not in problems:
            large.append(f"{_name(truth, id_)} ({100 * seen.covered:.0f} %)")
    turns = {i: _orientation(images, i) for i in stored}
    if stored and not upright:  # whoever drew these masks drew the others the same way
        turns |= unsure
    elif unsure and not upright:
        names = name_some(images.source.name(i) for i in unsure)
        log.warning(
            "%d images are turned by EXIF, and their masks would fit either way: %s. They are taken as drawn on the "
            "upright image.",
            len(unsure),
            names,
        )
    if problems:
        told = name_some(f"{images.source.name(i)} ({reason})" for i, reason in sorted(problems.items()))
        log.warning(
            "%d of %d defective images are left out of the pixel metrics, for want of a usable mask: %s.",
            len(problems),
            len(anomalous),
            told,
        )
    if large:
        log.warning("%d masks cover most of their image; are they inverted? %s.", len(large), name_some(large))
    masks = {i: mask for i, mask in truth.masks.items() if i not in problems}
    return replace(truth, masks=masks, turned={**truth.turned, **turns})


def _look(truth: GroundTruth, id_: int) -> _Seen:
    source = truth.masks[id_]
    mask = np.asarray(source) != 0 if isinstance(source, np.ndarray) else read_mask(_files(source))
    if mask.ndim != 2 or not mask.size:
        raise InputError(f"its mask has the shape {mask.shape}")
    return _Seen((mask.shape[1], mask.shape[0]), float(mask.mean()))


def _files(source: Path | Sequence[Path]) -> Sequence[Path]:
    return [source] if isinstance(source, Path) else source


def _name(truth: GroundTruth, id_: int) -> str:
    source = truth.masks[id_]
    return "its mask" if isinstance(source, np.ndarray) else f"its mask {show(_files(source)[0])}"


def _orientation(images: ImageSet, id_: int) -> int:
    source = images.source
    while isinstance(source, MixedSource):
        source = source.sources[id_]
    if not isinstance(source, FileSource):
        return 1
    try:
        return orientation_of(source.path(id_).read_bytes())
    except OSError:
        return 1


def _fit(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask is the image in another size: to the pixel that rounding moves it."""
    (width, height), (w, h) = mask, image
    return abs(width - height * w / h) <= 1 or abs(height - width * h / w) <= 1


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
