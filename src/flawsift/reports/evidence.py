"""What a page shows of an image beside its scores: votes of sub-models, images to compare it with, its patch map."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.detectors.parts.maps import scaled_shape, to_image_grid
from flawsift.reports.overlays import Scale
from flawsift.screening.consensus import own_mask
from flawsift.screening.result import Screening

TOP_SHARE = 0.1  # a sub-model suspects at least this share of the images, however few were set aside
MAP_SIZE = 64  # pixels; just fine enough for the smoothing's sigma of 1, and cheap for thousands of maps
SCALE_SAMPLE = 500  # kept maps, evenly spaced, that the colours rest on: enough for a 99 % quantile


def agreement(screening: Screening) -> tuple[npt.NDArray[np.int64], int, float]:
    """How many sub-models suspect an image on their own, those that trained on it left out.

    A sub-model suspects an image that is in the top share of all images that it did not train on. The share is the one
    that was set aside, and 10 % at least. An image that ties with others is in the top only if all of them are.

    Returns:
        (N,) votes, the number of voters of each image, the top share.
    """
    if screening.submodels is None:
        return np.zeros(len(screening.ids), np.int64), 0, 0.0
    scores, (n_partitions, n) = screening.submodels.score_matrix, screening.submodels.subset_of.shape
    own = own_mask(screening.submodels.subset_of, len(scores) // n_partitions)
    if own.all(0).any():  # a single subset: no image is held out, so every sub-model votes
        own = np.zeros_like(own)
    share = max(TOP_SHARE, 1 - len(screening.kept) / n)
    votes = np.zeros(n, np.int64)
    for row, mine in zip(scores, own, strict=True):
        others = np.sort(row[~mine])
        at_or_above = len(others) - np.searchsorted(others, row, "left")
        votes += ~mine & (at_or_above <= max(1, round(share * len(others))))
    return votes, int((~own).sum(0).max()), share


def is_typical(screening: Screening) -> npt.NDArray[np.bool_]:
    """(N,) the half of the kept images with the lower consensus: what to compare a suspect with.

    Of all kept images the nearest to a defective one would often be one with the same defect that was missed.
    """
    kept = screening.is_kept
    if not kept.any():
        return kept
    typical: npt.NDArray[np.bool_] = kept & (screening.consensus <= np.median(screening.consensus[kept]))
    return typical


def smoothed(patch_map: npt.NDArray[np.float16]) -> Tensor:
    """A patch map (h, w) of the screening as it is drawn: smoothed, with a longer edge of MAP_SIZE."""
    finite = torch.from_numpy(np.nan_to_num(patch_map.astype(np.float32)))
    return to_image_grid(finite.unsqueeze(0), scaled_shape(finite.unsqueeze(0), MAP_SIZE))[0]


def map_scale(screening: Screening) -> Scale | None:
    """Colours anchored to the kept images; None without maps.

    Transparent up to the median of the kept images' peaks, outlined from the 99 % quantile on: of the smoothed maps,
    as they are shown, since smoothing lowers a peak.
    """
    if screening.patch_maps is None:
        return None
    kept = screening.patch_maps[screening.is_kept]
    sample = kept[:: max(1, len(kept) // SCALE_SAMPLE)]
    grids = torch.from_numpy(np.nan_to_num(sample.astype(np.float32)))
    maps = to_image_grid(grids, scaled_shape(grids, MAP_SIZE))
    return Scale.of(maps.amax((1, 2)).numpy(), None)
