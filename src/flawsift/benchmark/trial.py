"""One trial: a detector trained on what presets of stage 1 keep of a contaminated set, and measured on a test set."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flawsift import pipeline
from flawsift.benchmark.grid import BY_PRESET, NONE, ORACLE, options_of
from flawsift.benchmark.rows import Row
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Additive, Detector
from flawsift.executors import SERIAL, Executor
from flawsift.features.backbones import Backbone
from flawsift.metrics import ranking as metrics
from flawsift.models import model as models
from flawsift.models.calibration import Calibration
from flawsift.screening.consensus import Contamination, keep_lowest
from flawsift.screening.stage1 import SCREENERS, Screening, reselected, screen
from flawsift.types import Floats, Ids

EXACT_PIXELS = 20_000_000  # 300 maps of 256 x 256: exact metrics sort them in 1 GB; more are streamed
METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro", "aupro_bound")
RATES = ("false_alarms_per_100", "missed_per_100")


class Selection(NamedTuple):
    """What a preset trains on.

    Attributes:
        purified: What the detector learns from.
        kept: Ids of the images that are judged good.
        consensus: (N,) what they were chosen by, or None.
        contamination: The estimate behind keep="auto", or None.
    """

    purified: ImageSet
    kept: Ids
    consensus: Floats | None
    contamination: Contamination | None


def compare(
    train: ImageSet,
    test: ImageSet,
    truth: GroundTruth,
    detector: Detector,
    backbone: Backbone,
    presets: Sequence[str],
    *,
    seed: int,
    n_subsets: int | None = None,
    screener: str = BY_PRESET,
    calibrate: bool = True,
    device: str = "auto",
    executor: Executor = SERIAL,
    on_fitted: Callable[[str, models.Model], object] | None = None,
) -> list[Row]:
    """Train a detector on what each preset of stage 1 keeps of a contaminated set, and measure it on a test set.

    Presets with equal screener, subsets and partitions share sub-models, which are trained once. Thresholds come from
    held-out scores of the images that are kept: those of sub-models of this detector, where a preset has them,
    else of `flawsift.pipeline.cross_fitted_scores`. Presets that keep the same images share one training.

    Args:
        train: Training images with features attached; its groups stay whole.
        test: Test images, likewise.
        truth: Labels and masks of both; detectors never see them.
        detector: Unfitted.
        backbone: Of the features.
        presets: "none", "oracle_clean" and names of `flawsift.screening.stage1.PRESETS`.
        seed: Of the partitions.
        n_subsets: k for all presets; None takes each preset's own.
        screener: Detector of stage 1: "preset" for each preset's own, "own" for `detector`, or a name.
        calibrate: Cross-fit for thresholds where there are no such sub-models; without, those rows have no rates of
            false alarms and misses.
        device: Where detectors run.
        executor: Where sub-models run.
        on_fitted: Called with each preset and its model.

    Returns:
        A row for each preset, in order.
    """
    chosen = _select(train, truth, detector, backbone, presets, seed, n_subsets, screener, device, executor)
    own = next((s for _, s, _ in chosen.values() if s is not None and s.by_detector), None)
    alike: dict[tuple[str, bytes], list[str]] = {}
    for preset, (selection, _, _) in chosen.items():
        key = models.set_digest(selection.purified), selection.kept.tobytes()
        alike.setdefault(key, []).append(preset)
    figures: dict[str, Row] = {}
    for sharing in alike.values():  # one model at a time in memory
        purified, kept, *_ = chosen[sharing[0]][0]
        stages = (s for preset in sharing if (s := chosen[preset][1]) is not None and s.by_detector)
        judge = next(stages, own)
        held_out: Floats | None
        if judge is not None and not isinstance(detector, Additive):
            held_out = judge.screening.held_out_scores[np.isin(train.ids, kept)]
        else:
            held_out = None if calibrate else np.empty(0)
        measured, model = _fit_and_measure(
            detector, purified, kept, held_out, test, truth, backbone, seed, device, executor
        )
        for preset in sharing:
            figures[preset] = measured
            if on_fitted is not None:
                on_fitted(preset, model)
    return [
        {
            "preset": preset,
            "screener": None if stage is None else stage.name,
            "seconds_stage1": seconds,
            **figures[preset],
            **_describe(selection, train.ids, None if stage is None else stage.screening, truth),
        }
        for preset, (selection, stage, seconds) in chosen.items()
    ]


class Stage(NamedTuple):
    """A screening, the name of the detector that made it, and whether that is the final detector itself."""

    screening: Screening
    name: str
    by_detector: bool


def _select(
    train: ImageSet,
    truth: GroundTruth,
    detector: Detector,
    backbone: Backbone,
    presets: Sequence[str],
    seed: int,
    n_subsets: int | None,
    screener: str,
    device: str,
    executor: Executor,
) -> dict[str, tuple[Selection, Stage | None, float | None]]:
    """{preset: its selection, the stage 1 behind it, seconds that one took}."""
    stages: dict[tuple[object, ...], tuple[Stage, float]] = {}
    chosen: dict[str, tuple[Selection, Stage | None, float | None]] = {}
    for preset in presets:
        if preset in (NONE, ORACLE):
            normal = train.ids[truth.select(train.ids).labels == 0]
            wanted = train if preset == NONE else train.select(normal)
            chosen[preset] = Selection(wanted, wanted.ids, None, None), None, None
            continue
        options = options_of(preset, n_subsets)
        first = screener_of(preset, screener, detector, backbone, seed)
        plain = options["divergence_weight"] == 0
        shape = (first.name, options["n_subsets"], options["n_partitions"], plain or preset)
        if shape not in stages:
            started = time.perf_counter()
            found = screen(train, first, **options, seed=seed, device=device, executor=executor)
            stages[shape] = Stage(found, first.name, first is detector), time.perf_counter() - started
        stage, seconds = stages[shape]
        found = reselected(stage.screening, options, first, train) if plain else stage.screening
        purified = found.purified(train, detector)
        selection = Selection(purified, found.kept, found.consensus, found.contamination)
        chosen[preset] = selection, stage, seconds
    return chosen


def screener_of(preset: str, screener: str, detector: Detector, backbone: Backbone, seed: int) -> Detector:
    """The detector of stage 1 of a preset, unfitted; `screener` as for `compare`."""
    name = SCREENERS[preset] if screener == BY_PRESET else screener
    return pipeline.resolve_screener(name, detector, backbone, seed)


def _fit_and_measure(
    detector: Detector,
    purified: ImageSet,
    kept: Ids,
    held_out: Floats | None,
    test: ImageSet,
    truth: GroundTruth,
    backbone: Backbone,
    seed: int,
    device: str,
    executor: Executor,
) -> tuple[Row, models.Model]:
    started = time.perf_counter()
    fitted = detector.clone().fit(purified, device=device)
    fitted_at = time.perf_counter()
    if held_out is None:
        held_out = pipeline.cross_fitted_scores(purified, fitted, kept, seed=seed, device=device, executor=executor)
    calibrated_at = time.perf_counter()
    model = models.Model(fitted, backbone, Calibration.of(held_out), {})
    found, _ = models.evaluate(model, test, truth, device=device, exact_pixels=EXACT_PIXELS)
    figures = {key: found.get(key) for key in (*METRICS, *RATES)}
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder))
        n_bytes = sum(f.stat().st_size for f in Path(folder).iterdir())
    seconds = {"seconds_stage2": fitted_at - started, "seconds_evaluate": time.perf_counter() - calibrated_at}
    return {**figures, **seconds, "model_bytes": n_bytes}, model


def _describe(chosen: Selection, ids: Ids, stage1: Screening | None, truth: GroundTruth) -> Row:
    """How well the selection parts normal from anomalous images, and how well each sub-model alone would."""
    anomalous = truth.select(ids).labels == 1
    is_kept = np.isin(ids, chosen.kept)
    share = len(chosen.kept) / len(ids)
    row: Row = {
        "keep_share": share,
        "rejected_patches": chosen.purified.rejected_share,
        "alpha_kept": float(anomalous[is_kept].mean()),
        "kept_normal": int((is_kept & ~anomalous).sum()),
        "kept_anomalous": int((is_kept & anomalous).sum()),
    }
    if chosen.contamination is not None:
        low, high = chosen.contamination.interval or (None, None)
        row |= {"alpha_hat": chosen.contamination.alpha_hat, "alpha_low": low, "alpha_high": high}
    if chosen.consensus is None or stage1 is None:
        return row
    mixed = 0 < anomalous.sum() < len(anomalous)
    row["stage1_auroc"] = metrics.image_auroc(chosen.consensus, anomalous.astype(np.int8)) if mixed else None
    alone = [np.isin(ids, keep_lowest(ids, s.astype(np.float64), share)) for s in stage1.score_matrix]
    row["alone_normal"] = float(np.mean([(a & ~anomalous).sum() for a in alone]))
    row["alone_anomalous"] = float(np.mean([(a & anomalous).sum() for a in alone]))
    return row
