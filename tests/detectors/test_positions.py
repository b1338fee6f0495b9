"""Detectors with a memory for each tile: what is compared with what, against brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift.data.images import ImageSet
from flawsift.deploy.graph import Graph
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.maps import embed_batch
from flawsift.detectors.parts.positions import compared_by_tile, tile_of, windows
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.quorum import Quorum
from flawsift.detectors.registry import load_detector, make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures
from flawsift.features.tiling import Tiles
from flawsift.models.calibration import Calibration
from flawsift.testing import tiny_backbone

LAYERS = ("a",)
HALVES = "64:0"  # of an input of 128 x 128: four tiles
TILED: list[dict[str, Any]] = [
    {"detector": "quorum", "precision": "float32"},
    {"detector": "patchcore", "coreset_ratio": 1.0},
]


def tiled(detector: str, cut: str | None = HALVES, **params: Any) -> Detector:
    return make_detector(detector, layers=LAYERS, tiles_by_position=cut, **params)


def of_features(values: npt.NDArray[np.float32], size: int = 128) -> ImageSet:
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * len(values))
    ids = {("", i): i for i in range(len(values))}
    return ImageSet(images.ids, images.source, {}, MemoryFeatures(size, "test", ids, {"a": values}))


def random_set(n: int, seed: int, grid: int = 8) -> ImageSet:
    values = np.random.default_rng(seed).normal(size=(n, 6, grid, grid))
    return of_features(values.astype(np.float32))


def part(data: ImageSet, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
    batch = next(iter(data.batches(LAYERS, batch_size=99)))
    return batch.features["a"].numpy()[:, :, rows, columns]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.sampled_from(["64:0", "128:64", "192:64"]), st.data())
def test_each_place_is_answered_for_once_by_a_tile_that_sees_it(h: int, w: int, cut: str, data: st.DataObject) -> None:
    size = (32 * data.draw(st.integers(2, 16)), 32 * data.draw(st.integers(2, 16)))
    tiles = windows(cut, size, (h, w))
    own = torch.cat([one.own for one in tiles])
    assert own.sort().values.tolist() == list(range(h * w))
    assert all(torch.isin(one.own, one.seen).all() for one in tiles)
    edge = int(cut.partition(":")[0])
    for one in tiles:
        rows, columns = (one.seen // w + 0.5) * size[0] / h, (one.seen % w + 0.5) * size[1] / w
        for middles in (rows, columns):
            assert len(middles) == 0 or middles.max() - middles.min() < edge
    assert (tile_of(tiles)[tiles[-1].own] == len(tiles) - 1).all()


def test_overlaps_are_seen_by_both() -> None:
    tiles = windows("128:64", (256, 64), (8, 2))  # cells of 32 pixels; tiles begin at 0, 64 and 128
    assert [sorted(set((one.own // 2).tolist())) for one in tiles] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert [sorted(set((one.seen // 2).tolist())) for one in tiles] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


@pytest.mark.parametrize("params", TILED, ids=lambda params: params["detector"])
def test_what_is_ordinary_elsewhere_is_no_excuse(params: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    looks = generator.normal(size=(6, 2, 2)).repeat(4, 1).repeat(4, 2)  # each tile has its own look
    train = (looks + 0.01 * generator.normal(size=(12, 6, 8, 8))).astype(np.float32)
    wrong = train[:1].copy()
    wrong[:, :, :4, :4] = train[1, :, 4:, 4:]  # what belongs at the lower right, at the upper left
    found = {}
    for cut in (None, HALVES):
        fitted = tiled(cut=cut, **params).fit(of_features(train[2:]))
        scores = [fitted.predict(of_features(some), maps=False).scores[0] for some in (train[:1], wrong)]
        found[cut] = scores[1] / scores[0]
    assert found[HALVES] > 3 * found[None]


def test_quorum_compares_within_the_tile() -> None:
    train, test = random_set(7, 0), random_set(3, 1)
    fitted = tiled("quorum", precision="float32", n_groups=2).fit(train)
    whole = tiled("quorum", None, precision="float32", n_groups=2).fit(train)
    assert isinstance(fitted, Quorum)
    assert isinstance(whole, Quorum)
    bank = whole.memory_bank_.float().view(7, 4, 4, -1)
    asked = next(iter(test.batches(LAYERS, batch_size=9)))
    queries = fitted._embed(asked).permute(0, 2, 3, 1)
    expected = torch.empty(3, 4, 4)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 4)):
            near = torch.cdist(queries[:, rows, columns].flatten(0, 2), bank[:, rows, columns].flatten(0, 2))
            each = near.view(-1, 7, 4).amin(2).sort(1).values[:, :2].mean(1)
            expected[:, rows, columns] = each.view(3, 2, 2)
    np.testing.assert_allclose(fitted.predict(test, maps=False).scores, expected.flatten(1).amax(1), rtol=2e-3)
    worst = expected.flatten(1).argmax(1)  # where maps are of single patches, which have tiles too
    fine = embed_batch(asked, LAYERS).permute(0, 2, 3, 1)
    maps = fitted.predict_patch_maps(test)[1] / fitted.scale_
    for image, place in enumerate(worst.tolist()):
        row, column = divmod(place, 4)
        rows, columns = (slice(2 * (at // 2), 2 * (at // 2) + 2) for at in (row, column))
        near = torch.cdist(fine[image, 2 * row, 2 * column][None], bank[:, rows, columns].flatten(0, 2))
        single = near.view(7, 4).amin(1).sort().values[:2].mean()
        assert float(maps[image, 2 * row, 2 * column]) == pytest.approx(float(single), rel=2e-3)
    assert not np.allclose(fitted.predict(test).scores, whole.predict(test).scores, rtol=2e-3)


def test_patchcore_has_a_bank_for_each_tile() -> None:
    train, test = random_set(5, 0), random_set(4, 1)
    fitted = tiled("patchcore", coreset_ratio=1.0, n_neighbors=2).fit(train)
    assert isinstance(fitted, PatchCore)
    assert fitted.tile_.bincount().tolist() == [5 * 16] * 4
    maps = fitted.predict_patch_maps(test)[1]
    mine, others = (
        fitted._embed(next(iter(some.batches(LAYERS, batch_size=9)))).permute(0, 2, 3, 1) for some in (test, train)
    )
    near = torch.cdist(mine[:, :4, 4:].flatten(0, 2), others[:, :4, 4:].flatten(0, 2)).sort(1).values
    np.testing.assert_allclose(maps[:, :4, 4:].flatten(), near[:, :2].mean(1), rtol=1e-4)
    expected = fitted._expected(next(iter(test.batches(LAYERS, batch_size=9))), "cpu")
    nearest = (expected.permute(0, 2, 3, 1) - mine)[:, :4, 4:].norm(dim=3)
    np.testing.assert_allclose(nearest.flatten(), near[:, 0], rtol=1e-4)


def test_held_out_scores_and_evidence_are_of_the_tile() -> None:
    data = random_set(6, 2)
    fitted = tiled("quorum", precision="float32", n_groups=2).fit(data)
    assert isinstance(fitted, Quorum)
    held = fitted.held_out(data)
    for position in range(6):
        one = data.select(data.ids[position : position + 1])
        alone = tiled("quorum", precision="float32", n_groups=2).fit(data.select(np.delete(data.ids, position)))
        assert held.scores[position] == pytest.approx(float(alone.predict(one).scores[0]), rel=2e-3)
        again = fitted.without(one)
        assert held.scores[position] == pytest.approx(float(again.predict(one).scores[0]), rel=2e-3)
    numbers = tile_of(windows(HALVES, (128, 128), (4, 4)))
    there = held.evidence.image_places >= 0
    assert there.all()
    assert (numbers[held.evidence.image_places] == numbers[held.evidence.places][:, None]).all()
    near = held.evidence.nearest(0)[0]
    bank = fitted.memory_bank_.float()
    mine, other = bank[0, held.evidence.places[0]], bank[near[0], near[1]]
    assert float((mine - other).norm()) == pytest.approx(near[2], rel=5e-3)


@pytest.mark.parametrize("params", TILED, ids=lambda params: params["detector"])
def test_tiles_survive_saving_and_other_sizes_are_refused(params: dict[str, Any], tmp_path: Path) -> None:
    data = random_set(6, 3)
    fitted = tiled(**params).fit(data)
    fitted.save(tmp_path)
    again = load_detector(tmp_path)
    np.testing.assert_array_equal(again.predict(data).scores, fitted.predict(data).scores)
    with pytest.raises(InputError, match="Tiles lie on a patch grid"):
        again.predict(random_set(2, 4, grid=6))
    with pytest.raises(ParameterError, match="cannot be exported"):
        Graph(tiny_backbone(), fitted.clone(layers=("stride8",)), Calibration.of([]), 1.0)


@pytest.mark.parametrize("params", [{"cut": "auto"}, {"cut": "64"}, {"cut": "64:x"}])
def test_other_texts_are_refused(params: dict[str, Any]) -> None:
    for name in ("quorum", "patchcore"):
        with pytest.raises(ParameterError, match="tiles_by_position must be such as"):
            tiled(name, **params)


def test_reweighting_knows_one_bank_only() -> None:
    with pytest.raises(ParameterError, match="reweight_neighbors must be 0"):
        tiled("patchcore", reweight_neighbors=9)


def test_who_compares_by_tile_and_where_there_are_none() -> None:
    assert compared_by_tile(Quorum(), Tiles(512, 128)).params()["tiles_by_position"] == "512:128"
    with pytest.raises(ParameterError, match="padim has no memory for each tile"):
        compared_by_tile(make_detector("padim"), Tiles(512))
    with pytest.raises(ParameterError, match="in one piece"):
        compared_by_tile(Quorum(), None)
