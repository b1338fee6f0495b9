"""New images that are not what a model was trained on are noticed, with the numbers; ordinary ones are not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flawsift.data.facts import ImageFacts
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.base import Prediction
from flawsift.detectors.registry import make_detector
from flawsift.errors import ModelError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, load_model
from flawsift.models.notices import FEW, GREY_MARGIN, SIZE_MARGIN, UNLIKE, Notice, Observed
from flawsift.models.profile import N_PROFILED, Profile
from flawsift.pipeline import fit

USUAL = ImageFacts(200, 100, "PNG grey", 100, 20)
TRAINING = [replace(USUAL, brightness=90 + i, contrast=15 + i) for i in range(11)]
PROFILE = Profile.of_facts(TRAINING, map_median=4.0)
CALIBRATION = Calibration.of(np.arange(1.0, 20.0))


def told(
    facts: list[ImageFacts] | None = None,
    *,
    scores: list[float] | None = None,
    medians: list[float] | None = None,
    profile: Profile | None = PROFILE,
    calibration: Calibration = CALIBRATION,
) -> list[Notice]:
    """What is noticed of images that are ordinary but for what is given."""
    n = len(facts or scores or medians or ())
    one_score, one_median = scores or [5.0] * n, medians or [4.0] * n
    ids = np.arange(n)
    found = Observed()
    half = n // 2
    for part in (slice(0, half), slice(half, n)):  # pieces make no difference
        known = dict(zip(ids[part].tolist(), (facts or [USUAL] * n)[part], strict=True))
        values, middle = (np.array(v[part], np.float32) for v in (one_score, one_median))
        found.add(known, Prediction(ids[part], values, None, middle))
    return list(found.notices(profile, calibration))


def kinds(notices: list[Notice]) -> list[str]:
    return [notice.kind for notice in notices]


def test_ordinary_images_are_not_noticed() -> None:
    assert told([USUAL] * 30) == []
    assert told([USUAL]) == []
    assert told([]) == []


def test_nearly_all_must_differ() -> None:
    half = replace(USUAL, width=100, height=50)
    (notice,) = told([half] * 9 + [USUAL])
    assert (notice.kind, notice.n, notice.n_images) == ("size", 9, 10)
    assert str(notice) == (
        "9 of 10 images are of another size or shape than the training images: "
        "100-200 x 50-100 pixels, in training 200 x 100."
    )
    assert told([half] * 8 + [USUAL] * 2) == []
    assert notice.as_json()["training"]["width"] == (200, 200, 200)
    json.dumps(notice.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"width": 300}, "size", "300 x 100 pixels, in training 200 x 100"),
        ({"width": 210, "height": 91}, "size", "210 x 91"),  # either edge is within the margin, their ratio is not
        ({"encoding": "JPEG colour"}, "format", "stored as JPEG colour, the training images as PNG grey"),
        ({"brightness": 60}, "brightness", "darker than the training images: mean grey value 60 of 255"),
        ({"brightness": 160}, "brightness", "brighter than the training images: mean grey value 160"),
        ({"contrast": 60}, "contrast", "more contrast than the training images"),
    ],
)
def test_one_image_is_enough_for_what_is_no_matter_of_chance(changes: dict[str, Any], kind: str, words: str) -> None:
    for n in (1, 20):
        (notice,) = told([replace(USUAL, **changes)] * n)
        assert notice.kind == kind
        assert words in notice.text
        assert notice.text.startswith("This image " if n == 1 else "20 of 20 images ")


def test_what_lies_within_the_margins_is_ordinary() -> None:
    low, _, high = PROFILE.brightness
    inside = [low - GREY_MARGIN, high + GREY_MARGIN]
    assert all(told([replace(USUAL, brightness=b)]) == [] for b in inside)
    assert kinds(told([replace(USUAL, brightness=inside[0] - 1)])) == ["brightness"]
    larger = 1 + SIZE_MARGIN
    assert told([replace(USUAL, width=round(200 * larger), height=round(100 * larger))]) == []
    assert kinds(told([replace(USUAL, width=222, height=111)])) == ["size"]


def test_what_was_in_memory_has_no_format() -> None:
    assert told([replace(USUAL, encoding="")] * 5) == []
    (notice,) = told([replace(USUAL, encoding="")] * 5 + [replace(USUAL, encoding="BMP grey")] * 2)
    assert (notice.n, notice.n_images) == (2, 2)
    in_memory = Profile.of_facts([replace(USUAL, encoding="")] * 10)
    assert told([USUAL] * 5, profile=in_memory) == []


def test_another_product_differs_all_over_a_defect_in_one_place() -> None:
    other, defect = [UNLIKE * 4 + 0.1] * 10, [UNLIKE * 4 - 0.1] * 10
    assert told(scores=[100.0] * 10, medians=defect) == [], "a folder of defective parts is the same product"
    assert told(scores=[10.0] * 10, medians=other) == [], "training images were that odd"
    (notice,) = told(scores=[100.0] * 10, medians=other)
    assert notice.text == (
        "10 of 10 images score higher than each of the 19 training images that the threshold comes from, and all over "
        "rather than in one place. Are they of the same product, taken the same way?"
    )
    assert notice.details["training"] == {"n_images": 19, "highest_score": 19.0, "map_median": 4.0}
    (notice,) = told(scores=[19.5], medians=other[:1])
    assert notice.text.startswith("This image scores higher than each of the 19 training images")
    assert notice.text.endswith("Is it of the same product, taken the same way?")


@pytest.mark.parametrize("map_median", [None, 0.0, -3.0])  # not known, or of a detector whose scores have no zero
def test_without_maps_scores_alone_are_told_of_more_than_a_few(map_median: float | None) -> None:
    profile = replace(PROFILE, map_median=map_median)
    for n in range(1, FEW):
        assert told(scores=[100.0] * n, medians=[99.0] * n, profile=profile) == [], "a single part may be defective"
    (notice,) = told(scores=[100.0] * FEW, medians=[99.0] * FEW, profile=profile)
    assert "Either nearly all are defective, or they are not of the same product" in notice.text
    assert told(scores=[100.0] * 8 + [10.0] * 2, medians=[99.0] * 10, profile=profile) == []


def test_few_training_images_show_no_range() -> None:
    few = Profile.of_facts(TRAINING[: FEW - 1], map_median=4.0)
    dark, other = replace(USUAL, brightness=10), [100.0] * 10
    assert told([dark] * 9, profile=few) == []
    assert kinds(told([dark] * 9, profile=Profile.of_facts(TRAINING[:FEW]))) == ["brightness"]
    assert told(scores=other, medians=other, calibration=Calibration.of([1.0, 2, 3, 4])) == []
    assert kinds(told([replace(USUAL, encoding="BMP grey")], profile=few)) == ["format"], "a format is no range"


def test_the_gravest_comes_first_and_no_profile_says_nothing() -> None:
    odd = [ImageFacts(10, 10, "BMP grey", 200, 90)] * 6
    wrong: dict[str, Any] = {"scores": [99.0] * 6, "medians": [99.0] * 6}
    assert kinds(told(odd, **wrong)) == ["scores", "size", "format", "brightness", "contrast"]
    assert told(odd, **wrong, profile=None) == []


@pytest.fixture(scope="module")
def model_folder(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the 40 good images of the easy set, without a screening."""
    out = tmp_path_factory.mktemp("noticing")
    fit(sorted(easy_folder.glob("*.png"))[:40], backbone=tiny, no_screen=True, out=out)
    return out


@pytest.fixture(scope="module")
def model(model_folder: Path, tiny: Backbone) -> Model:
    loaded = load_model(model_folder)
    assert loaded.profile is not None
    return loaded


CHANGES: dict[str, tuple[str, Callable[[Image.Image], Image.Image], str]] = {
    "smaller": ("png", lambda image: image.resize((image.width // 2, image.height // 2)), "size"),
    "another format": ("jpg", lambda image: image.convert("L"), "format"),
    "darker": ("png", lambda image: image.point(lambda v: int(0.4 * v)), "brightness"),
    "upside down": ("png", lambda image: image.rotate(180), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_were_taken_otherwise(change: str, model: Model, easy_folder: Path, tmp_path: Path) -> None:
    ending, changed, kind = CHANGES[change]
    for path in sorted(easy_folder.glob("*.png"))[:12]:
        with Image.open(path) as image:
            changed(image).save(tmp_path / f"{path.stem}.{ending}")
    found = model.predict(tmp_path)
    others = [notice.kind for notice in found.notices if notice.kind != "scores"]
    assert others[:1] == ([kind] if kind else [])
    reserved = "; this rate holds for pictures like the training images, and these differ\n"
    assert (reserved in repr(found)) is bool(found.notices)
    assert all(str(notice) in repr(found) for notice in found.notices)


def test_another_product_is_noticed_with_and_without_maps(model: Model, easy_folder: Path) -> None:
    assert model.predict(easy_folder).notices == ()
    defective = sorted(easy_folder.glob("*.png"))[40:]
    assert model.predict(defective).notices == (), "ten defective parts are the same product"
    noise = [np.random.default_rng(i).integers(90, 160, (64, 64), np.uint8) for i in range(8)]
    plain, with_maps = (model.predict(noise, maps=maps).notices[0] for maps in (False, True))
    assert plain.kind == with_maps.kind == "scores"
    assert plain.n == with_maps.n == 8
    assert plain.details["images"]["map_medians"] == pytest.approx(with_maps.details["images"]["map_medians"], rel=0.05)


def test_images_with_features_are_judged_by_scores_alone(model: Model) -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (32, 99), np.uint8) for i in range(8)]
    images = ImageSet.from_arrays(noise)
    assert [notice.kind for notice in model.predict(images).notices][:2] == ["scores", "size"]
    attached, _ = attach(images, model.backbone, model.detector.layers)
    assert [notice.kind for notice in model.predict(attached).notices] == ["scores"]


@pytest.mark.parametrize("detector", ["quorum", "patchcore", "padim"])
@pytest.mark.parametrize("screened", [False, True])
def test_every_fit_knows_its_images(detector: str, screened: bool, easy: Dataset, tiny: Backbone) -> None:
    made = fit(easy.images, detector, tiny, no_screen=not screened).model
    assert made.profile is not None
    assert made.profile.n_images >= 40
    assert made.profile.encodings == ()
    usual = made.profile.map_median
    if detector == "padim":
        assert usual is None, "held-out scores of additive statistics come without maps"
    else:
        assert usual is not None
        new = made.detector.predict(attach(easy.images, tiny, made.detector.layers)[0], maps=False).map_medians
        assert new is not None
        assert 0.7 * usual < np.median(new) < 1.3 * usual


def test_a_model_folder_keeps_the_profile(model_folder: Path, model: Model, tmp_path: Path) -> None:
    content = json.loads((model_folder / "model.json").read_text())
    assert Profile.from_json(content["profile"]) == model.profile
    copy = tmp_path / "copy"
    model.save(copy)
    assert load_model(copy).profile == model.profile
    (copy / "manifest.json").unlink()
    for old in ({"profile": None}, {}):  # of before there were profiles
        kept = {key: value for key, value in content.items() if key != "profile"}
        (copy / "model.json").write_text(json.dumps({**kept, **old}))
        loaded = load_model(copy)
        assert loaded.profile is None
        assert loaded.predict([np.zeros((5, 9), np.uint8)] * 6).notices == ()


@pytest.mark.parametrize(
    "damage",
    [
        "text",
        [],
        {"width": None},
        {"width": [1, 2]},
        {"width": [3, 2, 1]},
        {"height": [1, 2, float("nan")]},
        {"aspect": ["a", "b", "c"]},
        {"encodings": "PNG grey"},
        {"encodings": [1]},
        {"map_median": "much"},
        {"n_images": None},
        {"brightness": ...},
    ],
)
def test_a_damaged_profile_is_told(damage: Any, model_folder: Path, tmp_path: Path, model: Model) -> None:
    model.save(tmp_path)
    content = json.loads((model_folder / "model.json").read_text())
    broken = {**content["profile"], **damage} if isinstance(damage, dict) else damage
    if isinstance(broken, dict):
        broken = {key: value for key, value in broken.items() if value is not ...}
    (tmp_path / "model.json").write_text(json.dumps({**content, "profile": broken}))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ModelError, match="damaged model.json"):
        load_model(tmp_path)


def test_a_profile_is_made_of_a_sample_of_what_can_be_read(tmp_path: Path) -> None:
    many = [np.full((4, 4 + i % 3), i % 250, np.uint8) for i in range(N_PROFILED + 1)]
    found = Profile.of_images(ImageSet.from_arrays(many))
    assert found is not None
    assert found.n_images == N_PROFILED // 2 + 1  # every second one
    assert (found.width.low, found.width.high) == (4, 6)
    Image.new("L", (7, 5), 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    found = Profile.of_images(ImageSet.from_folder(tmp_path))
    assert found is not None
    assert (found.n_images, found.encodings, found.brightness) == (1, ("PNG grey",), (9, 9, 9))
    (tmp_path / "a.png").unlink()
    assert Profile.of_images(ImageSet.from_folder(tmp_path)) is None


def test_a_fine_texture_has_the_contrast_that_it_was_trained_with() -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (300, 300)).astype(np.uint8) for _ in range(12)]
    # of a network twice as wide as the sample that contrast is measured on
    detector = make_detector("padim", n_features=10)
    fitted = fit(images, detector, load_backbone("tiny", size=128), no_screen=True)
    assert [n for n in fitted.model.predict(images).notices if n.kind == "contrast"] == []
