"""Maps: the only upsampling and smoothing code, of taps, patch grids and image grids alike."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.data.images import Batch
from flawsift.types import Shape, Size, as_shape

# Gaussian sigma 4 on a 256 px map is what PaDiM, PatchCore and RD share (their 224 to 288 px); it scales with the map,
# so that at other sizes a defect of the same share of the image is smoothed as much.
SIGMA_PER_PIXEL = 4.0 / 256
TRUNCATE = 4.0  # scipy's default: kernel radius in sigmas, so that maps match `scipy.ndimage.gaussian_filter`


def smooth(maps: Tensor, sigma: float, *, radius: int | None = None) -> Tensor:
    """Gaussian smoothing with reflected borders, equal to `scipy.ndimage.gaussian_filter(mode="reflect")`.

    Args:
        maps: (B, h, w).
        sigma: In cells of the map; 0 returns the maps as they are.
        radius: Of the kernel in cells; None takes four sigmas, as scipy does.

    Returns:
        (B, h, w).
    """
    if sigma <= 0:
        return maps
    radius = int(TRUNCATE * sigma + 0.5) if radius is None else radius
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    rows = _reflect_ids(maps.shape[1], radius, maps.device)
    columns = _reflect_ids(maps.shape[2], radius, maps.device)
    padded = maps[:, rows][:, :, columns].unsqueeze(1)  # (B, 1, h + 2r, w + 2r)
    vertical = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    return F.conv2d(vertical, kernel.view(1, 1, 1, -1)).squeeze(1)


def _reflect_ids(n: int, radius: int, device: torch.device) -> Tensor:
    """Source positions of a border that repeats the edge cell (d c b a | a b c d | d c b a), for any radius."""
    positions = torch.arange(-radius, n + radius, device=device) % (2 * n)
    return torch.where(positions < n, positions, 2 * n - 1 - positions)


def upsample(maps: Tensor, size: Size) -> Tensor:
    """Bilinear upsampling of (B, h, w) to (B, H, W), corners not aligned."""
    return F.interpolate(maps.unsqueeze(1), as_shape(size), mode="bilinear", align_corners=False).squeeze(1)


def scaled_shape(maps: Tensor, edge: int) -> Shape:
    """(H, W) with the aspect ratio of (B, h, w) maps and a longer edge of so many cells."""
    h, w = (int(n) for n in maps.shape[1:])  # under a tracer they are tensors
    return max(1, round(edge * h / max(h, w))), max(1, round(edge * w / max(h, w)))


def largest_grid(taps: Sequence[Tensor]) -> tuple[int, int]:
    """(h, w) of the (B, C, h, w) with most cells; of equals, the first."""
    return max(((tap.shape[2], tap.shape[3]) for tap in taps), key=lambda grid: grid[0] * grid[1])


def on_one_grid(features: Sequence[Tensor], *, finest: bool = True) -> list[Tensor]:
    """Several (B, C, h, w) on the finest grid among them, bilinearly, or on the coarsest, as means over its cells."""
    size = largest_grid(features)
    if not finest:
        size = min(((f.shape[2], f.shape[3]) for f in features), key=lambda grid: grid[0] * grid[1])
    resized = []
    for f in features:
        if f.shape[2:] == size:
            resized.append(f)
        elif finest:
            resized.append(F.interpolate(f, size=size, mode="bilinear", align_corners=False))
        else:
            resized.append(F.adaptive_avg_pool2d(f, size))
    return resized


def to_image_grid(maps: Tensor, size: Size, sigma: float | None = None) -> Tensor:
    """Patch-grid maps (B, h, w) as smoothed maps (B, H, W) in the size of the network's input, in pixels.

    `sigma` is that of the Gaussian in pixels; None takes `SIGMA_PER_PIXEL` of the longer edge.
    """
    return smooth(upsample(maps, size), SIGMA_PER_PIXEL * max(as_shape(size)) if sigma is None else sigma)


def top_mean(maps: Tensor, share: float) -> Tensor:
    """(B,) mean of the highest `share` of the cells of (B, h, w) maps, at least one cell."""
    flat = maps.flatten(1)
    return flat.topk(max(1, int(share * flat.shape[1])), dim=1).values.mean(1)


def as_float16(maps: Tensor) -> npt.NDArray[np.float16]:
    """Maps as stage 1 stores them; what float16 cannot hold is far beyond any real score, and is bounded."""
    bounded: npt.NDArray[np.float16] = maps.clamp(-6e4, 6e4).half().numpy()
    return bounded


def embed_batch(batch: Batch, layers: Sequence[str]) -> Tensor:
    """(B, C, h, w) `embed_patches` of some layers of a batch, made once: all who look at one batch share it."""
    key = ("embed_patches", *layers)
    if key not in batch.memo:
        batch.memo[key] = embed_patches([batch.features[layer] for layer in layers])
    embedding: Tensor = batch.memo[key]
    return embedding


def embed_patches(taps: Sequence[Tensor]) -> Tensor:
    """Patch embeddings as PatchCore has them: 3 x 3 means (zero padding counted), on the largest grid, concatenated.

    Args:
        taps: Of one or more layers, each (B, C_l, h_l, w_l).

    Returns:
        (B, C, h, w), C the sum of all C_l, channels last in memory, which is how patches are compared.
    """
    means = [F.avg_pool2d(tap.contiguous(memory_format=torch.channels_last), 3, 1, 1) for tap in taps]
    return torch.cat(on_one_grid(means), 1)
