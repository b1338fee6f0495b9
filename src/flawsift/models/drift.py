"""Whether scores stay what they were: the predictions of several days against the training scores and each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from flawsift.data.joins import read_table
from flawsift.errors import InputError
from flawsift.metrics.shares import CONFIDENCE, share_interval
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.record import load_calibration
from flawsift.paths import name_some, show
from flawsift.types import Floats

PREDICTIONS = "predictions.csv"  # what `flawsift predict --out` writes
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles that are told
TRAINING = "training"  # its scores are those of the images judged good
LEAST_CHANGE = 0.001  # of a median, below which no figure is told
SIGNIFICANCE = 0.05  # a difference at most this likely, for all comparisons together, is not explained by chance


@dataclass(frozen=True, eq=False)
class DayScores:
    """Scores of one file.

    Attributes:
        label: What it is called: its name, or its folder's.
        scores: (n,) of the readable images.
        n_unreadable: Images without a score.
    """

    label: str
    scores: Floats
    n_unreadable: int = 0


@dataclass(frozen=True)
class Comparison:
    """How scores lie to those of earlier images, by the Mann-Whitney test.

    Attributes:
        to: What they are compared with: `TRAINING`, or the label of the first file.
        p_value: Probability of a difference so large by chance, times the number of comparisons; at most 1.
        superiority: Chance that a score of these is higher than one of those, ties counted half.
        change: Of the median, as a share of the earlier one; None where one of them is not positive.
    """

    to: str
    p_value: float
    superiority: float
    change: float | None

    @property
    def is_shift(self) -> bool:
        """Whether chance does not explain the difference."""
        return self.p_value <= SIGNIFICANCE

    @property
    def rose(self) -> bool:
        """Whether these are the higher ones."""
        return self.superiority > 0.5

    def __str__(self) -> str:
        if not self.is_shift:
            return f"no shift since {self.to} that chance does not explain"
        rose = self.superiority > 0.5
        moved = self.change is not None and (self.change > 0) == rose and abs(self.change) >= LEAST_CHANGE
        by = f" by {100 * abs(self.change or 0):.2g} %" if moved else ""
        return f"{'rose' if rose else 'fell'}{by} since {self.to}"


@dataclass(frozen=True)
class DayRow:
    """What is said of one file, or of the training scores.

    Attributes:
        label: Its name.
        n: Images with a score.
        n_unreadable: Images without one.
        quantiles: Scores at `LEVELS`.
        n_above: Images above the threshold; None without a threshold.
        share_above: Their share of n; None likewise.
        interval: Clopper-Pearson interval of that share at `CONFIDENCE`; None likewise.
        versus_training: Compared with the training scores; None for these.
        versus_first: Compared with the first file; None for that and for the training scores.
    """

    label: str
    n: int
    n_unreadable: int
    quantiles: tuple[float, ...]
    n_above: int | None
    share_above: float | None
    interval: tuple[float, float] | None
    versus_training: Comparison | None = None
    versus_first: Comparison | None = None

    @property
    def median(self) -> float:
        """The median score."""
        return self.quantiles[LEVELS.index(0.5)]

    @property
    def shifts(self) -> list[Comparison]:
        """The comparisons whose difference chance does not explain."""
        return [c for c in (self.versus_training, self.versus_first) if c is not None and c.is_shift]

    @property
    def shift_text(self) -> str:
        """The shifts in words; empty without any."""
        texts = [str(shift) for shift in self.shifts]
        if len(texts) == 2 and self.shifts[0].rose == self.shifts[1].rose:
            texts[1] = texts[1].partition(" ")[2]  # the verb is said once
        return " and ".join(texts)


@dataclass(frozen=True)
class Drift:
    """Scores of several files against the training scores and the first file.

    Attributes:
        training: The held-out scores that the threshold comes from: those of images judged good.
        days: The files, in the order given.
        threshold: That shares are counted above, or None.
        notes: What a reader should know besides.
    """

    training: DayRow
    days: tuple[DayRow, ...]
    threshold: Threshold | None
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The result in a sentence."""
        last = self.days[-1]
        if not any(day.shifts for day in self.days):
            many = "the file" if len(self.days) == 1 else f"all {len(self.days)} files"
            return f"The scores of {many} are like those of {TRAINING}, as far as chance can tell."
        if last.shifts:
            return f"{last.label}: scores {last.shift_text}; not explained by chance."
        shifted = [day.label for day in self.days if day.shifts]
        return f"Scores had shifted in {name_some(shifted)}. Those of {last.label}, the last file, have not."

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        days = [{**asdict(day), "shifts": [str(one) for one in day.shifts]} for day in self.days]
        known = {"levels": LEVELS, "confidence": CONFIDENCE, "significance": SIGNIFICANCE, "headline": self.headline}
        threshold = None if self.threshold is None else vars(self.threshold)
        return {**known, "threshold": threshold, "training": asdict(self.training), "files": days, "notes": self.notes}

    def __str__(self) -> str:
        return "\n".join([self.headline, *_lines((self.training, *self.days))])


def drift(model: str | Path, files: Sequence[str | Path], *, false_alarm_rate: float | None = None) -> Drift:
    """Compare the scores of several days with the training scores of a model, and with those of the first day.

    The training scores are those of images judged good: a day with as many defects as the training set had lies
    somewhat above them, and like the first day. Each file is compared with the held-out training scores and with the
    first file by the Mann-Whitney test, which few defects do not move; p-values are multiplied by the number of
    comparisons (Bonferroni). Held-out scores of a model that was calibrated by halves lie somewhat above those of new
    images.

    Args:
        model: The folder of the model that scored the images. Only its scores are read.
        files: What `flawsift predict --out` wrote, or the folders of it, in order.
        false_alarm_rate: For the threshold; None takes the model's.

    Raises:
        ModelError: The model folder is missing or damaged.
        InputError: The model has no training scores, or a file is no such table, is there twice, has no score, or is of
            another model.
        ParameterError: The rate is not in (0, 1).
    """
    calibration, rate, model_id = load_calibration(model)
    threshold = calibration.threshold(rate if false_alarm_rate is None else false_alarm_rate)
    if threshold is None:
        raise InputError(
            f"The model '{show(model)}' has no training scores to compare with: it is of one image or group."
        )
    days, notes = read_days(files, calibration, model_id)
    return replace(compare_days(calibration, threshold, days), notes=tuple(notes))


def compare_days(calibration: Calibration, threshold: Threshold | None, days: Sequence[DayScores]) -> Drift:
    """`drift` of scores in memory.

    Args:
        calibration: Of the model.
        threshold: That shares are counted above, or None.
        days: In order; one at least.
    """
    n_comparisons = 2 * len(days) - 1
    training, first = DayScores(TRAINING, calibration.scores), days[0]
    rows = [
        _row(
            day,
            threshold,
            versus_training=_compare(day, training, n_comparisons),
            versus_first=None if k == 0 else _compare(day, first, n_comparisons),
        )
        for k, day in enumerate(days)
    ]
    return Drift(_row(training, threshold), tuple(rows), threshold)


def read_days(
    files: Sequence[str | Path], calibration: Calibration, model_id: str
) -> tuple[list[DayScores], list[str]]:
    """The scores of some tables of predictions, labelled by their names or folders, and notes on them.

    Args:
        files: Tables, or folders that hold predictions.csv.
        calibration: Of the model that made them: p-values of a table that names no model must be those of its scores.
        model_id: Of that model, which must be the one that a table names.

    Raises:
        InputError: There is none, or one is no such table, is there twice, has no score, or is of another model.
    """
    if not files:
        raise InputError("There is no table of predictions. Give what `flawsift predict --out` wrote.")
    paths = [Path(file) / PREDICTIONS if Path(file).is_dir() else Path(file) for file in files]
    real = [path.resolve() for path in paths]
    if twice := [str(path) for k, path in enumerate(paths) if real[k] in real[:k]]:
        which = "1 file comes" if len(twice) == 1 else f"{len(twice)} files come"
        raise InputError(f"{which} more than once: {name_some(twice)}. Give each once.")
    days, unnamed = [], []
    for path, label in zip(paths, labels_of(real), strict=True):
        scores, n_unreadable, named = _read(path, calibration, model_id)
        days.append(DayScores(label, scores, n_unreadable))
        unnamed += [] if named else [label]
    if not unnamed:
        return days, []
    one = len(unnamed) == 1
    return days, [f"{name_some(unnamed)} {'does' if one else 'do'} not say which model made {'it' if one else 'them'}."]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name of each of some different absolute paths: that of its folder or file, and as many folders above as
    tell it from others."""
    parts = [path.parent.parts if path.name == PREDICTIONS else (*path.parent.parts, path.stem) for path in paths]
    lengths = [1] * len(paths)
    while True:
        labels = [show("/".join(names[-length:])) for names, length in zip(parts, lengths, strict=True)]
        longer = [
            labels.count(label) > 1 and length < len(names)
            for label, length, names in zip(labels, lengths, parts, strict=True)
        ]
        if not any(longer):
            break
        lengths = [length + more for length, more in zip(lengths, longer, strict=True)]
    return [show(path) if labels.count(label) > 1 else label for path, label in zip(paths, labels, strict=True)]


def _read(path: Path, calibration: Calibration, model_id: str) -> tuple[Floats, int, bool]:
    """(n,) scores of one table, how many images have none, and whether it names the model."""
    where = f"Table of predictions '{show(path)}'"
    rows = read_table(path, "Table of predictions", [("score",)])
    if not rows:
        raise InputError(f"{where} holds no row. Give what `flawsift predict --out` wrote.")
    scored = [(line, row) for line, row in enumerate(rows, 2) if row["score"].strip()]
    scores = np.array([_number(row, "score", line, where) for line, row in scored])
    if not scored:
        raise InputError(f"{where} has no score: none of its {len(rows)} images could be read. Leave it out.")
    models = {row.get("model", "").strip() for _, row in scored} - {""}
    if others := sorted(models - {model_id}):
        raise InputError(
            f"{where} is of another model, {show(others[0])}; this one is {model_id}. Scores of different models "
            "cannot be compared."
        )
    if not models and "p_value" in rows[0]:
        _check_model(scored, scores, calibration, where)
    return scores, len(rows) - len(scored), bool(models)


def _number(row: Mapping[str, str], column: str, line: int, where: str) -> float:
    text = row[column].strip()
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{where} has no number in row {line}, column '{column}': '{show(text)}'.")
    return value


def _check_model(
    scored: Sequence[tuple[int, Mapping[str, str]]], scores: Floats, calibration: Calibration, where: str
) -> None:
    """Refuse a table of another model: a p-value says how many of the model's own scores reach a score."""
    given = np.array([_number(row, "p_value", line, where) if row["p_value"] else np.nan for line, row in scored])
    expected = calibration.p_values(scores)
    # scores are written to nine digits: one that equals a training score may have moved past it
    other = np.abs(given - expected) * (len(calibration.scores) + 1) > 1.5
    if other.any():
        line = scored[int(other.argmax())][0]
        raise InputError(
            f"{where} is of another model: in row {line} the p-value is {given[other][0]:.4g}, by this model "
            f"{expected[other][0]:.4g}. Scores of different models cannot be compared."
        )


def _row(
    day: DayScores,
    threshold: Threshold | None,
    *,
    versus_training: Comparison | None = None,
    versus_first: Comparison | None = None,
) -> DayRow:
    n = len(day.scores)
    n_above = None if threshold is None else int((day.scores > threshold.value).sum())
    return DayRow(
        label=day.label,
        n=n,
        n_unreadable=day.n_unreadable,
        quantiles=tuple(float(q) for q in np.quantile(day.scores, LEVELS)),
        n_above=n_above,
        share_above=None if n_above is None else n_above / n,
        interval=None if n_above is None else _ends(n_above, n),
        versus_training=versus_training,
        versus_first=versus_first,
    )


def _ends(count: int, n: int) -> tuple[float, float]:
    low, high = share_interval(count, n)
    return float(low), float(high)


def _compare(day: DayScores, earlier: DayScores, n_comparisons: int) -> Comparison:
    found = stats.mannwhitneyu(day.scores, earlier.scores)
    before, now = float(np.median(earlier.scores)), float(np.median(day.scores))
    return Comparison(
        to=earlier.label,
        p_value=min(1.0, float(found.pvalue) * n_comparisons),
        superiority=float(found.statistic) / (len(day.scores) * len(earlier.scores)),
        change=now / before - 1 if min(before, now) > 0 else None,
    )


def _lines(rows: Sequence[DayRow]) -> Iterator[str]:
    """A table for a terminal."""
    width = max(len(row.label) for row in rows)
    yield f"{'':<{width}}  {'scores':>7}  {'5 %':>8}  {'median':>8}  {'95 %':>8}  above the threshold"
    for row in rows:
        low, median, high = (f"{q:>8.4g}" for q in (row.quantiles[0], row.median, row.quantiles[-1]))
        text = f"{row.label:<{width}}  {row.n:>7,}  {low}  {median}  {high}"
        if row.share_above is not None and row.interval is not None:
            text += f"  {percent(row.share_above)} % ({interval_text(row.interval)})"
        text += f"; {row.n_unreadable:,} unreadable" if row.n_unreadable else ""
        text += "; of the images judged good" if row.versus_training is None else ""
        yield text + (f"; {row.shift_text}" if row.shifts else "")


def interval_text(interval: tuple[float, float]) -> str:
    """An interval of shares in per cent."""
    return f"{percent(interval[0])} to {percent(interval[1])} %"


def percent(share: float) -> str:
    """A share in per cent, to three digits at most and to a tenth at least."""
    return f"{100 * share:.3g}" if share >= 0.1 else f"{100 * share:.1f}"
