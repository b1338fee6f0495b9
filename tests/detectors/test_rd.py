"""RD: its student's size, losses and maps against plain re-derivations; the teacher is only read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from flawsift.data.images import ImageSet
from flawsift.detectors.parts.training import Recipe, Watch
from flawsift.detectors.rd import LOSSES, RD, Kind, Residual, Student, distances, flattened_loss, position_loss
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.features.store import FeatureStore
from flawsift.testing import easy_set, tiny_backbone, with_features

SHORT: dict[str, Any] = {"n_blocks": (1, 1, 1, 1), "epochs": 2, "batch_size": 4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taps(n: int = 2, seed: int = 0) -> list[Tensor]:
    return [normal(n, c, s, s, seed=seed + s) for c, s in ((3, 8), (4, 4), (5, 2))]


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def feature_set(features: Sequence[Tensor]) -> ImageSet:
    """Taps as a set with ids 0..N-1 and layers "0", "1", ..."""
    n = len(features[0])
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    arrays = {str(i): tap.numpy() for i, tap in enumerate(features)}
    return ImageSet(images.ids, images.source, {}, MemoryFeatures(32, "test", {("", i): i for i in range(n)}, arrays))


def easy(n: int) -> ImageSet:
    return with_features(easy_set().images.select(np.arange(n)), RD())


# ---- the student


@pytest.mark.parametrize(
    ("kind", "channels", "n_blocks", "bottleneck", "decoder"),
    [
        # the published modules less what they never use: 12,205,312 - 525,312, and 8.39 M of the larger ones
        ("basic", (64, 128, 256), (2, 2, 2, 2), 11_680_000, 3_703_168),
        ("wide", (256, 512, 1024), (3, 3, 4, 6), 58_885_120, 24_917_504),
        ("bottleneck", (256, 512, 1024), (3, 3, 4, 6), 30_829_568, 15_821_824),
    ],
)
def test_parameters_of_the_paper(
    kind: Kind, channels: tuple[int, ...], n_blocks: tuple[int, ...], bottleneck: int, decoder: int
) -> None:
    with torch.device("meta"):
        student = Student(channels, kind, n_blocks, final_relu=True)
        found = student([torch.empty(2, c, s, s) for c, s in zip(channels, (64, 32, 16), strict=True)])
    assert count(student.fuse, student.embed) == bottleneck
    assert count(student.decode) == decoder
    assert [tuple(f.shape) for f in found] == [(2, c, s, s) for c, s in zip(channels, (64, 32, 16), strict=True)]


def test_the_paper_preset_has_the_published_constants() -> None:
    constants: dict[str, Any] = {
        "layers": ["stride4", "stride8", "stride16"],
        "block": "wide",
        "n_blocks": [3, 3, 4, 6],
    }
    constants |= {"final_relu": True, "scale": False, "loss": "position", "epochs": 200, "batch_size": 16}
    constants |= {"learning_rate": 5e-3}
    assert make_detector("rd", "paper").params() == {**constants, "seed": 0}


@pytest.mark.parametrize("final_relu", [True, False])
def test_the_student_is_wired_as_published(final_relu: bool) -> None:
    student = Student((3, 4, 5), "basic", (2, 2, 1, 2), final_relu=final_relu).eval()
    t = taps()
    first, second, last = ([m for m in path.modules() if isinstance(m, nn.Conv2d)] for path in student.fuse)
    norms = [m for m in student.fuse.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not last, "the deepest tap enters as it is"
    once = F.relu(norms[0](first[0](t[0])))
    x, found = torch.cat([F.relu(norms[1](first[1](once))), F.relu(norms[2](second[0](t[1]))), t[2]], 1), []
    for stage in (student.embed, *student.decode):
        for block in (part for part in stage.modules() if isinstance(part, Residual)):
            x = F.relu(block(x))  # every block of a ResNet ends with a ReLU; the last one's is `final_relu`
        found.append(x)
    for expected, estimate in zip(found[:0:-1], student(t), strict=True):
        torch.testing.assert_close(estimate.relu(), expected)
        assert bool((estimate < 0).any()) != final_relu


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "wide"])
@pytest.mark.parametrize("change", ["down", "up", ""])
def test_a_residual_block_is_that_of_a_resnet(kind: Kind, change: Literal["down", "up", ""]) -> None:
    block = Residual(8, 16 if change else 8, kind, change).eval()
    convolutions = [m for m in block.body.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    kernels = [3, 3] if kind == "basic" else [1, 3, 1]
    at = 0 if kind == "basic" else 1  # the convolution that changes the resolution: the first, or the one in the middle
    if change == "up":
        kernels[at] = 2
    assert [m.kernel_size for m in convolutions] == [(k, k) for k in kernels]
    assert isinstance(convolutions[at], nn.ConvTranspose2d) == (change == "up")
    strides = [(2, 2) if i == at and change else (1, 1) for i in range(len(kernels))]
    assert [m.stride for m in convolutions] == strides
    assert all(m.bias is None for m in convolutions)
    x = normal(2, 8, 4, 4)
    inside = x
    norms = [m for m in block.body.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        inside = norm(convolution(inside if i == 0 else F.relu(inside)))
    torch.testing.assert_close(block(x), inside + block.shortcut(x))
    assert isinstance(block.shortcut, nn.Identity) == (not change)


def test_convolutions_start_as_in_a_resnet_and_transposed_ones_as_in_torch() -> None:
    torch.manual_seed(0)
    student = Student((32, 64, 96), "basic", (1, 1, 1, 1), final_relu=False)
    for name, module in student.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        if isinstance(module, nn.ConvTranspose2d):  # uniform up to 1 / sqrt(fan), which torch takes as outputs x kernel
            limit = (module.out_channels * 4) ** -0.5
            assert float(module.weight.detach().abs().max()) == pytest.approx(limit, rel=0.01), name


def test_everything_is_used() -> None:
    student = Student((3, 4, 5), "basic", (1, 2, 1, 1), final_relu=False)
    torch.stack([x.square().sum() for x in student(taps())]).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_only_a_final_relu_forbids_negative_estimates() -> None:
    for final_relu in (True, False):
        torch.manual_seed(0)
        student = Student((3, 4, 5), "basic", (1, 1, 1, 1), final_relu=final_relu)
        for found in student(taps()):
            assert bool((found < 0).any()) != final_relu


@pytest.mark.parametrize("edges", [(15, 8, 4), (9, 5, 3), (7, 4, 2)])
def test_odd_grids_come_back(edges: tuple[int, ...]) -> None:
    student = Student((3, 4, 5), "basic", (1, 1, 1, 1), final_relu=False)
    teacher = [normal(2, c, s, s + 2 * s) for c, s in zip((3, 4, 5), edges, strict=True)]
    teacher = [t[..., : -(-3 * edges[0] // 2**i)] for i, t in enumerate(teacher)]
    assert [f.shape for f in student(teacher)] == [t.shape for t in teacher]


# ---- losses and maps


@given(seed=st.integers(0, 99))
def test_losses_equal_loops(seed: int) -> None:
    t, s = taps(2, seed), taps(2, seed + 100)
    flat = per_position = 0.0
    for a, b in zip(t, s, strict=True):
        for i in range(2):
            flat += 1 - float((a[i] * b[i]).sum() / (a[i].norm() * b[i].norm()))
        cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        per_position += float((1 - cosines).mean())
    assert float(flattened_loss(t, s)) == pytest.approx(flat / 2, abs=1e-4)
    assert float(position_loss(t, s)) == pytest.approx(per_position, abs=1e-4)


def test_losses_agree_where_positions_are_alike_and_differ_where_not() -> None:
    e = normal(1, 4, 3, 3)
    t, s = e / e.norm(dim=1, keepdim=True), None
    turned = normal(1, 4, 3, 3, seed=1)
    turned = turned - (turned * t).sum(1, keepdim=True) * t
    s = 0.6 * t + 0.8 * turned / turned.norm(dim=1, keepdim=True)  # norm 1 and cosine 0.6 everywhere
    assert float(flattened_loss([t], [s])) == pytest.approx(0.4, abs=1e-5)
    assert float(position_loss([t], [s])) == pytest.approx(0.4, abs=1e-5)
    t, s = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    t[0, :, 0, 0], s[0, :, 0, 0] = torch.tensor([10.0, 0]), torch.tensor([10.0, 0])  # strong and right
    t[0, :, 0, 1], s[0, :, 0, 1] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])  # weak and wrong
    assert float(position_loss([t], [s])) == pytest.approx(0.5)
    assert float(flattened_loss([t], [s])) == pytest.approx(1 - 100 / 101)


def test_a_perfect_student_has_no_loss_and_no_map() -> None:
    t = [tap.relu() for tap in taps()]
    t[0][:, :, 2, 2] = 0  # silent in teacher and student
    for scale in (1.0, 3.0):
        s = [scale * tap for tap in t]
        for loss in (flattened_loss, position_loss):
            assert float(loss(t, s)) == pytest.approx(0, abs=1e-6)
        assert all(d.abs().max() < 1e-6 for d in distances(t, s))
    assert distances([t[0]], [t[0] + 1])[0][0, 2, 2] == pytest.approx(1), "silent in one only"


class Echo(nn.Module):
    """A student that returns what it is given."""

    def forward(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [2 * tap for tap in given]


def test_the_map_is_the_sum_over_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    data = easy(6)
    fitted = RD(**SHORT).fit(data)
    batch = next(data.batches(fitted.layers))
    with torch.inference_mode():
        teacher = fitted._taps(batch, "cpu")
        student = fitted._net("cpu")(teacher)
    size = tuple(teacher[0].shape[2:])
    by_hand = torch.zeros(6, *size)
    for t, s in zip(teacher, student, strict=True):
        by_hand += F.interpolate((1 - F.cosine_similarity(t, s, dim=1))[:, None], size, mode="bilinear")[:, 0]
    found = fitted.predict_patch_maps(data)[1]
    torch.testing.assert_close(found, by_hand)
    assert 0 <= found.min() <= found.max() <= 6
    monkeypatch.setattr(fitted, "_net", lambda _: Echo())
    assert fitted.predict_patch_maps(data)[1].abs().max() < 1e-5, "a student equal to its teacher has a map"


def test_the_image_score_is_the_maximum_of_the_smoothed_map() -> None:
    maps = normal(3, 64, 64).abs()
    smoothed = np.stack([gaussian_filter(m, 1.0, mode="reflect") for m in maps.double().numpy()])  # 4 px of 256
    np.testing.assert_allclose(RD()._image_scores(maps).numpy(), smoothed.max((1, 2)), rtol=1e-5)


# ---- the detector


def test_settings_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Student, torch.optim.Optimizer, Recipe]] = []
    weights: list[Tensor] = []

    def keep(module: Student, optimizer: torch.optim.Optimizer, *others: Any, **_: Any) -> None:
        seen.append((module, optimizer, others[-1]))
        weights.append(module.state_dict()["decode.0.0.body.0.0.weight"].clone())

    monkeypatch.setattr("flawsift.detectors.parts.training.train", keep)
    for seed in (5, 5, 6):
        RD(n_blocks=(1, 1, 1, 1), epochs=3, batch_size=4, learning_rate=0.02, seed=seed).fit(easy(9))
    module, optimizer, recipe = seen[0]
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.02, (0.5, 0.999))
    assert optimizer.defaults["weight_decay"] == 0
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert recipe == Recipe(large_products=True, steps=6, batch_size=4, seed=5), (
        "two batches of four per epoch, no clipping, no schedule"
    )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("edges", "large"), [((8, 4, 2), True), ((4, 2, 1), False)])
def test_one_cell_is_halved_in_full_precision(
    edges: tuple[int, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("flawsift.detectors.parts.training.train", lambda *given, **_: seen.append(given[-1]))
    taps = [normal(2, c, s, s) for c, s in zip((3, 4, 5), edges, strict=True)]
    RD(layers=("0", "1", "2"), n_blocks=(1, 1, 1, 1)).fit(feature_set(taps))
    assert [recipe.large_products for recipe in seen] == [large]


def test_channels_are_scaled_where_asked() -> None:
    data = easy(4)
    batch = next(data.batches(RD().layers))
    for scale in (True, False):
        fitted = RD(**SHORT, scale=scale).fit(data)
        for tap, layer in zip(fitted._taps(batch, "cpu"), fitted.layers, strict=True):
            deviation = batch.features[layer].std((0, 2, 3), correction=0)[:, None, None]
            expected = batch.features[layer] / (deviation if scale else 1)
            torch.testing.assert_close(tap, expected, rtol=1e-4, atol=1e-4)


class Direct:
    """Features straight from the backbone, nothing cached."""

    size, key = 64, "direct"

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
        return tiny_backbone().extract(images.pixels(64), layers)


def test_cached_and_direct_features_give_the_same_model(tmp_path: Path) -> None:
    images = easy_set().images.select(np.arange(6))
    stored, _ = attach(images, tiny_backbone(), RD().layers, store=FeatureStore(tmp_path, dtype="float32"))
    direct = replace(images, reader=Direct())
    models = [RD(**SHORT).fit(data) for data in (stored, direct)]
    for name, value in models[0].weights_.items():
        # a network rounds differently in batches of other sizes
        torch.testing.assert_close(models[1].weights_[name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(models[0].predict(stored).scores, models[1].predict(direct).scores, rtol=1e-3)


def test_a_killed_fit_goes_on_to_the_same_model(check_resumed: Callable[[Any, ImageSet], None]) -> None:
    check_resumed(RD(**{**SHORT, "epochs": 3}), easy(9))  # the batch norms' running means too


@pytest.mark.parametrize("loss", ["flattened", "position"])
@pytest.mark.parametrize("edges", [(8, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("kind", ["identical", "constant", "silent"])
def test_sets_without_variance_give_numbers(
    loss: Literal["flattened", "position"], edges: tuple[int, ...], kind: str
) -> None:
    t = [normal(1, c, s, s).expand(2, -1, -1, -1) for c, s in zip((3, 4, 5), edges, strict=True)]
    if kind != "identical":
        t = [torch.full_like(tap, float(kind == "constant")) for tap in t]
    data = feature_set(t)
    fitted = RD(layers=("0", "1", "2"), n_blocks=(2, 2, 2, 2), epochs=3, loss=loss).fit(data)
    assert all(value.isfinite().all() for value in fitted.weights_.values())
    found = fitted.predict(data)
    assert np.isfinite(found.scores).all()
    assert found.maps is not None
    assert np.isfinite(found.maps).all()


def test_training_learns_one_image_and_not_another() -> None:
    data = easy(2)
    fitted = RD(**{**SHORT, "epochs": 120}).fit(data.select([0, 1]))
    odd = with_features(ImageSet.from_arrays([np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)]), RD())
    learned = fitted.predict(data, maps=False).scores
    assert learned.max() < 0.3 * fitted.predict(odd, maps=False).scores[0]


def test_the_teacher_is_only_read() -> None:
    features = [t.clone() for t in taps(6)]
    before = [t.clone() for t in features]
    detector = RD(layers=("0", "1", "2"), **SHORT).fit(feature_set(features))
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))
    backbone = tiny_backbone()
    assert backbone.parameters_digest() == backbone.weights_digest
    student = Student((3, 4, 5), "basic", (1, 1, 1, 1), final_relu=False)
    assert set(detector.weights_) == set(student.state_dict()), "the state holds more than the student"


def test_loss_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(name: str, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        called.append(name)
        return flattened_loss(teacher, student)

    names: tuple[Literal["flattened", "position"], ...] = ("flattened", "position")
    for name in names:
        monkeypatch.setitem(LOSSES, name, partial(spy, name))
    for name in names:
        RD(**{**SHORT, "epochs": 1}, loss=name).fit(easy(4))
    assert called == ["flattened", "position"]


def test_epochs_become_steps() -> None:
    seen: list[int] = []
    RD(**{**SHORT, "epochs": 3}).fit(easy(9), watch=Watch(lambda _, done, total: seen.append(total)))
    assert seen == [6] * 6  # two batches of four per epoch


@pytest.mark.parametrize("preset", ["default", "paper", "budget"])
def test_presets_are_valid(preset: str) -> None:
    detector = make_detector("rd", preset)
    assert make_detector("rd", **detector.params()).params() == detector.params()


def test_bad_use_is_told() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"block": "dense"}, "block must be 'basic', 'bottleneck' or 'wide', got 'dense'"),
        ({"n_blocks": (2, 2, 2)}, "n_blocks must have a positive number for the embedding and for each layer"),
        ({"n_blocks": (2, 2, 2, 0)}, "n_blocks must have a positive number"),
        ({"loss": "l2"}, "loss must be 'flattened' or 'position', got 'l2'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    )
    for params, text in cases:
        with pytest.raises(ParameterError, match=f"RD.{text}"):
            make_detector("rd", **params)
    with pytest.raises(InputError, match="at least one image"):
        RD().fit(easy(3).select([]))
    with pytest.raises(InputError, match=r"half the grid of the one before, got 8 x 8, 2 x 2\."):
        RD(layers=("0", "2"), n_blocks=(1, 1, 1)).fit(feature_set(taps(3)))
    with pytest.raises(InputError, match="final_relu must be False for these layers"):
        RD(layers=("0", "1", "2"), final_relu=True).fit(feature_set(taps(3)))
    with pytest.raises(InputError, match="one image on so small a grid"):
        RD(layers=("0", "1", "2"), n_blocks=(1, 1, 1, 1)).fit(feature_set(taps(1)))
