"""Stage 1: which images of a contaminated training set to keep.

    images -> ranking by models that have not seen the image -> estimate of the contamination
           -> kept ids, rejected patches

There is more than one kind of ranking (`Ranker`). Everything is addressed by global ids: stage 2 receives ids, never
positions.
"""

import logging
from dataclasses import fields, replace
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.protocols import LeavesOut
from flawsift.detectors.registry import make_detector
from flawsift.errors import ParameterError
from flawsift.executors import Run
from flawsift.features.backbones import Backbone
from flawsift.progress import Stage
from flawsift.screening.consensus import (
    Contamination,
    choose,
    combine,
    design_effect,
    estimate_contamination,
    keep_lowest,
    normalize_scores,
    own_mask,
    rejected_patches,
)
from flawsift.screening.counted import Counted
from flawsift.screening.held_out import rank_by_held_out_scores
from flawsift.screening.mixture import ordinary_scores
from flawsift.screening.options import OF_SUBMODELS, OWN, ScreenOptions, flag
from flawsift.screening.result import Ranking, Screening
from flawsift.screening.submodels import rank_by_submodels
from flawsift.types import Floats, Ids

log = logging.getLogger("flawsift")


class Ranker(Protocol):
    """A kind of stage 1: scores of the training images by models that have not seen them."""

    def __call__(
        self, train: ImageSet, detector: Detector, options: ScreenOptions, run: Run, *, wants_fitted: bool
    ) -> Ranking: ...


def screen(
    train: ImageSet,
    detector: Detector,
    options: ScreenOptions | None = None,
    run: Run | None = None,
    *,
    ranker: Ranker | None = None,
) -> Screening:
    """Rank the training images, and say which of them, and which of their patches, stage 2 learns from.

    Args:
        train: N images with features attached; groups stay whole.
        detector: Any unfitted detector. `options.screener` is not read here.
        options: None takes the default preset.
        run: Where it runs.
        ranker: The kind of stage 1; None takes what `options.rank_by` says.

    Raises:
        InputError: Fewer images (or groups) than subsets, or than two.
        ExecutorError: Workers were lost more often than a task is retried.
    """
    return screen_and_fit(train, detector, options or ScreenOptions(), run or Run(), ranker, wants_fitted=False)[0]


def ranker_of(detector: Detector, options: ScreenOptions) -> Ranker:
    """The kind of stage 1 that a detector and the options ask for; who sets an option of sub-models has them."""
    if options.rank_by == "submodels" or not isinstance(detector, LeavesOut) or _of_submodels(options):
        return rank_by_submodels
    return rank_by_held_out_scores


def _of_submodels(options: ScreenOptions) -> list[str]:
    """Flags of the options of sub-models that were set."""
    return [flag(f) for f in fields(options) if f.name in OF_SUBMODELS and getattr(options, f.name) != f.default]


def resolve_screener(screener: str, detector: Detector, backbone: Backbone, seed: int) -> Detector:
    """The detector of stage 1: `detector` itself for "own" and for its own name, else the one named, unfitted.

    Where the backbone has not the layers that the one named would read, such as strides 8 and 16 of a transformer, it
    reads those of `detector`.

    Raises:
        ParameterError: There is no such detector.
    """
    if screener in (OWN, detector.name):
        return detector
    made = make_detector(screener, seed=seed)
    try:
        for layer in made.layers:
            backbone.resolve(layer)
    except ParameterError:
        return make_detector(screener, seed=seed, layers=detector.layers)
    return made


def screen_and_fit(
    train: ImageSet,
    detector: Detector,
    options: ScreenOptions,
    run: Run,
    ranker: Ranker | None = None,
    *,
    wants_fitted: bool,
) -> tuple[Screening, Detector | None]:
    """As `screen`, and the detector of all images where the ranking made it by the way and it is wanted."""
    if ranker is None:
        ranker = ranker_of(detector, options)
        if options.rank_by == "auto" and isinstance(detector, LeavesOut) and ranker is rank_by_submodels:
            named = ", ".join(_of_submodels(options))
            log.warning("Images are ranked by sub-models, since %s was given; %s needs none.", named, detector.name)
    ranking = ranker(train, detector, options, run, wants_fitted=wants_fitted)
    used = _used(options, detector)
    run.progress(Stage.COUNTING, 0, 1)
    selection = _select(train, ranking.consensus, ranking.patch_maps, used)
    screening = Screening(
        ids=train.ids,
        names=train.names,
        consensus=ranking.consensus,
        held_out_scores=ranking.held_out_scores,
        keep_share=len(selection["kept"]) / len(train),
        options=used,
        seed=run.seed,
        patch_maps=ranking.patch_maps,
        submodels=ranking.submodels,
        images=train,
        turns=Counted.of(train).turns,
        evidence=ranking.evidence,
        groups={i: train.groups[i] for i in train.ids.tolist() if train.groups.get(i)},
        **selection,
    )
    return screening, ranking.fitted


def reselected(stage1: Screening, options: ScreenOptions, detector: Detector, train: ImageSet) -> Screening:
    """What other options keep, from the score matrix of a screening with as many subsets and partitions.

    Equal to a `screen` of its own, whose sub-models would be the same; `divergence_weight` must be 0.
    """
    own = own_mask(stage1.submodel_scores.subset_of, options.n_subsets)
    scores = normalize_scores(stage1.submodel_scores.score_matrix, own, options.normalize)
    consensus = combine(scores, own, options.consensus, exclude_own=options.exclude_own)
    used = _used(options, detector)
    selection = _select(train, consensus, stage1.patch_maps, used)
    share = len(selection["kept"]) / len(train)
    return replace(stage1, consensus=consensus, keep_share=share, options=used, **selection)


def _used(options: ScreenOptions, detector: Detector) -> ScreenOptions:
    """The options with what they leave to the detector of stage 1."""
    z = detector.patch_rejection if options.reject_patches is None else options.reject_patches
    return replace(options, screener=detector.name, reject_patches=z)


class _Selection(TypedDict):
    """What a ranking leads to, as `Screening` has it."""

    kept: Ids
    rejected: npt.NDArray[np.bool_] | None
    contamination: Contamination | None
    probability: Floats


def _select(
    train: ImageSet, consensus: Floats, patch_maps: npt.NDArray[np.float16] | None, options: ScreenOptions
) -> _Selection:
    ids, keep, z = train.ids, options.keep, options.reject_patches or 0.0
    counted = Counted.of(train)
    seen = None if patch_maps is None else counted.seen(patch_maps)
    ordinary = None if seen is None else ordinary_scores(seen)
    effect = design_effect(consensus, list(train.members.values()))
    estimate, probability = estimate_contamination(consensus, ordinary, effect)
    if keep == "auto":
        is_kept, rejected = choose(probability, seen, z, estimate)
        if patch_maps is not None and rejected is not None:
            rejected = counted.over_images(rejected, patch_maps.shape[1:])
        return _Selection(kept=ids[is_kept], rejected=rejected, contamination=estimate, probability=probability)
    kept, rejected = keep_lowest(ids, consensus, float(keep)), None
    if patch_maps is not None and seen is not None and z > 0:
        rejected = counted.over_images(rejected_patches(seen, z), patch_maps.shape[1:])
        rejected &= np.isin(ids, kept)[:, None, None]
    # who sets the share does not ask for another one
    return _Selection(kept=kept, rejected=rejected, contamination=None, probability=probability)
