"""A detector of your own: distance to the mean feature of the training set, checked and used in both stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flawsift.detector import Detector
from flawsift.images import Batch, ImageSet
from flawsift.screening import screen
from flawsift.testing import CHECKS, easy_set, with_features


@dataclass(kw_only=True, eq=False)
class MeanDistance(Detector):
    """Distance of each patch to the mean patch, in units of each channel's spread."""

    name: ClassVar[str] = "mean_distance"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    layers: Sequence[str] = ("stride8",)

    def fit(self, data: ImageSet, *, device: str = "auto") -> Self:
        """See `Detector.fit`."""
        self._forget()
        patches = torch.cat([b.features[self.layers[0]].flatten(2).transpose(1, 2) for b in data.batches(self.layers)])
        flat = patches.flatten(0, 1)  # (N * P, C)
        self.mean_, self.scale_ = flat.mean(0), flat.std(0, correction=0).clamp_min(1e-6)
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        x = batch.features[self.layers[0]]  # (B, C, h, w)
        return ((x - self.mean_[:, None, None]) / self.scale_[:, None, None]).norm(dim=1)


def main() -> None:
    """Run the common checks, then stage 1."""
    for check in CHECKS:
        check(MeanDistance())
        print("passed:", check.__name__)
    data = easy_set()
    result = screen(with_features(data.images, MeanDistance()), MeanDistance(), keep=0.8)
    print("contamination before:", data.truth.contamination, "after:", data.truth.select(result.kept).contamination)


if __name__ == "__main__":
    main()
