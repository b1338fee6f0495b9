"""The report of an evaluation: the worst errors of each kind, with and without a threshold."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Prediction
from flawsift.detectors.registry import make_detector
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.model import Model, evaluate, predict
from flawsift.models.predictions import Predictions
from flawsift.reports.evaluation import write_evaluation_report
from flawsift.testing import easy_set, tiny_backbone, with_features
from tests.reports.material import Page, words

TEST = easy_set().images.select(range(30, 50))  # 10 good images, then 10 defective ones
TRUTH = easy_set().truth


@pytest.fixture(scope="module")
def model() -> Model:
    images = easy_set().images.select(range(30))
    detector = make_detector("padim").fit(with_features(images, make_detector("padim")))
    scores = detector.predict(with_features(images, detector)).scores
    return Model(detector, tiny_backbone(), Calibration.of(scores), {"seed": 0})


@pytest.fixture(scope="module")
def evaluated(model: Model) -> tuple[dict[str, Any], Predictions]:
    metrics, predictions = evaluate(model, TEST, TRUTH)
    return metrics, predictions


def written(model: Model, metrics: Mapping[str, Any], predictions: Predictions, folder: Path) -> Page:
    path = write_evaluation_report(model, metrics, predictions, TEST, TRUTH, folder)
    return Page(path.read_text("utf-8"))


def test_the_page_is_one_file_with_metrics_and_pictures(model: Model, evaluated: Any, tmp_path: Path) -> None:
    metrics, predictions = evaluated
    page = written(model, metrics, predictions, tmp_path)
    assert "20 test images, 10 of them defective" in page.text[""]
    assert "AUROC" not in page.text[""]
    sections = [section for section in page.text if section]
    assert sections[:3] == ["missed", "false-alarms", "metrics"], "pictures of errors come before numbers"
    assert "Image AUROC" in page.text["metrics"]
    assert {len(card["images"]) for card in page.cards["missed"]} == {2}
    assert all(values["alt"] for values in page.tags("img"))
    assert not {"script", "link"} & {tag for tag, _ in page.elements}
    assert "All files could be read" in page.text["unreadable"]


def with_scores(evaluated: Any, scores: list[float], threshold: float | None) -> tuple[dict[str, Any], Predictions]:
    """An evaluation with the scores of a test, of the good images first."""
    metrics, predictions = evaluated
    values = np.array(scores)
    metrics = {**metrics, "false_alarms_per_100": None, "missed_per_100": None}
    if threshold is not None:
        metrics["false_alarms_per_100"] = 100 * (values[:10] > threshold).mean()
        metrics["missed_per_100"] = 100 * (values[10:] <= threshold).mean()
    cut = None if threshold is None else Threshold(threshold, 0.01, 0.01, 30)
    return metrics, replace(predictions, scores=values, threshold=cut)


def test_errors_are_the_images_on_the_wrong_side_of_the_threshold_the_worst_first(
    model: Model, evaluated: Any, tmp_path: Path
) -> None:
    good, defective = [1.0, 9, 2, 7, 5, 0, 3, 8, 4, 6], [7.0, 11, 12, 5, 13, 8, 14, 6.5, 15, 16]
    metrics, predictions = with_scores(evaluated, good + defective, 7.0)
    page = written(model, metrics, predictions, tmp_path)
    names = predictions.names
    assert page.names("false-alarms") == [names[1], names[7]]  # 7 is not above 7
    assert page.names("missed") == [names[13], names[17], names[10]]
    assert "20 of 100 good parts are stopped, 30 of 100 defective pass" in words(page.text[""])
    assert "good 10 4.5 20 %" in words(page.text["scores"])
    for section, verdict in (("false-alarms", "stopped"), ("missed", "passed")):
        assert "on the wrong side of the threshold" in page.text[section]
        assert all(verdict in card["text"] and "Threshold 7" in words(card["text"]) for card in page.cards[section])


def test_a_warning_of_the_threshold_stands_above_everything_else(model: Model, evaluated: Any, tmp_path: Path) -> None:
    metrics, predictions = with_scores(evaluated, [float(i) for i in range(20)], 10.0)
    assert predictions.threshold is not None
    doubtful = replace(predictions, threshold=replace(predictions.threshold, n_suspects=3))
    warning = "At least 3 images look defective and still count"
    assert warning in written(model, metrics, doubtful, tmp_path).text[""]
    assert warning not in written(model, metrics, predictions, tmp_path).text[""]


def test_without_errors_the_closest_images_are_shown(model: Model, evaluated: Any, tmp_path: Path) -> None:
    metrics, predictions = with_scores(evaluated, [*range(10), *range(20, 10, -1)], 10.0)
    page = written(model, metrics, predictions, tmp_path)
    assert page.names("false-alarms") == list(predictions.names[9::-1])
    assert page.names("missed") == list(predictions.names[:9:-1])
    for section, verdict in (("false-alarms", "passed"), ("missed", "stopped")):
        assert "None. The" in page.text[section]
        assert all(verdict in card["text"] for card in page.cards[section])


def test_an_evaluation_without_a_threshold(model: Model, evaluated: Any, tmp_path: Path) -> None:
    page = written(model, *with_scores(evaluated, [float(i) for i in range(20)], None), tmp_path)
    assert len(page.names("false-alarms")) == len(page.names("missed")) == 10
    assert "The model has no threshold" in page.text["missed"]
    assert all("no threshold" in card["text"] for card in page.cards["missed"])


def test_unreadable_images_are_listed_and_in_no_group(model: Model, evaluated: Any, tmp_path: Path) -> None:
    scores = [float(i) for i in range(20)]
    scores[3] = np.nan
    metrics, predictions = with_scores(evaluated, scores, 30.0)
    predictions = replace(predictions, errors={int(predictions.ids[3]): "empty file (0 bytes)"})
    page = written(model, metrics, predictions, tmp_path)
    assert "empty file (0 bytes)" in page.text["unreadable"]
    assert predictions.names[3] in page.text["unreadable"]
    assert predictions.names[3] not in page.names("false-alarms")
    assert len(page.names("false-alarms")) == 9


def test_the_alternative_text_says_where_a_map_is_highest(model: Model, evaluated: Any, tmp_path: Path) -> None:
    expected: dict[str, str] = {}

    def take(images: ImageSet, prediction: Prediction) -> None:
        assert prediction.maps is not None
        for name, values in zip(images.names, prediction.maps, strict=True):
            row, column = np.unravel_index(values.argmax(), values.shape)
            left, top = (100 * (place + 0.5) / size for place, size in zip((column, row), (64, 64), strict=True))
            expected[name] = f"highest {left:.0f} % from the left and {top:.0f} % from the top"

    predict(model, TEST, on_maps=take)
    metrics, predictions = evaluated
    page = written(model, metrics, predictions, tmp_path)
    cards = [*page.cards["false-alarms"], *page.cards["missed"]]
    assert len(cards) > 10
    for card in cards:
        assert card["images"][1]["alt"] == f"Heatmap of {card['name'].strip()}, {expected[card['name'].strip()]}"
