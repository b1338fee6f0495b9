"""What a review shows of a screening."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flawsift.errors import InputError
from flawsift.review import session as reviewing
from flawsift.review.session import Review
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
    with pytest.raises(InputError, match="does not say where its images are"):
        Review.open(folder)
    assert len(Review.open(folder, images=screened / "parts").images) == 50
    with pytest.raises(InputError, match="None of the 50 images"):
        Review.open(folder, images=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Review.open(folder, images=tmp_path / "gone")
    with pytest.raises(InputError, match="holds no screening"):
        Review.open(tmp_path / "gone")


def test_memory_for_pictures_is_bounded() -> None:
    # at most about 15 kB for a thumbnail, and 400 kB for a preview
    assert 15e3 * reviewing.THUMBS + 400e3 * reviewing.PREVIEWS < 100e6


def test_names_are_found_by_what_is_shown(screened: Path) -> None:
    images = images_of(load_screening(screened / "s"))
    assert ODD in images.names
    assert images.image(images.ids.tolist()[images.names.index(ODD)]).size == (64, 64)
