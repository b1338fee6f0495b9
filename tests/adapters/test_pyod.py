"""Models of PyOD as detectors, and our detectors as PyOD's."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flawsift
from flawsift.datasets import Dataset
from flawsift.deploy.export import export_model
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import load_detector, make_detector
from flawsift.errors import InputError, ModelError, ParameterError, TrainingError
from flawsift.screening.options import ScreenOptions
from flawsift.screening.stage1 import screen
from flawsift.testing import CHECKS, tiny_backbone, with_features

pytest.importorskip("pyod", reason="PyOD is not installed: pip install 'flawsift[pyod]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # what its models and numba warn of is theirs

from pyod.models.knn import KNN  # noqa: E402

from flawsift.adapters.pyod import FlawsiftOD  # noqa: E402  # needs PyOD

# A single score an image has no place; the neighbours of one image alone are none.
UNMET = {"check_easy_defects_are_found": "a row for each image says nothing of places: its map is flat"}
SMALL: dict[str, dict[str, Any]] = {"ECOD": {}, "HBOS": {}, "IForest": {"n_estimators": 20}}


def of(model: str, **changes: Any) -> Detector:
    return make_detector(f"pyod:{model}", layers=("stride4", "stride8"), **changes)


@pytest.mark.parametrize("model", sorted(SMALL))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_common_checks(model: str, check: Callable[[Detector], None], request: pytest.FixtureRequest) -> None:
    if reason := UNMET.get(check.__name__):
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    check(of(model, arguments=SMALL[model]))


def test_scores_are_those_of_pyod_on_pooled_features(easy: Dataset) -> None:
    detector = of("knn", arguments={"n_neighbors": 3})
    data = with_features(easy.images, detector)
    train, test = data.select(range(24)), data.select(range(24, 50))
    said = detector.fit(train).predict(test).scores

    def rows(images: flawsift.ImageSet) -> np.ndarray[Any, Any]:
        (batch,) = images.batches(detector.layers, batch_size=100)
        taps = [batch.features[layer].numpy() for layer in detector.layers]
        return np.concatenate([part for tap in taps for part in (tap.mean((2, 3)), tap.max((2, 3)))], 1)

    known = rows(train)
    plain = KNN(n_neighbors=3).fit((known - known.mean(0)) / known.std(0))
    expected = plain.decision_function((rows(test) - known.mean(0)) / known.std(0))
    np.testing.assert_allclose(said, expected, rtol=1e-4)


@pytest.mark.parametrize("model", ["KNN", "IForest"])
def test_a_loaded_model_is_fitted_again_and_is_the_same(
    model: str, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that draws from the global generator, and one from its own."""
    plain = KNN.fit

    def with_noise(self: Any, X: Any, y: Any = None) -> Any:
        assert torch.ones(1, requires_grad=True).exp().requires_grad, "networks learn by gradients"
        sys.stdout.write("how far it is")
        return plain(self, X + np.random.normal(size=X.shape))  # noqa: NPY002

    monkeypatch.setattr(KNN, "fit", with_noise)
    detector = of(model, seed=3)
    data = with_features(easy.images, detector)
    fitted = detector.fit(data.select(range(20)))
    fitted.save(tmp_path)
    loaded = load_detector(tmp_path)
    assert loaded.params()["model"] == model
    assert not capsys.readouterr().out, "what it prints is no result"
    assert (loaded.predict(data).scores == fitted.predict(data).scores).all()
    assert (of(model, seed=4).fit(data.select(range(20))).predict(data).scores != fitted.predict(data).scores).any()


def test_it_screens_and_is_fitted(easy: Dataset, tmp_path: Path) -> None:
    detector = of("HBOS")
    data = with_features(easy.images, detector)
    found = screen(data, detector, ScreenOptions(n_subsets=4, keep=0.8))
    assert easy.truth.select(found.kept).contamination < easy.truth.contamination
    model = flawsift.fit(easy.images, of("HBOS"), tiny_backbone(), no_screen=True, out=tmp_path / "model").model
    assert flawsift.load_model(tmp_path / "model").predict(easy.images).scores.tolist() == pytest.approx(
        model.predict(easy.images).scores.tolist(), abs=0
    )
    with pytest.raises(ModelError, match="pyod is another library's model"):
        export_model(model, tmp_path / "line")


def test_what_pyod_refuses_is_told(easy: Dataset) -> None:
    with pytest.raises(ParameterError, match=r"Unknown model of PyOD 'IForrest'. Did you mean 'iforest'"):
        of("IForrest")
    with pytest.raises(ParameterError, match="refuses IForest"):
        of("IForest", arguments={"trees": 5})
    with pytest.raises(ParameterError, match="must be a table"):
        of("IForest", arguments=5)
    detector = of("KNN")
    with pytest.raises(TrainingError, match="KNN of PyOD cannot learn 2 images"):
        detector.fit(with_features(easy.images.select(range(2)), detector))
    assert not detector.fitted
    with pytest.raises(InputError, match="at least one image"):
        detector.fit(with_features(easy.images.select(range(2)), detector).select([]))


def test_our_detectors_have_what_pyods_have() -> None:
    generator = np.random.default_rng(0)
    rows = np.concatenate([generator.normal(size=(95, 4)), generator.normal(size=(5, 4)) * 30])
    fitted = FlawsiftOD(contamination=0.05).fit(rows)
    assert fitted.labels_.tolist() == [0] * 95 + [1] * 5
    assert fitted.decision_scores_.shape == (100,)
    assert fitted.threshold_ == np.percentile(fitted.decision_scores_, 95)
    new = generator.normal(size=(50, 4)) * np.repeat([1, 30], 25)[:, None]
    scores = fitted.decision_function(new)
    assert (fitted.predict(new) == (scores > fitted.threshold_)).all()
    probabilities = fitted.predict_proba(new)
    assert probabilities.shape == (50, 2)
    assert np.allclose(probabilities.sum(1), 1)
    assert probabilities[25:, 1].mean() > probabilities[:25, 1].mean()
    with pytest.raises(ValueError, match="contamination"):
        FlawsiftOD(contamination=0.7)


def test_of_images_too(easy: Dataset, easy_folder: Path) -> None:
    fitted = FlawsiftOD("patchcore", 0.2, backbone="tiny", size=64).fit(easy_folder)
    assert fitted.labels_.sum() == 10
    assert fitted.labels_[-10:].sum() >= 8, "the defective ones come last"
    probabilities = fitted.predict_proba(str(easy_folder))
    assert probabilities.shape == (50, 2)
    assert (fitted.predict(easy_folder) == (fitted.decision_function(easy_folder) > fitted.threshold_)).all()
