"""TwoBanks against the two detectors that it is made of."""

from typing import Any

import numpy as np
import pytest
import torch

from flawsift.data.images import ImageSet
from flawsift.detectors.parts import maps
from flawsift.detectors.parts.maps import embed_patches
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.softpatch import SoftPatch
from flawsift.detectors.twobanks import TwoBanks
from flawsift.errors import ParameterError
from flawsift.features.readers import MemoryFeatures

LAYERS = ("a", "b")
SIDE = 8  # patches, of the larger layer
SHARED: dict[str, Any] = {"layers": LAYERS, "coreset_ratio": 0.2, "seed": 3}


def feature_set(n: int, seed: int = 0, outliers: int = 0) -> ImageSet:
    """Two layers of random features; one corner of the first images is far from everything."""
    generator = np.random.default_rng(seed)
    a = generator.normal(0, 1, size=(n, 6, SIDE, SIDE)).astype(np.float32)
    b = generator.normal(0, 1, size=(n, 4, SIDE // 2, SIDE // 2)).astype(np.float32)
    a[:outliers, :, :3, :3] *= 6
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": a, "b": b})
    return ImageSet(images.ids, images.source, {}, reader)


@pytest.mark.parametrize("top_share", [0.01, 0.1, 1.0])
def test_maps_and_scores_are_the_means_of_those_of_both_parts(top_share: float) -> None:
    train, test = feature_set(20, outliers=2), feature_set(5, seed=1, outliers=1)
    scores, grids = TwoBanks(**SHARED, top_share=top_share).fit(train).predict_patch_maps(test)
    parts = [PatchCore(**SHARED).fit(train), SoftPatch(**SHARED).fit(train)]
    expected = [part.predict_patch_maps(test)[1].numpy() for part in parts]
    np.testing.assert_allclose(grids.numpy(), (expected[0] + expected[1]) / 2, rtol=1e-5)
    n = max(1, int(top_share * SIDE * SIDE))
    worst = [np.sort(one.reshape(5, -1), 1)[:, -n:].mean(1) for one in expected]
    np.testing.assert_allclose(scores, (worst[0] + worst[1]) / 2, rtol=1e-5)


def test_each_bank_names_its_own_worst_places() -> None:
    """The score is not that of the mean map, unless one cell is the highest in both."""
    train, test = feature_set(20, outliers=2), feature_set(30, seed=1)
    found = TwoBanks(**SHARED, top_share=0.01).fit(train)
    scores, grids = found.predict_patch_maps(test)
    assert (scores >= grids.amax((1, 2)).numpy() - 1e-5).all()
    assert (scores > grids.amax((1, 2)).numpy() + 1e-3).any()


def test_parameters_reach_the_parts() -> None:
    train = feature_set(20, outliers=2)
    found = TwoBanks(layers=LAYERS, coreset_ratio=0.1, max_patches=640, outlier_share=0.4).fit(train)
    n = int(0.1 * 640)
    assert len(found.plain_bank_["memory_bank_"]) == len(found.denoised_bank_["memory_bank_"]) == n
    expected = SoftPatch(layers=LAYERS, coreset_ratio=0.1, max_patches=640, outlier_share=0.4).fit(train)
    assert torch.equal(found.denoised_bank_["memory_bank_"], expected.memory_bank_)
    other = TwoBanks(layers=LAYERS, coreset_ratio=0.1, max_patches=640, outlier_share=0.4, seed=1).fit(train)
    assert not torch.equal(found.denoised_bank_["memory_bank_"], other.denoised_bank_["memory_bank_"])


def test_only_the_first_bank_leaves_out_rejected_patches() -> None:
    train = feature_set(20)
    corner = np.zeros((SIDE, SIDE), bool)
    corner[:4, :4] = True
    purified = train.without_patches({int(i): corner for i in train.ids})
    found, plain = TwoBanks(**SHARED).fit(purified), TwoBanks(**SHARED).fit(train)
    assert torch.equal(found.plain_bank_["memory_bank_"], PatchCore(**SHARED).fit(purified).memory_bank_)
    assert not torch.equal(found.plain_bank_["memory_bank_"], plain.plain_bank_["memory_bank_"])
    assert torch.equal(found.denoised_bank_["memory_bank_"], plain.denoised_bank_["memory_bank_"])


def test_a_second_fit_forgets_the_banks_of_the_first() -> None:
    first, second, test = feature_set(10), feature_set(12, seed=5), feature_set(5, seed=1)
    found = TwoBanks(**SHARED).fit(first)
    before = found.predict(test, maps=False).scores
    after = found.fit(second).predict(test, maps=False).scores
    np.testing.assert_array_equal(after, TwoBanks(**SHARED).fit(second).predict(test, maps=False).scores)
    assert (before != after).all()


def test_nothing_is_fitted_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(SoftPatch, "fit", fail)
    found = TwoBanks(**SHARED)
    with pytest.raises(MemoryError):
        found.fit(feature_set(10))
    assert not found.fitted


def test_both_banks_are_asked_with_patches_that_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = TwoBanks(**SHARED).fit(feature_set(10)), []

    def embed(taps: Any) -> Any:
        made.append(len(taps[0]))
        return embed_patches(taps)

    monkeypatch.setattr(maps, "embed_patches", embed)
    found.predict(feature_set(5, seed=1), batch_size=2)
    assert made == [2, 2, 1]


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("top_share", 0.0, r"TwoBanks.top_share must be in \(0, 1\]"),
        ("coreset_ratio", 2.0, r"TwoBanks.coreset_ratio must be in \(0, 1\]"),
        ("outlier_share", 1.0, r"TwoBanks.outlier_share must be in \[0, 1\)"),
        ("max_patches", 0, "TwoBanks.max_patches must be at least 1"),
    ],
)
def test_parameters_out_of_range_are_refused(parameter: str, value: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        TwoBanks(**{parameter: value})
