"""The page of a threshold from labelled images: its curve is what the model would do, its points where they belong."""

import re
from dataclasses import replace

import numpy as np
import pytest

from flawsift.data.truth import GroundTruth
from flawsift.detectors.registry import make_detector
from flawsift.models.calibration import Calibration
from flawsift.models.labelled import Recalibration
from flawsift.models.model import Model
from flawsift.models.predictions import Predictions
from flawsift.models.record import LABELLED
from flawsift.reports.calibration import Curve, calibration_page
from flawsift.testing import tiny_backbone
from tests.reports.material import MARKUP, Page, words


def made(good: list[float], defective: list[float], rate: float, before: float | None = None) -> Recalibration:
    """A calibration with the scores of a test; `before` is the threshold that the model had."""
    n, m = len(good), len(defective)
    calibration = Calibration.of_labelled(good, defective)
    training = {"false_alarm_rate": rate, LABELLED: {"n_good": n, "n_defective": m}}
    model = Model(make_detector("padim"), tiny_backbone(), calibration, training)
    threshold = model.threshold()
    assert threshold is not None
    ids, names = np.arange(n + m + 1), (*(f"{i}.png" for i in range(n + m)), MARKUP)
    scores = np.array([*good, *defective, np.nan])
    predictions = Predictions(ids, names, scores, {n + m: "empty file (0 bytes)"}, threshold, calibration)
    truth = GroundTruth(ids[:-1], np.repeat([0, 1], [n, m]), ("any",) * (n + m), {})
    old = None if before is None else replace(threshold, value=before)
    return Recalibration(model, old, predictions, truth, ("a.png",), (f"A note on {MARKUP}.",))


def test_the_curve_is_what_the_model_would_do() -> None:
    generator = np.random.default_rng(0)
    result = made(generator.gumbel(8, 1, 60).tolist(), generator.gumbel(10, 2, 25).tolist(), 0.05)
    curve = Curve.of(result)
    corners = np.array(re.findall(r"([\d.]+) ([\d.]+)", curve.line), np.float64)
    assert (np.diff(corners[:, 0]) >= 0).all()
    assert (np.diff(corners[:, 1]) >= 0).all(), "downwards is less: misses fall as false alarms rise"
    assert (np.diff(corners, axis=0) == 0).any(axis=1).all(), "level or upright: between two images nothing changes"
    low, high = curve.x_ticks[0], curve.x_ticks[-1]
    top = float(curve.y_ticks[-1][1]) / 100
    assert (low, high) == ((0.0, "1"), (Curve.WIDTH, "100"))
    for rate in (1.01 / 61, 0.02, 0.05, 0.1, 0.3, 0.7, 0.98):
        threshold = result.model.threshold(rate)
        assert threshold is not None
        assert threshold.misses is not None
        x = Curve.WIDTH * np.log(rate / 0.01) / np.log(100)
        y = corners[corners[:, 0] <= x][-1, 1]  # the last corner before it: steps are level
        assert y == pytest.approx(Curve.HEIGHT * (1 - threshold.misses[0] / top), abs=0.06), rate


def test_the_axis_ends_just_above_what_is_drawn() -> None:
    good = [float(i) for i in range(1, 100)]
    few = Curve.of(made(good, [200.0 + i for i in range(100)], 0.05))
    assert few.y_ticks == [(300.0, "0"), (225.0, "5"), (150.0, "10"), (75.0, "15"), (0.0, "20")]
    many = Curve.of(made(good, [50.0] * 100, 0.05))
    assert many.y_ticks[-1] == (0.0, "100")
    for curve in (few, many):
        drawn = [float(y) for y in re.findall(r" ([\d.]+)", curve.band)]
        assert 0 <= min(drawn) <= max(drawn) <= Curve.HEIGHT


def test_points_and_rows() -> None:
    good, defective = [float(i) for i in range(1, 100)], [50.5, 95.5, 96.5, 200.0]
    result = made(good, defective, 0.05, before=60.0)
    before, now = Curve.of(result).points
    x = [Curve.WIDTH * np.log(rate / 0.01) / np.log(100) for rate in (0.4, 0.05)]
    assert [before.kind, now.kind] == ["before", "now"]
    assert [before.x, now.x] == pytest.approx(x)
    assert [before.y, now.y] == [0.75 * Curve.HEIGHT, 0.75 * Curve.HEIGHT]
    assert before.x_ends[0] < before.x < before.x_ends[1]
    assert before.y_ends[0] > before.y > before.y_ends[1]
    page = Page(calibration_page(result))
    assert "Threshold 95: of 100 good parts about 5 are stopped, of 100 defective ones 25 pass" in words(page.text[""])
    assert "Next: use the model as before; its threshold is the new one." in words(page.text[""])
    rates = words(page.text["rates"])
    assert "in force 95 5 (2" in rates
    assert "before 60 40 (32" in rates
    assert "0.5 per 100 needs 199 good images 1 per 100 99 1 (" in rates
    assert "10 per 100 90 10 (" in rates
    assert "Good 99 Defective 4 Left out, since the model was trained on them 1" in words(page.text["images"])
    assert "empty file (0 bytes)" in page.text["images"]
    assert MARKUP in page.text["images"]
    assert f"A note on {MARKUP}" in page.text[""]
    assert not {"script", "link", "img"} & {tag for tag, _ in page.elements}
    assert len([1 for tag, values in page.elements if tag == "circle"]) == 2


def test_a_threshold_that_stays_is_one_point() -> None:
    result = made([1.0, 2.0, 3.0], [2.5], 0.5, before=2.0)
    assert [point.kind for point in Curve.of(result).points] == ["now"]
    assert [point.kind for point in Curve.of(replace(result, before=None)).points] == ["now"]


def test_the_fewest_images_make_a_page() -> None:
    page = Page(calibration_page(made([1.0], [0.5], 0.01, before=9.0)))
    assert "of 100 good parts about 50 are stopped, of 100 defective ones 100 pass" in words(page.text[""])
    assert "Next: label more good images and calibrate again" in words(page.text[""])
    assert "10 per 100 needs 9 good images" in words(page.text["rates"])


def test_many_ticks_leave_room_for_their_texts() -> None:
    result = made([float(i) for i in range(3000)], [1.5, 4000.0], 0.01)
    ticks = Curve.of(result).x_ticks
    assert [text for _, text in ticks if text] == ["0.1", "1", "10", "100"]
    assert len(ticks) == 12
