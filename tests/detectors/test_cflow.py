"""CFlow against autograd, closed forms of the normal distribution, and the published parameter counts."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.cflow import CFlow
from flawsift.detectors.parts.flows import Coupling, Flow, position_code
from flawsift.detectors.parts.training import Recipe, seeded
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.screening.options import ScreenOptions
from flawsift.screening.stage1 import screen

ENTROPY = math.log(2 * math.pi * math.e) / 2  # of a standard normal, per dimension


def feature_set(**features: npt.NDArray[np.floating]) -> ImageSet:
    """(N, C, h, w) features per layer as a set with ids 0..N-1."""
    n = len(next(iter(features.values())))
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(32, "test", {("", i): i for i in range(n)}, features)
    return ImageSet(images.ids, images.source, {}, reader)


def normal(n: int, c: int = 4, side: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, c, side, side)).astype(np.float32)


def perturbed(channels: int, n_blocks: int, *, code_size: int = 8, seed: int = 0) -> Flow:
    """A float64 flow far from the identity."""
    with seeded(seed, "cpu"):
        flow = Flow(channels, code_size, n_blocks).double()
        for parameter in flow.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return flow.requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(channels=st.integers(2, 11), n_blocks=st.integers(1, 5), seed=st.integers(0, 999))
def test_the_inverse_undoes_the_flow(channels: int, n_blocks: int, seed: int) -> None:
    flow = perturbed(channels, n_blocks, seed=seed)
    x, code = draw(3, 5, channels, seed=seed), draw(5, 8, seed=seed + 1)
    z, _ = flow(x, code)
    assert not torch.allclose(z, x)
    torch.testing.assert_close(flow.inverse(z, code), x, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(channels=st.integers(2, 9), seed=st.integers(0, 999))
def test_the_log_determinant_is_that_of_the_jacobian(channels: int, seed: int) -> None:
    flow = perturbed(channels, 3, seed=seed)
    x, code = draw(channels, seed=seed), draw(8, seed=seed + 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, code)[0], x)  # type: ignore[no-untyped-call]
    _, log_det = flow(x, code)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


def test_a_coupling_equals_the_paper_written_out() -> None:
    with seeded(0, "cpu"):
        block = Coupling(5, 4).double().requires_grad_(False)
        block.gamma.data.add_(torch.randn(5))
        block.offset.data.add_(torch.randn(5))
    x, code = draw(7, 5), draw(7, 4, seed=1)
    found, log_det = block(x, code)
    subnet = torch.nn.Sequential(block.hidden, torch.nn.ReLU(), block.out)  # on the stacked input, in one piece
    a = 0.1 * subnet(torch.cat([x[:, :3], code], 1))
    s = 1.9 * torch.tanh(a[:, :2])
    g = 0.1 * torch.log1p(torch.exp(0.5 * block.gamma)) / 0.5
    y = torch.cat([x[:, :3], x[:, 3:] * torch.exp(s) + a[:, 2:]], 1) * g + block.offset
    torch.testing.assert_close(found, y[:, block.order])
    torch.testing.assert_close(log_det, s.sum(1) + g.log().sum())


def test_gains_start_at_1() -> None:
    gain = Coupling(6, 4).double()._gain()
    torch.testing.assert_close(gain, torch.ones_like(gain), rtol=1e-7, atol=0)


def test_a_density_integrates_to_1() -> None:
    flow, code = perturbed(2, 4), draw(8)
    axis = torch.linspace(-30, 30, 801, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    density = torch.exp(2 * flow.log_likelihood(x, code))
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("channels", "millions"), [(128, 0.99), (256, 2.11), (512, 5.52), (1024, 17.07), (2048, 59.05)]
)
def test_parameter_counts_of_the_paper(channels: int, millions: float) -> None:
    with torch.device("meta"):
        flow = Flow(channels, CFlow.position_dim, CFlow(**CFlow.presets["paper"]).n_blocks)
    found = sum(p.numel() for p in flow.parameters())
    i, o = channels // 2 + 128, channels
    assert found == 8 * ((2 * i * i + 2 * i) + (2 * i * o + o) + 2 * channels)
    assert found / 1e6 == pytest.approx(millions, abs=0.005)


def test_position_codes_are_distinct_and_as_the_paper_has_them() -> None:
    code = position_code(5, 7, 16)
    assert torch.equal(code[0], torch.tensor([0.0, 1.0] * 8))
    assert torch.pdist(code).min() > 0.1
    for row, column, half, j in [(3, 2, 0, 1), (3, 2, 1, 3), (4, 6, 0, 0)]:
        angle = (column, row)[half] * 10000 ** (-2 * j / 8)
        here = code[row * 7 + column, 8 * half + 2 * j : 8 * half + 2 * j + 2]
        assert here.tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_likelihood_of_normal_data_reaches_its_entropy(sigma: float) -> None:
    flow = CFlow(layers=("a",), n_blocks=2, position_dim=4, steps=250, fibres=1024, learning_rate=0.02, whiten=False)
    flow.fit(feature_set(a=sigma * normal(128)))
    new = next(feature_set(a=sigma * normal(128, seed=1)).batches(("a",), batch_size=128))
    mean = float(flow._log_likelihoods(new, "cpu")[0].mean())
    assert mean == pytest.approx(-ENTROPY - math.log(sigma), abs=0.03)


def test_the_place_counts() -> None:
    x = 0.3 * normal(64, 2)
    x[:, :, :2] += 2  # the upper half is bright, the lower half dark
    x[:, :, 2:] -= 2
    flow = CFlow(layers=("a",), n_blocks=4, position_dim=16, steps=200, fibres=512, learning_rate=0.01)
    flow.fit(feature_set(a=x))
    right = flow.predict_patch_maps(feature_set(a=x[:8]))[1]
    wrong = flow.predict_patch_maps(feature_set(a=np.ascontiguousarray(x[:8, :, ::-1])))[1]  # known, misplaced
    assert wrong.min() > right.median()


@pytest.mark.parametrize("scale", ["log", "likelihood"])
def test_maps_are_sums_on_a_scale_of_the_training_set(scale: str) -> None:
    a, b = normal(9), normal(9, 6, 2, seed=1)
    data = feature_set(a=a, b=b)
    flow = CFlow(layers=("a", "b"), n_blocks=1, position_dim=4, steps=3, scale=scale).fit(data)  # type: ignore[arg-type]
    stretch = np.array([3, 0], np.float32)[:, None, None, None]  # the second image is likelier than all of training
    new = feature_set(a=stretch * normal(2, seed=5), b=stretch * normal(2, 6, 2, seed=6))
    mine = flow._log_likelihoods(next(data.batches(("a", "b"))), "cpu")
    theirs = flow._log_likelihoods(next(new.batches(("a", "b"))), "cpu")
    expected = torch.zeros(2, 4, 4)
    for known, values in zip(mine, theirs, strict=True):
        if scale == "log":
            missing = (known.mean() - values) / known.std(correction=0)
        else:
            missing = 1 - torch.exp((values - known.max()).clamp(max=0))
        expected += torch.nn.functional.interpolate(missing[:, None], (4, 4), mode="bilinear")[:, 0]
    assert theirs[0][1].max() > mine[0].max()
    scores, maps = flow.predict_patch_maps(new)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, expected.amax((1, 2)), rtol=1e-4)


def test_the_log_scale_ranks_what_the_likelihood_cannot() -> None:
    data = feature_set(a=normal(16))
    far = feature_set(a=np.stack([20 * normal(1)[0], 40 * normal(1)[0], 80 * normal(1)[0]]))
    small: dict[str, Any] = {"layers": ("a",), "n_blocks": 2, "position_dim": 4, "steps": 20}
    ties = CFlow(**small, scale="likelihood").fit(data).predict(far, maps=False).scores
    assert ties.tolist() == [1, 1, 1]
    assert np.diff(CFlow(**small, scale="log").fit(data).predict(far, maps=False).scores).min() > 1


def test_what_is_expected_is_the_patch_itself_unless_it_is_strange() -> None:
    data = feature_set(a=normal(32, 8))
    flow = CFlow(layers=("a",), n_blocks=2, position_dim=4, steps=50, whiten=False).fit(data)
    usual, strange = 0.1 * normal(1, 8), 5 * normal(1, 8)
    batch = next(feature_set(a=np.concatenate([usual, strange])).batches(("a",)))
    expected = flow._expected(batch, "cpu")
    torch.testing.assert_close(expected[0], torch.from_numpy(usual[0]), rtol=1e-3, atol=1e-3)
    assert expected[1].norm(dim=0).max() < 0.5 * torch.from_numpy(strange[0]).norm(dim=0).median()


def test_expected_patches_are_in_units_of_the_backbone() -> None:
    mixed = np.einsum("cd,ndhw->nchw", np.random.default_rng(3).normal(size=(6, 6)), normal(32, 6)) + 5
    data = feature_set(a=mixed.astype(np.float32), b=normal(32, 3, 2))
    flow = CFlow(layers=("a", "b"), n_blocks=2, position_dim=4, steps=5).fit(data)
    batch = next(data.batches(("a", "b"), batch_size=4))
    expected = flow._expected(batch, "cpu")
    assert expected.shape == (4, 9, 4, 4)
    cells = (expected[:, :6] - batch.features["a"]).abs().amax(1)
    assert (cells < 1e-2).float().mean() > 0.2, "no usual patch comes back"


def test_rotations_are_trained_on(tiny: Backbone, easy: Dataset) -> None:
    flow = CFlow(n_blocks=1, position_dim=4, steps=4, rotations=(90, -5.5))
    assert flow.views == ("rotate:90", "rotate:-5.5")
    assert CFlow(**json.loads(json.dumps(flow.params()))).views == flow.views
    images = easy.images.select([0, 1, 2, 3])
    data, _ = attach(images, tiny, flow.layers, views=flow.views)
    turned = flow.fit(data).predict(data, maps=False).scores
    assert not np.array_equal(turned, flow.clone(rotations=()).fit(data).predict(data, maps=False).scores)
    with pytest.raises(InputError, match="rotate"):
        flow.clone().fit(attach(images, tiny, flow.layers)[0])


def test_every_grid_gives_the_same_share() -> None:
    flow = CFlow(layers=("a", "b"), position_dim=4, fibres=32)
    data = feature_set(a=normal(8), b=normal(8, 6, 2))
    flow.whitening_ = {"a": torch.ones(5, 4), "b": torch.ones(7, 6)}
    batch = next(data.batches(("a", "b")))
    with seeded(0, "cpu"):
        shapes = [(tuple(x.shape), tuple(code.shape)) for x, code in flow._fibres(batch, "cpu", share=True)]
    assert shapes == [((8, 4, 4), (4, 4)), ((8, 1, 6), (1, 4))]  # a quarter of 16 places and of 4


def test_fibres_come_with_the_codes_of_their_places_which_are_drawn() -> None:
    flow = CFlow(layers=("a",), position_dim=8, fibres=8)
    where = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4).repeat(2, 0)  # a feature that tells its place
    flow.whitening_ = {"a": torch.tensor([[0.0], [1.0]])}
    batch, codes, drawn = next(feature_set(a=where).batches(("a",))), position_code(4, 4, 8), []
    with seeded(0, "cpu"):
        for _ in range(8):
            x, code = flow._fibres(batch, "cpu", share=True)[0]
            assert torch.equal(x[0], x[1])
            places = x[0, :, 0].long()
            assert len(places) == 4
            assert torch.equal(code, codes[places])
            drawn += places.tolist()
    assert len(set(drawn)) > 10, "places are not drawn"


def test_training_is_adam_on_the_log_sigmoid_under_its_schedule() -> None:
    data, n = feature_set(a=normal(6, seed=3)), 26  # steps, of which two warm up
    flow = CFlow(layers=("a",), n_blocks=2, position_dim=4, steps=n, batch_size=4, fibres=10**6, learning_rate=0.05)
    flow.fit(data)  # with so many fibres a step takes all places, in whatever order
    net = flow._build()[0]
    assert isinstance(net, Flow)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(n):
        turn = (step - 2) / (n - 3)  # from the end of the warm-up to the last step
        factor = step / 2 if step < 2 else 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * turn)) / 2
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        images = data.select(Recipe(steps=n, batch_size=4).ids_at(data.ids, step))
        x, code = flow._fibres(next(images.batches(("a",))), "cpu")[0]
        optimizer.zero_grad()
        torch.log1p(torch.exp(-net.log_likelihood(x, code))).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(flow.weights_[f"0.{name}"], value, rtol=1e-3, atol=1e-4)


def test_equal_patches_get_a_scale_of_1_not_of_rounding() -> None:
    flow = CFlow(layers=("a",), n_blocks=2, position_dim=4, steps=2).fit(feature_set(a=np.ones((3, 8, 1, 1))))
    values = [1.0, 1.0 + 2e-7, 1.0 - 2e-7]

    def likelihoods(batch: object, device: str) -> list[Tensor]:
        return [torch.tensor(values).view(3, 1, 1)]

    flow._log_likelihoods = likelihoods  # type: ignore[method-assign]
    assert flow._measure(feature_set(a=np.ones((3, 8, 1, 1))), "cpu")[0, 2] == 1


def test_sets_smaller_than_a_batch_train() -> None:
    data = feature_set(a=normal(3))
    flow = CFlow(layers=("a",), n_blocks=1, position_dim=4, steps=1, batch_size=32)
    short, long = flow.clone().fit(data), flow.clone(steps=30).fit(data)
    key = "0.blocks.0.out.weight"
    assert not torch.equal(short.weights_[key], long.weights_[key])
    assert torch.equal(short.weights_["0.blocks.0.order"], long.weights_["0.blocks.0.order"])


def test_it_screens() -> None:
    x = normal(30)
    x[25:, :, 1:3, 1:3] += 4
    flow = CFlow(layers=("a",), n_blocks=2, position_dim=4, steps=40, learning_rate=0.01)
    result = screen(feature_set(a=x), flow, ScreenOptions(n_subsets=3, keep=0.8, divergence_weight=0.5))
    assert result.submodel_scores.divergence is not None
    assert set(result.removed[:5].tolist()) == {25, 26, 27, 28, 29}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_blocks": 0}, "CFlow.n_blocks must be at least 1, got 0."),
        ({"position_dim": 6}, "CFlow.position_dim must be a positive multiple of 4, got 6."),
        ({"steps": 0}, "CFlow.steps must be at least 1, got 0."),
        ({"batch_size": 0}, "CFlow.batch_size must be at least 1, got 0."),
        ({"fibres": 0}, "CFlow.fibres must be at least 1, got 0."),
        ({"learning_rate": 0.0}, "CFlow.learning_rate must be positive, got 0.0."),
        ({"scale": "max"}, "CFlow.scale must be 'log' or 'likelihood', got 'max'."),
        ({"rotations": ["5"]}, "CFlow.rotations must be a list of angles in degrees, got ('5',)."),
        ({"rotations": [math.nan]}, "CFlow.rotations must be a list of angles in degrees, got (nan,)."),
        ({"rotations": 5.0}, "CFlow.rotations must be a list of angles in degrees, got 5.0."),
        ({"rotations": "5"}, "CFlow.rotations must be a list of angles in degrees, got '5'."),
    ],
)
def test_bad_parameters_are_told(params: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        CFlow(**params)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("whiten", [True, False])
def test_an_empty_set_is_told(whiten: bool) -> None:
    with pytest.raises(InputError, match="at least one image"):
        CFlow(layers=("a",), whiten=whiten).fit(feature_set(a=normal(1)).select([]))
