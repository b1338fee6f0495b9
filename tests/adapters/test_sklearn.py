"""Our detectors as an estimator of scikit-learn."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import flawsift
from flawsift.adapters.rows import Columns, seeded
from flawsift.adapters.sklearn import FlawsiftDetector
from flawsift.adapters.training import images_in
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError

# a rate by which some of the few rows of the checks are outliers
CHECKED = FlawsiftDetector(false_alarm_rate=0.1)
UNMET = {"check_outliers_fit_predict": "fit_predict judges each row by the others, while predict has seen it"}


@parametrize_with_checks([CHECKED], expected_failed_checks=lambda estimator: UNMET)  # type: ignore[untyped-decorator]
def test_checks_of_scikit_learn(estimator: FlawsiftDetector, check: Any) -> None:
    check(estimator)


def small(**changes: Any) -> FlawsiftDetector:
    return FlawsiftDetector(**{"backbone": "tiny", "size": 64, "false_alarm_rate": 0.05, **changes})


def pictures(data: Dataset, label: int, n: int) -> np.ndarray[Any, Any]:
    """(n, H, W, 3) uint8."""
    ids = data.truth.ids[data.truth.labels == label][:n]
    return np.stack([np.asarray(data.images.image(i)) for i in ids.tolist()])


def test_images_of_each_kind_get_the_scores_of_fit(easy: Dataset, tmp_path: Path) -> None:
    good, defective = pictures(easy, 0, 20), pictures(easy, 1, 5)
    for i, picture in enumerate(good):
        Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    fitted = small().fit(good)
    scores = fitted.score_samples(defective)
    model = flawsift.fit(list(good), "quorum", flawsift.load_backbone("tiny", size=64)).model
    assert (scores == -model.predict(list(defective)).scores).all()
    threshold = model.threshold(0.05)
    assert threshold is not None
    assert fitted.offset_ == -threshold.value
    assert fitted.model_ is not None
    for given in (list(good), tmp_path, str(tmp_path / "*.png"), sorted(tmp_path.glob("*.png"))):
        assert (small().fit(given).score_samples(list(defective)) == scores).all()
    assert (fitted.decision_function(defective) == scores - fitted.offset_).all()
    assert (fitted.predict(defective) == np.where(-scores > threshold.value, -1, 1)).all()
    assert fitted.score_samples(good).mean() > scores.mean(), "higher is more normal"


def test_defects_among_the_training_images_are_found(easy: Dataset) -> None:
    mixed = [*pictures(easy, 0, 24), *pictures(easy, 1, 6)]
    said = small(false_alarm_rate=0.1).fit_predict(mixed)
    assert (said[24:] == -1).mean() > 0.5
    assert (said[:24] == 1).mean() > 0.8


@pytest.mark.parametrize("detector", ["padim", "patchcore"])  # stage 1 is by Quorum, on another scale
def test_held_out_scores_are_of_the_detector_itself(detector: str, easy: Dataset) -> None:
    good, new = pictures(easy, 0, 40)[:24], pictures(easy, 0, 40)[24:]
    trained = small(detector=detector).fit(good).trained_
    expected = np.median(trained.scores(images_in(new)))  # type: ignore[arg-type]
    assert np.median(trained.held_out) == pytest.approx(expected, rel=0.3)


def test_an_image_without_a_score_is_refused(easy: Dataset, tmp_path: Path) -> None:
    good = pictures(easy, 0, 6)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken.png"):
        small().fit(good).score_samples([tmp_path / "broken.png"])
    with pytest.raises(InputError, match="broken.png"):
        small().fit([*good, tmp_path / "broken.png"])


def test_rows_and_images_do_not_mix(easy: Dataset) -> None:
    good, rows = pictures(easy, 0, 6), np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(InputError, match="got rows"):
        small().fit(good).score_samples(rows)
    with pytest.raises(InputError, match="got images"):
        FlawsiftDetector().fit(rows).score_samples(good)
    with pytest.raises(InputError, match="three dimensions"):
        small().fit(good[0])


def test_rows_are_flagged_at_the_rate(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 4)) * [1, 100, 1e-3, 1]
    fitted = FlawsiftDetector("padim", false_alarm_rate=0.1).fit(rows)
    fresh = generator.normal(size=(2000, 4)) * [1, 100, 1e-3, 1]
    assert (fitted.predict(fresh) == -1).mean() == pytest.approx(0.1, abs=0.05)
    assert (fitted.predict(fresh + np.array([0, 0, 0.01, 0])) == -1).mean() > 0.9, "units of a column do not matter"
    # with one patch and no shrinking to speak of, PaDiM is the Mahalanobis distance
    z = (rows - rows.mean(0)) / rows.std(0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", z, np.linalg.inv(np.cov(z.T)), z))
    assert np.corrcoef(-fitted.score_samples(rows), expected)[0, 1] > 0.999


def test_it_works_with_the_tools_of_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    detector = make_detector("quorum", n_groups=3)
    pipeline = make_pipeline(MinMaxScaler(), clone(FlawsiftDetector(detector, false_alarm_rate=0.1))).fit(rows)
    again = pickle.loads(pickle.dumps(pipeline))
    assert (again.score_samples(rows) == pipeline.score_samples(rows)).all()
    assert not detector.fitted
    with pytest.raises(NotFittedError):
        FlawsiftDetector().predict(rows)


def test_a_detector_of_pixels_has_no_use_for_rows() -> None:
    with pytest.raises(ParameterError, match="destseg reads pixels"):
        FlawsiftDetector("destseg").fit(np.zeros((5, 2)))


def test_a_constant_column_stays_nought() -> None:
    rows = np.column_stack([np.full(50, 0.1), np.arange(50.0)])
    columns = Columns.of(rows)
    assert np.abs(columns.standardized(rows + np.array([1e-3, 0]))[:, 0]).max() < 0.01
    assert columns.standardized(rows)[:, 1].std() == pytest.approx(1)


def test_seeding_leaves_the_global_generators_as_they_were() -> None:
    import random

    import torch

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    drawn()
    states = random.getstate(), tuple(np.random.get_state())[1:3], torch.get_rng_state()  # noqa: NPY002
    with seeded(7):
        first = drawn()
    with seeded(7):
        assert drawn() == first
    assert random.getstate() == states[0]
    assert str(tuple(np.random.get_state())[1:3]) == str(states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
