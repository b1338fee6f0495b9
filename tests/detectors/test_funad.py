"""FUN-AD against closed forms, brute force and planted defects."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors import funad
from flawsift.detectors.funad import FUNAD, Head, Memory, balanced_loss, smoothness_loss, spread
from flawsift.detectors.parts import training
from flawsift.detectors.parts.neighbors import mutual_pairs
from flawsift.detectors.parts.training import Watch, seeded
from flawsift.errors import InputError, ParameterError
from flawsift.features.readers import MemoryFeatures
from flawsift.metrics.ranking import image_auroc
from flawsift.testing import easy_set, with_features

Array = npt.NDArray[np.float32]


def image_set(**layers: Array) -> ImageSet:
    """N images with these (N, C, h, w) features."""
    n = len(next(iter(layers.values())))
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    rows = {("", i): i for i in range(n)}
    return ImageSet(images.ids, images.source, {}, MemoryFeatures(32, "test", rows, layers))


def random_set(n: int, seed: int = 0, channels: int = 6, edge: int = 4) -> ImageSet:
    features = np.random.default_rng(seed).normal(size=(n, channels, edge, edge)).astype(np.float32)
    return image_set(a=features)


def batch_of(data: ImageSet, layers: tuple[str, ...] = ("a",)) -> Batch:
    return next(data.batches(layers, batch_size=len(data)))


def small(**changes: Any) -> FUNAD:
    found: dict[str, Any] = {"layers": ("a",), "hidden": (16, 8), "steps": 10, "batch_size": 8, "bank_size": 100}
    return FUNAD(**{**found, **changes})


def test_the_papers_head_has_its_number_of_parameters() -> None:
    head = Head(768, 768, FUNAD(**FUNAD.presets["paper"]).hidden)
    assert sum(p.numel() for p in head.parameters()) == 4_066_049


def test_the_image_branch_is_the_plain_head_on_concatenated_vectors() -> None:
    with seeded(0, "cpu"):
        head = Head(3, 5, (7, 4))
    image, patches = torch.randn(2, 3), torch.randn(2, 6, 5)
    x = torch.cat([image.unsqueeze(1).expand(-1, 6, -1), patches], 2)
    plain = F.leaky_relu(head.adaptor(x), 0.2)
    for layer in (head.discriminator[0], head.discriminator[2]):
        plain = F.leaky_relu(layer(plain), 0.2)
    torch.testing.assert_close(head(image, patches), head.discriminator[4](plain).squeeze(2))


@given(st.integers(2, 30), st.integers(0, 10_000), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_mutual_pairs_equal_the_definition(n: int, seed: int, k: int, copies: bool) -> None:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    if copies:
        x[n // 2 :] = x[0]
    pairs = mutual_pairs(x, k=k)
    found = {(i, j) for i, j in pairs.tolist()}
    assert len(found) == len(pairs)
    assert all(i < j for i, j in found), "a pair is there twice, or a row is its own partner"
    assert pairs.tolist() == sorted(pairs.tolist())
    gaps = torch.tensor([[float((a - b).norm()) for b in x] for a in x]).fill_diagonal_(torch.inf)
    if not copies:
        near = [set(row.argsort()[: min(k, n - 1)].tolist()) for row in gaps]
        assert found == {(i, j) for i in range(n) for j in near[i] if i < j and i in near[j]}
    for i, j in found:  # among copies too: no row is nearer than the k-th nearest
        limit = min(k, n - 1) - 1
        assert gaps[i, j] <= min(gaps[i].sort().values[limit], gaps[j].sort().values[limit]) + 1e-5


def test_mutual_pairs_of_one_row_and_within_owners() -> None:
    assert mutual_pairs(torch.ones(1, 2)).shape == (0, 2)
    x = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    assert mutual_pairs(x).tolist() == [[0, 1], [2, 3]]
    assert mutual_pairs(x, owners=torch.tensor([0, 0, 1, 1])).tolist() == [[1, 2]]


def test_smoothness_loss_equals_the_papers_formula_with_symmetric_gradients() -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pairs = torch.tensor([[0, 3], [4, 9], [1, 2]])
    i, j = scores[pairs[:, 0]], scores[pairs[:, 1]]
    middle = (i + j) / 2
    paper = 0.5 * ((i - middle).abs().mean() + (j - middle).abs().mean())
    loss = smoothness_loss(scores, pairs)
    torch.testing.assert_close(loss, paper)
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient[pairs[:, 0]], -gradient[pairs[:, 1]])
    assert gradient.abs().sum() == pytest.approx(0.5 * 2)
    assert smoothness_loss(scores, torch.empty(0, 2, dtype=torch.int64)) == 0


def test_the_balanced_loss_averages_each_class_and_survives_an_empty_one() -> None:
    logits, labels = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(50) < 3
    s = logits.sigmoid()
    torch.testing.assert_close(balanced_loss(logits, labels), -s[:3].log().mean() - (1 - s[3:]).log().mean())
    for only in (torch.zeros(50).bool(), torch.ones(50).bool()):
        expected = F.binary_cross_entropy(s, only.float())
        torch.testing.assert_close(balanced_loss(logits, only), expected)


def test_a_constant_batch_spreads_to_zero() -> None:
    assert spread(torch.ones(3), torch.tensor(1.0), torch.tensor(1.0)).tolist() == [0, 0, 0]
    assert spread(torch.tensor([1.0, 2.0, 5.0]), torch.tensor(1.0), torch.tensor(3.0)).tolist() == [0, 0.5, 2]


def filled(bank: Tensor, owners: Tensor) -> Memory:
    memory = Memory(len(bank) + 2, bank.shape[1], keep=True)  # two places are empty
    memory.bank[:-2], memory.owners[:-2] = bank, owners
    return memory


def test_distances_leave_out_the_own_image_and_empty_places() -> None:
    data = random_set(3)
    patches = batch_of(data).features["a"].flatten(2).transpose(1, 2).reshape(-1, 6)  # 16 of each image
    memory = filled(patches, torch.arange(3).repeat_interleave(16))
    found = small(image_branch=False)._distances(memory, memory.bank, patches, batch_of(data))
    gaps = torch.cdist(patches, patches).square()
    for image in range(3):
        gaps[image * 16 : (image + 1) * 16, image * 16 : (image + 1) * 16] = torch.inf
    torch.testing.assert_close(found, gaps.amin(1), rtol=1e-4, atol=1e-4)


def test_the_papers_distance_takes_the_second_neighbour_of_a_copy() -> None:
    data = random_set(2)
    patches = batch_of(data).features["a"].flatten(2).transpose(1, 2).reshape(-1, 6)
    memory = filled(patches[:16], torch.zeros(16))
    detector = small(exclude_own=False)
    found = detector._distances(memory, memory.bank, patches, batch_of(data))
    gaps = torch.cdist(patches, patches[:16]).square().sort(dim=1).values
    expected = torch.cat([gaps[:16, 1], gaps[16:, 0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for gap, which in ((0.09, 1), (0.11, 0)):  # squared: below and above 0.01
        moved = patches[:16] + gap / 6**0.5
        near = filled(moved, torch.zeros(16))
        gaps = torch.cdist(patches[:16], moved).square().sort(dim=1).values
        found = detector._distances(near, near.bank, patches[:16], batch_of(data.select([0])))
        torch.testing.assert_close(found, gaps[:, which], rtol=1e-3, atol=1e-4)
    same = filled(patches[:1].expand(3, -1), torch.zeros(3))
    assert detector._distances(same, same.bank, patches[:1], batch_of(data.select([0])))[0] == 0


def test_robust_scaling_follows_quantiles_and_is_not_ruled_by_one_outlier() -> None:
    detector, memory = small(), Memory(1, 1, keep=True)
    distances = torch.linspace(0, 1, 2001)
    scaled = detector._scaled(memory, distances)
    torch.testing.assert_close(scaled, (distances - 0.5) / 0.499)
    detector._scaled(memory, 2 * distances)  # a tenth of the way to the new batch
    torch.testing.assert_close(memory.scale, 0.9 * torch.tensor([0.5, 0.999]) + 0.1 * torch.tensor([1, 1.998]))
    outlier = torch.cat([distances, torch.tensor([1000.0])])
    assert (detector._scaled(Memory(1, 1, keep=True), outlier) > detector.tau).sum() > 100
    assert (small(scaling="minmax")._scaled(memory, outlier) > detector.tau).sum() == 1


def test_bank_candidates() -> None:
    logits = torch.linspace(-4, 4, 100)
    with seeded(0, "cpu"):
        ranked = small()._candidates(logits)
        paper = small(scaling="minmax")._candidates(logits)
        one_low = small(scaling="minmax")._candidates(torch.cat([torch.full((1,), -9.0), torch.full((99,), 9.0)]))
        constant = small(scaling="minmax")._candidates(torch.zeros(100))
    assert len(set(ranked.tolist())) == 30
    assert ranked.max() < 60
    s = logits.sigmoid()
    n_low = int((s < (s.max() + s.min()) / 2).sum())
    assert len(set(paper.tolist())) == n_low // 2
    assert paper.max() < n_low
    assert len(set(one_low.tolist())) == 10, "an all but empty set of candidates is filled up"
    assert 0 in one_low
    assert len(set(constant.tolist())) == 50


def test_the_bank_holds_patches_of_low_images_evenly() -> None:
    data = random_set(20)
    detector = small(bank_size=40, image_branch=True, patch_size=1)
    detector.fit(data)
    head = Head(detector.widths_[0], detector.widths_[1], detector.hidden)
    memory = Memory(41, 12, keep=True)
    with seeded(0, "cpu"):
        detector._rebuild(head, memory, data, "cpu")
    image, patches, _ = detector._embed(batch_of(data), "cpu")
    counts = np.bincount(memory.owners[memory.owners >= 0].numpy(), minlength=20)
    assert sorted(set(counts.tolist())) == [0, 41 // 8]
    assert (memory.owners == -1).sum() == 41 - 8 * (41 // 8)
    with torch.no_grad():
        order = head(image, patches).amax(1).argsort()
    assert set(np.flatnonzero(counts)) <= set(order[:12].tolist())
    for entry, owner in zip(memory.bank, memory.owners.tolist(), strict=True):
        if owner >= 0:
            assert torch.equal(entry[:6], image[owner])
            assert (patches[owner] - entry[6:]).abs().sum(1).min() == 0


def test_a_layer_of_one_cell_is_the_image_vector() -> None:
    generator = np.random.default_rng(0)
    token = generator.normal(size=(9, 5, 1, 1)).astype(np.float32)
    grid = generator.normal(size=(9, 6, 4, 4)).astype(np.float32)
    data = image_set(a=grid, token=token)
    detector = small(layers=("a", "token"), patch_size=1).fit(data)
    image, patches, size = detector._embed(batch_of(data, ("a", "token")), "cpu")
    scaled = (token[:, :, 0, 0] - token.mean(0)[:, 0, 0]) / token.std(0)[:, 0, 0]
    torch.testing.assert_close(image, torch.from_numpy(scaled), rtol=1e-4, atol=1e-4)
    assert (patches.shape, size) == ((9, 16, 6), (4, 4))
    mean, _, _ = small(patch_size=1).fit(data)._embed(batch_of(data), "cpu")
    torch.testing.assert_close(mean, small(patch_size=1).fit(data)._embed(batch_of(data), "cpu")[1].mean(1))
    alone = small(layers=("token",), image_branch=False).fit(image_set(token=token))
    assert alone.widths_ == [0, 5]
    assert alone.predict_patch_maps(image_set(token=token))[1].shape == (9, 1, 1)


def test_patches_are_means_of_cells_without_the_border() -> None:
    data = random_set(4)
    detector = small().fit(data)
    _, patches, _ = detector._embed(batch_of(data), "cpu")
    mean, deviation = detector.statistics_["a"]
    x = (batch_of(data).features["a"] - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(patches[:, 0], x[:, :, :2, :2].mean((2, 3)))
    torch.testing.assert_close(patches[:, 5], x[:, :, :3, :3].mean((2, 3)))


@pytest.mark.parametrize("noisy", [False, True])
def test_noise_reaches_the_smoothness_loss_only_if_asked(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_set(8)
    seen: list[Tensor] = []

    def watch(scores: Tensor, pairs: Tensor) -> Tensor:
        seen.append(scores.detach())
        return smoothness_loss(scores, pairs)

    monkeypatch.setattr(funad, "smoothness_loss", watch)
    detector = small(steps=1, smooth_noisy=noisy, tau=0.01, tau_sure=1e9, patches_per_image=None)  # all are unsure
    detector.statistics_ = {"a": torch.stack([torch.zeros(6), torch.ones(6)])}
    head, memory = Head(6, 6, (16, 8)), filled(torch.randn(50, 12), torch.full((50,), 99))
    detector._loss(head, memory, batch_of(data), "cpu")
    with seeded(0, "cpu"), torch.no_grad():
        image, patches, _ = detector._embed(batch_of(data), "cpu")
        clean = head(image, patches).sigmoid().flatten().sort().values
    assert torch.allclose(seen[0].sort().values, clean, atol=1e-5) != noisy


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_loss_of_a_step_is_the_papers_formula(preset: str) -> None:
    data, paper = random_set(8), preset == "paper"
    options: dict[str, Any] = {"layers": ("a",), "hidden": (16, 8), "patch_size": 1, "smoothness": 2.5}
    options |= {"patches_per_image": None, "projection_dim": None}
    detector = FUNAD(**{**FUNAD.presets[preset], **options})
    detector.statistics_ = {"a": torch.stack([torch.zeros(6), torch.ones(6)])}
    with seeded(1, "cpu"):
        head, bank, owners = Head(6, 6, (16, 8)), torch.randn(60, 12), torch.arange(60) % 10
        head.adaptor.weight.data.mul_(3)  # squared distances far above those of copies
    with seeded(3, "cpu"), torch.no_grad():
        found = detector._loss(head, filled(bank, owners), batch_of(data), "cpu")

    patches = batch_of(data).features["a"].flatten(2).transpose(1, 2)  # (8, 16, 6)
    x = torch.cat([patches.mean(1, keepdim=True).expand(-1, 16, -1), patches], 2)  # (8, 16, 12)
    sigma = torch.from_numpy(x.numpy().std(axis=0, ddof=1).max(axis=0))
    x = x.flatten(0, 1)
    adapted = [F.leaky_relu(head.adaptor(part), 0.2).detach() for part in (x, bank)]
    keys, entries = adapted if paper else (patches.flatten(0, 1), bank[:, 6:])
    gaps = torch.cdist(keys, entries).square()
    if paper:
        d = gaps.amin(1)
        low, high = d.min(), d.max()
    else:
        d = gaps.masked_fill(torch.arange(8).repeat_interleave(16)[:, None] == owners, torch.inf).amin(1)
        low, high = torch.quantile(d, 0.5), torch.quantile(d, 0.999)
    d = (d - low) / (high - low)
    y, unsure = d > 0.5, (d > 0.5) & (d < 0.9)
    assert 0 < unsure.sum() < y.sum() < 100, "nothing to tell"
    noised = x.clone()
    with seeded(3, "cpu"):
        noised[unsure] += sigma * torch.randn(int(unsure.sum()), 12)

    def score(features: Tensor) -> Tensor:
        out: Tensor = head.discriminator(F.leaky_relu(head.adaptor(features), 0.2))
        return out.detach().squeeze(1).sigmoid()

    s = score(noised)
    cross_entropy = -s[y].log().mean() - (1 - s[~y]).log().mean()
    partner = torch.cdist(keys, keys).fill_diagonal_(torch.inf).argmin(1).tolist()
    pairs = torch.tensor([(i, j) for i, j in enumerate(partner) if partner[j] == i and i < j])
    t = s if paper else score(x)
    smooth = 0.5 * (t[pairs[:, 0]] - t[pairs[:, 1]]).abs().mean()
    torch.testing.assert_close(found, cross_entropy + 2.5 * smooth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_mixed_precision_finds_the_copies_in_the_bank(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = 200
    data = random_set(8, channels=channels)
    detector = FUNAD(**{**FUNAD.presets[preset], "layers": ("a",), "hidden": (16, 8), "patch_size": 1})
    detector.statistics_ = {"a": torch.stack([torch.zeros(channels), torch.ones(channels)])}
    with seeded(1, "cpu"):
        head = Head(channels, channels, (16, 8))
        head.adaptor.weight.data.mul_(5)  # far larger than the distance of copies
    patches = batch_of(data).features["a"].flatten(2).transpose(1, 2)  # (8, 16, 200)
    x = torch.cat([patches.mean(1, keepdim=True).expand(-1, 16, -1), patches], 2).flatten(0, 1)
    memory = filled(x[::2], torch.arange(8).repeat_interleave(8) + (0 if preset == "paper" else 100))
    seen: list[Tensor] = []
    scaled = FUNAD._scaled

    def watch(self: FUNAD, memory: Memory, distances: Tensor) -> Tensor:
        seen.append(distances.detach())
        return scaled(self, memory, distances)

    monkeypatch.setattr(FUNAD, "_scaled", watch)
    for mixed in (False, True):
        with seeded(3, "cpu"), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            detector._loss(head, memory, batch_of(data), "cpu")
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert torch.equal(*seen), "the search depends on the precision of the training"
    if preset == "paper":  # a patch that is in the bank is compared with another one
        with torch.no_grad():
            adapted = F.leaky_relu(head.adaptor(x), 0.2)
        gaps = torch.cdist(adapted, adapted[::2]).square().sort(dim=1).values
        expected = torch.where(torch.arange(128) % 2 == 0, gaps[:, 1], gaps[:, 0])
        torch.testing.assert_close(seen[1], expected, rtol=1e-3, atol=1e-3)


def test_one_image_has_no_deviation_and_gets_no_noise() -> None:
    data = random_set(1)
    fitted = small(exclude_own=False, tau=0.01, tau_sure=1e9, steps=2).fit(data)
    assert np.isfinite(fitted.predict(data, maps=False).scores).all()


def test_keys_and_bank_share_one_projection() -> None:
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    found, again = small(projection_dim=100)._searchable(x), small(projection_dim=100)._searchable(x)
    assert found.shape == (300, 100)
    assert torch.equal(found, again)
    ratio = torch.pdist(found) / torch.pdist(x)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert not torch.equal(small(projection_dim=100, seed=1)._searchable(x), found)


def test_a_step_sees_places_at_random_the_same_in_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = random_set(12), []

    def watch(self: FUNAD, memory: Memory, bank: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        patches = self._embed(batch, "cpu")[1]  # (B, 16, 6)
        gaps = (keys.view(len(batch), 3, 1, 6) - patches[:, None]).abs().sum(3)
        seen.append(gaps.argmin(2).tolist())
        assert gaps.amin() == 0
        return distances_of(self, memory, bank, keys, batch)

    distances_of = FUNAD._distances
    monkeypatch.setattr(FUNAD, "_distances", watch)
    small(steps=40, patches_per_image=3).fit(data)
    assert all(places == step[0] and len(set(places)) == 3 for step in seen for places in step)
    assert {place for step in seen for place in step[0]} == set(range(16))


@pytest.mark.parametrize(("every", "expected"), [(1, 10), (4, 3), (10, 1)])
def test_the_bank_is_rebuilt_every_so_often(every: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, rebuild = [], FUNAD._rebuild

    def watch(self: FUNAD, *arguments: Any) -> None:
        calls.append(1)
        rebuild(self, *arguments)

    monkeypatch.setattr(FUNAD, "_rebuild", watch)
    small(rebuild_every=every).fit(random_set(12))
    assert len(calls) == expected


def test_the_last_step_counts_and_its_rate_is_zero_with_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    train, recipes, heads = training.train, [], []

    def watch(module: Any, optimizer: Any, data: Any, layers: Any, loss_of: Any, recipe: Any, **options: Any) -> None:
        recipes.append((recipe, optimizer.defaults["lr"]))
        train(module, optimizer, data, layers, loss_of, recipe, **options)
        heads.append(module[0])

    monkeypatch.setattr(training, "train", watch)
    data = random_set(12)
    for preset in ("default", "paper"):
        options = {"layers": ("a",), "steps": 30, "hidden": (4,), "batch_size": 8}
        found = FUNAD(**{**FUNAD.presets[preset], **options}).fit(data)
        image, patches, _ = found._embed(batch_of(data), "cpu")
        with torch.no_grad():
            logits = heads[-1](image, patches).view(-1, 4, 4)
        scores, maps = found.predict_patch_maps(data)
        torch.testing.assert_close(maps, logits)
        np.testing.assert_allclose(scores, logits.amax((1, 2)), rtol=1e-5)
    (default, _), (paper, rate) = recipes
    assert default.schedule(29) == pytest.approx(0, abs=1e-12)
    assert 0 < default.schedule(19) < default.schedule(20) == 1
    assert (paper.schedule, rate, paper.steps) == (None, 2e-5, 30)


def planted(n: int = 60, n_defective: int = 6, channels: int = 64, edge: int = 6) -> tuple[ImageSet, npt.NDArray[Any]]:
    """Aligned images: each place has a pattern of its own; the last images have a 2 x 2 defect of their own kind."""
    generator = np.random.default_rng(0)
    pattern = generator.normal(size=(channels, edge, edge))
    features = pattern + 0.5 * generator.normal(size=(n, channels, edge, edge))
    places = np.zeros((n, edge, edge), bool)
    for i in range(n - n_defective, n):
        row, column = generator.integers(0, edge - 1, 2)
        places[i, row : row + 2, column : column + 2] = True
        features[i, :, row : row + 2, column : column + 2] += 2 * generator.normal(size=(channels, 1, 1))
    return image_set(a=features.astype(np.float32)), places


def test_pseudo_labels_and_maps_find_planted_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    data, places = planted()
    seen: list[tuple[Tensor, npt.NDArray[Any]]] = []
    scaled = FUNAD._scaled

    def watch(self: FUNAD, memory: Memory, distances: Tensor) -> Tensor:
        found = scaled(self, memory, distances)
        seen.append((found.detach() > self.tau, np.array(batches.pop())))
        return found

    batches: list[Any] = []
    distances_of = FUNAD._distances

    def note(self: FUNAD, memory: Memory, bank: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        batches.append(batch.ids)
        return distances_of(self, memory, bank, keys, batch)

    monkeypatch.setattr(FUNAD, "_scaled", watch)
    monkeypatch.setattr(FUNAD, "_distances", note)
    detector = FUNAD(layers=("a",), patch_size=1, steps=200, hidden=(32,), bank_size=500, patches_per_image=None).fit(
        data
    )
    labels = torch.cat([found for found, _ in seen[-20:]]).numpy()
    truth = places[np.concatenate([ids for _, ids in seen[-20:]])].flatten()
    hits, positives = (labels & truth).sum(), labels.sum()
    assert hits / positives > 0.9
    assert hits / truth.sum() > 0.9
    assert detector.positive_share_ == pytest.approx(labels.mean(), rel=0.3)
    scores, maps = detector.predict_patch_maps(data)
    assert image_auroc(scores, places.any((1, 2)).astype(np.int8)) > 0.99
    assert image_auroc(maps.flatten().numpy(), places.flatten().astype(np.int8)) > 0.99


def test_easy_defects_are_found_when_some_are_in_training() -> None:
    data = easy_set()
    detector = FUNAD(layers=("stride8",), steps=80, hidden=(64, 32), bank_size=500, learning_rate=3e-3)
    train, test = np.r_[0:28, 40:45], np.r_[28:40, 45:50]  # of 40 normal and 10 defective images
    detector.fit(with_features(data.images.select(train), detector))
    found = detector.predict(with_features(data.images.select(test), detector), maps=False)
    assert image_auroc(found.scores, data.truth.select(test).labels) > 0.85


def test_a_set_without_anomalies_reports_what_it_takes_for_them() -> None:
    found = small(steps=30).fit(random_set(30))
    assert 0 < found.positive_share_ < 0.2


@pytest.mark.parametrize("preset", ["default", "paper", "budget"])
def test_identical_images_give_finite_equal_scores(preset: str) -> None:
    one = np.random.default_rng(0).normal(size=(1, 6, 4, 4)).astype(np.float32)
    data = image_set(a=one.repeat(4, 0))
    params = {**FUNAD.presets[preset], "layers": ("a",), "steps": 3, "hidden": (8,)}
    found = FUNAD(**params).fit(data)
    scores = found.predict_patch_maps(data)[0]
    assert np.isfinite(scores).all()
    assert np.ptp(scores) < 1e-5


def test_a_class_token_is_the_image_vector_where_a_layer_has_one() -> None:
    maps, tokens = (np.random.default_rng(0).normal(size=(6, c, e, e)).astype(np.float32) for c, e in ((6, 4), (5, 1)))
    data = image_set(a=maps, token=tokens)
    found = small(layers=("a", "token")).fit(data)
    assert found.widths_ == [5, 6]
    image, patches, grid = found._embed(next(data.batches(("a", "token"))), "cpu")
    assert patches.shape == (6, 16, 6)
    assert grid == (4, 4)
    expected = (tokens - tokens.mean(0)) / tokens.std(0)
    np.testing.assert_allclose(image.numpy(), expected[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_one_image_is_refused_or_compared_with_itself() -> None:
    with pytest.raises(InputError, match="needs at least 2 images to compare patches, got 1"):
        small().fit(random_set(1))
    with pytest.raises(InputError, match="at least 1 images"):
        small(exclude_own=False).fit(random_set(1).select([]))
    assert np.isfinite(small(exclude_own=False).fit(random_set(1)).predict_patch_maps(random_set(1))[0]).all()


def test_the_smallest_bank_holds_two_images() -> None:
    found = small(bank_size=2, rebuild_every=1).fit(random_set(12))
    assert np.isfinite(found.predict_patch_maps(random_set(12))[0]).all()


def test_the_global_generator_has_no_say_and_is_left_alone() -> None:
    data, weights = random_set(12), []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            weights.append(small(rebuild_every=4, patches_per_image=5).fit(data).weights_)
            assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)  # a checkpoint after every step
    data, detector = random_set(12), small(rebuild_every=4)
    expected = detector.clone().fit(data)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 7:  # amid two rebuilds
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detector.clone().fit(data, watch=Watch(stop, tmp_path / "state"))
    again = detector.clone().fit(data, watch=Watch(checkpoint=tmp_path / "state"))
    assert all(torch.equal(again.weights_[k], expected.weights_[k]) for k in expected.weights_)
    assert again.positive_share_ == expected.positive_share_


def test_the_papers_mode_does_not_checkpoint_its_bank() -> None:
    assert "bank" in Memory(5, 2, keep=True).state_dict()
    assert set(Memory(5, 2, keep=False).state_dict()) == {"scale", "positive"}


def test_bad_use_is_told() -> None:
    bad: list[tuple[dict[str, object], str]] = [
        ({"patch_size": 2}, r"FUNAD.patch_size must be odd and at least 1, got 2\."),
        ({"hidden": (8, 0)}, "hidden must be widths of at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rebuild_every": 0}, "rebuild_every must be at least 1"),
        ({"patches_per_image": 0}, "patches_per_image must be at least 1, or None"),
        ({"bank_size": 1}, "bank_size must be at least 2, or None"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, or None"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"search": "both"}, "search must be 'patch' or 'adapted', got 'both'"),
        ({"scaling": "max"}, "scaling must be 'robust' or 'minmax'"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau_sure": 0.4}, "tau_sure must not be below tau"),
        ({"smoothness": -1.0}, "smoothness must not be negative"),
    ]
    for params, text in bad:
        with pytest.raises(ParameterError, match=text):
            FUNAD(**params)  # type: ignore[arg-type]
