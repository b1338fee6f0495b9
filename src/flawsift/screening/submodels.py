"""Stage 1 by sub-models: trained on a subset each, asked about all images, resumed where a run was killed.

    images -> k random disjoint subsets -> k sub-models -> (k, N) score matrix -> consensus

After "Leveraging Learning Bias for Noisy Anomaly Detection" (LLBNAD, arXiv 2508.07441, equations 1 to 3).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector, score_together
from flawsift.detectors.parts.maps import as_float16, top_mean
from flawsift.detectors.parts.robust import robust_units
from flawsift.detectors.parts.training import Watch
from flawsift.detectors.protocols import Additive, LeavesOut
from flawsift.detectors.registry import load_detector
from flawsift.errors import InputError, ModelError
from flawsift.executors import Executor, Run, Serial
from flawsift.features.devices import resolve_device
from flawsift.features.extraction import loaded
from flawsift.files import write_text
from flawsift.progress import Progress, Stage, silent, steps_of
from flawsift.screening.consensus import combine, held_out_mean, normalize_scores, own_mask
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Ranking, SubModelScores
from flawsift.types import Floats
from flawsift.unfinished import read_unfinished, tell_made_again, write_unfinished

SAVED = "saved"  # beside a sub-model that is whole: the SHA-256 that it is known by
TOP_SHARE = 0.01  # of the patches, for an image's divergence: the paper's code scores images by the top 1 % too


def rank_by_submodels(
    train: ImageSet, detector: Detector, options: ScreenOptions, run: Run, *, wants_fitted: bool = False
) -> Ranking:
    """Split, train k sub-models, score every image with all of them, combine.

    Args:
        train: N images with features attached; groups stay whole.
        detector: Any unfitted detector; each sub-model is a clone of it, with its seed.
        options: All but the screener, `keep` and `reject_patches`.
        run: Where sub-models run.
        wants_fitted: Merge additive sub-models of the first partition, which together saw every image once.

    Raises:
        InputError: Fewer images (or groups) than subsets.
        ExecutorError: Workers were lost more often than a task is retried.
    """
    k, device = options.n_subsets, resolve_device(run.device)
    subset_of = np.stack([split(train, k, seed=run.seed, partition=r) for r in range(options.n_partitions)])
    sub = SubModels(train, detector, subset_of, k, device, run.checkpoint, run.progress)
    keep_models = options.divergence_weight > 0
    # others need not travel back; and what leaves out images by itself learns from all of them what no sum of parts has
    adds_up = isinstance(detector, Additive) and not isinstance(detector, LeavesOut)
    merger = _Merger(k) if wants_fitted and adds_up else None
    if isinstance(run.executor, Serial):
        models = sub.all(merger, keep_models=keep_models)
    else:
        models = sub.fan_out(run.executor, run.device, merger, keep_models=keep_models)
    own = own_mask(subset_of, k)
    comparable = normalize_scores(sub.scores, own, options.normalize)
    consensus = combine(comparable, own, options.consensus, exclude_own=options.exclude_own)
    spread = None
    if keep_models:
        spread = divergence(train, models, comparable, subset_of, k, device)
        consensus = robust_units(consensus) + options.divergence_weight * robust_units(spread)
    scores = SubModelScores(subset_of, sub.scores, spread)
    fitted = None if merger is None else merger.total
    return Ranking(consensus, held_out_mean(sub.scores, own), sub.mean_maps(), scores, fitted)


@dataclass
class _Merger:
    """Adds up additive sub-models of the first partition as they are trained."""

    n_subsets: int
    seen: int = 0
    _total: Detector | None = None

    def __call__(self, m: int, model: Detector) -> None:
        if m < self.n_subsets and isinstance(model, Additive):
            self._total = model.merged(self._total) if self._total is not None else model
            self.seen += 1

    @property
    def total(self) -> Detector | None:
        """The model of all images, when every sub-model of the first partition was trained in this run."""
        return self._total if self.seen == self.n_subsets else None


@dataclass(eq=False)
class SubModels:
    """All sub-models of all partitions, one after the other, resumable."""

    train: ImageSet
    detector: Detector
    subset_of: npt.NDArray[np.int64]
    n_subsets: int
    device: str
    checkpoint: Path | None
    progress: Progress
    scores: npt.NDArray[np.float32] = field(init=False)
    _map_sum: Tensor | None = None
    _steps: int = 1  # of a training, where it tells of some

    def __post_init__(self) -> None:
        n_models = len(self.subset_of) * self.n_subsets
        self.scores = np.empty((n_models, len(self.train)), np.float32)

    def all(self, on_submodel: Callable[[int, Detector], None] | None, *, keep_models: bool) -> list[Detector]:
        """Fill `scores`; return the sub-models only when they are to be kept."""
        models: list[Detector] = []
        n_models, k = len(self.scores), self.n_subsets
        for first in range(0, n_models, k):  # all sub-models of a partition score in one pass, sharing what they read
            rows = range(first, first + k)
            stored = [s for m in rows if not keep_models and (s := self._resume_scores(m)) is not None]
            if len(stored) < k:
                trained = [self._train(m, on_submodel) for m in rows]
                self.progress(Stage.COMPARING, 0, len(self.train))
                # larger batches than one model takes: each reads its state once per batch
                tell = steps_of(self.progress, Stage.COMPARING)
                scored = score_together(trained, self.train, self.device, 64, keep_grids=True, progress=tell)
                stored = [(one.scores, one.grids) for one in scored]
                for m, (scores, grids) in zip(rows, stored, strict=True):
                    self._store_scores(m, scores, grids)
                models += trained if keep_models else ()
            for m, (scores, grids) in zip(rows, stored, strict=True):
                self.scores[m] = scores
                self._add_maps(m, grids)
        return models

    def _train(self, m: int, on_submodel: Callable[[int, Detector], None] | None) -> Detector:
        """Sub-model m, from its checkpoint or trained now."""
        self.progress(Stage.PARTS, m * self._steps, len(self.scores) * self._steps)
        folder = None if self.checkpoint is None else self.checkpoint / f"model-{m}"
        if folder is not None and (folder / SAVED).exists():
            try:
                return load_detector(folder, like=self.detector, digest=(folder / SAVED).read_text("ascii", "replace"))
            except (OSError, ModelError) as error:
                tell_made_again(folder, error)
        model = self.detector.clone().fit(self._subset(m), device=self.device, watch=self._watch(m))
        if folder is not None and not isinstance(model, Additive):  # statistics are cheaper to make again
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SAVED, model.save(folder))
        if on_submodel is not None:
            on_submodel(m, model)
        return model

    def fan_out(
        self, executor: Executor, device: str, on_submodel: Callable[[int, Detector], None] | None, *, keep_models: bool
    ) -> list[Detector]:
        """As `all`, each sub-model by a task of its own; workers find a device behind "auto" themselves."""
        models: list[Detector] = []
        n_models = len(self.scores)
        missing = [m for m in range(n_models) if keep_models or self._resume_scores(m) is None]
        train, checkpoint = self.train, self.checkpoint
        if not executor.shares_files:
            train = loaded(train, self.detector.layers, self.detector.views, pixels=self.detector.reads_pixels)
            checkpoint = None
        runs = replace(self, train=train, device=device, checkpoint=checkpoint, progress=silent)
        task = _SubModel(runs, keep_models or on_submodel is not None)
        results = executor.map(task, missing)
        for m in range(n_models):  # in this order, like `all`: sums of maps depend on it
            self.progress(Stage.PARTS, m, n_models)
            if m not in missing:
                stored = self._resume_scores(m)
                assert stored is not None
                self.scores[m], grids = stored
            else:
                self.scores[m], grids, model = next(results)
                self._store_scores(m, self.scores[m], grids)
                if model is not None and on_submodel is not None:
                    on_submodel(m, model)
                models += [model] if model is not None and keep_models else ()
            self._add_maps(m, grids)
        self.progress(Stage.PARTS, n_models, n_models)
        return models

    def mean_maps(self) -> npt.NDArray[np.float16] | None:
        """(N, h, w) mean over the sub-models that did not see the image."""
        if self._map_sum is None:
            return None
        others = max(1, self.n_subsets - 1) * len(self.subset_of)
        return as_float16(self._map_sum / others)

    def _subset(self, m: int) -> ImageSet:
        r, j = divmod(m, self.n_subsets)
        return self.train.select(self.train.ids[self.subset_of[r] == j])

    def _add_maps(self, m: int, grids: Tensor) -> None:
        r, j = divmod(m, self.n_subsets)
        if self._map_sum is None:
            self._map_sum = torch.zeros_like(grids, dtype=torch.float32)
        others = torch.from_numpy(self.subset_of[r] != j) if self.n_subsets > 1 else slice(None)
        self._map_sum[others] += grids[others].float()

    def _watch(self, m: int) -> Watch:
        """Progress, as steps of all trainings, and checkpoint of the training of one sub-model."""
        path = None if self.checkpoint is None else self.checkpoint / f"training-{m}.safetensors"

        def tell(stage: str, done: int, total: int) -> None:
            self._steps = total
            self.progress(Stage.PARTS, m * total + done, len(self.scores) * total)

        return Watch(tell, path)

    def _path(self, m: int) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint / f"scores-{m}.unfinished"

    def _store_scores(self, m: int, scores: npt.NDArray[np.float32], grids: Tensor) -> None:
        path = self._path(m)
        if path is None:
            return
        write_unfinished(path, {"scores": torch.from_numpy(scores), "grids": grids})
        shutil.rmtree(path.parent / f"model-{m}", ignore_errors=True)

    def _resume_scores(self, m: int) -> tuple[npt.NDArray[np.float32], Tensor] | None:
        path = self._path(m)
        stored = None if path is None else read_unfinished(path)
        return None if stored is None else (stored["scores"].numpy(), stored["grids"])


@dataclass(frozen=True, eq=False)
class _SubModel:
    """What a worker needs to train any sub-model and to score all images with it; its device may be "auto"."""

    runs: SubModels
    wants_model: bool

    def __call__(self, m: int) -> tuple[npt.NDArray[np.float32], Tensor, Detector | None]:
        """Scores and grids of sub-model m, and the sub-model where it is wanted."""
        runs, device = self.runs, resolve_device(self.runs.device)
        model = runs.detector.clone().fit(runs._subset(m), device=device, watch=runs._watch(m))
        (scored,) = score_together([model], runs.train, device, 64, keep_grids=True)
        return scored.scores, scored.grids, model if self.wants_model else None


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
