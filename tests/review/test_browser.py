"""The review page in a real browser: decide by keys, reload, undo, refit, kill, resume."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from flawsift.models import model as models
from flawsift.screening.storage import load_screening, save_screening
from tests.reports.material import make_evidence
from tests.review.browser import Errors, Server, arrived, expect, hold, names, needs_browser, open_page, press, saved
from tests.review.material import MARKUP

WORDS = ["decided", "by", "hand,", "set", "aside", "by", "the", "screening"]
pytestmark = needs_browser


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
    expect(page.locator("#progress-text")).to_contain_text("4 of 10 images set aside decided")

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
    title, box = page.locator("#single-name"), expect
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
    expect(page.locator("#nearest")).not_to_be_visible()  # sub-models do not look for them
    page.locator("#alike-list button").first.click()
    box(page.locator("#compare-caption")).to_contain_text("Typical: part-")
    press(page, "Escape")
    box(page.locator("#single")).not_to_be_visible()
    # the browser gives the focus back to where it was, the page moves it on when the dialog's close event comes
    box(page.locator(":focus")).to_contain_text(ranked[1])
    assert page.evaluate("document.activeElement.innerText").split() == ["Rank", "2", "keep", ranked[1], *WORDS]
    assert server.decisions() == {ranked[0]: "remove", ranked[1]: "keep"}
    assert errors == []


def test_the_nearest_places_stand_beside_an_image(
    browser: Any, errors: Errors, seen_in_browser: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(seen_in_browser / "s", tmp_path / "s"))
    screening = load_screening(folder)
    evidence = make_evidence(screening.ids)
    save_screening(replace(screening, submodels=None, evidence=evidence), folder)
    position = screening.ids.tolist().index(int(screening.ranking[0]))
    server = Server(folder)
    try:
        page = open_page(browser, errors, server.address)
        assert not page.locator("#sort option[value=votes]").count()
        page.locator(".tile").first.focus()
        press(page, "Enter")
        expect(page.locator("#nearest-text")).to_contain_text("in 49 other images")
        pictures = page.locator("#nearest-list img")
        expect(pictures).to_have_count(4)
        for index in range(4):
            expect(pictures.nth(index)).to_have_js_property("naturalWidth", 96)
        distances = page.locator("#nearest-list li > span").all_inner_texts()
        assert distances == ["this one", *(f"{d:.4g}" for _, _, d in evidence.nearest(position))]
        other = screening.names[screening.ids.tolist().index(evidence.nearest(position)[0][0])]
        page.locator("#nearest-list button").first.click()
        expect(page.locator("#compare-caption")).to_have_text(f"Has a close place: {other}")
        page.locator("#alike-list button").first.click()  # one comparison at a time
        expect(page.locator(".alike-list [aria-pressed=true]")).to_have_count(1)
        press(page, "ArrowRight")
        expect(page.locator("#compare")).not_to_be_visible()
        expect(page.locator("#nearest-list button").first).to_have_attribute("aria-pressed", "false")
    finally:
        server.kill()
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
    expect(page.locator("#count")).to_have_text("50 images")
    page.fill("#search", "<IMG")
    assert names(page) == [MARKUP]
    page.fill("#search", "nothing like it")
    expect(page.locator("#empty")).to_be_visible()
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
    expect(second.locator("#alert")).to_contain_text("Decided elsewhere meanwhile")
    expect(second.locator(".tile .badge").nth(1)).to_have_text("remove")
    expect(second.locator(".tile .badge").first).to_have_text("keep")
    saved(second)  # badges change before that
    assert server.decisions() == {ranked[0]: "keep", ranked[1]: "remove"}
    expect(first.locator(".tile .badge").nth(1)).to_have_text("remove")  # by its poll
    assert [e for e in errors if "409" not in e] == []


def test_kill_and_resume(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    press(page, "r")
    saved(page)
    server.kill()
    press(page, "k")
    expect(page.locator("#alert")).to_contain_text("The server does not answer")
    expect(page.locator(".tile .badge").nth(1)).to_have_text("set aside")
    server.start()
    again = open_page(browser, errors, server.address)
    assert again.locator(".tile .badge").all_inner_texts()[:2] == ["remove", "set aside"]
    assert server.decisions() == {ranked[0]: "remove"}


def test_what_cannot_be_saved_is_not_shown_as_decided(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    ranked = names(page)
    held = hold(page)
    badge, alert = page.locator(".tile .badge").first, page.locator("#alert")
    page.locator(".tile").first.focus()
    press(page, "k", "ArrowLeft", "r")  # the second decision on one image waits for the first
    expect(badge).to_have_text("remove")
    arrived(page, held, 1).abort()
    expect(alert).to_contain_text("Not saved")
    expect(badge).to_have_text("remove")  # it may still be saved
    arrived(page, held, 2).abort()
    expect(badge).to_have_text("set aside")
    expect(page.locator("#undo")).to_be_disabled()
    assert server.decisions() == {}
    page.unroute("**/decide")

    press(page, "ArrowLeft", "r")
    saved(page)
    expect(page.locator("#undo")).to_be_enabled()
    page.route("**/decide", lambda route: route.abort())
    press(page, "z")
    expect(page.locator("#saved")).to_have_text("Not saved")
    expect(badge).to_have_text("remove")
    page.unroute("**/decide")
    press(page, "z")  # what could not be undone can be tried again
    saved(page)
    expect(badge).to_have_text("set aside")
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
    expect(second.locator(".tile .badge").nth(1)).to_have_text("remove")
    saved(second)
    expect(second.locator(".tile .badge").first).to_have_text("keep")
    assert len(held) == 2  # the one on top of what was refused was not sent
    assert server.decisions() == {ranked[0]: "keep", ranked[1]: "remove"}
    expect(second.locator("#alert")).to_contain_text("Decided elsewhere")  # though later ones were saved


def test_undo_leaves_what_others_decided(browser: Any, errors: Errors, server: Server) -> None:
    first, second = (open_page(browser, errors, server.address) for _ in range(2))
    ranked = names(first)
    for page, keys in ((first, "rr"), (second, "k")):
        page.wait_for_timeout(3000)  # the other's decisions have come
        page.locator(".tile").first.focus()
        press(page, *keys)
        saved(page)
    expect(first.locator(".tile .badge").first).to_have_text("keep")
    press(first, "z", "z", "z")
    saved(first)
    expect(first.locator("#undo")).to_be_disabled()
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
    expect(page.locator("#help")).to_be_visible()
    press(page, "k", "r", "Control+z", "?")
    press(page, "Escape")
    expect(page.locator("#help")).not_to_be_visible()
    expect(page.locator("#single-name")).to_have_text(ranked[1])
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
    expect(page.locator("#single-name")).to_have_text(ranked[2])
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
    expect(page.locator("#refit-plan")).to_contain_text("41 images of 50 count as good")
    page.click("#start-refit")
    expect(page.locator("#refit-status")).to_contain_text("Running")
    expect(page.locator("#refit-status")).to_contain_text("trained on 41 images", timeout=60_000)
    expect(page.locator("#refit-facts")).to_contain_text("Threshold")
    expect(page.locator("#refit-moved summary")).to_have_text("1 image taken back, which the screening had set aside")
    expect(page.locator("#refit-facts")).not_to_contain_text("before")  # there was no model
    page.locator("#refit-moved summary").click()
    expect(page.locator("#refit-moved li")).to_have_text(names(page)[:1])
    page.wait_for_timeout(1500)  # the next look at the refit's state leaves the list open
    expect(page.locator("#refit-moved li")).to_be_visible()
    with page.context.expect_page() as opened:
        page.click("#refit-report")
    report = errors.watch(opened.value)
    expect(report.locator("h1, h2").first).to_be_visible()
    picture = report.locator("img").first
    picture.scroll_into_view_if_needed()  # it is loaded then
    expect(picture).to_have_js_property("complete", True)
    assert picture.evaluate("image => image.naturalWidth > 0")
    assert (server.folder / "model" / "report.html").exists()
    assert models.load_model(server.folder / "model").training["decisions"]["keep"] == 1
    assert errors == []
