"""What a screening knows of the worst patches: from the ranking to the disk and back, under whatever ids."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.detectors.protocols import Evidence
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Ranking, Screening
from flawsift.screening.stage1 import screen
from flawsift.screening.storage import EVIDENCE, load_screening, matched, save_screening
from tests.reports.material import make_evidence, make_screening, noise

FIELDS = ("places", "images", "image_places", "distances", "n_others")
IDS = [7, 3, 12, 5, 9, 1]  # in no order


def assert_same(found: Evidence | None, expected: Evidence, order: Any = slice(None)) -> None:
    assert found is not None
    assert found.grid == expected.grid
    for name in FIELDS:
        values, wanted = getattr(found, name), getattr(expected, name)
        assert values.dtype == wanted.dtype, name
        np.testing.assert_array_equal(values, wanted[order], err_msg=name)


@pytest.fixture
def images() -> ImageSet:
    return ImageSet.from_arrays(noise(len(IDS)), ids=IDS)


@pytest.fixture
def screening(images: ImageSet) -> Screening:
    return make_screening(images, n_removed=2, evidence=make_evidence(IDS))


def test_what_a_ranking_found_is_in_the_screening(images: ImageSet) -> None:
    made = make_evidence(IDS)

    def rank(*_: object, **__: object) -> Ranking:
        return Ranking(np.arange(6.0), np.arange(6.0), None, evidence=made)

    result = screen(images, make_detector("patchcore"), ScreenOptions(keep=0.5), ranker=rank)
    assert result.evidence is made
    decided, _ = result.with_decisions({result.names[0]: "remove"})
    assert decided.evidence is made


def test_the_nearest_places_are_those_that_there_are() -> None:
    made = make_evidence(IDS)
    assert [i for i, _, _ in made.nearest(0)] == [3, 12]  # the third is none
    assert made.nearest(1) == [
        (int(made.images[1, j]), int(made.image_places[1, j]), float(made.distances[1, j])) for j in range(3)
    ]


def test_saved_in_the_order_of_the_ids_and_read(screening: Screening, tmp_path: Path) -> None:
    assert screening.evidence is not None
    read = load_screening(save_screening(screening, tmp_path))
    assert_same(read.evidence, screening.evidence, np.argsort(IDS))


def test_what_an_earlier_screening_knew_is_removed(screening: Screening, tmp_path: Path) -> None:
    save_screening(screening, tmp_path)
    assert (tmp_path / EVIDENCE).exists()
    save_screening(replace(screening, evidence=None), tmp_path)
    assert not (tmp_path / EVIDENCE).exists()
    assert load_screening(tmp_path).evidence is None


def test_other_ids_name_the_same_images(screening: Screening, tmp_path: Path) -> None:
    order = [4, 0, 5, 2, 1, 3]
    listed = ImageSet.from_files(tmp_path, {100 + i: screening.names[p] for i, p in enumerate(order)})
    now = matched(screening, listed)
    old, new = screening.evidence, now.evidence
    assert old is not None
    assert new is not None
    name_of = {int(i): name for i, name in zip(screening.ids, screening.names, strict=True)}
    new_name_of = {int(i): name for i, name in zip(listed.ids, listed.names, strict=True)}
    for p in range(len(IDS)):
        assert [new_name_of[i] for i, _, _ in new.nearest(p)] == [name_of[i] for i, _, _ in old.nearest(p)]
        assert [(place, d) for _, place, d in new.nearest(p)] == [(place, d) for _, place, d in old.nearest(p)]


def test_an_image_that_is_gone_is_named_no_more(screening: Screening, tmp_path: Path) -> None:
    gone = int(screening.removed[0])
    at = IDS.index(gone)
    listed = {i: n for i, n in zip(IDS, screening.names, strict=True) if i != gone}
    now = matched(screening, ImageSet.from_files(tmp_path, listed))
    assert now.ids[at] < 0
    assert screening.evidence is not None
    assert now.evidence is not None
    for p in range(len(IDS)):
        assert now.evidence.nearest(p) == [row for row in screening.evidence.nearest(p) if row[0] != gone]
    assert np.isnan(now.evidence.distances[now.evidence.images == -1]).all()
    assert (now.evidence.image_places[now.evidence.images == -1] == -1).all()
    read = load_screening(save_screening(now, tmp_path / "s"))  # negative ids and all
    assert_same(read.evidence, now.evidence, np.argsort(now.ids))


def changed(evidence: Evidence, **changes: Any) -> Evidence:
    """With single values set: name=(index, value)."""
    arrays = {name: getattr(evidence, name).copy() for name in changes}
    for name, (index, value) in changes.items():
        arrays[name][index] = value
    return replace(evidence, **arrays)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": ((2, 0), 99)}, "not in the table"),
        ({"images": ((2, 0), -2)}, "not in the table"),
        ({"places": (2, 24)}, "off the grid"),
        ({"places": (2, -1)}, "off the grid"),
        ({"image_places": ((2, 0), 24)}, "off the grid"),
        ({"image_places": ((0, 2), 3)}, "fit together"),
        ({"distances": ((2, 0), np.nan)}, "fit together"),
        ({"n_others": (2, -1)}, "fit together"),
    ],
)
def test_what_is_not_there_cannot_be_named(
    screening: Screening, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    assert screening.evidence is not None
    save_screening(replace(screening, evidence=changed(screening.evidence, **changes)), tmp_path)
    with pytest.raises(InputError, match=f"is damaged.*{text}"):
        load_screening(tmp_path)


def test_files_that_do_not_fit_are_told(screening: Screening, tmp_path: Path) -> None:
    save_screening(screening, tmp_path)
    whole = (tmp_path / EVIDENCE).read_bytes()
    with np.load(io.BytesIO(whole)) as file:
        arrays = dict(file)
    flat, fewer = io.BytesIO(), io.BytesIO()
    np.savez(flat, **{**arrays, "distances": arrays["distances"].ravel()})
    np.savez(fewer, **{name: arrays[name] for name in FIELDS})
    objects, other = io.BytesIO(), io.BytesIO()
    np.savez(objects, **{**arrays, "places": np.array([{}] * 6, object)})
    np.savez(other, **{**arrays, "grid": np.array([-4, -6])})
    contents = [flat, fewer, objects, other]
    (tmp_path / EVIDENCE).write_bytes(flat.getvalue())
    with pytest.raises(InputError, match="evidence.npz is not what was written with the others"):
        load_screening(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as in a screening of an earlier version
    with pytest.raises(InputError, match="has the shapes .* 6 images are listed"):
        load_screening(tmp_path)
    damaged = bytearray(whole)
    damaged[whole.index(b"distances.npy") + 200] ^= 255
    for content in [*(buffer.getvalue() for buffer in contents), b"", whole[:-30], whole[:200], b"x", bytes(damaged)]:
        (tmp_path / EVIDENCE).write_bytes(content)
        with pytest.raises(InputError, match="is damaged"):
            load_screening(tmp_path)
