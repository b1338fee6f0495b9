"""What is looked at before anything is trained: the range of values of the images, and images that show nothing."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from flawsift.data.alignment import Part, find_part, would_help
from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.values import Sample, learn_range
from flawsift.errors import InputError
from flawsift.paths import name_some
from flawsift.progress import Progress, Stage, silent

log = logging.getLogger("flawsift")
Result = TypeVar("Result")

N_LOOKED_AT = 100  # images, evenly spaced, that are decoded in full: what the camera does wrong, it does often
SATURATED = 0.99  # share of values at one end: what is left shows nothing of a surface


def ready_to_train(images: ImageSet, *, progress: Progress = silent) -> ImageSet:
    """The images, those of more than 8 bits read by one range of values: the given one, or what is learned from all.

    Of up to `N_LOOKED_AT` images, those that are of one colour, saturated, or the same as another are told as warnings;
    and that parts lie at different angles, where aligning them would help.

    Raises:
        InputError: A range was given and no image has more than 8 bits, or one range is not for all; see `learn_range`.
    """
    progress(Stage.CHECKING, 0, 1)
    ranged = _in_range(images)
    for line in _oddities(ranged):
        log.warning("%s", line)
    return ranged


def _in_range(images: ImageSet) -> ImageSet:
    def look(id_: int) -> Sample | None:
        deep = images.source.deep(id_)
        return None if deep is None else Sample.of(deep.values)

    samples = _each(images, images.ids.tolist(), look)
    deep = [sample for sample in samples.values() if sample is not None]
    if images.value_range is not None:
        if not deep:
            raise InputError("A range of values was given, and no image has more than 8 bits. Leave the range out.")
        return images
    if deep and (n_others := len(samples) - len(deep)):
        log.warning("%d of %d images have 8 bits; no range of values is for them.", n_others, len(samples))
    return images.within(learn_range(deep))


@dataclass(frozen=True)
class _Look:
    """Of one image."""

    digest: bytes
    is_constant: bool
    is_saturated: bool
    part: Part | None  # where aligning could be proposed


def _oddities(images: ImageSet) -> Iterator[str]:
    as_they_are = images.alignment is None and images.region is None

    def look(id_: int) -> _Look:
        image = images.image(id_)
        pixels = np.asarray(image)
        saturated = max(float((pixels == end).mean()) for end in (0, 255))
        digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
        return _Look(
            digest,
            bool((pixels == pixels[0, 0]).all()),
            saturated >= SATURATED,
            find_part(image) if as_they_are else None,
        )

    looks = _each(images, images.ids[:: -(-len(images) // N_LOOKED_AT)].tolist(), look)
    name, n = images.source.name, len(looks)
    if constant := [name(i) for i, one in looks.items() if one.is_constant]:
        yield f"{len(constant)} of {n} images are of one colour and show nothing: {name_some(constant)}."
    if saturated := [name(i) for i, one in looks.items() if one.is_saturated and not one.is_constant]:
        yield f"{len(saturated)} of {n} images are black or white nearly everywhere: {name_some(saturated)}."
    same: dict[bytes, list[str]] = defaultdict(list)
    for id_, one in looks.items():
        same[one.digest].append(name(id_))
    if copies := [names for names in same.values() if len(names) > 1]:
        listed = name_some(" = ".join(names[:2]) for names in copies)
        n_same = sum(map(len, copies))
        yield f"{n_same} of {n} images are the same as another, pixel by pixel: {listed}."
    if would_help([one.part for one in looks.values() if one.part is not None]):
        yield (
            "The parts lie at different angles before a plain background. --align turns all alike before they are "
            "compared: see 'Parts at any angle' in the documentation."
        )


def _each(images: ImageSet, ids: list[int], look: Callable[[int], Result]) -> dict[int, Result]:
    """{id: what is seen of it} of the images that can be read."""

    def one(id_: int) -> tuple[int, Result] | None:
        try:
            return id_, look(id_)
        except UnreadableImage:  # told where its features are missing
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter lock
        return dict(result for result in pool.map(one, ids) if result is not None)
