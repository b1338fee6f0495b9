"""What other tools are handed: the form that their documentation asks for, and untouched originals."""

import csv
import json
import os
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.errors import InputError, OutputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.reports.export import export, opening_note
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.storage import images_of, load_screening
from tests.reports.material import make_screening


@pytest.fixture(scope="module")
def screened(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Screening, ImageSet]:
    root = tmp_path_factory.mktemp("export") / "parts & more"
    shutil.copytree(easy_folder, root / "sub")
    with Image.open(root / "sub" / "part-45.png") as image:
        turned = image.resize((40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "sub" / "part-45.png", exif=exif)
    pipeline.screen(root, "padim", tiny, options=ScreenOptions(keep=0.8), out=root.parent / "s")
    found = load_screening(root.parent / "s")
    return found, images_of(found)


def enclosed(line: list[float]) -> float:
    """Area within a closed line."""
    x, y = np.array(line).reshape(-1, 2).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def digests(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def removed_names(screening: Screening) -> set[str]:
    return {n for n, kept in zip(screening.names, screening.is_kept, strict=True) if not kept}


@pytest.mark.parametrize("link", [False, True])
def test_folders_hold_copies_or_links_and_originals_stay(screened: Any, tmp_path: Path, link: bool) -> None:
    screening, images = screened
    before = digests(images.source.root)
    back = sorted(removed_names(screening))[0]
    counts = export(screening, images, tmp_path / "out", "folder", choices={back: "keep"}, link=link)
    assert counts == {"kept": 41, "removed": 9, "missing": 0}
    there = {
        p.relative_to(tmp_path / "out" / "removed").as_posix() for p in (tmp_path / "out" / "removed").rglob("*.png")
    }
    assert there == removed_names(screening) - {back}
    one = tmp_path / "out" / "kept" / back
    assert one.is_symlink() == link
    assert one.read_bytes() == before[back]
    shutil.rmtree(tmp_path / "out")
    assert digests(images.source.root) == before


def test_csv(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    name = screening.names[0]
    export(screening, images, tmp_path / "out", "csv", choices={name: "unsure"})
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == 50
    assert rows[name]["decision"] == "unsure"
    assert {n for n, row in rows.items() if row["status"] == "removed"} == removed_names(screening)
    assert (
        min(rows.values(), key=lambda row: int(row["rank"]))["path"]
        == screening.names[int(screening.consensus.argmax())]
    )
    assert Path(rows[name]["file"]).is_file()


def test_coco(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    export(screening, images, tmp_path / "out", "coco")
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert set(content) == {"info", "licenses", "categories", "images", "annotations"}
    listed = {image["id"]: image for image in content["images"]}
    assert len(listed) == 50
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert {listed[a["image_id"]]["file_name"] for a in content["annotations"]} == removed_names(screening)
    turned = next(i for i in listed.values() if i["file_name"] == "sub/part-45.png")
    assert (turned["width"], turned["height"]) == (20, 40)
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        image = listed[a["image_id"]]
        assert 0 <= x < x + w <= image["width"] + 0.01
        assert 0 <= y < y + h <= image["height"] + 0.01
        points = np.array([p for line in a["segmentation"] for p in line]).reshape(-1, 2)
        np.testing.assert_allclose([*points.min(0), *points.max(0)], [x, y, x + w, y + h], atol=0.02)
        assert a["area"] == pytest.approx(sum(enclosed(line) for line in a["segmentation"]), rel=1e-2)
        assert (a["category_id"], a["iscrowd"]) == (content["categories"][0]["id"], 0)
    whole = [a for a in content["annotations"] if a["area"] == 64 * 64]
    assert len(whole) < len(content["annotations"]) / 2  # boxes follow the regions


def test_sizes_are_those_of_upright_pictures(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    picture = Image.new("RGB", (40, 20))
    for orientation in range(10):  # 1 to 8 are defined; cameras write other values too
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "parts" / f"{orientation}.png", exif=exif)
    head = b"Exif\0\0II*\0\x08\0\0\0"
    picture.save(tmp_path / "parts" / "letter.jpg", exif=head + b"\x01\0\x12\x01\x02\0\x01\0\0\0a\0\0\0")
    picture.save(tmp_path / "parts" / "cut-off.jpg", exif=head + b"\x05")
    images = ImageSet.from_folder(tmp_path / "parts")
    export(make_screening(images, 3), images, tmp_path / "out", "coco")
    listed = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    assert len(listed) == 12
    for image in listed:
        assert (image["width"], image["height"]) == images.image(image["id"]).size, image["file_name"]
    assert {image["width"] for image in listed} == {20, 40}


def test_boxes_are_around_outlined_regions_and_else_around_the_picture(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for i in range(8):
        Image.new("RGB", (160, 80)).save(tmp_path / "parts" / f"{i}.png")
    images = ImageSet.from_folder(tmp_path / "parts")
    screening = make_screening(images, 2)
    patch_maps = np.zeros((8, 16, 16), np.float16)
    with_two, plain = (images.ids.tolist().index(i) for i in screening.removed.tolist())
    patch_maps[with_two, 2:4, 2:4] = patch_maps[with_two, 12:14, 10:14] = 9
    export(replace(screening, patch_maps=patch_maps), images, tmp_path / "out", "coco")
    annotations = json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"]
    boxes = {i: [a["bbox"] for a in annotations if a["image_id"] == i] for i in screening.removed.tolist()}
    assert boxes[int(images.ids[plain])] == [[0, 0, 160, 80]]
    small, large = sorted(boxes[int(images.ids[with_two])])
    for (x, y, w, h), (left, top, right, bottom) in ((small, (20, 10, 40, 20)), (large, (100, 60, 140, 70))):
        # a cell is 10 x 5 pixels; a region ends less than one from where the values do
        assert abs(x - left) < 10
        assert abs(y - top) < 5
        assert abs(x + w - right) < 10
        assert abs(y + h - bottom) < 5


def test_fiftyone(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    export(screening, images, tmp_path / "out", "fiftyone", choices={screening.names[3]: "remove"})
    content = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert content["classes"] == ["removed", "kept"]
    assert len(content["labels"]) == 50
    for path, target in content["labels"].items():
        assert os.path.isabs(path)
        assert Path(path).is_file()
        assert target["label"] in (0, 1)
        assert set(target["attributes"]) == {"consensus", "held_out_score", "rank", "decision", "defect_type"}
    mine = content["labels"][str(images.source.root / screening.names[3])]
    assert (mine["label"], mine["attributes"]["decision"]) == (0, "remove")
    assert "FiftyOneImageClassificationDataset" in opening_note(tmp_path / "out", "fiftyone", images.source.root)


def test_labelstudio(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    back = sorted(removed_names(screening))[0]
    export(screening, images, tmp_path / "out", "labelstudio", choices={back: "keep", screening.names[0]: "unsure"})
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert len(tasks) == 50
    interface = ElementTree.parse(tmp_path / "out" / "interface.xml").getroot()
    tags = {element.get("name"): element.tag for element in interface}
    assert tags == {"image": "Image", "status": "Choices", "region": "RectangleLabels"}
    choices = {c.get("value") for c in interface.iter("Choice")}
    used: list[str] = []
    for task in tasks:
        prefix, _, path = task["data"]["image"].partition("?d=")
        assert prefix == "/data/local-files/"
        assert " " not in path
        assert "&" not in path
        assert (images.source.root.parent / unquote(path)).is_file()
        assert set(task["predictions"][0]) == {"model_version", "score", "result"}
        for result in [*task["predictions"][0]["result"], *task.get("annotations", [{"result": []}])[0]["result"]]:
            used.append(result["id"])
            assert tags[result["from_name"]].lower() == result["type"]
            assert result["to_name"] == "image"
            if result["type"] == "choices":
                assert set(result["value"]["choices"]) <= choices
            else:
                assert 0 <= result["value"]["x"] <= result["value"]["x"] + result["value"]["width"] <= 100.01
    assert len(used) == len(set(used))
    by_path = {task["data"]["path"]: task for task in tasks}
    assert by_path[back]["predictions"][0]["result"][0]["value"] == {"choices": ["removed"]}
    assert by_path[back]["annotations"][0]["result"][0]["value"] == {"choices": ["kept"]}
    assert sum("annotations" in task for task in tasks) == 1
    command, then = opening_note(tmp_path / "out", "labelstudio", images.source.root).split("\n")
    variable = next(word for word in shlex.split(command) if word.startswith("LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT="))
    served = Path(variable.partition("=")[2])
    assert (served / unquote(tasks[0]["data"]["image"].partition("?d=")[2])).is_file()
    assert f"Local Files with the path {images.source.root}" in then
    moved = opening_note(tmp_path / "out", "labelstudio", tmp_path / "o'clock & more" / "parts")
    assert f"DOCUMENT_ROOT={tmp_path}/o'clock & more" in shlex.split(moved.split("\n")[0])[1]


def test_what_is_missing_is_counted(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    root = Path(shutil.copytree(images.source.root, tmp_path / "copy"))
    (root / screening.names[0]).unlink()
    there = images_of(screening, root)
    for to in ("folder", "coco"):
        assert export(screening, there, tmp_path / to, to)["missing"] == 1


def test_an_export_that_is_ended_leaves_an_empty_folder_for_the_next(
    screened: Any, tmp_path: Path, killed_at: Callable[[int, Callable[[], object]], bool]
) -> None:
    screening, images = screened
    whole = tmp_path / "whole"
    export(screening, images, whole, "folder")
    expected = digests(whole)
    for n in (1, 8, 60):
        out = tmp_path / f"{n}"
        assert killed_at(n, lambda: export(screening, images, out, "folder"))  # noqa: B023  # called at once
        if not digests(out):
            export(screening, images, out, "folder")
        assert digests(out) == expected


def test_refusals(screened: Any, tmp_path: Path) -> None:
    screening, images = screened
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not an empty folder"):
        export(screening, images, tmp_path / "full", "csv")
    with pytest.raises(OutputError, match="lies in the image folder"):
        export(screening, images, images.source.root / "clean", "folder")
    assert not (images.source.root / "clean").exists()
    with pytest.raises(ParameterError, match="Did you mean 'folder'"):
        export(screening, images, tmp_path / "x", "foldr")
    with pytest.raises(InputError, match="The decisions name none of"):
        export(screening, images, tmp_path / "x", "csv", choices={"other.png": "keep"})
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
