"""TwoBanks: a PatchCore of all patches and a SoftPatch of those that are no outliers, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.maps import top_mean
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.softpatch import SoftPatch


@dataclass(kw_only=True, eq=False)
class TwoBanks(Detector):
    """Mean of the distance to a bank of all patches and the weighted distance to a denoised one.

    The first bank is PatchCore's, the second SoftPatch's, both learned from the same images. A rare normal patch is in
    the first bank and has a near match there; a defect among the training images is missing from the second, or its
    entry has a weight above 1. The map is the mean of the two maps, which need no common scale: both are distances
    between the same embeddings, the second times a factor that is about 1 for inliers. The image score is the mean,
    over the two maps, of the mean of the `top_share` highest patches of each: they need not be the same patches, so the
    score can exceed every cell of the mean map. What stage 1 compares as expected by the model is the first bank's.

    Cost: That of both: about twice PatchCore's for the fit, and a second search of a bank of the same size for scoring.
    Contamination: Resisted by the second bank as by SoftPatch alone, by half of the score. Patches that stage 1 rejects
        are left out of the first bank only.
    Differs from the paper: There is none; the parts differ from theirs as `PatchCore` and `SoftPatch` say.
    Reference: The two papers that those name, and the rows of `benchmarks/README.md`, "The default detector".

    Attributes:
        coreset_ratio: Size of each bank as a share of the pooled patches.
        max_patches: Most patches in each pool; None for all.
        outlier_share: Share of the patches that the second bank is not chosen from.
        top_share: Share of the patches of a map, the highest, that its image score is the mean of: 4 of 32 x 32.
    """

    name: ClassVar[str] = "twobanks"
    leaves_out_patches: ClassVar[bool] = True  # the first bank; the second has means of its own
    state_format: ClassVar[int] = 2  # 1 had other names for the two banks
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    coreset_ratio: float = 0.01
    max_patches: int | None = 200_000
    outlier_share: float = 0.15
    top_share: float = 0.004

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "be in (0, 1]")
        self._require("max_patches", self.max_patches is None or self.max_patches >= 1, "be at least 1, or None")
        self._require("outlier_share", 0 <= self.outlier_share < 1, "be in [0, 1)")
        self._require("top_share", 0 < self.top_share <= 1, "be in (0, 1]")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        plain, denoised = (part.fit(data, device=device).state() for part in self._parts())
        self.plain_bank_ = plain  # memory_bank_ (M, C) and owner_ (M,) of PatchCore
        self.denoised_bank_ = denoised  # memory_bank_ (M, C), owner_ and weight_ (M,) of SoftPatch
        return self

    def _parts(self) -> tuple[PatchCore, SoftPatch]:
        """The two, unfitted."""
        shared: dict[str, Any] = {
            "layers": self.layers,
            "seed": self.seed,
            "coreset_ratio": self.coreset_ratio,
            "max_patches": self.max_patches,
        }
        return PatchCore(**shared), SoftPatch(**shared, outlier_share=self.outlier_share)

    def _fitted_parts(self, device: str) -> tuple[PatchCore, SoftPatch]:
        """The two with what they learned, for use on a device."""

        def make() -> tuple[PatchCore, SoftPatch]:
            plain, denoised = self._parts()
            return plain.with_state(self.plain_bank_), denoised.with_state(self.denoised_bank_)

        return self._cached("parts", device, make)

    def _maps(self, batch: Batch, device: str) -> Tensor:
        return self._score_batch(batch, device)[0]

    def _score_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        maps = torch.stack([part._maps(batch, device) for part in self._fitted_parts(device)])  # (2, B, h, w)
        scores = torch.stack([top_mean(one, self.top_share) for one in maps])
        return maps.mean(0), scores.mean(0)

    def _expected(self, batch: Batch, device: str) -> Tensor:
        return self._fitted_parts(device)[0]._expected(batch, device)
