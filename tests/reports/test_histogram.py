"""The histogram of a report: every image is in a bar, and no bar crosses the cut."""

import numpy as np
import pytest

from flawsift.reports.histogram import Histogram


def test_histogram_counts_everybody_and_cuts_between_the_sides() -> None:
    scores = np.concatenate([np.random.default_rng(0).normal(size=200), np.linspace(6, 8, 20), [1e6]])
    kept = np.arange(len(scores)) < 200
    found = Histogram.of(scores, kept)
    assert sum(row[2] for row in found.table) == 200
    assert sum(row[3] for row in found.table) == 21
    assert found.n_beyond == 1
    assert found.cut is not None
    assert all(x + width <= found.cut + 1e-6 for x, _, width, _, is_kept, _ in found.bars if is_kept)
    assert all(x >= found.cut - 1e-6 for x, _, _, _, is_kept, _ in found.bars if not is_kept)
    tallest = max(found.bars, key=lambda bar: bar[3])
    assert tallest[3] <= Histogram.HEIGHT + 1e-6
    assert int(tallest[5].split()[0]) == max(max(kept, removed) for _, _, kept, removed in found.table)


def test_histogram_with_a_given_line_has_it_on_the_axis() -> None:
    scores, first = np.arange(40.0), np.arange(40) % 2 == 0
    for cut in (-7.0, 12.5, 55.0):
        found = Histogram.of(scores, first, cut=cut, sides=("good", "defective"))
        assert found.cut is not None
        assert -1e-6 <= found.cut <= Histogram.WIDTH + 1e-6
        assert found.totals == (20, 20)
        assert {bar[5].split()[1].rstrip(",") for bar in found.bars} == {"good", "defective"}
        assert sum(row[2] + row[3] for row in found.table) == 40


def test_histogram_of_an_edited_selection_has_no_cut() -> None:
    found = Histogram.of(np.arange(40.0), np.arange(40) % 2 == 0)
    assert found.cut is None
    assert (sum(row[2] for row in found.table), sum(row[3] for row in found.table)) == (20, 20)


def test_sides_that_meet_at_one_score_are_cut_there() -> None:
    found = Histogram.of(np.array([0.0, 1, 2, 2, 3, 4]), np.arange(6) < 3)
    assert found.cut == pytest.approx(Histogram.WIDTH / 2)
    assert Histogram.of(np.array([0.0, 1, 2.1, 2, 3, 4]), np.arange(6) < 3).cut is None


def test_a_single_image_has_a_bar_that_can_be_seen() -> None:
    found = Histogram.of(np.append(np.zeros(100_000), 1.0), np.ones(100_001, bool))
    assert [bar[5].split()[0] for bar in found.bars] == ["100,000", "1"]
    assert found.bars[1][3] >= 2
    assert all(y + height == pytest.approx(Histogram.HEIGHT) for _, y, _, height, _, _ in found.bars)


@pytest.mark.parametrize("scores", [[], [3.0], [0.0] * 9, [np.nan, 1.0, 2.0], [1.0, np.inf]])
def test_histogram_of_odd_scores(scores: list[float]) -> None:
    found = Histogram.of(np.array(scores), np.ones(len(scores), bool))
    assert sum(row[2] for row in found.table) == np.isfinite(scores).sum()
    assert np.isfinite([value for bar in found.bars for value in bar[:4]]).all()
