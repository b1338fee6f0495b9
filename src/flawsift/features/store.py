"""The feature store: each image through the frozen backbone once, for any number of detectors.

On disk, below one root folder:

    <space>/                     one per backbone key, number type and format version
      space.json                 what the key stands for
      <shard>/                   up to 64 images, written to a temporary folder and renamed when complete
        index.json               content digests of the images, per layer its shape and SHA-256
        <layer>.npy              (n, C, h, w), opened as a read-only memory map

An image is found by the SHA-256 of its file's content, so renamed, moved, copied or added images cost nothing or only
themselves, and a killed run repeats at most one shard.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.views import derive
from flawsift.errors import InputError, OutputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.files import content_digest, ensure_folder, new_folder, write_json
from flawsift.progress import Progress, silent

FORMAT = 1  # of the folder layout above; a change makes old entries invisible
SHARD = 64  # images in a shard: 10 s of work on 2 cores is the most that a kill can cost
STALE_SECONDS = 24 * 3600  # temporary folders of dead runs older than this are swept
DTYPES: Mapping[str, npt.DTypeLike] = {"float16": np.float16, "float32": np.float32}

Arrays = dict[str, npt.NDArray[Any]]


def default_root() -> Path:
    """`$FLAWSIFT_CACHE`, else `$XDG_CACHE_HOME/flawsift`, else `~/.cache/flawsift`."""
    if named := os.environ.get("FLAWSIFT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flawsift"


@dataclass(frozen=True)
class Entry:
    """Where one image's features lie."""

    shard: Path
    row: int


@dataclass(eq=False)
class FeatureStore:
    """Frozen features on disk, found by image content.

    Attributes:
        root: The store's folder; made when first written.
        dtype: "float16" halves disk and memory traffic at a relative error of 5e-4; "float32" is exact.
    """

    root: Path = field(default_factory=default_root)
    dtype: str = "float16"

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if self.dtype not in DTYPES:
            raise ParameterError(f"FeatureStore.dtype must be one of {sorted(DTYPES)}, got '{self.dtype}'.")

    def space(self, backbone: Backbone) -> Path:
        """The folder of a backbone's features."""
        return self.root / f"{backbone.key}-{self.dtype}-v{FORMAT}"

    def shards(self) -> Iterator[Path]:
        """All complete shards of all backbones."""
        return (index.parent for index in sorted(self.root.glob("*/*/index.json")))

    def index(self, space: Path) -> dict[str, dict[str, Entry]]:
        """{layer: {content digest: entry}} of one backbone's features; damaged shards are passed over."""
        found: dict[str, dict[str, Entry]] = {}
        for path in sorted(space.glob("*/index.json")):
            try:
                content = json.loads(path.read_text())
                for layer, row_of in itertools.product(content["layers"], [content["digests"]]):
                    entries = found.setdefault(layer, {})
                    entries.update((digest, Entry(path.parent, row)) for row, digest in enumerate(row_of))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # `verify` names it; here its images are simply computed again
        return found

    def write(self, backbone: Backbone, digests: Sequence[str], arrays: Arrays) -> Path:
        """Add one shard: {layer: (n, C, h, w)} for n images.

        Raises:
            OutputError: The store cannot be written; no half-written shard is left.
        """
        space = self.space(backbone)
        if not (space / "space.json").exists():
            ensure_folder(space)
            write_json(space / "space.json", {"backbone": backbone.spec, "key": backbone.key, "dtype": self.dtype})
        name = hashlib.sha256(json.dumps([list(digests), sorted(arrays)]).encode()).hexdigest()[:16]
        with new_folder(space / name) as folder:
            layers = {}
            for layer, array in arrays.items():
                np.save(folder / f"{layer}.npy", array, allow_pickle=False)
                layers[layer] = {"shape": list(array.shape[1:]), "sha256": _file_digest(folder / f"{layer}.npy")}
            (folder / "index.json").write_text(json.dumps({"digests": list(digests), "layers": layers}))
        return space / name

    def sweep(self) -> None:
        """Remove temporary folders that dead runs left behind more than a day ago."""
        for left in itertools.chain(self.root.glob("*/.*.tmp"), self.root.glob("*/.*.old")):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)

    def summary(self) -> list[dict[str, Any]]:
        """One row per backbone: key, images, layers, shards, bytes."""
        rows = []
        for space in sorted(p for p in self.root.glob("*") if (p / "space.json").exists()):
            index = self.index(space)
            files = list(space.glob("*/*.npy"))
            digests = set().union(*(entries.keys() for entries in index.values())) if index else set()
            rows.append(
                {
                    "key": space.name,
                    "images": len(digests),
                    "layers": sorted(index),
                    "shards": len({f.parent for f in files}),
                    "bytes": sum(f.stat().st_size for f in files),
                }
            )
        return rows

    def verify(self, *, repair: bool = False) -> list[str]:
        """Recompute every shard's SHA-256.

        Args:
            repair: Remove the damaged shards, so that the next run computes their images again.

        Returns:
            One line per damaged shard: its path and what is wrong.
        """
        problems = []
        for folder in sorted(p for p in self.root.glob("*/*") if p.is_dir() and not p.name.startswith(".")):
            if problem := _shard_problem(folder):
                problems.append(f"{folder}: {problem}")
                if repair:
                    shutil.rmtree(folder, ignore_errors=True)
        return problems

    def clear(self) -> int:
        """Remove every space of this store, and nothing else in its folder. Returns the bytes freed."""
        freed = 0
        for space in [p for p in self.root.glob("*") if (p / "space.json").exists()]:
            freed += sum(f.stat().st_size for f in space.rglob("*") if f.is_file())
            shutil.rmtree(space, ignore_errors=True)
        return freed


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """Features of known images, read from a store's memory maps. Workers reopen it by path when it is pickled.

    Attributes:
        size: Edge length of the network input.
        key: Of the backbone that made them.
        digests: {global id: content digest}.
        entries: {layer as asked: {content digest, or `view_digest`: entry}}.
        files: {layer as asked: name of its file in a shard}.
    """

    size: int
    key: str
    digests: Mapping[int, str]
    entries: Mapping[str, Mapping[str, Entry]]
    files: Mapping[str, str]
    _open: dict[Path, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
        """{layer: (N, C, h, w)} float32 of the view, in its order."""
        return {
            layer: torch.from_numpy(self._gather(self._found(images, layer), layer, np.float32)) for layer in layers
        }

    def loaded(self, images: ImageSet, layers: Sequence[str], views: Sequence[str]) -> "MemoryFeatures":
        """The features of some images and of their derived views in memory, as the numbers are stored."""
        parts = [images, *(images.view(view) for view in views)]
        names = [(part.derived, int(i)) for part in parts for i in part.ids]
        arrays = {layer: self._gather([e for p in parts for e in self._found(p, layer)], layer) for layer in layers}
        return MemoryFeatures(self.size, self.key, {name: row for row, name in enumerate(names)}, arrays)

    def _found(self, images: ImageSet, layer: str) -> list[Entry]:
        if layer not in self.entries:
            raise InputError(f"Layer '{layer}' was not extracted; attached are: {', '.join(self.entries)}.")
        known = self.entries[layer]
        try:
            return [known[view_digest(self.digests[int(i)], images.derived)] for i in images.ids]
        except KeyError:
            raise _no_view(images) from None

    def _gather(self, entries: Sequence[Entry], layer: str, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """(n, C, h, w) of some entries, in their order; as the numbers are stored unless a type is given."""
        file = self.files[layer]
        first = self._map(entries[0].shard / file)
        out = np.empty((len(entries), *first.shape[1:]), dtype or first.dtype)
        start = 0
        for shard, run in itertools.groupby(entries, key=lambda e: e.shard):
            rows = [e.row for e in run]
            out[start : start + len(rows)] = self._map(shard / file)[rows]
            start += len(rows)
        return out

    def _map(self, path: Path) -> npt.NDArray[Any]:
        if path not in self._open:
            try:
                self._open[path] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"Cached features '{path}' cannot be read ({error}). Run `flawsift cache verify --repair`."
                ) from error
        return self._open[path]


@dataclass(frozen=True, eq=False)
class MemoryFeatures:
    """Features of a few images in memory: what `predict` streams through.

    Attributes:
        size: Edge length of the network input.
        key: Of the backbone that made them.
        rows: {(derived view, global id): row}.
        arrays: {layer as asked: (n, C, h, w)}.
    """

    size: int
    key: str
    rows: Mapping[tuple[str, int], int]
    arrays: Mapping[str, npt.NDArray[Any]]

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
        """{layer: (N, C, h, w)} float32 of the view, in its order."""
        try:
            rows = [self.rows[images.derived, int(i)] for i in images.ids]
        except KeyError:
            raise _no_view(images) from None
        return {layer: torch.from_numpy(self.arrays[layer][rows].astype(np.float32)) for layer in layers}


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
        progress: Told about each shard.

    Returns:
        The readable images with features attached, and {id: reason} for the others.

    Raises:
        InputError: No image can be read.
        OutputError: The store cannot be written, or its disk is too full.
    """
    if store is None:
        data, failed = _attach_memory(images, backbone, layers, views)
    else:
        data, failed = _attach_stored(images, backbone, layers, store, progress)
        for view in views:
            _attach_stored(data.view(view), backbone, layers, store, progress)
        if views and isinstance(data.reader, StoredFeatures):
            data = replace(data, reader=_reopened(data.reader, backbone, store))
    if not len(data) and len(images):
        reason = next(iter(failed.values()))
        raise InputError(f"None of the {len(images)} images can be read; the first one: {reason}.")
    return data, failed


def stream(
    images: ImageSet, backbone: Backbone, layers: Sequence[str], *, progress: Progress = silent
) -> Iterator[tuple[ImageSet, dict[int, str]]]:
    """The set in pieces of one shard, each with features in memory, so that memory stays flat; see `attach`.

    A set that has this backbone's features attached is not extracted again.
    """
    attached = images.reader is not None and images.reader.key == backbone.key
    for start in range(0, len(images), SHARD):
        progress("features", start, len(images))
        part = images.select(images.ids[start : start + SHARD])
        yield (part, {}) if attached else _attach_memory(part, backbone, layers)
    progress("features", len(images), len(images))


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
) -> tuple[ImageSet, dict[int, str]]:
    pixels, failed = _decode(images, backbone.size)
    good = images.select([i for i in images.ids if int(i) in pixels])
    found = {("", int(i)): pixels[int(i)] for i in good.ids}
    found |= {(view, i): derive(pixels[i], view) for view in views for _, i in list(found)}
    arrays = _extract(backbone, list(found.values()), layers, "float16") if len(good) else {}
    rows = {key: row for row, key in enumerate(found)}
    return replace(good, reader=MemoryFeatures(backbone.size, backbone.key, rows, arrays)), failed


def _attach_stored(
    images: ImageSet, backbone: Backbone, layers: Sequence[str], store: FeatureStore, progress: Progress
) -> tuple[ImageSet, dict[int, str]]:
    names = {layer: backbone.resolve(layer).name for layer in layers}
    digests, failed = _digests(images)
    index = store.index(store.space(backbone))
    have = [set(index.get(name, {})) for name in set(names.values())]
    complete = set.intersection(*have) if have else set()
    # the first id of each content stands for all its copies
    first_of = {digest: id_ for id_, digest in reversed(digests.items()) if digest not in complete}
    missing = sorted(first_of.values())
    if missing:
        store.sweep()
        _check_space(store, backbone, list(names.values()), len(missing))
    undecodable: dict[str, str] = {}
    for start in range(0, len(missing), SHARD):
        progress("features", start, len(missing))
        part = images.select(missing[start : start + SHARD])
        pixels, bad = _decode(part, backbone.size)
        undecodable.update((digests[i], reason) for i, reason in bad.items())
        if pixels:
            arrays = _extract(backbone, list(pixels.values()), sorted(set(names.values())), store.dtype)
            store.write(backbone, [digests[i] for i in pixels], arrays)
    if missing:
        progress("features", len(missing), len(missing))
        index = store.index(store.space(backbone))
    failed |= {i: undecodable[d] for i, d in digests.items() if d in undecodable}
    good = images.select([i for i in images.ids if int(i) not in failed])
    entries = {layer: index.get(name, {}) for layer, name in names.items()}
    files = {layer: f"{name}.npy" for layer, name in names.items()}
    return replace(good, reader=StoredFeatures(backbone.size, backbone.key, digests, entries, files)), failed


def _no_view(images: ImageSet) -> InputError:
    view = f"derived view '{images.derived}'" if images.derived else "features"
    return InputError(f"The {view} of these images were not extracted. Attach them first: flawsift.attach.")


def _reopened(reader: StoredFeatures, backbone: Backbone, store: FeatureStore) -> StoredFeatures:
    """The same reader, with what was stored since."""
    index = store.index(store.space(backbone))
    return replace(reader, entries={layer: index.get(backbone.resolve(layer).name, {}) for layer in reader.entries})


def view_digest(digest: str, view: str) -> str:
    """What a derived view of an image is found by: its content digest and the view's name."""
    return hashlib.sha256(f"{digest} {view}".encode()).hexdigest() if view else digest


def _digests(images: ImageSet) -> tuple[dict[int, str], dict[int, str]]:
    digests: dict[int, str] = {}
    failed: dict[int, str] = {}
    for i in images.ids:
        try:
            digests[int(i)] = view_digest(content_digest(images.source.read(int(i))), images.derived)
        except UnreadableImage as error:
            failed[int(i)] = str(error)
    return digests, failed


def _decode(images: ImageSet, size: int) -> tuple[dict[int, Tensor], dict[int, str]]:
    """{id: (3, size, size) uint8} of the images that can be decoded, {id: reason} of the others."""

    def one(id_: int) -> Tensor | UnreadableImage:
        try:
            return images.pixels_of(id_, size)
        except UnreadableImage as error:
            return error

    ids = [int(i) for i in images.ids]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter lock
        results = dict(zip(ids, pool.map(one, ids), strict=True))
    pixels = {i: r for i, r in results.items() if isinstance(r, Tensor)}
    return pixels, {i: str(r) for i, r in results.items() if isinstance(r, UnreadableImage)}


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
    cells = sum(info.channels * (backbone.size // info.stride) ** 2 for info in infos)
    need = n * cells * np.dtype(DTYPES[store.dtype]).itemsize
    try:
        ensure_folder(store.root, need_bytes=need)
    except OutputError as error:
        raise OutputError(f"{error} The feature cache can be moved with FLAWSIFT_CACHE or --cache.") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_problem(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "index.json").read_text())
        for layer, expected in content["layers"].items():
            if _file_digest(folder / f"{layer}.npy") != expected["sha256"]:
                return f"{layer}.npy does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    return None
