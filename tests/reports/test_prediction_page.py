"""The page of predictions: ranked, filterable, safe with any name, and small with thousands of images."""

import base64
import hashlib
import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Prediction
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.notices import Notice
from flawsift.models.predictions import Predictions
from flawsift.reports.prediction_page import N_HIGHEST, HighestPictures, prediction_page, write_prediction_report
from flawsift.reports.predictions import write_json_lines
from tests.reports.material import MARKUP, Page, noise, picture, words

CUT = Threshold(0.5, 0.01, 0.01, 99)
CALIBRATION = Calibration.of(np.linspace(0.0, 0.6, 50))
NAMES = (MARKUP, 'a & b "c".png', "=1+2.png", "</script><script>alert(1)</script>.png", "x' onload='alert(1).png")


def maps_of(n: int, edge: int = 8) -> npt.NDArray[np.float32]:
    """Maps that are highest in one cell of the upper left quarter."""
    values = np.full((n, edge, edge), 0.1, np.float32)
    values[:, edge // 4, edge // 4] = 1.0
    return values


def seen(
    images: ImageSet,
    scores: npt.NDArray[np.float64],
    *,
    threshold: Threshold | None = CUT,
    piece: int = 64,
    **options: int,
) -> HighestPictures:
    """Pictures that were told of the images piece by piece."""
    pictures = HighestPictures(CALIBRATION, threshold, **options)
    for start in range(0, len(images), piece):
        part = images.select(images.ids[start : start + piece])
        given_scores = scores[start : start + piece].astype(np.float32)
        pictures(part, Prediction(part.ids, given_scores, maps_of(len(part))))
    return pictures


def predictions_of(
    images: ImageSet, scores: npt.NDArray[np.float64], names: tuple[str, ...], threshold: Threshold | None = CUT
) -> Predictions:
    return Predictions(images.ids, names, scores, {}, threshold, CALIBRATION)


def test_the_flagged_come_first_with_pictures_and_the_others_are_rows() -> None:
    n = 40
    images = ImageSet.from_arrays(noise(n))
    scores = np.random.default_rng(0).permutation(n) / n  # 0.525 to 0.975 are above 0.5
    names = tuple(f"part-{i}.png" for i in range(n))
    predictions = predictions_of(images, scores, names)
    page = Page(prediction_page(predictions, seen(images, scores)))
    ranked = [names[i] for i in np.argsort(-scores)]
    assert page.names("images") == ranked[:N_HIGHEST]
    assert [name for name in ranked if name in page.text["images"]] == ranked
    flags = [values["data-flagged"] for _, values in page.elements if "data-flagged" in values]
    assert flags == ["1"] * 19 + ["0"] * 21, "in the order of the ranking, cards and rows"
    assert words(page.text[""]).count("Of 40 images, 19 look defective.") == 1
    assert {len(card["images"]) for card in page.cards["images"]} == {2}
    best = page.cards["images"][0]
    assert "Rank 1, score 0.975 flagged" in words(best["text"])
    p_value = float(CALIBRATION.p_values(scores.max()))
    assert f"Score 0.975 Threshold 0.5 p-value {p_value:.3g}" in words(best["text"])


def test_a_line_surrounds_the_regions_of_flagged_images_only() -> None:
    images = ImageSet.from_arrays([np.full((160, 160, 3), 128, np.uint8)] * 2)
    scores = np.array([0.4, 0.9])
    page = Page(prediction_page(predictions_of(images, scores, ("good", "bad")), seen(images, scores)))
    bad, good = page.cards["images"]  # by score
    for card, lined in ((bad, True), (good, False)):
        for uri in (card["images"][1]["src"], card["close"][0]["src"]):
            drawn = picture(uri)
            assert drawn.size == (160, 160)
            pixels = np.asarray(drawn.convert("L"), int)
            assert (pixels[38:62, 39].max() > 200) == lined, "beside cell (2, 2) of 8 x 8, which is 40 to 60"
            if lined:
                assert np.abs(pixels[44:56, 44:56] - 128).max() < 12, "bare within"
    bars = [values["style"] for _, values in page.elements if values.get("class") == "scale-bar"]
    assert bars == ["width: 31.25%"] * 2, "50 of 160 pixels"


@settings(max_examples=5, deadline=None)
@given(
    st.permutations(range(32)),
    st.floats(-1, 32),
    st.integers(1, 30_000),
)
def test_the_pictures_are_those_of_the_highest_scores(order: list[int], cut: float, max_bytes: int) -> None:
    images, scores = ImageSet.from_arrays(noise(32, edge=4)), np.array(order, np.float64)
    threshold = Threshold(cut, 0.01, 0.01, 99)
    pictures = seen(images, scores, threshold=threshold, piece=7, max_bytes=max_bytes).by_id
    assert sum(one.n_bytes for one in pictures.values()) <= max_bytes
    assert set(pictures) == set(np.argsort(-scores)[: len(pictures)].tolist()), "no gap in the ranking"
    wanted = max(int((scores > cut).sum()), N_HIGHEST)
    everything = seen(images, scores, threshold=threshold, piece=7).by_id
    assert len(everything) == wanted
    if sum(one.n_bytes for one in everything.values()) <= max_bytes:
        assert set(pictures) == set(everything)


def test_no_name_is_markup(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(noise(60))
    names = NAMES + tuple(f"{i}.png" for i in range(50)) + NAMES  # cards and rows
    scores = np.linspace(1, 0, 60)
    predictions = predictions_of(images, scores, names)
    text = prediction_page(predictions, seen(images, scores), heatmaps=images.ids.tolist())
    page = Page(text)
    assert page.names("images")[:5] == list(NAMES)
    assert len(page.tags("script")) == 1
    assert not any(key.startswith("on") for _, values in page.elements for key in values)
    assert {values["src"][:11] for values in page.tags("img")} == {"data:image/"}
    addresses = [values["href"] for values in page.tags("a") if not values["href"].startswith("#")]
    assert [unquote(address) for address in addresses[-5:]] == [f"maps/{name}.png" for name in NAMES]
    assert all(address.startswith("maps/") for address in addresses)


def test_only_the_script_of_the_page_may_run() -> None:
    images = ImageSet.from_arrays(noise(2))
    text = prediction_page(predictions_of(images, np.array([0.0, 1.0]), ("a", "b")), seen(images, np.array([0.0, 1.0])))
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(values["content"] for values in Page(text).tags("meta") if "http-equiv" in values)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_warnings_and_notices_stand_above_everything_else() -> None:
    images, scores = ImageSet.from_arrays(noise(3)), np.array([0.1, 0.2, 0.9])
    doubtful = Threshold(0.5, 0.01, 0.01, 99, n_suspects=3)
    notice = Notice("size", 3, 3, "3 of 3 images differ in size <b>", {})
    plain = predictions_of(images, scores, ("a", "b", "c"), doubtful)
    predictions = Predictions(**{**vars(plain), "notices": (notice,)})
    text = words(Page(prediction_page(predictions, seen(images, scores))).text[""])
    assert "At least 3 images look defective and still count" in text
    assert "images differ in size <b>" in text


@pytest.mark.parametrize("threshold", [None, CUT])
def test_without_a_flagged_image_the_most_unusual_are_shown(threshold: Threshold | None) -> None:
    images, scores = ImageSet.from_arrays(noise(30)), np.linspace(0, 0.4, 30)
    predictions = predictions_of(images, scores, tuple(map(str, range(30))), threshold)
    page = Page(prediction_page(predictions, seen(images, scores, threshold=threshold)))
    assert page.names("images") == [str(i) for i in range(29, 29 - N_HIGHEST, -1)]
    assert ("none looks defective" in page.text[""]) == (threshold is not None)
    assert ("There is no threshold" in page.text[""]) == (threshold is None)
    (checked,) = [values["value"] for values in page.tags("input") if "checked" in values]
    assert checked == "all"


def test_unreadable_images_are_listed_and_have_no_rank() -> None:
    images, scores = ImageSet.from_arrays(noise(2)), np.array([0.1, np.nan])
    predictions = Predictions(images.ids, ("a", "b"), scores, {int(images.ids[1]): "empty file"}, CUT, CALIBRATION)
    page = Page(prediction_page(predictions, seen(images.select(images.ids[:1]), scores[:1])))
    assert page.names("images") == ["a"]
    assert "b empty file" in words(page.text["unreadable"])


def test_a_page_of_thousands_is_small(tmp_path: Path) -> None:
    n = 5000
    worst = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)  # noise does not compress
    images = ImageSet.from_arrays([worst] * n)
    scores = np.random.default_rng(1).permutation(n) / n
    few = Threshold(0.96, 0.01, 0.01, 99)  # 199 are flagged: more than there is room for pictures of
    names = tuple(f"line 3/camera & light/2026-11-29/part-{i:06d}-of-batch-17.png" for i in range(n))
    predictions = predictions_of(images, scores, names, few)
    path = write_prediction_report(
        predictions, seen(images, scores, threshold=few), tmp_path / "new", heatmaps=images.ids.tolist()
    )
    assert path.stat().st_size < 15e6
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text("utf-8"))
    flags = [values["data-flagged"] for _, values in page.elements if "data-flagged" in values]
    assert flags == ["1"] * 199 + ["0"] * 4801
    assert 20 < len(page.cards["images"]) < 199
    assert all(values["loading"] == "lazy" for values in page.tags("img"))


def test_json_lines_say_what_the_table_says(tmp_path: Path) -> None:
    names = ("a\n.png", "caf\udce9.png", "broken.png")
    predictions = Predictions(np.arange(3), names, np.array([0.1, 0.9, np.nan]), {2: "empty"}, CUT, CALIBRATION)
    path = write_json_lines(predictions, tmp_path, heatmaps=[0, 2])
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["path"] for row in rows] == list(names)
    assert [row["score"] for row in rows] == [0.1, 0.9, None]
    assert [row["is_anomalous"] for row in rows] == [False, True, None]
    assert [row["error"] for row in rows] == [None, None, "empty"]
    assert [row["heatmap"] for row in rows] == ["maps/a\n.png.png", None, None]
    p_values = predictions.p_values
    assert [row["p_value"] for row in rows] == [p_values[0], p_values[1], None]
    assert "heatmap" not in write_json_lines(predictions, tmp_path).read_text("utf-8")
