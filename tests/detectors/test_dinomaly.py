"""Dinomaly: its loss, attention, optimizer and network against plain re-derivations; cached features change nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flawsift.data.images import ImageSet
from flawsift.detectors.dinomaly import (
    VIT_GROUPS,
    Block,
    Dinomaly,
    Reconstruction,
    mined_loss,
)
from flawsift.detectors.parts.networks import linear_attention
from flawsift.detectors.parts.training import Recipe, StableAdamW, weights_of
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.features.store import FeatureStore
from flawsift.testing import easy_set, with_features

SHORT: dict[str, Any] = {"n_blocks": 2, "width": 16, "steps": 3, "batch_size": 4, "warmup": 1}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def easy(n: int) -> ImageSet:
    return with_features(easy_set().images.select(np.arange(n)), Dinomaly())


# ---- the network


def test_parameters_of_the_paper_at_vit_b() -> None:
    with torch.device("meta"):
        module = Reconstruction((768, 768), width=None, n_blocks=8, dropout=0.2, init_std=None)
    per_block = 768 * 2304 + 2304 + 768 * 768 + 768 + 2 * 4 * 768 * 768 + 4 * 768 + 768 + 4 * 768
    assert count(module.bottleneck) == 2 * 4 * 768 * 768 + 4 * 768 + 768 == 4_722_432
    assert count(module) == 8 * per_block + 4_722_432 == 61_425_408
    assert {part.n_heads for part in module.modules() if isinstance(part, Block)} == {12}


@settings(deadline=None)
@given(n=st.integers(1, 12), c=st.integers(1, 8), seed=st.integers(0, 99))
def test_linear_attention_is_the_quadratic_one(n: int, c: int, seed: int) -> None:
    q, k, v = normal(3, 2, n, c, seed=seed).double()
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(1, 2)  # every query against every key
    torch.testing.assert_close(linear_attention(q, k, v), weights / weights.sum(2, keepdim=True) @ v)


def test_attention_without_weight_is_no_nan() -> None:
    q = torch.full((1, 3, 4), -1e3, requires_grad=True)  # elu + 1 is exactly 0
    found = linear_attention(q, q, torch.ones(1, 3, 4))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(found, torch.zeros(1, 3, 4))
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_a_block_is_its_formula() -> None:
    block, x = Block(128), 1e-4 * normal(2, 5, 128)  # so small that the epsilon of the layer norm counts
    assert block.n_heads == 2

    def norm(y: Tensor) -> Tensor:
        mean, variance = y.mean(2, keepdim=True), y.var(2, keepdim=True, correction=0)
        return (y - mean) / (variance + 1e-8).sqrt()  # weight 1 and bias 0 at the start

    q, k, v = (norm(x) @ block.qkv.weight.T + block.qkv.bias).view(2, 5, 3, 128).unbind(2)
    heads = [linear_attention(*(part[..., c : c + 64] for part in (q, k, v))) for c in (0, 64)]
    attended = x + block.project(torch.cat(heads, 2))
    inside, outside = block.mlp[0], block.mlp[-1]
    assert inside.weight.shape == (512, 128)
    torch.testing.assert_close(block(x), attended + outside(F.gelu(inside(norm(attended)))), rtol=1e-4, atol=1e-6)


def test_the_bottleneck_is_noisy_before_between_and_behind_its_layers() -> None:
    module = Reconstruction((6, 6), width=None, n_blocks=2, dropout=0.35, init_std=None)
    kinds = [type(part) for part in module.bottleneck]
    assert kinds == [nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]
    assert [part.p for part in module.modules() if isinstance(part, nn.Dropout)] == [0.35] * 3, "noise elsewhere"


def test_the_decoder_sees_the_mean_of_the_groups_and_answers_in_reverse() -> None:
    module = Reconstruction((6, 6), width=None, n_blocks=4, dropout=0.0, init_std=None)
    a, b = normal(2, 6, 3, 5), normal(2, 6, 3, 5, seed=1)
    x = module.bottleneck(((a + b) / 2).permute(0, 2, 3, 1).reshape(2, 15, 6))
    outputs = []
    for block in module.blocks:
        x = block(x)
        outputs.append(x.reshape(2, 3, 5, 6).permute(0, 3, 1, 2))
    shallow, deep = module([a, b])
    torch.testing.assert_close(shallow, (outputs[2] + outputs[3]) / 2)
    torch.testing.assert_close(deep, (outputs[0] + outputs[1]) / 2)


def test_groups_of_other_widths_keep_their_channels() -> None:
    module = Reconstruction((6, 10), width=12, n_blocks=2, dropout=0.0, init_std=None)
    assert [d.shape[1] for d in module([normal(1, 6, 4, 4), normal(1, 10, 4, 4)])] == [6, 10]
    a, b = normal(1, 6, 4, 4), normal(1, 10, 4, 4)
    moved = module([a, b + 1])  # both groups feed both estimates
    assert not any(torch.allclose(x, y) for x, y in zip(module([a, b]), moved, strict=True))


def test_dropout_is_noise_in_training_only() -> None:
    module = Reconstruction((6, 6), width=None, n_blocks=2, dropout=0.5, init_std=None)
    groups = [normal(1, 6, 4, 4), normal(1, 6, 4, 4)]
    assert not torch.equal(module(groups)[0], module(groups)[0])
    module.eval()
    assert torch.equal(module(groups)[0], module(groups)[0])


def test_initial_weights_are_cut_at_three_deviations() -> None:
    module = Reconstruction((64, 64), width=None, n_blocks=2, dropout=0.0, init_std=0.01)
    for name, value in module.named_parameters():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, float("weight" in name)))
        elif "bias" in name:
            assert not value.any()
        else:
            assert value.abs().max() <= 0.03
            # a normal distribution cut at three deviations has 0.9866 of its deviation
            assert float(value.detach().std()) == pytest.approx(0.009866, rel=0.03)


# ---- the loss


def gradients_by_hand(e: Tensor, d: Tensor, easy_share: float, factor: float, trim: float) -> tuple[float, Tensor]:
    """Value and gradient of one group's loss, from the formula of the cosine, point by point."""
    b, _, h, w = d.shape
    difficulty = torch.tensor(
        [
            [
                1 - float(e[i, :, y, x] @ d[i, :, y, x] / (e[i, :, y, x].norm() * d[i, :, y, x].norm()))
                for y in range(h)
                for x in range(w)
            ]
            for i in range(b)
        ]
    ).view(b, h, w)
    ranked = difficulty.flatten().sort(descending=True).values
    threshold = ranked[max(1, int(b * h * w * (1 - easy_share))) - 1]
    n_trim = int(b * h * w * trim)
    value, gradient = 0.0, torch.zeros_like(d)
    for i in range(b):
        dot, ne, nd = (e[i] * d[i]).sum(), e[i].norm(), d[i].norm()
        value += float(1 - dot / (ne * nd)) / b
        whole = -(e[i] / (ne * nd) - dot * d[i] / (ne * nd**3)) / b
        for y in range(h):
            for x in range(w):
                f = factor if difficulty[i, y, x] < threshold else 1.0
                if n_trim and difficulty[i, y, x] >= ranked[n_trim - 1]:
                    f = 0.0
                gradient[i, :, y, x] = f * whole[:, y, x]
    return value, gradient


@pytest.mark.parametrize("easy_share", [0.0, 0.45, 0.9])
@pytest.mark.parametrize(("factor", "trim"), [(0.1, 0.0), (0.0, 0.0), (0.1, 0.05)])
def test_gradients_equal_those_by_hand(easy_share: float, factor: float, trim: float) -> None:
    e = [normal(3, 5, 4, 4, seed=s).double() for s in (1, 2)]
    d = [(normal(3, 5, 4, 4, seed=s).double() + g).requires_grad_() for s, g in zip((3, 4), e, strict=True)]
    loss = mined_loss(e, d, easy=easy_share, easy_gradient=factor, upper_trim=trim)
    loss.backward()  # type: ignore[no-untyped-call]
    by_hand = [gradients_by_hand(g, x.detach(), easy_share, factor, trim) for g, x in zip(e, d, strict=True)]
    assert float(loss.detach()) == pytest.approx(sum(value for value, _ in by_hand) / 2)
    for x, (_, gradient) in zip(d, by_hand, strict=True):
        torch.testing.assert_close(x.grad, gradient / 2)  # the mean over two groups


def test_mining_does_not_change_the_value() -> None:
    e, d = [normal(2, 4, 3, 3)], [normal(2, 4, 3, 3, seed=1)]
    values = {
        round(float(mined_loss(e, d, easy=s, easy_gradient=f, upper_trim=t)), 6)
        for s, f, t in ((0.0, 1.0, 0.0), (0.9, 0.1, 0.0), (0.5, 0.0, 0.2))
    }
    assert len(values) == 1


# ---- the optimizer


def stable_adamw_by_hand(start: Tensor, gradients: Sequence[Tensor], lr: float, decay: float, eps: float) -> Tensor:
    p = start.double()
    m, v, largest = (torch.zeros_like(p) for _ in range(3))
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        largest = torch.maximum(largest, v)
        scale = (largest / (1 - 0.999**t)).sqrt() + eps
        shrink = max(1.0, float((g / scale).square().mean().sqrt()))
        p = p * (1 - lr * decay) - lr / shrink * (m / (1 - 0.9**t)) / scale
    return p


def test_stable_adamw_equals_its_formula() -> None:
    # the fourth gradient outgrows its history, so the step shrinks; the last ones are small, so the maximum holds
    gradients = [normal(7, seed=s) * size for s, size in enumerate((1.0, 1.0, 1.0, 40.0, 0.1, 0.1))]
    parameter = nn.Parameter(normal(7, seed=9))
    start = parameter.detach().clone()
    optimizer = StableAdamW([parameter], lr=0.05, eps=1e-10, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    by_hand = stable_adamw_by_hand(start, gradients, 0.05, 0.1, 1e-10)
    torch.testing.assert_close(parameter.detach().double(), by_hand, rtol=1e-5, atol=1e-6)


def test_a_sudden_gradient_moves_less_than_with_plain_adamw() -> None:
    moved = {}
    for kind in (StableAdamW, torch.optim.AdamW):
        parameter = nn.Parameter(torch.zeros(100))
        optimizer = kind([parameter], lr=0.01, weight_decay=0.0)
        for size in (1e-3,) * 50 + (1.0,):
            before = parameter.detach().clone()
            parameter.grad = normal(100, seed=3) * size
            optimizer.step()
        moved[kind] = float((parameter.detach() - before).square().mean().sqrt())
    assert moved[StableAdamW] < 0.2 * moved[torch.optim.AdamW]


# ---- the detector


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return load_backbone("random:0:vit_tiny_patch16_224", size=64, runtime="torch")


def test_on_a_vit_with_registers_by_the_paper_s_layers() -> None:
    backbone = load_backbone("random:0:vit_small_patch14_reg4_dinov2", size=56, runtime="torch")
    data, _ = attach(easy_set().images.select([0, 1]), backbone, VIT_GROUPS)
    detector = make_detector("dinomaly", "paper", steps=1, warmup=0, batch_size=2).fit(data)
    assert isinstance(detector, Dinomaly)
    assert detector.channels_ == [384, 384]
    assert sum(w.numel() for w in detector.weights_.values()) == 8 * (12 * 384**2 + 13 * 384) + 8 * 384**2 + 5 * 384
    found = detector.predict(data)
    assert found.maps is not None
    assert found.maps.shape == (2, 56, 56)
    assert np.isfinite(found.scores).all()


class Direct:
    """Features straight from the backbone, nothing cached."""

    size, key = 64, "direct"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
        return self.backbone.extract(images.pixels(64), layers)


def test_cached_and_direct_features_give_the_same_model(vit: Backbone, tmp_path: Path) -> None:
    images = easy_set().images.select(np.arange(6))
    stored, _ = attach(images, vit, VIT_GROUPS, store=FeatureStore(tmp_path, dtype="float32"))
    direct = replace(images, reader=Direct(vit))
    models = [Dinomaly(layers=VIT_GROUPS, **SHORT, scale=False).fit(data) for data in (stored, direct)]
    for name, value in models[0].weights_.items():
        assert torch.equal(value, models[1].weights_[name]), name
    assert (models[0].predict(stored).scores == models[1].predict(direct).scores).all()


def test_the_input_is_the_mean_of_all_eight_blocks(vit: Backbone) -> None:
    pixels = easy_set().images.select([3]).pixels(64)
    single = vit.extract(pixels, [f"blocks.{i}" for i in range(2, 10)])
    groups = vit.extract(pixels, VIT_GROUPS)
    mean = (groups[VIT_GROUPS[0]] + groups[VIT_GROUPS[1]]) / 2
    torch.testing.assert_close(mean, torch.stack(list(single.values())).mean(0))


@pytest.mark.parametrize(("grid", "edge"), [("finest", 8), ("coarsest", 4)])
def test_the_grid_is_chosen(grid: Literal["finest", "coarsest"], edge: int) -> None:
    data = easy(4)
    found = Dinomaly(**SHORT, grid=grid).fit(data).predict_patch_maps(data)[1]
    assert found.shape == (4, edge, edge)


def test_training_lowers_the_distance_and_the_map_is_that_of_the_groups() -> None:
    data = easy(8)
    before, after = (Dinomaly(**{**SHORT, "steps": steps}).fit(data) for steps in (2, 60))
    assert after.predict(data).scores.mean() < 0.7 * before.predict(data).scores.mean()
    batch = next(data.batches(after.layers))
    with torch.inference_mode():
        groups, found = after._groups(batch, "cpu"), after._expected(batch, "cpu")
    joined = [found[:, :24], found[:, 24:]]
    by_hand = sum(1 - F.cosine_similarity(e, d, 1) for e, d in zip(groups, joined, strict=True)) / 2
    torch.testing.assert_close(after.predict_patch_maps(data)[1], by_hand)


def test_the_image_score_is_the_mean_of_the_top_share_of_the_smoothed_map() -> None:
    maps = normal(2, 6, 6).abs()
    at_256 = F.interpolate(maps.unsqueeze(1), (256, 256), mode="bilinear")[:, 0]
    offsets = torch.arange(-2, 3.0)
    taps = torch.exp(-(offsets**2) / 32)
    taps = taps / taps.sum()
    assert [round(float(t), 3) for t in taps] == [0.188, 0.206, 0.213, 0.206, 0.188]  # the published kernel
    padded = F.pad(at_256.unsqueeze(1), (2, 2, 2, 2), mode="replicate")
    smooth = F.conv2d(padded, (taps[:, None] * taps).view(1, 1, 5, 5))
    by_hand = smooth.flatten(1).sort(descending=True).values[:, :655].mean(1)
    torch.testing.assert_close(Dinomaly()._image_scores(maps), by_hand, rtol=1e-3, atol=1e-4)


def test_the_share_of_easy_points_ramps_up_and_the_loss_has_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    others: set[tuple[tuple[str, float], ...]] = set()

    def spy(e: Sequence[Tensor], d: Sequence[Tensor], *, easy: float, **settings: float) -> Tensor:
        shares.append(easy)
        others.add(tuple(sorted(settings.items())))
        return torch.stack([x.square().mean() for x in d]).mean()

    monkeypatch.setattr("flawsift.detectors.dinomaly.mined_loss", spy)
    settings: dict[str, Any] = {"easy_gradient": 0.3, "upper_trim": 0.05}
    Dinomaly(**{**SHORT, "steps": 5}, **settings, easy_ramp=4).fit(easy(4))
    Dinomaly(**{**SHORT, "steps": 2}, **settings, easy_ramp=0).fit(easy(4))
    assert shares == pytest.approx([0, 0.225, 0.45, 0.675, 0.9, 0.9, 0.9])
    assert others == {(("easy_gradient", 0.3), ("upper_trim", 0.05))}


class Started:
    """What `Dinomaly.fit` hands to the training loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
        monkeypatch.setattr("flawsift.detectors.parts.training.train", self.keep)
        Dinomaly(**{**SHORT, **params}).fit(easy(4))

    def keep(
        self,
        module: Reconstruction,
        optimizer: torch.optim.Optimizer,
        data: ImageSet,
        layers: Sequence[str],
        loss_of: Any,
        recipe: Recipe,
        **_: Any,
    ) -> None:
        self.module, self.optimizer, self.recipe = module, optimizer, recipe
        self.weights = weights_of(module)


def test_settings_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    params: dict[str, Any] = {"steps": 11, "warmup": 4, "final_rate": 0.3, "batch_size": 3, "clip_norm": 0.7, "seed": 5}
    params |= {"learning_rate": 0.01, "weight_decay": 0.02, "dropout": 0.35, "init_std": 0.005}
    found = Started(monkeypatch, **params)
    assert isinstance(found.optimizer, StableAdamW)
    assert found.optimizer.defaults == {"lr": 0.01, "eps": 1e-10, "weight_decay": 0.02}
    recipe = found.recipe
    assert (recipe.steps, recipe.batch_size, recipe.clip_norm, recipe.seed) == (11, 3, 0.7, 5)
    assert recipe.large_products, "half the time where the CPU multiplies bfloat16"
    assert recipe.schedule is not None
    assert [recipe.schedule(step) for step in (0, 2, 4, 10)] == pytest.approx([0, 0.5, 1, 0.3])
    assert {part.p for part in found.module.modules() if isinstance(part, nn.Dropout)} == {0.35}
    assert found.weights["bottleneck.1.weight"].abs().max() <= 0.015
    adam = Started(monkeypatch, **params, optimizer="adam").optimizer
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["lr"], adam.defaults["betas"], adam.defaults["weight_decay"]) == (0.01, (0.5, 0.999), 0.02)
    held = Started(monkeypatch, optimizer="adam", warmup=0, final_rate=1.0, init_std=None)
    assert held.recipe.schedule is not None
    assert {held.recipe.schedule(step) for step in range(3)} == {1.0}
    assert held.weights["bottleneck.1.weight"].abs().max() > 0.1, "torch's own initialisation reaches 1 / sqrt(64)"


def test_the_seed_decides_the_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bottleneck.1.weight"
    first, again, other = (Started(monkeypatch, seed=seed).weights[name] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_killed_fit_goes_on_to_the_same_model(check_resumed: Callable[[Any, ImageSet], None]) -> None:
    check_resumed(Dinomaly(**{**SHORT, "steps": 6}, easy_ramp=4), easy(6))


def test_trimming_leaves_a_lone_oddity_unlearned() -> None:
    expected = normal(1, 6, 8, 8)
    start = expected + normal(1, 6, 8, 8, seed=1, scale=0.3)
    start[:, :, 2, 3] = -expected[:, :, 2, 3]  # the decoder expects anything but this point
    at_oddity = {}
    for trim in (0.0, 0.02):  # one of 64 points
        d = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([d], lr=50.0)
        for _ in range(50):
            optimizer.zero_grad()
            mined_loss([expected], [d], easy=0.5, easy_gradient=0.1, upper_trim=trim).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        at_oddity[trim] = float(1 - F.cosine_similarity(expected, d.detach(), dim=1)[0, 2, 3])
    assert at_oddity[0.0] < 0.5
    assert at_oddity[0.02] == pytest.approx(2)


def test_channels_are_scaled_where_asked() -> None:
    data = easy(4)
    batch = next(data.batches(Dinomaly().layers))
    for scale in (True, False):
        fitted = Dinomaly(**SHORT, scale=scale).fit(data)
        for group, layer in zip(fitted._groups(batch, "cpu"), fitted.layers, strict=True):
            deviation = batch.features[layer].std((0, 2, 3), correction=0)[:, None, None]
            expected = batch.features[layer] / (deviation if scale else 1)
            torch.testing.assert_close(group, F.adaptive_avg_pool2d(expected, 4), rtol=1e-4, atol=1e-4)


def test_presets_have_the_published_constants() -> None:
    paper: dict[str, Any] = {
        "width": None,
        "n_blocks": 8,
        "scale": False,
        "dropout": 0.2,
        "steps": 5000,
        "batch_size": 16,
    }
    paper |= {"layers": ["blocks.2+3+4+5", "blocks.6+7+8+9"], "optimizer": "stable_adamw", "learning_rate": 2e-3}
    paper |= {"warmup": 100, "final_rate": 0.1, "weight_decay": 1e-4, "clip_norm": 0.1, "init_std": 0.01}
    paper |= {"easy_share": 0.9, "easy_ramp": 1000, "easy_gradient": 0.1, "upper_trim": 0.0, "top_share": 0.01}
    llbnad = {**paper, "steps": 1000, "optimizer": "adam", "learning_rate": 5e-3, "warmup": 0, "final_rate": 1.0}
    llbnad |= {"weight_decay": 0.0, "clip_norm": 5.0, "init_std": None, "easy_ramp": 0, "easy_gradient": 0.0}
    for preset, constants in (("paper", paper), ("llbnad", llbnad)):
        found = make_detector("dinomaly", preset).params()
        assert {key: found[key] for key in constants} == constants, preset


@pytest.mark.parametrize("kind", ["one", "two identical", "constant", "silent"])
@pytest.mark.parametrize("params", [{}, {"optimizer": "adam", "learning_rate": 5e-3, "clip_norm": 5.0, "warmup": 0}])
def test_sets_below_a_batch_and_without_variance_give_numbers(kind: str, params: dict[str, Any]) -> None:
    n = {"one": 1, "two identical": 2}.get(kind, 3)
    features = {"a": normal(1, 3, 4, 4).expand(n, -1, -1, -1), "b": normal(1, 5, 2, 2, seed=1).expand(n, -1, -1, -1)}
    if kind in ("constant", "silent"):
        features = {key: torch.full_like(value, float(kind == "constant")) for key, value in features.items()}
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    arrays = {key: value.numpy() for key, value in features.items()}
    data = replace(images, reader=MemoryFeatures(32, "test", {("", i): i for i in range(n)}, arrays))
    fitted = Dinomaly(**{**SHORT, **params}, layers=("a", "b")).fit(data)
    assert all(value.isfinite().all() for value in fitted.weights_.values())
    found = fitted.predict(data)
    assert np.isfinite(found.scores).all()
    assert found.maps is not None
    assert np.isfinite(found.maps).all()


@pytest.mark.parametrize("preset", ["default", "paper", "llbnad", "budget"])
def test_presets_are_valid(preset: str) -> None:
    detector = make_detector("dinomaly", preset)
    assert make_detector("dinomaly", **detector.params()).params() == detector.params()


def test_bad_use_is_told() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"n_blocks": 3}, "n_blocks must be a multiple of the number of layers, got 3"),
        ({"width": 0}, "width must be at least 1, or None, got 0"),
        ({"grid": "middle"}, "grid must be 'finest' or 'coarsest', got 'middle'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"optimizer": "sgd"}, "optimizer must be 'stable_adamw' or 'adam', got 'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"steps": 20}, "warmup must be below the number of steps, 20, got 20"),
        ({"final_rate": 1.5}, r"final_rate must be in \[0, 1\], got 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"init_std": 0.0}, "init_std must be positive, or None, got 0.0"),
        ({"easy_share": 1.0}, r"easy_share must be in \[0, 1\), got 1.0"),
        ({"easy_ramp": -1}, "easy_ramp must not be negative, got -1"),
        ({"easy_gradient": 2.0}, r"easy_gradient must be in \[0, 1\], got 2.0"),
        ({"upper_trim": 0.2}, "upper_trim must be at least 0 and below the share of hard points"),
        ({"top_share": 0.0}, r"top_share must be in \(0, 1\], got 0.0"),
    )
    for params, text in cases:
        with pytest.raises(ParameterError, match=f"Dinomaly.{text}"):
            make_detector("dinomaly", **params)
    with pytest.raises(InputError, match="at least one image"):
        Dinomaly().fit(easy(3).select([]))
