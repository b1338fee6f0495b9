"""The review page and the reports by the rules of axe-core, light and dark, wide and narrow. Reports load nothing."""

from pathlib import Path
from typing import Any

import pytest

from flawsift import datasets, pipeline
from flawsift.benchmark.report import write_benchmark_report
from flawsift.benchmark.rows import append_rows
from flawsift.data.images import ImageSet
from flawsift.datasets import write_mvtec
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.models import model as models
from flawsift.models.drift import drift
from flawsift.models.labelled import recalibrate
from flawsift.reports.calibration import write_calibration_page
from flawsift.reports.diagnostics import diagnose, write_diagnosis
from flawsift.reports.drift import write_drift_report
from flawsift.reports.evaluation import write_evaluation_report
from flawsift.reports.prediction_page import HighestPictures, write_prediction_report
from flawsift.reports.predictions import write_predictions
from flawsift.reports.screening import write_screening_report
from flawsift.testing import easy_set
from tests.benchmark.test_report import row
from tests.review.browser import Errors, Server, needs_axe, needs_browser, open_page, press, saved, violations

pytestmark = needs_browser


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_review_page_is_accessible(browser: Any, errors: Errors, server: Server, scheme: str) -> None:
    page = open_page(browser, errors, server.address, color_scheme=scheme)
    page.locator(".tile").first.focus()
    press(page, "k", "r", "u")
    saved(page)
    assert violations(page) == []
    press(page, "Enter")
    page.wait_for_selector("#alike-list button")
    assert violations(page) == []
    press(page, "Escape")
    for button in ("#open-overview", "#open-region", "#open-help", "#open-refit"):
        page.click(button)
        page.wait_for_selector("dialog[open]")
        assert violations(page) == []
        press(page, "Escape")
    page.set_viewport_size({"width": 360, "height": 740})
    for _ in range(100):  # laid out anew at a later frame; the page's policy forbids Playwright's own polling
        if page.evaluate("document.documentElement.scrollWidth") <= 360:
            break
        page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert violations(page) == []


PAGES = ["screening", "fit", "evaluation", "predictions", "calibration", "diagnosis", "drift", "benchmark"]


@pytest.fixture(scope="module")
def reports(seen_in_browser: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, as the commands write them."""
    out = tmp_path_factory.mktemp("reports")
    given = seen_in_browser / "s"
    model = pipeline.fit(seen_in_browser / "parts", "padim", tiny, screening=given, out=out / "fit").model
    page = {"fit": out / "fit" / "report.html"}
    images = ImageSet.from_folder(seen_in_browser / "parts")
    found = pipeline.screen(images, "padim", tiny)
    page["screening"] = write_screening_report(found, images, out / "screening")
    data = datasets.load(str(write_mvtec(easy_set(), out / "tree")))
    test = data.images.select(data.test_ids)
    metrics, predictions = models.evaluate(model, test, data.truth)
    page["evaluation"] = write_evaluation_report(model, metrics, predictions, test, data.truth, out / "evaluation")
    pictures = HighestPictures(model.calibration, model.threshold())
    scored = model.predict(test, on_maps=pictures)
    page["predictions"] = write_prediction_report(scored, pictures, out / "predictions")
    write_predictions(scored, out / "predictions")
    new = easy_set(seed=1)
    page["calibration"] = write_calibration_page(recalibrate(model, new.images, new.truth), out / "calibration")
    labelled, _ = attach(test, tiny, ["stride16"])
    page["diagnosis"] = write_diagnosis(diagnose(labelled, truth=data.truth), out / "diagnosis")
    page["drift"] = write_drift_report(drift(out / "fit", [out / "predictions"]), out / "drift")
    append_rows(out / "rows" / "results.csv", [row(), row(alpha=0.4), row(preset="none"), row(seed=5, error="damaged")])
    page["benchmark"] = write_benchmark_report(out / "rows", out / "benchmark", quoted=True)["HTML"]
    assert sorted(page) == sorted(PAGES)
    return page


@needs_axe
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_are_accessible_and_load_nothing(
    browser: Any, errors: Errors, reports: dict[str, Path], name: str, scheme: str
) -> None:
    """On a desk and on a phone, where more scrolls; with everything open, since what is folded is not looked at."""
    page = errors.watch(browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page())
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(reports[name].as_uri())
    assert violations(page) == []
    inside = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((one) => one.hash.slice(1))")
    assert [id_ for id_ in inside if not page.evaluate("id => document.getElementById(id) !== null", id_)] == []
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert violations(page) == []
    assert asked == [reports[name].as_uri()]
    assert errors == []
