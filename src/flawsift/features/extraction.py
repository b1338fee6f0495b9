"""Each image through the frozen backbone once: into the feature store, or piece by piece into memory."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from flawsift.data.alignment import Alignment, Pose
from flawsift.data.decoding import UnreadableImage, to_pixels
from flawsift.data.facts import ImageFacts, facts_of
from flawsift.data.frames import content_of
from flawsift.data.images import FeatureReader, ImageSet
from flawsift.data.inputs import Images, as_images, in_pieces, is_stream
from flawsift.data.values import ValueRange
from flawsift.data.views import derive
from flawsift.errors import InputError, OutputError
from flawsift.features.backbones import Backbone
from flawsift.features.readers import MemoryFeatures, StoredFeatures, view_digest
from flawsift.features.store import DTYPES, Arrays, FeatureStore
from flawsift.files import ensure_folder
from flawsift.paths import name_some
from flawsift.progress import Progress, Stage, silent
from flawsift.types import Shape, Size, as_shape

# Images in a shard of the store, and in a piece: 10 s of work on 2 cores is the most that a kill can cost. Of inputs of
# more pixels than `SHARD_AREA` fewer, so that memory does not grow with them.
SHARD, SHARD_AREA = 64, 512**2
T = TypeVar("T")
log = logging.getLogger("flawsift")


def attach(
    images: ImageSet,
    backbone: Backbone,
    layers: Sequence[str],
    *,
    views: Sequence[str] = (),
    store: FeatureStore | None = None,
    progress: Progress = silent,
) -> tuple[ImageSet, dict[int, str]]:
    """Extract what is missing and attach frozen features to a set.

    Args:
        images: The set.
        backbone: The frozen backbone.
        layers: Layer names or aliases such as "stride8".
        views: Derived views to extract too, each with ids of the same set and entries of its own in the store.
        store: Where features are kept; None keeps them in memory, for small sets only.
        progress: Told about files that are read and images that the backbone looks at.

    Returns:
        The readable images with features attached, and {id: reason} for the others.

    Raises:
        InputError: No image can be read.
        OutputError: The store cannot be written, or its disk is too full.
    """
    if store is None:
        data, failed, _ = _attach_memory(images, backbone, layers, views)
    else:
        data, failed = _attach_stored(images, backbone, layers, store, progress)
        for view in views:
            derived, _ = _attach_stored(data.view(view), backbone, layers, store, progress)
            data = replace(data, reader=_joined(data.reader, derived.reader))
    if not len(data) and len(images):
        reason = next(iter(failed.values()))
        raise InputError(f"None of the {len(images)} images can be read; the first one: {reason}.")
    _tell_without_part(_without_part(data), len(data))
    return data, failed


def _without_part(images: ImageSet) -> list[str]:
    """Names of aligned images in which there is no part."""
    return [images.source.name(i) for i in images.ids.tolist() if i in images.poses and not images.poses[i].found]


def _tell_without_part(names: Sequence[str], n_images: int) -> None:
    if names:
        log.warning(
            "%d of %d images show no part before the background (%s): they are looked at around their middle.",
            len(names),
            n_images,
            name_some(names),
        )


class Piece(NamedTuple):
    """Some images on their way through the backbone.

    Attributes:
        images: All of them.
        data: The readable ones, with features in memory.
        failed: {id: reason} of the others.
        facts: {id: what is known of the picture} of the readable ones; empty where they were not decoded.
    """

    images: ImageSet
    data: ImageSet
    failed: dict[int, str]
    facts: Mapping[int, ImageFacts]


def stream(
    images: Images,
    backbone: Backbone,
    layers: Sequence[str],
    value_range: ValueRange | None = None,
    alignment: Alignment | None = None,
    *,
    size: int = SHARD,
    progress: Progress = silent,
) -> Iterator[Piece]:
    """Images in pieces with features in memory, so that memory stays flat; nothing is stored.

    A set that has this backbone's features attached is not extracted again.

    Args:
        images: As for `flawsift.data.inputs.in_pieces`.
        backbone: The frozen backbone.
        layers: Layer names or aliases such as "stride8".
        value_range: By which images of more than 8 bits are read; None leaves what the images have.
        alignment: How images are turned and cropped; None leaves them as they are.
        size: The most images in a piece; features do not depend on it.
        progress: Told about each piece. Of an iterator, whose length is unknown, the total is what has been read.

    Raises:
        InputError: As for `flawsift.data.inputs.as_images`.
    """
    given = images if is_stream(images) else as_images(images)
    size = min(size, shard_of(backbone))
    total = len(given) if isinstance(given, ImageSet) else 0
    done, without = 0, list[str]()
    for piece in in_pieces(given, size):
        progress(Stage.SCORING, done, total or done + len(piece))
        piece = piece.within(value_range).aligned(alignment)
        attached = piece.reader is not None and piece.reader.key == backbone.key
        seen = Piece(piece, piece, {}, {}) if attached else Piece(piece, *_attach_memory(piece, backbone, layers))
        without += _without_part(seen.data)
        yield seen
        done += len(piece)
    progress(Stage.SCORING, done, done)
    _tell_without_part(without, done)


def loaded(images: ImageSet, layers: Sequence[str], views: Sequence[str] = (), *, pixels: bool = False) -> ImageSet:
    """The set with its features in memory instead of on disk, so that it can travel to a machine without the files.

    Args:
        images: With features attached.
        layers: Layers to take along.
        views: Derived views to take along.
        pixels: Take decoded images along too.

    Raises:
        UnreadableImage: An image cannot be decoded any more.
    """
    if pixels:
        arrays = [np.asarray(images.image(int(i)), np.uint8) for i in images.ids]
        images = replace(images, source=ImageSet.from_arrays(arrays, ids=images.ids.tolist()).source)
    if not isinstance(images.reader, StoredFeatures):
        return images
    return replace(images, reader=images.reader.loaded(images, layers, views))


def _attach_memory(
    images: ImageSet, backbone: Backbone, layers: Sequence[str], views: Sequence[str] = ()
) -> tuple[ImageSet, dict[int, str], dict[int, ImageFacts]]:
    pixels, failed, facts, poses = _decode(images, backbone.size)
    good = images.select([i for i in images.ids if int(i) in pixels])
    pictures_of = {i: (one.width, one.height) for i, one in facts.items()}
    good = replace(good, contents=_framed(images, pictures_of, backbone.size), poses=poses)
    pictures = {("", int(i)): pixels[int(i)] for i in good.ids}
    pictures |= {(view, i): derive(pixels[i], view) for view in views for _, i in list(pictures)}
    arrays = _extract(backbone, list(pictures.values()), layers, "float16") if len(good) else {}
    rows = {key: row for row, key in enumerate(pictures)}
    return replace(good, reader=MemoryFeatures(backbone.size, backbone.key, rows, arrays)), failed, facts


def _attach_stored(
    images: ImageSet, backbone: Backbone, layers: Sequence[str], store: FeatureStore, progress: Progress
) -> tuple[ImageSet, dict[int, str]]:
    names = {layer: backbone.resolve(layer).name for layer in layers}
    exact = sorted(set(names.values()))
    contents, failed = _digests(images, progress)
    digests = {i: view_digest(digest, images.seen_as) for i, digest in contents.items()}
    index = store.index(store.space(backbone), exact, set(digests.values()))
    complete = set.intersection(*(set(entries) for entries in index.values())) if index else set()
    # the first id of each content stands for all its copies
    first_of = {digest: id_ for id_, digest in reversed(digests.items()) if digest not in complete}
    missing = sorted(first_of.values())
    if missing:
        store.sweep()
        _check_space(store, backbone, list(names.values()), len(missing))
    undecodable: dict[str, str] = {}
    poses: dict[int, Pose] = {}
    n_shard = shard_of(backbone)
    for start in range(0, len(missing), n_shard):
        progress(Stage.LOOKING, start, len(missing))
        part = images.select(missing[start : start + n_shard])
        pixels, bad, _, found = _decode(part, backbone.size)
        poses |= found
        undecodable.update((digests[i], reason) for i, reason in bad.items())
        if pixels:
            arrays = _extract(backbone, list(pixels.values()), exact, store.dtype)
            store.write(backbone, [digests[i] for i in pixels], arrays)
    if missing:
        progress(Stage.LOOKING, len(missing), len(missing))
        index = store.index(store.space(backbone), exact, set(digests.values()))
    failed |= {i: undecodable[d] for i, d in digests.items() if d in undecodable}
    good = images.select([i for i in images.ids if int(i) not in failed])
    entries = {layer: index[name] for layer, name in names.items()}
    files = {layer: f"{name}.npy" for layer, name in names.items()}
    if any(digests[int(i)] not in rows for rows in entries.values() for i in good.ids):
        raise OutputError(
            f"The feature cache '{store.root}' does not give back what was just written to it. Its disk is damaged, "
            "or another program clears it; move it with FLAWSIFT_CACHE or --cache."
        )
    poses = _poses(good, poses)
    reader = StoredFeatures(backbone.size, backbone.key, contents, entries, files)
    return replace(good, contents=_contents(good, backbone.size), poses=poses, reader=reader), failed


def _joined(reader: FeatureReader | None, other: FeatureReader | None) -> FeatureReader | None:
    """A reader of the same images that knows what another one knows too."""
    if not isinstance(reader, StoredFeatures) or not isinstance(other, StoredFeatures):
        return reader
    return replace(reader, entries={layer: {**rows, **other.entries[layer]} for layer, rows in reader.entries.items()})


def _digests(images: ImageSet, progress: Progress) -> tuple[dict[int, str], dict[int, str]]:
    digests: dict[int, str] = {}
    failed: dict[int, str] = {}
    for n, i in enumerate(images.ids):
        if n % SHARD == 0:
            progress(Stage.READING, n, len(images))
        try:
            digests[int(i)] = images.source.digest(int(i))
        except UnreadableImage as error:
            failed[int(i)] = str(error)
    progress(Stage.READING, len(images), len(images))
    return digests, failed


def shard_of(backbone: Backbone) -> int:
    """How many images at a time go through a backbone."""
    return max(1, SHARD * SHARD_AREA // max(SHARD_AREA, math.prod(backbone.shape)))


def _contents(images: ImageSet, size: Size) -> dict[int, Shape]:
    """{id: rows and columns of the network's input} of images that do not take all of it."""
    if isinstance(size, int):
        return {}
    return _framed(images, {i: images.source.size(i) for i in images.ids.tolist()}, size)


def _framed(images: ImageSet, pictures: Mapping[int, tuple[int, int]], size: Size) -> dict[int, Shape]:
    full, alignment = as_shape(size), images.alignment
    seen = pictures if alignment is None else {id_: alignment.size(picture) for id_, picture in pictures.items()}
    contents = {id_: content_of(picture, size) for id_, picture in seen.items()}
    return {id_: content for id_, content in contents.items() if content != full}


class _Decoded(NamedTuple):
    """{id: ...} of some images: (3, H, W) uint8 in the network's input and facts, of those that can be decoded; the
    reason why others cannot; and where parts lie, of aligned ones."""

    pixels: dict[int, Tensor]
    failed: dict[int, str]
    facts: dict[int, ImageFacts]
    poses: dict[int, Pose]


def _decode(images: ImageSet, size: Size) -> _Decoded:
    alignment = images.alignment

    def one(id_: int) -> tuple[Tensor, ImageFacts, Pose | None] | UnreadableImage:
        try:
            image = images.image(id_)
            pose = None if alignment is None else alignment.pose(image)
            pixels = to_pixels(image if alignment is None or pose is None else alignment.crop(image, pose), size)
        except UnreadableImage as error:
            return error
        return derive(pixels, images.derived), facts_of(image, pixels), pose

    result = _Decoded({}, {}, {}, {})
    for id_, found in _in_threads(one, images.ids.tolist()):
        if isinstance(found, UnreadableImage):
            result.failed[id_] = str(found)
            continue
        result.pixels[id_], result.facts[id_], pose = found
        if pose is not None:
            result.poses[id_] = pose
    return result


def _poses(images: ImageSet, known: Mapping[int, Pose]) -> dict[int, Pose]:
    """{id: where the part lies} of aligned images: those known, and of images whose features were in the cache."""
    alignment = images.alignment
    if alignment is None:
        return {}
    return {
        **known,
        **dict(
            _in_threads(
                lambda id_: alignment.pose(images.image(id_)), [i for i in images.ids.tolist() if i not in known]
            )
        ),
    }


def _in_threads(one: Callable[[int], T], ids: Sequence[int]) -> Iterable[tuple[int, T]]:
    """(id, what is made of it): Pillow decodes outside the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(zip(ids, pool.map(one, ids), strict=True))


def _extract(backbone: Backbone, pixels: Sequence[Tensor], layers: Sequence[str], dtype: str) -> Arrays:
    arrays = {}
    for layer, value in backbone.extract(torch.stack(list(pixels)), layers).items():
        with np.errstate(over="ignore"):  # an overflow is told below, with the layer's name
            array = value.numpy().astype(DTYPES[dtype])
        if not np.isfinite(array).all():
            raise InputError(
                f"Layer '{layer}' of {backbone.name} gives values that {dtype} cannot hold. "
                "Use FeatureStore(dtype='float32') or check the weights."
            )
        arrays[layer] = array
    return arrays


def _check_space(store: FeatureStore, backbone: Backbone, layers: Sequence[str], n: int) -> None:
    infos = [backbone.resolve(layer) for layer in layers]
    cells = sum(info.channels * math.prod(-(-edge // info.stride) for edge in backbone.shape) for info in infos)
    need = n * cells * np.dtype(DTYPES[store.dtype]).itemsize
    try:
        ensure_folder(store.root, need_bytes=need)
    except OutputError as error:
        raise OutputError(f"{error} The feature cache can be moved with FLAWSIFT_CACHE or --cache.") from error
