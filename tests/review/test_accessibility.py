"""The review page and the reports by the rules of axe-core, light and dark, wide and narrow. Reports load nothing."""

from pathlib import Path
from typing import Any

import pytest

from flawsift import datasets, pipeline
from flawsift.data.images import ImageSet
from flawsift.datasets import write_mvtec
from flawsift.features.backbones import Backbone
from flawsift.models import model as models
from flawsift.reports.evaluation import write_evaluation_report
from flawsift.reports.screening import write_screening_report
from flawsift.testing import easy_set
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


@pytest.fixture(scope="module")
def reports(seen_in_browser: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three reports."""
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
    return page


@needs_axe
@pytest.mark.parametrize("name", ["screening", "fit", "evaluation"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_are_accessible_and_load_nothing(
    browser: Any, errors: Errors, reports: dict[str, Path], name: str, scheme: str
) -> None:
    page = errors.watch(browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page())
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(reports[name].as_uri())
    assert violations(page) == []
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert asked == [reports[name].as_uri()]
    assert errors == []
