"""What users have, as an `ImageSet`: a folder, files, a pattern, PIL images, arrays, or a list or stream of them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift.data.decoding import ARRAYS, NotAnImage, check_array
from flawsift.data.folders import groups_by_id, tell_animations, with_pages
from flawsift.data.images import ArraySource, FileSource, ImageSet, MixedSource, Source
from flawsift.data.listing import parts_among
from flawsift.data.values import ValueRange
from flawsift.errors import InputError
from flawsift.paths import name_some, show
from flawsift.progress import Progress, Stage, silent

OneImage: TypeAlias = str | os.PathLike[str] | npt.NDArray[Any] | Image.Image
Images: TypeAlias = ImageSet | OneImage | Iterable[OneImage]

_ONE = f"a path to an image file, a PIL image, or {ARRAYS}"


def as_images(
    images: Images,
    *,
    groups: Mapping[str, str] | None = None,
    value_range: tuple[float, float] | None = None,
    progress: Progress = silent,
) -> ImageSet:
    """What users have as an `ImageSet`; an iterator is read to its end.

    Ids are 0..N-1: in the order of a list, in the order of the sorted names for a folder or a pattern. Names are paths
    relative to the folder, or to the deepest folder that holds all files of a list or pattern; what is in memory is
    called "array-ID" or "image-ID". Pixels are read, and odd types converted, when they are needed: arrays and PIL
    images are not copied, so leave them as they are.

    Args:
        images: A folder; an image file; a pattern such as "parts/*.png" or "parts/**/*.png" (a file or folder of that
            very name comes first); a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of numbers or
            bool, read as `flawsift.data.decoding.from_array` says; a list or an iterator of files, PIL images and
            arrays; or an `ImageSet`.
        groups: {name: group name} for images that belong together; in place of those of an `ImageSet`. The pages of a
            TIFF are images of their own, called "a.tif#page=1" and so on, and a group where nothing else is said.
        value_range: Which values are black and white, of images of more than 8 bits. None leaves it as it is, and
            `screen` and `fit` learn it from all images.
        progress: Told before images are looked for; an `ImageSet` has found them.

    Raises:
        InputError: There is no image, a file is missing, or comes twice in a list, or no group is of one of the images.
        NotAnImage: Something else was given, alone or in a list; it is a TypeError too.
    """
    if not isinstance(images, ImageSet):
        progress(Stage.FINDING, 0, 1)
    if isinstance(images, ImageSet):
        made = images
    elif isinstance(images, str | os.PathLike):
        made = _from_path(images)
    elif isinstance(images, np.ndarray | Image.Image):
        made = _from_list([images], "This")
    elif isinstance(images, Iterable) and not isinstance(images, Mapping | bytes):
        made = _from_list(list(images), "Image {}")
    else:
        raise NotAnImage(
            f"Images cannot be of type {type(images).__name__}. Give a folder, a pattern such as 'parts/*.png', "
            f"{_ONE}, a list or an iterator of these, or an ImageSet."
        )
    if value_range is not None:
        made = made.within(ValueRange(*value_range))
    if groups is None:
        return made
    return replace(made, groups=groups_by_id(dict(zip(made.ids.tolist(), made.names, strict=True)), groups))


def is_stream(images: Images) -> TypeGuard[Iterable[OneImage]]:
    """Whether images come one after the other and nobody knows how many: an iterator, or what else has no length."""
    return isinstance(images, Iterable) and not isinstance(images, Sized)


def in_pieces(images: Images, size: int) -> Iterator[ImageSet]:
    """The images in sets of at most `size`, with ids that count up.

    A stream (see `is_stream`) is read piece by piece and no piece is kept. Its names are paths relative to the working
    folder where a file lies below it, else to the root of the file system. A file that is missing, which is an error
    in a list, is an unreadable image of a stream.

    Args:
        images: As for `as_images`.
        size: The most images in a piece.

    Raises:
        InputError, NotAnImage: As for `as_images`, for a stream when the image is reached.
    """
    if not is_stream(images):
        whole = as_images(images)
        yield from (whole.select(whole.ids[start : start + size]) for start in range(0, len(whole), size))
        return
    stream, start = iter(images), 0
    while piece := list(islice(stream, size)):
        made = _piece(piece, start)
        yield made
        start += len(made)
    if not start:
        raise InputError("The iterator gave no image. Was it read to its end before? Make a new one, or give a list.")


def _from_path(given: str | os.PathLike[str]) -> ImageSet:
    if not os.fspath(given):  # as Path it would be the working folder
        raise InputError("The path of the images is empty. Give a folder, an image file or a pattern such as *.png.")
    path = Path(given)
    if os.path.isdir(path):
        return ImageSet.from_folder(path)
    if os.path.lexists(path):  # a broken link too: an image that cannot be read
        return _from_files([_absolute(path)])
    if not glob.has_magic(str(path)):
        raise InputError(f"'{show(path)}' does not exist. Give a folder, an image file or a pattern such as *.png.")
    matches = [_absolute(p) for p in glob.glob(str(path), recursive=True) if not os.path.isdir(p)]
    if not matches:
        raise InputError(f"No file matches '{show(path)}'. Check the pattern; ** stands for any folders.")
    root = Path(os.path.commonpath([match.parent for match in matches]))
    parts = parts_among(root, [match.relative_to(root).as_posix() for match in sorted(matches, key=Path.as_posix)])
    if not parts:
        raise InputError(f"'{show(path)}' matches masks and heatmaps only, no picture of a part. Check the pattern.")
    return _from_files([root / part for part in parts])


def _from_list(items: Sequence[OneImage], what: str) -> ImageSet:
    if not items:
        raise InputError("The list of images is empty. Check where it comes from.")
    files, memory = _sorted_out(items, what, 0)
    if folders := [str(path) for path in files.values() if os.path.isdir(path)]:
        raise InputError(f"{len(folders)} folders are in a list of images: {name_some(folders)}. Give a folder alone.")
    # a broken link is there: an image that cannot be read, as in a folder
    if missing := [str(path) for path in files.values() if not os.path.lexists(path)]:
        pattern = " Give a pattern alone, not in a list." if any(map(glob.has_magic, missing)) else ""
        listed = name_some(missing)
        raise InputError(f"{len(missing)} of {len(items)} images do not exist: {listed}. Check the paths.{pattern}")
    if twice := [path for path, n in Counter(files.values()).items() if n > 1]:
        raise InputError(f"{len(twice)} files come more than once: {name_some(map(str, twice))}. Give each once.")
    if not memory:
        return _from_files(list(files.values()))
    files, memory = _sorted_out(_pages(items), what, 0)
    tell_animations(Path(), map(str, files.values()))
    sources: dict[int, Source] = dict.fromkeys(memory, ArraySource(memory))
    if not files:
        return _over(sources[0])
    sources |= dict.fromkeys(files, _file_source(files))
    return _over(MixedSource({id_: sources[id_] for id_ in sorted(sources)}))


def _piece(items: Sequence[OneImage], start: int) -> ImageSet:
    """Some images of a stream, the first of them with the id `start`."""
    files, memory = _sorted_out(_pages(items), "Image {}", start)
    here = Path.cwd()
    sources: dict[int, Source] = dict.fromkeys(memory, ArraySource(memory))
    for id_, path in files.items():
        root = here if path.is_relative_to(here) else Path(path.anchor)
        sources[id_] = FileSource(root, {id_: path.relative_to(root).as_posix()})
    return _over(MixedSource({id_: sources[id_] for id_ in sorted(sources)}))


def _pages(items: Sequence[OneImage]) -> list[OneImage]:
    """The items, with each page of a TIFF of several in its place."""
    paged: list[OneImage] = []
    for item in items:
        if isinstance(item, str | os.PathLike):
            paged += with_pages(Path(), [os.fspath(_absolute(item))])
        else:
            paged.append(item)
    return paged


def _sorted_out(
    items: Sequence[OneImage], what: str, start: int
) -> tuple[dict[int, Path], dict[int, npt.NDArray[Any] | Image.Image]]:
    """Files and what is in memory, each by id."""
    files: dict[int, Path] = {}
    memory: dict[int, npt.NDArray[Any] | Image.Image] = {}
    for id_, item in enumerate(items, start):
        if isinstance(item, str | os.PathLike):
            files[id_] = _absolute(item)
        elif isinstance(item, np.ndarray):
            check_array(item, what.format(id_))
            memory[id_] = item
        elif isinstance(item, Image.Image):
            memory[id_] = item
        else:
            raise NotAnImage(f"{what.format(id_)} is of type {type(item).__name__}. Give {_ONE}.")
    return files, memory


def _from_files(files: Sequence[Path]) -> ImageSet:
    tell_animations(Path(), map(str, files))
    return _over(_file_source(dict(enumerate(map(Path, with_pages(Path(), map(str, files)))))))


def _file_source(files: Mapping[int, Path]) -> FileSource:
    """Files under the deepest folder that holds them all; under their full paths where none does."""
    try:
        root = Path(os.path.commonpath([path.parent for path in files.values()]))
    except ValueError:  # two drives of Windows
        return FileSource(Path(), {id_: path.as_posix() for id_, path in files.items()})
    return FileSource(root, {id_: path.relative_to(root).as_posix() for id_, path in files.items()})


def _over(source: Source) -> ImageSet:
    return ImageSet(source.ids, source, groups_by_id({int(i): source.name(int(i)) for i in source.ids}, {}))


def _absolute(path: str | os.PathLike[str]) -> Path:
    # not resolve(): the target of a link has another name than the one that was given
    return Path(os.path.abspath(path))
