"""One trial: a detector trained on what presets of stage 1 keep of a contaminated set, and measured on a test set."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flawsift.benchmark.grid import BY_PRESET, NONE, ORACLE, options_of
from flawsift.benchmark.rows import Row
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Detector
from flawsift.detectors.protocols import Additive
from flawsift.executors import Run
from flawsift.features.backbones import Backbone
from flawsift.metrics.ranking import image_auroc
from flawsift.models.model import Model, evaluate, set_digest
from flawsift.models.plan import NOTHING, Judged, TrainingPlan, calibrate, judge, options_for, plan_training
from flawsift.models.provenance import how_seen
from flawsift.screening.consensus import keep_lowest
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import ranker_of, reselected, resolve_screener, screen
from flawsift.screening.submodels import rank_by_submodels
from flawsift.types import Ids

EXACT_PIXELS = 30_000_000  # 450 maps of 256 x 256: exact metrics sort them in 1.5 GB; more are streamed
METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro", "aupro_bound")
RATES = ("false_alarms_per_100", "missed_per_100", "hits_per_100")


@dataclass(frozen=True, eq=False)
class Arm:
    """What one preset trains on.

    Attributes:
        preset: Its name.
        plan: What the detector is trained on.
        screener: Registry name of the detector of stage 1, or None where nothing was screened.
        is_own: Whether that is the final detector itself, so that its held-out scores are the detector's.
        seconds: What stage 1 took, or None.
    """

    preset: str
    plan: TrainingPlan
    screener: str | None = None
    is_own: bool = False
    seconds: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """A detector trained on what each preset of stage 1 keeps of a contaminated set, and measured on a test set.

    Presets with equal screener, subsets and partitions share sub-models, which are trained once; where a preset ranks
    by held-out scores (`flawsift.screening.stage1.ranker_of`), stage 1 is its own. Presets that keep the same images
    share one training. What each trains on is what `flawsift.pipeline.fit` would train on: both ask
    `flawsift.models.plan`. Thresholds come from held-out scores of the images that are kept: those of sub-models of
    this detector, where a preset has them, else cross-fitted.

    Attributes:
        train: Training images with features attached; its groups stay whole.
        test: Test images, likewise.
        truth: Labels and masks of both; detectors never see them.
        detector: Unfitted.
        backbone: Of the features.
        run: Where sub-models run, with the seed of the partitions.
        n_subsets: k of the presets that rank by sub-models; None takes each preset's own.
        screener: Detector of stage 1: "preset" for each preset's own, "own" for `detector`, or a name.
        calibrate: Cross-fit for thresholds where there are no such sub-models; without, those rows have no rates of
            false alarms and misses.
    """

    train: ImageSet
    test: ImageSet
    truth: GroundTruth
    detector: Detector
    backbone: Backbone
    run: Run = field(default_factory=Run)
    n_subsets: int | None = None
    screener: str = BY_PRESET
    calibrate: bool = True

    def rows(self, presets: Sequence[str], on_fitted: Callable[[str, Model], object] | None = None) -> list[Row]:
        """A row for each preset, in order.

        Args:
            presets: "none", "oracle_clean" and names of `flawsift.screening.options.PRESETS`.
            on_fitted: Called with each preset and its model.
        """
        arms = list(self.arms(presets))
        figures: dict[str, Row] = {}
        for alike in _sharing(arms):  # one model at a time in memory
            measured, model = self._measure(alike, arms)
            for arm in alike:
                figures[arm.preset] = measured
                if on_fitted is not None:
                    on_fitted(arm.preset, model)
        return [
            {
                "preset": arm.preset,
                "screener": arm.screener,
                "seconds_stage1": arm.seconds,
                **figures[arm.preset],
                **_selection(arm, self.train.ids, self.truth),
            }
            for arm in arms
        ]

    def arms(self, presets: Sequence[str]) -> Iterator[Arm]:
        """What each preset trains on."""
        stages: dict[tuple[object, ...], tuple[Screening, float]] = {}
        for preset in presets:
            if preset in (NONE, ORACLE):
                normal = self.train.ids[self.truth.select(self.train.ids).labels == 0]
                wanted = self.train if preset == NONE else self.train.select(normal)
                yield Arm(preset, plan_training(wanted, self.detector, None))
                continue
            first = screener_of(preset, self.screener, self.detector, self.backbone, self.run.seed)
            by_submodels = ranker_of(first, options_of(preset)) is rank_by_submodels
            options = options_for(self.detector, options_of(preset, self.n_subsets if by_submodels else None))
            plain = by_submodels and options.divergence_weight == 0
            shape = (first.name, by_submodels, options.n_subsets, options.n_partitions, plain or preset)
            if shape not in stages:
                started = time.perf_counter()
                stage1 = screen(self.train, first, options, self.run)
                stages[shape] = stage1, time.perf_counter() - started
            stage1, seconds = stages[shape]
            chosen = reselected(stage1, options, first, self.train) if plain else stage1
            is_own = first is self.detector
            plan = plan_training(self.train, self.detector, chosen, same_detector=is_own)
            yield Arm(preset, plan, first.name, is_own, seconds)

    def _measure(self, alike: Sequence[Arm], arms: Sequence[Arm]) -> tuple[Row, Model]:
        """Train what some arms share, and measure it."""
        plan = self._with_scores(alike, arms)
        started = time.perf_counter()
        fitted = self.detector.clone().fit(plan.images, device=self.run.device)
        fitted_at = time.perf_counter()
        judged = judge(plan, fitted, replace(self.run, checkpoint=None))
        calibration = calibrate(plan, judged)
        calibrated_at = time.perf_counter()
        model = Model(fitted, self.backbone, calibration, how_seen(self.train))
        measured, _ = evaluate(model, self.test, self.truth, device=self.run.device, exact_pixels=EXACT_PIXELS)
        figures = {key: measured.get(key) for key in (*METRICS, *RATES)}
        with tempfile.TemporaryDirectory() as folder:
            fitted.save(Path(folder))
            n_bytes = sum(f.stat().st_size for f in Path(folder).iterdir())
        seconds = {"seconds_stage2": fitted_at - started, "seconds_evaluate": time.perf_counter() - calibrated_at}
        return {**figures, **seconds, "model_bytes": n_bytes}, model

    def _with_scores(self, alike: Sequence[Arm], arms: Sequence[Arm]) -> TrainingPlan:
        """The plan of some arms, with held-out scores by any stage 1 of the detector itself, their own first."""
        plan = alike[0].plan
        if isinstance(self.detector, Additive):
            return plan
        own = [arm.plan.screening for arm in (*alike, *arms) if arm.is_own and arm.plan.screening is not None]
        if own:
            return replace(plan, judged=Judged.of(own[0]).select(plan.train.ids))
        return plan if self.calibrate else replace(plan, judged=NOTHING)


def screener_of(preset: str, screener: str, detector: Detector, backbone: Backbone, seed: int) -> Detector:
    """The detector of stage 1 of a preset, unfitted; `screener` as for `Trial`."""
    name = options_of(preset).screener if screener == BY_PRESET else screener
    return resolve_screener(name, detector, backbone, seed)


def _sharing(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms that train on the same images and patches, and judge the same images good."""
    alike: dict[tuple[str, bytes], list[Arm]] = {}
    for arm in arms:
        alike.setdefault((set_digest(arm.plan.images), arm.plan.kept.tobytes()), []).append(arm)
    return list(alike.values())


def _selection(arm: Arm, ids: Ids, truth: GroundTruth) -> Row:
    """How well the selection parts normal from anomalous images, and how well each sub-model alone would."""
    plan, screening = arm.plan, arm.plan.screening
    anomalous = truth.select(ids).labels == 1
    is_kept = np.isin(ids, plan.kept)
    share = len(plan.kept) / len(ids)
    row: Row = {
        "keep_share": share,
        "rejected_patches": plan.images.rejected_share,
        "alpha_kept": float(anomalous[is_kept].mean()),
        "kept_normal": int((is_kept & ~anomalous).sum()),
        "kept_anomalous": int((is_kept & anomalous).sum()),
    }
    if screening is None:
        return row
    if screening.contamination is not None:
        low, high = screening.contamination.interval or (None, None)
        row |= {"alpha_hat": screening.contamination.alpha_hat, "alpha_low": low, "alpha_high": high}
    mixed = 0 < anomalous.sum() < len(anomalous)
    row["stage1_auroc"] = image_auroc(screening.consensus, anomalous.astype(np.int8)) if mixed else None
    if screening.submodels is None:
        return row
    matrix = screening.submodels.score_matrix.astype(np.float64)
    alone = [np.isin(ids, keep_lowest(ids, scores, share)) for scores in matrix]
    row["alone_normal"] = float(np.mean([(a & ~anomalous).sum() for a in alone]))
    row["alone_anomalous"] = float(np.mean([(a & anomalous).sum() for a in alone]))
    return row
