"""Predictions on disk: a table, the same as JSON lines, and a heatmap over each image."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.data.listing import MAPS, MARK, TABLE, is_results, mark_results
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Prediction
from flawsift.errors import OutputError
from flawsift.files import earlier_in, ensure_folder, write_text
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.predictions import Predictions
from flawsift.paths import name_some, safe_name, show
from flawsift.reports.heatmaps import save, sheet
from flawsift.reports.overlays import Scale
from flawsift.reports.pages import REPORT, number
from flawsift.reports.regions import outlines_of_prediction
from flawsift.tables import write_csv

LINES = "predictions.jsonl"
PNG = ".png"  # of a heatmap, after the name of its image
log = logging.getLogger("flawsift")


def move_earlier_maps(folder: Path, names: Iterable[str]) -> None:
    """Move heatmaps of an earlier run, and its table, aside unless each is of one of these images: it is replaced then.

    Args:
        folder: Of the predictions.
        names: Of the images whose heatmaps will be written.

    Raises:
        OutputError: They cannot be moved, or the folder of the heatmaps has pictures that are none.
    """
    maps = folder / MAPS
    there = {path.relative_to(maps).as_posix() for path in maps.rglob("*") if path.is_file()}
    if there and not is_results(maps):
        raise OutputError(
            f"'{show(maps)}' has {len(there)} files that are no heatmaps of flawsift: {name_some(sorted(there))}. "
            "Choose another folder for the results."
        )
    if there - {safe_name(name, PNG) for name in names}:
        _move_aside([maps, *(folder / name for name in (TABLE, LINES, REPORT, MARK))], folder)


def _move_aside(paths: Iterable[Path], folder: Path) -> None:
    """Move what is there of an earlier run into a new folder `earlier-N`."""
    aside = earlier_in(folder)
    try:
        aside.mkdir()
        for path in paths:
            if os.path.lexists(path):
                path.replace(aside / path.name)
    except OSError as error:
        raise OutputError(f"Cannot write '{show(folder)}': {error.strerror or error}.") from error
    log.warning("Heatmaps and table of an earlier run on other images are now in '%s'.", show(aside))


def write_predictions(
    predictions: Predictions,
    folder: str | Path,
    truth: GroundTruth | None = None,
    *,
    heatmaps: Iterable[int] | None = None,
) -> Path:
    """Write predictions.csv: path, score, is_anomalous, p_value, error, model, and more where it is known.

    Args:
        predictions: A row each.
        folder: Of the table.
        truth: Adds label and defect_type.
        heatmaps: Ids of images whose heatmaps `OverlayWriter` writes beside it, whose path is added as `heatmap`. None
            adds no such column.
    """
    flagged, p_values = predictions.is_anomalous, predictions.p_values
    known = {} if truth is None else dict(zip(truth.ids.tolist(), truth.labels.tolist(), strict=True))
    types = {} if truth is None else dict(zip(truth.ids.tolist(), truth.defect_types, strict=True))
    header = [
        "path",
        "score",
        "is_anomalous",
        "p_value",
        "error",
        "model",
        *(["heatmap"] if heatmaps is not None else []),
        *(["label", "defect_type"] if truth is not None else []),
    ]
    drawn = set(heatmaps or ())
    rows: list[list[object]] = []
    for p, (id_, name) in enumerate(zip(predictions.ids.tolist(), predictions.names, strict=True)):
        error = predictions.errors.get(id_, "")
        score = "" if error else f"{predictions.scores[p]:.9g}"
        verdict: object = "" if error or flagged is None else int(flagged[p])
        p_value = "" if error or np.isnan(p_values[p]) else f"{p_values[p]:.6g}"
        labels = [known[id_], types[id_]] if truth is not None else []
        heatmap = f"{MAPS}/{safe_name(name, PNG)}" if id_ in drawn and not error else ""
        of_map = [heatmap] if heatmaps is not None else []
        rows.append([name, score, verdict, p_value, error, predictions.model_id, *of_map, *labels])
    path = ensure_folder(folder) / TABLE
    write_csv(path, header, rows)
    return path


def write_json_lines(predictions: Predictions, folder: str | Path, *, heatmaps: Iterable[int] | None = None) -> Path:
    """Write predictions.jsonl: the rows of `write_predictions` for programs, a JSON object a line, null where empty."""
    drawn, lines = set(heatmaps or ()), []
    for one in predictions:
        row: dict[str, object] = {
            "path": one.name,
            "score": one.score if one.error is None else None,
            "is_anomalous": one.is_anomalous,
            "p_value": one.p_value if one.error is None else None,
            "error": one.error,
            "model": predictions.model_id,
        }
        if heatmaps is not None:
            has_one = one.id in drawn and one.error is None
            row["heatmap"] = f"{MAPS}/{safe_name(one.name, PNG)}" if has_one else None
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    path = ensure_folder(folder) / LINES
    write_text(path, "".join(lines))  # what is no UTF-8 in a name is escaped as JSON escapes it
    return path


@dataclass(frozen=True, eq=False)
class OverlayWriter:
    """Writes each image beside its heatmap as predictions come: `folder/<relative path>.png`, or as `safe_name` says.

    Smoothing lowers a map's peak below the image score; the map is scaled back to it, so that colours agree with the
    score. A line surrounds the regions of the images that are called anomalous.

    Attributes:
        folder: Where overlays go, in the sub-folders of the images.
        calibration: Anchors the colours to the model, so that they mean the same on every image.
        threshold: In force, or None.
    """

    folder: Path
    calibration: Calibration
    threshold: Threshold | None

    def __call__(self, images: ImageSet, prediction: Prediction) -> None:
        scores = self.calibration.scores if len(self.calibration.scores) else prediction.scores
        cut = None if self.threshold is None else self.threshold.value
        scale = Scale.of(scores, cut)
        assert prediction.maps is not None
        if self.folder.name == MAPS and not is_results(self.folder):  # before the first of them: the table comes last
            mark_results(self.folder.parent)
        for id_, name, score, map_ in zip(images.ids, images.names, prediction.scores, prediction.maps, strict=True):
            drawn, image = scaled_map(map_, float(score)), images.image(int(id_))
            outlines = outlines_of_prediction(drawn, float(score), cut, image.size)
            text = _said(float(score), cut)
            save(self.folder / safe_name(name, PNG), sheet(image, drawn, scale, outlines, text))


def _said(score: float, cut: float | None) -> str:
    if cut is None:
        return f"score {number(score)}"
    return f"score {number(score)}, threshold {number(cut)}: {'anomalous' if score > cut else 'normal'}"


def scaled_map(map_: npt.NDArray[np.float32], score: float) -> npt.NDArray[np.float32]:
    """A smoothed map (h, w) scaled so that its peak is the image score."""
    peak = float(map_.max())
    return map_ * np.float32(score / peak) if peak > 0 else map_
