"""SimpleNet against loops written out, the published parameter counts, and the equations of its loss."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors import simplenet
from flawsift.detectors.parts.training import Recipe, Watch, seeded, weights_of
from flawsift.detectors.simplenet import Net, SimpleNet
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.screening.consensus import combine, normalize_scores, own_mask
from flawsift.screening.options import Normalize, ScreenOptions
from flawsift.screening.stage1 import screen

SMALL: dict[str, Any] = {"layers": ("a",), "embedding_dim": 8, "hidden_dim": 8}
# noise above the spread of the patches, which fill their few dimensions: below it there is nothing to tell apart; and
# more hidden units than dimensions, to surround them
FAST: dict[str, Any] = {
    **SMALL,
    "hidden_dim": 64,
    "noise": 2.0,
    "adaptor_rate": 1e-3,
    "discriminator_rate": 1e-2,
    "steps": 150,
}


def feature_set(**features: npt.NDArray[np.floating]) -> ImageSet:
    """(N, C, h, w) features per layer as a set with ids 0..N-1."""
    n = len(next(iter(features.values())))
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, features)
    return ImageSet(images.ids, images.source, {}, reader)


def normal(n: int, c: int = 4, side: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, c, side, side)).astype(np.float32)


def first_batch(data: ImageSet, *layers: str) -> Batch:
    return next(data.batches(layers))


def pooled(values: npt.NDArray[np.floating], size: int) -> npt.NDArray[np.float64]:
    """Adaptive average pooling of one vector, by its definition."""
    n = len(values)
    cells = [values[i * n // size : math.ceil((i + 1) * n / size)] for i in range(size)]
    return np.array([cell.astype(np.float64).mean() for cell in cells])


def neighbourhoods(tap: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(h, w, 9 C) of (C, h, w): channel by channel, kernel row by kernel row, zeros beyond the border."""
    c, h, w = tap.shape
    found = np.zeros((h, w, c * 9))
    for row in range(h):
        for column in range(w):
            for channel in range(c):
                for i in range(9):
                    y, x = row + i // 3 - 1, column + i % 3 - 1
                    if 0 <= y < h and 0 <= x < w:
                        found[row, column, channel * 9 + i] = tap[channel, y, x]
    return found


@settings(deadline=None, max_examples=15)
@given(size=st.integers(4, 40), channels=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_embedding_is_the_papers_written_out(size: int, channels: int, seed: int) -> None:
    fine, coarse = normal(1, channels, 4, seed), normal(1, 5, 2, seed + 1)
    found = SimpleNet(layers=("a", "b"), embedding_dim=size)._embed(
        first_batch(feature_set(a=fine, b=coarse), "a", "b")
    )
    of_coarse = torch.from_numpy(neighbourhoods(coarse[0])).permute(2, 0, 1)[None]
    # the published order: to the large grid first, averaged afterwards
    raised = torch.nn.functional.interpolate(of_coarse, size=(4, 4), mode="bilinear")[0].permute(1, 2, 0).numpy()
    around = neighbourhoods(fine[0])
    for row in range(4):
        for column in range(4):
            parts = [pooled(around[row, column], size), pooled(raised[row, column], size)]
            expected = pooled(np.concatenate(parts), size)
            np.testing.assert_allclose(found[0, :, row, column], expected, rtol=1e-4, atol=1e-5)


def test_each_tap_has_its_half_of_the_embedding() -> None:
    a, b = normal(1, 6), normal(1, 10, 2)
    net = SimpleNet(layers=("a", "b"), embedding_dim=16)
    before = net._embed(first_batch(feature_set(a=a, b=b), "a", "b"))
    after = net._embed(first_batch(feature_set(a=a + 1, b=b), "a", "b"))
    changed = (before != after).any(-1).any(-1)[0]
    assert changed.tolist() == [True] * 8 + [False] * 8


def test_models_that_look_at_one_batch_share_the_embedding() -> None:
    batch = first_batch(feature_set(a=normal(2)), "a")
    assert SimpleNet(**SMALL)._embed(batch) is SimpleNet(**SMALL, seed=1)._embed(batch)
    assert SimpleNet(**{**SMALL, "embedding_dim": 4})._embed(batch).shape == (2, 4, 4, 4)


def test_parameter_counts_of_the_paper() -> None:
    paper = SimpleNet(**SimpleNet.presets["paper"])
    net = Net(paper.embedding_dim, paper.hidden_dim)
    assert sum(p.numel() for p in net.adaptor.parameters()) == 1536 * 1536 + 1536 == 2_360_832
    # a matrix and a bias, gain and offset of the normalisation, a last row without bias
    discriminator = sum(p.numel() for p in net.discriminator.parameters())
    assert discriminator == 1536 * 1024 + 1024 + 2 * 1024 + 1024 == 1_576_960


def test_the_loss_by_hand() -> None:
    net = Net(3, 4)
    with torch.no_grad():
        net.discriminator[3].weight.zero_()  # type: ignore[operator]
    assert float(net.loss(torch.randn(6, 3), 0.1, 0.5).detach()) == pytest.approx(1.0)  # 2 margins where D is 0


def test_beyond_the_margins_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(1, 1)
    values = {"adaptor.weight": 1.0, "adaptor.bias": 0.0, "discriminator.0.weight": 1.0, "discriminator.3.weight": 1.0}
    net.load_state_dict({**net.state_dict(), **{k: torch.full_like(net.state_dict()[k], v) for k, v in values.items()}})
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, -9.0))
    loss = net.loss(
        torch.zeros(4, 1), 1.0, 0.15
    )  # normalised: 1 for normal patches, -1 for noisy ones; -0.2 when leaky
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


def test_noise_has_its_deviation_and_both_kinds_are_one_batch() -> None:
    net = Net(16, 4)
    seen: list[Tensor] = []
    net.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    patches = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    with seeded(0, "cpu"):
        net.loss(patches, 0.015, 0.5)
    assert [len(rows) for rows in seen] == [8000]
    clean, noisy = seen[0].chunk(2)
    torch.testing.assert_close(clean, net.adaptor(patches).detach())
    assert float((noisy - clean).std()) == pytest.approx(0.015, rel=0.02)


def test_the_loss_and_its_gradients_are_those_of_equation_6(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0, "cpu"):
        net, patches, drawn = Net(3, 5).double(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn)
    w = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    q = patches @ w["adaptor.weight"].T + w["adaptor.bias"]
    both = torch.cat([q, q + 0.3 * drawn]) @ w["discriminator.0.weight"].T + w["discriminator.0.bias"]
    unit = (both - both.mean(0)) / (both.var(0, correction=0) + 1e-5).sqrt()  # one batch of both kinds
    unit = unit * w["discriminator.1.weight"] + w["discriminator.1.bias"]
    of_normal, of_noisy = (torch.where(unit > 0, unit, 0.2 * unit) @ w["discriminator.3.weight"][0]).chunk(2)
    expected = (0.1 - of_normal).clamp(min=0).mean() + (0.1 + of_noisy).clamp(min=0).mean()
    assert 0 < (of_normal > 0.1).sum() < 6, "not on both sides of the margin"
    loss = net.loss(patches, 0.3, 0.1)
    torch.testing.assert_close(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad)  # the adaptor learns by both terms


def test_matrices_start_xavier_normal() -> None:
    with seeded(0, "cpu"):
        net = Net(200, 100)
    for layer in (net.adaptor, net.discriminator[0], net.discriminator[3]):
        assert isinstance(layer, torch.nn.Linear)
        n = layer.in_features + layer.out_features
        assert float(layer.weight.detach().std()) == pytest.approx((2 / n) ** 0.5, rel=0.15)


def test_noise_follows_the_scale_of_the_features() -> None:
    x, new = normal(8), feature_set(a=3 * normal(4, seed=1))
    detector = SimpleNet(**{**FAST, "steps": 20})
    small = detector.clone().fit(feature_set(a=x)).predict(new, maps=False).scores
    large_set, large_new = feature_set(a=1024 * x), feature_set(a=1024 * 3 * normal(4, seed=1))
    large = detector.clone().fit(large_set).predict(large_new, maps=False).scores
    np.testing.assert_allclose(large, small, rtol=1e-3, atol=1e-3)
    plain = detector.clone(standardize=False).fit(large_set)
    assert torch.equal(plain.statistics_, torch.tensor([[0.0], [1.0]]).expand(2, 8))


@pytest.mark.parametrize(("average", "last"), [(0.0, 1), (0.4, 2), (1.0, 5)])
def test_training_is_that_of_two_optimisers_and_weights_are_averaged(
    average: float, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    # the published decays are below the tolerance after five steps: a larger one of each shows where it acts
    assert (simplenet.ADAPTOR_DECAY, simplenet.DISCRIMINATOR_DECAY) == (0.01, 1e-5)
    monkeypatch.setattr(simplenet, "ADAPTOR_DECAY", 10.0)
    monkeypatch.setattr(simplenet, "DISCRIMINATOR_DECAY", 0.1)
    data = feature_set(a=normal(6))
    detector = SimpleNet(**{**FAST, "steps": 5, "average": average}, patches=None, batch_size=4).fit(data)
    net = detector._build()
    adaptor = torch.optim.AdamW(net.adaptor.parameters(), lr=1e-3, weight_decay=10.0)
    discriminator = torch.optim.Adam(net.discriminator.parameters(), lr=1e-2, weight_decay=0.1)
    path = []
    for step in range(5):
        ids = Recipe(steps=5, batch_size=4).ids_at(data.ids, step)
        adaptor.zero_grad()
        discriminator.zero_grad()
        loss = net.loss(detector._patches(first_batch(data.select(ids), "a")), detector.noise, detector.margin)
        loss.backward()  # type: ignore[no-untyped-call]
        adaptor.step()
        discriminator.step()
        path.append(weights_of(net))
    for name in path[0]:
        # batch norm takes a shift of all patches out again: that gradient is rounding, which Adam magnifies
        if path[0][name].is_floating_point() and name != "adaptor.bias":
            expected = torch.stack([weights[name] for weights in path[-last:]]).mean(0)
            torch.testing.assert_close(detector.weights_[name], expected, rtol=1e-3, atol=5e-4)


def test_a_killed_training_goes_on_to_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)  # a checkpoint after every step
    data, detector = feature_set(a=normal(6)), SimpleNet(**{**SMALL, "steps": 8})
    expected = detector.clone().fit(data)

    def killed(stage: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detector.clone().fit(data, watch=Watch(killed, tmp_path / "state"))
    again = detector.clone().fit(data, watch=Watch(checkpoint=tmp_path / "state"))
    assert all(torch.equal(again.weights_[name], value) for name, value in expected.weights_.items())


def test_far_patches_score_above_all_of_training() -> None:
    x = 0.3 * normal(20) + 1
    detector = SimpleNet(**FAST).fit(feature_set(a=x))
    known, _ = detector.predict_patch_maps(feature_set(a=x))
    far, maps = detector.predict_patch_maps(feature_set(a=x[:2] - 8))
    assert far.min() > known.max()
    assert far.tolist() == maps.amax((1, 2)).tolist()


def test_scores_are_minus_the_discriminator_in_eval_mode() -> None:
    data = feature_set(a=normal(6))
    detector = SimpleNet(**{**FAST, "steps": 10}).fit(data)
    w = {name: value.double() for name, value in detector.weights_.items()}
    e = (detector._embed(first_batch(data, "a")) - detector.statistics_[0].view(1, -1, 1, 1)).double()
    e = (e / detector.statistics_[1].view(1, -1, 1, 1)).permute(0, 2, 3, 1)
    hidden = (e @ w["adaptor.weight"].T + w["adaptor.bias"]) @ w["discriminator.0.weight"].T + w["discriminator.0.bias"]
    centred = (hidden - w["discriminator.1.running_mean"]) / (w["discriminator.1.running_var"] + 1e-5).sqrt()
    scaled = centred * w["discriminator.1.weight"] + w["discriminator.1.bias"]
    expected = -(torch.where(scaled > 0, scaled, 0.2 * scaled) @ w["discriminator.3.weight"][0])
    torch.testing.assert_close(detector.predict_patch_maps(data)[1], expected.float(), rtol=1e-3, atol=1e-4)


def test_the_paper_smooths_by_four_pixels_of_any_size() -> None:
    data = feature_set(a=normal(4))  # of 32 px, where the default has half a pixel
    paper = {**SimpleNet.presets["paper"], **SMALL, "steps": 2}
    for params, sigma in ((paper, 4.0), ({**paper, "sigma": None}, 0.5)):
        detector = SimpleNet(**params).fit(data)
        grid, maps = detector.predict_patch_maps(data)[1], detector.predict(data).maps
        fine = torch.nn.functional.interpolate(grid[:, None], (32, 32), mode="bilinear")[:, 0].numpy()
        assert maps is not None
        np.testing.assert_allclose(maps, [gaussian_filter(m, sigma) for m in fine], rtol=1e-3, atol=1e-5)


def test_a_step_sees_at_most_so_many_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def loss(net: Net, patches: Tensor, noise: float, margin: float) -> Tensor:
        seen.append(len(patches))
        value: Tensor = net(patches).mean()
        return value

    monkeypatch.setattr(Net, "loss", loss)
    for patches in (5, 1000, None):
        SimpleNet(**{**SMALL, "steps": 1, "patches": patches, "batch_size": 3}).fit(feature_set(a=normal(9)))
    SimpleNet(**{**SMALL, "steps": 1, "patches": None, "batch_size": 32}).fit(feature_set(a=normal(9)))
    assert seen == [5, 48, 48, 144], "a set smaller than a batch is one batch"


def test_the_patches_of_a_step_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def loss(net: Net, patches: Tensor, noise: float, margin: float) -> Tensor:
        seen.append(patches)
        value: Tensor = net(patches).mean()
        return value

    monkeypatch.setattr(Net, "loss", loss)
    data = feature_set(a=normal(3))
    detector = SimpleNet(**{**SMALL, "steps": 20, "patches": 4, "batch_size": 3}).fit(data)
    known = detector._patches(first_batch(data, "a"))  # 3 images of 16 patches
    rows = [int((known - row).abs().sum(1).argmin()) for patches in seen for row in patches]
    assert len(set(rows)) > 30, "80 draws of 48 patches meet 39 of them on average"


def test_it_screens() -> None:
    x = 0.3 * normal(36) + 1
    # Each defect in a direction of its own: the same one in all would be a 24th of the patches that each sub-model
    # trains on, four of 16 in two of its twelve images, and so a kind of normal patch.
    strange = np.random.default_rng(7).normal(size=(6, 4, 1, 1))
    x[30:, :, 1:3, 1:3] += (8 * strange / np.linalg.norm(strange, axis=1, keepdims=True)).astype(np.float32)
    result = screen(feature_set(a=x), SimpleNet(**FAST), ScreenOptions(n_subsets=3, keep=0.8))
    assert set(result.removed[:6].tolist()) == {30, 31, 32, 33, 34, 35}
    own = own_mask(result.submodel_scores.subset_of, 3)
    bad = result.ids >= 30
    for scores, seen in zip(
        result.submodel_scores.score_matrix, own, strict=True
    ):  # each sub-model alone, on what it did not see
        assert scores[~seen & bad].min() > scores[~seen & ~bad].max()


def test_a_defect_that_recurs_is_learned_as_normal_and_found_without_it() -> None:
    x = 0.3 * normal(36) + 1
    x[30:, :, 1:3, 1:3] -= 4
    detector = SimpleNet(**FAST)
    without = detector.clone().fit(feature_set(a=x[:24])).predict(feature_set(a=x), maps=False).scores
    among = detector.clone().fit(feature_set(a=x[:34])).predict(feature_set(a=x), maps=False).scores
    assert without[30:].min() > without[:30].max()
    assert among[34:].max() < among[:30].max(), "what is said of contamination does not hold any more"


def test_a_sub_model_with_a_scale_of_its_own_has_one_vote() -> None:
    x = 0.3 * normal(36) + 1
    x[30:, :, 1:3, 1:3] -= 4
    result = screen(feature_set(a=x), SimpleNet(**FAST), ScreenOptions(n_subsets=3, keep=0.8))
    # one sub-model's logits magnified: the normaliser of stage 1 brings it back, a plain mean follows it alone
    scores = result.submodel_scores.score_matrix.copy()
    own = own_mask(result.submodel_scores.subset_of, 3)
    scores[0] = 50 * scores[0] + 1000
    cases: list[tuple[Normalize, bool]] = [("robust", True), ("none", False)]
    for how, harmless in cases:
        before = combine(normalize_scores(result.submodel_scores.score_matrix, own, how), own, "mean", exclude_own=True)
        after = combine(normalize_scores(scores, own, how), own, "mean", exclude_own=True)
        assert np.allclose(before, after, rtol=1e-3, atol=1e-3) == harmless


def test_it_is_a_sub_model_and_a_final_detector(tiny: Backbone, easy: Dataset) -> None:
    data, _ = attach(easy.images.select(range(20)), tiny, ("stride8", "stride16"))
    detector = SimpleNet(embedding_dim=16, hidden_dim=8, steps=4)
    result = screen(data, detector, ScreenOptions(n_subsets=4, keep=0.5))
    final = detector.fit(data.select(result.kept)).predict(data)
    assert np.isfinite(final.scores).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"embedding_dim": 0}, "SimpleNet.embedding_dim must be at least 1, got 0."),
        ({"hidden_dim": 0}, "SimpleNet.hidden_dim must be at least 1, got 0."),
        ({"steps": 0}, "SimpleNet.steps must be at least 1, got 0."),
        ({"batch_size": 0}, "SimpleNet.batch_size must be at least 1, got 0."),
        ({"noise": 0.0}, "SimpleNet.noise must be positive, got 0.0."),
        ({"margin": -1.0}, "SimpleNet.margin must be positive, got -1.0."),
        ({"adaptor_rate": 0.0}, "SimpleNet.adaptor_rate must be positive, got 0.0."),
        ({"discriminator_rate": 0.0}, "SimpleNet.discriminator_rate must be positive, got 0.0."),
        ({"average": 1.5}, "SimpleNet.average must be in [0, 1], got 1.5."),
        ({"patches": 0}, "SimpleNet.patches must be at least 1, or None, got 0."),
    ],
)
def test_bad_parameters_are_told(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SimpleNet(**params)
    assert str(caught.value) == message


def test_an_empty_set_is_told() -> None:
    with pytest.raises(InputError, match="at least one image"):
        SimpleNet(**SMALL).fit(feature_set(a=normal(1)).select([]))
