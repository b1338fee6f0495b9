"""The commands that use a model: predict, drift and evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.cli.lines import threshold_lines, warning_lines
from flawsift.cli.options import (
    Device,
    Images,
    ModelChoice,
    ModelFolder,
    Out,
    Rate,
    images_in,
    takes_groups,
    tested_images,
)
from flawsift.cli.output import Output
from flawsift.errors import InputError
from flawsift.progress import Stage

if TYPE_CHECKING:
    from flawsift.data.images import ImageSet
    from flawsift.detectors.base import Prediction
    from flawsift.models.predictions import ImagePrediction, Predictions
    from flawsift.progress import Progress

METRICS = "metrics.json"  # what `evaluate` measures
MAX_SHOWN = 20  # images that `predict` prints one by one where it writes no table


@takes_groups
def predict(
    model: ModelChoice,
    images: Images,
    *,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the page, the table and the heatmaps.")] = None,
    device: Device = "auto",
    false_alarm_rate: Rate = None,
    maps: Annotated[bool, typer.Option("--maps/--no-maps", help="Write heatmap overlays.")] = True,
    output: Output,
) -> None:
    """Score new images: verdicts on the screen; with --out, a page, a table and heatmap overlays in OUT/maps."""
    with output.progress() as progress:
        summary, lines = _predict(model, images, out, device, false_alarm_rate, maps, progress)
    output.say(summary, lines)


def _predict(
    model: ModelChoice,
    images: list[str],
    out: Path | None,
    device: str,
    false_alarm_rate: float | None,
    maps: bool,
    progress: "Progress",
) -> tuple[dict[str, Any], list[str]]:
    from flawsift.data.listing import MAPS
    from flawsift.reports import predictions as tables
    from flawsift.reports.prediction_page import HighestPictures, write_prediction_report

    _check_folder(out, tables.LINES)
    progress(Stage.MODEL, 0, 1)
    loaded = model.load()
    given = images_in(images, None, progress=progress)
    threshold = loaded.threshold(false_alarm_rate)
    pictures = HighestPictures(loaded.calibration, threshold)
    takers: list[Callable[[ImageSet, Prediction], None]] = [] if out is None else [pictures]
    takers += [tables.OverlayWriter(out / MAPS, loaded.calibration, threshold)] if out is not None and maps else []

    def take(piece: "ImageSet", prediction: "Prediction") -> None:
        for taker in takers:
            taker(piece, prediction)

    if out is not None:
        tables.move_earlier_maps(out, given.names if maps else [])
    result = loaded.predict(
        given,
        false_alarm_rate=false_alarm_rate,
        device=device,
        on_maps=take if takers else None,
        progress=progress,
    )
    _require_a_score(result)
    lines = predicted_lines(result, one_by_one=out is None)
    summary: dict[str, Any] = {
        "n_images": len(result),
        "n_anomalous": None if result.is_anomalous is None else int(result.is_anomalous.sum()),
        "n_unreadable": len(result.errors),
        "threshold": None if threshold is None else vars(threshold),
        "warning": None if threshold is None else threshold.warning,
        "notices": [notice.as_json() for notice in result.notices],
    }
    if out is None:
        summary["images"] = [_as_json(one) for one in result]
    else:
        progress(Stage.WRITING, 0, 1)
        drawn = result.ids.tolist() if maps else None
        table = tables.write_predictions(result, out, heatmaps=drawn)
        summary["json_lines"] = str(tables.write_json_lines(result, out, heatmaps=drawn))
        page = write_prediction_report(result, pictures, out, heatmaps=drawn or ())
        lines += [f"Table:  {table}" + (f"   Heatmaps: {out / MAPS}" if maps else ""), f"Report: {page}"]
        summary |= {"predictions": str(table), "report": str(page)}
    return summary, lines


def _require_a_score(result: "Predictions") -> None:
    if (n := len(result)) and len(result.errors) == n:
        what = "The image cannot be scored" if n == 1 else f"None of the {n} images can be scored"
        raise InputError(f"{what}. '{result.names[0]}': {result.errors[int(result.ids[0])]}.")


def _check_folder(out: Path | None, own: str) -> None:
    """Raise before any work where a result, which has a file called `own`, cannot be written."""
    from flawsift.files import ensure_folder
    from flawsift.occupied import refuse_other_results

    refuse_other_results(out, [own])
    if out is not None:
        ensure_folder(out)


def predicted_lines(result: "Predictions", *, one_by_one: bool) -> list[str]:
    """What is said about new images, the most anomalous by themselves where no table is written."""
    from flawsift.models.notices import RESERVATION
    from flawsift.paths import show

    flagged, lines = result.is_anomalous, [*warning_lines(result.threshold), *notice_lines(result)]
    readable = sorted((one for one in result if one.error is None), key=lambda one: -one.score)
    if one_by_one and readable:
        shown = readable[:MAX_SHOWN]
        width = max(len(show(one.name)) for one in shown)
        lines += [_verdict(one, width) for one in shown]
        if more := len(readable) - len(shown):
            lines.append(f"and {more} more, which score lower. Give --out for a table of all.")
    if len(result) > 1 or not one_by_one:
        n_flagged = 0 if flagged is None else int(flagged.sum())
        verb = "looks" if n_flagged == 1 else "look"
        counted = f"{n_flagged} of {len(result)} images {verb} defective." if flagged is not None else ""
        lines.append(counted or f"{len(result)} images scored.")
    lines += [] if result.images is None or result.images.value_range is None else [result.images.value_range.line]
    lines += threshold_lines(result.threshold, reservation=RESERVATION if result.notices else "")
    return lines + [f"Not readable: {show(one.name)}: {one.error}" for one in result if one.error is not None]


def notice_lines(result: "Predictions") -> list[str]:
    """How images differ from the training images, a line each."""
    return [f"Notice: {notice}" for notice in result.notices]


def _verdict(one: "ImagePrediction", width: int) -> str:
    from flawsift.paths import show

    p_value = "" if one.p_value is None else f"p-value {one.p_value:.3g}"
    return f"{show(one.name):<{width}}  score {one.score:<8.4g} {one.verdict:<9}  {p_value}".rstrip()


def _as_json(one: "ImagePrediction") -> dict[str, object]:
    known = {"score": one.score, "is_anomalous": one.is_anomalous, "p_value": one.p_value}
    return {"path": one.name, **(known if one.error is None else {"error": one.error})}


@takes_groups
def drift(
    model: ModelFolder,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Tables that `flawsift predict --out` wrote, or their folders, in order.", show_default=False
        ),
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and drift.json.")] = None,
    false_alarm_rate: Rate = None,
    output: Output,
) -> None:
    """Whether scores have shifted: the predictions of several days against training and the first day."""
    with output.progress() as progress:
        from flawsift.models import drift as drifting
        from flawsift.reports.drift import DATA, write_drift_report

        _check_folder(out, DATA)
        progress(Stage.COMPARING_DAYS, 0, 1)
        found = drifting.drift(model, files, false_alarm_rate=false_alarm_rate)
        page = None if out is None else write_drift_report(found, out)
    summary, lines = found.as_json(), str(found).splitlines()
    lines = [*warning_lines(found.threshold), *lines, *threshold_lines(found.threshold)]
    lines += [f"Note: {note}" for note in found.notes]
    if page is not None:
        summary |= {"out": str(out), "report": str(page)}
        lines.append(f"Report: {page}")
    output.say(summary, lines)


@takes_groups
def evaluate(
    model: ModelChoice,
    dataset: Annotated[
        str, typer.Argument(help="MVTec-style tree, folder with good and bad, or named set.", show_default=False)
    ],
    out: Out,
    device: Device = "auto",
    *,
    output: Output,
) -> None:
    """Measure a model on labelled images: OUT/metrics.json and OUT/predictions.csv."""
    with output.progress() as progress:
        from flawsift import datasets
        from flawsift.files import write_json
        from flawsift.reports.evaluation import headline, write_evaluation_report
        from flawsift.reports.predictions import move_earlier_maps, write_predictions

        _check_folder(out, METRICS)
        progress(Stage.MODEL, 0, 1)
        loaded = model.load()
        progress(Stage.FINDING, 0, 1)
        data = datasets.load(dataset)
        images = tested_images(data)
        move_earlier_maps(out, [])
        result, predictions = loaded.evaluate(images, data.truth, device=device, progress=progress)
        progress(Stage.WRITING, 0, 1)
        write_predictions(predictions, out, data.truth)
        write_json(out / METRICS, result)
        page = write_evaluation_report(loaded, result, predictions, images, data.truth, out, device=device)
    width = max(map(len, result))
    lines = [*warning_lines(predictions.threshold), *notice_lines(predictions), headline(result)]
    lines += [f"{key:<{width}}  {'-' if value is None else f'{value:.4g}'}" for key, value in result.items()]
    if n := result["n_trained_on"]:
        lines.append(f"Note: the model was trained on {n} of these {len(images)} images. On new ones it is worse.")
    lines += [f"Written: {out / METRICS}", f"Report:  {page}"]
    notices = [notice.as_json() for notice in predictions.notices]
    output.say({**result, "notices": notices, "out": str(out), "report": str(page)}, lines)
