"""The commands that train: screen, which is stage 1 alone, and fit, which is both stages."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.cli.lines import range_lines, size_lines, threshold_lines, warning_lines
from flawsift.cli.options import (
    AlignOption,
    BackboneChoice,
    Decisions,
    DetectorChoice,
    FitStage,
    Groups,
    Images,
    Machine,
    Out,
    RangeOption,
    Rate,
    RoiOption,
    ScreeningStage,
    images_in,
    takes_groups,
)
from flawsift.cli.output import Output
from flawsift.progress import Stage
from flawsift.screening.options import ScreenOptions

if TYPE_CHECKING:
    from flawsift.detectors.base import Detector
    from flawsift.features.backbones import Backbone
    from flawsift.pipeline import FitResult
    from flawsift.screening.result import Screening


log = logging.getLogger("flawsift")
ByPosition = Annotated[
    bool,
    typer.Option(
        "--tiles-by-position",
        help="For cameras that stand still: compare each tile only with the same tile of other images (quorum, "
        "patchcore).",
    ),
]
SCREENER = DetectorChoice(ScreenOptions().screener)  # what `screen` takes where no detector is named


@takes_groups
# long: a command's options are its parameters
def screen(
    images: Images,
    out: Out,
    *,
    detector: DetectorChoice = SCREENER,
    backbone: BackboneChoice,
    stage1: ScreeningStage,
    tiles_by_position: ByPosition = False,
    groups: Groups = None,
    value_range: RangeOption = None,
    roi: RoiOption = None,
    align: AlignOption = False,
    machine: Machine,
    output: Output,
) -> None:
    """Stage 1: rank the images of a folder by how defective they look, and say which to keep."""
    with output.progress() as progress:
        from flawsift import pipeline
        from flawsift.files import ensure_folder
        from flawsift.reports.pages import REPORT
        from flawsift.screening.storage import summary_of

        options, pictures = (
            stage1.options or ScreenOptions(),
            images_in(images, groups, value_range, roi, align, progress=progress),
        )
        ensure_folder(out)
        unfitted = detector.make(machine.seed)
        progress(Stage.LOADING, 0, 1)
        network = backbone.load(machine.device, pictures)
        result = pipeline.screen(
            pictures,
            _placed(unfitted, network) if tiles_by_position else unfitted,
            network,
            options=options,
            out=out,
            **machine.resources(progress),
        )
    page = out / REPORT
    lines = screened_lines(result)
    lines += [f"Table:  {out / 'screening.csv'}", f"Report: {page}", f"Decide: flawsift review {out}"]
    output.say({**summary_of(result), "out": str(out), "report": str(page)}, lines)


def _placed(detector: "Detector", backbone: "Backbone") -> "Detector":
    """The unfitted detector, comparing tiles by position."""
    from flawsift.detectors.parts.positions import compared_by_tile

    return compared_by_tile(detector, backbone.tiles)


def screened_lines(result: "Screening") -> list[str]:
    """What is said about a screening."""
    removed = result.removed
    unreadable = f", {len(result.unreadable)} unreadable" if result.unreadable else ""
    lines = [f"{len(result.ids)} images screened, {len(removed)} set aside, {len(result.kept)} kept{unreadable}."]
    if result.rejected is not None and result.rejected.any():
        share = 100 * float(result.rejected[result.is_kept].mean())
        lines.append(
            f"Of the kept images, the {share:.1f} % oddest patches are left out by detectors that leave out patches"
            + (", of those set aside all but the most ordinary ones" if result.is_partly_learned.any() else "")
            + "; Quorum, the default, is trained on all."
        )
    if spec := result.provenance.get("backbone", {}).get("spec"):
        lines += size_lines(spec, result.provenance)
    lines += range_lines(result.provenance)
    if result.n_groups is not None:
        lines.append(f"They are in {result.n_groups} groups; `flawsift fit --screening` will know them.")
    if result.contamination is not None:
        lines.append(f"Estimated share of defective images: {result.contamination.text}.")
    names = dict(zip(result.ids.tolist(), result.names, strict=True))
    return [*lines, "Most suspicious:", *(f"  {names[int(i)]}" for i in result.ranking[:5])]


@takes_groups
# long: a command's options are its parameters, and four of these are groups of them
def fit(
    images: Images,
    out: Out,
    *,
    detector: DetectorChoice,
    backbone: BackboneChoice,
    stage1: FitStage,
    tiles_by_position: ByPosition = False,
    groups: Groups = None,
    value_range: RangeOption = None,
    roi: RoiOption = None,
    align: AlignOption = False,
    screening: Annotated[Path | None, typer.Option("--screening", help="Use this stage 1, edited or not.")] = None,
    decisions: Decisions = None,
    no_screen: Annotated[bool, typer.Option("--no-screen", help="Train on every image.")] = False,
    false_alarm_rate: Rate = None,
    machine: Machine,
    output: Output,
) -> None:
    """Both stages: rank the images of a folder, then train a detector and set its threshold."""
    with output.progress() as progress:
        from flawsift import pipeline
        from flawsift.models.calibration import DEFAULT_RATE
        from flawsift.pipeline import SCREENING
        from flawsift.screening.seen import as_seen_by
        from flawsift.screening.storage import load_screening

        options, pictures = stage1.options, images_in(images, groups, value_range, roi, align, progress=progress)
        given = None if screening is None else load_screening(screening)
        if given is not None:
            pictures = as_seen_by(given, pictures)
        if decisions is None and not no_screen:
            _tell_decisions(out / SCREENING if screening is None else screening)
        unfitted = detector.make(machine.seed)
        progress(Stage.LOADING, 0, 1)
        network = backbone.load(machine.device, pictures)
        result = pipeline.fit(
            pictures,
            _placed(unfitted, network) if tiles_by_position else unfitted,
            network,
            screening=given,
            no_screen=no_screen,
            options=options,
            decisions=decisions,
            false_alarm_rate=DEFAULT_RATE if false_alarm_rate is None else false_alarm_rate,
            out=out,
            **machine.resources(progress),
        )
    threshold = result.model.threshold()
    lines = fitted_lines(result, out)
    if result.report is not None:
        lines += [f"Report: {result.report}", f"Decide image by image: flawsift review {screening or out}"]
    summary: dict[str, Any] = {"out": str(out), **result.model.training}
    summary |= {"threshold": None if threshold is None else vars(threshold)}
    summary |= {"warning": None if threshold is None else threshold.warning}
    output.say({**summary, "report": None if result.report is None else str(result.report)}, lines)


def _tell_decisions(screening: Path) -> None:
    """Warn of decisions beside a screening, which no one has asked to be used."""
    from flawsift.screening.decisions import NAME

    if (there := screening / NAME).is_file():
        log.warning("What was decided in '%s' is not used. To use it, add --decisions '%s'.", there, there)


def fitted_lines(result: "FitResult", out: Path) -> list[str]:
    """What is said about a model that was just trained."""
    training = result.model.training
    partly = training["n_partly"]
    which = (
        f"on the ordinary patches of {partly} more" if training["rejected_patches"] else f"on the {partly} set aside"
    )
    more = f", and {which}" if partly else ""
    name, kept, total = result.model.detector.name, training["n_kept"], training["n_images"]
    threshold = result.model.threshold()
    lines = [*warning_lines(threshold), f"Trained {name} on {kept} of {total} images{more}: {out}"]
    if result.model.calibration.contamination is not None and threshold is not None and threshold.warning is None:
        low, high = (100 * end for end in result.model.calibration.contamination)
        lines.append(f"Between {low:.0f} and {high:.0f} % of the images may be defective (right in nine cases of ten).")
    if training["n_groups"] is not None:
        lines.append(f"They are in {training['n_groups']} groups; none was judged by images of its own group.")
    if drawn := result.model.detector.n_drawn:
        lines.append(f"It compares with {drawn} of them, drawn at random (--set max_images=null for all).")
    lines += size_lines(result.model.backbone.spec, training)
    lines += range_lines(training)
    if note := training.get("screening_note"):
        lines.append(f"Note: {note} Screen the folder again to have them judged.")
    if note := training.get("groups_note"):
        lines.append(f"Note: {note} Screen the folder with --groups to have them judged by these.")
    return [*lines, *threshold_lines(threshold)]
