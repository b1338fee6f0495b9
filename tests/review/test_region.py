"""The region of interest that is drawn on the review page."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from flawsift import pipeline
from flawsift.data.frames import Region
from flawsift.data.images import ImageSet
from flawsift.data.roi import read_region
from flawsift.features.backbones import Backbone
from flawsift.models import model as models
from flawsift.review.refit import Before, refit, summary_of
from flawsift.review.server import make_app
from flawsift.review.session import Review
from flawsift.screening.seen import region_of
from flawsift.screening.storage import load_screening
from tests.review.browser import Errors, Server, expect, needs_browser, open_page, press
from tests.review.material import BASE, PORT, TOKEN

LEFT = [[0, 0], [32, 0], [32, 64], [0, 64]]  # half of the mean image


def post(client: TestClient, content: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    return client.post(f"/{TOKEN}/region", content=json.dumps(content), headers=headers)


def test_a_region_is_drawn_on_the_mean_and_read_by_the_command(client: TestClient, folder: Path) -> None:
    assert 'id="single-region"' not in client.get(f"/{TOKEN}/").text
    before = client.get(f"/{TOKEN}/region").json()
    assert before == {
        "size": [64, 64], "polygons": [], "share": None, "screened": None, "is_new": False, "problem": None,
        "command": None,
    }  # fmt: skip
    images = Review.open(folder).images
    with Image.open(io.BytesIO(client.get(f"/{TOKEN}/region/mean").content)) as mean:
        pictures = np.stack([np.asarray(images.image(i), np.float64) for i in images.ids.tolist()])
        assert np.abs(np.asarray(mean, np.float64) - pictures.mean(0)).max() <= 0.51
    assert client.get(f"/{TOKEN}/region/layer").status_code == 404
    after = post(client, {"polygons": [LEFT]}).json()
    region = read_region(str(folder / "roi.json"), images)
    assert region.share == after["share"] == pytest.approx(0.5, abs=0.02)  # Pillow's polygons hold their right edge
    assert (after["is_new"], after["polygons"]) == (True, [LEFT])
    assert str(folder / "roi.json") in after["command"]
    assert client.get(f"/{TOKEN}/region").json() == after
    cleared = post(client, {"polygons": []}).json()
    assert (cleared, (folder / "roi.json").exists()) == (before, False)


@pytest.mark.parametrize(
    ("polygons", "says"),
    [(None, "list"), ("x", "list"), ([[]], "3 points"), ([LEFT[:2]], "3 points"),
     ([[[0, 0], [1, 1], [1]]], "two numbers"),
     ([[[0, 0], [1, 1], [1, "2"]]], "two numbers"), ([[[0, 0], [1, 1], [True, 2]]], "two numbers"),
     ([[[0, 0], [9, 9], [65, 0]]], "must lie in"), ([[[0, 0], [9, 9], [float("nan"), 0]]], "must lie in"),
     ([[[0, 0], [9, 9], [1e400, 0]]], "must lie in"), ([LEFT] * 51, "50 at most"), ([LEFT * 126], "500 at most"),
     ([[[64, 64], [64, 64], [64, 64]]], "hold no pixel")],
)  # fmt: skip
def test_what_is_no_region_is_told_and_leaves_the_last_one(
    client: TestClient, folder: Path, polygons: Any, says: str
) -> None:
    post(client, {"polygons": [LEFT]})
    written = (folder / "roi.json").read_bytes()
    answer = post(client, {"polygons": polygons})
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert (folder / "roi.json").read_bytes() == written
    broken: Any
    for broken in ([], {}, 3):
        assert post(client, broken).status_code == 400


def test_only_the_page_itself_draws(client: TestClient, folder: Path) -> None:
    body: dict[str, Any] = {"json": {"polygons": [LEFT]}}
    for path, headers in (
        ("wrong/region", {}),
        (f"{TOKEN}/region", {"Origin": "http://evil.example"}),
        (f"{TOKEN}/region", {"Sec-Fetch-Site": "cross-site"}),
    ):
        assert client.post(f"/{path}", headers=headers, **body).status_code == 403
    assert post(client, {"polygons": [LEFT], "more": "x" * (1 << 20)}).status_code == 413
    assert not (folder / "roi.json").exists()


def test_a_region_that_was_damaged_by_hand_is_told_and_can_be_drawn_anew(client: TestClient, folder: Path) -> None:
    (folder / "roi.json").write_text("{")
    state = client.get(f"/{TOKEN}/region").json()
    assert "holds no region" in state["problem"]
    assert state["polygons"] == []
    (folder / "roi.json").write_text(json.dumps({"size": [128, 32], "polygons": [[[64, 0], [128, 0], [128, 32]]]}))
    assert client.get(f"/{TOKEN}/region").json()["polygons"] == [[[32, 0], [64, 0], [64, 64]]]  # of another size
    assert post(client, {"polygons": [LEFT]}).json()["problem"] is None


def test_a_region_that_cannot_be_written_is_told(client: TestClient, folder: Path) -> None:
    client.get(f"/{TOKEN}/region")
    shutil.rmtree(folder)
    answer = post(client, {"polygons": [LEFT]})
    assert answer.status_code == 500
    assert "Cannot write" in answer.json()["error"]


def test_the_region_of_a_screening_is_shown(screened: Path, tiny: Backbone, tmp_path: Path) -> None:
    images = ImageSet.from_folder(screened / "parts")
    region = Region.of_mask(np.arange(64)[None, :].repeat(64, 0) < 32)
    pipeline.screen(images.looked_at(region), "padim", tiny, out=tmp_path / "s")
    with TestClient(make_app(Review.open(tmp_path / "s"), TOKEN, PORT), base_url=BASE) as client:
        state = client.get(f"/{TOKEN}/region").json()
        assert (state["screened"], state["share"], state["is_new"]) == (0.5, 0.5, False)
        with Image.open(io.BytesIO(client.get(f"/{TOKEN}/region/layer").content)) as layer:
            assert (np.asarray(layer)[..., 3] == 0).tolist() == region.cells.tolist()
        assert 'id="single-region"' in client.get(f"/{TOKEN}/").text


def test_a_refit_with_another_region_screens_anew(folder: Path, tmp_path: Path) -> None:
    review = Review.open(folder)
    removed = [int(i) for i in review.screening.removed[:2]]
    review.decide([{"id": i, "decision": "remove", "version": 0} for i in removed])
    review.drawing.save([LEFT])
    out = folder / "model"
    told = refit(folder, out, decisions=folder / "decisions.csv", region=folder / "roi.json")
    region = read_region(str(folder / "roi.json"), review.images)
    assert models.load_model(out).region == region
    made, before = load_screening(out / "screening"), load_screening(folder)
    assert region_of(made) == region
    assert region_of(before) is None
    assert made.options.as_json() == before.options.as_json()
    assert not np.array_equal(made.consensus, before.consensus)
    assert models.load_model(out).training["decisions"]["remove"] == 2
    assert summary_of(told, out, Before.of(before, out))["screened_anew"]
    for name in ("decisions.csv", "roi.json"):
        assert (out / "screening" / name).read_bytes() == (folder / name).read_bytes()
    again = refit(out / "screening", out, decisions=out / "screening" / "decisions.csv", region=out / "roi.json")
    assert not summary_of(again, out, Before.of(before, out))["screened_anew"]  # no other region is there
    assert models.load_model(out).region == region


@needs_browser
def test_draw_by_clicks_and_by_keys(browser: Any, errors: Errors, server: Server) -> None:
    path = server.folder / "roi.json"
    path.unlink(missing_ok=True)
    page = open_page(browser, errors, server.address)
    page.click("#open-region")
    status, svg = page.locator("#region-status"), page.locator("#region-svg")
    expect(status).to_contain_text("No region is saved")
    expect(page.locator("#region-save")).to_be_disabled()
    box = svg.bounding_box()
    for x, y in ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.26)):  # the last is the first again
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    expect(page.locator("#region-shapes .closed")).to_have_count(1)
    page.click("#region-save")
    expect(status).to_contain_text("Saved: ")
    expect(status).to_contain_text("flawsift fit")
    [polygon] = json.loads(path.read_text())["polygons"]
    assert np.allclose(polygon, [[16, 16], [48, 16], [48, 48]], atol=0.3)
    svg.focus()
    press(page, "k", "Enter", "Shift+ArrowRight", "Shift+ArrowRight", " ", "Shift+ArrowDown", "Enter", "c")
    expect(page.locator("#region-shapes .closed")).to_have_count(2)
    press(page, "Backspace")  # opens it again
    expect(page.locator("#region-shapes .corner")).to_have_count(2)
    press(page, "Enter")
    with page.expect_response(lambda answer: "region" in answer.url):
        page.click("#region-save")  # closes it
    expect(page.locator("#region-save")).to_be_disabled()
    expect(page.locator("#region-shapes .closed")).to_have_count(2)
    assert len(json.loads(path.read_text())["polygons"]) == 2
    press(page, "Escape")
    page.click("#open-refit")
    expect(page.locator("#refit-region")).to_contain_text("screened anew first")
    press(page, "Escape")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.click("#open-region")
    expect(page.locator("#region-shapes .closed")).to_have_count(2)
    page.click("#region-clear")
    page.click("#region-save")
    expect(status).to_contain_text("No region is saved")
    assert not os.path.exists(path)
    assert server.decisions() == {}  # "k" was for the drawing
    assert errors == []
