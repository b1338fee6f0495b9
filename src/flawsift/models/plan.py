"""What stage 2 learns from and which scores its threshold comes from: decided once, here, for everybody who trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.protocols import Additive, LeavesOut
from flawsift.executors import Run
from flawsift.models.calibration import Calibration
from flawsift.models.model import set_digest
from flawsift.paths import name_some, show
from flawsift.progress import Stage, steps_of
from flawsift.screening.consensus import design_effect
from flawsift.screening.counted import Counted
from flawsift.screening.decisions import SAID, apply_decisions
from flawsift.screening.mixture import UNKNOWN, ordinary_scores
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen
from flawsift.screening.storage import matched
from flawsift.types import Floats, Ids

HALVES = 2  # of the kept images, for a threshold where stage 1 had another detector: two trainings must do


@dataclass(frozen=True, eq=False)
class Judged:
    """Held-out scores of images: what a threshold is made of.

    Attributes:
        ids: (n,) global ids.
        scores: (n,) by models of the detector that have not seen the image.
        ordinary: (n,) of `flawsift.screening.mixture.ordinary_scores`, or None without maps.
        medians: (n,) what the median patch of each image scores by the same models, or None.
    """

    ids: Ids
    scores: Floats
    ordinary: Floats | None = None
    medians: Floats | None = None

    @classmethod
    def of(cls, screening: Screening) -> Self:
        """Those of a screening."""
        return cls.of_maps(screening.ids, screening.held_out_scores, screening.counted_maps)

    @classmethod
    def of_maps(cls, ids: Ids, scores: Floats, maps: npt.NDArray[np.floating[Any]] | None) -> Self:
        """With (n, h, w) held-out maps, nan where a place does not count."""
        if maps is None:
            return cls(ids, scores)
        flat = maps.reshape(len(maps), -1).astype(np.float64)
        medians = (np.nanmedian if np.isnan(flat).any() else np.median)(flat, axis=1)
        return cls(ids, scores, ordinary_scores(maps), medians)

    def select(self, ids: Ids) -> Self:
        """Those of some images."""
        here = np.isin(self.ids, ids)
        parts = (None if part is None else part[here] for part in (self.ordinary, self.medians))
        return type(self)(self.ids[here], self.scores[here], *parts)

    def median_patch(self, kept: Ids) -> float | None:
        """What the median patch of the median kept image scores; None without maps."""
        some = self.select(kept).medians
        return float(np.median(some)) if some is not None and len(some) else None


NOTHING = Judged(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, eq=False, repr=False)
class TrainingPlan:
    """What a detector of stage 2 is trained on.

    Attributes:
        images: (M,) that it learns from, with the patches that are left out (`ImageSet.rejected`).
        kept: (m,) ids of those that are judged good. The others were set aside, and are learned but for their rejected
            patches.
        train: (N,) all images, those that a person removed among them.
        judged: Held-out scores of this detector, of images of `train`; None where stage 1 has none, so that they are to
            be had from `judge`.
        screening: What it follows from, with the decisions, or None where nothing was screened.
        decisions: How many decisions of each kind there were.
        notes: What a person should know of it.
        known: {id: what a person said of it}, as for `flawsift.screening.mixture.fit_mixture`.
    """

    images: ImageSet
    kept: Ids
    train: ImageSet
    judged: Judged | None = None
    screening: Screening | None = None
    decisions: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    known: Mapping[int, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        left_out = f", {100 * self.images.rejected_share:.1f} % of their patches left out"
        return f"TrainingPlan of {len(self.images)} images, {len(self.kept)} of them kept{left_out}"


def plan_training(
    train: ImageSet,
    detector: Detector,
    screening: Screening | None,
    *,
    choices: Mapping[str, str] | None = None,
    same_detector: bool = False,
) -> TrainingPlan:
    """The plan that follows from a screening and from what a person decided.

    Args:
        train: N images with features attached.
        detector: Of stage 2, unfitted.
        screening: Of these images, which are found by name; None keeps all of them.
        choices: {relative path as shown: "keep", "remove" or "unsure"}.
        same_detector: Whether the held-out scores of the screening are of this detector and backbone. Those of
            sub-models of additive detectors are not taken all the same: a fifth of the images scores far too high. Nor
            are those without sub-models where something is left out, such as what a person removed: they rest on it.

    Raises:
        InputError: Kept images are missing, no image is left, or no decision is about one of these images.
    """
    choices = choices or {}
    if screening is None:
        is_kept, counts = apply_decisions(train.names, np.ones(len(train), np.bool_), choices)
        kept = train.ids[is_kept]
        said = {
            i: SAID.get(choices.get(show(n), ""), UNKNOWN) for i, n in zip(train.ids.tolist(), train.names, strict=True)
        }
        return TrainingPlan(train.select(kept), kept, train, decisions=counts, known=said)
    decided, counts = screening.with_decisions(choices)
    here = matched(decided, train)
    learned = here.purified(train, detector)
    by_itself = here.submodels is None
    whole = len(learned) == len(here.ids) and not learned.rejected_share
    usable = whole if by_itself else not isinstance(detector, Additive)
    judged = Judged.of(here).select(train.ids) if same_detector and usable else None
    note = _difference(screening, train)
    known = dict(zip(here.ids.tolist(), screening.known(choices).tolist(), strict=True))
    return TrainingPlan(learned, here.kept, train, judged, here, counts, (note,) if note else (), known)


def options_for(detector: Detector, options: ScreenOptions) -> ScreenOptions:
    """The options of stage 1 for a detector of stage 2.

    With keep="auto", one that learns from defects is trained on everything; stage 1 ranks the images all the same.
    """
    if detector.learns_from_defects and options.keep == "auto":
        return replace(options, keep=1.0, reject_patches=0.0)
    return options


def judge(plan: TrainingPlan, fitted: Detector, run: Run | None = None) -> Judged:
    """Held-out scores of training images, each by a model that has not seen it; none where there is only one group.

    Those of the plan where it has some. Else, where the detector can leave out images, each image and its group is
    taken out of the fitted model; else two clones are trained on halves, and each scores the other half.

    Args:
        plan: What the detector was trained on; groups stay whole.
        fitted: The detector.
        run: Where clones are trained.
    """
    if plan.judged is not None:
        return plan.judged
    run = run or Run()
    if len(set(plan.images.group_names)) < HALVES:
        return NOTHING
    if isinstance(fitted, LeavesOut):
        held_out = fitted.held_out(plan.train, device=run.device, progress=steps_of(run.progress, Stage.THRESHOLD))
        return Judged.of_maps(plan.train.ids, held_out.scores, Counted.of(plan.train).seen(held_out.maps.numpy()))
    if isinstance(fitted, Additive):
        judged = Judged(plan.images.ids, fitted.held_out_scores(plan.images, device=run.device))
        if plan.screening is None:
            return judged
        screened = Judged.of(plan.screening).select(judged.ids)
        return replace(judged, ordinary=screened.ordinary)
    halves = ScreenOptions(rank_by="submodels", n_subsets=HALVES, keep=1.0, reject_patches=0.0)
    return Judged.of(screen(plan.images, fitted.clone(), halves, run))


def calibrate(plan: TrainingPlan, judged: Judged) -> Calibration:
    """The table of thresholds and false alarms that follows from held-out scores and from what a person decided."""
    is_kept = np.isin(judged.ids, plan.kept)
    members = list(plan.train.select(judged.ids).members.values())
    if len(members) < HALVES:
        return Calibration.of(judged.scores[is_kept])
    known = np.array([plan.known.get(i, UNKNOWN) for i in judged.ids.tolist()], np.int64)
    effect = design_effect(judged.scores, members)
    return Calibration.of_unlabelled(judged.scores, judged.ordinary, effect, is_kept, known)


def _difference(screening: Screening, train: ImageSet) -> str | None:
    """What a screening does not know of the images that it is used for."""
    known = {show(name) for name in screening.names}
    if new := [name for name in train.names if show(name) not in known]:
        return f"Not in the screening, and so not trained on ({len(new)} in all): {name_some(new)}."
    if len(train) == len(known) and screening.provenance.get("images_digest") not in (None, set_digest(train)):
        return "Some images have changed since the screening."
    return None
