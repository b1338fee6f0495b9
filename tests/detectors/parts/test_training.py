"""The training loop against plain re-derivations; resumption; derived views."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.data.views import derive
from flawsift.datasets import Dataset
from flawsift.detectors.parts.scaling import channel_statistics, scaled, standardized, whitening
from flawsift.detectors.parts.training import (
    Recipe,
    Watch,
    cpu_multiplies_bfloat16,
    restored,
    seeded,
    train,
    warmup_cosine,
    weights_of,
)
from flawsift.errors import InputError, ParameterError, TrainingError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore

LAYER = "stride8"


@pytest.fixture(scope="module")
def data(tiny: Backbone) -> ImageSet:
    from flawsift.testing import easy_set

    return attach(easy_set().images.select(np.arange(10)), tiny, (LAYER,))[0]


def make(data: ImageSet) -> tuple[nn.Module, torch.optim.Optimizer]:
    channels = next(data.batches((LAYER,))).features[LAYER].shape[1]
    with seeded(3, "cpu"):
        module = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, channels, 1))
    return module, torch.optim.Adam(module.parameters(), lr=0.01)


def run(
    data: ImageSet,
    steps: int,
    *,
    watch: Watch | None = None,
    stop_at: int | None = None,
    rate: float = 0.01,
    floor: float = 0.1,
    seed: int = 5,
    amsgrad: bool = False,
) -> dict[str, Tensor]:
    module, _ = make(data)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, amsgrad=amsgrad)
    schedule = warmup_cosine(3, steps, floor)
    recipe = Recipe(steps=steps, batch_size=4, seed=seed, clip_norm=1.0, schedule=schedule)

    def loss_of(batch: Batch, step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = batch.features[LAYER]
        loss: Tensor = (module(x) - x).square().mean()
        return loss

    train(module, optimizer, data, (LAYER,), loss_of, recipe, device="cpu", watch=watch or Watch())
    return weights_of(module)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_training_goes_on_to_the_same_weights(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)  # a checkpoint after every step
    expected = run(data, 9)
    watch = Watch(checkpoint=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        run(data, 9, watch=watch, stop_at=6)
    seen: list[int] = []
    watch = Watch(lambda _, done, total: seen.append(done), tmp_path / "state")
    assert same(run(data, 9, watch=watch), expected)
    assert seen == [7, 8, 9], "finished steps were taken again"
    assert not list(tmp_path.iterdir()), "a finished training leaves its checkpoint"


@pytest.mark.parametrize(
    "change", [{"steps": 8}, {"rate": 0.02}, {"floor": 0.2}, {"seed": 6}, {"amsgrad": True}, {"images": 9}]
)
def test_a_checkpoint_of_another_training_is_not_used(
    change: dict[str, Any], data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(data, 9, watch=Watch(checkpoint=tmp_path / "state"), stop_at=6)
    other = data.select(data.ids[: change.pop("images", len(data))])
    settings: dict[str, Any] = {"steps": 9, **change}
    seen: list[int] = []
    watch = Watch(lambda _, done, total: seen.append(done), tmp_path / "state")
    assert same(run(other, **settings, watch=watch), run(other, **settings))
    assert seen == list(range(1, settings["steps"] + 1))


def test_patches_left_out_make_another_training(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(data, 9, watch=Watch(checkpoint=tmp_path / "state"), stop_at=6)
    seen: list[int] = []
    fewer = data.without_patches({0: np.ones((8, 8), bool)})
    run(fewer, 9, watch=Watch(lambda _, done, total: seen.append(done), tmp_path / "state"))
    assert seen[0] == 1


def test_no_checkpoint_of_a_finished_training(data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("flawsift.detectors.parts.training._save", lambda *given: saved.append(given[3]))
    run(data, 4, watch=Watch(checkpoint=tmp_path / "state"))
    assert saved == [1, 2, 3], "resumed after its last step a training would have no loss"


def test_a_torn_checkpoint_costs_its_steps_only(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_bytes(b"torn")
    assert same(run(data, 4, watch=Watch(checkpoint=tmp_path / "state")), run(data, 4))
    assert "made again" in caplog.text
    caplog.clear()
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(data, 9, watch=Watch(checkpoint=tmp_path / "state"), stop_at=6)
    flipped = bytearray((tmp_path / "state").read_bytes())
    flipped[-5] ^= 1  # of a number that would be believed
    (tmp_path / "state").write_bytes(flipped)
    assert same(run(data, 9, watch=Watch(checkpoint=tmp_path / "state")), run(data, 9))
    assert "made again" in caplog.text


def test_training_is_seeded_and_leaves_the_global_generator(data: ImageSet) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(data, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(run(data, 3), first)


def test_generators_of_gpus_are_left_alone(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError("a training on the CPU seeded the GPUs")

    monkeypatch.setattr("torch.cuda.manual_seed_all", fail)
    run(data, 2)


def test_every_image_is_seen_once_per_epoch() -> None:
    recipe = Recipe(steps=0, batch_size=4, seed=1)
    ids = np.arange(100, 112)
    epochs = [np.concatenate([recipe.ids_at(ids, 3 * e + s) for s in range(3)]) for e in range(2)]
    assert all(sorted(e) == ids.tolist() for e in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(recipe.ids_at(ids[:3], 7)) == 3, "a set smaller than a batch is one batch"


def test_gradients_are_clipped(data: ImageSet) -> None:
    module, _ = make(data)
    start = weights_of(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    recipe = Recipe(steps=1, batch_size=4, clip_norm=0.01)
    train(
        module,
        optimizer,
        data,
        (LAYER,),
        lambda b, _: 1e3 * module(b.features[LAYER]).square().mean(),
        recipe,
        device="cpu",
    )
    moved = torch.cat([(weights_of(module)[k] - start[k]).flatten() for k in start]).norm()
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("has", "large"), [(True, True), (True, False), (False, True)])
def test_large_products_are_in_bfloat16_where_the_cpu_multiplies_it(
    has: bool, large: bool, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.cpu_multiplies_bfloat16", lambda: has)
    module, optimizer = make(data)
    seen: set[torch.dtype] = set()

    def loss_of(batch: Batch, step: int) -> Tensor:
        found = module(batch.features[LAYER])
        seen.add(found.dtype)
        loss: Tensor = (found.float() - batch.features[LAYER]).square().mean()
        return loss

    recipe = Recipe(steps=2, batch_size=4, large_products=large)
    train(module, optimizer, data, (LAYER,), loss_of, recipe, device="cpu")
    assert seen == {torch.bfloat16 if has and large else torch.float32}
    assert all(p.dtype == torch.float32 for p in module.parameters()), "weights stay in full precision"


def test_a_checkpoint_of_another_precision_is_not_used(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("flawsift.detectors.parts.training.cpu_multiplies_bfloat16", lambda: True)
    seen: list[int] = []
    watch = Watch(lambda _, done, total: seen.append(done), tmp_path / "state")
    recipe = Recipe(steps=4, batch_size=4, large_products=True)

    def loss_of(batch: Batch, step: int) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        found: Tensor = module(batch.features[LAYER]).float().square().mean()
        return found

    module, optimizer = make(data)
    with pytest.raises(KeyboardInterrupt):
        train(module, optimizer, data, (LAYER,), loss_of, recipe, device="cpu", watch=watch)
    monkeypatch.setattr("flawsift.detectors.parts.training.cpu_multiplies_bfloat16", lambda: False)
    seen.append(0)
    module, optimizer = make(data)
    train(module, optimizer, data, (LAYER,), loss_of, recipe, device="cpu", watch=watch)
    assert seen == [1, 2, 0, 1, 2, 3, 4]


def test_what_a_cpu_multiplies_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert cpu_multiplies_bfloat16()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not cpu_multiplies_bfloat16()
    monkeypatch.delattr("torch.cpu.get_capabilities")
    assert not cpu_multiplies_bfloat16(), "an older torch cannot tell"


def test_each_group_s_rate_follows_the_schedule(data: ImageSet) -> None:
    module = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(2)])
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(module, (1.0, 10.0), strict=True)]
    seen: list[list[float]] = []

    def loss_of(batch: Batch, step: int) -> Tensor:
        seen.append([float(weight.detach()) for weight in module])
        return -torch.stack(list(module)).sum()  # a gradient of -1: weights move by their rates

    recipe = Recipe(steps=4, batch_size=4, schedule=lambda step: step / 2)
    train(module, torch.optim.SGD(groups), data, (LAYER,), loss_of, recipe, device="cpu")
    assert seen == [[0, 0], [0, 0], [0.5, 5], [1.5, 15]]


def test_divergence_is_told(data: ImageSet) -> None:
    module, optimizer = make(data)
    with pytest.raises(TrainingError, match="nan at step 0"):
        train(
            module,
            optimizer,
            data,
            (LAYER,),
            lambda b, _: module(b.features[LAYER]).mean() * float("nan"),
            Recipe(steps=2, batch_size=4),
            device="cpu",
        )
    with pytest.raises(InputError, match="at least one image"):
        train(
            module,
            optimizer,
            data.select([]),
            (LAYER,),
            lambda b, _: torch.zeros(()),
            Recipe(steps=1, batch_size=4),
            device="cpu",
        )


def test_divergence_in_the_last_step_is_told(data: ImageSet) -> None:
    module, optimizer = make(data)
    with pytest.raises(TrainingError, match="not finite after the last step. Lower the learning rate"):
        train(
            module,
            optimizer,
            data,
            (LAYER,),
            lambda b, _: (0 * module(b.features[LAYER])).square().sum().sqrt(),  # 0, with a gradient of 0 / 0
            Recipe(steps=1, batch_size=4),
            device="cpu",
        )


def test_schedule_starts_at_0_peaks_and_ends_at_the_floor() -> None:
    factor = warmup_cosine(10, 101, 0.1)
    assert [factor(0), factor(5), factor(10), factor(55), factor(100)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])


def test_weights_come_back(data: ImageSet) -> None:
    module, _ = make(data)
    again = restored(weights_of(module), make(data)[0], "cpu")
    assert not again.training
    assert same(weights_of(again), weights_of(module))
    assert not any(p.requires_grad for p in again.parameters())


def test_channel_statistics_equal_those_of_all_at_once(data: ImageSet) -> None:
    x = next(data.batches((LAYER,), batch_size=10)).features[LAYER]
    mean, deviation = channel_statistics(data, (LAYER,))[LAYER]
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(deviation, x.std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    unit = standardized(x, torch.stack([mean, deviation]))
    assert unit.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(scaled(x, torch.stack([mean, deviation])), unit + (mean / deviation)[:, None, None])


def test_statistics_of_what_a_detector_makes_of_a_batch(data: ImageSet) -> None:
    found = channel_statistics(data, (LAYER,), lambda batch: {"twice": 2 * batch.features[LAYER]})
    torch.testing.assert_close(found["twice"], 2 * channel_statistics(data, (LAYER,))[LAYER])


def test_whitened_fibres_have_covariance_1(data: ImageSet) -> None:
    x = next(data.batches((LAYER,), batch_size=10)).features[LAYER].transpose(0, 1).flatten(1).T.double()
    found = whitening(data, (LAYER,), 1e-9)[LAYER].double()
    white = (x - found[0]) @ found[1:]
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(x.shape[1]).double(), rtol=0, atol=0.02)
    held = whitening(data, (LAYER,), 1e9)[LAYER][1:]  # a large ridge holds everything down
    assert held.abs().max() < 1e-3


def test_directions_without_variance_are_not_magnified() -> None:
    from flawsift.features.readers import MemoryFeatures

    x = np.random.default_rng(0).normal(size=(9, 3, 2, 2)).astype(np.float32)
    x[:, 1], x[:, 2] = 2 * x[:, 0], 7  # a copy, and a constant
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * 9)
    data = replace(images, reader=MemoryFeatures(32, "test", {("", i): i for i in range(9)}, {"a": x}))
    found = whitening(data, ("a",), 0.01)["a"]
    assert torch.isfinite(found).all()
    assert found[1:].abs().max() < 11  # 1 / sqrt(ridge), over a deviation of about 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_view_has_features_of_its_own_under_the_same_ids(
    stored: bool, tiny: Backbone, easy: Dataset, tmp_path: Path
) -> None:
    images = easy.images.select([3, 1, 2])
    store = FeatureStore(tmp_path) if stored else None
    data, _ = attach(images, tiny, (LAYER,), views=("rotate:90",), store=store)
    plain = next(data.batches((LAYER,))).features[LAYER]
    turned = next(data.view("rotate:90").batches((LAYER,))).features[LAYER]
    direct = tiny.extract(torch.stack([torch.rot90(p, 1, (1, 2)) for p in images.pixels(tiny.size)]), (LAYER,))[LAYER]
    torch.testing.assert_close(turned, direct.half().float(), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(plain, turned)
    assert torch.equal(data.view("rotate:90").pixels(64)[0], torch.rot90(data.pixels(64)[0], 1, (1, 2)))
    with pytest.raises(InputError, match="rotate:45"):
        next(data.view("rotate:45").batches((LAYER,)))


def test_views_pass_the_backbone_once(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, images = FeatureStore(tmp_path), easy.images.select([0, 1])
    attach(images, tiny, (LAYER,), views=("rotate:5", "rotate:-5"), store=store)
    monkeypatch.setattr(tiny, "extract", lambda *_: pytest.fail("extracted again"))
    attach(images, tiny, (LAYER,), views=("rotate:5",), store=store)


def test_a_turned_image_goes_on_beyond_its_border() -> None:
    grey = torch.full((3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(derive(grey, "rotate:37"), grey)
    there = derive(derive(torch.arange(81).view(1, 9, 9).repeat(3, 1, 1).to(torch.uint8), "rotate:10"), "rotate:-10")
    assert (there[0, 2:7, 2:7].float() - torch.arange(81).view(9, 9)[2:7, 2:7]).abs().max() <= 2


@pytest.mark.parametrize("degrees", ["", "five", "nan", "inf"])
def test_angles_that_are_none_are_told(degrees: str) -> None:
    with pytest.raises(ParameterError, match=rf"A view 'rotate:DEGREES' needs a finite angle, got 'rotate:{degrees}'"):
        ImageSet.from_arrays([np.zeros((2, 2), np.uint8)]).view(f"rotate:{degrees}")


def test_unknown_views_are_named() -> None:
    with pytest.raises(ParameterError, match="Unknown view 'rotat'. Did you mean 'rotate'"):
        derive(torch.zeros(3, 2, 2, dtype=torch.uint8), "rotat:5")
