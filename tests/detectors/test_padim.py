"""PaDiM against closed forms and scipy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis

from flawsift.data.images import ImageSet
from flawsift.detectors import padim as padim_module
from flawsift.detectors.base import Detector
from flawsift.detectors.padim import PaDiM, _held_out_norms, _inverse_factors, _packed
from flawsift.detectors.registry import load_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures


def feature_set(features: npt.NDArray[np.float32]) -> ImageSet:
    """(N, C, h, w) features as a set with ids 0..N-1."""
    n = len(features)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": features})
    return ImageSet(images.ids, images.source, {}, reader)


def random_features(n: int, c: int = 5, h: int = 3, w: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(c, c))
    found = np.einsum("cd,ndhw->nchw", mix, generator.normal(3, 2, size=(n, c, h, w)))
    return np.asarray(found, np.float32)


def grids(detector: Detector, data: ImageSet) -> npt.NDArray[np.float32]:
    """(N, h, w) maps on the patch grid."""
    found: npt.NDArray[np.float32] = detector.predict_patch_maps(data)[1].numpy()
    return found


@pytest.mark.parametrize("standardize", [True, False])
def test_distance_equals_scipy_at_every_position(standardize: bool) -> None:
    x = random_features(40)
    padim = PaDiM(layers=("a",), eps=0.05, standardize=standardize).fit(feature_set(x))
    new = random_features(6, seed=1)
    found = grids(padim, feature_set(new))
    unit = x.astype(np.float64).reshape(40, 5, -1)
    scale = unit.var(0, ddof=1).mean(1) + unit.mean(0).var(1) if standardize else np.ones(5)
    for row in range(3):
        for column in range(4):
            here = x[:, :, row, column].astype(np.float64)
            inverse = np.linalg.inv(np.cov(here.T) + 0.05 * np.diag(scale))
            for i in range(6):
                expected = mahalanobis(new[i, :, row, column], here.mean(0), inverse)
                assert found[i, row, column] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [32, 64])
def test_the_paper_smooths_by_four_pixels_of_any_size(size: int) -> None:
    x = random_features(20, h=8, w=8)
    images = feature_set(x)
    data = ImageSet(
        images.ids, images.source, {}, MemoryFeatures(size, "test", {("", i): i for i in range(20)}, {"a": x})
    )
    paper = PaDiM(**{**PaDiM.presets["paper"], "layers": ("a",)}).fit(data)
    found = paper.predict(data)
    grid = grids(paper, data)
    assert found.maps is not None
    for i in (0, 7):
        fine = torch.nn.functional.interpolate(torch.from_numpy(grid[i])[None, None], (size, size), mode="bilinear")
        np.testing.assert_allclose(found.maps[i], gaussian_filter(fine[0, 0].numpy(), 4.0), rtol=1e-4)
        on_grid = gaussian_filter(grid[i], 4.0 * 8 / size)  # the same Gaussian in cells
        assert found.scores[i] == pytest.approx(on_grid.max(), rel=1e-4)
    half = paper.without(data.select(data.ids[:10]))
    both = half.merged(paper.clone().fit(data.select(data.ids[:10])))
    np.testing.assert_allclose(both.predict(data, maps=False).scores, found.scores, rtol=1e-3)


def test_a_model_of_before_the_gaussian_was_a_choice_still_scores(tmp_path: Path) -> None:
    data = feature_set(random_features(20))
    padim = PaDiM(layers=("a",)).fit(data)
    expected = padim.predict(data, maps=False).scores
    padim.save(tmp_path)
    told = json.loads((tmp_path / "detector.json").read_text())
    del told["params"]["sigma"], told["state"]["size_"]
    (tmp_path / "detector.json").write_text(json.dumps(told))
    before = load_detector(tmp_path)
    assert isinstance(before, PaDiM)
    assert np.array_equal(before.predict(data, maps=False).scores, expected)
    assert before.merged(padim).fitted


def test_mean_squared_distance_over_the_training_set() -> None:
    n, d, eps = 50, 6, 0.3
    x = random_features(n, d)
    padim = PaDiM(layers=("a",), eps=eps, standardize=False).fit(feature_set(x))
    found = (grids(padim, feature_set(x)) ** 2).mean(0)
    for row in range(3):
        for column in range(4):
            s = np.cov(x[:, :, row, column].astype(np.float64).T)
            expected = (n - 1) / n * np.trace(s @ np.linalg.inv(s + eps * np.eye(d)))
            assert found[row, column] == pytest.approx(expected, rel=1e-4)


def test_in_sample_distances_saturate_when_images_are_fewer_than_channels() -> None:
    n = 8  # d^2 = (n - 1)^2 / n for every image: why stage 1 must not use own-subset scores
    x = random_features(n, 30)
    found = grids(PaDiM(layers=("a",), eps=1e-3, standardize=False).fit(feature_set(x)), feature_set(x))
    np.testing.assert_allclose(found**2, (n - 1) ** 2 / n, rtol=5e-3)


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(1, 29), seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 1e3]))
def test_fits_add_and_subtract(cut: int, seed: int, offset: float) -> None:
    data = feature_set(random_features(30, seed=seed) + np.float32(offset))
    order = np.random.default_rng(seed).permutation(30)
    first, second = data.select(order[:cut]), data.select(order[cut:])
    whole = PaDiM(layers=("a",)).fit(data)
    merged = PaDiM(layers=("a",)).fit(first).merged(PaDiM(layers=("a",)).fit(second))
    less = whole.without(second)
    tolerance = 2e-3 if offset else 1e-4
    assert (merged.counts_ == 30).all()
    assert (less.counts_ == cut).all()
    scale = whole.scatter_.abs().max()
    assert (merged.scatter_ - whole.scatter_).abs().max() < tolerance * scale
    assert (merged.mean_ - whole.mean_).abs().max() < tolerance * whole.mean_.abs().max()
    alone = PaDiM(layers=("a",)).fit(first)
    assert (less.scatter_ - alone.scatter_).abs().max() < 10 * tolerance * scale


def models_without(data: ImageSet, padim: PaDiM) -> list[float]:
    """Each image's score by a model fitted without its group."""
    scores = []
    for i in data.ids.tolist():
        rest = data.select([j for j in data.ids.tolist() if data.groups.get(j, j) != data.groups.get(i, i)])
        scores.append(float(padim.clone().fit(rest).predict(data.select([i]), maps=False).scores[0]))
    return scores


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 3), min_size=5, max_size=12), d=st.integers(1, 20), seed=st.integers(0, 1000))
def test_held_out_scores_are_those_of_models_without_the_group(sizes: list[int], d: int, seed: int) -> None:
    groups = dict(enumerate(f"part {g}" for g, size in enumerate(sizes) for _ in range(size)))
    data = replace(feature_set(random_features(len(groups), d, seed=seed)), groups=groups)
    shuffled = data.select(np.random.default_rng(seed).permutation(data.ids))
    padim = PaDiM(layers=("a",), eps=1.0, standardize=False).fit(data)
    np.testing.assert_allclose(padim.held_out_scores(shuffled), models_without(shuffled, padim), rtol=5e-3)


def test_large_groups_are_held_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(feature_set(random_features(12)), groups={0: "a", 1: "a", 2: "a", 5: "b", 6: "b"})
    padim = PaDiM(layers=("a",), standardize=False).fit(data)
    expected = padim.held_out_scores(data)
    monkeypatch.setattr(padim_module, "LARGE_GROUP", 2)
    sizes: list[int] = []

    def watched(products: torch.Tensor, learned: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        sizes.append(products.shape[3])
        return _held_out_norms(products, learned, n)

    monkeypatch.setattr(padim_module, "_held_out_norms", watched)
    np.testing.assert_allclose(padim.held_out_scores(data), expected, rtol=1e-3)
    assert sizes == [1, 2], "three are too many"


def test_held_out_scores_do_not_take_rejected_patches_out() -> None:
    x = random_features(30)
    x[0, :, 0, 0] += 500  # rejected, so no model has seen it
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = True
    data = replace(feature_set(x), groups={0: "a", 1: "a"}).without_patches({0: mask})
    padim = PaDiM(layers=("a",), standardize=False).fit(data)
    found, expected = padim.held_out_scores(data), models_without(data, padim)
    assert expected[0] > 50
    # one image more or less is counted in the divisor of B
    np.testing.assert_allclose(found, expected, rtol=3e-2)


def test_the_variance_of_all_images_serves_held_out_scores() -> None:
    # `standardize`: what one image changes in the variance that eps is relative to is left out
    data = feature_set(random_features(40, 5) * np.float32(7))
    padim = PaDiM(layers=("a",)).fit(data)
    expected = [padim.without(data.select([i])).predict(data.select([i]), maps=False).scores[0] for i in data.ids]
    np.testing.assert_allclose(padim.held_out_scores(data), expected, rtol=1e-2)


def test_rounding_does_not_break_a_singular_covariance() -> None:
    x = random_features(6, 30) * 1000
    x[:, 1] = x[:, 0]
    found = grids(PaDiM(layers=("a",), eps=1e-7, standardize=False).fit(feature_set(x)), feature_set(x))
    assert np.isfinite(found).all()


def test_one_position_moves_the_peak_there() -> None:
    data = feature_set(random_features(60, h=8, w=8))
    padim = PaDiM(layers=("a",)).fit(data)
    odd = random_features(1, h=8, w=8, seed=9)
    odd[0, :, 5, 2] += 60
    assert divmod(int(grids(padim, feature_set(odd)).argmax()), 8) == (5, 2)


@settings(deadline=None)
@given(n=st.integers(1, 200), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_packed_factors_whiten(n: int, d: int, seed: int) -> None:
    root = torch.randn(n, d, d + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scatter, ridge = root @ root.mT, torch.rand(d, dtype=torch.float64) + 0.1
    rows, columns = np.tril_indices(d)
    packed = _packed(scatter.float())
    torch.testing.assert_close(packed, scatter.float()[:, rows, columns])
    whitener = _inverse_factors(packed, torch.full((n, 1), 0.5), ridge.float()).double()
    assert not whitener.triu(1).any()
    product = whitener @ (0.5 * scatter + torch.diag(ridge)) @ whitener.mT
    torch.testing.assert_close(product, torch.eye(d, dtype=torch.float64).expand_as(product), rtol=0, atol=2e-3)


def test_coarse_taps_are_replicated() -> None:
    a, b = random_features(30, 4, 8, 8), random_features(30, 3, 4, 4, seed=1)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 30)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(30)}, {"a": a, "b": b})
    both = ImageSet(images.ids, images.source, {}, reader)
    joined = np.concatenate([a, b.repeat(2, axis=2).repeat(2, axis=3)], axis=1)
    one, two = PaDiM(layers=("a", "b")).fit(both), PaDiM(layers=("a",)).fit(feature_set(joined))
    np.testing.assert_allclose(grids(one, both), grids(two, feature_set(joined)), rtol=1e-4)


def test_the_file_holds_half_the_matrix(tmp_path: Path) -> None:
    padim = PaDiM(layers=("a",)).fit(feature_set(random_features(20, 40, 8, 8)))
    padim.save(tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size < 64 * (40 * 41 // 2 + 40) * 4 + 4000
    loaded = load_detector(tmp_path)
    data = feature_set(random_features(3, 40, 8, 8, seed=5))
    np.testing.assert_array_equal(grids(loaded, data), grids(padim, data))


def test_channels_are_shared_by_submodels() -> None:
    padim = PaDiM(layers=("a",), n_features=3, seed=4)
    one, two = padim.clone().fit(feature_set(random_features(9))), padim.clone().fit(feature_set(random_features(7)))
    assert one.channels_.tolist() == two.channels_.tolist()
    assert len(one.channels_) == 3
    other = PaDiM(layers=("a",), n_features=3, seed=6).fit(feature_set(random_features(9)))
    assert other.channels_.tolist() != one.channels_.tolist()


def test_bad_use_is_told() -> None:
    with pytest.raises(ParameterError, match=r"PaDiM.n_features must be at least 1, got 0\."):
        PaDiM(n_features=0)
    with pytest.raises(ParameterError, match="PaDiM.eps must be positive, got -1"):
        PaDiM(eps=-1)
    with pytest.raises(ParameterError, match="PaDiM.seed must not be negative"):
        PaDiM(seed=-1)
    with pytest.raises(ParameterError, match="PaDiM.layers must name at least one layer"):
        PaDiM(layers=())
    with pytest.raises(InputError, match="at least one image"):
        PaDiM(layers=("a",)).fit(feature_set(random_features(3)).select([]))
    fitted = PaDiM(layers=("a",)).fit(feature_set(random_features(3)))
    with pytest.raises(InputError, match=r"fitted on a patch grid of \[3, 4\]"):
        fitted.predict(feature_set(random_features(3, h=5)))


@given(seed=st.integers(0, 99))
@settings(deadline=None)
def test_rejected_patches_do_not_count(seed: int) -> None:
    """Each position's Gaussian is that of the images which keep their patch there."""
    features = random_features(20, seed=seed)
    rejected = np.random.default_rng(seed).random((20, 3, 4)) < 0.3
    rejected[:8] = False  # enough images everywhere
    spoiled = features.copy()
    spoiled[np.broadcast_to(rejected[:, None], features.shape)] = 1e4
    data = feature_set(spoiled).without_patches(dict(enumerate(rejected)))
    padim = PaDiM(layers=("a",), standardize=False).fit(data)
    keep = ~rejected[:, 1, 2]
    alone = PaDiM(layers=("a",), standardize=False).fit(feature_set(features[keep]))
    found, expected = grids(padim, feature_set(features)), grids(alone, feature_set(features))
    np.testing.assert_allclose(found[:, 1, 2], expected[:, 1, 2], rtol=1e-2)
    assert padim.counts_[6].item() == keep.sum()


def test_a_position_without_patches_is_finite() -> None:
    everywhere = np.zeros((6, 3, 4), bool)
    everywhere[:, 1, 1] = True
    features = random_features(6)
    padim = PaDiM(layers=("a",)).fit(feature_set(features).without_patches(dict(enumerate(everywhere))))
    assert np.isfinite(grids(padim, feature_set(features))).all()


STATISTICS = """
import sys
import numpy as np
from flawsift.data.images import ImageSet
from flawsift.detectors.padim import PaDiM
from flawsift.features.readers import MemoryFeatures

n = 17
images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
features = np.random.default_rng(0).normal(size=(n, 20, 8, 8)).astype(np.float32)
reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": features})
model = PaDiM(layers=("a",)).fit(ImageSet(images.ids, images.source, {}, reader), device="cpu")
sys.stdout.write(model.mean_.numpy().tobytes().hex() + model.scatter_.numpy().tobytes().hex())
"""


def test_statistics_do_not_hang_on_the_kernels_and_threads_of_mkl() -> None:
    """Torch's products on the CPU may take another kernel in another process; a last bit is 1e-4 of a score."""
    settings_of: tuple[dict[str, str], ...] = ({}, {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"})
    first, second = (
        subprocess.run([sys.executable, "-c", STATISTICS], env={**os.environ, **more}, capture_output=True, check=True)
        for more in settings_of
    )
    assert len(first.stdout) > 0
    assert first.stdout == second.stdout
