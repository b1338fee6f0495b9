"""Crops of patches, and what the report of a screening shows and says of the worst place of an image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.reports.places import EDGE, crop, crop_box, patch_box
from flawsift.reports.screening import screening_report
from flawsift.reports.wording import nearest_text
from flawsift.screening.result import Screening
from tests.reports.material import MARKUP, N, Page, make_evidence, make_screening, picture, ranked, words

GRID = (4, 6)


@st.composite
def patches(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], int]:
    size = (draw(st.integers(1, 900)), draw(st.integers(1, 900)))
    grid = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    return size, grid, draw(st.integers(0, grid[0] * grid[1] - 1))


@given(patches())
def test_a_crop_holds_its_patch_and_lies_within_the_image(case: tuple[tuple[int, int], tuple[int, int], int]) -> None:
    size, grid, place = case
    x0, y0, x1, y1 = crop_box(size, grid, place)
    left, upper, right, lower = patch_box(size, grid, place)
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]
    assert x0 <= left + 1e-6
    assert right <= x1 + 1e-6
    assert y0 <= upper + 1e-6
    assert lower <= y1 + 1e-6
    side = max(48, 3 * max(right - left, lower - upper))
    assert abs(x1 - x0 - min(side, size[0])) <= 0.5
    assert abs(y1 - y0 - min(side, size[1])) <= 0.5
    for start, end, low, high, limit in ((x0, x1, left, right, size[0]), (y0, y1, upper, lower, size[1])):
        if start > 0 and end < limit:  # in the middle, unless the border is near
            assert abs((start + end) - (low + high)) <= 2


@pytest.mark.parametrize("size", [(300, 120), (120, 300), (700, 700)])
@pytest.mark.parametrize("place", [0, 5, 18, 23, 8, 15])  # corners, and two within
def test_a_marked_patch_is_whole_in_its_crop(size: tuple[int, int], place: int) -> None:
    row, column = divmod(place, GRID[1])
    square = Image.new("RGB", (GRID[1], GRID[0]))
    square.putpixel((column, row), (255, 0, 0))
    image = square.resize(size, Image.Resampling.NEAREST)  # as the network sees it, the image is a square
    shown = crop(image, GRID, place)
    red = (np.asarray(shown, np.int64) @ [1, -1, -1]) > 200
    width, height = size[0] / GRID[1], size[1] / GRID[0]
    box = crop_box(size, GRID, place)
    scale = EDGE / max(box[2] - box[0], box[3] - box[1])
    assert max(shown.size) == EDGE
    assert red.sum() == pytest.approx(width * height * scale**2, rel=0.25)  # neither cut off nor stretched
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    ratio = (columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1)
    assert ratio == pytest.approx(width / height, rel=0.15)


def test_small_images_are_shown_whole() -> None:
    assert crop_box((40, 30), (28, 28), 700) == (0, 0, 40, 30)
    assert crop(Image.new("L", (1, 1)), (28, 28), 0).size == (EDGE, EDGE)
    assert crop(Image.new("L", (1000, 1)), (1, 1), 0).size == (EDGE, 1)


def test_that_nothing_is_alike_is_said_only_of_what_stands_out_and_was_set_aside(images: ImageSet) -> None:
    probability = np.where(np.arange(N) < 3, 0.9, 0.2)
    kept = images.ids[[1, *range(4, N)]]  # 0 and 2 are suspects and set aside, 1 is kept, 3 is no suspect
    evidence = make_evidence(images.ids)
    near = evidence.distances[:, 0].astype(float)
    screening = make_screening(images, probability=probability, kept=kept, evidence=evidence)
    repeated = replace(screening, held_out_scores=3 * near)  # something much nearer than k groups are on average
    few = "Few like this in 39 other images. The closest places:"
    assert [nearest_text(repeated, p) for p in (0, 1)] == [few, "The closest places in 39 other images:"]
    screening = replace(screening, held_out_scores=1.5 * near)
    nothing, closest = (
        "Nothing like this in 39 other images. The closest places:",
        "The closest places in 39 other images:",
    )
    assert [nearest_text(screening, p) for p in (0, 1, 2, 3, 10)] == [nothing, closest, nothing, closest, closest]
    assert screening.evidence is not None
    one = replace(screening, evidence=replace(screening.evidence, n_others=np.full(N, 1)))
    assert nearest_text(one, 0) == "Nothing like this in 1 other image. The closest places:"
    none = replace(screening.evidence, image_places=np.full((N, 3), -1))
    assert nearest_text(replace(screening, evidence=none), 0) == ""
    assert nearest_text(replace(screening, evidence=None), 0) == ""


def cards(screening: Screening, images: ImageSet, n: int = 3) -> Any:
    """The page, and for each card of a suspect what it shows: (alternative text, picture)."""
    page = Page(screening_report(screening, images, n_suspects=n))
    shown = [[(i["alt"], picture(i["src"])) for i in card["images"]] for card in page.cards["suspects"]]
    return page, shown


def grey(shown: Image.Image) -> float:
    """The most frequent brightness: of the image, not of the line around the patch."""
    return float(np.bincount(np.asarray(shown.convert("L")).ravel()).argmax())


def test_the_nearest_places_stand_beside_the_worst(images: ImageSet) -> None:
    flat = ImageSet.from_arrays([np.full((200, 300, 3), 6 * i, np.uint8) for i in range(N)], ids=range(100, 100 + N))
    evidence = make_evidence(flat.ids, k=5)
    screening = make_screening(flat, submodels=None, evidence=evidence)
    page, shown = cards(screening, flat)
    for name, pictures in zip(page.names("suspects"), shown, strict=True):
        p = list(screening.names).index(name)
        others = evidence.nearest(p)[:3]
        names = [screening.names[i - 100] for i, _, _ in others]
        assert [alt for alt, _ in pictures[2:]] == [
            f"The most unusual place of {name}",
            *(f"Place in {n}, at distance {d:.4g}" for n, (_, _, d) in zip(names, others, strict=True)),
        ]
        for (_, crop_shown), i in zip(pictures[2:], [p + 100, *(i for i, _, _ in others)], strict=True):
            assert abs(grey(crop_shown) - 6 * (i - 100)) <= 2
            assert max(crop_shown.size) == EDGE
    text = words(page.text["suspects"])
    assert "the closest places in other images, each with its distance" in text
    assert "in 39 other images. The closest places:" in text
    assert "sub-model" not in words(" ".join(page.text.values()))
    assert [values["class"] for values in page.tags("details") if "alike" in values.get("class", "")] == ["alike"] * 3
    near = [i for card in page.cards["borderline"] for i in card["images"] if i["alt"].startswith("Place in")]
    assert near  # where a person has to decide


def test_without_evidence_nothing_is_said_of_places(images: ImageSet) -> None:
    text = screening_report(make_screening(images), images)
    assert "closest" not in text
    assert "most unusual place" not in text
    assert 'class="alike places"' not in text
    assert "<details class" not in text.replace('<details class="panel">', "")
    assert "several models, each trained on another part" in words(text)
    other = words(screening_report(make_screening(images, submodels=None), images))
    assert "Every image is scored without having been learned from." in other
    assert "robust standard deviation" in words(text)
    assert "robust standard deviation" not in other  # of which scale it is, sub-models alone have said


def test_what_cannot_be_read_is_not_shown(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files, evidence=make_evidence(files.ids))
    assert screening.evidence is not None
    first, second = (list(screening.names).index(name) for name in ranked(screening)[:2])
    gone, left = screening.evidence.images[first, 0], screening.evidence.images[first, 1]
    (folder / files.names[list(files.ids).index(gone)]).unlink()
    (folder / files.names[second]).unlink()
    page = Page(screening_report(screening, files, n_suspects=3))
    near = [i["alt"] for i in page.cards["suspects"][0]["images"] if i["alt"].startswith("Place in")]
    assert len(near) == 2
    assert near[0].startswith(f"Place in {files.names[list(files.ids).index(left)]},")
    assert not page.cards["suspects"][1]["images"]
    assert "closest places in" not in page.cards["suspects"][1]["text"]


def test_markup_in_the_names_of_other_images_is_text(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    evidence = make_evidence(files.ids)
    evidence.images[:] = files.ids[list(files.names).index(MARKUP)]
    evidence.image_places[0, -1] = 0
    page = Page(screening_report(make_screening(files, evidence=evidence), files))
    assert any(i["alt"].startswith(f"Place in {MARKUP},") for i in page.tags("img"))
    assert not any(key.startswith("on") for _, values in page.elements for key in values)


def test_evidence_leaves_a_page_small() -> None:
    worst = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)  # noise does not compress
    large = ImageSet.from_arrays([worst] * 300)
    plain = make_screening(large, 50)
    rich = replace(plain, evidence=make_evidence(large.ids, k=9, grid=(28, 28)))
    text = screening_report(rich, large)
    assert len(text) - len(screening_report(plain, large)) < 2.5e6
    assert len(text) < 15e6
