"""The scores of several days as one HTML page: a chart of quantile bands, what has shifted, and the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from flawsift.files import ensure_folder, write_json, write_text
from flawsift.metrics.shares import CONFIDENCE
from flawsift.models.drift import LEVELS, SIGNIFICANCE, Comparison, DayRow, Drift, interval_text, percent
from flawsift.paths import show
from flawsift.reports.histogram import nice_step
from flawsift.reports.pages import REPORT, number, plural, template

DATA = "drift.json"
SECTIONS = (("bands", "Scores"), ("shifts", "Shifts"), ("numbers", "Numbers"))
N_LABELS = 9  # below the chart: more would overlap
LABEL = 12  # characters of a label there; the table has all
MAX_WIDTH = 72.0  # units of a band: two or three need not fill the page


@dataclass(frozen=True)
class Band:
    """Quantiles of the scores of one file, drawn as two boxes, one in the other, and a line.

    Attributes:
        x, width: Of the boxes.
        outer, inner: (y, height) from the 5 % to the 95 %, and from the 25 % to the 75 % quantile.
        median: Its y.
        label: Below the band; "" where there is no room.
        text: All of it in words.
    """

    x: float
    width: float
    outer: tuple[float, float]
    inner: tuple[float, float]
    median: float
    label: str
    text: str


@dataclass(frozen=True)
class BandChart:
    """Bands side by side in a box of `WIDTH` x `HEIGHT` units, the training scores first.

    Attributes:
        bands: Of the training scores and of the files.
        y_ticks: (position, text).
        cut: Position of the threshold, or None.
        medians: Points of the line through the medians of the files.
    """

    bands: Sequence[Band]
    y_ticks: Sequence[tuple[float, str]]
    cut: float | None
    medians: str

    WIDTH: ClassVar[float] = 720.0
    HEIGHT: ClassVar[float] = 260.0

    @classmethod
    def of(cls, drift: Drift) -> Self:
        """Of all files of a comparison."""
        rows, cut = [drift.training, *drift.days], None if drift.threshold is None else drift.threshold.value
        values = [q for row in rows for q in row.quantiles] + ([] if cut is None else [cut])
        step = nice_step(max(values) - min(values) or max(1.0, abs(values[0])), 5)
        low, high = step * np.floor(min(values) / step), step * np.ceil(max(values) / step)
        high = high if high > low else low + step

        def y(value: float) -> float:
            return float(cls.HEIGHT * (high - value) / (high - low))

        room = cls.WIDTH / len(rows)
        every = -(-len(rows) // N_LABELS)
        bands = [_band(row, room * k, y, room=room, shows_label=k % every == 0) for k, row in enumerate(rows)]
        middles = [f"{band.x + band.width / 2:.1f},{band.median:.1f}" for band in bands[1:]]
        ticks = np.arange(round((high - low) / step) + 1) * step + low
        return cls(bands, [(y(t), number(float(t))) for t in ticks], None if cut is None else y(cut), " ".join(middles))


def _band(row: DayRow, left: float, y: Callable[[float], float], *, room: float, shows_label: bool) -> Band:
    q05, q25, q50, q75, q95 = (y(q) for q in row.quantiles)
    width = min(0.6 * room, MAX_WIDTH)
    name = row.label if len(row.label) <= LABEL else f"\u2026{row.label[1 - LABEL :]}"  # the end has the day
    low, high = number(row.quantiles[0]), number(row.quantiles[-1])
    return Band(
        x=left + (room - width) / 2,
        width=width,
        outer=(q95, q05 - q95),
        inner=(q75, q25 - q75),
        median=q50,
        label=name if shows_label else "",
        text=f"{row.label}: median {number(row.median)}, nine of ten from {low} to {high}",
    )


def write_drift_report(drift: Drift, folder: str | Path) -> Path:
    """Write `folder/report.html` and `folder/drift.json`.

    Raises:
        OutputError: They cannot be written.
    """
    folder = ensure_folder(folder)
    write_json(folder / DATA, drift.as_json())
    write_text(folder / REPORT, drift_page(drift))
    return folder / REPORT


def drift_page(drift: Drift) -> str:
    """A comparison of days as one self-contained HTML page."""
    n = sum(day.n for day in drift.days)
    return template("drift.html").render(
        title="Drift report",
        headline=drift.headline,
        explanation=f"{n:,} {plural(n, 'score')} of {len(drift.days)} {plural(len(drift.days), 'file')}, compared with "
        f"the {drift.training.n:,} held-out scores of the training images that were judged good.",
        warning=None if drift.threshold is None else drift.threshold.warning,
        next_step=_next_step(drift),
        notes=[show(note) for note in drift.notes],
        sections=SECTIONS,
        ramp="none",  # of heatmaps, which this page has none of
        chart=BandChart.of(drift),
        shifts=[(day.label, day.shift_text) for day in drift.days if day.shifts],
        levels=[f"{100 * level:.0f} %" if level != 0.5 else "Median" for level in LEVELS],
        rows=[_cells(row) for row in (drift.training, *drift.days)],
        threshold="" if drift.threshold is None else number(drift.threshold.value),
        expected="" if drift.threshold is None else f"{percent(drift.threshold.expected_rate)} %",
        confidence=f"{100 * CONFIDENCE:.0f} %",
        significance=f"{SIGNIFICANCE:g}",
        has_unreadable=any(day.n_unreadable for day in drift.days),
    )


def _next_step(drift: Drift) -> str:
    """What a person does with the result."""
    last = drift.days[-1]
    if last.shifts:
        name, rose = show(last.label), last.shifts[-1].rose
        what = "false alarms" if rose else "missed defects"
        return (
            f"look at the {'highest' if rose else 'lowest'}-scoring images of {name}, and at lamp, lens and material. "
            f"There may be more {what} than before; if the change is to stay, train again with new images."
        )
    if any(day.shifts for day in drift.days):
        return "find out what was different on the days named. The model can go on as it is."
    return "nothing has to be done. Compare again when more images have come."


def _cells(row: DayRow) -> dict[str, Any]:
    """One row of the table."""
    return {
        "label": row.label,
        "n": f"{row.n:,}",
        "unreadable": f"{row.n_unreadable:,}",
        "quantiles": [number(q) for q in row.quantiles],
        "above": "-" if row.share_above is None else f"{percent(row.share_above)} %",
        "interval": "-" if row.interval is None else interval_text(row.interval),
        "p_values": ["-" if c is None else _p_text(c) for c in (row.versus_training, row.versus_first)],
    }


def _p_text(comparison: Comparison) -> str:
    return "< 0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.2g}"
