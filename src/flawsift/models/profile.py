"""What the pictures of a training set are like, in a few numbers that a model carries along."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from flawsift.data.decoding import UnreadableImage, to_pixels
from flawsift.data.facts import SAMPLED, ImageFacts, facts_of
from flawsift.data.images import ImageSet

N_PROFILED = 200  # training images that are looked at, evenly spaced: they show the range in a second or two


class Range(NamedTuple):
    """Smallest, median and largest value of some images."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value at least."""
        return cls(float(min(values)), float(np.median(values)), float(max(values)))

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Back from a list; ValueError or TypeError where it is none of a range."""
        low, median, high = map(float, value)
        if not low <= median <= high < np.inf:
            raise ValueError(f"{value!r} is no range")
        return cls(low, median, high)


@dataclass(frozen=True)
class Profile:
    """Facts of training images, against which new ones are held.

    Attributes:
        n_images: How many were looked at.
        width, height: In pixels.
        aspect: Width by height.
        brightness: Mean grey values, from 0 to 255.
        contrast: Distances between the quartiles of the grey values.
        encodings: How they were stored, such as "PNG grey"; empty where they were in memory.
        map_median: What the median patch of the median held-out image scores; None where it is not known.
    """

    n_images: int
    width: Range
    height: Range
    aspect: Range
    brightness: Range
    contrast: Range
    encodings: tuple[str, ...]
    map_median: float | None = None

    @classmethod
    def of_facts(cls, facts: Sequence[ImageFacts], map_median: float | None = None) -> Self:
        """Of the facts of one image at least."""
        return cls(
            n_images=len(facts),
            width=Range.of([one.width for one in facts]),
            height=Range.of([one.height for one in facts]),
            aspect=Range.of([one.width / one.height for one in facts]),
            brightness=Range.of([one.brightness for one in facts]),
            contrast=Range.of([one.contrast for one in facts]),
            encodings=tuple(sorted({one.encoding for one in facts} - {""})),
            map_median=map_median,
        )

    @classmethod
    def of_images(cls, images: ImageSet, map_median: float | None = None) -> Self | None:
        """Of a training set, by up to `N_PROFILED` of its images; None where none can be read any more.

        They are looked at in the size of the network, as new images are: smaller ones have less contrast.
        """
        size = SAMPLED if images.reader is None else images.reader.size

        def look(id_: int) -> ImageFacts | None:
            try:
                image = images.image(id_)
                return facts_of(image, to_pixels(images.looked_at_in(image, id_), size))
            except UnreadableImage:
                return None

        every = -(-len(images) // N_PROFILED)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter lock
            facts = [one for one in pool.map(look, images.ids[::every].tolist()) if one is not None]
        return cls.of_facts(facts, map_median) if facts else None

    def as_json(self) -> dict[str, Any]:
        """Ready for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Back from JSON.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
        """
        ranges = {name: Range.from_json(content[name]) for name, kind in cls.__annotations__.items() if kind is Range}
        encodings, map_median = content["encodings"], content["map_median"]
        if not isinstance(encodings, list) or not all(isinstance(one, str) for one in encodings):
            raise TypeError(f"encodings are {encodings!r}")
        known = None if map_median is None else float(map_median)
        return cls(int(content["n_images"]), **ranges, encodings=tuple(encodings), map_median=known)
