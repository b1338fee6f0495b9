"""The page about scores of several days: its chart, its words and its numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flawsift.models.calibration import Calibration
from flawsift.models.drift import DayScores, Drift, compare_days
from flawsift.reports.drift import N_LABELS, BandChart, drift_page, write_drift_report
from tests.reports.material import Page, words

CALIBRATION = Calibration.of(np.random.default_rng(0).normal(20, 1.5, 150))


def made(n_days: int, growth: float = 0.0, label: str = "day {}") -> Drift:
    generator = np.random.default_rng(1)
    days = [
        DayScores(label.format(k), generator.normal(20, 1.5, 60) * (1 + growth * k), n_unreadable=k % 2)
        for k in range(n_days)
    ]
    return compare_days(CALIBRATION, CALIBRATION.threshold(0.05), days)


@pytest.mark.parametrize("n_days", [1, 2, 7, 40])
def test_the_chart_is_to_scale(n_days: int) -> None:
    drift = made(n_days, 0.01)
    chart = BandChart.of(drift)
    rows = [drift.training, *drift.days]
    assert len(chart.bands) == len(rows)
    assert sum(bool(band.label) for band in chart.bands) <= N_LABELS
    assert chart.bands[0].label == "training"
    (y_high, high), (y_low, low) = chart.y_ticks[-1], chart.y_ticks[0]
    assert (y_high, y_low) == (0, chart.HEIGHT)

    def value(y: float) -> float:
        return float(low) + (chart.HEIGHT - y) / chart.HEIGHT * (float(high) - float(low))

    end = 0.0
    for band, row in zip(chart.bands, rows, strict=True):
        assert band.x >= end
        end = band.x + band.width
        drawn = [
            band.outer[0] + band.outer[1],
            band.inner[0] + band.inner[1],
            band.median,
            band.inner[0],
            band.outer[0],
        ]
        np.testing.assert_allclose([value(y) for y in drawn], row.quantiles, rtol=1e-6)
    assert end <= chart.WIDTH
    assert chart.cut is not None
    assert drift.threshold is not None
    assert value(chart.cut) == pytest.approx(drift.threshold.value)
    assert len(chart.medians.split()) == n_days


def test_scores_that_are_all_one_have_a_chart() -> None:
    for constant in (0.0, 5.0, -2.0):
        scores = np.full(9, constant)
        drift = compare_days(Calibration.of(scores), None, [DayScores("a", scores)])
        chart = BandChart.of(drift)
        assert all(0 <= band.median <= chart.HEIGHT for band in chart.bands)
        assert chart.cut is None
        assert "above the threshold" not in Page(drift_page(drift)).text["numbers"]


def test_the_page_says_what_has_shifted(tmp_path: Path) -> None:
    drift = made(4, 0.06, label="<b>{}</b>")
    page = write_drift_report(drift, tmp_path)
    text = page.read_text("utf-8")
    assert "<b>" not in text, "names are escaped"
    read = Page(text)
    assert words(drift.headline) in words(read.text[""])
    assert f": scores {drift.days[3].shift_text}." in words(read.text["shifts"])
    numbers = read.text["numbers"]
    for row in (drift.training, *drift.days):
        assert f"{row.n:,}" in numbers
        assert f"{row.median:.4g}" in numbers
    assert "Unreadable" in numbers
    assert json.loads((tmp_path / "drift.json").read_text("utf-8")) == json.loads(json.dumps(drift.as_json()))
    assert not any(tag in ("script", "link", "img") for tag, _ in read.elements)
    assert words("Next: look at the highest-scoring images of <b>3</b>") in words(read.text[""])
    calm = Page(drift_page(made(1))).text
    assert "No file differs from the training scores" in words(calm["shifts"])
    assert "Next: nothing has to be done." in words(calm[""])


def test_the_page_says_what_the_command_says_before_its_numbers() -> None:
    drift = made(1, 0.01)
    assert drift.threshold is not None
    doubtful = replace(drift, threshold=replace(drift.threshold, n_suspects=3), notes=("a file was written before",))
    top = words(Page(drift_page(doubtful)).text[""])
    assert "Warning. At least 3 images look defective" in top
    assert "Note. a file was written before" in top
