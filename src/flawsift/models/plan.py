"""What stage 2 learns from and which scores its threshold comes from: decided once, here, for everybody who trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.protocols import Additive, LeavesOut
from flawsift.executors import Run
from flawsift.models.model import set_digest
from flawsift.paths import name_some, show
from flawsift.screening.decisions import apply_decisions
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen
from flawsift.screening.storage import matched
from flawsift.types import Floats, Ids

HALVES = 2  # of the kept images, for a threshold where stage 1 had another detector: two trainings must do


@dataclass(frozen=True, eq=False, repr=False)
class TrainingPlan:
    """What a detector of stage 2 is trained on.

    Attributes:
        images: (M,) that it learns from, with the patches that are left out (`ImageSet.rejected`).
        kept: (m,) ids of those that are judged good. The others were set aside, and are learned but for their rejected
            patches.
        held_out_scores: (m,) scores of the kept images, by models of this detector that have not seen them; None where
            stage 1 has none, so that they are to be had from `held_out_scores_of`.
        screening: What it follows from, with the decisions, or None where nothing was screened.
        decisions: How many decisions of each kind there were.
        notes: What a person should know of it.
    """

    images: ImageSet
    kept: Ids
    held_out_scores: Floats | None
    screening: Screening | None = None
    decisions: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    if screening is None:
        is_kept, counts = apply_decisions(train.names, np.ones(len(train), np.bool_), choices or {})
        kept = train.ids[is_kept]
        return TrainingPlan(train.select(kept), kept, None, decisions=counts)
    decided, counts = screening.with_decisions(choices or {})
    here = matched(decided, train)
    learned = here.purified(train, detector)
    by_itself = here.submodels is None
    whole = len(learned) == len(here.ids) and not learned.rejected_share
    usable = whole if by_itself else not isinstance(detector, Additive)
    scores = here.held_out_scores[here.is_kept] if same_detector and usable else None
    note = _difference(screening, train)
    return TrainingPlan(learned, here.kept, scores, here, counts, (note,) if note else ())


def options_for(detector: Detector, options: ScreenOptions) -> ScreenOptions:
    """The options of stage 1 for a detector of stage 2.

    With keep="auto", one that learns from defects is trained on everything; stage 1 ranks the images all the same.
    """
    if detector.learns_from_defects and options.keep == "auto":
        return replace(options, keep=1.0, reject_patches=0.0)
    return options


class HeldOutScores(NamedTuple):
    """What models say of images that they have not seen.

    Attributes:
        scores: (m,) of the kept images; empty where there is only one group.
        map_median: What the median patch of the median kept image scores; None where no maps were made.
    """

    scores: Floats
    map_median: float | None = None


def held_out_scores_of(plan: TrainingPlan, fitted: Detector, run: Run | None = None) -> HeldOutScores:
    """Scores of the kept images, each by a model that has not seen it.

    Those of the plan where it has some. Else, where the detector's statistics are additive, each image and its group is
    taken out of the fitted model; else two clones are trained on halves, and each scores the other half.

    Args:
        plan: What the detector was trained on; groups stay whole.
        fitted: The detector.
        run: Where clones are trained.
    """
    if plan.held_out_scores is not None:
        return HeldOutScores(plan.held_out_scores, None if plan.screening is None else _map_median(plan.screening))
    run = run or Run()
    is_kept = np.isin(plan.images.ids, plan.kept)
    if len(set(plan.images.select(plan.images.ids[is_kept]).group_names)) < HALVES:
        return HeldOutScores(np.empty(0))
    if isinstance(fitted, LeavesOut):
        held_out = fitted.held_out(plan.images, device=run.device)
        medians = held_out.maps[torch.from_numpy(is_kept)].flatten(1).median(1).values
        return HeldOutScores(held_out.scores[is_kept], float(medians.median()))
    if isinstance(fitted, Additive):
        return HeldOutScores(fitted.held_out_scores(plan.images, device=run.device)[is_kept])
    halves = ScreenOptions(rank_by="submodels", n_subsets=HALVES, keep=1.0, reject_patches=0.0)
    judged = screen(plan.images, fitted.clone(), halves, run)
    return HeldOutScores(judged.held_out_scores[is_kept], _map_median(replace(judged, kept=plan.kept)))


def _map_median(screening: Screening) -> float | None:
    """What the median patch of the median kept image scores."""
    maps = screening.patch_maps
    if maps is None:
        return None
    kept = maps[screening.is_kept]
    return float(np.median(np.median(kept.reshape(len(kept), -1).astype(np.float32), axis=1)))


def _difference(screening: Screening, train: ImageSet) -> str | None:
    """What a screening does not know of the images that it is used for."""
    known = {show(name) for name in screening.names}
    if new := [name for name in train.names if show(name) not in known]:
        return f"Not in the screening, and so not trained on ({len(new)} in all): {name_some(new)}."
    if len(train) == len(known) and screening.provenance.get("images_digest") not in (None, set_digest(train)):
        return "Some images have changed since the screening."
    return None
