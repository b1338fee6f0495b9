"""What `Detector` does for all: caches, learned state, folders, names."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flawsift.data.images import ImageSet
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.registry import DETECTORS, detector_class, load_detector, make_detector
from flawsift.detectors.softpatch import SoftPatch
from flawsift.errors import ModelError, ParameterError
from flawsift.testing import easy_set, with_features


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return with_features(easy_set().images.select(range(6)), PatchCore())


def test_a_cache_is_filled_once_per_key_and_device(data: ImageSet) -> None:
    detector, made = PatchCore().fit(data), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [detector._cached("a", "cpu", make) for _ in range(3)] == [1, 1, 1]
    assert detector._cached("b", "cpu", make) == 2
    assert detector._cached("a", "meta", make) == 3
    assert pickle.loads(pickle.dumps(detector))._cached("a", "cpu", make) == 4, "a cache was pickled"
    assert detector.with_state(detector.state())._cached("a", "cpu", make) == 5, "clones share a cache"
    assert detector.fit(data)._cached("a", "cpu", make) == 6, "a new fit keeps what was derived from the old one"


def test_a_cached_nothing_is_not_made_again(data: ImageSet) -> None:
    detector, made = PatchCore(), []
    for _ in range(2):
        detector._cached("nothing", "cpu", lambda: made.append(1))
    assert made == [1]


def test_state_makes_an_equal_detector(data: ImageSet) -> None:
    fitted = PatchCore(coreset_ratio=0.1).fit(data)
    unfitted = fitted.clone()
    assert unfitted.state() == {}
    again = unfitted.with_state(fitted.state())
    assert set(fitted.state()) == {"memory_bank_", "owner_"}
    assert again.params() == fitted.params()
    assert (again.predict(data).scores == fitted.predict(data).scores).all()
    assert not unfitted.fitted, "with_state changed the detector it was called on"


@pytest.mark.parametrize("like", [None, SoftPatch(coreset_ratio=0.1)])
def test_a_state_of_another_format_is_refused(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: SoftPatch | None
) -> None:
    """Such as one of before its attributes were renamed, whose file names no format."""
    monkeypatch.setattr(SoftPatch, "state_format", 2)
    SoftPatch(coreset_ratio=0.1).fit(data).save(tmp_path)
    assert load_detector(tmp_path, like).fitted
    content = json.loads((tmp_path / "detector.json").read_text())
    for former in (1, None):
        content.pop("state_format", None)
        content |= {} if former is None else {"state_format": former}
        (tmp_path / "detector.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match="written by another version of flawsift; fit the model again"):
            load_detector(tmp_path, like)


def test_a_state_of_before_formats_is_read_where_nothing_changed(data: ImageSet, tmp_path: Path) -> None:
    fitted = PatchCore(coreset_ratio=0.1).fit(data)
    fitted.save(tmp_path)
    content = json.loads((tmp_path / "detector.json").read_text())
    del content["state_format"]
    (tmp_path / "detector.json").write_text(json.dumps(content))
    assert torch.equal(load_detector(tmp_path).state()["memory_bank_"], fitted.memory_bank_)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_names_are_known_in_any_case(name: str) -> None:
    cls = detector_class(name)
    assert cls.name == name
    for written in (name.upper(), name.title(), cls.__name__):
        assert detector_class(written) is cls
        assert type(make_detector(written, seed=3)) is cls


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(ParameterError, match="Unknown detector 'PatchCor'. Did you mean 'patchcore'"):
        make_detector("PatchCor")


@pytest.mark.parametrize("state", [{"fit": 1}, {"_maps": 1}, {"clone_": 1, "save": 2}])
def test_a_state_cannot_replace_methods(state: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="learns nothing of the name"):
        make_detector("padim").with_state(state)


def test_a_name_that_is_no_text_is_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "detector.json").write_text('{"name": 5, "params": {}, "state": {}}')
    with pytest.raises(ModelError, match="is not a readable detector folder"):
        load_detector(tmp_path)


@pytest.mark.parametrize("value", [1e39, -1e308, math.inf, math.nan])
def test_parameters_that_float32_cannot_hold_are_refused(value: float) -> None:
    for name, parameter in (("softpatch", "max_weight"), ("padim", "eps"), ("funad", "learning_rate")):
        params: Any = {parameter: value}
        with pytest.raises(ParameterError, match=f"{parameter} must be a number that float32 holds"):
            detector_class(name)(**params)
