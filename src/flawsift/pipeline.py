"""The main job: screen a folder and train on what is left, as the command line does under the same names."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from flawsift.data.images import FileSource, ImageSet
from flawsift.detectors.base import Additive, Detector, make_detector
from flawsift.detectors.parts.training import Watch
from flawsift.errors import InputError, ParameterError
from flawsift.executors import SERIAL, Executor
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.files import ensure_folder
from flawsift.models.calibration import DEFAULT_RATE, Calibration
from flawsift.models.model import Model, set_digest, versions
from flawsift.paths import name_some, show
from flawsift.progress import Progress, silent
from flawsift.screening.decisions import decided, read_decisions
from flawsift.screening.lookalikes import describe
from flawsift.screening.stage1 import FINAL, OWN, PRESETS, SCREENERS, Screening, ScreenOptions
from flawsift.screening.stage1 import screen as screen_features
from flawsift.screening.storage import ROOT, matched, read_screening, save_screening
from flawsift.types import Ids

HALVES = 2  # of the kept images, for a threshold where stage 1 had another detector: two trainings must do


def screen(
    images: ImageSet | str | Path,
    detector: Detector | str = "patchcore",
    backbone: Backbone | str = "efficientnet_lite0",
    *,
    store: FeatureStore | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    progress: Progress = silent,
    executor: Executor = SERIAL,
    **options: Unpack[ScreenOptions],
) -> Screening:
    """Stage 1 on a folder or a set: which images are probably defective.

    Args:
        images: A folder, or a set (then with its groups).
        detector: A registry name or an unfitted detector.
        backbone: A name for `load_backbone`, or a backbone.
        store: Where features are cached; the default cache unless given.
        seed: Of the partitions and of the detector, when it is given by name.
        device: Where sub-models run.
        out: A folder for screening.csv, screening.json and maps.npy; finished sub-models are kept there until done, so
            that the same command goes on after a kill.
        progress: Told how far it is.
        executor: Where sub-models run.
        options: Of stage 1; see `flawsift.screening.stage1.screen`. Those not given are those of the default preset.

    Raises:
        InputError: No usable images, or fewer than subsets.
        OutputError: `out` or the cache cannot be written.
    """
    prepared = _prepare(images, detector, backbone, store, seed, progress)
    return _screen_prepared(
        prepared, seed=seed, device=device, out=out, progress=progress, executor=executor, options=options
    )[0]


def fit(
    images: ImageSet | str | Path,
    detector: Detector | str = FINAL,
    backbone: Backbone | str = "efficientnet_lite0",
    *,
    screening: str | Path | None = None,
    decisions: str | Path | Mapping[str, str] | None = None,
    no_screen: bool = False,
    screener: Detector | str = SCREENERS["default"],
    false_alarm_rate: float = DEFAULT_RATE,
    store: FeatureStore | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    on_screened: Callable[[Screening], object] | None = None,
    progress: Progress = silent,
    executor: Executor = SERIAL,
    **options: Unpack[ScreenOptions],
) -> Model:
    """Both stages: screen, then train the detector on what is kept, with a threshold from held-out scores.

    Those are the scores of stage 1 where it had the same detector, else those of `cross_fitted_scores`. The latter are
    for detectors with additive statistics in any case: sub-models of a fifth of the images score far too high.

    Args:
        images: As for `screen`, and so are detector, backbone, store, seed, device, progress, executor and options.
            With keep="auto", a detector that learns from defects (`Detector.learns_from_defects`) is trained on
            everything; stage 1 ranks the images all the same.
        screening: A folder that `screen` wrote, its `kept` column perhaps edited, instead of a new stage 1. Any
            detector and backbone may have made it.
        decisions: What a person decided, from `flawsift review`: a CSV file with the columns path and decision, or
            {relative path: decision}. "keep" and "remove" override the screening; "unsure" leaves it.
        no_screen: Train on everything but what `decisions` remove, with a threshold from `cross_fitted_scores`.
        screener: The detector of stage 1, "own" for `detector` itself as in the paper. A name that is the detector's
            own means the detector as it is given.
        false_alarm_rate: The share of good parts that the threshold may stop.
        out: The model folder; stage 1 is written to `out/screening`.
        on_screened: Called with the result of a new stage 1, before stage 2.

    Raises:
        InputError: As for `screen`, the screening does not fit the folder, or the decisions do not fit the images.
        OutputError: `out` or the cache cannot be written.
    """
    if screening is not None and no_screen:
        raise InputError("Give either a screening or no_screen, not both.")
    if out is not None:
        ensure_folder(out)
    started = time.monotonic()
    Calibration.of([]).threshold(false_alarm_rate)  # a bad rate is told now, not after the work
    choices = decisions if isinstance(decisions, Mapping) else read_decisions(decisions) if decisions else {}
    counts: dict[str, int] = {}
    own = no_screen or screening is not None  # no other detector's stage 1
    p = _prepare(images, detector, backbone, store, seed, progress, OWN if own else screener)
    if p.detector.learns_from_defects and options.get("keep", PRESETS["default"]["keep"]) == "auto":
        options = {**options, "keep": 1.0, "reject_patches": 0.0}
    additive = isinstance(p.detector, Additive)
    note: str | None = None
    total: Detector | None = None
    held_out: npt.NDArray[np.float64] | None  # None: to be had by cross-fitting
    if screening is not None:
        saved, counts = read_screening(screening).decided(choices)
        now = matched(saved, p.data, screening)
        purified, kept = now.purified(p.data, p.detector), now.kept
        note = _difference(saved, p.data)
        held_out = now.held_out_scores[now.is_kept] if _same_scores(saved, p) and not additive else None
    elif no_screen:
        is_kept, counts = decided(p.data.names, np.ones(len(p.data), np.bool_), choices)
        kept = p.data.ids[is_kept]
        purified, held_out = p.data.select(kept), None
    else:
        folder = None if out is None else Path(out) / "screening"
        done, total = _screen_prepared(
            p, seed=seed, device=device, out=folder, progress=progress, executor=executor, options=options
        )
        if on_screened is not None:
            on_screened(done)
        now, counts = done.decided(choices)
        purified, kept = now.purified(p.data, p.detector), now.kept
        held_out = now.held_out_scores[now.is_kept] if p.screener is p.detector and not additive else None
    resume = None if out is None else Path(out) / ".resume"
    run = None if resume is None else _run_folder(resume, p, set_digest(purified))
    progress("detector", 0, 1)
    checkpoint = None if run is None else run / "training.safetensors"
    watch = Watch(lambda _, done, of: progress("detector", done, of), checkpoint)
    fitted = _fit_purified(p, purified, total, device, watch)
    progress("detector", 1, 1)
    if held_out is None:
        held_out = cross_fitted_scores(
            purified,
            fitted,
            kept,
            seed=seed,
            device=device,
            checkpoint=None if run is None else run / "calibration",
            progress=progress,
            executor=executor,
        )
    training = {
        "n_images": len(p.data) + len(p.unreadable),
        "n_kept": len(kept),
        "n_partly": len(purified) - len(kept),  # set aside, and learned but for their rejected patches
        "rejected_patches": purified.rejected_share,
        "screened": not no_screen,
        "screener": None if no_screen or screening is not None else p.screener.name,
        "detector": {"name": fitted.name, "params": fitted.params()},
        **({"screening_note": note} if note else {}),
        **({"decisions": counts} if choices else {}),
        "false_alarm_rate": false_alarm_rate,
        "seed": seed,
        "kept_digest": set_digest(purified),
        "seconds": round(time.monotonic() - started, 2),
        "versions": versions(),
    }
    model = Model(fitted, p.backbone, Calibration.of(held_out), training)
    if resume is not None:
        model.save(resume.parent)
        shutil.rmtree(resume, ignore_errors=True)
    return model


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What both stages start from."""

    data: ImageSet  # readable, with features
    detector: Detector
    screener: Detector  # of stage 1; may be the same object
    backbone: Backbone
    unreadable: Mapping[str, str]


def _prepare(
    images: ImageSet | str | Path,
    detector: Detector | str,
    backbone: Backbone | str,
    store: FeatureStore | None,
    seed: int,
    progress: Progress,
    screener: Detector | str = OWN,
) -> _Prepared:
    found = images if isinstance(images, ImageSet) else ImageSet.from_folder(images)
    made = make_detector(detector, seed=seed) if isinstance(detector, str) else detector
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    first = resolve_screener(screener, made, loaded, seed)
    layers = tuple(dict.fromkeys([*made.layers, *first.layers]))
    views = tuple(dict.fromkeys([*made.views, *first.views]))
    data, failed = attach(found, loaded, layers, views=views, store=store or FeatureStore(), progress=progress)
    return _Prepared(data, made, first, loaded, {found.source.name(i): reason for i, reason in sorted(failed.items())})


def resolve_screener(screener: Detector | str, detector: Detector, backbone: Backbone, seed: int) -> Detector:
    """The detector of stage 1: `detector` itself for "own" and for its own name, else the one named, unfitted.

    Where the backbone has not the layers that the one named would read, such as strides 8 and 16 of a transformer, it
    reads those of `detector`.

    Raises:
        ParameterError: There is no such detector.
    """
    if not isinstance(screener, str):
        return screener
    if screener in (OWN, detector.name):
        return detector
    made = make_detector(screener, seed=seed)
    try:
        for layer in made.layers:
            backbone.resolve(layer)
    except ParameterError:
        return make_detector(screener, seed=seed, layers=detector.layers)
    return made


def _screen_prepared(
    p: _Prepared,
    *,
    seed: int,
    device: str,
    out: str | Path | None,
    progress: Progress,
    executor: Executor,
    options: ScreenOptions,
) -> tuple[Screening, Detector | None]:
    """Stage 1, and the merged sub-models of the first partition where the detector's statistics are additive."""
    full: ScreenOptions = {**PRESETS["default"], **options}
    provenance = _provenance(p, p.screener)
    checkpoint = None
    if out is not None:
        checkpoint = _run_folder(ensure_folder(out) / ".resume", p, p.screener.name, p.screener.params(), full, seed)
    merged = _Merger(full["n_subsets"])
    additive = p.screener is p.detector and isinstance(p.detector, Additive)
    started = time.monotonic()
    found = screen_features(
        p.data,
        p.screener,
        **full,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        on_submodel=merged if additive else None,  # others need not travel back from workers
        progress=progress,
        executor=executor,
    )
    provenance |= {"seconds": round(time.monotonic() - started, 2), "images_digest": set_digest(p.data)}
    if isinstance(p.data.source, FileSource):
        provenance[ROOT] = os.path.abspath(p.data.source.root)
    descriptions = describe(p.data, p.screener.layers)
    found = replace(found, descriptions=descriptions, unreadable=p.unreadable, provenance=provenance)
    if out is not None:
        save_screening(found, out)
        shutil.rmtree(Path(out) / ".resume", ignore_errors=True)
    return found, merged.total


@dataclass
class _Merger:
    """Adds up additive sub-models of the first partition as they are trained: together they saw every image once."""

    n_subsets: int
    seen: int = 0
    _total: Detector | None = None

    def __call__(self, model: Detector) -> None:
        if isinstance(model, Additive) and self.seen < self.n_subsets:
            self._total = model.merged(self._total) if self._total is not None else model
        self.seen += 1

    @property
    def total(self) -> Detector | None:
        """The model of all images, when every sub-model of the first partition was trained in this run."""
        return self._total if self.seen >= self.n_subsets else None


def _run_folder(root: Path, p: _Prepared, *settings: Any) -> Path:
    """Where the unfinished work of one run lies, found by everything that can change its result."""
    key = json.dumps([_provenance(p, p.detector), set_digest(p.data), *settings], sort_keys=True, default=str)
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]


def _fit_purified(p: _Prepared, purified: ImageSet, total: Detector | None, device: str, watch: Watch) -> Detector:
    removed = p.data.ids[~np.isin(p.data.ids, purified.ids)]
    whole = purified.rejected_share == 0
    if isinstance(total, Additive) and whole and len(removed) < len(purified):
        return total.without(p.data.select(removed), device=device)
    return p.detector.clone().fit(purified, device=device, watch=watch)


def cross_fitted_scores(
    purified: ImageSet,
    detector: Detector,
    kept: Ids,
    *,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
    executor: Executor = SERIAL,
) -> npt.NDArray[np.float64]:
    """Scores to calibrate a threshold with: each image is scored by a model that has not seen it.

    Where the detector has additive statistics, each image and its group is taken out of the fitted model; else two
    clones are trained on halves, and each scores the other half.

    Args:
        purified: The images that the detector has learned from; groups stay whole.
        detector: Fitted on them, where its statistics are additive; else fitted or not.
        kept: (m,) ids of those that are judged good: not those that were set aside and are learned in part.
        seed, device, checkpoint, progress, executor: As for `flawsift.screening.stage1.screen`.

    Returns:
        (m,) scores; empty where there is only one group.
    """
    is_kept = np.isin(purified.ids, kept)
    n_groups = len(set(purified.select(purified.ids[is_kept]).group_names))
    if n_groups < HALVES:
        return np.empty(0)
    if isinstance(detector, Additive):
        return detector.held_out_scores(purified, device=device)[is_kept]
    found = screen_features(
        purified,
        detector.clone(),
        n_subsets=HALVES,
        keep=1.0,
        reject_patches=0.0,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
        executor=executor,
    )
    return found.held_out_scores[is_kept]


def _provenance(p: _Prepared, detector: Detector) -> dict[str, Any]:
    return {
        "detector": {"name": detector.name, "params": detector.params()},
        "backbone": {"spec": p.backbone.spec, "key": p.backbone.key, "weights_digest": p.backbone.weights_digest},
        "versions": versions(),
    }


def _same_scores(saved: Screening, p: _Prepared) -> bool:
    """Whether the scores of a screening are this detector's: a threshold from another's would be nonsense."""
    mine = _provenance(p, p.detector)
    keys = (("detector", "name"), ("detector", "params"), ("backbone", "key"), ("backbone", "weights_digest"))
    return all(saved.provenance.get(part, {}).get(key) == mine[part][key] for part, key in keys)


def _difference(saved: Screening, data: ImageSet) -> str | None:
    """What a screening does not know of the images that it is used for."""
    known = {show(name) for name in saved.names}
    if new := [name for name in data.names if show(name) not in known]:
        return f"Not in the screening, and so not trained on ({len(new)} in all): {name_some(new)}."
    if len(data) == len(known) and saved.provenance.get("images_digest") not in (None, set_digest(data)):
        return "Some images have changed since the screening."
    return None
