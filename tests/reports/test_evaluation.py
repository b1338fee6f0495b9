"""The report of an evaluation: the worst errors of each kind, with and without a threshold."""

from pathlib import Path

from flawsift.datasets import Dataset
from flawsift.detectors.base import make_detector
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, evaluate
from flawsift.models.predictions import Predictions
from flawsift.reports.evaluation import write_evaluation_report
from flawsift.testing import easy_set, tiny_backbone, with_features
from tests.reports.material import Page


def evaluated(folder: Path, threshold: bool = True) -> tuple[Page, Predictions, Dataset]:
    data = easy_set()
    detector = make_detector("padim").fit(with_features(data.images.select(range(30)), make_detector("padim")))
    scores = detector.predict(with_features(data.images.select(range(30)), detector)).scores
    model = Model(detector, tiny_backbone(), Calibration.of(scores if threshold else []), {"seed": 0})
    test = data.images.select(range(30, 50))
    metrics, found = evaluate(model, test, data.truth)
    path = write_evaluation_report(model, metrics, found, test, data.truth, folder)
    return Page(path.read_text("utf-8")), found, data


def test_the_report_of_an_evaluation_shows_the_worst_errors(tmp_path: Path) -> None:
    page, found, _ = evaluated(tmp_path)
    assert found.threshold is not None
    cut = found.threshold.value
    scores = dict(zip(found.names, found.scores.tolist(), strict=True))
    good, bad = list(scores)[:10], list(scores)[10:]
    alarms = sorted((n for n in good if scores[n] > cut), key=lambda n: -scores[n])
    missed = sorted((n for n in bad if scores[n] <= cut), key=lambda n: scores[n])
    assert page.names("false-alarms") == (alarms or sorted(good, key=lambda n: -scores[n]))
    assert page.names("missed") == (missed or sorted(bad, key=lambda n: scores[n]))
    assert "20 test images, 10 of them defective" in page.text[""]
    assert "Image AUROC" in page.text["metrics"]
    assert {len(card["images"]) for card in page.cards["missed"]} == {2}
    assert all(values["alt"] for values in page.tags("img"))
    assert not {"script", "link"} & {tag for tag, _ in page.elements}
    assert "All files could be read" in page.text["unreadable"]


def test_an_evaluation_without_a_threshold(tmp_path: Path) -> None:
    page, found, _ = evaluated(tmp_path, threshold=False)
    assert found.threshold is None
    assert len(page.names("false-alarms")) == len(page.names("missed")) == 10
    assert "The model has no threshold" in page.text["missed"]
