"""A threshold from labelled images as one HTML page: misses against false alarms, and what each rate would give."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from flawsift.files import ensure_folder, write_text
from flawsift.models.calibration import Threshold, n_needed, of_hundred
from flawsift.models.labelled import Recalibration
from flawsift.models.record import LABELLED
from flawsift.paths import show
from flawsift.reports.histogram import Histogram
from flawsift.reports.pages import css_ramp, flat, number, template, unreadable_files
from flawsift.types import Floats

PAGE = "calibration.html"
MAX_TICKS = 9  # that have room for a text each on a phone
RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)  # of the table
SECTIONS = (
    ("curve", "Curve"),
    ("rates", "Rates"),
    ("scores", "Scores"),
    ("images", "Images"),
    ("details", "Parameters"),
)


@dataclass(frozen=True)
class Point:
    """A threshold in the drawing: where it is, and its intervals as lines.

    Attributes:
        kind: "now" or "before".
        x, y: Its position.
        x_ends, y_ends: Ends of the intervals.
        text: What it says.
    """

    kind: str
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    text: str


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was asked for.
        cells: Threshold, false alarms and misses with their intervals; none where there are too few images.
        needs: How many good images there must be for it.
        is_now: Whether the threshold is the one in force.
    """

    name: str
    cells: tuple[str, ...] = ()
    needs: int = 0
    is_now: bool = False


@dataclass(frozen=True)
class Curve:
    """Misses against false alarms, drawn in a box of `WIDTH` x `HEIGHT` units, the latter on a logarithmic scale.

    At each rate of false alarms it shows the misses at the threshold that is set for this rate.

    Attributes:
        line, band: Paths of SVG: what is expected, and its interval.
        x_ticks, y_ticks: (position, text).
        points: Thresholds.
    """

    line: str
    band: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    points: Sequence[Point]

    WIDTH: ClassVar[float] = 720.0
    HEIGHT: ClassVar[float] = 300.0

    @classmethod
    def of(cls, result: Recalibration) -> Self:
        """From labelled images, with the threshold in force and the one before."""
        calibration = result.model.calibration
        assert calibration.misses is not None
        rates, misses = calibration.rates[::-1], calibration.misses[::-1]  # rates rise, misses fall
        ticks = _ticks(float(rates[0]))
        top = max(math.ceil(5 * float(misses.max())) / 5, 0.2)  # few misses are not squeezed into the lowest line

        def x(rate: float) -> float:
            return float(cls.WIDTH * (1 - np.log(max(rate, ticks[0])) / np.log(ticks[0])))

        def y(share: float) -> float:
            return cls.HEIGHT * (1 - share / top)

        def steps(column: int) -> list[str]:
            return [f"{x(rate):.1f} {y(share):.1f}" for rate, share in _steps(rates, misses[:, column])]

        def point(kind: str, threshold: Threshold, name: str) -> Point:
            assert threshold.misses is not None
            assert threshold.interval is not None
            (missed, *ends), rate = threshold.misses, threshold.expected_rate
            text = f"{name}: {threshold}"
            low, high = map(x, threshold.interval)
            return Point(kind, x(rate), y(missed), (low, high), (y(ends[0]), y(ends[1])), text)

        points = [point("now", result.threshold, "Threshold in force")]
        if result.before is not None and result.before.value != result.threshold.value:
            points.insert(0, point("before", result.at(result.before.value), "Before"))
        return cls(
            line="M" + " L".join(steps(0)),
            band="M" + " L".join([*steps(2), *reversed(steps(1))]) + " Z",
            x_ticks=[(x(tick), _tick_text(tick, len(ticks))) for tick in ticks],
            y_ticks=[(cls.HEIGHT * (1 - n / 4), f"{25 * top * n:g}") for n in range(5)],
            points=points,
        )


def write_calibration_page(result: Recalibration, folder: str | Path) -> Path:
    """Write `folder/calibration.html` in one step.

    Raises:
        OutputError: It cannot be written.
    """
    path = ensure_folder(folder) / PAGE
    write_text(path, calibration_page(result))
    return path


def calibration_page(result: Recalibration) -> str:
    """The page."""
    threshold, defective, names = result.threshold, result.truth.labels == 1, result.predictions.names
    name_of = dict(zip(result.predictions.ids.tolist(), names, strict=True))
    headline = _headline(threshold)
    text = f"Measured on {threshold.n_calibration:,} good and {threshold.n_defective:,} defective labelled images "
    text += (
        "that the model was not trained on. Intervals hold the true share in nine cases of ten, for images like these."
    )
    return template("calibration.html").render(
        title="Calibration report",
        headline=headline,
        explanation=text,
        next_step=_next_step(threshold),
        notes=[show(note) for note in result.notes],
        sections=SECTIONS,
        curve=Curve.of(result),
        rows=list(_rows(result)),
        histogram=Histogram.of(result.scores, ~defective, cut=threshold.value, sides=("good", "defective")),
        histogram_text=headline,
        cut_text=f"threshold {number(threshold.value)}",
        counts=[
            ("good", int((~defective).sum())),
            ("defective", int(defective.sum())),
            ("left out, since the model was trained on them", len(result.trained_on)),
        ],
        ramp=css_ramp(),
        **unreadable_files((name_of[i], reason) for i, reason in result.predictions.errors.items()),
        details=list(flat(_settings(result))),
    )


def _headline(threshold: Threshold) -> str:
    assert threshold.misses is not None
    return (
        f"Threshold {number(threshold.value)}: of 100 good parts about {of_hundred(threshold.expected_rate)} are "
        f"stopped, of 100 defective ones {of_hundred(threshold.misses[0])} pass."
    )


def _next_step(threshold: Threshold) -> str:
    """What a person does with the result."""
    if threshold.limited:
        return "label more good images and calibrate again, or allow more false alarms: see the table of rates."
    return (
        "use the model as before; its threshold is the new one. If too many defects pass, allow more false alarms: "
        "see the table of rates."
    )


def _rows(result: Recalibration) -> Iterator[Row]:
    """The threshold in force, the one before, and some rates."""
    yield Row("in force", _cells(result.threshold), is_now=True)
    if result.before is not None:
        yield Row("before", _cells(result.at(result.before.value)))
    for rate in RATES:
        threshold = result.model.threshold(rate)
        assert threshold is not None
        name = f"{100 * rate:g} per 100"
        yield Row(name, needs=n_needed(rate)) if threshold.limited else Row(name, _cells(threshold))


def _cells(threshold: Threshold) -> tuple[str, ...]:
    assert threshold.misses is not None
    assert threshold.interval is not None
    missed, *ends = threshold.misses
    alarms = _with_interval(threshold.expected_rate, threshold.interval)
    return number(threshold.value), alarms, _with_interval(missed, ends)


def _with_interval(share: float, ends: Sequence[float]) -> str:
    low, high = map(of_hundred, ends)
    return f"{of_hundred(share)} ({low} to {high})"


def _settings(result: Recalibration) -> dict[str, Any]:
    """What the page lists of the model."""
    model = result.model
    training = {key: value for key, value in model.training.items() if key != LABELLED}
    return {
        "labelled images": model.training[LABELLED],
        "threshold": vars(result.threshold),
        "before": {} if result.before is None else vars(result.before),
        "detector": {"name": model.detector.name, "params": model.detector.params()},
        "backbone": {"spec": model.backbone.spec, "weights_digest": model.backbone.weights_digest},
        "training": training,
    }


def _steps(x: Floats, y: Floats) -> list[tuple[float, float]]:
    """Corners of a function that has y[j] from x[j] on, up to 1; where y stays, there is none."""
    corners = [(float(x[0]), float(y[0]))]
    for j in np.flatnonzero(np.diff(y)) + 1:
        corners += [(float(x[j]), corners[-1][1]), (float(x[j]), float(y[j]))]
    return [*corners, (1.0, corners[-1][1])]


def _tick_text(tick: float, n_ticks: int) -> str:
    """Where there are many, only powers of ten have one."""
    text = f"{100 * tick:g}"
    return text if n_ticks <= MAX_TICKS or text.strip("0.") == "1" else ""


def _ticks(lowest: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last that does not exceed the lowest rate up to 1."""
    exponents = range(int(np.floor(np.log10(lowest))), 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if m * 10.0**e <= 1]
    first = max(j for j, tick in enumerate(ticks) if tick <= lowest * (1 + 1e-9))
    return ticks[first:]
