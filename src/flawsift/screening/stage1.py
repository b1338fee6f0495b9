"""Stage 1: which images of a contaminated training set to keep.

    images -> ranking by models that have not seen the image -> estimate of the contamination
           -> kept ids, rejected patches

There is more than one kind of ranking (`Ranker`). Everything is addressed by global ids: stage 2 receives ids, never
positions.
"""

from dataclasses import fields, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector, make_detector
from flawsift.detectors.protocols import LeavesOut
from flawsift.errors import ParameterError
from flawsift.executors import Run
from flawsift.features.backbones import Backbone
from flawsift.screening.consensus import (
    Contamination,
    choose,
    combine,
    estimate_contamination,
    keep_lowest,
    normalize_scores,
    own_mask,
    rejected_patches,
)
from flawsift.screening.held_out import rank_by_held_out_scores
from flawsift.screening.options import OF_SUBMODELS, OWN, ScreenOptions
from flawsift.screening.result import Ranking, Screening
from flawsift.screening.submodels import rank_by_submodels
from flawsift.types import Floats, Ids


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
        ParameterError: An option of sub-models was set, and there are none.
        ExecutorError: Workers were lost more often than a task is retried.
    """
    return screen_and_fit(train, detector, options or ScreenOptions(), run or Run(), ranker, wants_fitted=False)[0]


def ranker_of(detector: Detector, options: ScreenOptions) -> Ranker:
    """The kind of stage 1 that a detector and `options.rank_by` ask for.

    Raises:
        ParameterError: An option of sub-models was set, and there are none.
    """
    if options.rank_by == "submodels" or not isinstance(detector, LeavesOut):
        return rank_by_submodels
    if wrong := [f.name for f in fields(options) if f.name in OF_SUBMODELS and getattr(options, f.name) != f.default]:
        raise ParameterError(
            f"Stage 1 by {detector.name} has no sub-models, so {', '.join(wrong)} would not be read. Leave it out, or "
            'rank by sub-models (rank_by="submodels", --rank-by submodels).'
        )
    return rank_by_held_out_scores


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
    ranker = ranker or ranker_of(detector, options)
    ranking = ranker(train, detector, options, run, wants_fitted=wants_fitted)
    used = _used(options, detector)
    kept, rejected, estimate = _select(train, ranking.consensus, ranking.patch_maps, used)
    screening = Screening(
        ids=train.ids,
        names=train.names,
        consensus=ranking.consensus,
        held_out_scores=ranking.held_out_scores,
        kept=kept,
        keep_share=len(kept) / len(train),
        options=used,
        seed=run.seed,
        contamination=estimate,
        patch_maps=ranking.patch_maps,
        rejected=rejected,
        submodels=ranking.submodels,
        images=train,
        evidence=ranking.evidence,
        groups={i: train.groups[i] for i in train.ids.tolist() if train.groups.get(i)},
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
    kept, rejected, estimate = _select(train, consensus, stage1.patch_maps, used)
    return replace(
        stage1,
        consensus=consensus,
        kept=kept,
        keep_share=len(kept) / len(train),
        rejected=rejected,
        contamination=estimate,
        options=used,
    )


def _used(options: ScreenOptions, detector: Detector) -> ScreenOptions:
    """The options with what they leave to the detector of stage 1."""
    z = detector.patch_rejection if options.reject_patches is None else options.reject_patches
    return replace(options, screener=detector.name, reject_patches=z)


def _select(
    train: ImageSet, consensus: Floats, patch_maps: npt.NDArray[np.float16] | None, options: ScreenOptions
) -> tuple[Ids, npt.NDArray[np.bool_] | None, Contamination | None]:
    """Kept ids, (N, h, w) rejected patches and the estimate of the contamination."""
    ids, keep, z = train.ids, options.keep, options.reject_patches or 0.0
    estimate = estimate_contamination(consensus, list(train.members.values())) if keep == "auto" else None
    if patch_maps is None or z <= 0:
        return keep_lowest(ids, consensus, 1 - estimate.alpha_hat if estimate else float(keep)), None, estimate
    if estimate is not None:
        is_kept, rejected = choose(consensus, patch_maps, z, estimate)
        return ids[is_kept], rejected, estimate
    kept = keep_lowest(ids, consensus, float(keep))
    return kept, rejected_patches(patch_maps, z) & np.isin(ids, kept)[:, None, None], None
