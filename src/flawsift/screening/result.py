"""The result of stage 1, as data: it can be saved, read, edited by a person and handed to stage 2."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from flawsift.data.alignment import ALIGNMENT, Alignment
from flawsift.data.frames import Region
from flawsift.data.images import ImageSet
from flawsift.data.notebook import data_frame, rows_html
from flawsift.data.roi import REGION
from flawsift.detectors.base import Detector
from flawsift.detectors.protocols import Evidence
from flawsift.errors import ParameterError
from flawsift.paths import show
from flawsift.screening.consensus import EFFECT, SUSPECT, Contamination, choose, estimate_contamination
from flawsift.screening.counted import Counted
from flawsift.screening.decisions import SAID, apply_decisions
from flawsift.screening.mixture import DEFECTIVE, GOOD, UNKNOWN, ordinary_scores
from flawsift.screening.options import ScreenOptions
from flawsift.types import Floats, Ids

if TYPE_CHECKING:
    import pandas as pd

WORST = 3  # images that a text names


@dataclass(frozen=True, eq=False)
class SubModelScores:
    """What only a stage 1 by sub-models knows.

    Attributes:
        subset_of: (R, N) subset of each image in each of R partitions.
        score_matrix: (R * k, N) raw scores; row r * k + j is sub-model j of partition r.
        divergence: (N,) equation 2, or None when its weight is 0.
    """

    subset_of: npt.NDArray[np.int64]
    score_matrix: npt.NDArray[np.float32]
    divergence: Floats | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a kind of stage 1 says of the training images, before anything is kept or removed.

    Attributes:
        consensus: (N,) what is ranked; higher is more anomalous.
        held_out_scores: (N,) raw scores by models that have not seen the image.
        patch_maps: (N, h, w) held-out maps on the patch grid, or None.
        submodels: What only sub-models know, or None.
        fitted: A detector fitted on all images, where that was made by the way and is wanted.
        evidence: The worst patch of each image and those nearest to it, or None.
    """

    consensus: Floats
    held_out_scores: Floats
    patch_maps: npt.NDArray[np.float16] | None
    submodels: SubModelScores | None = None
    fitted: Detector | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Screening:
    """Which training images are probably defective, and what stage 2 learns from.

    Attributes:
        ids: (N,) global ids.
        names: (N,) relative paths.
        consensus: (N,) what is ranked; higher is more anomalous.
        held_out_scores: (N,) raw scores by models that have not seen the image.
        probability: (N,) that each image is defective, by `flawsift.screening.mixture`; zeros where nothing was
            estimated.
        kept: (m,) global ids for stage 2, in the order of `ids`.
        keep_share: Share of the images that stage 1 kept, whatever a person has decided since.
        options: Of stage 1, with the screener's name and the `reject_patches` that was used.
        seed: Of the partitions.
        contamination: The estimate behind keep="auto", else None.
        patch_maps: (N, h, w) float16 held-out maps on the patch grid, or None.
        turns: (N, 2, 3) where what was looked at of each image lies in it, by `Alignment.to_crop`; None where all of it
            was looked at.
        rejected: (N, h, w) bool, patches that stage 2 does not learn from, or None.
        submodels: What only sub-models know, or None where stage 1 was of another kind.
        descriptions: (N, D) float16 of `flawsift.screening.lookalikes.describe_images`, or None.
        unreadable: {relative path: reason} of images that could not be used.
        provenance: Detector, backbone, versions, digests: whatever the caller wants kept.
        images: The images, for pictures in a notebook, or None.
        evidence: The worst patch of each image and the nearest patches of other images, which the pages show beside it;
            None where stage 1 does not look for them, as sub-models do not.
        groups: {id: group name} of the images that belong together, as they were given; see `ImageSet.groups`.
        set_aside: Ids that stage 1 set aside before a person changed anything; None where nobody did.
        removed_by_hand: Ids that a person removed, by a decision or in the table, whatever stage 1 says of them.
        kept_by_hand: Ids that a person keeps by a decision. Once they count as good they are no suspects any more, so
            that nothing else tells it.
    """

    ids: Ids
    names: Sequence[str]
    consensus: Floats
    held_out_scores: Floats
    probability: Floats
    kept: Ids
    keep_share: float
    options: ScreenOptions
    seed: int = 0
    contamination: Contamination | None = None
    patch_maps: npt.NDArray[np.float16] | None = None
    turns: npt.NDArray[np.float64] | None = None
    rejected: npt.NDArray[np.bool_] | None = None
    submodels: SubModelScores | None = None
    descriptions: npt.NDArray[np.float16] | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    images: ImageSet | None = None
    evidence: Evidence | None = None
    groups: Mapping[int, str] = field(default_factory=dict)
    set_aside: Ids | None = None
    removed_by_hand: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    kept_by_hand: Ids = field(default_factory=lambda: np.empty(0, np.int64))

    def __repr__(self) -> str:
        counts = [f"{len(self.ids)} images", f"{len(self.removed)} set aside", f"{len(self.kept)} kept"]
        counts += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        estimate = "" if self.contamination is None else f"\nestimated share of defects: {self.contamination.text}"
        worst = ", ".join(f"{row['name']} {row['consensus']:.3g}" for _, row in islice(self._ranked(), WORST))
        return f"Screening of {', '.join(counts)}{estimate}\nmost anomalous: {worst}"

    def _repr_html_(self) -> str:
        return rows_html(self.images, self._ranked(), title=repr(self), total=len(self.ids))

    def to_pandas(self) -> "pd.DataFrame":
        """A table of id (the index), name, consensus, held_out_score, defect_probability and kept.

        Raises:
            FlawsiftError: pandas is not installed.
        """
        columns = {
            "name": [show(name) for name in self.names],
            "consensus": self.consensus.tolist(),
            "held_out_score": self.held_out_scores.tolist(),
            "defect_probability": self.probability.tolist(),
            "kept": self.is_kept.tolist(),
        }
        return data_frame(columns, self.ids.tolist())

    def _ranked(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(id, what is said of it) of each image, the most anomalous first."""
        is_kept = self.is_kept
        for p in np.argsort(-self.consensus, kind="stable").tolist():
            row = {"name": show(self.names[p]), "consensus": float(self.consensus[p])}
            yield int(self.ids[p]), {**row, "verdict": "kept" if is_kept[p] else "set aside"}

    @property
    def n_groups(self) -> int | None:
        """How many groups the images were in, an image alone being one too; None where no image had a group."""
        alone = len(self.ids) - len(self.groups)
        return len(set(self.groups.values())) + alone if self.groups else None

    @property
    def submodel_scores(self) -> SubModelScores:
        """What only sub-models know; ParameterError where stage 1 was of another kind."""
        if self.submodels is None:
            raise ParameterError("This screening was not made by sub-models. Screen by them: --preset paper.")
        return self.submodels

    @property
    def is_kept(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each image goes on to stage 2."""
        return np.isin(self.ids, self.kept)

    @property
    def is_suspect(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each image is defective with a probability above `SUSPECT`."""
        suspect: npt.NDArray[np.bool_] = self.probability > SUSPECT
        return suspect

    @property
    def is_partly_learned(self) -> npt.NDArray[np.bool_]:
        """(N,) whether stage 1 set an image aside, and stage 2 learns its patches that are not rejected, if it can."""
        if self.rejected is None or self.contamination is None:
            return np.zeros(len(self.ids), np.bool_)
        some = self.rejected.any((1, 2)) & ~self.rejected.all((1, 2))
        by_hand = np.isin(self.ids, self.removed_by_hand)  # who removes an image removes all of it
        learned: npt.NDArray[np.bool_] = self.is_suspect & ~self.is_kept & ~by_hand & some
        return learned

    @property
    def removed(self) -> Ids:
        """Ids that are not kept, the most anomalous first."""
        out = ~self.is_kept
        return self.ids[out][np.argsort(-self.consensus[out], kind="stable")]

    @property
    def ranking(self) -> Ids:
        """All ids, the most anomalous first."""
        return self.ids[np.argsort(-self.consensus, kind="stable")]

    def learned_whole_by(self, detector: Detector) -> bool:
        """Whether a detector learns all that no person removed, since it resists defects and nobody set a share."""
        return detector.resists_defects and self.contamination is not None

    def purified(self, train: ImageSet, detector: Detector) -> ImageSet:
        """What a detector of stage 2 learns from: (m,) of the screened images.

        Those that are kept; where it can leave out patches, less those that are rejected, and with the other patches of
        the images that were set aside, which are not in `kept`. One that resists defects learns all but what a person
        removed, unless the share to keep was set by hand.
        """
        if self.learned_whole_by(detector):
            return train.select(self.ids[~np.isin(self.ids, self.removed_by_hand) & np.isin(self.ids, train.ids)])
        if self.rejected is None or not detector.leaves_out_patches:
            return train.select(self.kept)
        partly = self.is_partly_learned & np.isin(self.ids, train.ids)
        learned = self.is_kept | partly
        masks = zip(self.ids[learned].tolist(), self.rejected[learned], strict=True)
        return train.select(self.ids[learned]).without_patches({i: mask for i, mask in masks if mask.any()})

    @property
    def counted_maps(self) -> npt.NDArray[np.floating[Any]] | None:
        """(N, h, w) `patch_maps` as statistics need them, see `flawsift.screening.counted`; None without maps."""
        return None if self.patch_maps is None else self._counted.seen(self.patch_maps)

    @property
    def _counted(self) -> Counted:
        alignment = Alignment.from_json(self.provenance.get(ALIGNMENT))
        if self.turns is None or alignment is None:
            return Counted(region=Region.from_json(self.provenance.get(REGION)))
        return Counted(self.turns, alignment.finer)

    @property
    def kept_by_itself(self) -> Ids:
        """(m,) ids that stage 1 kept before a person changed anything."""
        return self.kept if self.set_aside is None else self.ids[~np.isin(self.ids, self.set_aside)]

    def known(self, choices: Mapping[str, str]) -> npt.NDArray[np.int64]:
        """(N,) `GOOD`, `DEFECTIVE` or `UNKNOWN`: what a person said, by decisions or in the table.

        Args:
            choices: {relative path as shown: "keep", "remove" or "unsure"}.
        """
        removed = np.isin(self.ids, self.removed_by_hand)
        # a suspect that is kept in the table was put back there
        back = np.isin(self.ids, self.kept_by_hand) | (self.is_kept & ~np.isin(self.ids, self.kept_by_itself))
        edited = np.select([removed, back], [DEFECTIVE, GOOD], UNKNOWN)
        said = np.array([SAID.get(choices.get(show(name), ""), UNKNOWN) for name in self.names], np.int64)
        return np.where(said == UNKNOWN, edited, said)

    def with_decisions(self, choices: Mapping[str, str]) -> tuple[Self, dict[str, int]]:
        """The same once a person has decided, and how many decisions of each kind there were.

        An image that a person keeps is good, and so are all its patches. Where stage 1 chose how many images to keep,
        the estimate is made anew with what the person said, and what is kept of the other images follows from it.

        Args:
            choices: {relative path as shown: "keep", "remove" or "unsure"}; see `screening.decisions.read_decisions`.

        Raises:
            InputError: None of the decisions is about one of these images, or no image is left.
        """
        is_kept, counts = apply_decisions(self.names, self.is_kept, choices)
        known = self.known(choices)
        stays = known == GOOD
        now = replace(
            self,
            kept=self.ids[is_kept],
            set_aside=self.ids[~np.isin(self.ids, self.kept_by_itself)],
            removed_by_hand=self.ids[known == DEFECTIVE],
            kept_by_hand=self.ids[stays],
        )
        if self.contamination is None:
            rejected = None if self.rejected is None else self.rejected & (is_kept & ~stays)[:, None, None]
            return replace(now, rejected=rejected), counts
        if not known.any():
            return now, counts
        maps = self.counted_maps
        ordinary, effect = None if maps is None else ordinary_scores(maps), self.contamination.evidence.get(EFFECT, 1.0)
        estimate, probability = estimate_contamination(self.consensus, ordinary, effect, known)
        kept, rejected = choose(probability, maps, self.options.reject_patches or 0.0, estimate)
        is_kept = (kept | stays) & (known != DEFECTIVE)
        if rejected is not None and self.patch_maps is not None:
            rejected = self._counted.over_images(rejected, self.patch_maps.shape[1:]) & ~stays[:, None, None]
        decided = replace(
            now,
            kept=self.ids[is_kept],
            set_aside=self.ids[~kept],
            contamination=estimate,
            probability=probability,
            rejected=rejected,
        )
        return decided, counts
