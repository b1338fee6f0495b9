"""The report of a screening and of a fit: what it says, and that it is one safe file."""

import html
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model
from flawsift.reports.screening import screening_report, write_fit_report, write_screening_report
from flawsift.screening.consensus import Contamination
from flawsift.screening.result import SubModelScores
from flawsift.testing import tiny_backbone
from tests.reports.material import MARKUP, N, Page, make_screening, noise, picture, ranked, render, words


def test_suspects_are_in_rank_order_with_their_numbers(images: ImageSet) -> None:
    screening = make_screening(images)
    page = Page(screening_report(screening, images, n_suspects=11))
    assert page.names("suspects") == ranked(screening)[:11]
    best = int(np.argmax(screening.consensus))
    text = words(page.cards["suspects"][0]["text"])
    assert f"Rank 1, consensus {screening.consensus[best]:.4g} set aside" in text
    assert f"Consensus {screening.consensus[best]:.4g}" in text
    assert f"Held-out score {screening.held_out_scores[best]:.4g}" in text
    assert "Sub-models agreeing 4 of 4" in text
    states = ["set aside" if "set aside" in card["text"] else "kept" for card in page.cards["suspects"]]
    assert states == ["set aside"] * 8 + ["kept"] * 3
    assert "cut: images from here on were kept" in page.cards["suspects"][7]["text"]


def test_pictures_belong_to_their_cards(images: ImageSet) -> None:
    flat = ImageSet.from_arrays([np.full((8, 16, 3), 6 * i, np.uint8) for i in range(N)])
    screening = make_screening(flat)
    for card in Page(screening_report(screening, flat, n_suspects=8)).cards["suspects"]:
        shown = np.asarray(picture(card["images"][0]["src"]).convert("L"))
        assert shown.shape == (8, 16)
        assert abs(shown.mean() - 6 * list(screening.names).index(card["name"].strip())) < 2


def test_borderline_shows_both_sides_of_the_cut(images: ImageSet) -> None:
    screening = make_screening(images)
    page = Page(screening_report(screening, images, n_suspects=2, n_borderline=6))
    assert page.names("borderline") == ranked(screening)[5:11]
    assert "6 more were set aside" in words(page.text["suspects"])


@pytest.mark.parametrize(("n_removed", "n_borderline", "shown"), [(3, 8, (3, 4)), (5, 3, (1, 2)), (39, 4, (2, 1))])
def test_borderline_takes_what_there_is(
    images: ImageSet, n_removed: int, n_borderline: int, shown: tuple[int, int]
) -> None:
    screening = make_screening(images, n_removed)
    page = Page(screening_report(screening, images, n_suspects=1, n_borderline=n_borderline))
    assert page.names("borderline") == ranked(screening)[n_removed - shown[0] : n_removed + shown[1]]


def test_an_edited_selection_has_no_line_between_the_suspects(images: ImageSet) -> None:
    screening = make_screening(images)
    first = int(screening.removed[0])
    edited = replace(screening, kept=np.append(screening.kept, first))
    text = words(" ".join(card["text"] for card in render(edited, images, 12).cards["suspects"]))
    assert "cut: images from here on" in words(render(screening, images, 12).text["suspects"])
    assert "cut: images from here on" not in text


def test_headline_and_estimate(images: ImageSet) -> None:
    text = words(render(make_screening(images), images).text[""])
    assert "Of 40 images, 8 look defective and were set aside; 32 were kept." in text
    numbers = words(render(make_screening(images), images).text["scores"])
    assert "Estimated share of defective images: 20 % (between 15 and 26 %)." in numbers
    one = words(render(make_screening(images, 1), images).text[""])
    assert "1 looks defective and was set aside; 39 were kept." in one


def test_the_page_says_what_becomes_of_suspect_patches(images: ImageSet) -> None:
    rejected = np.zeros((len(images), 4, 6), bool)
    rejected[10, :3] = True
    kept = images.ids[5:]
    screening = make_screening(images, kept=kept, rejected=rejected)
    text = words(render(screening, images).text["scores"])
    assert "Of the kept images, the 2.1 % of the patches that look least like the others are suspect" in text
    none = replace(screening, rejected=np.zeros_like(rejected))
    assert "are suspect" not in words(render(none, images).text["scores"])


JARGON = ("consensus", "held-out", "sub-model", "robust", "quantile", "AUROC", "interval", "patch")


def test_the_first_screen_says_what_was_found_and_what_to_do_in_plain_words(images: ImageSet) -> None:
    page = render(make_screening(images), images)
    text = words(page.text[""])
    assert "8 look defective" in text
    assert "Next: look at the suspects below and say of each whether it is defective." in text
    assert not [word for word in JARGON if word.lower() in text.lower()]
    assert [section for section in page.text if section][:2] == ["suspects", "borderline"]
    assert "Next: look at the first images below" in words(render(make_screening(images, 0), images).text[""])


@pytest.mark.parametrize(
    ("interval", "doubt"), [((0.15, 0.26), False), ((0.0, 0.0), False), ((0.0, 0.5), True), ((0.0, 0.03), True)]
)
def test_the_first_screen_says_where_the_images_do_not_tell(
    images: ImageSet, interval: tuple[float, float], doubt: bool
) -> None:
    screening = make_screening(images, 0, contamination=Contamination(interval[1] / 2, "mixture", {}, interval))
    text = words(render(screening, images).text[""])
    assert ("The images do not tell whether some are defective." in text) == doubt


def test_a_share_set_by_the_user_is_not_called_an_estimate(images: ImageSet) -> None:
    text = words(render(make_screening(images, 24, contamination=None), images).text[""])
    assert "the 24 most unusual were set aside; 16 were kept" in text
    assert "(60 %) was set by the user" in text
    assert "look defective" not in text
    assert "Estimated" not in text
    less = replace(make_screening(images, 24, contamination=None), kept=images.ids[:4])  # a person removed more
    assert "(60 %) was set by the user" in words(render(less, images).text[""])


def test_markup_in_names_is_text(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    order = np.array([2.0 if name == MARKUP else 1.0 if name == "a & b.png" else 0.0 for name in files.names])
    screening = make_screening(files, consensus=order, unreadable={"<b>x</b>.png": "<i>why</i>"})
    screening = replace(screening, kept=files.ids[order == 0], provenance={"<script>": "<script>alert(1)</script>"})
    text = screening_report(screening, files)
    page = Page(text)
    assert page.names("suspects")[:2] == [MARKUP, "a & b.png"]
    assert {values["src"][:5] for values in page.tags("img")} == {"data:"}
    assert not any(key.startswith("on") for _, values in page.elements for key in values)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}
    assert "<b>x</b>.png" in page.text["unreadable"]
    assert "<i>why</i>" in page.text["unreadable"]


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path, images: ImageSet) -> None:
    names = [f"caf\udce9-{i}.png" for i in range(N)]
    files = ImageSet.from_files(tmp_path, dict(enumerate(names)))
    path = write_screening_report(make_screening(files, unreadable={"\udcff.png": "bad"}), files, tmp_path)
    text = html.unescape(path.read_text("utf-8"))
    assert "caf\\udce9-" in text
    assert "\\udcff.png" in text


def test_page_needs_nothing_but_itself(images: ImageSet) -> None:
    text = screening_report(make_screening(images), images)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    loaded = [values[key] for _, values in page.elements for key in ("src", "srcset", "href", "data") if key in values]
    assert loaded
    assert all(address.startswith(("data:image/", "#")) for address in loaded)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    targets = {values["id"] for _, values in page.elements if "id" in values}
    assert {values["href"][1:] for values in page.tags("a")} <= targets


def test_pictures_and_drawings_have_a_text_alternative(images: ImageSet) -> None:
    grids = np.zeros((N, 4, 5), np.float16)
    grids[:, 3, 0] = 1  # bottom left
    page = render(make_screening(images, patch_maps=grids), images)
    assert all(values["alt"] for values in page.tags("img"))
    heatmap = page.cards["suspects"][0]["images"][1]
    assert "10 % from the left and 88 % from the top" in heatmap["alt"]
    svg = page.tags("svg")[0]
    assert svg["role"] == "img"
    assert svg["aria-labelledby"].split() == ["histogram-title", "histogram-text"]


def test_unreadable_files_are_listed_up_to_a_limit(images: ImageSet) -> None:
    page = render(make_screening(images, unreadable={"x/1.png": "empty file (0 bytes)"}), images)
    assert "x/1.png" in page.text["unreadable"]
    assert "empty file (0 bytes)" in page.text["unreadable"]
    assert "more in" not in page.text["unreadable"]
    assert "1 file could not be read." in page.text[""]
    many = {f"bad-{i}.png": "damaged" for i in range(207)}
    shown = render(make_screening(images, unreadable=many), images).text["unreadable"]
    assert shown.count("damaged") == 200
    assert "and 7 more in" in shown
    assert "All files could be read." in render(make_screening(images), images).text["unreadable"]


def test_parameters_and_next_steps_are_there(images: ImageSet) -> None:
    page = render(make_screening(images), images)
    rows = words(page.text["details"])
    for expected in ("options.n_subsets 5", "detector.params.coreset_ratio 0.1", "detector.params.layers a, b"):
        assert expected in rows
    assert "flawsift fit IMAGES --out MODEL --screening DIR" in page.text["next"]


def test_nothing_removed(images: ImageSet) -> None:
    screening = make_screening(images, 0, contamination=Contamination(0.0, "mixture of two laws", {}, (0.0, 0.0)))
    page = render(screening, images, 24)
    assert "Of 40 images, none was set aside; all were kept." in page.text[""]
    assert page.names("suspects") == ranked(screening)[:24]
    assert page.names("borderline") == []
    assert "there is no cut" in page.text["borderline"]
    assert not [values for values in page.tags("line") if values["class"] == "cut"]


def test_without_grids_only_thumbnails(images: ImageSet) -> None:
    page = render(make_screening(images, patch_maps=None), images)
    assert {len(card["images"]) for card in page.cards["suspects"]} == {1}
    with_maps = render(make_screening(images), images)
    assert {len(card["images"]) for card in with_maps.cards["suspects"]} == {2}


def test_lines_surround_what_is_set_aside_and_not_each_kept_image() -> None:
    grey = ImageSet.from_arrays([np.full((64, 64, 3), 128, np.uint8)] * N)
    maps = np.zeros((N, 4, 6), np.float16)
    maps[:, 1, 2] = 1 + 0.01 * np.arange(N)
    screening = make_screening(grey)
    maps[~screening.is_kept] -= 0.5  # lower than on any kept one
    page = Page(screening_report(replace(screening, patch_maps=maps), grey, n_suspects=N, n_borderline=0))
    lined = {}
    for card in page.cards["suspects"]:
        whites = (np.asarray(picture(card["images"][1]["src"])).min(2) > 240).any()
        lined[card["name"]] = bool(whites), "set aside" in card["text"]
    assert len(lined) == N
    assert all(line for line, aside in lined.values() if aside)
    assert sum(line for line, aside in lined.values() if not aside) <= 1, "the highest of 32"


def test_a_vanished_file_is_named_without_a_picture(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files)
    gone = ranked(screening)[1]
    (folder / gone).unlink()
    cards = render(screening, files).cards["suspects"]
    assert [len(card["images"]) for card in cards[:3]] == [2, 0, 2]
    assert "cannot be read: No such file" in cards[1]["text"]
    assert cards[1]["name"].strip() == gone


def test_another_set_is_refused(folder: Path, images: ImageSet) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files)
    (folder / files.names[0]).unlink()
    (folder / "zzz.png").write_bytes((folder / files.names[1]).read_bytes())
    with pytest.raises(InputError, match="40 ids of the screening belong to other images"):
        screening_report(screening, ImageSet.from_folder(folder))
    with pytest.raises(InputError, match="not in this set"):
        screening_report(screening, images)


def test_size_is_bounded_with_thousands_of_large_images(tmp_path: Path) -> None:
    worst = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)  # noise does not compress
    large = ImageSet.from_arrays([worst] * 5000)
    path = write_screening_report(make_screening(large, 300), large, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    page = Page(path.read_text("utf-8"))
    assert len(page.tags("img")) == 3 * (24 + 8) + 3 * 24
    assert picture(page.tags("img")[0]["src"]).size == (320, 320)
    assert path.stat().st_size < 15e6
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_and_constant_sets(n: int) -> None:
    tiny = ImageSet.from_arrays(noise(n, edge=1))
    screening = replace(
        make_screening(tiny, 0),
        consensus=np.zeros(n),
        submodels=SubModelScores(np.zeros((1, n), np.int64), np.ones((1, n), np.float32)),
        patch_maps=np.zeros((n, 1, 1), np.float16),
        contamination=Contamination(0.0, "none: too few or constant scores", {}),
    )
    page = render(screening, tiny)
    assert len(page.names("suspects")) == n
    assert "could not be estimated (too few or constant scores)" in page.text[""]


def test_typical_look_alikes_stand_beside_each_suspect(images: ImageSet) -> None:
    screening = make_screening(images)
    order = np.argsort(-screening.consensus)
    suspect, ordinary = int(order[0]), order[-16:]  # half of the 32 kept ones
    descriptions = np.zeros((N, 5), np.float16)
    descriptions[suspect] = descriptions[order[1]] = descriptions[order[9]] = 9  # a suspect, and a kept but unusual one
    descriptions[ordinary[5]], descriptions[ordinary[3]], descriptions[ordinary[8]] = 3, 2, 1
    page = render(replace(screening, descriptions=descriptions), images)
    shown = [values["alt"] for values in page.cards["suspects"][0]["alike"]]
    assert shown == [f"Typical image {screening.names[p]}" for p in (ordinary[5], ordinary[3], ordinary[8])]
    assert not any(card["alike"] for card in page.cards["borderline"])
    without = render(replace(screening, descriptions=None), images)
    assert not any(card["alike"] for card in without.cards["suspects"])


def test_a_look_alike_that_has_vanished_is_left_out(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files)
    before = [values["alt"] for values in render(screening, files).cards["suspects"][0]["alike"]]
    (folder / before[1].removeprefix("Typical image ")).unlink()
    after = [values["alt"] for values in render(screening, files).cards["suspects"][0]["alike"]]
    assert after == [before[0], before[2]]


def test_details_show_nested_values_as_text(images: ImageSet) -> None:
    provenance: Mapping[str, Any] = {"versions": {"torch": "9.9"}, "seconds": 1.5, "nothing": None}
    rows = words(render(make_screening(images, provenance=provenance), images).text["details"])
    for expected in ("versions.torch 9.9", "seconds 1.5", "nothing none"):
        assert expected in rows


def test_the_report_of_a_fit_names_its_threshold_and_decisions(folder: Path, tmp_path: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files, contamination=None, provenance={"images_root": str(folder)})
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    back = names[int(screening.removed[0])]
    training = {"n_kept": 33, "decisions": {"keep": 1, "remove": 0, "unsure": 0, "elsewhere": 0}, "seed": 7}
    model = Model(make_detector("padim"), tiny_backbone(), Calibration.of([100.0, 101.0, 123.5]), training)
    decided, _ = screening.with_decisions({back: "keep"})
    path = write_fit_report(model, decided, files, tmp_path / "m")
    page = Page(path.read_text("utf-8"))
    assert "Parts that score above 123.5 are stopped: about" in words(page.text[""])
    text = words(page.text["model"])
    assert " was trained on 33 of 40 images; a person decided to keep 1 and to remove 0" in text
    assert "above 123.5" in text
    assert "threshold 123.5" in text
    # the detector is not the screener: its histogram is of its own scores, and nothing was set aside by them
    assert "trained on (3)" in text
    assert "set aside (" not in text
    assert "training.seed 7" in words(page.text["details"])
    assert "kept" in page.cards["suspects"][0]["text"]
    assert page.names("suspects")[0] == back
    assert [values["href"] for values in page.tags("a")].count("#model") == 1
    assert "DIR is the folder screening beside this page, or the one" in words(page.text["next"])
    own = np.sort(screening.held_out_scores[screening.is_kept])
    for scores, shared in ((own, True), (own + 1, False)):  # as many as are kept: of this detector, or of another
        scored = Model(make_detector("padim"), tiny_backbone(), Calibration.of(scores), training)
        path = write_fit_report(scored, screening, files, tmp_path / "m")
        text = words(Page(path.read_text("utf-8")).text["model"])
        assert ("set aside (8)" in text) == shared
        assert ("trained on (32)" in text) != shared
    assert "review the" not in text
    doubtful = replace(scored, calibration=replace(scored.calibration, n_suspects=3))
    page = Page(write_fit_report(doubtful, screening, files, tmp_path / "m").read_text("utf-8"))
    warning = "At least 3 images look defective and still count for the threshold"
    assert warning in words(" ".join(page.text.values()))
    assert "provisional" in page.text["model"]
    first = words(page.text[""])
    assert warning in first, "above everything else"
    assert "are stopped: do not rely on it yet." in first
    bare = Page(screening_report(screening, files))
    assert "model" not in bare.text
    assert "DIR is the folder of this page" in words(bare.text["next"])


@pytest.mark.parametrize("detector", ["padim", "softpatch"])  # the latter has a rule of its own for patches
def test_the_report_of_a_fit_tells_of_suspect_patches_where_they_were_left_out(
    folder: Path, tmp_path: Path, detector: str
) -> None:
    files = ImageSet.from_folder(folder)
    rejected = np.zeros((N, 4, 6), bool)
    rejected[:, 0, 0] = True
    screening = make_screening(files, rejected=rejected)
    model = Model(make_detector(detector), tiny_backbone(), Calibration.of([1.0, 2.0]), {})
    page = Page(write_fit_report(model, screening, files, tmp_path / "m").read_text("utf-8"))
    assert (
        "of the patches that look least like the others" in page.text["scores"]
    ) == model.detector.leaves_out_patches
