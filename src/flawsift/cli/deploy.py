"""The commands that bring a model to a production line."""

import statistics
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.cli.options import AsJson, ModelChoice, say, takes_groups, threshold_lines, warning_lines

if TYPE_CHECKING:
    from flawsift.models.model import Model

MAX_CHECKED = 200  # pictures that an export is compared on: a minute


class ExportFormat(StrEnum):
    """As `flawsift.deploy.export.Format`."""

    onnx = "onnx"
    openvino = "openvino"


@takes_groups
def export_model(
    model: ModelChoice,
    out: Annotated[Path, typer.Option("--out", help="Folder for the file; an earlier export in it is replaced.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="Format of the file.")] = ExportFormat.onnx,
    check: Annotated[
        str | None, typer.Option("--check", help=f"Compare on images of this folder too, on {MAX_CHECKED} at most.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as one file for a machine without torch: from pixels to score, p-value, verdict and map."""
    from flawsift.deploy import export

    loaded = model.load()
    path = export.export_model(loaded, out, to.value)
    compared = export.read_card(path)["parity"]
    n_bytes = sum(part.stat().st_size for part in path.parent.iterdir())
    lines = [
        f"Exported {loaded.detector.name}: {path} ({n_bytes / 1e6:.1f} MB)",
        f"Scores are those of the model, within {_percent(compared)}, on {compared['n_images']} made-up pictures.",
    ]
    summary: dict[str, Any] = {"file": str(path), "bytes": n_bytes, "parity": compared}
    if check is not None:
        summary["check"] = found = _checked(loaded, path, check)
        lines.append(
            f"On {found['n_images']} images of '{check}': within {_percent(found)}, {found['n_other_verdicts']} other "
            f"verdicts; {found['ms_median']:.0f} ms a picture (99 of 100 within {found['ms_p99']:.0f})."
        )
    threshold = loaded.threshold()
    summary["threshold"] = None if threshold is None else vars(threshold)
    lines += threshold_lines(threshold)
    lines = [*warning_lines(threshold), *lines]
    lines.append(f'Run it: flawsift.runtime.Inspector("{path}")(image)')
    say(as_json, summary, lines)


def _percent(parity: dict[str, Any]) -> str:
    return f"{100 * parity['largest_difference']:.2g} %"


def _checked(model: "Model", path: Path, folder: str) -> dict[str, Any]:
    """Parity on the images of a folder, and how long one takes from its pixels to its verdict."""
    import numpy as np

    from flawsift.data.decoding import UnreadableImage
    from flawsift.data.inputs import as_images
    from flawsift.deploy.export import parity
    from flawsift.runtime import Inspector

    images, pictures = as_images(folder), []
    for id_ in images.ids.tolist():
        try:
            pictures.append(np.asarray(images.image(id_), np.uint8))
        except UnreadableImage:
            continue  # it has no score either way
        if len(pictures) == MAX_CHECKED:
            break
    inspector, taken = Inspector(path), []
    for picture in pictures:
        started = time.perf_counter()
        inspector(picture)
        taken.append(1000 * (time.perf_counter() - started))
    found = parity(model, path, iter(pictures))
    return {**found, "ms_median": statistics.median(taken), "ms_p99": float(np.quantile(taken, 0.99))}
