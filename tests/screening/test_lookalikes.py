"""Descriptions of images, and the nearest ones by them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flawsift.data.images import ImageSet
from flawsift.screening.lookalikes import describe_images, most_alike


class Given:
    """Features that are given: {layer: (N, C, h, w)}."""

    size, key = 64, "given"

    def __init__(self, features: dict[str, torch.Tensor]) -> None:
        self.features = features

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        return {layer: self.features[layer][torch.from_numpy(images.ids)] for layer in layers}


def test_descriptions_are_standardised_means_and_bounded() -> None:
    features = {
        "a": 5 * torch.randn(90, 600, 3, 3, generator=torch.Generator().manual_seed(0)),
        "b": torch.ones(90, 3, 2, 2),
    }
    images = replace(ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 90), reader=Given(features))
    found = describe_images(images, ["a", "b"])
    assert found is not None
    assert found.shape == (90, 302)  # every second of 603 channels
    means = features["a"].mean((2, 3))
    expected = (means - means.mean(0)) / means.std(0, correction=0)
    np.testing.assert_allclose(found[:, :300], expected[:, ::2], atol=5e-3)
    assert (found[:, 300:] == 0).all()  # constant channels say nothing
    assert describe_images(images, []) is None
    like = most_alike(found, 4, np.arange(90) > 2, 5)
    distances = ((found.astype(np.float32) - found[4].astype(np.float32)) ** 2).sum(1)
    assert like == [p for p in np.argsort(distances, kind="stable").tolist() if p > 2 and p != 4][:5]
