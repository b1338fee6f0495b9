"""Names of defects: in decisions.csv, on the page, and in what other tools are handed."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from flawsift.errors import InputError, ParameterError
from flawsift.reports.export import export
from flawsift.review.session import Review
from flawsift.screening.decisions import Change, DecisionStore, read_decisions, read_defect_types
from tests.review.browser import Errors, Server, expect, names, needs_browser, open_page, press, saved
from tests.review.material import TOKEN


def test_a_type_belongs_to_an_image_that_is_removed(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    store.write(
        [Change("a", "remove", 0, "  deep  scratch "), Change("b", "keep", 0, "dent"), Change("c", "remove", 0)]
    )
    assert read_defect_types(store.path) == {"a": "deep scratch"}
    assert read_decisions(store.path) == {"a": "remove", "b": "keep", "c": "remove"}
    written, _ = store.write([Change("a", "remove", 1)])  # says nothing of the type
    assert (written["a"].version, written["a"].defect_type) == (1, "deep scratch")
    written, refused = store.write([Change("a", "remove", 0, "dent"), Change("c", "remove", 1, "dent")])
    assert (refused["a"].defect_type, written["c"].defect_type) == ("deep scratch", "dent")  # the first saw no type
    written, _ = store.write([Change("a", "keep", 1)])
    assert (written["a"].choice, written["a"].version, written["a"].defect_type) == ("keep", 2, "")
    assert DecisionStore(store.path).since(-1)[1]["c"].defect_type == "dent"
    for bad in ("x" * 61, "a\nb", "\x00"):
        with pytest.raises(ParameterError, match="printable"):
            store.write([Change("c", "remove", 2, bad)])


def test_files_of_before_have_no_types_and_hands_may_add_them(tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    path.write_text("path,decision,version,time\na,remove,3,2024-05-01T10:00:00\n")
    store = DecisionStore(path)
    assert read_defect_types(path) == {}
    path.write_text("path,decision,version,time,defect_type\na,remove,3,,=dent\nb,keep,1,,dent\n")
    revision, rows = store.since(1)
    assert (rows["a"].defect_type, rows["a"].version) == ("=dent", 4)  # another tab that saw no type is told
    assert rows["b"].defect_type == ""
    store.write([Change("c", "unsure", 0)])
    assert read_defect_types(path) == {"a": "=dent"}
    assert revision < store.revision
    path.write_text(f"path,decision,defect_type\na,remove,{'x' * 61}\n")
    with pytest.raises(InputError, match="row 2: a defect type must be 60 printable"):
        read_defect_types(path)


def test_the_server_takes_types_and_tells_them(client: TestClient, folder: Path) -> None:
    def send(change: dict[str, Any]) -> Any:
        return client.post(f"/{TOKEN}/decide", json={"changes": [{"id": 5, "version": 0, **change}]})

    assert send({"decision": "remove", "type": "<b>dent"}).json()["written"] == {"5": ["remove", 1, "<b>dent"]}
    assert client.get(f"/{TOKEN}/content").json()["decisions"] == {"5": ["remove", 1, "<b>dent"]}
    refused = send({"decision": "remove", "type": "scratch"})
    assert (refused.status_code, refused.json()["refused"]) == (409, {"5": ["remove", 1, "<b>dent"]})
    for bad in (3, ["dent"], "x" * 61, "\ud800"):
        answer = client.post(
            f"/{TOKEN}/decide",
            content=json.dumps({"changes": [{"id": 6, "decision": "remove", "version": 0, "type": bad}]}),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 400, bad
    assert send({"decision": "keep", "version": 1}).json()["written"] == {"5": ["keep", 2]}
    assert read_defect_types(folder / "decisions.csv") == {}


def test_exports_name_what_was_named(folder: Path, tmp_path: Path) -> None:
    review = Review.open(folder)
    first, second, third = (f"part-0{n}.png" for n in (5, 6, 7))
    choices = {first: "remove", second: "remove", third: "keep"}
    types = {first: 'cut & "tear"', f"./{second}": "dent", third: "dent", "gone.png": "burr"}

    def write(to: str) -> Path:
        export(review.screening, review.images, tmp_path / to, to, choices=choices, defect_types=types)
        return tmp_path / to

    with (write("csv") / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row["defect_type"] for row in csv.DictReader(file)}
    assert {n: t for n, t in rows.items() if t} == {first: 'cut & "tear"', second: "dent"}
    coco = json.loads((write("coco") / "annotations.json").read_text())
    category = {c["id"]: c["name"] for c in coco["categories"]}
    assert category == {1: "suspect region", 2: 'cut & "tear"', 3: "dent"}
    of = {i["id"]: i["file_name"] for i in coco["images"]}
    named = {of[a["image_id"]]: category[a["category_id"]] for a in coco["annotations"]}
    assert named[first] == 'cut & "tear"'
    assert named[second] == "dent"
    assert {label for name, label in named.items() if name not in (first, second)} == {"suspect region"}
    fiftyone = json.loads((write("fiftyone") / "labels.json").read_text())["labels"]
    told = {Path(path).name: label["attributes"]["defect_type"] for path, label in fiftyone.items()}
    assert (told[second], told[third]) == ("dent", None)
    tasks = json.loads((write("labelstudio") / "tasks.json").read_text())
    task = next(t for t in tasks if t["data"]["path"] == first)
    values = [(r["from_name"], r["value"].get("choices")) for r in task["annotations"][0]["result"]]
    assert values == [("status", ["removed"]), ("defect_type", ['cut & "tear"'])]
    boxes = [r["value"]["rectanglelabels"] for r in task["predictions"][0]["result"][1:]]
    assert set(map(tuple, boxes)) == {('cut & "tear"',)}
    interface = ElementTree.parse(tmp_path / "labelstudio" / "interface.xml")
    assert [e.get("value") for e in interface.findall(".//Label")] == list(category.values())
    kinds = interface.findall("Choices[@name='defect_type']/Choice")
    assert [e.get("value") for e in kinds] == ['cut & "tear"', "dent"]


@needs_browser
def test_name_a_defect_by_keys_and_undo(browser: Any, errors: Errors, server: Server) -> None:
    def types() -> dict[str, str]:
        return read_defect_types(server.folder / "decisions.csv")

    page = open_page(browser, errors, server.address)
    ranked = names(page)
    page.locator(".tile").first.focus()
    press(page, "Enter", "t")
    page.keyboard.type("kruxz <b>")  # no key of the page
    press(page, "Enter")
    saved(page)
    assert server.decisions() == {ranked[0]: "remove"}
    assert types() == {ranked[0]: "kruxz <b>"}
    press(page, "ArrowRight", "t")
    assert page.locator("#defect-types option").evaluate_all("all => all.map((o) => o.value)") == ["kruxz <b>"]
    page.keyboard.type("dent")
    press(page, "Escape")  # leaves the field, not the large view, and saves nothing
    expect(page.locator("#defect-type")).to_have_value("")
    assert len(types()) == 1
    press(page, "t")
    page.keyboard.type("dent")
    press(page, "Enter", "Escape")
    saved(page)
    assert page.locator(".tile .badge").all_inner_texts()[:2] == ["kruxz <b>", "dent"]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".tile .badge").all_inner_texts()[:2] == ["kruxz <b>", "dent"]
    page.locator(".tile").first.focus()
    press(page, "r")  # says again what is so
    press(page, "k")
    saved(page)
    assert types() == {ranked[0]: "kruxz <b>"}  # what is kept has no defect
    press(page, "z")
    saved(page)
    assert types() == {ranked[0]: "kruxz <b>", ranked[1]: "dent"}
    press(page, "z", "z")
    saved(page)
    assert types() == {}
    assert server.decisions() == {}
    assert errors == []
