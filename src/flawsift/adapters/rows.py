"""Rows of features in place of images: what tabular libraries give, and what their models take.

A row is an image of one patch, so that every detector that reads features takes rows as they are.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.features.readers import MemoryFeatures

LAYER = "rows"  # the one layer that a detector of rows reads


@dataclass(frozen=True, eq=False)
class Columns:
    """Brings each column of a table to mean 0 and deviation 1, as of the training rows; constant ones become 0.

    Attributes:
        mean: (D,).
        deviation: (D,), 1 for constant columns.
    """

    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @classmethod
    def of(cls, rows: npt.NDArray[Any]) -> "Columns":
        """Those of (N, D) training rows."""
        mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
        # rounding leaves a constant column a deviation of its own, which must not be blown up
        flat = deviation <= np.finfo(np.float32).eps * np.abs(mean)
        return cls(mean, np.where(flat, 1.0, deviation))

    def standardized(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """(N, D) rows in these units."""
        values: npt.NDArray[np.float32] = ((rows - self.mean) / self.deviation).astype(np.float32)
        return values


def as_patches(rows: npt.NDArray[np.float32]) -> ImageSet:
    """(N, D) rows as N images of one patch, ids 0..N-1; they have features and no pixels."""
    nothing = np.zeros((1, 1), np.uint8)
    names = {("", i): i for i in range(len(rows))}
    reader = MemoryFeatures(1, LAYER, names, {LAYER: rows[:, :, None, None]})
    return replace(ImageSet.from_arrays([nothing] * len(rows)), reader=reader)


def pooled(batch: Batch, layers: Sequence[str]) -> Tensor:
    """(B, D) mean and maximum of each channel of some layers: a row for each image, whatever its patch grid.

    The mean tells what the image is like as a whole, the maximum whether one place stands out.
    """
    parts = []
    for layer in layers:
        tap = batch.features[layer]
        counted = None if batch.frame is None else batch.frame.counted(*tap.shape[2:])
        if counted is None:
            parts += [tap.flatten(2).mean(2), tap.flatten(2).amax(2)]
            continue
        inside = counted.expand(len(tap), -1, -1).flatten(1)[:, None]  # (B, 1, P)
        values = tap.flatten(2)
        parts += [(values * inside).sum(2) / inside.sum(2), values.masked_fill(~inside, -torch.inf).amax(2)]
    return torch.cat(parts, 1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for libraries that draw from them, and leave them as they were."""
    legacy, plain = np.random.get_state(), random.getstate()  # noqa: NPY002  # what such libraries draw from
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(plain)
