"""Where pixels come from: files, arrays and PIL images in memory, or several of these."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift.data.decoding import Deep, UnreadableImage, decode, deep_of, from_array, from_picture, size_of
from flawsift.data.listing import read_regular
from flawsift.data.values import ValueRange
from flawsift.files import content_digest
from flawsift.paths import file_and_page
from flawsift.types import Ids


class Source(Protocol):
    """Where the pixels of a global id come from. What cannot be read raises `UnreadableImage`."""

    @property
    def ids(self) -> Ids: ...
    @property
    def value_range(self) -> ValueRange | None: ...  # of images of more than 8 bits
    def name(self, id_: int) -> str: ...
    def digest(self, id_: int) -> str: ...  # of all that decides on the pixels: features are cached by it
    def image(self, id_: int) -> Image.Image: ...  # RGB, upright, in its own size
    def size(self, id_: int) -> tuple[int, int]: ...  # (width, height), without decoding where that can be
    def deep(self, id_: int) -> Deep | None: ...  # the numbers, of an image of more than 8 bits
    def within(self, value_range: ValueRange | None) -> Self: ...  # the same images in another range


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files below one root folder.

    Attributes:
        root: The folder.
        names: {global id: path relative to the root, with forward slashes}; one page of a TIFF ends in "#page=2".
        value_range: Which values are black and white, of images of more than 8 bits.
    """

    root: Path
    names: Mapping[int, str]
    value_range: ValueRange | None = None

    @property
    def ids(self) -> Ids:
        return np.fromiter(self.names, np.int64, len(self.names))

    def name(self, id_: int) -> str:
        return self.names[id_]

    def path(self, id_: int) -> Path:
        """The file, of a page too."""
        return file_and_page(self.root, self.names[id_])[0]

    def page(self, id_: int) -> int | None:
        """The page of a TIFF, from 0; None for the first picture of a file."""
        return file_and_page(self.root, self.names[id_])[1]

    def digest(self, id_: int) -> str:
        path, page = file_and_page(self.root, self.names[id_])
        content = content_digest(_read(path))
        return _ranged(content if page is None else _digest(f"{content} page {page}"), self.value_range)

    def image(self, id_: int) -> Image.Image:
        path, page = file_and_page(self.root, self.names[id_])
        return decode(_read(path), self.value_range, page)

    def size(self, id_: int) -> tuple[int, int]:
        path, page = file_and_page(self.root, self.names[id_])
        return size_of(_read(path), page)

    def deep(self, id_: int) -> Deep | None:
        path, page = file_and_page(self.root, self.names[id_])
        return deep_of(_read(path), page)

    def within(self, value_range: ValueRange | None) -> Self:
        return replace(self, value_range=value_range)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise UnreadableImage("a link to a file that is not there") from error
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory, as they were given: nothing is copied or converted before it is asked for.

    Attributes:
        arrays: {global id: an array as `flawsift.data.decoding.from_array` takes it, or a PIL image}.
        value_range: Which values are black and white, of images of more than 8 bits.
    """

    arrays: Mapping[int, npt.NDArray[Any] | Image.Image]
    value_range: ValueRange | None = None

    @property
    def ids(self) -> Ids:
        return np.fromiter(self.arrays, np.int64, len(self.arrays))

    def name(self, id_: int) -> str:
        return f"{'image' if isinstance(self.arrays[id_], Image.Image) else 'array'}-{id_}"

    def digest(self, id_: int) -> str:
        array = self.arrays[id_]
        if isinstance(array, Image.Image) or array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)):
            array = np.asarray(self.image(id_))  # by the range, which needs no place of its own then
        sha256 = _Sha256()
        np.save(sha256, array, allow_pickle=False)
        return sha256.hexdigest()

    def image(self, id_: int) -> Image.Image:
        array = self.arrays[id_]
        if isinstance(array, np.ndarray):
            return from_array(array, self.value_range)
        with _ONE_LOADS:
            return from_picture(array, self.value_range)

    def size(self, id_: int) -> tuple[int, int]:
        return size_of(self.arrays[id_])

    def deep(self, id_: int) -> Deep | None:
        array = self.arrays[id_]
        if isinstance(array, np.ndarray):
            return deep_of(array)
        with _ONE_LOADS:
            return deep_of(array)

    def within(self, value_range: ValueRange | None) -> Self:
        return replace(self, value_range=value_range)


class _Sha256:
    """A digest that is written to like a file, so that no copy of an array is made for it."""

    def __init__(self) -> None:
        sha256 = hashlib.sha256()
        self.write, self.hexdigest = sha256.update, sha256.hexdigest


# A PIL image reads its file when it is first used, and one image may be in a list twice: threads must not meet in it.
_ONE_LOADS = threading.Lock()


@dataclass(frozen=True, eq=False)
class MixedSource:
    """Images of several sources.

    Attributes:
        sources: {global id: the source that has it}.
    """

    sources: Mapping[int, Source]

    @property
    def ids(self) -> Ids:
        return np.fromiter(self.sources, np.int64, len(self.sources))

    @property
    def value_range(self) -> ValueRange | None:
        return next((source.value_range for source in self.sources.values()), None)

    def name(self, id_: int) -> str:
        return self.sources[id_].name(id_)

    def digest(self, id_: int) -> str:
        return self.sources[id_].digest(id_)

    def image(self, id_: int) -> Image.Image:
        return self.sources[id_].image(id_)

    def size(self, id_: int) -> tuple[int, int]:
        return self.sources[id_].size(id_)

    def deep(self, id_: int) -> Deep | None:
        return self.sources[id_].deep(id_)

    def within(self, value_range: ValueRange | None) -> Self:
        made = {id(source): source.within(value_range) for source in self.sources.values()}  # each once
        return replace(self, sources={id_: made[id(source)] for id_, source in self.sources.items()})


def _ranged(content: str, value_range: ValueRange | None) -> str:
    """A digest that another range changes: the features of an image of more than 8 bits depend on it."""
    return content if value_range is None else _digest(f"{content} values {value_range.low!r} {value_range.high!r}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
