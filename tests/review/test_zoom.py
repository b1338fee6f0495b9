"""The large view up close: full resolution, zoom and pan, flicker, the outline of what is suspect."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from flawsift.reports.evidence import map_scale
from flawsift.reports.regions import normal_level, regions
from flawsift.review.server import make_app
from flawsift.review.session import Review
from flawsift.screening.storage import load_screening, save_screening
from tests.review.browser import Errors, Server, expect, needs_browser, open_page, press
from tests.review.material import BASE, PORT, TOKEN


def test_full_resolution_and_the_outline(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)
    Image.fromarray(pixels).resize((1600, 900)).save(parts / "part-05.png")
    (parts / "part-06.png").unlink()
    screening = load_screening(folder)
    with TestClient(make_app(Review.open(folder, images=parts), TOKEN, PORT), base_url=BASE) as client:
        id_, gone = (Review.open(folder, images=parts).id_of[f"part-0{n}.png"] for n in (5, 6))
        answer = client.get(f"/{TOKEN}/picture/full/{id_}")
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (1600, 900))
            assert np.abs(np.asarray(picture, np.float64) - pixels).mean() < 4  # of noise: next to nothing is lost
        shape = client.get(f"/{TOKEN}/shape/{id_}").json()
        assert shape["size"] == [1600, 900]
        assert screening.patch_maps is not None
        level, position = normal_level(screening), screening.ids.tolist().index(id_)
        wanted = regions(screening.patch_maps[position], map_scale(screening), level, (1600, 900))
        assert shape["outlines"] == [line for one in wanted for line in one.polygons]
        for path in (f"shape/{gone}", "shape/999", f"picture/full/{gone}"):
            assert client.get(f"/{TOKEN}/{path}").status_code == 404, path


@pytest.mark.parametrize("has_maps", [True, False])
def test_what_is_flat_has_no_outline(folder: Path, has_maps: bool) -> None:
    screening = load_screening(folder)
    assert screening.patch_maps is not None
    flat = np.zeros_like(screening.patch_maps) if has_maps else None
    save_screening(replace(screening, patch_maps=flat), folder)
    review = Review.open(folder)
    assert review.pictures.shape(review.id_of["part-05.png"]) == {"size": (64, 64), "outlines": []}


def transform(page: Any) -> tuple[float, float, float]:
    """Scale and place of the picture in its frame."""
    a, _, _, _, x, y = page.locator("#stage .canvas").first.evaluate(
        "c => { const m = new DOMMatrix(getComputedStyle(c).transform); return [m.a, m.b, m.c, m.d, m.e, m.f]; }"
    )
    return a, x, y


@needs_browser
def test_zoom_and_pan(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    page.locator(".tile").first.focus()
    press(page, "Enter")
    expect(page.locator("#single-regions polygon").first).to_be_attached()
    box = page.locator("#single-frame").bounding_box()
    assert transform(page) == (1, 0, 0)
    assert page.locator("#single-map").evaluate("map => getComputedStyle(map).opacity") == "0.5"
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.wheel(0, -400)
    scale, x, y = transform(page)
    assert scale == pytest.approx(np.exp(0.6), rel=1e-3)
    assert (100 - x, 50 - y) == pytest.approx((100 * scale, 50 * scale), abs=0.5)  # what was under the mouse still is
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 30)
    page.mouse.up()
    assert transform(page) == pytest.approx((scale, x - 10, y - 20), abs=0.5)
    press(page, "Shift+ArrowRight")
    assert transform(page)[1] < x - 50
    title = page.locator("#single-name").inner_text()
    press(page, "0")
    assert transform(page) == (1, 0, 0)
    press(page, "+", "+", "-")
    assert transform(page)[0] == pytest.approx(1.5)
    page.click("#zoom-one")
    expect(page.locator("#zoom-level")).to_have_text("100 %")
    edge = min(box["width"], box["height"])
    assert transform(page)[0] == pytest.approx(64 / edge, rel=1e-3)  # of 64 pixels: smaller than the frame
    page.click("#zoom-fit")
    page.mouse.dblclick(box["x"] + 5, box["y"] + 5)
    assert transform(page)[0] == pytest.approx(2)
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.wheel(0, -100_000)
    assert transform(page)[0] == pytest.approx(max(4, 16 * 64 / edge), rel=1e-3)  # and no further
    assert page.locator("#single-name").inner_text() == title
    press(page, "ArrowRight")
    assert transform(page) == (1, 0, 0)  # another image is seen whole
    assert server.decisions() == {}
    assert errors == []


@needs_browser
def test_flicker_shows_the_bare_picture_or_the_other_one(browser: Any, errors: Errors, server: Server) -> None:
    page = open_page(browser, errors, server.address)
    page.locator(".tile").first.focus()
    press(page, "Enter")
    expect(page.locator("#single-regions polygon").first).to_be_attached()

    def seen() -> list[bool]:
        parts = ("#single-image", "#single-map", "#single-regions", "#single-other")
        return [page.locator(part).evaluate("e => getComputedStyle(e).visibility") == "visible" for part in parts]

    assert seen() == [True, True, True, False]
    press(page, "f")
    assert seen() == [True, False, False, False]
    press(page, "f")
    page.locator("#alike-list button").first.click()
    press(page, "f")
    assert seen() == [False, False, False, True]
    assert page.locator("#single-other").get_attribute("src") == page.locator("#compare-image").evaluate("i => i.src")
    press(page, "f")
    assert seen() == [True, True, True, False]
    press(page, "h")
    assert seen()[2] is False  # the outline goes with the heatmap
    press(page, "h", "f", "ArrowRight")
    assert seen() == [True, True, True, False]
    assert errors == []


@needs_browser
def test_all_pixels_are_loaded_once_somebody_looks_close(
    browser: Any, errors: Errors, seen_in_browser: Path, tmp_path: Path
) -> None:
    parts = Path(shutil.copytree(seen_in_browser / "parts", tmp_path / "parts"))
    folder = Path(shutil.copytree(seen_in_browser / "s", tmp_path / "s"))
    screening = load_screening(folder)
    first = screening.names[screening.ids.tolist().index(int(screening.ranking[0]))]
    Image.new("RGB", (2000, 1500), (200, 90, 30)).save(parts / first)
    server = Server(folder, "--images", str(parts))
    try:
        page = open_page(browser, errors, server.address)
        page.locator(".tile").first.focus()
        press(page, "Enter")
        image = page.locator("#single-image")
        expect(image).to_have_js_property("naturalWidth", 1200)
        press(page, "+")
        expect(image).to_have_js_property("naturalWidth", 2000)
        press(page, "1")
        expect(page.locator("#zoom-level")).to_have_text("100 %")
        press(page, "ArrowRight")
        expect(image).to_have_js_property("naturalWidth", 64)
    finally:
        server.kill()
    assert errors == []
