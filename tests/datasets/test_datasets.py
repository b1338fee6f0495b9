"""Data sets: layouts are read as their publishers write them, and a bad tree says what was expected."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flawsift.data.images import FileSource
from flawsift.datasets import (
    CATEGORIES,
    Dataset,
    load,
    load_elpv,
    load_folder,
    load_labelled,
    load_magnetic_tile,
    load_mvtec,
    load_sorted,
    load_unlabelled,
    write_folder,
    write_mvtec,
)
from flawsift.datasets import elpv as elpv_module
from flawsift.datasets import synthetic as synthetic_module
from flawsift.datasets.synthetic import (
    DEFECTS,
    FORCED,
    MIN_CONTRAST,
    TEXTURES,
    Product,
    contrast,
    rare_ids,
    synthetic,
)
from flawsift.errors import InputError, OutputError, ParameterError

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("FLAWSIFT_DATA") or SHARED_DATA)

BOTTLE = [
    "train/good/000.png",
    "train/good/001.png",
    "test/good/000.png",
    "test/broken_large/000.png",
    "test/broken_large/001.png",
    "test/contamination/000.png",
    "ground_truth/broken_large/000_mask.png",
    "ground_truth/contamination/000_mask.png",
]
TILE = [
    "normal/exp1_num_1.jpg",
    "normal/exp2_num_2.jpg",
    "defect/crack/exp1_num_7.jpg",
    "defect/fray/exp1_num_8.jpg",
    "mask/crack/exp1_num_7.png",
    "mask/fray/exp1_num_8.png",
]


def make(root: Path, files: list[str]) -> Path:
    """Image files of 4 x 3 pixels; a path that ends with a slash becomes an empty folder."""
    for number, file in enumerate(files):
        path = root / file
        if file.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), number + 1).save(path)
    return root


def mask_names(data: Dataset) -> dict[str, str]:
    """{image: mask} by relative path."""
    assert isinstance(data.images.source, FileSource)
    root = data.images.source.root
    paths = {i: m for i, m in data.truth.masks.items() if isinstance(m, Path)}
    return {data.images.source.name(i): m.relative_to(root).as_posix() for i, m in paths.items()}


# ---- MVTec layout ----------------------------------------------------------------------------------------------------


def test_mvtec_ids_are_sorted_training_first_and_masks_are_matched(tmp_path: Path) -> None:
    data = load_mvtec(make(tmp_path / "bottle", BOTTLE))
    assert data.name == "bottle"
    assert data.images.names == [
        "train/good/000.png",
        "train/good/001.png",
        "test/good/000.png",
        "test/broken_large/000.png",
        "test/broken_large/001.png",
        "test/contamination/000.png",
    ]
    assert data.images.ids.tolist() == data.truth.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.truth.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.truth.defect_types == ("good", "good", "good", "broken_large", "broken_large", "contamination")
    assert data.train_ids.tolist() == [0, 1]
    assert data.test_ids.tolist() == [2, 3, 4, 5]
    assert mask_names(data) == {
        "test/broken_large/000.png": "ground_truth/broken_large/000_mask.png",
        "test/contamination/000.png": "ground_truth/contamination/000_mask.png",
    }


def test_btad_names_normal_ok_and_masks_like_images(tmp_path: Path) -> None:
    files = ["train/ok/0000.bmp", "test/ok/0001.bmp", "test/ko/0000.bmp", "ground_truth/ko/0000.png"]
    data = load_mvtec(make(tmp_path / "01", files))
    assert data.truth.defect_types == ("good", "good", "ko")
    assert mask_names(data) == {"test/ko/0000.bmp": "ground_truth/ko/0000.png"}


def test_mvtec_without_train_is_fine_for_evaluation(tmp_path: Path) -> None:
    data = load_mvtec(make(tmp_path, [f for f in BOTTLE if not f.startswith("train")]))
    assert len(data.train_ids) == 0
    assert data.test_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("drop", "add", "expected"),
    [
        ("test/good", [], "no test/good.*Expected train/good .*Found in test: broken_large, contamination"),
        ("test/", ["test/good/0.png"], "no test/DEFECT_TYPE"),
        ("test/", [], "neither a folder test nor categories.*Expected train/good"),
        ("test/contamination", ["test/contamination/"], "No images in .*test/contamination"),
        ("train", ["train/good/"], "No images in .*train/good"),
        ("train", ["train/0.png"], "train' must hold the one folder good. Found: no folders"),
        ("-", ["train/bad/0.png"], "must hold the one folder good. Found: bad, good"),
        ("-", ["ground_truth/brokn/000_mask.png"], "without images of that defect type: brokn.*broken_large"),
        ("-", ["test/contamination/000.jpg"], "more than one image: contamination/000_mask.png .contamination/000.jpg"),
    ],
)
def test_bad_mvtec_trees_say_what_was_expected(tmp_path: Path, drop: str, add: list[str], expected: str) -> None:
    make(tmp_path, [f for f in BOTTLE if not f.startswith(drop)] + add)
    with pytest.raises(InputError, match=expected):
        load_mvtec(tmp_path)


def test_several_categories_need_a_name(tmp_path: Path) -> None:
    for category in ("bottle", "cable"):
        make(tmp_path / category, BOTTLE)
    with pytest.raises(InputError, match=r"2 categories. Name one: bottle, cable\."):
        load_mvtec(tmp_path)
    with pytest.raises(InputError, match=r"Unknown category 'botle'. Did you mean 'bottle'"):
        load_mvtec(tmp_path, "botle")
    data = load(tmp_path, category="cable")
    assert (data.name, data.images.names[0]) == ("cable", "train/good/000.png")


def test_a_stray_mask_is_reported_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, [*BOTTLE, "ground_truth/contamination/999_mask.png", "ground_truth/good/000_mask.png"])
    with caplog.at_level(logging.WARNING, "flawsift"):
        data = load_mvtec(tmp_path)
    assert len(data.truth.masks) == 2
    [message] = [r.getMessage() for r in caplog.records]
    assert message.startswith("1 masks in")
    assert "contamination/999_mask.png" in message


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_labelled_folder_with_groups(tmp_path: Path) -> None:
    make(tmp_path / "tile", TILE)
    rows = ["file,group", "normal/exp1_num_1.jpg,a", "defect/crack/exp1_num_7.jpg,a"]
    (tmp_path / "tile" / "groups.csv").write_text("\n".join(rows))
    data = load_labelled(tmp_path / "tile")
    assert data.name == "tile"
    assert data.images.names == TILE[:4]
    assert data.truth.defect_types == ("good", "good", "crack", "fray")
    assert data.images.groups == {0: "a", 2: "a"}
    assert mask_names(data) == dict(zip(TILE[2:4], TILE[4:], strict=True))
    assert len(data.train_ids) == len(data.test_ids) == 0


def test_groups_of_files_that_are_gone_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, TILE)
    (tmp_path / "groups.csv").write_text("file,group\nnormal/exp1_num_1.jpg,a\nnormal/gone.jpg,a\n")
    with caplog.at_level(logging.WARNING, "flawsift"):
        assert load_labelled(tmp_path).images.groups == {0: "a"}
    assert "1 of 2 groups are about no image here: normal/gone.jpg." in caplog.text


def test_folders_side_by_side_share_their_parent_as_root(tmp_path: Path) -> None:
    make(tmp_path, ["a/ok/1.png", "b/2.png", "b/deep/3.png"])
    data = load_folder(tmp_path / "a" / "ok", defect=tmp_path / "b", name="mine")
    assert data.name == "mine"
    assert data.images.names == ["a/ok/1.png", "b/2.png", "b/deep/3.png"]
    assert data.truth.defect_types == ("good", "defect", "deep")
    assert data.images.image(2).size == (4, 3)


def test_bad_labelled_folders_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder defect. Expected normal .*DEFECT_TYPE.*Found: mask, normal"):
        load(make(tmp_path / "1", [f for f in TILE if not f.startswith("defect")]))
    with pytest.raises(InputError, match=r"No images in .*normal"):
        load(make(tmp_path / "2", ["normal/", "defect/crack/1.png"]))
    with pytest.raises(InputError, match="under a name that means normal"):
        load(make(tmp_path / "3", [*TILE, "defect/good/1.png"]))
    with pytest.raises(InputError, match="lie within each other"):
        load_folder(tmp_path / "3", defect=tmp_path / "3" / "defect")
    with pytest.raises(InputError, match="masks without a defect folder"):
        load_folder(tmp_path / "3" / "normal", masks=tmp_path / "3" / "mask")
    (tmp_path / "2" / "groups.csv").write_text("file,group\n1.png,a\n")
    make(tmp_path / "2", ["normal/1.png"])
    with pytest.raises(InputError, match=r"name none of the 2 images: one of them is 1.png, an image is normal/1.png"):
        load(tmp_path / "2")


@pytest.mark.parametrize(("normal", "defect"), [("good", "bad"), ("OK", "NOK"), ("ok", "defect"), ("normal", "Bad")])
def test_labelled_folders_may_have_other_usual_names(normal: str, defect: str, tmp_path: Path) -> None:
    make(tmp_path, [f"{normal}/1.png", f"{normal}/2.png", f"{defect}/crack/3.png", f"{defect}/4.png"])
    data = load(tmp_path)
    assert data.images.names == [f"{normal}/1.png", f"{normal}/2.png", f"{defect}/4.png", f"{defect}/crack/3.png"]
    assert data.truth.labels.tolist() == [0, 0, 1, 1]
    assert data.truth.defect_types == ("good", "good", "defect", "crack")


def test_two_folders_of_good_images_are_refused(tmp_path: Path) -> None:
    make(tmp_path, ["good/1.png", "ok/1.png", "bad/2.png"])
    with pytest.raises(InputError, match="has more than one folder normal: good, ok. Expected"):
        load(tmp_path)


def test_a_plain_folder_is_unlabelled(tmp_path: Path) -> None:
    make(tmp_path, ["test/b.png", "a.png"])
    data = load(tmp_path)
    assert data.images.names == ["a.png", "test/b.png"]
    assert len(data.truth) == 0
    assert data.select([1]).images.names == ["test/b.png"]
    assert load_unlabelled(tmp_path).name == tmp_path.name


@pytest.mark.parametrize(("good", "bad"), [("good", "bad"), ("OK", "NOK"), ("ok", "scratch")])
def test_a_folder_that_is_sorted_into_kinds(tmp_path: Path, good: str, bad: str) -> None:
    make(tmp_path, [f"{good}/b.png", f"{good}/deep/a.png", f"{bad}/a.png", "zone/x.png", "masks/a.png"])
    data = load(tmp_path)
    assert data.images.names == sorted([f"{good}/b.png", f"{good}/deep/a.png", f"{bad}/a.png", "zone/x.png"])
    known = dict(zip(data.images.names, data.truth.defect_types, strict=True))
    assert known == {f"{good}/b.png": "good", f"{good}/deep/a.png": "good", f"{bad}/a.png": bad, "zone/x.png": "zone"}
    assert [t != "good" for t in data.truth.defect_types] == data.truth.labels.tolist()
    assert not data.truth.masks


def test_bad_sorted_folders_say_what_was_expected(tmp_path: Path) -> None:
    make(tmp_path / "a", ["good/a.png", "bad/a.png", "loose.png"])
    with pytest.raises(InputError, match=r"1 images lie beside the folders bad, good .*: loose.png. Move each"):
        load(tmp_path / "a")
    make(tmp_path / "b", ["good/a.png"])
    (tmp_path / "b" / "bad").mkdir()
    with pytest.raises(InputError, match="No images in .*bad"):
        load(tmp_path / "b")
    make(tmp_path / "c", ["fine/a.png"])
    with pytest.raises(InputError, match="has no folder good or ok. Found: fine"):
        load_sorted(tmp_path / "c")


def test_names_keep_the_links_they_were_reached_by(tmp_path: Path) -> None:
    make(tmp_path / "store-7", TILE)
    (tmp_path / "tile").symlink_to("store-7")
    data = load_labelled(tmp_path / "tile")
    assert (data.name, data.images.names[0]) == ("tile", TILE[0])


# ---- load ------------------------------------------------------------------------------------------------------------


def test_load_suggests_names_options_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAWSIFT_DATA", raising=False)
    with pytest.raises(InputError, match=r"Unknown data set 'elvp'. Did you mean 'elpv'.*no folder either"):
        load("elvp")
    with pytest.raises(InputError, match="nowhere' does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"\./nowhere|nowhere' does not exist"):
        load("./nowhere")
    with pytest.raises(ParameterError, match=r"Unknown option of the data set synthetic 'n_norml'.*'n_normal'"):
        load("synthetic", n_norml=3)
    with pytest.raises(ParameterError, match="Unknown option of an unlabelled folder 'category'"):
        load(make(tmp_path, ["a.png"]), category="bottle")
    with pytest.raises(InputError, match=r"Where is the data set 'cookie'.*cookie/normal.*FLAWSIFT_DATA"):
        load("cookie")


def test_load_finds_prepared_sets_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "cookie", TILE)
    monkeypatch.setenv("FLAWSIFT_DATA", str(tmp_path))
    assert load("cookie").name == "cookie"
    assert load("cookie").images.names == TILE[:4]
    with pytest.raises(InputError, match="magnetic_tile' does not exist"):
        load("magnetic_tile")
    assert load("magnetic_tile", root=tmp_path / "cookie").name == "magnetic_tile"


def test_screws_are_a_set_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAWSIFT_DATA", raising=False)
    with pytest.raises(InputError, match=r"Where is the data set 'screw'.*mvtec-ad.*screw/normal.*FLAWSIFT_DATA"):
        load("screw")
    with pytest.raises(ParameterError, match="Unknown option of the data set screw 'category'"):
        load("screw", category="screw")
    make(tmp_path / "screw", TILE)
    monkeypatch.setenv("FLAWSIFT_DATA", str(tmp_path))
    data = load("screw")
    assert (data.name, data.images.names) == ("screw", TILE[:4])
    assert mask_names(data) == dict(zip(TILE[2:4], TILE[4:], strict=True))
    assert load("screw", root=make(tmp_path / "elsewhere", TILE)).name == "screw"


def test_papers_are_categories_below_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAWSIFT_DATA", raising=False)
    paper, other = CATEGORIES["piped"][:2]
    with pytest.raises(InputError, match=rf"Where is .*'piped/{paper}'.*bianconif/PIPED.*piped/{paper}/normal"):
        load("piped", category=paper)
    with pytest.raises(ParameterError, match=rf"piped needs a category: {paper}, {other}, "):
        load("piped")
    with pytest.raises(InputError, match=rf"Unknown category of piped 'PA_BDP01'. Did you mean '{paper}'"):
        load("piped", category="PA_BDP01")
    make(tmp_path / "piped" / paper, TILE)
    monkeypatch.setenv("FLAWSIFT_DATA", str(tmp_path))
    data = load("piped", category=paper)
    assert (data.name, data.images.names) == (paper, TILE[:4])
    assert mask_names(data) == dict(zip(TILE[2:4], TILE[4:], strict=True))
    with pytest.raises(InputError, match=f"piped/{other}' does not exist"):
        load("piped", category=other)
    monkeypatch.delenv("FLAWSIFT_DATA")
    assert load("piped", category=paper, root=tmp_path / "piped").images.names == TILE[:4]


def test_load_recognises_incomplete_mvtec_trees(tmp_path: Path) -> None:
    data = load(make(tmp_path / "no_masks", [f for f in BOTTLE if not f.startswith("ground_truth")]))
    assert data.truth.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert not data.truth.masks
    with pytest.raises(InputError, match="neither a folder test nor categories"):
        load(make(tmp_path / "no_test", [f for f in BOTTLE if not f.startswith("test")]))


def test_selecting_keeps_ids_and_the_official_split(tmp_path: Path) -> None:
    part = load_mvtec(make(tmp_path, BOTTLE)).select([4, 0, 3])
    assert part.images.ids.tolist() == part.truth.ids.tolist() == [4, 0, 3]
    assert part.truth.defect_types == ("broken_large", "good", "broken_large")
    assert (part.train_ids.tolist(), part.test_ids.tolist()) == ([0], [3, 4])


# ---- named sets ------------------------------------------------------------------------------------------------------


def test_magnetic_tile_blank_masks_and_suspects(tmp_path: Path) -> None:
    make(tmp_path, TILE)
    with pytest.raises(InputError, match=r"suspect_normals.txt"):
        load_magnetic_tile(tmp_path, drop_suspects=True)
    (tmp_path / "empty_masks.txt").write_text("mask/fray/exp1_num_8.png\n")
    (tmp_path / "suspect_normals.txt").write_text("normal/exp1_num_1.jpg\n")
    data = load_magnetic_tile(tmp_path)
    assert mask_names(data) == {TILE[2]: TILE[4]}
    assert data.truth.labels.tolist() == [0, 0, 1, 1]
    part = load_magnetic_tile(tmp_path, drop_suspects=True)
    assert part.images.ids.tolist() == part.truth.ids.tolist() == [1, 2, 3]
    assert part.images.names == TILE[1:4]


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with one cell of each probability and type."""
    kinds = [(p, t) for p in ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0") for t in ("mono", "poly")]
    files = [f"images/cell{i:04d}.png" for i in range(1, len(kinds) + 1)]
    make(tmp_path, files)
    lines = [f"{f}  {p}   {t}" for f, (p, t) in zip(files, kinds, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(elpv_module, "_find_data", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "ids", "labels"),
    [
        ({}, [0, 1, 6, 7], [0, 0, 1, 1]),
        ({"cell_type": "poly"}, [1, 7], [0, 1]),
        ({"ambiguous": "threshold"}, list(range(8)), [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"ambiguous": "threshold", "threshold": 0.0}, list(range(8)), [0, 0, 1, 1, 1, 1, 1, 1]),
        ({"ambiguous": "threshold", "threshold": 0.9, "cell_type": "mono"}, [0, 2, 4, 6], [0, 0, 0, 1]),
    ],
)
def test_elpv_options(cells: Path, options: dict[str, Any], ids: list[int], labels: list[int]) -> None:
    data = load_elpv(**options)
    assert data.images.ids.tolist() == data.truth.ids.tolist() == ids
    assert data.truth.labels.tolist() == labels
    assert data.truth.defect_types == tuple("defective" if v else "good" for v in labels)


def test_elpv_errors(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"threshold": 1.0}, {"threshold": float("nan")}, {"cell_type": "duo"}, {"ambiguous": "keep"}):
        with pytest.raises(ParameterError, match=rf"load_elpv\.{next(iter(options))} must be"):
            load_elpv(**options)
    (cells / "images" / "cell0003.png").unlink()
    with pytest.raises(InputError, match=r"1 images of elpv-dataset are missing: images/cell0003\.png"):
        load_elpv()
    (cells / "labels.csv").write_text("images/cell0001.png 1.0\n")
    with pytest.raises(InputError, match=r"one line 'images/cellNNNN.png probability type'"):
        load_elpv()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'flawsift\[demo\]'"):
        load_elpv()


@pytest.mark.real
def test_real_elpv() -> None:
    pytest.importorskip("elpv_dataset", exc_type=ImportError)
    data = load("elpv")
    assert (len(data.images), int(data.truth.labels.sum())) == (1508 + 715, 715)
    assert data.images.image(0).size == (300, 300)
    everything = load("elpv", ambiguous="threshold")
    assert (len(everything.images), int(everything.truth.labels.sum())) == (2624, 715 + 106)


@pytest.mark.real
def test_real_prepared_sets() -> None:
    if not (DATA / "magnetic_tile").is_dir() or not (DATA / "cookie").is_dir():
        pytest.skip("no real data: set FLAWSIFT_DATA")
    tiles = load_magnetic_tile(DATA / "magnetic_tile")
    assert (len(tiles.images), int(tiles.truth.labels.sum())) == (952 + 392, 392)
    assert len(tiles.truth.masks) == 392 - 4
    assert len(set(tiles.images.group_names)) == 269
    some = [i for i in tiles.truth.masks if i % 40 == 0]
    assert len(some) > 5
    for i in some:
        width, height = tiles.images.image(i).size
        mask = tiles.truth.mask(i, (height, width))
        assert mask is not None
        assert mask.any()
    assert len(load_magnetic_tile(DATA / "magnetic_tile", drop_suspects=True).images) == 952 - 18 + 392
    cookies = load("cookie", root=DATA / "cookie")
    assert (len(cookies.images), int(cookies.truth.labels.sum()), len(cookies.truth.masks)) == (77, 32, 32)


SCREW_TYPES = {"manipulated_front": 24, "scratch_head": 24, "scratch_neck": 25, "thread_side": 23, "thread_top": 23}


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options", "normal", "types", "size"),
    [("screw", {}, 361, SCREW_TYPES, 512)]
    + [
        ("piped", {"category": paper}, normal, {"impurity": 48}, 128)
        for paper, normal in zip(CATEGORIES["piped"], (47, 44, 47, 44, 48, 48), strict=True)
    ],
)
def test_real_screws_and_papers(
    name: str, options: dict[str, str], normal: int, types: dict[str, int], size: int
) -> None:
    if not (DATA / name).is_dir():
        pytest.skip("no real data: set FLAWSIFT_DATA")
    data = load(name, root=DATA / name, **options)
    assert Counter(data.truth.defect_types) == {"good": normal, **types}
    assert sorted(data.truth.masks) == data.truth.ids[data.truth.labels == 1].tolist()
    files = mask_names(data)
    assert all(Path(i).stem == Path(m).stem and i.split("/")[1] == m.split("/")[1] for i, m in files.items())
    for i in list(data.truth.masks)[::8]:
        assert data.images.image(i).size == (size, size)
        mask = data.truth.mask(i, (size, size))
        assert mask is not None
        assert 0 < mask.mean() < 0.5  # white is the defect, not the background


# ---- synthetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texture", TEXTURES)
def test_every_synthetic_defect_is_visible_and_its_mask_is_exact(texture: str) -> None:
    for seed in range(200):
        pair = Product(size=20, seed=seed, texture=texture, align=seed % 3 > 0).anomalous(seed % 5)
        assert pair.mask.any()
        assert contrast(pair.clean, pair.defective, pair.mask) >= MIN_CONTRAST
        assert np.array_equal(pair.clean[~pair.mask], pair.defective[~pair.mask])
        # a defect is a place, not the whole image, and shows as what it is called: nothing had to be forced
        assert pair.mask.mean() < 0.2
        step = np.abs(pair.defective[pair.mask].astype(int) - pair.clean[pair.mask])
        assert not (step == FORCED).all()


def test_a_defect_that_cannot_be_drawn_visibly_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for mask in (np.zeros((32, 32), np.bool_), np.eye(32, dtype=np.bool_)):

        def invisible(clean: Any, stream: np.random.Generator, mask: Any = mask) -> tuple[Any, Any]:
            return clean.astype(np.float64), mask.copy()

        monkeypatch.setattr(synthetic_module, "DEFECTS", {"spot": invisible})
        pair = Product(size=32).anomalous(0)
        assert pair.mask.any()
        assert contrast(pair.clean, pair.defective, pair.mask) >= MIN_CONTRAST


@pytest.mark.parametrize("recurring", [False, True])
def test_an_image_does_not_depend_on_how_many_there_are(recurring: bool) -> None:
    options: dict[str, Any] = {"size": 16, "seed": 5, "rare_share": 0.3, "align": False, "recurring": recurring}
    small, large = synthetic(3, 2, **options), synthetic(7, 5, **options)
    for i, j in [(0, 0), (1, 1), (2, 2), (3, 7), (4, 8)]:
        assert small.images.source.digest(i) == large.images.source.digest(j)
        assert small.truth.defect_types[i] == large.truth.defect_types[j]
    for i, j in [(3, 7), (4, 8)]:
        assert np.array_equal(np.asarray(small.truth.masks[i]), np.asarray(large.truth.masks[j]))
    assert small.images.source.digest(0) != small.images.source.digest(1)


def test_seeds_and_textures_differ_and_global_state_is_untouched() -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    first = {(s, t): Product(size=16, seed=s, texture=t).normal(0).tobytes() for s in (0, 1) for t in TEXTURES}
    assert len(set(first.values())) == len(first)
    assert np.array_equal(before, np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002


def test_types_take_turns_unless_one_defect_recurs() -> None:
    assert set(synthetic(1, 4, size=16, seed=2).truth.defect_types[1:]) == set(DEFECTS)
    data = synthetic(1, 4, size=32, seed=2, recurring=True)
    assert len(set(data.truth.defect_types[1:])) == 1
    masks = [np.asarray(m) for m in data.truth.masks.values()]
    # redraws look at each product, so places may differ now and then, but not as a rule
    assert all(np.array_equal(masks[0], m) for m in masks)
    assert data.images.source.digest(1) != data.images.source.digest(2)


def test_aligned_images_resemble_each_other_and_the_rare_variant_does_not() -> None:
    def distance(a: Any, b: Any) -> float:
        return float(np.abs(a.astype(float) - b.astype(float)).mean())

    for texture in TEXTURES:
        fixed = Product(size=32, seed=1, texture=texture, rare_share=0.5)
        loose = Product(size=32, seed=1, texture=texture, align=False)
        same = distance(fixed.normal(0), fixed.normal(2))
        assert same < 25  # noise and lighting
        assert distance(loose.normal(0), loose.normal(2)) > 1.3 * same
        assert distance(fixed.normal(0), fixed.normal(1)) > 1.3 * same
        assert distance(fixed.normal(1), fixed.normal(3)) < 25


def test_loose_products_are_shifted_too() -> None:
    def centred(align: bool) -> int:
        plate = Product(size=24, seed=1, texture="plate", align=align)
        return sum(plate.normal(i)[12, 12].mean() > 110 for i in range(20))

    assert centred(align=True) == 20  # turning alone keeps a plate in the middle
    assert 0 < centred(align=False) < 20


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.29, 1.0])
def test_rare_share_is_exact(share: float) -> None:
    assert len(rare_ids(200, share)) == round(200 * share)
    assert rare_ids(50, share).tolist() == [i for i in rare_ids(200, share).tolist() if i < 50]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"seed": -1}, "seed must be 0 or larger"),
        ({"texture": "strips"}, "Unknown texture 'strips'. Did you mean 'stripes'"),
        ({"rare_share": 1.5}, r"rare_share must be in \[0, 1\]"),
        ({"n_normal": 0, "n_anomalous": 0}, "at least one image"),
        ({"n_normal": -1}, "at least one image"),
    ],
)
def test_synthetic_parameters_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ParameterError, match=expected):
        synthetic(**options)


def test_written_trees_read_back(tmp_path: Path) -> None:
    data = synthetic(5, 4, size=16, seed=3)
    read = load(write_mvtec(data, tmp_path / "product"))
    assert (read.name, len(read.train_ids), len(read.test_ids)) == ("product", 3, 6)
    for i in read.images.ids.tolist():
        original = int(Path(read.images.source.name(i)).stem)
        assert np.array_equal(np.asarray(read.images.image(i)), np.asarray(data.images.image(original)))
        assert read.truth.defect_types[i] == data.truth.defect_types[original]
        mask, expected = read.truth.mask(i, (16, 16)), data.truth.mask(original, (16, 16))
        assert mask is not None
        assert expected is not None
        assert np.array_equal(mask, expected)
    flat = load(write_folder(data, tmp_path / "flat"))
    assert len(flat.truth) == 0
    assert np.array_equal(flat.images.pixels(16), data.images.pixels(16))
    with pytest.raises(OutputError, match="flat' is not an empty folder"):
        write_mvtec(data, tmp_path / "flat")
    with pytest.raises(ParameterError, match="train_share"):
        write_mvtec(data, tmp_path / "other", train_share=2)
    assert not (tmp_path / "other").exists()
    assert not (write_mvtec(data, tmp_path / "test_only", train_share=0) / "train").exists()


# ---- several masks, and pages ----------------------------------------------------------------------------------------


def test_loco_has_several_masks_of_one_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = ["test/good/000.png", "test/logical/000.png", "test/logical/001.png", "test/logical/002.png"]
    masks = ["logical/000/000.png", "logical/000/001.png", "logical/001/000.png", "logical/009/000.png"]
    data = load_mvtec(make(tmp_path, [*files, *(f"ground_truth/{mask}" for mask in masks)]))
    found = {data.images.source.name(i): mask for i, mask in data.truth.masks.items()}
    folder = tmp_path / "ground_truth" / "logical"
    assert found == {
        "test/logical/000.png": [folder / "000" / "000.png", folder / "000" / "001.png"],
        "test/logical/001.png": folder / "001" / "000.png",
    }
    assert "1 masks in" in caplog.text
    assert "logical/009/000.png" in caplog.text


def test_pages_of_labelled_images_have_the_pages_of_their_mask(tmp_path: Path) -> None:
    def write(name: str, n_pages: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pages = [Image.new("L", (4, 3), 20 * i + 7) for i in range(n_pages)]
        pages[0].save(path, save_all=True, append_images=pages[1:])

    for name, n_pages in (("test/good/0.tif", 2), ("test/bad/0.tif", 2), ("test/bad/1.tif", 2)):
        write(name, n_pages)
    write("ground_truth/bad/0_mask.tif", 2)
    write("ground_truth/bad/1_mask.tif", 1)
    data = load_mvtec(tmp_path)
    assert data.images.names[:3] == ["test/good/0.tif#page=1", "test/good/0.tif#page=2", "test/bad/0.tif#page=1"]
    assert list(data.images.members.values()) == [[0, 1], [2, 3], [4, 5]]
    assert mask_names(data) == {
        "test/bad/0.tif#page=1": "ground_truth/bad/0_mask.tif#page=1",
        "test/bad/0.tif#page=2": "ground_truth/bad/0_mask.tif#page=2",
    }
    assert np.asarray(data.images.image(3))[0, 0, 0] == 27
