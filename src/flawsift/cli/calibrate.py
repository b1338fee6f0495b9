"""The command that sets a model's threshold from labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.cli.options import (
    Device,
    ModelChoice,
    Rate,
    takes_groups,
    tested_images,
)
from flawsift.cli.output import Output
from flawsift.errors import InputError
from flawsift.progress import Stage

if TYPE_CHECKING:
    from flawsift.data.images import ImageSet
    from flawsift.data.truth import GroundTruth
    from flawsift.models.labelled import Recalibration

Labelled = Annotated[
    str,
    typer.Argument(
        help="Folder with good/ (or ok/) and folders of defects, MVTec-style tree, named data set, or, with --images, "
        "CSV with columns path, decision: keep or remove.",
        show_default=False,
    ),
]
Reviewed = Annotated[Path | None, typer.Option("--images", help="Folder that the paths of a CSV are relative to.")]
Misses = Annotated[
    float | None, typer.Option("--misses", help="Share of defects that may be missed, instead of a false-alarm rate.")
]
ModelOut = Annotated[
    Path | None, typer.Option("--out", help="Folder for a copy of the model. [the model itself is updated]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the threshold would be, and write nothing.")]


@takes_groups
# long: a command's options are its parameters
def calibrate(
    model: ModelChoice,
    labelled: Labelled,
    *,
    images: Reviewed = None,
    false_alarm_rate: Rate = None,
    misses: Misses = None,
    out: ModelOut = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    output: Output,
) -> None:
    """Set a model's threshold from labelled images, and show misses against false alarms: calibration.html."""
    with output.progress() as progress:
        from flawsift.files import ensure_folder
        from flawsift.models.labelled import recalibrate
        from flawsift.models.model import FILES
        from flawsift.occupied import refuse_other_results
        from flawsift.reports.calibration import write_calibration_page

        progress(Stage.MODEL, 0, 1)
        loaded = model.load()
        folder = model.model if out is None else out
        if not dry_run:
            refuse_other_results(out, FILES)
            ensure_folder(folder)
        progress(Stage.FINDING, 0, 1)
        given, truth = labelled_images(labelled, images)
        progress(Stage.READING, 0, 1)
        result = recalibrate(
            loaded, given, truth, false_alarm_rate=false_alarm_rate, misses=misses, device=device, progress=progress
        )
        page = None
        if not dry_run:
            progress(Stage.WRITING, 0, 1)
            in_place = out is None or out.resolve() == model.model.resolve()
            (result.model.save_threshold if in_place else result.model.save)(folder)
            page = write_calibration_page(result, folder)
    lines = calibrated_lines(result)
    lines.append("Nothing was written." if page is None else f"Model: {folder}   Page: {page}")
    written = {"out": None if page is None else str(folder), "report": None if page is None else str(page)}
    output.say({**_as_json(result), **written}, lines)


def labelled_images(labelled: str, images: Path | None) -> tuple["ImageSet", "GroundTruth"]:
    """Images and what is known of them, of LABELLED and --images."""
    from flawsift import datasets
    from flawsift.data.images import ImageSet
    from flawsift.models.labelled import reviewed_truth
    from flawsift.screening.decisions import read_decisions

    path = Path(labelled)
    if path.is_file() or path.suffix.lower() == ".csv":
        choices = read_decisions(path)
        if images is None:
            raise InputError(f"Where are the images of '{path}'? Name the folder of its paths: --images FOLDER.")
        found = ImageSet.from_folder(images)
        return found, reviewed_truth(found, choices)
    if images is not None:
        raise InputError(f"--images goes with a CSV of decisions, and '{path}' is none.")
    data = datasets.load(labelled)
    if not len(data.truth):
        raise InputError(
            f"'{path}' does not say which images are good. Sort them into good/ and folders of defects, such as bad/, "
            "or give a CSV with the columns path, decision (keep or remove), and --images."
        )
    return tested_images(data), data.truth


def calibrated_lines(result: "Recalibration") -> list[str]:
    """What is said about a threshold from labelled images."""
    lines = [f"{result.threshold}.".replace("threshold", "Threshold", 1)]
    if result.before is not None:
        value, defective = result.before.value, result.truth.labels == 1
        good, bad = result.scores[~defective], result.scores[defective]
        lines.append(
            f"Before: threshold {value:.4g}, which stops {int((good > value).sum()):,} of these {len(good):,} good "
            f"images and misses {int((bad <= value).sum()):,} of the {len(bad):,} defective ones."
        )
    return lines + [f"Note: {note}" for note in result.notes]


def _as_json(result: "Recalibration") -> dict[str, Any]:
    before = result.before
    return {
        "threshold": vars(result.threshold),
        "before": None if before is None else vars(before),
        "before_measured": None if before is None else vars(result.at(before.value)),
        "n_good": result.model.calibration.n_good,
        "n_defective": result.model.calibration.n_defective,
        "n_trained_on": len(result.trained_on),
        "n_unreadable": len(result.predictions.errors),
        "notes": list(result.notes),
    }
