"""Recurring defects, seen without labels: patches far from most images that are nevertheless close to another image.

Letters: N images of P patches with C channels each, R reference images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flawsift.detectors.parts.robust import MAD_TO_SIGMA

BLOCK_FLOATS = 1 << 24  # distances held at a time, 64 MB
COPY = 2e-3  # distances below this share of a vector's length are rounding of float32 products: copies
FENCE = 3.0  # robust standard deviations above the median: 1 in 1000 of a normal distribution
MIN_TWINS = 3  # images; two alike are a coincidence or a copied file
TWIN_SHARE = 0.2  # of the unusual images: below, chance twins of many defects would warn


@dataclass(frozen=True)
class Recurrence:
    """The sign of recurring defects that is seen without labels.

    An image is unusual when its patch that is farthest from most reference images stands out among those of all images
    (`fence`). It has a twin when a patch of it beyond the fence is nevertheless nearer to some other image than an
    ordinary patch is to its nearest.

    Attributes:
        unusual: (U,) positions of unusual images.
        twins: (T,) those that have a twin.
        fence: Distance to the median reference image above which an image's worst patch is unusual.
        ordinary: Median distance of a patch to its nearest reference image, copies not counted: where most of each
            image is one saturated background, a median of all would be 0, and nothing nearer than that.
    """

    unusual: Sequence[int]
    twins: Sequence[int]
    fence: float
    ordinary: float

    @property
    def suspicious(self) -> bool:
        """Whether a good part of the unusual images have twins."""
        return len(self.twins) >= max(MIN_TWINS, TWIN_SHARE * len(self.unusual))


def reference_distances(patches: Tensor, references: Tensor, *, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N, P) distance of each patch to the nearest reference image, and to the median one, its own image left out.

    Args:
        patches: (N, P, C).
        references: (R,) positions of the reference images.
        owners: (N,) integers; references of the same owner are left out too.
    """
    n, p, channels = patches.shape
    owners = torch.arange(n) if owners is None else owners
    # a common offset is no part of a distance, but float32 products lose the distances beside it
    patches = patches - patches.mean((0, 1))
    flat = patches.reshape(-1, channels)
    rounding = COPY * flat.norm(dim=1).view(n, p, 1)
    parts = []
    for part in torch.split(references, max(1, BLOCK_FLOATS // (n * p * p))):
        near = torch.cdist(flat, patches[part].reshape(-1, channels)).view(n, p, len(part), p).amin(3)
        near = near.masked_fill(near < rounding, 0.0)
        own = owners[:, None] == owners[part]  # the distance of an image to itself is no evidence
        parts.append(near.masked_fill(own[:, None, :], torch.nan))
    to_image = torch.cat(parts, dim=2)  # (N, P, R)
    return to_image.nan_to_num(nan=torch.inf).amin(2), to_image.nanmedian(dim=2).values


def find_recurrence(to_nearest: Tensor, to_median: Tensor) -> Recurrence:
    """From (N, P) distances to the nearest and to the median reference image; see `Recurrence`."""
    worst = to_median.amax(1)
    middle = worst.median()
    fence = float(middle + FENCE * MAD_TO_SIGMA * (worst - middle).abs().median())
    apart = to_nearest[to_nearest > 0]
    ordinary = float(apart.median()) if len(apart) else 0.0
    unusual = worst > fence
    twins = ((to_median > fence) & (to_nearest < ordinary)).any(1)
    return Recurrence(unusual.nonzero()[:, 0].tolist(), twins.nonzero()[:, 0].tolist(), fence, ordinary)
