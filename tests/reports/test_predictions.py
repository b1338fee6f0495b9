"""The table of predictions, and heatmaps that are scaled to the image score."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.data.joins import read_table
from flawsift.data.listing import MAPS
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Prediction
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.predictions import Predictions
from flawsift.reports.predictions import OverlayWriter, move_earlier_maps, scaled_map, write_predictions

CUT = Threshold(2.0, 0.01, 0.01, 99)


@pytest.mark.parametrize("threshold", [CUT, None])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_table_has_a_row_for_each_image(tmp_path: Path, threshold: Threshold | None, labelled: bool) -> None:
    names = ("a.png", "b.png", "empty.png")
    scores = np.array([2.0, 2.5, np.nan])
    predictions = Predictions(np.array([7, 3, 5]), names, scores, {5: "empty file"}, threshold)
    truth = GroundTruth(np.array([3, 5, 7]), np.array([1, 1, 0], np.int8), ("hole", "scratch", "good"), {})
    path = write_predictions(predictions, tmp_path, truth if labelled else None)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(names)
    assert [row["score"] for row in rows] == ["2", "2.5", ""]
    assert [row["is_anomalous"] for row in rows] == (["", "", ""] if threshold is None else ["0", "1", ""])
    assert [row["error"] for row in rows] == ["", "", "empty file"]
    if labelled:
        assert [(row["label"], row["defect_type"]) for row in rows] == [("0", "good"), ("1", "hole"), ("1", "scratch")]
    else:
        assert "label" not in rows[0]


def test_a_scaled_map_peaks_at_the_score() -> None:
    values = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)
    np.testing.assert_allclose(scaled_map(values, 6.0), 1.5 * values)
    for peak in (0.0, -3.0):  # nothing to scale by
        low = np.full((2, 2), peak, np.float32)
        assert (scaled_map(low, 6.0) == low).all()


@pytest.mark.parametrize(("score", "outlined"), [(1.9, False), (2.1, True)])
def test_an_outline_is_drawn_exactly_on_images_that_are_called_anomalous(
    tmp_path: Path, score: float, outlined: bool
) -> None:
    images = ImageSet.from_arrays([np.full((64, 64, 3), 128, np.uint8)])
    values = np.zeros((1, 64, 64), np.float32)
    values[0, 20:40, 20:40] = 5.0  # of a map that smoothing, or a rule for image scores, has moved off the score
    writer = OverlayWriter(tmp_path, Calibration.of([0.5, 1.0, 1.5]), CUT)
    writer(images, Prediction(images.ids, np.array([score], np.float32), values))
    (path,) = tmp_path.rglob("*.png")
    with Image.open(path) as picture:
        assert picture.size[1] > 64, "a line of text below"
        whole = np.asarray(picture)[:64]
    assert (whole[:, :64] == 128).all(), "the original"
    assert (whole[:, 64:] == 255).all(2).any() == outlined, "the heatmap beside it"


def test_the_table_tells_where_a_heatmap_is(tmp_path: Path) -> None:
    names = ["x" * 253, "NUL.png", "=a.png", "b.png", "broken.png"]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name, "PNG")
    images = ImageSet.from_files(tmp_path / "in", dict(enumerate(names)))
    scores = np.arange(5, dtype=np.float64)
    writer = OverlayWriter(tmp_path / MAPS, Calibration.of([0.5, 1.0, 1.5]), CUT)
    drawn = images.select(range(3))
    writer(drawn, Prediction(drawn.ids, scores[:3].astype(np.float32), np.ones((3, 8, 8), np.float32)))
    predictions = Predictions(images.ids, tuple(names), scores, {4: "damaged"}, CUT)
    rows = read_table(write_predictions(predictions, tmp_path, heatmaps=[0, 1, 2, 4]), "Table", [("heatmap",)])
    assert [row["path"] for row in rows] == names
    written = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / MAPS).rglob("*.png")}
    assert {row["heatmap"] for row in rows[:3]} == written
    assert [row["heatmap"] for row in rows[2:]] == ["maps/=a.png.png", "", ""]
    assert "heatmap" not in read_table(write_predictions(predictions, tmp_path), "Table", [("path",)])[0]
    before = sorted(tmp_path.rglob("*"))
    move_earlier_maps(tmp_path, drawn.names)
    assert sorted(tmp_path.rglob("*")) == before, "the same run again replaces them"
