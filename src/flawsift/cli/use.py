"""The commands that use a model: predict and evaluate."""

from typing import Annotated

import typer

from flawsift.cli.options import (
    AsJson,
    Device,
    Images,
    ModelFolder,
    Out,
    Rate,
    Runtime,
    RuntimeOption,
    Weights,
    images_in,
    say,
    shown_progress,
    tested_images,
    threshold_lines,
)


def predict(
    model: ModelFolder,
    images: Images,
    out: Out,
    weights: Weights = None,
    runtime: RuntimeOption = Runtime.auto,
    device: Device = "auto",
    false_alarm_rate: Rate = None,
    maps: Annotated[bool, typer.Option("--maps/--no-maps", help="Write heatmap overlays.")] = True,
    as_json: AsJson = False,
) -> None:
    """Score new images: predictions.csv, and heatmap overlays in OUT/maps."""
    from flawsift.files import ensure_folder
    from flawsift.models import model as models
    from flawsift.paths import show
    from flawsift.reports.predictions import OverlayWriter, write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    found = images_in(images, None)
    writer = OverlayWriter(out / "maps", loaded.calibration, loaded.threshold(false_alarm_rate)) if maps else None
    with shown_progress() as progress:
        result = models.predict(
            loaded, found, false_alarm_rate=false_alarm_rate, device=device, on_maps=writer, progress=progress
        )
    table = write_predictions(result, out)
    flagged = result.is_anomalous
    total = len(result.ids)
    lines = [f"{total} images scored." if flagged is None else f"{int(flagged.sum())} of {total} images are anomalous."]
    lines += threshold_lines(result.threshold)
    lines += [
        f"Not readable: {show(result.names[p])}: {r}" for p, r in enumerate(map(result.errors.get, result.ids)) if r
    ]
    lines.append(f"Table: {table}" + (f"   Heatmaps: {out / 'maps'}" if maps else ""))
    summary = {
        "n_images": total,
        "n_anomalous": None if flagged is None else int(flagged.sum()),
        "n_unreadable": len(result.errors),
        "threshold": None if result.threshold is None else vars(result.threshold),
        "predictions": str(table),
    }
    say(as_json, summary, lines)


def evaluate(
    model: ModelFolder,
    dataset: Annotated[str, typer.Argument(help="MVTec-style tree, or a named data set.", show_default=False)],
    out: Out,
    weights: Weights = None,
    runtime: RuntimeOption = Runtime.auto,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled images: OUT/metrics.json and OUT/predictions.csv."""
    from flawsift import datasets
    from flawsift.files import ensure_folder, write_json
    from flawsift.models import model as models
    from flawsift.reports.evaluation import write_evaluation_report
    from flawsift.reports.predictions import write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    data = datasets.load(dataset)
    images = tested_images(data)
    with shown_progress() as progress:
        result, predictions = models.evaluate(loaded, images, data.truth, device=device, progress=progress)
    write_predictions(predictions, out, data.truth)
    write_json(out / "metrics.json", result)
    page = write_evaluation_report(loaded, result, predictions, images, data.truth, out, device=device)
    width = max(map(len, result))
    lines = [f"{key:<{width}}  {'-' if value is None else f'{value:.4g}'}" for key, value in result.items()]
    lines += [f"Written: {out / 'metrics.json'}", f"Report:  {page}"]
    say(as_json, {**result, "out": str(out), "report": str(page)}, lines)
