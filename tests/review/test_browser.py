"""The review page and the reports in a real browser: decide by keys, reload, undo, refit, kill, resume, accessibility.

Needs Chromium (FLAWSIFT_CHROMIUM or /usr/bin/chromium), Playwright, and axe-core for the accessibility checks
(FLAWSIFT_AXE, the path of axe.min.js). `.ci/run` has them all.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flawsift import datasets, pipeline
from flawsift.data.images import ImageSet
from flawsift.datasets import write_mvtec
from flawsift.features.backbones import Backbone
from flawsift.models import model as models
from flawsift.reports import evaluation
from flawsift.reports import screening as report
from flawsift.screening.options import ScreenOptions
from flawsift.screening.storage import load_screening
from flawsift.testing import easy_set

CHROMIUM = Path(os.environ.get("FLAWSIFT_CHROMIUM", "/usr/bin/chromium"))
AXE = Path(os.environ.get("FLAWSIFT_AXE", "axe.min.js"))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WORDS = ["decided", "by", "hand,", "set", "aside", "by", "the", "screening"]
MARKUP = "<img src=x onerror=alert(1)>.png"

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")
needs_axe = pytest.mark.skipif(not AXE.exists(), reason="axe-core is not there; FLAWSIFT_AXE names no file")


class Server:
    """`flawsift review` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "flawsift", "review", str(self.folder), "--no-browser"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def decisions(self) -> dict[str, str]:
        """What is on disk."""
        path = self.folder / "decisions.csv"
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
            return {row["path"]: row["decision"] for row in csv.DictReader(file) if row["decision"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def screened(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    shutil.copytree(easy_folder, root / "parts")
    (root / "parts" / "part-45.png").rename(root / "parts" / MARKUP)
    (root / "parts" / "empty.png").touch()
    pipeline.screen(root / "parts", "padim", tiny, options=ScreenOptions(keep=0.8), out=root / "s")
    return root


@pytest.fixture(scope="module")
def running(screened: Path) -> Iterator[Server]:
    made = Server(screened / "s")
    yield made
    made.kill()


@pytest.fixture
def server(running: Server) -> Server:
    """One server for all tests, since starting one takes seconds; nothing is decided yet."""
    (running.folder / "decisions.csv").unlink(missing_ok=True)
    return running


class Errors(list[str]):
    """What the page complained of."""

    def watch(self, page: Any) -> Any:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("console", lambda message: self.append(message.text) if message.type == "error" else None)
        page.on("dialog", self._dismiss)
        return page

    def _dismiss(self, dialog: Any) -> None:
        self.append(dialog.message)
        dialog.dismiss()


@pytest.fixture
def errors() -> Errors:
    return Errors()


def open_page(browser: Any, errors: Errors, address: str, **context: Any) -> Any:
    page = errors.watch(browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **context}).new_page())
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Any) -> None:
    playwright.expect(page.locator("#saved")).to_have_text("Saved")


def names(page: Any) -> list[str]:
    shown: list[str] = page.locator(".tile .name").all_inner_texts()
    return shown


def test_decide_by_keys_reload_and_undo(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    assert ranked[0] == load_screening(server.folder).names[int(load_screening(server.folder).consensus.argmax())]
    assert MARKUP in ranked
    page.locator(".tile").first.focus()
    press(page, "r", "k", "u", "ArrowRight", "r")
    saved(page)
    wanted = {ranked[0]: "remove", ranked[1]: "keep", ranked[2]: "unsure", ranked[4]: "remove"}
    assert server.decisions() == wanted
    playwright.expect(page.locator("#progress-text")).to_contain_text("4 of 10 images set aside decided")

    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".tile .badge").all_inner_texts()[:5] == ["remove", "keep", "unsure", "set aside", "remove"]
    press(page, "z", "z")
    saved(page)
    assert server.decisions() == {ranked[0]: "remove", ranked[1]: "keep"}

    page.locator(".tile").first.focus()
    press(page, "Shift+ArrowRight", "Shift+ArrowRight", "u")  # several at once, one step to undo
    saved(page)
    assert [server.decisions()[n] for n in ranked[:3]] == ["unsure"] * 3
    press(page, "z")
    saved(page)
    assert server.decisions() == {ranked[0]: "remove", ranked[1]: "keep"}
    assert errors == []


def test_the_large_view(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    press(page, "Enter")
    title, box = page.locator("#single-name"), playwright.expect
    box(title).to_have_text(ranked[0])
    box(page.locator("#single-image")).to_have_js_property("complete", True)
    assert page.locator("#single-image").evaluate("image => image.naturalWidth") == 64
    press(page, "r")
    box(title).to_have_text(ranked[1])
    page.locator("[data-choice=keep]").click()
    box(title).to_have_text(ranked[2])
    press(page, "ArrowLeft")
    box(title).to_have_text(ranked[1])
    box(page.locator("[data-choice=keep]")).to_have_attribute("aria-pressed", "true")
    press(page, "h")
    assert page.locator("#single-map").evaluate("map => getComputedStyle(map).opacity") == "0"
    page.locator("#single-opacity").fill("40")
    assert page.locator("#single-map").evaluate("map => getComputedStyle(map).opacity") == "0.4"
    page.locator("#alike-list button").first.click()
    box(page.locator("#compare-caption")).to_contain_text("Typical: part-")
    press(page, "Escape")
    box(page.locator("#single")).not_to_be_visible()
    # the browser gives the focus back to where it was, the page moves it on when the dialog's close event comes
    box(page.locator(":focus")).to_contain_text(ranked[1])
    assert page.evaluate("document.activeElement.innerText").split() == ["Rank", "2", "keep", ranked[1], *WORDS]
    assert server.decisions() == {ranked[0]: "remove", ranked[1]: "keep"}
    assert errors == []


def test_filters_sort_and_search(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    suspects = names(page)
    page.locator(".tile").first.focus()
    press(page, "k", "r")
    saved(page)
    for choice, expected in (
        ("todo", suspects[2:]), ("decided", suspects[:2]), ("keep", suspects[:1]), ("changed", suspects[:1])
    ):  # fmt: skip
        page.select_option("#filter", choice)
        assert names(page) == expected, choice
    page.select_option("#filter", "all")
    playwright.expect(page.locator("#count")).to_have_text("50 images")
    page.fill("#search", "<IMG")
    assert names(page) == [MARKUP]
    page.fill("#search", "nothing like it")
    playwright.expect(page.locator("#empty")).to_be_visible()
    page.fill("#search", "")
    page.select_option("#sort", "name")
    assert names(page) == sorted(names(page))
    assert errors == []


def test_two_tabs_do_not_overwrite_each_other(browser: Any, errors: Errors, server: Server) -> None:
    first, second = (open_page(browser, errors, server.address) for _ in range(2))
    ranked = names(first)
    second.evaluate(
        "document.hidden || Object.defineProperty(document, 'hidden', {get: () => true})"
    )  # it does not poll
    first.locator(".tile").first.focus()
    press(first, "k")
    saved(first)
    second.locator(".tile").first.focus()
    press(second, "r", "r")
    playwright.expect(second.locator("#alert")).to_contain_text("Decided elsewhere meanwhile")
    playwright.expect(second.locator(".tile .badge").nth(1)).to_have_text("remove")
    playwright.expect(second.locator(".tile .badge").first).to_have_text("keep")
    assert server.decisions() == {ranked[0]: "keep", ranked[1]: "remove"}
    playwright.expect(first.locator(".tile .badge").nth(1)).to_have_text("remove")  # by its poll
    assert [e for e in errors if "409" not in e] == []


def test_kill_and_resume(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    press(page, "r")
    saved(page)
    server.kill()
    press(page, "k")
    playwright.expect(page.locator("#alert")).to_contain_text("The server does not answer")
    playwright.expect(page.locator(".tile .badge").nth(1)).to_have_text("set aside")
    server.start()
    again = open_page(browser, errors, server.address)
    assert again.locator(".tile .badge").all_inner_texts()[:2] == ["remove", "set aside"]
    assert server.decisions() == {ranked[0]: "remove"}


def hold(page: Any) -> list[Any]:
    """Requests to save, held back until they are let go one by one."""
    held: list[Any] = []
    page.route("**/decide", lambda route: held.append(route))  # a builtin is not taken
    return held


def arrived(page: Any, held: list[Any], n: int) -> Any:
    for _ in range(200):
        if len(held) >= n:
            return held[n - 1]
        page.wait_for_timeout(20)
    raise AssertionError(f"{len(held)} of {n} requests came")


def test_what_cannot_be_saved_is_not_shown_as_decided(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    held = hold(page)
    badge, alert = page.locator(".tile .badge").first, page.locator("#alert")
    page.locator(".tile").first.focus()
    press(page, "k", "ArrowLeft", "r")  # the second decision on one image waits for the first
    playwright.expect(badge).to_have_text("remove")
    arrived(page, held, 1).abort()
    playwright.expect(alert).to_contain_text("Not saved")
    playwright.expect(badge).to_have_text("remove")  # it may still be saved
    arrived(page, held, 2).abort()
    playwright.expect(badge).to_have_text("set aside")
    playwright.expect(page.locator("#undo")).to_be_disabled()
    assert server.decisions() == {}
    page.unroute("**/decide")

    press(page, "ArrowLeft", "r")
    saved(page)
    page.route("**/decide", lambda route: route.abort())
    press(page, "z")
    playwright.expect(page.locator("#saved")).to_have_text("Not saved")
    playwright.expect(badge).to_have_text("remove")
    page.unroute("**/decide")
    press(page, "z")  # what could not be undone can be tried again
    saved(page)
    playwright.expect(badge).to_have_text("set aside")
    assert server.decisions() == {}
    assert ranked == names(page)


def test_a_second_decision_does_not_overwrite_what_refused_the_first(
    browser: Any, errors: Errors, server: Server
) -> None:
    first, second = (open_page(browser, errors, server.address) for _ in range(2))
    ranked = names(first)
    second.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")  # it does not poll
    held = hold(second)
    second.locator(".tile").first.focus()
    press(second, "r", "ArrowLeft", "u", "r")
    arrived(second, held, 1)
    first.locator(".tile").first.focus()
    press(first, "k")
    saved(first)
    held[0].continue_()
    arrived(second, held, 2).continue_()
    playwright.expect(second.locator(".tile .badge").nth(1)).to_have_text("remove")
    saved(second)
    playwright.expect(second.locator(".tile .badge").first).to_have_text("keep")
    assert len(held) == 2  # the one on top of what was refused was not sent
    assert server.decisions() == {ranked[0]: "keep", ranked[1]: "remove"}
    playwright.expect(second.locator("#alert")).to_contain_text("Decided elsewhere")  # though later ones were saved


def test_undo_leaves_what_others_decided(browser: Any, errors: Errors, server: Server) -> None:
    first, second = (open_page(browser, errors, server.address) for _ in range(2))
    ranked = names(first)
    for page, keys in ((first, "rr"), (second, "k")):
        page.wait_for_timeout(3000)  # the other's decisions have come
        page.locator(".tile").first.focus()
        press(page, *keys)
        saved(page)
    playwright.expect(first.locator(".tile .badge").first).to_have_text("keep")
    press(first, "z", "z", "z")
    saved(first)
    playwright.expect(first.locator("#undo")).to_be_disabled()
    assert server.decisions() == {ranked[0]: "keep"}
    assert errors == []


def test_keys_held_down_or_meant_for_the_list_of_keys_decide_nothing(
    browser: Any, errors: Errors, server: Server
) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    for _ in range(5):
        page.keyboard.down("r")  # the second and all later ones are repetitions
    page.keyboard.up("r")
    saved(page)
    assert server.decisions() == {ranked[0]: "remove"}
    press(page, "Enter", "?")
    playwright.expect(page.locator("#help")).to_be_visible()
    press(page, "k", "r", "Control+z", "?")
    press(page, "Escape")
    playwright.expect(page.locator("#help")).not_to_be_visible()
    playwright.expect(page.locator("#single-name")).to_have_text(ranked[1])
    assert server.decisions() == {ranked[0]: "remove"}
    assert errors == []


def test_a_decision_in_the_large_view_is_on_the_image_that_is_seen(
    browser: Any, errors: Errors, server: Server
) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    press(page, "Shift+ArrowRight", "Shift+ArrowRight")
    page.evaluate("document.activeElement.blur()")
    press(page, "Enter")
    playwright.expect(page.locator("#single-name")).to_have_text(ranked[2])
    press(page, "r")
    saved(page)
    assert server.decisions() == {ranked[2]: "remove"}
    assert errors == []


def test_refit(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    page.locator(".tile").first.focus()
    press(page, "k")
    saved(page)
    page.click("#open-refit")
    playwright.expect(page.locator("#refit-plan")).to_contain_text("Train on 41 images of 50")
    page.click("#start-refit")
    playwright.expect(page.locator("#refit-status")).to_contain_text("Running")
    playwright.expect(page.locator("#refit-status")).to_contain_text("trained on 41 images", timeout=60_000)
    assert (server.folder / "model" / "report.html").exists()
    assert models.load_model(server.folder / "model").training["decisions"]["keep"] == 1
    assert errors == []


def violations(page: Any) -> list[str]:
    """What axe-core finds, one line each. Evaluated by the debugger, which a content security policy does not bind."""
    page.evaluate(AXE.read_text("utf-8"))
    rules = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}"
    found = page.evaluate(f"axe.run(document, {rules})")["violations"]
    return [f"{v['id']}: {n['html'][:150]} {n['failureSummary'][:300]}" for v in found for n in v["nodes"]]


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
    for button in ("#open-overview", "#open-help", "#open-refit"):
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
def reports(screened: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three reports."""
    out = tmp_path_factory.mktemp("reports")
    model = pipeline.fit(screened / "parts", "padim", tiny, screening=screened / "s").model
    page = {"fit": report.write_fit_report(model, screened / "s", out / "fit")}
    images = ImageSet.from_folder(screened / "parts")
    found = pipeline.screen(images, "padim", tiny)
    page["screening"] = report.write_screening_report(found, images, out / "screening")
    data = datasets.load(str(write_mvtec(easy_set(), out / "tree")))
    test = data.images.select(data.test_ids)
    metrics, predictions = models.evaluate(model, test, data.truth)
    page["evaluation"] = evaluation.write_evaluation_report(
        model, metrics, predictions, test, data.truth, out / "evaluation"
    )
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
