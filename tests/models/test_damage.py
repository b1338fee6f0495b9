"""Model folders whose content is not what was written, or makes no sense: told, and never used."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flawsift import pipeline
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.errors import FlawsiftError, ModelError
from flawsift.features.backbones import load_backbone
from flawsift.files import MANIFEST
from flawsift.models.model import Model, load_model
from flawsift.models.record import load_calibration


@pytest.fixture(scope="module")
def made(easy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = tmp_path_factory.mktemp("model")
    detector = make_detector("patchcore", coreset_ratio=0.02)
    images = easy.images.select(range(12))
    return pipeline.fit(images, detector, load_backbone("tiny", size=64), no_screen=True, out=folder).model, folder


@pytest.fixture
def folder(made: tuple[Model, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "m"))


def test_a_changed_byte_in_any_file_is_told(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        whole = path.read_bytes()
        for at in (len(whole) // 3, len(whole) // 2, len(whole) - 2) if path.name != MANIFEST else ():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ModelError, match=path.name.replace(".", r"\.")):
                load_model(folder)
        path.write_bytes(b"")
        with pytest.raises(ModelError, match=path.name.replace(".", r"\.")):
            load_model(folder)
        path.write_bytes(whole)
    assert load_model(folder).detector.fitted


def test_the_scores_behind_the_threshold_are_checked_too(folder: Path) -> None:
    content = json.loads((folder / "model.json").read_text())
    content["calibration"]["scores"][-1] *= 2
    (folder / "model.json").write_text(json.dumps(content))
    for load in (load_model, load_calibration):
        with pytest.raises(ModelError, match=r"model\.json is not what was written with the others"):
            load(folder)


def test_models_of_earlier_versions_have_no_manifest(folder: Path, made: tuple[Model, Path], easy: Dataset) -> None:
    (folder / MANIFEST).unlink()
    detector = json.loads((folder / "detector.json").read_text())
    del detector["tensors"]
    (folder / "detector.json").write_text(json.dumps(detector))
    _edit_model(folder, detector_digest=_digest(folder / "detector.json"))
    loaded, images = load_model(folder), easy.images.select([3, 45])
    np.testing.assert_array_equal(loaded.predict(images).scores, made[0].predict(images).scores)
    loaded.save_threshold(folder)
    assert load_model(folder).rate == loaded.rate
    loaded.save(folder)
    assert (folder / MANIFEST).exists()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _edit_model(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**content, **changes}))


def _edit_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other tensors, with all digests made to fit."""
    path = next(folder.glob("state-*"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    detector = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**detector, "sha256": _digest(path)}))
    _edit_model(folder, detector_digest=_digest(folder / "detector.json"))
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update(fit=torch.zeros(1)), "the tensor fit is"),
        (lambda t: t.update(other_=torch.zeros(1)), "the tensor other_ is"),
        (lambda t: t.pop("memory_bank_"), "the tensor memory_bank_ is None"),
        (lambda t: t.update(memory_bank_=t["memory_bank_"][:, 1:].contiguous()), "the tensor memory_bank_ is"),
        (lambda t: t.update(memory_bank_=t["memory_bank_"].double()), "the tensor memory_bank_ is"),
        (
            lambda t: t["memory_bank_"].view(-1)[3:4].fill_(float("nan")),
            "memory_bank_ holds values that are no numbers",
        ),
        (
            lambda t: t["memory_bank_"].view(-1)[3:4].fill_(float("inf")),
            "memory_bank_ holds values that are no numbers",
        ),
    ],
)
def test_tensors_that_the_detector_did_not_learn(folder: Path, change: Callable[[Any], object], told: str) -> None:
    _edit_state(folder, change)
    with pytest.raises(ModelError, match=told):
        load_model(folder)


@pytest.mark.parametrize("name", ["fit", "predict", "layers", "seed", "_cache", "clone_::a"])
def test_a_tensor_replaces_no_method_and_no_parameter(folder: Path, name: str) -> None:
    _edit_state(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    detector = json.loads((folder / "detector.json").read_text())
    del detector["tensors"]  # as of an earlier version
    (folder / "detector.json").write_text(json.dumps(detector))
    _edit_model(folder, detector_digest=_digest(folder / "detector.json"))
    if "::" in name:
        assert load_model(folder).detector.fitted, "a name that means nothing does nothing"
        return
    with pytest.raises(ModelError, match="learns nothing of the name"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000, "[]", "3", "null", '"text"', "", "{", "\x00", "{}", {"format": None}, {"format": "1"},
        {"format": []}, {"backbone": []}, {"backbone": {"spec": 3, "weights_digest": ""}},
        {"backbone": {"spec": {"name": 3}, "weights_digest": ""}},
        {"backbone": {"spec": {"name": "tiny", "weights": [1]}, "weights_digest": ""}},
        {"backbone": {"spec": {"name": "tiny", "size": 10**40}, "weights_digest": ""}},
        {"backbone": {"spec": {"name": "tiny", "colour": "red"}, "weights_digest": ""}}, {"training": None},
        {"training": [1]}, {"training": {"false_alarm_rate": "often"}}, {"training": {"false_alarm_rate": 7}},
        {"calibration": None}, {"calibration": {}}, {"calibration": [1, float("nan")]}, {"calibration": [1, "x"]},
        {"learned": 3}, {"profile": 3}, {"detector_digest": None}, {"detector_digest": []},
    ],
)  # fmt: skip
def test_other_content_is_an_error_and_no_traceback(folder: Path, content: Any) -> None:
    (folder / MANIFEST).unlink()
    if isinstance(content, dict):
        _edit_model(folder, **content)
    else:
        (folder / "model.json").write_text(content)
    with pytest.raises(FlawsiftError):
        load_model(folder)


@pytest.mark.parametrize("change", [{"layers": ["stride8"]}, {"coreset_ratio": 0.5}, {"n_neighbors": 5}])
def test_other_parameters_than_were_trained_are_told(folder: Path, change: dict[str, Any]) -> None:
    (folder / MANIFEST).unlink()
    detector = json.loads((folder / "detector.json").read_text())
    detector["params"] |= change
    (folder / "detector.json").write_text(json.dumps(detector))
    _edit_model(folder, detector_digest=_digest(folder / "detector.json"))
    with pytest.raises(ModelError, match=r"detector\.json has other parameters"):
        load_model(folder)


@pytest.mark.parametrize("spec", [{"name": "resnet81"}, {"name": "tiny", "size": 7}, {"name": "tiny", "weights": "x"}])
def test_a_backbone_that_cannot_be_had_is_told_with_its_folder(folder: Path, spec: dict[str, Any]) -> None:
    (folder / MANIFEST).unlink()
    _edit_model(folder, backbone={"spec": spec, "weights_digest": ""})
    with pytest.raises(FlawsiftError, match=f"The backbone of the model in '{folder}'"):
        load_model(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", '{"name": 3}', '{"name": "patchcore", "params": 3}', ""])
def test_other_content_of_the_detector_is_an_error_too(folder: Path, content: str) -> None:
    (folder / MANIFEST).unlink()
    (folder / "detector.json").write_text(content)
    _edit_model(folder, detector_digest=_digest(folder / "detector.json"))
    with pytest.raises(ModelError, match=r"is not a readable detector folder|Unknown detector"):
        load_model(folder)


def test_an_image_without_a_score_is_listed_and_never_good(made: tuple[Model, Path], easy: Dataset) -> None:
    class Blind(type(made[0].detector)):  # type: ignore[misc]
        def predict(self, data: Any, **options: Any) -> Any:
            prediction = super().predict(data, **options)
            scores = prediction.scores.copy()
            scores[1] = np.nan
            return replace(prediction, scores=scores)

    blind = Blind(**made[0].detector.params()).with_state(made[0].detector.state())
    model, images = replace(made[0], detector=blind), easy.images.select([3, 4, 45])
    seen: list[int] = []
    predictions = model.predict(images, maps=True, on_maps=lambda data, prediction: seen.extend(data.ids.tolist()))
    assert list(predictions.errors) == [4]
    assert "the model gives it the score nan" in predictions.errors[4]
    assert predictions[1].is_anomalous is None
    assert predictions[1].verdict == ""
    assert seen == [3, 45]
    assert predictions.maps is not None
    assert sorted(predictions.maps) == [3, 45]
    expected = made[0].predict(images).scores
    np.testing.assert_array_equal(predictions.scores[[0, 2]], expected[[0, 2]])
    assert [one.error is None for one in model.stream(images)] == [True, False, True]
