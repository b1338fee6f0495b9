"""SoftPatch against scikit-learn, PatchCore and brute force."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import LocalOutlierFactor

from flawsift.data.images import ImageSet
from flawsift.detectors.parts.coreset import random_projection
from flawsift.detectors.parts.maps import embed_patches
from flawsift.detectors.parts.neighbors import local_outlier_factor
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.softpatch import RIDGE, SoftPatch, lowest, mahalanobis
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures

LAYERS = ("a", "b")


def feature_set(n: int, seed: int = 0, outliers: int = 0, scale: float = 6.0) -> ImageSet:
    """Two layers of random features, 8 x 8 and 4 x 4; one corner of the first images is far from everything."""
    generator = np.random.default_rng(seed)
    a = generator.normal(0, 1, size=(n, 6, 8, 8)).astype(np.float32)
    b = generator.normal(0, 1, size=(n, 4, 4, 4)).astype(np.float32)
    a[:outliers, :, :3, :3] *= scale
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": a, "b": b})
    return ImageSet(images.ids, images.source, {}, reader)


def embedding(data: ImageSet) -> npt.NDArray[np.float64]:
    """(N, P, C)."""
    features = next(iter(data.batches(LAYERS, batch_size=999))).features
    return embed_patches([features[x].double() for x in LAYERS]).flatten(2).transpose(1, 2).numpy()


def outlier_factors(data: ImageSet, k: int) -> npt.NDArray[np.float64]:
    """(N, P) by scikit-learn, position by position."""
    x = embedding(data)
    columns = [-LocalOutlierFactor(n_neighbors=k).fit(x[:, p]).negative_outlier_factor_ for p in range(x.shape[1])]
    return np.stack(columns, 1)


def places_of(found: SoftPatch | PatchCore, data: ImageSet) -> list[tuple[int, int]]:
    """(image, position) of each entry of the bank."""
    x = embedding(data)
    owners = found.owner_.tolist()
    entries = found.memory_bank_.double().numpy()
    return [(o, int(np.abs(x[o] - e).sum(1).argmin())) for o, e in zip(owners, entries, strict=True)]


def test_maps_are_distances_times_the_factor_of_the_nearest_entry() -> None:
    train, test = feature_set(20, outliers=2), feature_set(4, seed=1)
    found = SoftPatch(layers=LAYERS, coreset_ratio=1.0, lof_neighbors=5).fit(train)
    factors = outlier_factors(train, 5)
    limit = np.sort(factors.flatten())[int(0.85 * factors.size) - 1]
    trusted = factors <= limit
    assert len(found.memory_bank_) == trusted.sum() == int(0.85 * factors.size)
    bank, weights = embedding(train)[trusted], factors[trusted]
    distances = np.linalg.norm(embedding(test)[:, :, None] - bank, axis=3)
    expected = distances.min(2) * weights[distances.argmin(2)]
    scores, maps = found.predict_patch_maps(test)
    np.testing.assert_allclose(maps.flatten(1), expected, rtol=1e-4)
    np.testing.assert_allclose(scores, expected.max(1), rtol=1e-4)
    assert SoftPatch(**SoftPatch.presets["paper"]).squared
    squared = SoftPatch(layers=LAYERS, coreset_ratio=1.0, lof_neighbors=5, squared=True).fit(train)
    of_squares = distances.min(2) ** 2 * weights[distances.argmin(2)]  # the factor itself is not squared
    np.testing.assert_allclose(squared.predict_patch_maps(test)[1].flatten(1), of_squares, rtol=1e-4)
    plain = SoftPatch(layers=LAYERS, coreset_ratio=1.0, lof_neighbors=5, soft_weights=False).fit(train)
    np.testing.assert_allclose(plain.predict_patch_maps(test)[1].flatten(1), distances.min(2), rtol=1e-4)


def test_with_nothing_removed_the_bank_is_the_one_of_patchcore() -> None:
    train = feature_set(20)
    for dimension in (4, 128):  # with and without projections
        size = {"coreset_ratio": 0.1, "projection_dim": dimension, "seed": 3}
        found = SoftPatch(layers=LAYERS, outlier_share=0, **size).fit(train)  # type: ignore[arg-type]
        expected = PatchCore(layers=LAYERS, **size).fit(train)  # type: ignore[arg-type]
        assert torch.equal(found.memory_bank_, expected.memory_bank_)
        assert torch.equal(found.owner_, expected.owner_)


def test_no_removed_patch_enters_the_bank_not_even_first() -> None:
    train = feature_set(30, outliers=3)
    factors = outlier_factors(train, 6)
    limit = np.sort(factors.flatten())[int(0.85 * factors.size) - 1]
    for seed in range(20):
        found = SoftPatch(layers=LAYERS, coreset_ratio=0.01, seed=seed).fit(train)
        assert len(found.memory_bank_) == int(0.01 * factors.size)
        assert max(factors[place] for place in places_of(found, train)) <= limit


def test_planted_outliers_are_amplified_by_patchcore_and_not_here() -> None:
    train = feature_set(30, outliers=3)
    planted = [(i, 8 * y + x) for i in range(3) for y in range(2) for x in range(2)]  # their 3 x 3 means are outliers

    def share(kind: type[PatchCore] | type[SoftPatch], **options: Any) -> float:
        """Of the bank by that of the pool, mean of ten seeds."""
        banks = [kind(layers=LAYERS, coreset_ratio=0.02, seed=seed, **options).fit(train) for seed in range(10)]
        places = [place for found in banks for place in places_of(found, train)]
        return float(np.mean([place in planted for place in places])) / (len(planted) / (30 * 64))

    assert share(PatchCore) > 5
    assert share(PatchCore, coreset="random") < 2
    assert share(SoftPatch) == 0


@pytest.mark.parametrize("discriminator", ["nearest", "gaussian"])
def test_other_discriminators_equal_the_formula(discriminator: Any) -> None:
    train = feature_set(20, outliers=2)
    x = embedding(train).transpose(1, 0, 2)  # (P, N, C)
    if discriminator == "nearest":
        between = np.linalg.norm(x[:, :, None] - x[:, None], axis=3)
        values = np.sort(between, axis=2)[:, :, 1].T
    else:
        centred = x - x.mean(1, keepdims=True)
        covariance = centred.transpose(0, 2, 1) @ centred / 19 + RIDGE * np.mean(centred**2) * np.eye(10)
        values = np.sqrt(np.einsum("pnc,pcd,pnd->np", centred, np.linalg.inv(covariance), centred))
    expected = 1 + values / np.median(values)
    found = SoftPatch(layers=LAYERS, coreset_ratio=1.0, discriminator=discriminator).fit(train)
    trusted = expected <= np.sort(expected.flatten())[int(0.85 * expected.size) - 1]
    np.testing.assert_allclose(found.weight_, expected[trusted], rtol=1e-3)
    assert found.owner_.tolist() == np.nonzero(trusted)[0].tolist()


@pytest.mark.parametrize(("n", "k"), [(11, 5), (13, 6), (60, 5), (60, 20), (230, 6), (230, 20)])
def test_factors_equal_scikit_learn_on_a_projection_of_their_own(n: int, k: int) -> None:
    train = feature_set(n, outliers=2)
    x = torch.from_numpy(embedding(train)).float()
    found = SoftPatch(layers=LAYERS, lof_neighbors=k, projection_dim=4, seed=3)._factors(x, "cpu")
    seen = (x @ random_projection(10, 4, torch.Generator().manual_seed(4))).double().numpy()
    for position in (0, 30, 63):
        expected = -LocalOutlierFactor(n_neighbors=k).fit(seen[:, position]).negative_outlier_factor_
        np.testing.assert_allclose(found[:, position], expected, atol=1e-5)


def test_one_position_may_hold_all_variance() -> None:
    points = torch.zeros(500, 30, 128)
    points[0, 0] = torch.randn(128, generator=torch.Generator().manual_seed(0))  # one image, at one position
    found = mahalanobis(points)
    assert (found[1:] == 0).all()
    x = points[0].double() - points[0].double().mean(0)
    ridge = RIDGE * float(x.square().mean()) / 500 * torch.eye(128).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(x.T @ x / 29 + ridge))
    torch.testing.assert_close(found[0].double(), (x @ inverse * x).sum(1).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discriminator", ["lof", "nearest", "gaussian"])
def test_copies_neither_break_nor_outweigh_anything(discriminator: Any) -> None:
    train = feature_set(30)
    assert isinstance(train.reader, MemoryFeatures)
    for layer in LAYERS:
        train.reader.arrays[layer][:20] = train.reader.arrays[layer][:1]  # 20 copies and 10 others: a third is removed
    options: dict[str, Any] = {"coreset_ratio": 1.0, "discriminator": discriminator, "outlier_share": 0.1}
    found = SoftPatch(layers=LAYERS, **options).fit(train)
    assert found.weight_.max() <= 10
    assert np.isfinite(found.predict(feature_set(3, seed=1)).scores).all()
    for layer in LAYERS:
        train.reader.arrays[layer][:] = 1  # nothing differs from anything
    scores = SoftPatch(layers=LAYERS, **options).fit(train).predict(train).scores
    np.testing.assert_allclose(scores, 0, atol=1e-6)


def test_the_clip_can_be_left_out() -> None:
    train = feature_set(30)
    assert isinstance(train.reader, MemoryFeatures)
    for layer in LAYERS:
        train.reader.arrays[layer][:20] = train.reader.arrays[layer][:1]
    options: dict[str, Any] = {"coreset_ratio": 1.0, "outlier_share": 0.1}
    assert SoftPatch(layers=LAYERS, max_weight=None, **options).fit(train).weight_.max() > 1000
    assert SoftPatch(layers=LAYERS, max_weight=3.0, **options).fit(train).weight_.max() == 3


def test_the_pool_has_the_same_number_of_images_at_each_position() -> None:
    train = feature_set(40)
    options: dict[str, Any] = {"layers": LAYERS, "max_patches": 10 * 64 + 5, "outlier_share": 0, "coreset_ratio": 1.0}
    found = SoftPatch(**options).fit(train)
    places = places_of(found, train)
    assert len(set(places)) == len(places) == 640
    assert np.bincount([p for _, p in places]).tolist() == [10] * 64
    assert len({tuple(sorted(i for i, p in places if p == position)) for position in range(64)}) > 50
    assert len({i for i, _ in places}) == 40, "an image has no say"
    whole = SoftPatch(**options).fit(train.select(train.ids[:10]))
    assert len(whole.memory_bank_) == 640


def test_a_small_pool_still_tells_outliers() -> None:
    train = feature_set(20, outliers=3)
    found = SoftPatch(layers=LAYERS, max_patches=1, coreset_ratio=1.0, lof_neighbors=5, outlier_share=0).fit(train)
    places = places_of(found, train)
    assert np.bincount([p for _, p in places]).tolist() == [3] * 64
    drawn = [[i for i, p in places if p == position] for position in range(64)]
    lonely = [image < 3 and p in (0, 1, 8, 9) and sum(i < 3 for i in drawn[p]) == 1 for image, p in places]
    assert any(lonely), "nothing to tell"
    assert found.weight_[torch.tensor(lonely)].min() > 1.5


def test_a_drawn_pool_knows_no_global_generator() -> None:
    train, banks = feature_set(20), []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            banks.append(SoftPatch(layers=LAYERS, max_patches=640).fit(train).memory_bank_)
            assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*banks)


def test_few_images() -> None:
    one = feature_set(1)
    found = SoftPatch(layers=LAYERS, outlier_share=0, coreset_ratio=1.0).fit(one)
    assert (found.weight_ == 1).all()
    assert len(SoftPatch(layers=LAYERS, coreset_ratio=1.0).fit(one).memory_bank_) == 64  # nothing can be outlying
    detector, x = SoftPatch(), torch.from_numpy(embedding(feature_set(14))).float()
    for n, k in ((2, 1), (4, 1), (5, 2), (12, 5), (13, 6), (14, 6)):
        expected = local_outlier_factor(x[:n].transpose(0, 1).contiguous(), k).T
        torch.testing.assert_close(detector._factors(x[:n], "cpu"), expected)


@pytest.mark.parametrize("n", range(3, 14))
def test_one_defect_among_few_images_stands_out(n: int) -> None:
    x = torch.from_numpy(embedding(feature_set(n, outliers=1, scale=20.0))).float()
    factors = SoftPatch()._factors(x, "cpu")
    assert (factors[:, :2].argmax(0) == 0).all()
    assert factors[0, 0] > 1.5


@given(n=st.integers(1, 200), percent=st.integers(0, 99), seed=st.integers(0, 99))
def test_the_lowest_share_is_exact(n: int, percent: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    rows = lowest(values, 1 - percent / 100)
    assert len(rows) == n - percent * n // 100
    assert sorted(values[rows].tolist()) == list(range(len(rows)))


def test_equal_factors_are_not_torn_apart() -> None:
    assert lowest(torch.ones(10), 0.5).tolist() == list(range(10))


def test_what_it_expects_is_the_nearest_entry() -> None:
    train, test = feature_set(5), feature_set(2, seed=1)
    found = SoftPatch(layers=LAYERS, coreset_ratio=1.0, soft_weights=False).fit(train)
    expected = found._expected(next(iter(test.batches(LAYERS))), "cpu")
    assert expected.shape == (2, 10, 8, 8)
    gap = (expected.flatten(2).transpose(1, 2).double() - torch.from_numpy(embedding(test))).norm(dim=2)
    np.testing.assert_allclose(gap, found.predict_patch_maps(test)[1].flatten(1), rtol=1e-4)


def test_bad_use_is_told() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"discriminator": "svm"}, "SoftPatch.discriminator must be 'lof', 'nearest' or 'gaussian', got 'svm'"),
        ({"lof_neighbors": 0}, "lof_neighbors must be at least 1"),
        ({"outlier_share": 1.0}, r"outlier_share must be in \[0, 1\), got 1.0"),
        ({"max_weight": 0.0}, "max_weight must be positive, or None"),
        ({"coreset_ratio": 0.0}, r"coreset_ratio must be in \(0, 1\]"),
        ({"max_patches": 0}, "max_patches must be at least 1, or None"),
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
    ]
    for params, text in bad:
        with pytest.raises(ParameterError, match=text):
            SoftPatch(**params)
    with pytest.raises(InputError, match="at least one image"):
        SoftPatch(layers=LAYERS).fit(feature_set(3).select([]))
