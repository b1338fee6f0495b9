"""Frozen features of an `ImageSet`, read by id: from a store's memory maps, or from memory."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.errors import InputError
from flawsift.features.store import Entry


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
            layer: torch.from_numpy(self._gather(self._entries(images, layer), layer, np.float32)) for layer in layers
        }

    def loaded(self, images: ImageSet, layers: Sequence[str], views: Sequence[str]) -> "MemoryFeatures":
        """The features of some images and of their derived views in memory, as the numbers are stored."""
        parts = [images, *(images.view(view) for view in views)]
        names = [(part.derived, int(i)) for part in parts for i in part.ids]
        arrays = {layer: self._gather([e for p in parts for e in self._entries(p, layer)], layer) for layer in layers}
        return MemoryFeatures(self.size, self.key, {name: row for row, name in enumerate(names)}, arrays)

    def _entries(self, images: ImageSet, layer: str) -> list[Entry]:
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


def view_digest(digest: str, view: str) -> str:
    """The key of a derived view of an image in a store, of its content digest and the view's name."""
    return hashlib.sha256(f"{digest} {view}".encode()).hexdigest() if view else digest


def _no_view(images: ImageSet) -> InputError:
    view = f"derived view '{images.derived}'" if images.derived else "features"
    return InputError(f"The {view} of these images were not extracted. Attach them first: flawsift.attach.")
