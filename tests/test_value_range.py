"""The range of values goes from the training images to screening, model and new images, and each of them tells it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.data.truth import GroundTruth
from flawsift.data.values import ValueRange
from flawsift.detectors.registry import make_detector
from flawsift.features.backbones import Backbone
from flawsift.models.model import load_model
from flawsift.models.provenance import is_made_by
from flawsift.screening.storage import images_of, load_screening

Cli = Callable[..., tuple[int, str, str]]
TEN_BITS = ValueRange(0, 1023)
LINE = "Values of images of more than 8 bits are read from 0 (black) to 1023 (white)."


def part(seed: int, light: float = 1.0) -> npt.NDArray[np.uint16]:
    """A striped part as a 10-bit camera sees it."""
    rng = np.random.default_rng(seed)
    x = np.mgrid[:32, :32][1]
    values = (500 + 450 * np.sin(x / 3) + rng.normal(0, 15, (32, 32))) * light
    return np.asarray(np.rint(np.clip(values, 0, 1023)), np.uint16)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """parts/00.tif to parts/11.tif."""
    (tmp_path / "parts").mkdir()
    for i in range(12):
        Image.fromarray(part(i)).save(tmp_path / "parts" / f"{i:02d}.tif")
    return tmp_path / "parts"


def test_one_range_from_training_to_prediction(parts: Path, tiny: Backbone, tmp_path: Path) -> None:
    result = pipeline.fit(parts, "padim", tiny, out=tmp_path / "m")
    assert result.model.value_range == TEN_BITS
    model = load_model(tmp_path / "m")
    assert model.value_range == TEN_BITS
    saved = load_screening(tmp_path / "m" / "screening")
    assert images_of(saved).value_range == TEN_BITS
    assert saved.images is not None
    np.testing.assert_array_equal(np.asarray(saved.images.image(3)), np.asarray(images_of(saved).image(3)))

    new = [part(50 + i) for i in range(3)]
    expected = model.predict(new)
    assert expected.images is not None
    assert expected.images.value_range == TEN_BITS
    for given in (iter(new), [one.astype(np.float32) for one in new], [one.astype(np.int64) for one in new]):
        np.testing.assert_array_equal(model.predict(given).scores, expected.scores)
    eight = [np.rint(one / 1023 * 255).astype(np.uint8) for one in new]
    np.testing.assert_array_equal(model.predict(eight).scores, expected.scores)
    np.testing.assert_array_equal([one.score for one in model.stream(iter(new))], expected.scores)


def test_a_darker_part_stays_darker(parts: Path, tiny: Backbone) -> None:
    model = pipeline.fit(parts, "padim", tiny, no_screen=True).model
    usual = model.predict([part(60 + i) for i in range(4)]).scores
    dark = model.predict([part(60 + i, light=0.5) for i in range(4)]).scores
    assert dark.min() > usual.max()


def test_a_screening_gives_its_range_to_the_training(parts: Path, tiny: Backbone, tmp_path: Path) -> None:
    given = as_images(parts, value_range=(0, 2000))
    screening = pipeline.screen(given, "padim", tiny, out=tmp_path / "s")
    assert screening.provenance["value_range"] == [0, 2000]
    for form in (screening, tmp_path / "s"):
        assert pipeline.fit(parts, "padim", tiny, screening=form).model.value_range == ValueRange(0, 2000)
    other = pipeline.fit(as_images(parts, value_range=(0, 1023)), "padim", tiny, screening=tmp_path / "s")
    assert other.model.value_range == TEN_BITS
    same = pipeline.fit(parts, "padim", tiny, no_screen=True)
    np.testing.assert_allclose(
        other.model.calibration.scores,
        same.model.calibration.scores,
        err_msg="scores of another range are no threshold",
    )


def test_scores_of_another_range_are_not_those_of_the_detector(parts: Path, tiny: Backbone) -> None:
    screening, detector = pipeline.screen(parts, "padim", tiny), make_detector("padim")
    assert is_made_by(screening, detector, tiny, as_images(parts, value_range=(0, 1023)))
    assert not is_made_by(screening, detector, tiny, as_images(parts, value_range=(0, 1022)))
    assert not is_made_by(screening, detector, tiny, as_images(parts))


def test_images_that_were_trained_on_are_known_again(parts: Path, tiny: Backbone) -> None:
    model = pipeline.fit(parts, "padim", tiny, no_screen=True).model
    arrays = [part(i) for i in (0, 1)] + [part(99)]
    truth = GroundTruth(np.arange(4), np.array([0, 0, 1, 0]), ("good", "good", "x", "good"), {})
    images = as_images([parts / "00.tif", parts / "01.tif", arrays[2], parts / "02.tif"])
    metrics, predictions = model.evaluate(images, truth)
    assert metrics["n_trained_on"] == 3
    assert predictions.images is not None
    assert predictions.images.value_range == TEN_BITS


def test_eight_bit_sets_have_no_range(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    images = ImageSet.from_folder(easy_folder).select(np.arange(12))
    model = pipeline.fit(images, "padim", tiny, out=tmp_path / "m").model
    assert model.value_range is None
    assert "value_range" not in model.training
    assert "value_range" not in json.loads((tmp_path / "m" / "screening" / "screening.json").read_text())


def test_the_command_line_tells_the_range(parts: Path, tmp_path: Path, cli: Cli) -> None:
    options = ["--detector", "padim", "--backbone", "random:0", "--size", "32"]
    code, out, error = cli("fit", parts, "--out", tmp_path / "m", "--no-screen", "--quiet", *options)
    assert (code, error) == (0, "")
    assert LINE in out
    code, out, _ = cli("predict", tmp_path / "m", parts)
    assert LINE in out
    code, out, _ = cli("screen", parts, "--out", tmp_path / "s", "--range", 0, 4095, *options)
    assert code == 0
    assert "from 0 (black) to 4095 (white)" in out
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "x.png")
    code, _, error = cli("fit", tmp_path / "x.png", "--out", tmp_path / "n", "--range", 0, 1, *options)
    assert code == 2
    assert "no image has more than 8 bits" in error
    code, _, error = cli("fit", parts, "--out", tmp_path / "n", "--range", 5, 1, *options)
    assert code == 2
    assert "the lower first" in error


@pytest.mark.parametrize("kind", ["sixteen", "float"])
def test_what_a_broken_driver_writes_is_named_before_training(
    kind: str, tiny: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    black: list[Any] = [np.zeros((16, 16), np.uint16 if kind == "sixteen" else np.float32) for _ in range(4)]
    black.append(part(0) if kind == "sixteen" else part(0) / np.float32(1023))
    pipeline.fit(black, "padim", tiny, no_screen=True)
    assert "4 of 5 images are of one colour and show nothing: array-0, array-1, array-2, array-3." in caplog.text
