"""Public sets: read as their publishers ship them, labels as annotated, and a bad tree says what was expected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flawsift.data.contamination import official
from flawsift.data.images import FileSource
from flawsift.data.splits import Split
from flawsift.data.truth import GroundTruth
from flawsift.datasets import CATEGORIES, Dataset, load
from flawsift.errors import InputError, ParameterError, SplitError

BTAD = [
    "01/train/ok/0000.bmp",
    "01/test/ok/0001.bmp",
    "01/test/ko/0000.bmp",
    "01/ground_truth/ko/0000.png",
    "02/train/ok/0000.png",
    "02/test/ok/0001.png",
    "02/test/ko/0000.png",
    "02/ground_truth/ko/0000.png",
    "03/train/ok/0000.bmp",
    "03/test/ok/0001.bmp",
    "03/test/ko/0000.bmp",
    "03/ground_truth/ko/0000.bmp",
]
MPDD = [
    "bracket_black/train/good/000.png",
    "bracket_black/test/good/000.png",
    "bracket_black/test/hole/000.png",
    "bracket_black/test/scratches/000.png",
    "bracket_black/ground_truth/hole/000_mask.png",
    "bracket_black/ground_truth/scratches/000_mask.png",
]
MVTEC = [
    "bottle/train/good/000.png",
    "bottle/test/good/000.png",
    "bottle/test/broken_large/000.png",
    "bottle/ground_truth/broken_large/000_mask.png",
]
VISA = [
    ("candle", "train", "normal", "candle/Data/Images/Normal/0836.JPG", ""),
    ("candle", "train", "normal", "candle/Data/Images/Normal/0451.JPG", ""),
    ("candle", "test", "normal", "candle/Data/Images/Normal/0010.JPG", ""),
    ("candle", "test", "anomaly", "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png"),
    ("pcb1", "train", "normal", "pcb1/Data/Images/Normal/0000.JPG", ""),
]


def draw(root: Path, files: list[str]) -> Path:
    """Image files of 4 x 3 pixels, each of another grey."""
    for number, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), number % 250 + 1).save(path)
    return root


def mask_names(data: Dataset) -> dict[str, str]:
    """{image: mask} by relative path."""
    assert isinstance(data.images.source, FileSource)
    root = data.images.source.root
    return {
        data.images.source.name(i): m.relative_to(root).as_posix()
        for i, m in data.truth.masks.items()
        if isinstance(m, Path)
    }


def test_the_numbers_of_categories_are_the_published_ones() -> None:
    numbers = {"mvtec": 15, "btad": 3, "mpdd": 6, "visa": 12, "realiad": 30, "piped": 6}  # PIPED: the six that are read
    assert {n: len(c) for n, c in CATEGORIES.items()} == numbers
    assert all(len(set(c)) == len(c) for c in CATEGORIES.values())


@pytest.mark.parametrize(
    ("name", "files", "category", "types", "masks"),
    [
        ("mvtec", MVTEC, "bottle", ("good", "good", "broken_large"), 1),
        ("btad", BTAD, "01", ("good", "good", "ko"), 1),
        ("btad", BTAD, "02", ("good", "good", "ko"), 1),
        ("btad", BTAD, "03", ("good", "good", "ko"), 1),
        ("mpdd", MPDD, "bracket_black", ("good", "good", "hole", "scratches"), 2),
    ],
)
def test_trees_with_a_folder_per_category(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    files: list[str],
    category: str,
    types: tuple[str, ...],
    masks: int,
) -> None:
    draw(tmp_path / name, files)
    monkeypatch.setenv("FLAWSIFT_DATA", str(tmp_path))
    data = load(name, category=category)
    assert data.name == category
    assert data.truth.defect_types == types
    assert len(data.train_ids) == 1
    assert len(data.truth.masks) == masks
    assert data.truth.has_masks


@pytest.mark.parametrize(
    ("name", "files", "category", "text"),
    [
        ("mvtec", MVTEC, "botle", "Unknown category of mvtec 'botle'. Did you mean 'bottle'"),
        ("mvtec", MVTEC, "zipper", "zipper' has no train/good, no test/good"),
        ("btad", [f for f in BTAD if "ground" not in f], "01", "no ground_truth/ko. Expected train/ok, .*btad.zip"),
        ("mpdd", [f for f in MPDD if "train" not in f], "bracket_black", "no train/good. Expected train/good"),
    ],
)
def test_incomplete_trees_say_what_was_expected(
    tmp_path: Path, name: str, files: list[str], category: str, text: str
) -> None:
    draw(tmp_path, files)
    with pytest.raises(InputError, match=text):
        load(name, category=category, root=tmp_path)


def test_defective_images_without_a_mask_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load("mpdd", category="bracket_black", root=draw(tmp_path, MPDD))
    assert caplog.text == ""
    (tmp_path / MPDD[4]).unlink()
    data = load("mpdd", category="bracket_black", root=tmp_path)
    assert len(data.truth.masks) == 1
    assert "1 of 2 defective images of mpdd bracket_black have no mask" in caplog.text
    assert "test/hole/000.png" in caplog.text


def test_a_set_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAWSIFT_DATA", raising=False)
    with pytest.raises(InputError, match="Where is the data set 'visa'. Get it from https.*set FLAWSIFT_DATA"):
        load("visa", category="candle")
    monkeypatch.setenv("FLAWSIFT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="visa' does not exist"):
        load("visa", category="candle")
    with pytest.raises(ParameterError, match="visa needs a category: candle, capsules"):
        load("visa")


# ---- VisA ------------------------------------------------------------------------------------------------------------


def visa(root: Path, rows: Any = VISA, drop: str = "-") -> Path:
    draw(root, [f for r in VISA for f in r[3:] if f and f != drop])
    (root / "split_csv").mkdir(exist_ok=True)
    lines = ["object,split,label,image,mask", *(",".join(r) for r in rows)]
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_visa_follows_its_split_file(tmp_path: Path) -> None:
    data = load("visa", category="candle", root=visa(tmp_path))
    assert data.images.names == [r[3] for r in VISA[:4]]  # in the order of the file
    assert data.truth.labels.tolist() == [0, 0, 0, 1]
    assert data.train_ids.tolist() == [0, 1]
    assert data.test_ids.tolist() == [2, 3]
    assert mask_names(data) == {VISA[3][3]: VISA[3][4]}


def test_visa_masks_number_the_kinds_of_defect_from_one(tmp_path: Path) -> None:
    visa(tmp_path)
    Image.fromarray(np.array([[0, 1], [3, 0]], np.uint8)).save(tmp_path / VISA[3][4])
    data = load("visa", category="candle", root=tmp_path)
    mask = data.truth.mask(3, (2, 2))
    assert mask is not None
    assert mask.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("rows", "drop", "text"),
    [
        (VISA, VISA[1][3], "1 of 5 files of visa are not in .*Normal/0451.JPG. Expected candle/Data/Images"),
        (VISA, VISA[3][4], "1 of 5 files of visa are not in .*Masks/Anomaly/000.png"),
        (
            [*VISA, ("candle", "test", *VISA[0][2:])],
            "-",
            "names 1 images more than once: candle/Data/Images/Normal/0836",
        ),
        (VISA[4:], "-", "has no row of 'candle'"),
        (
            [("candle", "train", "bad", VISA[0][3], "")],
            "-",
            "label 'bad' and split 'train'. Expected normal or anomaly",
        ),
        ([("candle", "train")], "-", "label '' and split 'train'"),
        (
            [*VISA[:3], VISA[3][:4]],
            "-",
            "no mask of 1 defective images: .*/000.JPG. Was it cut",
        ),
    ],
)
def test_bad_visa_trees(tmp_path: Path, rows: Any, drop: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load("visa", category="candle", root=visa(tmp_path, rows, drop))


def test_visa_without_split_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"split_csv/1cls.csv' cannot be read: No such file.*spot-diff"):
        load("visa", category="candle", root=tmp_path)


# ---- Real-IAD --------------------------------------------------------------------------------------------------------


def view(side: str, number: int, camera: int, shows: str | None = None) -> dict[str, Any]:
    """A row of a split file. `side` is OK or NG/TYPE; `shows` is what the view is annotated as."""
    kind = side.replace("/", "_")
    stem = f"{side}/S{number:04d}/audiojack_{number:04d}_{kind}_C{camera}_20231023111640"
    annotated = shows or "OK"
    mask = f"{stem}.png" if annotated != "OK" else None
    return {"category": "audiojack", "anomaly_class": annotated, "image_path": f"{stem}.jpg", "mask_path": mask}


TRAIN = [view("OK", 1, c) for c in range(1, 6)] + [view("NG/BX", 3, c, "BX" if c != 2 else None) for c in range(1, 6)]
TEST = [view("OK", 2, c) for c in range(1, 6)] + [view("NG/HS", 3, c, "HS" if c > 3 else None) for c in range(1, 6)]


def realiad(root: Path, nested: bool = True, **changes: Any) -> Path:
    content = {
        "meta": {"prefix": "audiojack/", "normal_class": "OK"},
        "train": TRAIN,
        "test": TEST,
        **changes,
    }
    rows = [*TRAIN, *TEST]
    draw(root / "realiad_1024" / "audiojack", [r[k] for r in rows for k in ("image_path", "mask_path") if r[k]])
    folder = root / "realiad_jsons" if nested else root
    for alpha in ("0.0", "0.1", "0.2", "0.4"):
        path = folder / f"realiad_jsons_fuiad_{alpha}" / "audiojack.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("nested", [True, False])
def test_realiad_labels_are_annotations_and_objects_are_groups(tmp_path: Path, nested: bool) -> None:
    data = load("realiad", category="audiojack", root=realiad(tmp_path, nested), alpha=0.1)
    assert data.images.names == [r["image_path"] for r in [*TRAIN, *TEST]]
    assert data.train_ids.tolist() == list(range(10))
    # view C2 of the defective object lies under NG and is annotated OK
    assert data.truth.select(data.train_ids).labels.tolist() == [0] * 5 + [1, 0, 1, 1, 1]
    assert data.truth.select(data.test_ids).labels.tolist() == [0] * 5 + [0, 0, 0, 1, 1]
    assert set(data.truth.defect_types) == {"good", "BX", "HS"}
    assert data.truth.has_masks
    assert len(set(data.images.group_names)) == 4
    assert data.images.groups[5] == "NG/BX/S0003"  # not the S0003 of another side


def test_contamination_by_images_and_by_objects(tmp_path: Path) -> None:
    data = load("realiad", category="audiojack", root=realiad(tmp_path), alpha=0.4)
    split = official(data.truth, data.train_ids, data.test_ids, alpha=0.4, groups=data.images.groups)
    assert (split.alpha, split.alpha_reached, split.alpha_groups) == (0.4, 0.4, 0.5)
    assert split.train_ids.tolist() == list(range(10))
    split.save(tmp_path / "split.json", data.images)
    again = Split.load(tmp_path / "split.json", data.images)
    assert (again.definition, again.alpha_groups) == ("official", 0.5)


def test_official_splits_are_checked() -> None:
    truth = GroundTruth(np.arange(4), np.zeros(4, np.int8), ("good",) * 4, {})
    with pytest.raises(SplitError, match="no official split"):
        official(truth, [0], [])
    with pytest.raises(SplitError, match="1 images or groups of images are on both sides"):
        official(truth, [0, 1], [1, 2])
    with pytest.raises(SplitError, match="on both sides"):
        official(truth, [0, 1], [2, 3], groups={0: "a", 3: "a"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"test": [*TEST, TRAIN[0]]}, "names 1 images more than once: OK/S0001"),
        ({"test": [*TEST[1:], view("OK", 1, 9)]}, "1 objects on both sides: OK/S0001"),
        ({"meta": {"prefix": "audiojack/"}}, "lacks the fields meta.normal_class"),
        ({"train": [{"image_path": "x.jpg"}]}, "lacks the fields anomaly_class, mask_path"),
        ({"train": [{**TRAIN[0], "category": "toy"}]}, "names images of toy, not of audiojack only"),
        ({"train": 5}, "is damaged"),
        ({"train": ["image"]}, "lacks the fields anomaly_class"),
        ({"meta": [], "train": TRAIN}, "is damaged"),
        ({"test": [{**TEST[0], "image_path": 5}]}, "is damaged"),
        ({"test": [{**view("NG/HS", 3, 1, "HS"), "mask_path": [5]}]}, "is damaged"),
        ({"test": [{**view("NG/HS", 3, 1, "HS"), "mask_path": "/nowhere.png"}]}, "not in .*: .*/nowhere.png"),
        ({"train": []}, "has no image in train"),
        ({"test": []}, "has no image in test"),
        ({"meta": {"prefix": 5, "normal_class": "OK"}}, "lacks the fields meta.prefix"),
        ({"test": [*TEST, {**TRAIN[0], "image_path": f"./{TRAIN[0]['image_path']}"}]}, "names 1 images more than once"),
        (
            {"test": [{**TEST[0], "image_path": "OK/../../x/S0002/y.jpg"}]},
            "1 images that are in no folder of an object",
        ),
        (
            {"test": [{**TEST[0], "image_path": "y.jpg"}]},
            "in no folder of an object: y.jpg. Expected paths such as OK/S0",
        ),
        ({"test": [view("OK", 77, 1)]}, "1 of .* files of realiad are not in .*OK/S0077"),
    ],
)
def test_bad_realiad_splits(tmp_path: Path, changes: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load("realiad", category="audiojack", root=realiad(tmp_path, **changes))


def test_realiad_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"Looked for .*fuiad_0.2/audiojack.json and .*realiad_jsons/realiad_jsons_fui"
    ):
        load("realiad", category="audiojack", root=tmp_path, alpha=0.2)
    with pytest.raises(ParameterError, match=r"alpha must be one of 0.0, 0.1, 0.2, 0.4, got 0.3"):
        load("realiad", category="audiojack", root=tmp_path, alpha=0.3)
    with pytest.raises(ParameterError, match="resolution must be one of 256, 512, 1024, raw, got 300"):
        load("realiad", category="audiojack", root=tmp_path, resolution=300)
    realiad(tmp_path)
    with pytest.raises(InputError, match=r"26 of 26 files of realiad are not in .*realiad_256/audiojack"):
        load("realiad", category="audiojack", root=tmp_path, resolution=256)
