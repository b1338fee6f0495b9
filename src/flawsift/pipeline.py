"""The main job: screen images and train on what is kept, as the command line does under the same names."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from flawsift.data.checks import ready_to_train
from flawsift.data.images import FileSource, ImageSet
from flawsift.data.inputs import Images, as_images
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.training import Watch
from flawsift.detectors.protocols import Additive
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError, unknown_name
from flawsift.executors import SERIAL, Executor, Run, make_executor
from flawsift.features.backbones import Backbone, fitting_size, load_backbone
from flawsift.features.devices import resolve_device
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.files import ensure_folder, new_result
from flawsift.models.calibration import DEFAULT_RATE, Calibration
from flawsift.models.model import FILES, Model, learned_digests, set_digest
from flawsift.models.plan import TrainingPlan, calibrate, judge, options_for, plan_training
from flawsift.models.profile import Profile
from flawsift.models.provenance import how_seen, is_made_by, provenance_of, versions
from flawsift.occupied import refuse_other_results
from flawsift.paths import show
from flawsift.progress import ProgressOption, Stage, as_progress, steps_of
from flawsift.reports import calibration
from flawsift.reports.pages import REPORT
from flawsift.reports.screening import write_fit_report, write_screening_report
from flawsift.screening import storage
from flawsift.screening.decisions import choices_of, located
from flawsift.screening.lookalikes import describe_images
from flawsift.screening.options import FINAL, OWN, ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import resolve_screener, screen_and_fit
from flawsift.screening.storage import CSV, ROOT, edited_table, grouped, images_of, load_screening, write_files

RESUME = ".resume"  # in the folder that is written: unfinished work of a run, until it is complete
SCREENING = "screening"  # in a model folder: its stage 1


class Resources(TypedDict, total=False):
    """What `screen` and `fit` run with, all of it optional.

    Attributes:
        store: Where features are cached; the default cache unless given.
        seed: Of the partitions, and of detectors given by name.
        device: Where detectors run; "auto" takes a GPU where there is one.
        executor: Where sub-models run, as text too: see `flawsift.executors.make_executor`.
        progress: True for a bar, in a script or a notebook, or a callable that is told.
    """

    store: FeatureStore
    seed: int
    device: str
    executor: Executor | str
    progress: ProgressOption


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """What `fit` made.

    Attributes:
        model: The trained model.
        screening: Stage 1 as the machine said it, or None where nothing was screened.
        plan: What the detector was trained on, once a person's decisions are in.
        out: The model folder, or None where nothing was written.
    """

    model: Model
    screening: Screening | None
    plan: TrainingPlan
    out: Path | None

    def __repr__(self) -> str:
        written = "" if self.out is None else f"\nwritten to {show(self.out)}"
        return f"{self.model!r}{written}"

    @property
    def decisions(self) -> Mapping[str, int]:
        """How many decisions of each kind a person had made."""
        return self.plan.decisions

    @property
    def report(self) -> Path | None:
        """The page about the model, where one was written."""
        return None if self.out is None or self.screening is None else self.out / REPORT


def screen(
    images: Images,
    detector: Detector | str | None = None,
    backbone: Backbone | str = "efficientnet_lite0",
    *,
    options: ScreenOptions | str = "default",
    out: str | Path | None = None,
    **resources: Unpack[Resources],
) -> Screening:
    """Stage 1 on a folder or a set: which images are probably defective.

    Args:
        images: A folder, files, a pattern, PIL images, arrays, a list or an iterator of these, or a set (then with its
            groups); see `flawsift.data.inputs.as_images`.
        detector: A registry name or an unfitted detector; None takes the screener of the options.
        backbone: A name for `load_backbone`, of a size that fits the images (`fitting_size`), or a backbone.
        options: Of stage 1, or the name of a preset.
        out: A folder for screening.csv, screening.json, maps.npy and report.html; finished sub-models are kept there
            until done, so that the same command goes on after a kill.
        resources: See `Resources`.

    Raises:
        InputError: No usable images, or fewer than subsets or than two.
        ParameterError: An option of sub-models was set, and there are none.
        OutputError: `out` or the cache cannot be written.
    """
    _check(resources, out, storage.FILES)
    chosen = ScreenOptions.of(options)
    if detector is not None and chosen.screener not in (OWN, FINAL):
        raise ParameterError(f"Give either detector or options with screener='{chosen.screener}', not both.")
    with as_progress(resources.get("progress")) as tell:
        given = detector or (FINAL if chosen.screener == OWN else chosen.screener)
        job = _prepare(images, given, backbone, replace(chosen, screener=OWN), {**resources, "progress": tell})
        screening, _ = _stage1(job, chosen, out, wants_fitted=False)
        if out is not None:
            tell(Stage.WRITING, 0, 1)
            with new_result(Path(out), old=storage.FILES, aside=edited_table(Path(out))) as new:
                write_files(screening, new)
                write_screening_report(screening, job.images, new)
            shutil.rmtree(Path(out) / RESUME, ignore_errors=True)
        return screening


# long: stage 1 is given, made or left out, and each of the other parameters is one decision of the user
def fit(
    images: Images,
    detector: Detector | str = FINAL,
    backbone: Backbone | str = "efficientnet_lite0",
    *,
    screening: Screening | str | Path | None = None,
    no_screen: bool = False,
    options: ScreenOptions | str | None = None,
    decisions: str | Path | Mapping[str, str] | None = None,
    false_alarm_rate: float = DEFAULT_RATE,
    out: str | Path | None = None,
    **resources: Unpack[Resources],
) -> FitResult:
    """Both stages: screen, then train the detector on what is kept, with a threshold from held-out scores.

    Args:
        images: A folder, files, a pattern, PIL images, arrays, a list or an iterator of these, or a set (then with its
            groups); see `flawsift.data.inputs.as_images`.
        detector: Of stage 2: a registry name or an unfitted detector.
        backbone: A name for `load_backbone`, of a size that fits the images (`fitting_size`), or a backbone.
        screening: Instead of a new stage 1: what `screen` returned, or the folder that it wrote, its `kept` column
            perhaps edited. Any detector and backbone may have made it. Images that come without groups are in its
            groups; with some of their own, these are used, and a difference is told (`groups_note`).
        no_screen: Train on everything but what `decisions` remove.
        options: Of a new stage 1, or the name of a preset; None takes the default one. See `models.plan.options_for`.
        decisions: What a person decided, from `flawsift review`: a CSV file with the columns path and decision, or
            {relative path: decision}. "keep" and "remove" override the screening; "unsure" leaves it.
        false_alarm_rate: The share of good parts that the threshold may stop.
        out: The model folder; stage 1 is written to `out/screening`, and a page about both to `out/report.html`. What
            an earlier run left there and this one does not replace is moved to `out/earlier-1`.
        resources: See `Resources`.

    Raises:
        InputError: As for `screen`, the screening does not fit the images, or the decisions do not.
        ParameterError: As for `screen`, or options were set and no stage 1 is made.
        OutputError: `out` or the cache cannot be written.
    """
    _check(resources, out, FILES)
    if not isinstance(screening, Screening | str | Path | None):
        raise TypeError(f"screening must be a Screening or its folder, got {type(screening).__name__}.")
    if screening is not None and no_screen:
        raise InputError("Give either a screening or no_screen, not both.")
    if options is not None and (no_screen or screening is not None):
        ScreenOptions.of(options).refuse(no_screen=no_screen)
    Calibration.of([]).threshold(false_alarm_rate)  # a bad rate is told now, not after the work
    asked = _Asked(
        screening=load_screening(screening) if isinstance(screening, str | Path) else screening,
        folder=Path(screening) if isinstance(screening, str | Path) else None,
        no_screen=no_screen,
        options=ScreenOptions.of("default" if options is None else options),
        choices=choices_of(decisions),
        false_alarm_rate=false_alarm_rate,
        out=None if out is None else ensure_folder(out),
        started=time.monotonic(),
    )
    with as_progress(resources.get("progress")) as tell:
        given = as_images(images, progress=tell)
        asked = replace(asked, choices=located(asked.choices, given.names))
        if asked.screening is not None:
            given, note = grouped(asked.screening, given)
            asked = replace(asked, groups_note=note)
        wanted = asked.options if asked.is_new else None
        return _both_stages(_prepare(given, detector, backbone, wanted, {**resources, "progress": tell}), asked)


def _check(resources: Resources, out: str | Path | None, own: Sequence[str]) -> None:
    """Raise TypeError for what neither function takes, OutputError for a folder where the `own` files cannot go."""
    for name in [name for name in resources if name not in Resources.__annotations__]:
        if name in {f.name for f in fields(ScreenOptions)}:
            raise TypeError(f"'{name}' is an option of stage 1: give options=ScreenOptions({name}=...).")
        raise TypeError(unknown_name("argument", name, Resources.__annotations__))
    refuse_other_results(out, own)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What `fit` was asked for, checked."""

    screening: Screening | None
    folder: Path | None  # where it lies, if it is a saved one
    no_screen: bool
    options: ScreenOptions
    choices: Mapping[str, str]
    false_alarm_rate: float
    out: Path | None
    started: float
    groups_note: str | None = None  # the images have other groups than the screening

    @property
    def is_new(self) -> bool:
        """Whether stage 1 is still to be made."""
        return self.screening is None and not self.no_screen


def _both_stages(job: "_Job", asked: _Asked) -> FitResult:
    out, stage1, merged = asked.out, asked.screening, None
    if asked.is_new:
        wants = job.screener is job.detector and isinstance(job.detector, Additive)
        stage1, merged = _stage1(job, options_for(job.detector, asked.options), out, wants_fitted=wants)
    # held-out scores were made without the other images of a group: of other groups, they are others
    same = asked.groups_note is None and is_made_by(stage1, job.detector, job.backbone, job.data)
    plan = plan_training(job.data, job.detector, stage1, choices=asked.choices, same_detector=same)
    record = {
        "n_images": len(job.data) + len(job.unreadable),
        "n_groups": plan.images.n_groups,
        **({"groups_note": asked.groups_note} if asked.groups_note else {}),
        "screened": not asked.no_screen,
        "screener": job.screener.name if asked.is_new else None,
        **({"decisions": dict(plan.decisions)} if asked.choices else {}),
        "false_alarm_rate": asked.false_alarm_rate,
    }
    model = _stage2(job, plan, merged, out, record, asked.started)
    if out is not None:
        job.run.progress(Stage.WRITING, 0, 1)
        _write(job, asked, model, stage1, out)
    return FitResult(model, stage1, plan, out)


def _write(job: "_Job", asked: _Asked, model: Model, stage1: Screening | None, out: Path) -> None:
    """Model, screening and page in one step, so that no two runs mix."""
    unsaved = None if asked.folder is not None else stage1
    aside, old = dict.fromkeys(_stale(out, asked), "is not about the new model"), list(FILES)
    if unsaved is not None:
        aside |= {f"{SCREENING}/{name}": why for name, why in edited_table(out / SCREENING).items()}
        old += [f"{SCREENING}/{name}" for name in storage.FILES]
    with new_result(out, old=old, aside=aside) as new:
        model.write_files(new)
        if unsaved is not None:
            write_files(unsaved, ensure_folder(new / SCREENING))
            write_screening_report(unsaved, _pictures_of(unsaved, job), new / SCREENING)
        if stage1 is not None:
            decided, _ = stage1.with_decisions(asked.choices)
            write_fit_report(model, decided, _pictures_of(decided, job), new)
    shutil.rmtree(out / RESUME, ignore_errors=True)


def _stale(out: Path, asked: _Asked) -> list[str]:
    """What an earlier run left beside the new model, and is not about it: decisions may be in it."""
    stale, mine = [calibration.PAGE], out / SCREENING
    if (mine / CSV).exists() and (asked.no_screen or (asked.folder is not None and not mine.samefile(asked.folder))):
        stale.append(SCREENING)
    if asked.no_screen:
        stale.append(REPORT)
    return stale


@dataclass(frozen=True, eq=False)
class _Job:
    """What both stages start from."""

    images: ImageSet  # as given
    data: ImageSet  # readable, with features
    detector: Detector
    screener: Detector  # of stage 1; may be the same object
    backbone: Backbone
    unreadable: Mapping[str, str]
    run: Run


def _prepare(
    images: Images,
    detector: Detector | str,
    backbone: Backbone | str,
    stage1: ScreenOptions | None,
    resources: Resources,
) -> _Job:
    """Images and features for both stages; `stage1` is None where none is to be made."""
    store = resources.get("store") or FeatureStore()
    if not isinstance(store, FeatureStore):
        raise ParameterError(f"store must be a FeatureStore, such as FeatureStore(folder), got {store!r}.")
    given_run: dict[str, Any] = {key: value for key, value in resources.items() if key != "store"}
    run = Run(**{**given_run, "executor": make_executor(resources.get("executor", SERIAL))})
    resolve_device(run.device)  # one that is not there is told now, not after the work
    given = ready_to_train(as_images(images, progress=run.progress), progress=run.progress)
    made = make_detector(detector, seed=run.seed) if isinstance(detector, str) else detector
    if isinstance(backbone, str):
        run.progress(Stage.LOADING, 0, 1)
        backbone = load_backbone(backbone, size=fitting_size(given))
    first = made if stage1 is None else resolve_screener(stage1.screener, made, backbone, run.seed)
    layers = tuple(dict.fromkeys([*made.layers, *first.layers]))
    views = tuple(dict.fromkeys([*made.views, *first.views]))
    data, failed = attach(given, backbone, layers, views=views, store=store, progress=run.progress)
    unreadable = {given.source.name(i): reason for i, reason in sorted(failed.items())}
    return _Job(given, data, made, first, backbone, unreadable, run)


def _stage1(
    job: _Job, options: ScreenOptions, out: str | Path | None, *, wants_fitted: bool
) -> tuple[Screening, Detector | None]:
    """Stage 1, whose finished sub-models stay in `out`, and the detector of all images where it was made by the way."""
    run = job.run
    if out is not None:
        settings = job.screener.name, job.screener.params(), options.as_json(), run.seed
        run = replace(run, checkpoint=_run_folder(ensure_folder(out) / RESUME, job, *settings))
    started = time.monotonic()
    ranked, fitted = screen_and_fit(job.data, job.screener, options, run, wants_fitted=wants_fitted)
    provenance = provenance_of(job.screener, job.backbone, job.data)
    provenance |= {"seconds": round(time.monotonic() - started, 2), "images_digest": set_digest(job.data)}
    if isinstance(job.data.source, FileSource):
        provenance[ROOT] = os.path.abspath(job.data.source.root)
    descriptions = describe_images(job.data, job.screener.layers)
    return replace(ranked, descriptions=descriptions, unreadable=job.unreadable, provenance=provenance), fitted


def _stage2(
    job: _Job, plan: TrainingPlan, merged: Detector | None, out: Path | None, record: Mapping[str, Any], started: float
) -> Model:
    """Train and calibrate; `merged` is an additive detector of all images, where stage 1 made one."""
    run = job.run
    unfinished = None if out is None else _run_folder(out / RESUME, job, set_digest(plan.images), run.seed)
    run.progress(Stage.TRAINING, 0, 1)
    checkpoint = None if unfinished is None else unfinished / "training.safetensors"
    fitted = _fitted(job, plan.images, merged, Watch(steps_of(run.progress, Stage.TRAINING), checkpoint))
    run.progress(Stage.THRESHOLD, 0, 1)
    judged = judge(plan, fitted, replace(run, checkpoint=None if unfinished is None else unfinished / "calibration"))
    training = {
        "n_images": record["n_images"],
        "n_kept": len(plan.kept),
        "n_partly": len(plan.images) - len(plan.kept),  # set aside, and learned but for their rejected patches
        "rejected_patches": plan.images.rejected_share,
        **record,
        "detector": {"name": fitted.name, "params": fitted.params()},
        **({"screening_note": " ".join(plan.notes)} if plan.notes else {}),
        "seed": run.seed,
        **how_seen(job.data),
        "kept_digest": set_digest(plan.images),
        "seconds": round(time.monotonic() - started, 2),
        "versions": versions(),
    }
    profile = Profile.of_images(plan.images, judged.median_patch(plan.kept))
    return Model(fitted, job.backbone, calibrate(plan, judged), training, profile, learned_digests(plan.images))


def _fitted(job: _Job, images: ImageSet, merged: Detector | None, watch: Watch) -> Detector:
    """The detector of some of the images: what was learned of all of them less the others, or trained anew."""
    removed = job.data.ids[~np.isin(job.data.ids, images.ids)]
    whole = images.rejected_share == 0
    drew = merged is not None and merged.n_drawn is not None  # then others take the place of those that are removed
    if isinstance(merged, Additive) and whole and len(removed) < len(images) and not (drew and len(removed)):
        return merged.without(job.data.select(removed), device=job.run.device)
    return job.detector.clone().fit(images, device=job.run.device, watch=watch)


def _pictures_of(screening: Screening, job: _Job) -> ImageSet:
    """The images of a screening under its own ids; a folder that was listed anew may have others under the same."""
    root = job.images.source.root if isinstance(job.images.source, FileSource) else None
    return job.images if root is None else images_of(screening, root)


def _run_folder(root: Path, job: _Job, *settings: Any) -> Path:
    """Where the unfinished work of one run lies, found by everything that can change its result."""
    made_of = provenance_of(job.detector, job.backbone, job.data), set_digest(job.data), list(job.data.members.values())
    key = json.dumps([*made_of, *settings], sort_keys=True, default=str)
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]
