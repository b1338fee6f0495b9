"""Features on a common scale: statistics of channels over a training set, and what divides by them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.errors import InputError


def channel_statistics(
    data: ImageSet, layers: Sequence[str], features_of: Callable[[Batch], Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """{layer: (2, C)} mean and standard deviation of each channel over all images and positions.

    Constants of published recipes assume the scale of ResNet taps; features are divided by this first. Constant
    channels get a standard deviation of 1.

    Args:
        data: N images with features attached.
        layers: Layers to read.
        features_of: What a detector makes of a batch, {name: (B, C, h, w)}; None for the layers themselves.

    Raises:
        InputError: The set is empty.
    """
    count: dict[str, float] = {}
    sums: dict[str, Tensor] = {}
    for batch in data.batches(layers):
        for layer, features in (features_of(batch) if features_of else batch.features).items():
            x = features.double().transpose(0, 1).flatten(1)  # (C, B h w)
            part = torch.stack([x.sum(1), x.square().sum(1)])
            sums[layer] = sums[layer] + part if layer in sums else part
            count[layer] = count.get(layer, 0) + x.shape[1]
    statistics = {}
    for layer, (total, square) in sums.items():
        mean = total / count[layer]
        deviation = (square / count[layer] - mean.square()).clamp_min(0).sqrt()
        # a deviation within rounding of the mean is none: dividing by it would magnify rounding
        flat = deviation <= 1e-6 * mean.abs().clamp_min(1e-6)
        statistics[layer] = torch.stack([mean, torch.where(flat, torch.ones_like(deviation), deviation)]).float()
    if not statistics:
        raise InputError("A fit needs at least one image, got an empty set.")
    return statistics


def standardized(features: Tensor, statistics: Tensor) -> Tensor:
    """(B, C, h, w) with each channel at mean 0 and standard deviation 1 by (2, C) statistics."""
    mean, deviation = statistics.to(features.device)[:, None, :, None, None]
    scaled: Tensor = (features - mean) / deviation
    return scaled


def scaled(features: Tensor, statistics: Tensor) -> Tensor:
    """(B, C, h, w) with each channel at standard deviation 1 by (2, C) statistics, its mean kept: angles need one."""
    divided: Tensor = features / statistics[1].to(features.device)[:, None, None]
    return divided


def whitening(data: ImageSet, layers: Sequence[str], ridge: float) -> dict[str, Tensor]:
    """{layer: (1 + C, C)} the mean m of all fibres x, and below it a matrix W: (x - m) W has nearly covariance I.

    Args:
        data: N images with features attached.
        layers: Layers to read.
        ridge: Added to the eigenvalues of the correlation matrix: directions without variance are not magnified.

    Raises:
        InputError: The set is empty.
    """
    statistics = channel_statistics(data, layers)
    scatter, count = {layer: torch.zeros((), dtype=torch.float64) for layer in layers}, dict.fromkeys(layers, 0)
    for batch in data.batches(layers):
        for layer in layers:
            x = standardized(batch.features[layer], statistics[layer]).double().transpose(0, 1).flatten(1)
            scatter[layer] = scatter[layer] + x @ x.T
            count[layer] += x.shape[1]
    whitened = {}
    for layer, (mean, deviation) in statistics.items():
        values, vectors = torch.linalg.eigh(scatter[layer] / count[layer])
        root = vectors * (values.clamp_min(0) + ridge).rsqrt() @ vectors.T
        whitened[layer] = torch.cat([mean[None], (root / deviation[:, None]).float()])
    return whitened
