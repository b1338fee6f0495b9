"""The sub-models of stage 1: trained on a subset each, asked about all images, resumed where a run was killed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Additive, Detector, load_detector, resolve_device, score_together
from flawsift.detectors.parts.training import Watch
from flawsift.executors import Executor
from flawsift.features.extraction import loaded
from flawsift.files import write_bytes
from flawsift.progress import Progress, silent


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
    _grid_sum: Tensor | None = None

    def __post_init__(self) -> None:
        n_models = len(self.subset_of) * self.n_subsets
        self.scores = np.empty((n_models, len(self.train)), np.float32)

    def all(self, on_submodel: Callable[[Detector], None] | None, *, keep_models: bool) -> list[Detector]:
        """Fill `scores`; return the sub-models only when they are to be kept."""
        models: list[Detector] = []
        n_models, k = len(self.scores), self.n_subsets
        for first in range(0, n_models, k):  # all sub-models of a partition score in one pass, sharing what they read
            rows = range(first, first + k)
            found = [s for m in rows if not keep_models and (s := self._resume_scores(m)) is not None]
            if len(found) < k:
                trained = [self._train(m, on_submodel) for m in rows]
                # larger batches than one model takes: each reads its state once per batch
                scored = score_together(trained, self.train, self.device, 64, keep_grids=True)
                found = [(scores, grids) for scores, grids, _ in scored]
                for m, (scores, grids) in zip(rows, found, strict=True):
                    self._store_scores(m, scores, grids)
                models += trained if keep_models else ()
            for m, (scores, grids) in zip(rows, found, strict=True):
                self.scores[m] = scores
                self._add_grids(m, grids)
        self.progress("sub-models", n_models, n_models)
        return models

    def _train(self, m: int, on_submodel: Callable[[Detector], None] | None) -> Detector:
        """Sub-model m, from its checkpoint or trained now."""
        self.progress("sub-models", m, len(self.scores))
        folder = None if self.checkpoint is None else self.checkpoint / f"model-{m}"
        if folder is not None and (folder / "detector.json").exists():
            return load_detector(folder, like=self.detector)
        model = self.detector.clone().fit(self._subset(m), device=self.device, watch=self._watch(m))
        if folder is not None and not isinstance(model, Additive):  # statistics are cheaper to make again
            folder.mkdir(parents=True, exist_ok=True)
            model.save(folder)
        if on_submodel is not None:
            on_submodel(model)
        return model

    def fan_out(
        self, executor: Executor, device: str, on_submodel: Callable[[Detector], None] | None, *, keep_models: bool
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
            self.progress("sub-models", m, n_models)
            if m not in missing:
                stored = self._resume_scores(m)
                assert stored is not None
                self.scores[m], grids = stored
            else:
                self.scores[m], grids, model = next(results)
                self._store_scores(m, self.scores[m], grids)
                if model is not None and on_submodel is not None:
                    on_submodel(model)
                models += [model] if model is not None and keep_models else ()
            self._add_grids(m, grids)
        self.progress("sub-models", n_models, n_models)
        return models

    def mean_grids(self) -> npt.NDArray[np.float16] | None:
        """(N, h, w) mean over the sub-models that did not see the image."""
        if self._grid_sum is None:
            return None
        others = max(1, self.n_subsets - 1) * len(self.subset_of)
        # far beyond any real score, but float16 must not overflow
        mean: npt.NDArray[np.float16] = (self._grid_sum / others).clamp(-6e4, 6e4).half().numpy()
        return mean

    def _subset(self, m: int) -> ImageSet:
        r, j = divmod(m, self.n_subsets)
        return self.train.select(self.train.ids[self.subset_of[r] == j])

    def _add_grids(self, m: int, grids: Tensor) -> None:
        r, j = divmod(m, self.n_subsets)
        if self._grid_sum is None:
            self._grid_sum = torch.zeros_like(grids, dtype=torch.float32)
        others = torch.from_numpy(self.subset_of[r] != j) if self.n_subsets > 1 else slice(None)
        self._grid_sum[others] += grids[others].float()

    def _watch(self, m: int) -> Watch:
        """Progress and checkpoint of the training of one sub-model."""
        stage = f"sub-model {m + 1} of {len(self.scores)}"
        path = None if self.checkpoint is None else self.checkpoint / f"training-{m}.safetensors"
        return Watch(lambda _, done, total: self.progress(stage, done, total), path)

    def _path(self, m: int) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint / f"scores-{m}.safetensors"

    def _store_scores(self, m: int, scores: npt.NDArray[np.float32], grids: Tensor) -> None:
        path = self._path(m)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({"scores": torch.from_numpy(scores), "grids": grids.contiguous()}))
        shutil.rmtree(path.parent / f"model-{m}", ignore_errors=True)

    def _resume_scores(self, m: int) -> tuple[npt.NDArray[np.float32], Tensor] | None:
        path = self._path(m)
        if path is None or not path.exists():
            return None
        stored = load(path.read_bytes())
        return stored["scores"].numpy(), stored["grids"]


@dataclass(frozen=True, eq=False)
class _SubModel:
    """What a worker needs to train any sub-model and to score all images with it; its device may be "auto"."""

    runs: SubModels
    wants_model: bool

    def __call__(self, m: int) -> tuple[npt.NDArray[np.float32], Tensor, Detector | None]:
        """Scores and grids of sub-model m, and the sub-model where it is wanted."""
        runs, device = self.runs, resolve_device(self.runs.device)
        model = runs.detector.clone().fit(runs._subset(m), device=device, watch=runs._watch(m))
        ((scores, grids, _),) = score_together([model], runs.train, device, 64, keep_grids=True)
        return scores, grids, model if self.wants_model else None
