"""InReaCh on planted channels, and its parts against brute force."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.inreach import ASYMMETRY, InReaCh, prune
from flawsift.detectors.parts import maps
from flawsift.detectors.parts.maps import embed_patches, smooth
from flawsift.detectors.parts.robust import MAD_TO_SIGMA
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures
from flawsift.screening.options import ScreenOptions
from flawsift.screening.stage1 import screen

LAYERS = ("a",)
SIDE, CHANNELS = 6, 16
P = SIDE * SIDE
Floats = npt.NDArray[np.float32]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taps are the embedding: 3 x 3 means would mix what a test permutes."""
    monkeypatch.setattr(maps, "embed_patches", lambda taps: taps[0])


def set_of(patches: npt.NDArray[Any]) -> ImageSet:
    """(N, P, C) patches as the features of N images, ids 0, 10, 20 and so on."""
    n = len(patches)
    ids = [10 * i for i in range(n)]
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n, ids=ids)
    array = patches.transpose(0, 2, 1).reshape(n, -1, SIDE, SIDE).astype(np.float32)
    return ImageSet(
        images.ids, images.source, {}, MemoryFeatures(32, "t", {("", i): r for r, i in enumerate(ids)}, {"a": array})
    )


def realisations(n: int, noise: float = 0.1, seed: int = 0) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(N, P, C) noisy copies of P parts, each image in an order of its own, and (N, P) which part a patch is of."""
    random = np.random.default_rng(seed)
    parts = random.normal(size=(P, CHANNELS))
    orders = np.stack([random.permutation(P) for _ in range(n)])
    return (parts[orders] + noise * random.normal(size=(n, P, CHANNELS))).astype(np.float32), orders


def nominal(detector: InReaCh, data: ImageSet, seeds: list[int]) -> dict[int, list[bool]]:
    """{id: nominal patches}."""
    found = detector._nominal(data, np.array(seeds), detector.min_span, 0.0, "cpu")
    return {int(i): row.tolist() for i, row in zip(data.ids, found, strict=True)}


@pytest.mark.usefixtures("bare")
def test_permuted_realisations_are_associated_without_a_mistake() -> None:
    patches, part_of = realisations(12)
    heads = torch.from_numpy(patches[:3])
    for assignment in ("mutual", "nearest"):
        detector = InReaCh(assignment=assignment)
        for i in range(12):
            keys = detector._channels(torch.from_numpy(patches[i]), heads, torch.arange(3) == i).numpy()
            assert (keys >= 0).all()
            seeds, rows = np.divmod(keys, P)
            assert (part_of[seeds, rows] == part_of[i]).all()
            assert i not in seeds, "an image joined itself"
    everything = nominal(InReaCh(layers=LAYERS, spread=50.0), set_of(patches), [0])
    assert np.array(list(everything.values())).all()


def test_isotropic_channels_survive_the_default_rule_and_not_the_code_s() -> None:
    generator = np.random.default_rng(0)
    members = generator.normal(size=(64, 20, 64))
    keys = np.repeat(np.arange(64), 20)
    distances = np.linalg.norm(members - members.mean(1, keepdims=True), axis=2).flatten().astype(np.float32)
    assert prune(keys, distances, 4, 5.0, "mad").mean() > 0.99
    assert prune(keys, distances, 4, 5.0, "std").mean() < 0.01
    assert prune(keys, distances, 4, 20.0, "std").mean() > 0.9
    distances[::20] *= 2  # one member of each channel is far off
    found = prune(keys, distances, 4, 5.0, "mad").reshape(64, 20)
    assert not found[:, 0].any()
    assert found[:, 1:].mean() > 0.99


@settings(max_examples=100, deadline=None)
@given(
    members=st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 9)), max_size=40),
    min_span=st.integers(2, 5),
    spread=st.sampled_from([0.5, 1.0, 3.0]),
    rule=st.sampled_from(["mad", "std"]),
)
def test_pruning_is_brute_force(
    members: list[tuple[int, int]], min_span: int, spread: float, rule: Literal["mad", "std"]
) -> None:
    keys = np.array([k for k, _ in members], dtype=np.int64)
    distances = np.array([d for _, d in members], dtype=np.float32)
    expected = np.zeros(len(members), bool)
    for key in range(5):
        own = np.flatnonzero(keys == key)
        if len(own) < min_span:
            continue
        d = distances[own].astype(np.float64)
        if rule == "mad":
            tight = d <= np.median(d) + spread * MAD_TO_SIGMA * np.median(np.abs(d - np.median(d)))
        else:
            tight = d < spread * d.std()
        if tight.sum() >= min_span:
            expected[own[tight]] = True
    found = prune(keys, distances, min_span, spread, rule)
    # sums in another order may move a limit by its last bits: who stands right on it may be in or out
    wide = prune(keys, distances, min_span, spread * (1 + 1e-9), rule)
    narrow = prune(keys, distances, min_span, spread * (1 - 1e-9), rule)
    assert ((narrow <= expected) & (expected <= wide)).all()
    if rule == "mad":
        assert found.tolist() == expected.tolist()


@pytest.mark.usefixtures("bare")
def test_the_order_of_the_images_changes_nothing_but_the_seeds() -> None:
    patches, _ = realisations(14, noise=1.0)
    data = set_of(patches)
    detector = InReaCh(layers=LAYERS, min_span=5)
    expected = nominal(detector, data, [30, 70, 0])
    share = np.mean(list(expected.values()))
    assert 0.05 < share < 0.95, "nothing to tell"
    for order in (data.ids[::-1], np.random.default_rng(0).permutation(data.ids)):
        assert nominal(detector, data.select(order), [30, 70, 0]) == expected
    assert nominal(detector, data, [0, 30, 70]) == expected
    assert nominal(detector, data, [130, 120, 110]) != expected


@pytest.mark.usefixtures("bare")
def test_seeds_are_drawn() -> None:
    data, drawn = set_of(realisations(14)[0]), []

    class Watched(InReaCh):
        def _nominal(self, data: ImageSet, seeds: Any, span: int, scale: float, device: str) -> Tensor:
            drawn.append((tuple(seeds), span))
            return super()._nominal(data, seeds, span, scale, device)

    for seed in range(30):
        Watched(layers=LAYERS, seed=seed).fit(data)
    assert {i for seeds, _ in drawn for i in seeds} == set(data.ids.tolist()), "some images can never be seeds"
    for n, n_seeds, expected, span in ((24, 10, 3, 4), (24, 2, 2, 4), (40, 4, 4, 4), (7, 10, 2, 3), (2, 10, 2, 2)):
        Watched(layers=LAYERS, n_seeds=n_seeds).fit(set_of(realisations(n)[0]))
        assert (len(set(drawn[-1][0])), drawn[-1][1]) == (expected, span)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("seeds", [[0, 10], [30, 60]])  # with and without a defective seed
def test_what_only_one_image_has_is_not_nominal_and_what_recurs_is(seeds: list[int]) -> None:
    patches, _ = realisations(12)
    patches[0, :5] += 5  # a defect in one image
    alike = np.random.default_rng(1).normal(size=CHANNELS)
    patches[1:6, 7] = alike + 0.1 * np.random.default_rng(2).normal(size=(5, CHANNELS))  # one defect in five images
    found = nominal(InReaCh(layers=LAYERS, spread=50.0), set_of(patches), seeds)
    assert not any(found[0][:5])
    assert all(found[0][5:])
    assert all(found[10 * i][7] for i in range(1, 6))


@pytest.mark.usefixtures("bare")
def test_a_channel_must_span_enough_images() -> None:
    patches, _ = realisations(12)
    alike = np.random.default_rng(1).normal(size=CHANNELS)
    patches[:3, 7] = alike + 0.1 * np.random.default_rng(2).normal(size=(3, CHANNELS))
    data = set_of(patches)
    three = nominal(InReaCh(layers=LAYERS, min_span=3), data, [0, 50])
    four = nominal(InReaCh(layers=LAYERS, min_span=4), data, [0, 50])
    assert [three[10 * i][7] for i in range(3)] == [True] * 3
    assert [four[10 * i][7] for i in range(3)] == [False] * 3


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_members_are_measured_from_the_mean_of_their_channel_head_included(spread: float) -> None:
    patches, _ = realisations(12, noise=0.6)
    seeds = [2, 5]
    detector, heads = InReaCh(layers=LAYERS, spread=spread), torch.from_numpy(patches[seeds])
    members: dict[int, list[tuple[int, int]]] = {a * P + q: [(s, q)] for a, s in enumerate(seeds) for q in range(P)}
    for i in range(12):
        keys = detector._channels(torch.from_numpy(patches[i]), heads, torch.tensor([i == s for s in seeds]))
        for q, key in enumerate(keys.tolist()):
            if key >= 0:
                members[key].append((i, q))
    expected = np.zeros((12, P), bool)
    for channel in members.values():
        x = np.stack([patches[place] for place in channel]).astype(np.float64)
        d = np.linalg.norm(x - x.mean(0), axis=1)
        tight = d <= np.median(d) + spread * MAD_TO_SIGMA * np.median(np.abs(d - np.median(d)))
        if tight.sum() >= 4 and len(channel) >= 4:
            for place in np.array(channel)[tight]:
                expected[tuple(place)] = True
    found = nominal(detector, set_of(patches), [10 * s for s in seeds])
    assert 0.05 < expected.mean() < 0.95, "nothing to tell"
    assert np.array_equal(np.array([found[10 * i] for i in range(12)]), expected)


def test_assignments_differ_where_the_nearest_seed_is_not_mutual() -> None:
    # seed 0's patch is nearest to x = 0, but it prefers x = 1; seed 1's is farther from x = 0, and mutual with it
    own, heads = torch.tensor([[0.0], [1.0]]), torch.tensor([[[0.6], [99.0]], [[-0.8], [99.0]]])
    nobody = torch.zeros(2, dtype=torch.bool)
    assert InReaCh(assignment="nearest")._channels(own, heads, nobody).tolist() == [-1, 0]
    assert InReaCh(assignment="mutual")._channels(own, heads, nobody).tolist() == [2, 0]
    assert InReaCh(assignment="mutual")._channels(own, heads, torch.tensor([False, True])).tolist() == [-1, 0]
    assert InReaCh(assignment="nearest")._channels(own, heads, torch.tensor([True, False])).tolist() == [2, -1]


def aligned(n: int, seed: int = 0, gradient: float = 0.0) -> ImageSet:
    """Noisy copies of one arrangement; the gradient makes rows differ on average, which columns do not."""
    random = np.random.default_rng(seed)
    patches = 0.1 * np.random.default_rng(9).normal(size=(P, CHANNELS)) + random.normal(size=(n, P, CHANNELS))
    patches[:, :, 0] += gradient * np.repeat(np.arange(SIDE), SIDE)
    return set_of(patches)


@pytest.mark.usefixtures("bare")
def test_position_counts_where_parts_are_laid_out() -> None:
    for gradient, expected in ((0.0, False), (3.0, True)):
        data = aligned(30, gradient=gradient)
        features = next(iter(data.batches(LAYERS))).features["a"].double().flatten(2)  # (N, C, P)
        rms = float((features - features.mean((0, 2), keepdim=True)).square().sum(1).mean().sqrt())
        mean = features.mean(0).view(-1, SIDE, SIDE)
        asymmetry = float((mean - mean.mT).square().sum(0).mean()) / 2 / rms**2
        assert (asymmetry > ASYMMETRY + 1 / 30) == expected
        found = InReaCh(layers=LAYERS)._position_scale(data)
        assert found == pytest.approx(rms if expected else 0, rel=1e-5)
        always = InReaCh(layers=LAYERS, position="always", position_weight=2.0)
        assert always._position_scale(data) == pytest.approx(2 * rms, rel=1e-5)
        assert InReaCh(layers=LAYERS, position="never")._position_scale(data) == 0


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("n", [2, 4, 8])
def test_chance_is_no_layout(n: int) -> None:
    chosen = [InReaCh(layers=LAYERS)._position_scale(aligned(n, seed=seed)) for seed in range(10)]
    assert chosen == [0.0] * 10  # the mean of few unrelated images is far from its transpose


def test_a_grid_that_is_not_square_has_no_diagonal() -> None:
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 6)
    array = np.random.default_rng(0).normal(size=(6, 3, 4, 5)).astype(np.float32)
    reader = MemoryFeatures(32, "t", {("", i): i for i in range(6)}, {"a": array})
    data = ImageSet(images.ids, images.source, {}, reader)
    for position, counts in (("auto", False), ("always", True)):
        found = InReaCh(layers=LAYERS, position=position, min_span=2).fit(data)  # type: ignore[arg-type]
        assert (found.position_scale_ > 0) == counts
        assert found.predict_patch_maps(data)[1].shape == (6, 4, 5)


def test_maps_are_smoothed_distances_to_the_nominal_patches() -> None:
    train, test = aligned(8, gradient=3.0), aligned(3, seed=1, gradient=3.0)
    for position in ("never", "always"):
        options: dict[str, Any] = {"layers": LAYERS, "coreset_ratio": 1.0, "position": position}
        found = InReaCh(smoothing=0, **options).fit(train)
        scale = found.position_scale_

        def embedded(data: ImageSet, scale: float = scale) -> Tensor:
            x = embed_patches([next(iter(data.batches(LAYERS))).features["a"].double()])
            rows = torch.arange(SIDE).view(-1, 1).expand(SIDE, SIDE) / SIDE
            places = scale * torch.stack([rows, rows.T])[: 2 if scale else 0]
            return torch.cat([x, places.expand(len(x), -1, -1, -1)], 1).flatten(2).transpose(1, 2)  # (N, P, C)

        seeds = train.ids[torch.randperm(8, generator=torch.Generator().manual_seed(0))[:2].numpy()]
        kept = found._nominal(train, seeds, 4, scale, "cpu")
        bank = embedded(train)[kept]
        assert len(found.memory_bank_) == len(bank)
        expected = torch.cdist(embedded(test), bank[None]).amin(2).view(-1, SIDE, SIDE).float()
        scores, maps = found.predict_patch_maps(test)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores, expected.amax((1, 2)), rtol=1e-4)
        blurred = InReaCh(smoothing=1 / SIDE, **options).fit(train).predict_patch_maps(test)
        torch.testing.assert_close(blurred[1], smooth(expected, 1.0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(blurred[0], smooth(expected, 1.0).amax((1, 2)), rtol=1e-4)
        assert found._expected(next(iter(test.batches(LAYERS))), "cpu").shape == (3, CHANNELS, SIDE, SIDE)


@pytest.mark.usefixtures("bare")
def test_the_bank_is_a_coreset_of_a_bounded_pool_and_knows_its_images() -> None:
    patches, _ = realisations(12)
    data = set_of(patches)
    found = InReaCh(layers=LAYERS, max_patches=200, coreset_ratio=0.1).fit(data)
    assert len(found.memory_bank_) == 20
    for entry, owner in zip(found.memory_bank_.numpy(), found.owner_.tolist(), strict=True):
        assert np.abs(patches[owner // 10] - entry).sum(1).min() < 1e-5
    whole = InReaCh(layers=LAYERS, max_patches=None, coreset_ratio=1.0, spread=50.0, n_seeds=1).fit(data)
    assert len(whole.memory_bank_) == 12 * P


@pytest.mark.usefixtures("bare")
def test_a_drawn_pool_is_even_and_knows_no_global_generator() -> None:
    data, found = set_of(realisations(12)[0]), []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(InReaCh(layers=LAYERS, max_patches=100, coreset_ratio=1.0).fit(data))
            assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0].memory_bank_, found[1].memory_bank_)
    assert len(set(found[0].owner_.tolist())) == 12, "an image has no say"


@pytest.mark.usefixtures("bare")
def test_few_and_equal_images() -> None:
    patches, _ = realisations(12)
    with pytest.raises(InputError, match="no patch that recurs in 2 of these 1 images"):
        InReaCh(layers=LAYERS).fit(set_of(patches[:1]))
    for n in (2, 3, 5):  # fewer than seeds, and than twice the span
        assert len(InReaCh(layers=LAYERS, coreset_ratio=1.0).fit(set_of(patches[:n])).memory_bank_) >= 0.8 * n * P
    equal = np.broadcast_to(patches[:1], (12, P, CHANNELS))
    found = InReaCh(layers=LAYERS, coreset_ratio=1.0).fit(set_of(equal)).predict(set_of(equal))
    np.testing.assert_allclose(found.scores, 0, atol=1e-5)
    constant = set_of(np.ones((12, P, CHANNELS)))
    assert (InReaCh(layers=LAYERS).fit(constant).predict(constant).scores == 0).all()
    with pytest.raises(InputError, match="no patch that recurs in 4 of these 12 images"):
        InReaCh(layers=LAYERS, spread_rule="std").fit(constant)  # nothing is below 0


@pytest.mark.usefixtures("bare")
def test_stage_1_lowers_contamination_with_it_as_sub_model() -> None:
    patches, _ = realisations(30)
    patches[:6, :3] += np.random.default_rng(1).normal(0, 3, size=(6, 3, CHANNELS))
    found = screen(set_of(patches), InReaCh(layers=LAYERS, coreset_ratio=0.5), ScreenOptions(n_subsets=3, keep=0.8))
    assert sorted(found.removed.tolist()) == [10 * i for i in range(6)]


def test_bad_use_is_told() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"n_seeds": 0}, "InReaCh.n_seeds must be at least 1, got 0"),
        ({"min_span": 1}, "min_span must be at least 2"),
        ({"assignment": "first"}, "assignment must be 'mutual' or 'nearest', got 'first'"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"spread_rule": "iqr"}, "spread_rule must be 'mad' or 'std'"),
        ({"position": "on"}, "position must be 'auto', 'always' or 'never'"),
        ({"position_weight": 0.0}, "position_weight must be positive"),
        ({"coreset_ratio": 0.0}, r"coreset_ratio must be in \(0, 1\]"),
        ({"max_patches": 0}, "max_patches must be at least 1, or None"),
        ({"smoothing": -1.0}, "smoothing must not be negative"),
    ]
    for params, text in bad:
        with pytest.raises(ParameterError, match=text):
            InReaCh(**params)
    with pytest.raises(InputError, match="at least one image"):
        InReaCh(layers=LAYERS).fit(aligned(3).select([]))
