"""Quorum against brute force."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.parts.maps import embed_patches
from flawsift.detectors.protocols import Additive, LeavesOut
from flawsift.detectors.quorum import GROWTH, MOST, SHARP, Quorum
from flawsift.detectors.registry import load_detector
from flawsift.errors import InputError, ModelError, NotFittedError, ParameterError
from flawsift.features.readers import MemoryFeatures

LAYERS = ("a", "b")


def feature_set(n: int, seed: int = 0, groups: dict[int, str] | None = None, spread: float = 1.0) -> ImageSet:
    """Two layers of random features, 8 x 8 and 4 x 4; patches are a 4 x 4 grid."""
    generator = np.random.default_rng(seed)
    a = (spread * generator.normal(size=(n, 6, 8, 8))).astype(np.float32)
    b = (spread * generator.normal(size=(n, 4, 4, 4))).astype(np.float32)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, {"a": a, "b": b})
    return ImageSet(images.ids, images.source, groups or {}, reader)


def patches_of(data: ImageSet, *, mean: bool = True) -> npt.NDArray[np.float64]:
    """(N, 16, 10) by the definition: PatchCore's embedding, means of 2 x 2; or (N, 64, 10) without."""
    batch: Batch = next(iter(data.batches(LAYERS, batch_size=99)))
    embedding = embed_patches([batch.features[layer] for layer in LAYERS])
    embedding = F.avg_pool2d(embedding, 2) if mean else embedding
    return embedding.flatten(2).transpose(1, 2).double().numpy()


def scores_of(
    queries: npt.NDArray[np.float64], bank: npt.NDArray[np.float64], groups: list[str], k: int, own: str | None
) -> npt.NDArray[np.float64]:
    """(P,) mean over the k nearest groups of the distance to the nearest patch of each."""
    each = np.linalg.norm(queries[:, None, None] - bank[None], axis=3).min(2)  # (P, N)
    names = [g for g in dict.fromkeys(groups) if g != own]
    nearest = np.stack([each[:, [i for i, g in enumerate(groups) if g == name]].min(1) for name in names], 1)
    mean: npt.NDArray[np.float64] = np.sort(nearest, 1)[:, :k].mean(1)
    return mean


def exact(**params: object) -> Quorum:
    return Quorum(layers=LAYERS, precision="float32", **params)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("grouped", [False, True])
def test_maps_and_scores_equal_brute_force(k: int, grouped: bool) -> None:
    groups = {0: "x", 3: "x", 4: "y", 5: "y"} if grouped else {}
    train, test = feature_set(7, groups=groups), feature_set(3, seed=1)
    fitted = exact(n_groups=k).fit(train)
    scores, maps = fitted.predict_patch_maps(test)
    bank = patches_of(train)
    expected = np.stack([scores_of(q, bank, train.group_names, k, None) for q in patches_of(test)])
    np.testing.assert_allclose(scores, expected.max(1), rtol=2e-3)
    coarse = expected.reshape(3, 4, 4).repeat(2, 1).repeat(2, 2)
    single = np.stack([scores_of(q, bank, train.group_names, k, None) for q in patches_of(test, mean=False)])
    low = np.quantile(expected, 1 - SHARP, axis=1)[:, None, None]
    sharpened = np.where(coarse >= low, single.reshape(3, 8, 8), coarse)
    clear = np.abs(coarse / low - 1) > 0.01  # rounding decides about the others
    assert clear.mean() > 0.75
    np.testing.assert_allclose(maps.numpy()[clear], (sharpened * fitted.scale_)[clear], rtol=3e-3)


@pytest.mark.parametrize("grouped", [False, True])
def test_held_out_scores_are_those_of_a_model_without_the_group(grouped: bool) -> None:
    groups = {0: "x", 3: "x", 4: "y", 5: "y"} if grouped else {}
    train = feature_set(7, groups=groups)
    fitted = exact(n_groups=2).fit(train)
    held_out = fitted.held_out(train)
    for position, id_ in enumerate(train.ids.tolist()):
        name = train.group_names[position]
        others = [i for i, group in zip(train.ids.tolist(), train.group_names, strict=True) if group != name]
        alone = exact(n_groups=2).fit(train.select(others))
        score = alone.predict(train.select([id_]), maps=False).scores
        np.testing.assert_allclose(held_out.scores[position], score[0], rtol=1e-4)
        bank, queries = patches_of(train.select(others)), patches_of(train.select([id_]))
        grid = scores_of(queries[0], bank, alone.groups_, 2, None)
        np.testing.assert_allclose(held_out.maps[position].flatten(), grid, rtol=2e-3)
        assert held_out.evidence.n_others[position] == len(others)
        removed = fitted.without(train.select([i for i in train.ids.tolist() if i not in others]))
        np.testing.assert_allclose(removed.predict(train.select([id_]), maps=False).scores, score, rtol=1e-4)
    np.testing.assert_array_equal(fitted.held_out_scores(train), held_out.scores)


def test_the_evidence_is_the_worst_patch_and_its_nearest() -> None:
    train = feature_set(5, groups={1: "x", 2: "x"})
    held_out = exact(n_groups=2).fit(train).held_out(train)
    evidence = held_out.evidence
    patches = patches_of(train)
    for i in range(5):
        assert evidence.places[i] == held_out.maps[i].flatten().argmax()
        worst = patches[i, evidence.places[i]]
        near = list(zip(evidence.images[i].tolist(), evidence.image_places[i].tolist(), strict=True))
        measured = [np.linalg.norm(patches[j, place] - worst) for j, place in near if j >= 0]
        np.testing.assert_allclose(measured, evidence.distances[i][: len(measured)], rtol=1e-2)
        assert len(measured) == 3
        assert {train.group_names[j] for j, _ in near}.isdisjoint({train.group_names[i]})
    assert evidence.n_others.tolist() == [4, 3, 3, 4, 4]


def test_one_defect_does_not_explain_another() -> None:
    """With k = 1 the second of two equal defects scores as ordinary, with k = 2 both stand out."""
    train = feature_set(12, spread=0.1)
    assert isinstance(train.reader, MemoryFeatures)
    train.reader.arrays["a"][[3, 7], :, 2:4, 2:4] += 3.0
    found = {k: exact(n_groups=k).fit(train).held_out_scores(train) for k in (1, 2)}
    others = [i for i in range(12) if i not in (3, 7)]
    assert found[1][[3, 7]].min() < 2 * found[1][others].max()
    assert found[2][[3, 7]].min() > 2 * found[2][others].max()


@given(n=st.integers(2, 20), spread=st.sampled_from([0.0, 1.0]), n_same=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_k_is_the_most_that_the_median_image_allows(n: int, spread: float, n_same: int, seed: int) -> None:
    train = feature_set(n, seed=seed, spread=spread)
    assert isinstance(train.reader, MemoryFeatures)
    for values in train.reader.arrays.values():
        values[: min(n, n_same)] = values[0]
    k = exact().fit(train).k_
    medians = [np.median(exact(n_groups=j).fit(train).held_out_scores(train)) for j in range(1, MOST + 1)]
    assert 2 <= k <= MOST
    slack = 1e-3 * max(medians)
    if k < min(MOST, n - 1):
        assert medians[k] > GROWTH * medians[0] - slack
    if 2 < k < n:
        assert medians[k - 1] <= GROWTH * medians[0] + slack


def test_rejected_patches_never_vouch() -> None:
    train, test = feature_set(4), feature_set(2, seed=1)
    corner = np.zeros((4, 4), bool)
    corner[0, :2] = True
    rejected = train.without_patches({1: corner, 2: np.ones((4, 4), bool)})
    fitted = exact(n_groups=2).fit(rejected)
    assert fitted.ids_.tolist() == [0, 1, 3]
    bank = patches_of(train)
    bank[1, :2] = 1e6
    expected = [scores_of(q, bank[[0, 1, 3]], ["0", "1", "3"], 2, None).max() for q in patches_of(test)]
    np.testing.assert_allclose(fitted.predict(test, maps=False).scores, expected, rtol=2e-3)
    with pytest.raises(InputError, match="at least one image with a patch"):
        exact().fit(train.without_patches(dict.fromkeys(range(4), np.ones((4, 4), bool))))


def test_models_of_two_sets_merge() -> None:
    train, test = feature_set(8, groups={6: "x", 7: "x"}), feature_set(3, seed=1)
    assert isinstance(exact(), Additive)
    assert isinstance(exact(), LeavesOut)
    whole = exact(n_groups=3).fit(train)
    parts = [exact(n_groups=3).fit(train.select(ids)) for ids in (range(3), range(3, 8))]
    merged = parts[0].merged(parts[1])
    np.testing.assert_allclose(merged.predict(test, maps=False).scores, whole.predict(test, maps=False).scores)
    with pytest.raises(InputError, match="in both models"):
        merged.merged(parts[0])
    with pytest.raises(InputError, match="No image is left"):
        merged.without(train)


def test_large_sets_are_drawn_by_group() -> None:
    train = feature_set(10, groups={i: f"pair {i // 2}" for i in range(10)})
    fitted = exact(max_images=7).fit(train)
    assert len(fitted.ids_) == 6
    assert len(set(fitted.groups_)) == 3
    again = exact(max_images=7, seed=0).fit(train)
    assert again.ids_.tolist() == fitted.ids_.tolist()
    assert len(set(exact(max_images=1).fit(train).groups_)) == 2
    assert fitted.n_drawn == 6
    assert exact().fit(train).n_drawn is None
    # images that were not drawn are scored as new ones
    assert np.isfinite(fitted.held_out_scores(train)).all()


def test_one_group_has_no_held_out_scores() -> None:
    train = feature_set(3, groups=dict.fromkeys(range(3), "x"))
    fitted = exact().fit(train)
    assert np.isfinite(fitted.predict(train, maps=False).scores).all()
    with pytest.raises(InputError, match="only one group"):
        fitted.held_out(train)
    with pytest.raises(NotFittedError):
        exact().held_out(train)
    with pytest.raises(InputError, match="no image to score"):
        fitted.held_out(train.select([]))


def test_features_without_a_number_are_refused() -> None:
    train = feature_set(4)
    assert isinstance(train.reader, MemoryFeatures)
    train.reader.arrays["a"][2, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="not numbers"):
        exact().fit(train)


@pytest.mark.parametrize("params", [{"n_groups": 0}, {"n_groups": 2.5}, {"n_groups": "all"}, {"max_images": 0}])
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(params))):
        Quorum(**params)  # type: ignore[arg-type]


def test_bfloat16_ranks_as_float32_does() -> None:
    train, test = feature_set(30), feature_set(20, seed=1)
    for value in (exact(n_groups=3), Quorum(layers=LAYERS, n_groups=3)):
        assert json.loads(json.dumps(value.params()))["n_groups"] == 3
    found = [
        d.fit(train).predict(test, maps=False).scores for d in (exact(n_groups=3), Quorum(layers=LAYERS, n_groups=3))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=0.01)
    assert torch.tensor(found[0]).isfinite().all()


def test_maps_are_on_the_scale_of_scores() -> None:
    train, test = feature_set(30), feature_set(20, seed=1)
    scores, maps = exact().fit(train).predict_patch_maps(test)
    assert abs(float(np.median(maps.flatten(1).amax(1).numpy() / scores)) - 1) < 0.1


def test_odd_grids_keep_their_borders() -> None:
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 6)
    values = np.random.default_rng(0).normal(size=(6, 5, 7, 7)).astype(np.float32)
    values[5, :, 6, 6] += 30  # seen by the last row and column only
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(6)}, {"a": values})
    data = ImageSet(images.ids, images.source, {}, reader)
    scores, maps = Quorum(layers=("a",)).fit(data.select(range(5))).predict_patch_maps(data)
    assert maps.shape == (6, 7, 7)
    assert scores[5] > 2 * scores[:5].max()
    assert int(maps[5].argmax()) in (40, 41, 47, 48)
    assert maps[5, 6, 6] > 2 * maps[:5].max()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("k_", value) for value in (None, 0, 2.0, True, "2")),
        *(("scale_", value) for value in (None, 0.0, -1.0, float("nan"), float("inf"), "1")),
        *(("groups_", value) for value in (None, "x" * 7, ["x"] * 6, [["x"]] * 7, [0] * 7)),
        ("drawn_", 1),
    ],
)
def test_learned_values_that_no_fit_leaves_are_errors_of_the_file(name: str, value: Any, tmp_path: Path) -> None:
    digest = exact().fit(feature_set(7), device="cpu").save(tmp_path)
    assert load_detector(tmp_path, exact(), digest=digest).fitted
    path = tmp_path / "detector.json"
    content = json.loads(path.read_text())
    for changed in ({**content["state"], name: value}, {k: v for k, v in content["state"].items() if k != name}):
        path.write_text(json.dumps({**content, "state": changed}))
        with pytest.raises(ModelError, match=rf"detector\.json.*learns no such {name}"):
            load_detector(tmp_path, exact())
