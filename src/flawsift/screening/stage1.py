"""Stage 1: which images of a contaminated set to trust, by sub-models that have not seen them.

    images -> k random disjoint subsets -> k sub-models -> (k, N) score matrix -> consensus -> kept ids

After "Leveraging Learning Bias for Noisy Anomaly Detection" (LLBNAD, arXiv 2508.07441, equations 1 to 5). Everything is
addressed by global ids: stage 2 receives ids, never positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector, resolve_device
from flawsift.detectors.parts.maps import top_mean
from flawsift.errors import InputError, ParameterError
from flawsift.executors import SERIAL, Executor, Serial
from flawsift.paths import show
from flawsift.progress import Progress, silent
from flawsift.screening.consensus import (
    COMBINE,
    SUSPECT,
    Consensus,
    Contamination,
    Normalize,
    choose,
    combine,
    estimate_contamination,
    held_out_mean,
    keep_lowest,
    normalize_scores,
    own_mask,
    rejected_patches,
    robust_units,
)
from flawsift.screening.decisions import decided
from flawsift.screening.submodels import SubModels
from flawsift.types import Floats, Ids

TOP_SHARE = 0.01  # of the patches, for an image's divergence: the paper's code scores images by the top 1 % too


class ScreenOptions(TypedDict, total=False):
    """The options of stage 1; see `screen`."""

    n_subsets: int
    n_partitions: int
    keep: float | Literal["auto"]
    consensus: Consensus
    normalize: Normalize
    exclude_own: bool
    divergence_weight: float
    reject_patches: float | None


PRESETS: Mapping[str, ScreenOptions] = {
    # section IV-A of the paper: k = 5, t = 40 %, plain mean of all sub-models, the native one included
    "paper": {
        "n_subsets": 5,
        "n_partitions": 1,
        "keep": 0.4,
        "consensus": "mean",
        "normalize": "none",
        "exclude_own": False,
        "divergence_weight": 0.0,
        "reject_patches": 0.0,
    },
    # held-out scores only, on one scale; where the detector can, defective patches go instead of whole images
    "default": {
        "n_subsets": 5,
        "n_partitions": 1,
        "keep": "auto",
        "consensus": "mean",
        "normalize": "robust",
        "exclude_own": True,
        "divergence_weight": 0.0,
        "reject_patches": None,
    },
}

OWN = "own"  # the screener that is the final detector itself
FINAL = "twobanks"  # the detector of stage 2 where none is named
# Detector of stage 1 by preset. The paper trains sub-models of the final detector; a memory bank sees rare patches
# better than the other detectors do, and k of them cost less than one training of most.
SCREENERS: Mapping[str, str] = {"paper": OWN, "default": "patchcore"}


@dataclass(frozen=True, eq=False)
class Screening:
    """The result of stage 1, as data: it can be saved, read, edited and given to stage 2.

    Attributes:
        ids: (N,) global ids.
        names: (N,) relative paths.
        subset_of: (R, N) subset of each image in each of R partitions.
        score_matrix: (R * k, N) raw scores; row r * k + j is sub-model j of partition r.
        held_out_scores: (N,) mean raw score over the sub-models that did not train on the image.
        consensus: (N,) what is ranked; higher is more anomalous.
        divergence: (N,) equation 2, or None when its weight is 0.
        kept: (m,) global ids for stage 2, in the order of `ids`.
        contamination: The estimate behind keep="auto", else None.
        options: Every option of stage 1, defaults included.
        grids: (N, h, w) float16 mean held-out maps on the patch grid, or None.
        rejected: (N, h, w) bool, patches that stage 2 does not learn from, or None.
        descriptions: (N, D) float16 of `flawsift.screening.lookalikes.describe`, or None.
        unreadable: {relative path: reason} of images that could not be used.
        provenance: Detector, backbone, versions, digests: whatever the caller wants kept.
    """

    ids: Ids
    names: Sequence[str]
    subset_of: npt.NDArray[np.int64]
    score_matrix: npt.NDArray[np.float32]
    held_out_scores: Floats
    consensus: Floats
    divergence: Floats | None
    kept: Ids
    contamination: Contamination | None
    options: Mapping[str, Any]
    grids: npt.NDArray[np.float16] | None = None
    rejected: npt.NDArray[np.bool_] | None = None
    descriptions: npt.NDArray[np.float16] | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_kept(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each image goes on to stage 2."""
        return np.isin(self.ids, self.kept)

    @property
    def is_suspect(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each image stands out by more than `SUSPECT` robust deviations."""
        suspect: npt.NDArray[np.bool_] = robust_units(self.consensus) > SUSPECT
        return suspect

    @property
    def is_partly_learned(self) -> npt.NDArray[np.bool_]:
        """(N,) whether an image was set aside, and stage 2 learns its patches that are not rejected, if it can."""
        if self.rejected is None or self.contamination is None:
            return np.zeros(len(self.ids), np.bool_)
        some = self.rejected.any((1, 2)) & ~self.rejected.all((1, 2))
        learned: npt.NDArray[np.bool_] = self.is_suspect & ~self.is_kept & some
        return learned

    def purified(self, train: ImageSet, detector: Detector) -> ImageSet:
        """What a detector of stage 2 learns from: (m,) of the screened images.

        Those that are kept; where it can leave out patches, less those that are rejected, and with the other patches of
        the images that were set aside, which are not in `kept`.
        """
        if self.rejected is None or not detector.leaves_out_patches:
            return train.select(self.kept)
        partly = self.is_partly_learned & np.isin(self.ids, train.ids)
        learned = self.is_kept | partly
        masks = zip(self.ids[learned].tolist(), self.rejected[learned], strict=True)
        return train.select(self.ids[learned]).without_patches({i: mask for i, mask in masks if mask.any()})

    def decided(self, choices: Mapping[str, str]) -> tuple[Self, dict[str, int]]:
        """The same once a person has decided, and how many decisions of each kind there were.

        An image that a person keeps is good, and so are all its patches. Where most of the images that evidence of
        defects had set aside are kept after all, so is what stands out in others: no patch is rejected any more.

        Args:
            choices: {relative path as shown: "keep", "remove" or "unsure"}; see `screening.decisions.read_decisions`.

        Raises:
            InputError: None of the decisions is about one of these images, or no image is left.
        """
        is_kept, counts = decided(self.names, self.is_kept, choices)
        now = replace(self, kept=self.ids[is_kept])
        if self.rejected is None:
            return now, counts
        by_hand = np.array([choices.get(show(name), "") in ("keep", "remove") for name in self.names])
        # with evidence of defects, only a person keeps a suspect
        ordinary = is_kept if self.contamination is None else is_kept & ~self.is_suspect
        masked = (ordinary | now.is_partly_learned) & ~by_hand & (not now.acquitted)
        return replace(now, rejected=self.rejected & masked[:, None, None]), counts

    @property
    def acquitted(self) -> bool:
        """Whether a person keeps most of the images that evidence of defects had set aside; `decided` acts on it."""
        if self.contamination is None or self.contamination.alpha_hat <= 0 or self.rejected is None:
            return False
        return bool((self.is_suspect & self.is_kept).sum() > self.is_suspect.sum() / 2)

    @property
    def removed(self) -> Ids:
        """Ids that are not kept, the most anomalous first."""
        out = ~self.is_kept
        return self.ids[out][np.argsort(-self.consensus[out], kind="stable")]

    @property
    def ranking(self) -> Ids:
        """All ids, the most anomalous first."""
        return self.ids[np.argsort(-self.consensus, kind="stable")]


def screen(
    train: ImageSet,
    detector: Detector,
    *,
    n_subsets: int = 5,
    n_partitions: int = 1,
    keep: float | Literal["auto"] = "auto",
    consensus: Consensus = "mean",
    normalize: Normalize = "robust",
    exclude_own: bool = True,
    divergence_weight: float = 0.0,
    reject_patches: float | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | None = None,
    on_submodel: Callable[[Detector], None] | None = None,
    progress: Progress = silent,
    executor: Executor = SERIAL,
) -> Screening:
    """Split, train k sub-models, score every image with all of them, rank by consensus, keep the lowest.

    Args:
        train: N images with features attached; its groups stay whole.
        detector: Any unfitted detector; each sub-model is a clone of it.
        n_subsets: k, disjoint subsets of a random partition (equation 1).
        n_partitions: R, independent partitions; their R * k sub-models vote together.
        keep: Share of the images kept, floor(keep * N) (equation 4), or "auto": see `screening.consensus.choose`;
            without rejection of patches, as many as an estimate of the contamination says.
        consensus: How an image's scores become one (equation 3 is the mean).
        normalize: How sub-models come on one scale first: "robust" by median and MAD of each one's held-out scores,
            "rank" by ranks among them, "none" as the paper.
        exclude_own: Leave out the sub-model that trained on the image. The paper keeps it; a memory bank scores its
            own images near zero.
        divergence_weight: Weight of the divergence of equation 2 beside the consensus, both in robust units.
        reject_patches: Patches whose mean held-out score lies so many robust deviations above the set's median are not
            learned from in stage 2; 0 rejects none, None takes the detector's own `patch_rejection`.
        seed: Of the partitions. Sub-models use the detector's own seed.
        device: Where sub-models run.
        checkpoint: A folder for finished sub-models' scores, so that a killed run goes on where it was.
        on_submodel: Called with each sub-model that was trained now (not with those resumed).
        progress: Told about each sub-model.
        executor: Where sub-models run; the result is the same, bit for bit, on machines of one kind.

    Raises:
        ParameterError: An option is out of range.
        InputError: Fewer images (or groups) than subsets.
        ExecutorError: Workers were lost more often than a task is retried.
    """
    reject_patches = detector.patch_rejection if reject_patches is None else reject_patches
    options = {
        "n_subsets": n_subsets,
        "n_partitions": n_partitions,
        "keep": keep,
        "consensus": consensus,
        "normalize": normalize,
        "exclude_own": exclude_own,
        "divergence_weight": divergence_weight,
        "reject_patches": reject_patches,
    }
    check_options(options)
    subset_of = np.stack([split(train, n_subsets, seed=seed, partition=r) for r in range(n_partitions)])
    runs = SubModels(train, detector, subset_of, n_subsets, resolve_device(device), checkpoint, progress)
    keep_models = divergence_weight > 0
    if isinstance(executor, Serial):
        models = runs.all(on_submodel, keep_models=keep_models)
    else:
        models = runs.fan_out(executor, device, on_submodel, keep_models=keep_models)
    own = own_mask(subset_of, n_subsets)
    comparable = normalize_scores(runs.scores, own, normalize)
    voted = combine(comparable, own, consensus, exclude_own=exclude_own)
    spread = None
    if keep_models:
        spread = divergence(train, models, comparable, subset_of, n_subsets, resolve_device(device))
        voted = robust_units(voted) + divergence_weight * robust_units(spread)
    grids = runs.mean_grids()
    kept, rejected, estimate = _choose(train, voted, grids, keep, reject_patches)
    return Screening(
        ids=train.ids,
        names=train.names,
        subset_of=subset_of,
        score_matrix=runs.scores,
        held_out_scores=held_out_mean(runs.scores, own),
        consensus=voted,
        divergence=spread,
        kept=kept,
        contamination=estimate,
        options={**options, "seed": seed, "keep_share": len(kept) / len(train)},
        grids=grids,
        rejected=rejected,
    )


def reselected(stage1: Screening, options: ScreenOptions, detector: Detector, train: ImageSet) -> Screening:
    """What other options keep, from the score matrix of a screening with as many subsets and partitions.

    Equal to a `screen` of its own, whose sub-models would be the same; `divergence_weight` must be 0.
    """
    own = own_mask(stage1.subset_of, options["n_subsets"])
    scores = normalize_scores(stage1.score_matrix, own, options["normalize"])
    voted = combine(scores, own, options["consensus"], exclude_own=options["exclude_own"])
    given = options["reject_patches"]
    z = detector.patch_rejection if given is None else given
    kept, rejected, estimate = _choose(train, voted, stage1.grids, options["keep"], z)
    used = {**options, "reject_patches": z, "seed": stage1.options["seed"], "keep_share": len(kept) / len(stage1.ids)}
    return replace(stage1, consensus=voted, kept=kept, rejected=rejected, contamination=estimate, options=used)


def _choose(
    train: ImageSet, voted: Floats, grids: npt.NDArray[np.float16] | None, keep: float | Literal["auto"], z: float
) -> tuple[Ids, npt.NDArray[np.bool_] | None, Contamination | None]:
    """Kept ids, (N, h, w) rejected patches and the estimate of the contamination."""
    ids = train.ids
    estimate = estimate_contamination(voted, list(train.members.values())) if keep == "auto" else None
    if grids is None or z <= 0:
        return keep_lowest(ids, voted, 1 - estimate.alpha_hat if estimate else float(keep)), None, estimate
    if estimate is not None:
        is_kept, rejected = choose(voted, grids, z, estimate)
        return ids[is_kept], rejected, estimate
    kept = keep_lowest(ids, voted, float(keep))
    return kept, rejected_patches(grids, z) & np.isin(ids, kept)[:, None, None], None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ParameterError for the first option of stage 1 that is out of range."""
    keep, k = options["keep"], options["n_subsets"]
    least = 2 if options["exclude_own"] else 1
    checks = {
        "n_subsets": (k >= least, f"be at least {least}" + (" when exclude_own is set" if least == 2 else "")),
        "n_partitions": (options["n_partitions"] >= 1, "be at least 1"),
        "keep": (keep == "auto" or (isinstance(keep, float | int) and 0 < keep <= 1), "be 'auto' or in (0, 1]"),
        "consensus": (options["consensus"] in COMBINE, f"be one of {sorted(COMBINE)}"),
        "normalize": (options["normalize"] in ("none", "robust", "rank"), "be 'none', 'robust' or 'rank'"),
        "divergence_weight": (options["divergence_weight"] >= 0, "not be negative"),
        "reject_patches": ((options["reject_patches"] or 0) >= 0, "not be negative"),
    }
    if options["divergence_weight"] > 0 and k < 2:
        checks["n_subsets"] = (False, "be at least 2 for a divergence")
    for name, (holds, constraint) in checks.items():
        if not holds:
            raise ParameterError(f"screen: {name} must {constraint}, got {options[name]!r}.")


def split(train: ImageSet, n_subsets: int, *, seed: int, partition: int = 0) -> npt.NDArray[np.int64]:
    """A random partition (equation 1): (N,) subset of each image.

    Sizes differ by at most one image; with groups, whole groups go to the smallest subset so far, large ones first.

    Raises:
        InputError: Fewer groups than subsets.
    """
    generator = np.random.default_rng([seed, partition])
    members = train.members
    if len(members) < n_subsets:
        what = "images" if len(members) == len(train) else "groups of images"
        raise InputError(
            f"{n_subsets} subsets need at least {n_subsets} {what}, got {len(members)}. "
            "Use fewer subsets (--subsets) or add images."
        )
    groups = list(members.values())
    shuffled = [groups[g] for g in generator.permutation(len(groups))]
    shuffled.sort(key=len, reverse=True)  # stable: equal sizes stay shuffled
    result = np.empty(len(train), np.int64)
    sizes = np.zeros(n_subsets, np.int64)
    for positions in shuffled:
        smallest = int(sizes.argmin())
        result[positions] = smallest
        sizes[smallest] += len(positions)
    return result


def divergence(
    train: ImageSet,
    models: Sequence[Detector],
    comparable: Floats,
    subset_of: npt.NDArray[np.int64],
    n_subsets: int,
    device: str,
) -> Floats:
    """Equation 2: how far the native sub-model's view of an image lies from the others', (N,).

    Delta(x) = 1 / (k - 1) sum over l != j of |f_l(x) - f_j(x)|, j the native sub-model. f is what the detector expects
    in place of each patch, where it has such a notion (L2 over channels, mean of the top 1 % of the patches), else the
    normalised score. Averaged over partitions.
    """
    position = {int(i): p for p, i in enumerate(train.ids)}
    result = np.zeros(len(train))
    for r, subsets in enumerate(subset_of):
        rows = slice(r * n_subsets, (r + 1) * n_subsets)
        native = comparable[rows][subsets, np.arange(len(train))]  # (N,)
        on_scores = np.abs(comparable[rows] - native).sum(0) / (n_subsets - 1)
        result += on_scores
        with torch.inference_mode():
            for batch in train.batches(models[0].layers, pixels=models[0].reads_pixels):
                views = [m._expected(batch, device) for m in models[rows]]
                known = [v.cpu() for v in views if v is not None]
                if len(known) < n_subsets:
                    break  # no notion of an expected patch: the scores stand
                at = np.array([position[int(i)] for i in batch.ids])
                result[at] += _feature_divergence(torch.stack(known), subsets[at]) - on_scores[at]
    return result / len(subset_of)


def _feature_divergence(views: Tensor, native: npt.NDArray[np.int64]) -> Floats:
    """(B,) from (k, B, C, h, w) views and the native sub-model of each image."""
    k, b = views.shape[:2]
    mine = views[torch.from_numpy(native), torch.arange(b)]  # (B, C, h, w)
    distance = (views - mine).norm(dim=2).sum(0) / (k - 1)  # (B, h, w); the native's own term is 0
    return top_mean(distance, TOP_SHARE).double().numpy()
