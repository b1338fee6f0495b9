"""The histogram of a report: where the scores of kept and removed images lie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from flawsift.reports.pages import number

MIN_BINS, MAX_BINS = 12, 48  # fewer hide the shape, more leave single images
MIN_BAR = 2.0  # units of the drawing
TAIL_SPANS = 4  # the axis ends this many times the width of the kept side above the cut, so that both sides are seen


@dataclass(frozen=True)
class Histogram:
    """Counts of scores, drawn in a box of `WIDTH` x `HEIGHT` units.

    Attributes:
        bars: (x, y, width, height, kept, text) of each coloured bar.
        x_ticks, y_ticks: (position, text).
        cut: Position of the cut line, or None where no score parts kept from removed.
        table: (from, to, kept, removed) of each bin that is not empty.
        n_beyond: Images above the axis, counted in the last bin.
        sides: What the two colours mean; the second is empty where there is only one.
        totals: Images of each.
    """

    bars: Sequence[tuple[float, float, float, float, bool, str]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    cut: float | None
    table: Sequence[tuple[str, str, int, int]]
    n_beyond: int
    sides: tuple[str, str]
    totals: tuple[int, int]

    WIDTH: ClassVar[float] = 720.0
    HEIGHT: ClassVar[float] = 220.0

    @classmethod
    def of(
        cls,
        scores: npt.NDArray[np.float64],
        is_kept: npt.NDArray[np.bool_],
        *,
        cut: float | None = None,
        sides: tuple[str, str] = ("kept", "set aside"),
    ) -> Self:
        """From (N,) scores.

        Args:
            scores: (N,); what is not finite is left out.
            is_kept: (N,) whether each image is of the first side.
            cut: Where the line stands; None takes the score between the sides, where there is one.
            sides: What the two are called; an empty second one is not shown.
        """
        finite = np.isfinite(scores)
        scores, is_kept = scores[finite], is_kept[finite]
        cut = _cut(scores, is_kept) if cut is None else cut
        edges = _bin_edges(scores, cut)
        clipped = np.clip(scores, edges[0], edges[-1])
        counts = np.stack([np.histogram(clipped[side], edges)[0] for side in (is_kept, ~is_kept)], axis=1)  # (bins, 2)
        step = nice_step(int(counts.sum(1).max()), 5, least=1)
        y_max = step * max(1, np.ceil(counts.sum(1).max() / step))
        x_step = nice_step(edges[-1] - edges[0], 6)
        per_unit = cls.WIDTH / (edges[-1] - edges[0])
        x_values = x_step * np.arange(np.ceil(edges[0] / x_step), np.floor(edges[-1] / x_step) + 1)
        labels = [number(edge) for edge in edges]
        return cls(
            bars=list(_bars(counts, labels, cls.WIDTH / (len(edges) - 1), cls.HEIGHT / y_max, sides)),
            x_ticks=[(per_unit * (x - edges[0]), number(x)) for x in x_values],
            y_ticks=[(cls.HEIGHT * (1 - y / y_max), f"{y:,.0f}") for y in np.arange(0, y_max + step / 2, step)],
            cut=None if cut is None else per_unit * (cut - edges[0]),
            table=[(labels[b], labels[b + 1], int(k), int(r)) for b, (k, r) in enumerate(counts) if k or r],
            n_beyond=int((scores > edges[-1] + 1e-6 * (edges[1] - edges[0])).sum()),
            sides=sides,
            totals=(int(is_kept.sum()), int((~is_kept).sum())),
        )


def _bars(
    counts: npt.NDArray[np.int64], labels: Sequence[str], width: float, per_count: float, sides: tuple[str, str]
) -> Iterator[tuple[float, float, float, float, bool, str]]:
    """Kept below, removed on top of them."""
    for b, pair in enumerate(counts):
        base = Histogram.HEIGHT
        for count, is_kept in zip(pair.tolist(), (True, False), strict=True):
            if not count:
                continue
            height = max(MIN_BAR, per_count * count)  # a single image in thousands must still be seen
            base -= height
            text = f"{count:,} {sides[0] if is_kept else sides[1]}, {labels[b]} to {labels[b + 1]}"
            yield b * width, base, max(1.0, width - 1), height, is_kept, text


def _cut(scores: npt.NDArray[np.float64], is_kept: npt.NDArray[np.bool_]) -> float | None:
    """The score between kept and removed, where there is one."""
    if is_kept.all() or not is_kept.any():
        return None
    highest_kept, lowest_removed = scores[is_kept].max(), scores[~is_kept].min()
    return float((highest_kept + lowest_removed) / 2) if highest_kept <= lowest_removed else None


def _bin_edges(scores: npt.NDArray[np.float64], cut: float | None) -> npt.NDArray[np.float64]:
    """Equal bins with an edge at the cut, so that no bar is half kept; a far tail is cut off."""
    if not len(scores) or scores.min() == scores.max():
        middle = float(scores[0]) if len(scores) else 0.0
        low, high = middle - 0.5 * max(1.0, abs(middle)), middle + 0.5 * max(1.0, abs(middle))
        return np.linspace(low, high, MIN_BINS)
    low, high = float(scores.min()), float(scores.max())
    if cut is not None:  # the line is always on the axis
        low, high = min(low, cut), max(high, cut)
    pivot = max(cut if cut is not None else float(np.quantile(scores, 0.75)), low + (high - low) / 1000)
    high = min(high, pivot + TAIL_SPANS * (pivot - low))
    n_bins = int(np.clip(2 * np.sqrt(len(scores)), MIN_BINS, MAX_BINS))
    width = (high - low) / n_bins
    start = low if cut is None else cut - width * np.ceil((cut - low) / width - 1e-9)
    count = max(1, int(np.ceil((high - start) / width - 1e-9)))
    return np.linspace(start, start + count * width, count + 1)


def nice_step(span: float, n_ticks: int, *, least: float = 0.0) -> float:
    """1, 2 or 5 times a power of ten, for about `n_ticks` ticks in a span."""
    rough = max(span / n_ticks, least, 1e-12)
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9)))
