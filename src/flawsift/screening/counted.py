"""Held-out maps as statistics need them: without what does not count, and each place of an aligned part in one place.

Maps lie over the images, and what lies outside of a region of interest or of an aligned part is as low as the lowest
within. Most of an image may lie outside: a quantile, a median or a deviation of all cells is then one of the outside.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from flawsift.data.frames import Frame, Region, limited
from flawsift.data.images import ImageSet

N_AT_ONCE = 32  # images: 16 places in each of their cells take 128 MB on a grid of 128 x 128


@dataclass(frozen=True, eq=False)
class Counted:
    """Which cells of maps over some images count.

    Attributes:
        turns: (N, 2, 3) `Alignment.to_crop` of aligned images; None where they were not.
        finer: Their `Alignment.finer`.
        region: Of each image, what counts; None for all.
    """

    turns: npt.NDArray[np.float64] | None = None
    finer: tuple[float, float] = (1.0, 1.0)
    region: Region | None = None

    @classmethod
    def of(cls, images: ImageSet) -> Self:
        """Of images with features attached."""
        if images.alignment is None or not all(i in images.poses for i in images.ids.tolist()):
            return cls(region=images.region)
        turns = [images.alignment.to_crop(images.poses[i]) for i in images.ids.tolist()]
        return cls(np.array(turns).reshape(-1, 2, 3), images.alignment.finer)

    def seen(self, maps: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        """(N, H, W) maps over the images as they are, or (N, h, w) of what was looked at, nan where it does not count.

        Those of aligned images are over the crop: a cell is the same place of each part.
        """
        if self.turns is None:
            inside = None if self.region is None else Frame(maps.shape[1:], region=self.region).counted(*maps.shape[1:])
            return maps if inside is None else np.where(inside.numpy(), maps, np.nan)
        down, across = limited(self.finer)
        h, w = max(1, round(maps.shape[1] / down)), max(1, round(maps.shape[2] / across))
        parts = [np.empty((0, h, w), np.float32)]
        for start in range(0, len(maps), N_AT_ONCE):
            frame = self._frame((h, w), start)
            some = torch.from_numpy(maps[start : start + N_AT_ONCE].astype(np.float32))
            inside = frame.counted(h, w)
            assert inside is not None
            parts.append(frame.back_in_input(some, h, w).masked_fill(~inside, torch.nan).numpy())
        return np.concatenate(parts)

    def over_images(self, marked: npt.NDArray[np.bool_], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """(N, h, w) marked cells of `seen` on the grid (H, W) of the maps."""
        if self.turns is None:
            return marked
        h, w = marked.shape[1:]
        parts = [np.empty((0, *shape), np.bool_)]
        for start in range(0, len(marked), N_AT_ONCE):
            some = torch.from_numpy(marked[start : start + N_AT_ONCE])
            parts.append(self._frame((h, w), start).marks_over_image(some, *shape).numpy())
        return np.concatenate(parts)

    def _frame(self, shape: tuple[int, int], start: int) -> Frame:
        assert self.turns is not None
        return Frame(shape, turns=torch.from_numpy(self.turns[start : start + N_AT_ONCE]), finer=self.finer)
