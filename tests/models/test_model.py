"""A model is asked about whatever images users have; functions and methods are one."""

import inspect
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import flawsift
from flawsift.data.decoding import NotAnImage
from flawsift.data.inputs import as_images
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import SHARD, attach
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, evaluate, predict
from flawsift.progress import Stage


@pytest.fixture(scope="module")
def model(easy: Dataset, tiny: Backbone) -> Model:
    """Trained on the 40 good images of the easy set, calibrated with their own scores."""
    train, _ = attach(easy.images.select(range(40)), tiny, ("stride8", "stride16"))
    detector = make_detector("padim", n_features=10).fit(train)
    scores = detector.predict(train, maps=False).scores
    return Model(detector, tiny, Calibration.of(scores), {"n_kept": 40, "n_images": 50, "false_alarm_rate": 0.05})


def test_whatever_is_given_the_scores_are_the_same(model: Model, easy: Dataset, easy_folder: Path) -> None:
    expected = model.predict(easy.images)
    assert len(expected) == 50
    arrays = [np.asarray(easy.images.image(i)) for i in range(50)]
    files = sorted(easy_folder.glob("*.png"))
    given: list[Any] = [easy_folder, str(easy_folder), f"{easy_folder}/*.png", files, iter(files), arrays, iter(arrays)]
    given += [[Image.fromarray(a) for a in arrays], (a / 255 for a in arrays), [*files[:20], *arrays[20:]]]
    for images in given:
        found = model.predict(images)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.ids.tolist() == list(range(50))
        assert found.maps is None
    assert model.predict(files).names == tuple(f.name for f in files)
    np.testing.assert_array_equal(predict(model, iter(arrays)).scores, expected.scores)
    assert [one.score for one in model.stream(iter(arrays))] == expected.scores.tolist()


def test_one_image_is_one_answer(model: Model, easy_folder: Path) -> None:
    path = easy_folder / "part-45.png"
    whole = model.predict(easy_folder, maps=True)
    for image in (path, str(path), np.asarray(Image.open(path)), Image.open(path)):
        one = model.predict(image, maps=True).item()
        assert one.score == pytest.approx(whole.scores[45], rel=1e-5)  # another batch rounds differently
        assert one.is_anomalous is True
        assert one.p_value == whole.p_values[45] == 1 / 41
        assert one.error is None
        assert one.map is not None
        assert whole.maps is not None
        np.testing.assert_allclose(one.map, whole.maps[45], rtol=1e-5)
    assert model.predict(path).item().map is None
    with pytest.raises(InputError, match="these are of 50"):
        whole.item()


def test_maps_are_those_that_are_handed_on(model: Model, easy: Dataset) -> None:
    handed: dict[int, npt.NDArray[np.float32]] = {}

    def take(images: Any, prediction: Any) -> None:
        handed.update(zip(prediction.ids.tolist(), prediction.maps, strict=True))

    images = easy.images.select([7, 3, 44])
    found = model.predict(images, maps=True, on_maps=take)
    assert found.maps is not None
    assert list(found.maps) == [7, 3, 44]
    assert found.maps[7].shape == (64, 64)
    assert found.maps[7].dtype == np.float32
    for one, streamed in zip(found, model.stream(images), strict=True):
        np.testing.assert_array_equal(one.map, handed[one.id])
        np.testing.assert_array_equal(streamed.map, handed[one.id])
        assert (streamed.id, streamed.name, streamed.score, streamed.is_anomalous, streamed.p_value) == (
            (one.id, one.name, one.score, one.is_anomalous, one.p_value)
        )
    assert all(one.map is None for one in model.stream(images, maps=False))


class Camera:
    """Gives images one by one, and knows how many were asked for and how many are still held by anybody."""

    def __init__(self, easy: Dataset, n: int) -> None:
        self.easy, self.n, self.given = easy, n, 0
        self.refs: list[weakref.ref[Any]] = []

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        for i in range(self.n):
            picture = np.asarray(self.easy.images.image(i % 50)).copy()
            self.refs.append(weakref.ref(picture))
            self.given += 1
            yield picture
            del picture

    @property
    def held(self) -> int:
        return sum(ref() is not None for ref in self.refs)


def test_an_iterator_is_never_held(model: Model, easy: Dataset) -> None:
    camera, held = Camera(easy, 3 * SHARD + 5), []
    found = model.predict(iter(camera), on_maps=lambda *_: held.append((camera.given, camera.held)))
    # while a piece is scored, it has been read and the next one has not; two pieces overlap for a moment
    assert [given for given, _ in held] == [SHARD, 2 * SHARD, 3 * SHARD, 3 * SHARD + 5]
    assert max(n for _, n in held) <= 2 * SHARD
    assert camera.held == 0
    assert found.images is None
    assert found.ids.tolist() == list(range(3 * SHARD + 5))
    np.testing.assert_array_equal(found.scores[50:100], found.scores[:50])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_camera_is_answered_at_once(model: Model, easy: Dataset, batch_size: int) -> None:
    camera = Camera(easy, 7)
    for n, one in enumerate(model.stream(iter(camera), batch_size=batch_size)):
        assert one.id == n
        assert camera.given == min(7, batch_size * (n // batch_size + 1))
        assert camera.held <= 2 * batch_size
        assert one.map is not None
    with pytest.raises(ParameterError, match="batch_size must be at least 1, got 0"):
        model.stream(iter(camera), batch_size=0)


def test_what_cannot_be_read_is_one_answer_of_many(model: Model, easy: Dataset, easy_folder: Path) -> None:
    bad = np.full((8, 8), np.nan)
    good = np.asarray(easy.images.image(3))
    for found in (
        model.predict([good, bad], maps=True),
        model.predict(iter([good, bad]), maps=True),
        list(model.stream([good, bad])),
    ):
        first, second = found
        assert first.error is None
        assert first.map is not None
        assert second.error == "nan or infinite values"
        assert np.isnan(second.score)
        assert (second.is_anomalous, second.p_value, second.map) == (None, None, None)
    missing = easy_folder / "gone.png"
    assert "No such file" in str(model.predict(iter([missing])).item().error)
    with pytest.raises(InputError, match=r"1 of 1 images do not exist: .*gone.png"):
        model.predict([missing])


def test_wrong_input_is_told_before_any_work(model: Model, easy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.setattr(model.backbone, "extract", never)
    wrong: list[tuple[Any, type[Exception]]] = [(None, NotAnImage), ([None], TypeError)]
    wrong += [([], InputError), ("none", InputError)]
    for bad, error in wrong:
        with pytest.raises(error):
            model.predict(bad)
        with pytest.raises(error):
            model.stream(bad)
        with pytest.raises(error):
            model.evaluate(bad, easy.truth)
    for rate in (0, 1.5):
        with pytest.raises(ParameterError, match="false_alarm_rate"):
            model.predict(np.zeros((8, 8)), false_alarm_rate=rate)
        with pytest.raises(ParameterError, match="false_alarm_rate"):
            model.stream(np.zeros((8, 8)), false_alarm_rate=rate)


def test_functions_are_the_methods(model: Model, easy: Dataset, easy_folder: Path) -> None:
    assert flawsift.predict is predict is Model.predict
    assert flawsift.evaluate is evaluate is Model.evaluate
    assert list(inspect.signature(flawsift.predict).parameters)[:2] == ["self", "images"]
    metrics, found = model.evaluate(sorted(easy_folder.glob("*.png")), easy.truth)
    expected, _ = flawsift.evaluate(model, easy.images, easy.truth)
    assert metrics == expected
    assert metrics["image_auroc"] > 0.9
    again, _ = model.evaluate(iter(sorted(easy_folder.glob("*.png"))), easy.truth)
    assert again == expected
    assert found.names[3] == "part-03.png"


def test_progress_is_told(model: Model, easy: Dataset) -> None:
    told: list[tuple[str, int, int]] = []
    model.predict(as_images(easy.images), progress=lambda *step: told.append(step))
    assert told == [(Stage.SCORING, 0, 50), (Stage.SCORING, 50, 50)]
    told.clear()
    pictures = (np.asarray(easy.images.image(i % 50)) for i in range(SHARD + 6))
    model.predict(pictures, progress=lambda *step: told.append(step))
    assert told == [(Stage.SCORING, 0, SHARD), (Stage.SCORING, SHARD, SHARD + 6), (Stage.SCORING, SHARD + 6, SHARD + 6)]


def test_the_text_of_a_model(model: Model, tiny: Backbone) -> None:
    threshold = model.threshold()
    assert threshold is not None
    assert repr(model) == (
        f"Model: padim on {tiny.name} at 64 pixels, trained on 40 of 50 images\n"
        f"threshold {threshold.value:.4g}: about 4.9 false alarms per 100 good parts expected (between 0.9 and 11)"
    )
    assert repr(Model(model.detector, tiny, Calibration.of([]), {})) == (
        f"Model: padim on {tiny.name} at 64 pixels, trained on ? of ? images\nno threshold"
    )
