"""Predictions as arrays, one by one, as text, in a notebook and as a table of pandas."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.data.notebook import EDGE
from flawsift.errors import FlawsiftError
from flawsift.models.calibration import Calibration
from flawsift.models.predictions import ImagePrediction, Predictions

CALIBRATION = Calibration.of(np.arange(1.0, 20.0))  # 19 scores: p-values are multiples of 1/20
NAMES = ("good.png", "<b>&bad</b>.png", "cut.png", "caf\udce9.png")


def predictions(images: ImageSet | None = None, calibration: Calibration = CALIBRATION) -> Predictions:
    return Predictions(
        ids=np.array([10, 20, 30, 40]),
        names=NAMES,
        scores=np.array([3.0, 25.0, np.nan, 18.0]),
        errors={30: "damaged or truncated: <i>"},
        threshold=calibration.threshold(0.1),
        calibration=calibration,
        maps={10: np.zeros((2, 2), np.float32)},
        images=images,
    )


def test_one_by_one() -> None:
    found = predictions()
    assert len(found) == 4
    first, second, third, fourth = found
    assert first == found[0] or first.id == found[0].id
    assert (first.id, first.name, first.score, first.is_anomalous, first.p_value) == (10, "good.png", 3.0, False, 0.9)
    assert first.map is not None
    assert (second.id, second.is_anomalous, second.p_value, second.map) == (20, True, 0.05, None)
    assert (third.is_anomalous, third.p_value, third.error) == (None, None, "damaged or truncated: <i>")
    assert (fourth.id, fourth.is_anomalous, fourth.p_value) == (40, False, 0.15)  # the threshold is 18 itself
    assert found[-1].id == found[np.int64(3)].id == 40
    assert found.ranking.tolist() == [20, 40, 10, 30]
    for wrong, error in ((4, IndexError), (-5, IndexError), ("good.png", TypeError), (1.0, TypeError)):
        with pytest.raises(error):
            found[wrong]  # type: ignore[index]
    assert isinstance(first, ImagePrediction)
    assert "map" not in repr(first)


def test_without_a_calibration_there_is_no_verdict() -> None:
    found = predictions(calibration=Calibration.of([]))
    assert found.is_anomalous is None
    assert np.isnan(found.p_values).all()
    assert (found[1].is_anomalous, found[1].p_value) == (None, None)
    assert repr(found).splitlines()[1] == "no threshold"


def test_the_text_is_short() -> None:
    assert repr(predictions()) == (
        "Predictions of 4 images, 1 anomalous, 1 unreadable\n"
        "threshold 18: about 10 false alarms per 100 good parts expected (between 2 and 23)\n"
        "highest scores: <b>&bad</b>.png 25, caf\\udce9.png 18, good.png 3"
    )
    none = Predictions(np.empty(0, np.int64), (), np.empty(0), {}, None)
    assert repr(none) == "Predictions of 0 images\nno threshold"
    assert list(none) == []


class Table(HTMLParser):
    """The cells and pictures of a page, and all its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.tags: set[str] = set()
        self._open = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


TAGS = {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}


def test_a_notebook_shows_a_table_and_everything_is_escaped() -> None:
    table = Table(predictions()._repr_html_())
    assert table.tags == TAGS
    assert table.rows == [
        ["name", "score", "p-value", "verdict"],
        ["<b>&bad</b>.png", "25", "0.05", "anomalous"],
        ["caf\\udce9.png", "18", "0.15", "normal"],
        ["good.png", "3", "0.9", "normal"],
        ["cut.png", "", "", "damaged or truncated: <i>"],
    ]
    predictions()._repr_html_().encode("utf-8")  # odd bytes of a name do not reach the page


def test_a_notebook_shows_pictures_as_long_as_there_are_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(30):  # black and white noise of the size that is shown makes the largest JPEGs
        noise = (generator.integers(0, 2, (EDGE, EDGE, 3)) * 255).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i:02d}.png")
    images = as_images(tmp_path)
    scores = np.arange(30.0)
    found = Predictions(images.ids, tuple(images.names), scores, {}, None, images=images)
    html = found._repr_html_()
    table = Table(html)
    assert len(table.rows) == 13
    assert [row[1] for row in table.rows[1:3]] == ["29.png", "28.png"]
    assert len(table.pictures) == 12
    assert sum(map(len, table.pictures)) < 100_000
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", uri) for uri in table.pictures)
    assert "and 18 more" in html
    (tmp_path / "29.png").unlink()
    assert len(Table(found._repr_html_()).pictures) == 11
    for path in tmp_path.glob("*.png"):
        path.unlink()
    table = Table(found._repr_html_())
    assert table.pictures == []
    assert table.rows[1][0] == "29.png", "no empty column of pictures"


def test_a_table_of_pandas() -> None:
    table = predictions().to_pandas()
    assert table.index.tolist() == [10, 20, 30, 40]
    assert table.index.name == "id"
    assert list(table.columns) == ["name", "score", "is_anomalous", "p_value", "error"]
    assert table[table.is_anomalous].name.tolist() == ["<b>&bad</b>.png"]
    assert table.loc[40, "name"] == "caf\\udce9.png"
    assert table.p_value.tolist()[:2] == [0.9, 0.05]
    assert table.score.isna().tolist() == [False, False, True, False]
    assert table.error.isna().tolist() == [True, True, False, True]
    assert predictions(calibration=Calibration.of([])).to_pandas().is_anomalous.isna().all()


def test_pandas_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FlawsiftError, match="pip install pandas"):
        predictions().to_pandas()
    assert "anomalous" in predictions()._repr_html_()
