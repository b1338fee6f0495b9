"""A model's threshold from labelled images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ModelError, OutputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.models.calibration import Calibration
from flawsift.models.labelled import recalibrate, reviewed_truth
from flawsift.models.model import Model, learned_digests, load_model

NEW = [*range(25, 40), *range(40, 48)]  # 15 good images and 8 defective ones that the model has not seen


@pytest.fixture(scope="module")
def model(easy: Dataset, tiny: Backbone) -> Model:
    """Trained on 25 good images and 2 defective ones."""
    images = easy.images.select([*range(25), 48, 49])
    train, _ = attach(images, tiny, ("stride8", "stride16"))
    detector = make_detector("padim", n_features=10).fit(train)
    training = {"n_kept": 27, "n_images": 27, "false_alarm_rate": 0.1, "kept_digest": "k"}
    scores = detector.predict(train).scores
    return Model(detector, tiny, Calibration.of(scores), training, learned=learned_digests(images))


def test_the_threshold_is_that_of_the_labelled_scores(model: Model, easy: Dataset) -> None:
    old = model.threshold()
    found = recalibrate(model, easy.images.select(NEW), easy.truth)
    scores = model.predict(easy.images.select(NEW)).scores
    good, defective = scores[:15], scores[15:]
    threshold = found.threshold
    assert threshold.value == np.sort(good)[-1]  # 1 in 10 of 15: the highest
    assert threshold.expected_rate == 1 / 16
    assert threshold.misses is not None
    assert threshold.misses[0] == (defective <= threshold.value).mean()
    assert (threshold.n_calibration, threshold.n_defective) == (15, 8)
    assert "by 15 good and 8 defective labelled images" in repr(found.model)
    assert found.predictions.threshold == threshold
    assert found.predictions.p_values.min() == 1 / 16
    record = found.model.training["labelled"]
    assert (record["n_good"], record["n_defective"]) == (15, 8)
    assert (found.trained_on, found.notes) == ((), ())
    assert found.before == old == model.threshold(), "the model that was given stays"
    assert found.model.detector is model.detector


def test_misses_decide_in_place_of_false_alarms(model: Model, easy: Dataset) -> None:
    found = recalibrate(model, easy.images.select(NEW), easy.truth, misses=0.3)
    scores = model.predict(easy.images.select(NEW)).scores
    few_enough = [g for g in scores[:15] if (scores[15:] <= g).sum() <= 2]
    assert found.threshold.value == max(few_enough)
    assert found.model.threshold() == found.threshold
    assert found.model.training["labelled"]["misses"] == 0.3
    few = recalibrate(model, easy.images.select(NEW), easy.truth, misses=0.01)
    assert "8 defective images are too few to tell 1 of 100 from none" in few.notes[0]
    assert "up to 31 of 100 others may be" in few.notes[0]  # 1 - 0.05 ** (1 / 8)


def test_a_rate_that_the_images_do_not_support(model: Model, easy: Dataset) -> None:
    found = recalibrate(model, easy.images.select(NEW), easy.truth, false_alarm_rate=0.01)
    assert found.threshold.limited
    assert found.threshold.expected_rate == 1 / 16
    assert found.notes == (
        "15 good images are too few for a false-alarm rate of 1 in 100, which needs 99: the threshold is the highest "
        "that these support.",
    )


def test_no_threshold_that_misses_so_few(model: Model, easy: Dataset) -> None:
    swapped = GroundTruth(easy.truth.ids, 1 - easy.truth.labels, easy.truth.defect_types, {})
    found = recalibrate(model, easy.images.select(NEW), swapped, misses=0.2)
    assert found.threshold.value == found.scores[found.truth.labels == 0].min()
    assert found.notes[0].startswith("No threshold misses so few")


def test_training_images_are_left_out(model: Model, easy: Dataset, tmp_path: Path) -> None:
    new = recalibrate(model, easy.images.select(NEW), easy.truth)
    found = recalibrate(model, easy.images, easy.truth)
    assert len(found.trained_on) == 27
    assert found.truth.ids.tolist() == NEW
    assert found.threshold == new.threshold
    assert found.model.training["labelled"]["digest"] == new.model.training["labelled"]["digest"]
    assert "27 of 50 labelled images were left out, since the model was trained on them" in found.notes[0]
    with pytest.raises(InputError, match=r"without 25 that the model was trained on\) is good"):
        recalibrate(model, easy.images.select([*range(25), 45]), easy.truth)
    with pytest.raises(InputError, match="No labelled image is left .*`flawsift fit --decisions`"):
        recalibrate(model, easy.images.select([*range(25), 48]), easy.truth)
    unknown = recalibrate(replace(model, learned=None), easy.images.select(NEW), easy.truth)
    assert "does not know its training images" in unknown.notes[0]
    model.save(tmp_path / "m")
    assert load_model(tmp_path / "m").learned == model.learned


def test_an_evaluation_counts_training_images(model: Model, easy: Dataset) -> None:
    assert model.evaluate(easy.images, easy.truth)[0]["n_trained_on"] == 27
    assert model.evaluate(easy.images.select(NEW), easy.truth)[0]["n_trained_on"] == 0
    assert replace(model, learned=None).evaluate(easy.images, easy.truth)[0]["n_trained_on"] is None


def in_folder(folder: Path, easy: Dataset, ids: Sequence[int], **contents: bytes) -> ImageSet:
    folder.mkdir()
    for id_ in ids:
        easy.images.image(id_).save(folder / f"{id_:02d}.png")
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return ImageSet.from_folder(folder)


def truth_of(labels: Sequence[int]) -> GroundTruth:
    return GroundTruth(np.arange(len(labels)), np.array(labels), tuple("good" for _ in labels), {})


def test_unreadable_and_unlabelled_images_are_counted(model: Model, easy: Dataset, tmp_path: Path) -> None:
    images = in_folder(tmp_path / "i", easy, NEW, broken=b"\x89PNG", empty=b"", other=b"no image either")
    labels = [*[0] * 15, *[1] * 8, 1, 1]  # the last image has no label
    found = recalibrate(model, images, truth_of(labels))
    assert found.threshold.n_defective == 8
    assert len(found.predictions.errors) == 2
    assert found.notes == (
        "1 images have no label, and were left out.",
        "2 labelled images cannot be read, and were left out.",
    )
    with pytest.raises(InputError, match=r"None of the 15 labelled images \(without 1 that cannot be read\) is defect"):
        recalibrate(model, images.select([*range(15), 23]), truth_of(labels))
    with pytest.raises(InputError, match="No labelled image is left .without 2 that cannot be read.. Check the files"):
        recalibrate(model, images.select([23, 24]), truth_of([*labels[:23], 0, 1]))


def test_copies_count_once_and_contradictions_are_refused(model: Model, easy: Dataset, tmp_path: Path) -> None:
    first = in_folder(tmp_path / "i", easy, NEW)
    copy = (tmp_path / "i" / "30.png").read_bytes()
    (tmp_path / "i" / "x.png").write_bytes(copy)
    images = ImageSet.from_folder(tmp_path / "i")
    labels = [*[0] * 15, *[1] * 8]
    found = recalibrate(model, images, truth_of([*labels, 0]))
    assert found.threshold == recalibrate(model, first, truth_of(labels)).threshold
    assert found.notes == ("1 labelled images are copies of others, and count once.",)
    with pytest.raises(InputError, match=r"1 image is both good and defective: x.png is 30.png"):
        recalibrate(model, images, truth_of([*labels, 1]))


def test_images_of_one_part_are_told(model: Model, easy: Dataset) -> None:
    grouped = replace(easy.images.select(NEW), groups={25: "a", 26: "a", 27: "a"})
    assert "23 images show 21 parts" in recalibrate(model, grouped, easy.truth).notes[0]


def test_bad_questions(model: Model, easy: Dataset) -> None:
    images = easy.images.select(NEW)
    with pytest.raises(InputError, match="None of the 15 labelled images is defective: .* says nothing of misses"):
        recalibrate(model, images.select(NEW[:15]), easy.truth)
    with pytest.raises(InputError, match="None of the 8 labelled images is good"):
        recalibrate(model, images.select(NEW[15:]), easy.truth)
    with pytest.raises(InputError, match="None of the 2 labels is of one of these 15 images"):
        recalibrate(model, images.select(NEW[:15]), easy.truth.select([1, 2]))
    with pytest.raises(ParameterError, match="either false_alarm_rate or misses"):
        recalibrate(model, images, easy.truth, false_alarm_rate=0.1, misses=0.1)
    for share in (0.0, 1.0, 1.5, -1.0):
        with pytest.raises(ParameterError, match="false_alarm_rate must be in"):
            recalibrate(model, images, easy.truth, false_alarm_rate=share)
        with pytest.raises(ParameterError, match="misses must be in"):
            recalibrate(model, images, easy.truth, misses=share)


def test_any_threshold_is_measured(model: Model, easy: Dataset) -> None:
    found = recalibrate(model, easy.images.select(NEW), easy.truth)
    assert found.at(found.threshold.value).misses == found.threshold.misses
    assert found.at(found.threshold.value).interval == found.threshold.interval
    good, defective = found.scores[:15], found.scores[15:]
    for value in (-1.0, float(np.median(good)) + 1e-6, float(np.median(defective)), 1e9):
        there = found.at(value)
        assert there.misses is not None
        assert there.misses[0] == (defective <= value).mean()
        assert there.expected_rate == min(1, ((good > value).sum() + 1) / 16)


def test_a_saved_model_gets_the_threshold_in_one_step(
    model: Model, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model.save(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = recalibrate(load_model(folder), easy.images.select(NEW), easy.truth, misses=0.3)

    def full_disk(self: Path, target: Any) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_disk)
        with pytest.raises(OutputError, match="the disk is full"):
            found.model.save_threshold(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    found.model.save_threshold(folder)
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"model.json", "manifest.json"}
    loaded = load_model(folder)
    assert repr(loaded) == repr(found.model)
    assert loaded.training == found.model.training
    recalibrate(loaded, easy.images.select(NEW), easy.truth).model.save_threshold(folder)


def test_another_model_that_lies_there_by_now_is_left_alone(model: Model, easy: Dataset, tmp_path: Path) -> None:
    found = recalibrate(model, easy.images.select(NEW), easy.truth)
    folder = replace(model, training={**model.training, "kept_digest": "other"}).save(tmp_path / "m")
    before = (folder / "model.json").read_bytes()
    with pytest.raises(ModelError, match="holds another model by now"):
        found.model.save_threshold(folder)
    assert (folder / "model.json").read_bytes() == before
    with pytest.raises(ModelError, match="is not a model folder"):
        found.model.save_threshold(tmp_path / "nothing")


def test_decisions_are_labels(easy: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = in_folder(tmp_path / "i", easy, [1, 2, 3, 45])
    choices = {"45.png": "remove", "01.png": "keep", "02.png": "unsure", "gone.png": "keep"}
    found = reviewed_truth(images, choices)
    assert (found.ids.tolist(), found.labels.tolist()) == ([0, 3], [0, 1])
    assert "1 of 4 decisions are about no image here: gone.png" in caplog.text
    with pytest.raises(InputError, match="The decisions name none of the .* images: one of them is gone.png"):
        reviewed_truth(images, {"gone.png": "keep"})
