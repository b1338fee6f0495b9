"""Frozen features of an `ImageSet`, read by id: from a store's files, or from memory."""

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
from flawsift.features.store import ArrayHeader, Entry
from flawsift.types import Size


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """Features of known images, read from a store. No file stays open, however many shards there are.

    Attributes:
        size: Of the network input.
        key: Of the backbone that made them.
        digests: {global id: content digest}.
        entries: {layer as asked: {content digest, or `view_digest`: entry}}.
        files: {layer as asked: name of its file in a shard}.
    """

    size: Size
    key: str
    digests: Mapping[int, str]
    entries: Mapping[str, Mapping[str, Entry]]
    files: Mapping[str, str]
    _headers: dict[Path, ArrayHeader] = field(default_factory=dict, repr=False)

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
            return [known[view_digest(self.digests[int(i)], images.seen_as)] for i in images.ids]
        except KeyError:
            raise _no_view(images) from None

    def _gather(self, entries: Sequence[Entry], layer: str, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """(n, C, h, w) of some entries, in their order; as the numbers are stored unless a type is given."""
        file = self.files[layer]
        out = np.empty((0,), dtype)
        start = 0
        for shard, run in itertools.groupby(entries, key=lambda e: e.shard):
            values = self._rows(shard / file, [e.row for e in run])
            if not start:
                out = np.empty((len(entries), *values.shape[1:]), dtype or values.dtype)
            out[start : start + len(values)] = values
            start += len(values)
        return out

    def _rows(self, path: Path, rows: Sequence[int]) -> npt.NDArray[Any]:
        """(n, C, h, w) some rows of a file, each run of neighbours in one piece."""
        try:
            with path.open("rb") as file:
                if path not in self._headers:
                    self._headers[path] = ArrayHeader(file)
                header = self._headers[path]
                values = np.empty((len(rows), *header.shape[1:]), header.dtype)
                start = 0
                for _, run in itertools.groupby(enumerate(rows), key=lambda at: at[1] - at[0]):
                    neighbours = [row for _, row in run]
                    part = values[start : start + len(neighbours)]
                    file.seek(header.offset + neighbours[0] * values[0].nbytes)
                    if file.readinto(part.data.cast("B")) != part.nbytes:
                        raise ValueError("it ends early")
                    start += len(neighbours)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cached features '{path}' cannot be read any more ({error}). Run the same command again: it computes "
                "what is damaged anew."
            ) from error
        return values


@dataclass(frozen=True, eq=False)
class MemoryFeatures:
    """Features of a few images in memory: what `predict` streams through.

    Attributes:
        size: Of the network input.
        key: Of the backbone that made them.
        rows: {(derived view, global id): row}.
        arrays: {layer as asked: (n, C, h, w)}.
    """

    size: Size
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
    """The key of an image in a store, of its content digest and how it is seen (`ImageSet.seen_as`)."""
    return hashlib.sha256(f"{digest} {view}".encode()).hexdigest() if view else digest


def _no_view(images: ImageSet) -> InputError:
    view = f"derived view '{images.derived}'" if images.derived else "features"
    return InputError(f"The {view} of these images were not extracted. Attach them first: flawsift.attach.")
