"""Scores of several days: what has shifted is told, what chance explains is not, and bad tables are refused."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flawsift.errors import InputError, ModelError, ParameterError
from flawsift.metrics.shares import CONFIDENCE, share_interval
from flawsift.models.calibration import Calibration
from flawsift.models.drift import LEVELS, DayScores, compare_days, drift, read_days
from flawsift.models.record import model_id

CALIBRATION = Calibration.of(np.random.default_rng(0).normal(20, 1.5, 150).round(6))
THRESHOLD = CALIBRATION.threshold(0.05)


def scores_of(n: int, factor: float = 1.0, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(20, 1.5, n) * factor


def write(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("path", "score")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_scores(path: Path, scores: Any) -> Path:
    """As `flawsift predict --out` does."""
    p_values = CALIBRATION.p_values(scores)
    rows = [[f"{i}.png", f"{s:.9g}", 0, f"{p:.6g}", ""] for i, (s, p) in enumerate(zip(scores, p_values, strict=True))]
    return write(path, rows, ("path", "score", "is_anomalous", "p_value", "error"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of which only the scores are there."""
    folder = tmp_path / "model"
    folder.mkdir()
    content = {"format": 1, "training": {"false_alarm_rate": 0.05}, "calibration": CALIBRATION.scores.tolist()}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_that_of_clopper_and_pearson(case: tuple[int, int]) -> None:
    count, n = case
    low, high = share_interval(count, n)
    assert low <= count / n <= high
    tail = (1 - CONFIDENCE) / 2
    # at either end, so many or more (or fewer) have the probability of one tail
    assert (low == 0) if count == 0 else stats.binom.sf(count - 1, n, low) == pytest.approx(tail)
    assert (high == 1) if count == n else stats.binom.cdf(count, n, high) == pytest.approx(tail)


def test_numbers_of_a_day_are_those_of_its_scores() -> None:
    days = [DayScores("a", scores_of(80), 3), DayScores("b", scores_of(90, 1.1, 2))]
    found = compare_days(CALIBRATION, THRESHOLD, days)
    assert THRESHOLD is not None
    for day, row in zip(days, found.days, strict=True):
        assert (row.label, row.n, row.n_unreadable) == (day.label, len(day.scores), day.n_unreadable)
        np.testing.assert_allclose(row.quantiles, np.quantile(day.scores, LEVELS))
        assert row.median == np.median(day.scores)
        assert row.n_above == (day.scores > THRESHOLD.value).sum()
        assert row.share_above == (day.scores > THRESHOLD.value).mean()
        versus = row.versus_training
        assert versus is not None
        higher = (day.scores[:, None] > CALIBRATION.scores).mean()
        assert versus.superiority == pytest.approx(higher)  # no ties
        plain = stats.mannwhitneyu(day.scores, CALIBRATION.scores).pvalue
        assert versus.p_value == pytest.approx(min(1, 3 * plain)), "two days are compared in three ways"
    assert found.days[0].versus_first is None
    versus = found.days[1].versus_first
    assert versus is not None
    assert versus.change == pytest.approx(np.median(days[1].scores) / np.median(days[0].scores) - 1)


def test_a_shift_is_told_in_words() -> None:
    same, high, low = (DayScores(name, scores_of(100, f)) for name, f in (("mon", 1), ("tue", 1.2), ("wed", 0.8)))
    found = compare_days(CALIBRATION, THRESHOLD, [same, high])
    assert re.fullmatch(
        r"tue: scores rose by \d\d % since training and by 20 % since mon; not explained by chance\.",
        found.headline,
    )
    assert re.search(
        r"fell by \d\d % since training and by 20 % since mon",
        str(compare_days(CALIBRATION, THRESHOLD, [same, low])),
    )
    assert "rose by 50 % since tue" not in found.headline
    both = compare_days(CALIBRATION, THRESHOLD, [low, same])
    assert both.days[1].shift_text == "rose by 25 % since wed", "like training, unlike the first"
    back = compare_days(CALIBRATION, THRESHOLD, [same, high, DayScores("thu", scores_of(100, seed=5))])
    assert back.headline == "Scores had shifted in tue. Those of thu, the last file, have not."
    assert compare_days(CALIBRATION, THRESHOLD, [same]).headline.startswith("The scores of the file are like those of")


def test_chance_is_rarely_called_a_shift() -> None:
    generator = np.random.default_rng(3)
    told = 0
    for _ in range(100):
        training, *days = generator.normal(20, 1.5, (4, 60))
        found = compare_days(Calibration.of(training), None, [DayScores(str(k), d) for k, d in enumerate(days)])
        told += any(day.shifts for day in found.days)
    assert told <= 12  # 5 of 100 at most are expected; more than 12 come once in 500 times


def test_a_few_defects_are_no_shift() -> None:
    scores = scores_of(200)
    scores[:6] *= 3
    assert compare_days(CALIBRATION, THRESHOLD, [DayScores("a", scores)]).days[0].shifts == []


@pytest.mark.parametrize("scores", [[21.0], [20.0] * 5, [-3.0, -2.0, -1.0]])
def test_odd_scores_give_numbers(scores: list[float]) -> None:
    for calibration in (CALIBRATION, Calibration.of([20.0] * 9), Calibration.of([-5.0, -4.0])):
        found = compare_days(calibration, calibration.threshold(0.05), [DayScores("a", np.array(scores))] * 2)
        json.dumps(found.as_json(), allow_nan=False)
        assert "nan" not in str(found)
        versus = found.days[0].versus_training
        assert versus is not None
        assert (versus.change is None) == bool(min(np.median(calibration.scores), np.median(scores)) <= 0)
        assert found.days[1].versus_first is not None


def test_files_and_folders_are_read_and_named(model: Path, tmp_path: Path) -> None:
    scores = scores_of(30)
    files = [
        write_scores(tmp_path / "june" / "monday" / "predictions.csv", scores).parent,
        write_scores(tmp_path / "july" / "monday" / "predictions.csv", scores),
        write_scores(tmp_path / "july" / "tuesday.csv", scores),
        write(tmp_path / "plain.csv", [["a", "20.5"], ["b", ""], ["c", " 21 "]]),
    ]
    found = drift(model, files)
    assert [day.label for day in found.days] == ["june/monday", "july/monday", "tuesday", "plain"]
    assert [(day.n, day.n_unreadable) for day in found.days] == [(30, 0), (30, 0), (30, 0), (2, 1)]
    assert found.threshold == THRESHOLD
    looser = drift(model, files, false_alarm_rate=0.2)
    assert looser.threshold == CALIBRATION.threshold(0.2)
    assert str(found).endswith("; 1 unreadable")
    with pytest.raises(ParameterError, match="false_alarm_rate"):
        drift(model, files, false_alarm_rate=2)


GOOD = ["a.png", "20.5"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"path,score\n", "holds no row"),
        (b"path,value\na.png,3\n", "needs the columns 'score', has path, value"),
        (b"path,score\na.png,20\nb.png,high\n", "no number in row 3, column 'score': 'high'"),
        (b"path,score\na.png,nan\n", "no number in row 2"),
        (b"path,score\na.png,inf\n", "no number in row 2"),
        (b"path,score,error\na.png,,damaged\nb.png,,damaged\n", "none of its 2 images could be read"),
        (b"path,score\na.png\n", "none of its 1 images could be read"),
        (b"path,score\n\xff\xfe\xfa,3\n", "is not a CSV table"),
        (b'path,score\n"a.png,20\n', "is not a CSV table in UTF-8: unexpected end of data"),
        (b"path,score,p_value\na.png,20,0.999\n", "is of another model: in row 2 the p-value is 0.999"),
        (b"path,score,p_value\na.png,20,much\n", "no number in row 2, column 'p_value': 'much'"),
    ],
)
def test_a_bad_table_is_refused(content: bytes, text: str, model: Path, tmp_path: Path) -> None:
    good = write_scores(tmp_path / "good.csv", scores_of(9))
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(text)) as told:
        drift(model, [good, tmp_path / "bad.csv"])
    assert "bad.csv" in str(told.value)


def test_what_is_no_comparison_is_refused(model: Path, tmp_path: Path) -> None:
    good = write_scores(tmp_path / "day" / "predictions.csv", scores_of(9))
    with pytest.raises(InputError, match="There is no table"):
        read_days([], CALIBRATION, "")
    with pytest.raises(InputError, match="1 file comes more than once"):
        drift(model, [good, good.parent])
    with pytest.raises(InputError, match="cannot be read: .*No such file"):
        drift(model, [tmp_path / "missing.csv"])
    with pytest.raises(InputError, match="predictions.csv' cannot be read"):
        drift(model, [model])
    with pytest.raises(ModelError, match="is not a model folder"):
        drift(tmp_path, [good])
    for content, text in (({"calibration": []}, "no training scores"), ({"calibration": ["x"]}, "damaged model.json")):
        (model / "model.json").write_text(json.dumps({"format": 1, "training": {}, **content}))
        with pytest.raises((InputError, ModelError), match=text):
            drift(model, [good])


def test_tables_of_the_model_itself_are_never_refused(model: Path, tmp_path: Path) -> None:
    """Scores are written to nine digits, and may then be on the other side of a training score that they equal."""
    at_training = np.concatenate([CALIBRATION.scores, np.nextafter(CALIBRATION.scores, 99), [0.0, 99.0]])
    assert drift(model, [write_scores(tmp_path / "a.csv", at_training)]).days[0].n == 302
    other = Calibration.of(CALIBRATION.scores * 1.05).p_values(at_training)
    rows = [[f"{s:.9g}", f"{p:.6g}"] for s, p in zip(at_training, other, strict=True)]
    with pytest.raises(InputError, match="Scores of different models cannot be compared"):
        drift(model, [write(tmp_path / "b.csv", rows, ("score", "p_value"))])


def test_tables_name_their_model_whatever_its_threshold(model: Path, tmp_path: Path) -> None:
    training = json.loads((model / "model.json").read_text("utf-8"))["training"]
    own = model_id(training)
    assert model_id({**training, "false_alarm_rate": 0.3, "labelled": {}}) == own
    scores = [["a.png", "20.5", "0.5", own], ["b.png", "19", "0.9", own]]  # p-values of an earlier calibration
    named = write(tmp_path / "named.csv", scores, ["path", "score", "p_value", "model"])
    assert drift(model, [named]).notes == ()
    other = write(tmp_path / "other.csv", [["a.png", "20.5", "x" * 12]], ["path", "score", "model"])
    with pytest.raises(InputError, match="of another model, xxxxxxxxxxxx"):
        drift(model, [named, other])
    unknown = write(tmp_path / "unknown.csv", [["a.png", "20.5"]])
    assert drift(model, [unknown, named]).notes == ("unknown does not say which model made it.",)
