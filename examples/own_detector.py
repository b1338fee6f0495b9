"""A detector of your own, checked and used in stage 1: distance to the nearest of some random training patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.neighbors import nearest
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.screening.options import ScreenOptions
from flawsift.screening.stage1 import screen
from flawsift.testing import CHECKS, easy_set, with_features


@dataclass(kw_only=True, eq=False)
class RandomBank(Detector):
    """Distance of each patch to the nearest of some random training patches."""

    name: ClassVar[str] = "random_bank"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    layers: Sequence[str] = ("stride8",)
    bank_size: int = 500

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        patches = torch.cat([_patches(batch.features[self.layers[0]]) for batch in data.batches(self.layers)])
        generator = torch.Generator().manual_seed(self.seed)
        self.bank_ = patches[torch.randperm(len(patches), generator=generator)[: self.bank_size]]
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        x = batch.features[self.layers[0]]  # (B, C, h, w)
        distances, _ = nearest(_patches(x), self.bank_)
        return distances.view(len(x), *x.shape[2:])


def _patches(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * h * w, C)


def main() -> None:
    """Run the common checks, then stage 1."""
    for check in CHECKS:
        check(RandomBank())
        print("passed:", check.__name__)
    data = easy_set()
    result = screen(with_features(data.images, RandomBank()), RandomBank(), ScreenOptions(keep=0.8))
    print("contamination before:", data.truth.contamination, "after:", data.truth.select(result.kept).contamination)


if __name__ == "__main__":
    main()
