"""What a review shows of a screening."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.errors import InputError
from flawsift.review import pictures
from flawsift.review.session import Review
from flawsift.screening.decisions import read_decisions
from flawsift.screening.storage import images_of, load_screening
from tests.review.material import ODD


def test_a_set_without_a_kept_image_can_still_be_looked_at(folder: Path) -> None:
    review = Review.open(folder)
    assert review.screening.patch_maps is not None
    review.screening = replace(review.screening, rejected=review.screening.patch_maps > 0)
    review.decide([{"id": i, "decision": "remove", "version": 0} for i in review.screening.ids.tolist()])
    page = review.overview()
    assert not len(review.reviewed_screening().kept)
    assert "nan" not in page


def test_where_the_images_are(folder: Path, screened: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "screening.json").read_text())
    assert content.pop("images_root") == str(screened / "parts")
    (folder / "screening.json").write_text(json.dumps(content))
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="does not say where its images are"):
        Review.open(folder)
    assert len(Review.open(folder, images=screened / "parts").images) == 50
    with pytest.raises(InputError, match="None of the 50 images"):
        Review.open(folder, images=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Review.open(folder, images=tmp_path / "gone")
    with pytest.raises(InputError, match="holds no screening"):
        Review.open(tmp_path / "gone")


def test_where_a_refit_writes_and_what_it_is_told(folder: Path, screened: Path, tmp_path: Path) -> None:
    assert Review.open(folder).out == folder / "model"
    (tmp_path / "model.json").touch()
    assert Review.open(folder).out == folder / "model"  # a model beside a screening of another name
    inside = Path(shutil.copytree(folder, tmp_path / "m" / "screening"))
    assert Review.open(inside).out == inside / "model"
    (tmp_path / "m" / "model.json").touch()
    for place in (inside, tmp_path / "m"):
        assert Review.open(place).out == tmp_path / "m"
    plain = Review.open(folder).refit.command
    assert "--images" not in plain
    assert "--cache" not in plain
    given = Review.open(folder, images=screened / "parts", cache=tmp_path / "c").refit.command
    assert given == [*plain, "--images", str(screened / "parts"), "--cache", str(tmp_path / "c")]


def test_a_decision_that_was_cleared_leaves_what_the_screening_said(folder: Path) -> None:
    review = Review.open(folder)
    kept, removed = int(review.screening.kept[0]), int(review.screening.removed[0])
    for version, (first, second) in enumerate([("remove", "keep"), ("", "")]):
        changes = [(kept, first), (removed, second)]
        review.decide([{"id": i, "decision": choice, "version": version} for i, choice in changes])
        now = review.reviewed_screening().kept.tolist()
        assert (kept in now, removed in now) == ((False, True) if first else (True, False))


def test_an_image_that_was_removed_by_hand_is_no_typical_one(folder: Path) -> None:
    review = Review.open(folder)
    suspect = int(review.screening.removed[0])
    near = review.alike(suspect)
    review.decide([{"id": near[0], "decision": "remove", "version": 0}])
    assert near[0] not in review.alike(suspect)


def test_pictures_have_the_sizes_of_their_places(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    Image.new("RGB", (2400, 1200)).save(parts / "part-05.png")
    review = Review.open(folder, images=parts)
    large, small = review.id_of["part-05.png"], review.id_of["part-06.png"]  # the latter has 64 x 64 pixels
    sizes = {}
    for kind in ("thumb", "preview", "thumb-map", "preview-map"):
        for id_ in (large, small):
            data = review.pictures.picture(kind, id_, review.pictures.stamp(id_))
            assert data is not None
            with Image.open(io.BytesIO(data)) as picture:
                sizes[kind, id_] = picture.size
    assert [sizes[kind, large] for kind in ("thumb", "thumb-map")] == [(256, 128), (256, 128)]
    assert [sizes[kind, large] for kind in ("preview", "preview-map")] == [(1200, 600), (512, 256)]
    assert {sizes[kind, small] for kind in ("thumb", "preview")} == {(64, 64)}  # never enlarged
    assert [sizes[kind, small] for kind in ("thumb-map", "preview-map")] == [(256, 256), (512, 512)]


def test_memory_for_pictures_is_bounded() -> None:
    # at most about 15 kB for a thumbnail, and 400 kB for a preview
    assert 15e3 * pictures.THUMBS + 400e3 * pictures.PREVIEWS < 100e6


def test_fewer_previews_than_thumbnails_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    review, decoded, image_of = Review.open(folder), [], ImageSet.image

    def image(images: ImageSet, id_: int) -> Image.Image:
        decoded.append(id_)
        return image_of(images, id_)

    monkeypatch.setattr(ImageSet, "image", image)
    for kind, again in (("thumb", 0), ("preview", 1)):
        for version in range(pictures.PREVIEWS + 1):
            review.pictures.picture(kind, 3, f"{version}")
        n = len(decoded)
        review.pictures.picture(kind, 3, "0")
        assert len(decoded) - n == again, kind


def test_names_are_found_by_what_is_shown(screened: Path) -> None:
    images = images_of(load_screening(screened / "s"))
    assert ODD in images.names
    assert images.image(images.ids.tolist()[images.names.index(ODD)]).size == (64, 64)


def test_decisions_are_found_by_what_people_call_an_image(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = folder / "decisions.csv"
    table.write_text("path,decision\n.\\part-03.png,remove\nother/x.png,keep\n")
    review = Review.open(folder)
    assert "1 of 2 decisions" in caplog.text
    assert "other/x.png" in caplog.text
    id_ = review.id_of["part-03.png"]
    assert review.changes_since(-1)["decisions"] == {id_: ["remove", 1]}
    assert id_ not in review.reviewed_screening().kept
    review.decide([{"id": id_, "decision": "keep", "version": 1}])
    assert read_decisions(table) == {"part-03.png": "keep", "other/x.png": "keep"}
    table.write_text("path,decision\n.\\part-03.png,remove\npart-03.png,remove\n")
    with pytest.raises(InputError, match=r"1 images are named twice by the decisions in '.*decisions\.csv'"):
        Review.open(folder)
