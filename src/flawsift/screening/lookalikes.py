"""Which images look alike: a description of each, and those most like it. For people who compare, not for scores."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from flawsift.data.images import ImageSet

CHANNELS = 512  # at most, evenly spaced: plenty to find a similar picture, and 10 MB for 10,000 images
TINY = 1e-6  # of a channel's spread: a constant channel says nothing
LIMIT = 1e4  # standard deviations; far beyond any real value, but float16 must not overflow


def describe_images(images: ImageSet, layers: Sequence[str]) -> npt.NDArray[np.float16] | None:
    """(N, D) mean of each feature channel over the image, in standard deviations of the set; None without layers.

    Args:
        images: N images with features attached.
        layers: Those to read.
    """
    if not layers or not len(images):
        return None
    with torch.inference_mode():
        means = [
            torch.cat([batch.features[layer].float().mean((2, 3)) for layer in layers], dim=1)
            for batch in images.batches(layers, batch_size=64)
        ]
    values = torch.cat(means)
    values = values[:, :: max(1, -(-values.shape[1] // CHANNELS))]
    spread = values.std(0, correction=0)
    standard = (values - values.mean(0)) / torch.where(spread > TINY, spread, torch.inf)
    result: npt.NDArray[np.float16] = standard.nan_to_num().clamp(-LIMIT, LIMIT).half().numpy()
    return result


def most_alike(
    descriptions: npt.NDArray[np.float16], position: int, among: npt.NDArray[np.bool_], count: int
) -> list[int]:
    """Positions of the `count` images most like the one at `position`, itself left out, the most similar first.

    Args:
        descriptions: (N, D) from `describe_images`.
        position: Of the image.
        among: (N,) which images count.
        count: At most this many.
    """
    candidates = np.flatnonzero(among)
    candidates = candidates[candidates != position]
    difference = descriptions[candidates].astype(np.float32) - descriptions[position].astype(np.float32)
    order = np.argsort((difference**2).sum(1), kind="stable")
    return [int(p) for p in candidates[order[:count]]]
