"""PatchCore against brute force."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.patchcore import PatchCore
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures


def feature_set(n: int, seed: int = 0, shift: float = 0.0) -> ImageSet:
    """Two layers of random features, 8 x 8 and 4 x 4."""
    generator = np.random.default_rng(seed)
    a = generator.normal(shift, 1, size=(n, 6, 8, 8)).astype(np.float32)
    b = generator.normal(shift, 1, size=(n, 4, 4, 4)).astype(np.float32)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    return ImageSet(
        images.ids, images.source, {}, MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": a, "b": b})
    )


def batch_of(data: ImageSet) -> Batch:
    return next(iter(data.batches(("a", "b"))))


def embedding(data: ImageSet) -> npt.NDArray[np.float64]:
    """(N, P, C) by the definition: 3 x 3 means with zero padding, bilinear to the largest grid, concatenated."""
    features = batch_of(data).features
    parts = []
    for name in ("a", "b"):
        x = F.pad(features[name].double(), (1, 1, 1, 1))
        mean = x.unfold(2, 3, 1).unfold(3, 3, 1).mean((4, 5))
        parts.append(F.interpolate(mean, (8, 8), mode="bilinear", align_corners=False))
    return torch.cat(parts, 1).flatten(2).transpose(1, 2).numpy()


def nearest(data: ImageSet, bank: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, P, M) ascending distances to all bank entries."""
    distances: npt.NDArray[np.float64] = np.linalg.norm(embedding(data)[:, :, None] - bank[None, None], axis=3)
    return np.sort(distances, axis=2)


LAYERS = ("a", "b")


@pytest.mark.parametrize("k", [1, 3])
def test_maps_equal_brute_force(k: int) -> None:
    train, test = feature_set(5), feature_set(4, seed=1)
    found = PatchCore(layers=LAYERS, coreset_ratio=1.0, n_neighbors=k).fit(train)
    assert len(found.memory_bank_) == 5 * 64
    expected = nearest(test, embedding(train).reshape(-1, 10))[:, :, :k].mean(2)
    scores, maps = found.predict_patch_maps(test)
    np.testing.assert_allclose(maps.flatten(1), expected, rtol=1e-4)
    np.testing.assert_allclose(scores, expected.max(1), rtol=1e-4)


def test_training_images_score_zero_on_a_full_bank() -> None:
    train = feature_set(5)  # why stage 1 leaves out the sub-model that saw an image
    assert (PatchCore(layers=LAYERS, coreset_ratio=1.0).fit(train).predict_patch_maps(train)[0] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_reweighting_equals_the_formula(scale: float) -> None:
    train, test = feature_set(5), feature_set(4, seed=1, shift=scale - 1)
    b = 4
    plain = PatchCore(layers=LAYERS, coreset_ratio=1.0).fit(train)
    found = PatchCore(layers=LAYERS, coreset_ratio=1.0, reweight_neighbors=b).fit(train)
    s, maps = plain.predict_patch_maps(test)
    weighted = found.predict_patch_maps(test)[0]
    bank, patches = embedding(train).reshape(-1, 10), embedding(test)
    for i in range(4):
        worst = patches[i, int(maps[i].flatten().argmax())]
        to_bank = np.linalg.norm(bank - worst, axis=1)
        around = np.argsort(np.linalg.norm(bank - bank[to_bank.argmin()], axis=1), kind="stable")[:b]
        weight = 1 - 1 / np.exp(to_bank[around] - to_bank.min()).sum()
        assert weighted[i] == pytest.approx(weight * s[i], rel=1e-3)
        assert -1e-6 <= weighted[i] / s[i] < 1


def test_the_bank_is_a_farthest_first_coreset_and_knows_its_images() -> None:
    train = feature_set(10)
    found = PatchCore(layers=LAYERS, coreset_ratio=0.1, seed=3).fit(train)
    assert found.memory_bank_.shape == (64, 10)
    patches = embedding(train)
    for entry, owner in zip(found.memory_bank_.numpy(), found.owner_.tolist(), strict=True):
        assert np.abs(patches[owner] - entry).sum(1).min() < 1e-4
    greedy = nearest(train, found.memory_bank_.double().numpy())[:, :, 0].max()
    random = PatchCore(layers=LAYERS, coreset_ratio=0.1, coreset="random", seed=3).fit(train)
    assert greedy < nearest(train, random.memory_bank_.double().numpy())[:, :, 0].max()


def test_the_pool_is_drawn_evenly() -> None:
    train = feature_set(10)
    found = PatchCore(layers=LAYERS, max_patches=70, coreset_ratio=1.0).fit(train)
    assert np.bincount(found.owner_.numpy()).tolist() == [7] * 10
    everything = PatchCore(layers=LAYERS, max_patches=None, coreset_ratio=1.0).fit(train)
    assert len(everything.memory_bank_) == 640


def test_outliers_are_amplified_by_greedy_and_not_by_random() -> None:
    train = feature_set(20)
    assert isinstance(train.reader, MemoryFeatures)
    for layer in LAYERS:
        train.reader.arrays[layer][0] *= 6  # one image of twenty is far from everything: 5 % of the patches
    share = {}
    for coreset in ("greedy", "random"):
        owners = PatchCore(layers=LAYERS, coreset_ratio=0.05, coreset=coreset).fit(train).owner_
        share[coreset] = (owners == 0).float().mean().item()
    assert share["greedy"] > 0.5
    assert share["random"] < 0.2


def test_what_it_expects_is_the_nearest_entry() -> None:
    train, test = feature_set(5), feature_set(2, seed=1)
    found = PatchCore(layers=LAYERS, coreset_ratio=1.0).fit(train)
    expected = found._expected(batch_of(test), "cpu")
    assert expected.shape == (2, 10, 8, 8)
    gap = (expected.flatten(2).transpose(1, 2).double() - torch.from_numpy(embedding(test))).norm(dim=2)
    np.testing.assert_allclose(gap, found.predict_patch_maps(test)[1].flatten(1), rtol=1e-4)


def test_bad_use_is_told() -> None:
    bad: list[tuple[dict[str, object], str]] = [
        ({"coreset_ratio": 1.5}, r"PatchCore.coreset_ratio must be in \(0, 1\], got 1.5\."),
        ({"coreset_ratio": 0}, "coreset_ratio must be in"),
        ({"layers": "stride8"}, "layers must be a list of names"),
        ({"layers": (8,)}, "layers must be a list of names"),
        ({"coreset": "kmeans"}, "coreset must be 'greedy' or 'random', got 'kmeans'"),
        ({"max_patches": 0}, "max_patches must be at least 1, or None"),
        ({"n_neighbors": 0}, "n_neighbors must be at least 1"),
        ({"projection_dim": 0}, "projection_dim must be"),
        ({"reweight_neighbors": -1}, "reweight_neighbors must not be negative"),
    ]
    for params, text in bad:
        with pytest.raises(ParameterError, match=text):
            PatchCore(**params)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one image"):
        PatchCore(layers=LAYERS).fit(feature_set(3).select([]))


def test_rejected_patches_never_enter_the_bank() -> None:
    data = feature_set(12)
    rejected = np.random.default_rng(1).random((12, 8, 8)) < 0.4
    rejected[3] = True  # an image without any patch left
    some = data.without_patches(dict(enumerate(rejected)))
    fitted = PatchCore(layers=("a", "b"), coreset_ratio=1.0).fit(some)
    every = PatchCore(layers=("a", "b"), coreset_ratio=1.0).fit(data)
    kept = ~torch.from_numpy(rejected).flatten()
    assert torch.equal(fitted.memory_bank_, every.memory_bank_[kept])
    assert torch.equal(fitted.owner_, every.owner_[kept])
    nothing = data.without_patches({i: np.ones((8, 8), bool) for i in range(12)})
    with pytest.raises(InputError, match="patch to learn from"):
        PatchCore(layers=("a", "b")).fit(nothing)


def test_what_is_rejected_changes_no_other_images_draw() -> None:
    rejected = np.zeros((12, 8, 8), bool)
    rejected[2, :4] = True
    fitted = [
        PatchCore(layers=("a", "b"), coreset="random", coreset_ratio=1.0, max_patches=120).fit(data)
        for data in (feature_set(12), feature_set(12).without_patches({2: rejected[2]}))
    ]
    pools = [{tuple(row) for row in f.memory_bank_[f.owner_ != 2].tolist()} for f in fitted]
    assert pools[0] == pools[1]


def test_a_quota_is_drawn_from_accepted_patches_only() -> None:
    rejected = np.random.default_rng(1).random((12, 8, 8)) < 0.4
    data = feature_set(12).without_patches(dict(enumerate(rejected)))
    bank = PatchCore(layers=("a", "b"), coreset_ratio=1.0, max_patches=120).fit(data).memory_bank_
    assert len(bank) == 120
    bad = PatchCore(layers=("a", "b"), coreset_ratio=1.0).fit(
        feature_set(12).without_patches(dict(enumerate(~rejected)))
    )
    assert not set(map(tuple, bank.tolist())) & set(map(tuple, bad.memory_bank_.tolist()))
