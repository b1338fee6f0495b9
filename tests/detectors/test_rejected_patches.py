"""Detectors that learn by gradient learn nothing from patches that stage 1 has rejected."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.training import without_rejected
from flawsift.detectors.registry import make_detector
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach

TRAINED: dict[str, dict[str, Any]] = {
    "dinomaly": {"layers": ("stride8", "stride16"), "steps": 4, "width": 16, "n_blocks": 2, "warmup": 1},
    "rd": {"layers": ("stride4", "stride8", "stride16"), "epochs": 1},
    "uniad": {"epochs": 1},
}


@pytest.fixture(scope="module")
def data(easy: Dataset, tiny: Backbone) -> ImageSet:
    return attach(easy.images, tiny, ("stride4", "stride8", "stride16"))[0].select(easy.images.ids[:8])


class Captured(Exception):
    """Carries what a detector hands to the training loop."""


def gradients(name: str, data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Loss of the first batch, and the sum of the absolute gradients of all weights."""
    loss, module = first_loss(make_detector(name, **TRAINED[name]), data, monkeypatch)
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return loss.detach(), torch.stack([g.abs().sum() for g in found if g is not None]).sum()


def first_loss(detector: Detector, data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, nn.Module]:
    """Loss of the first step, and what is trained."""

    def train(module: Any, optimizer: Any, seen: ImageSet, layers: Any, loss_of: Any, *_: Any, **__: Any) -> None:
        raise Captured(module, loss_of, next(seen.batches(layers, batch_size=8)))

    monkeypatch.setattr("flawsift.detectors.parts.training.train", train)
    own = importlib.import_module(type(detector).__module__)
    if hasattr(own, "train"):
        monkeypatch.setattr(own, "train", train)
    with pytest.raises(Captured) as caught:
        detector.fit(data)
    module, loss_of, batch = caught.value.args
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss_of(batch, 1), module


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_nothing_is_learned_from_rejected_patches(name: str, data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = gradients(name, data, monkeypatch)
    everywhere = data.without_patches({int(i): np.ones((8, 8), bool) for i in data.ids})
    loss, silent = gradients(name, everywhere, monkeypatch)
    assert torch.isfinite(loss)
    assert plain > 0
    assert silent == 0
    one = np.zeros((8, 8), bool)
    one[:4, :4] = True
    some = data.without_patches({int(i): one for i in data.ids})
    assert 0 < gradients(name, some, monkeypatch)[1] != plain


def test_simplenet_sees_only_patches_that_are_accepted(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make_detector("simplenet", steps=4, standardize=False)
    rejected = data.without_patches({int(i): np.ones((8, 8), bool) for i in data.ids[1:]})
    alone, _ = first_loss(detector, data.select(data.ids[:1]), monkeypatch)
    assert torch.equal(first_loss(detector, rejected, monkeypatch)[0], alone)
    assert not torch.equal(first_loss(detector, data, monkeypatch)[0], alone)


def test_maps_are_silent_where_a_patch_is_rejected() -> None:
    maps = [torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)]
    rejected = torch.zeros(2, 4, 4, dtype=torch.bool)
    rejected[1, 0, 1] = True
    fine, coarse = without_rejected(maps, Batch(np.arange(2), {}, None, 32, rejected=rejected))
    assert fine.sum() == 2 * 3 * 16 - 3
    assert (fine[1, :, 0, 1] == 0).all()
    assert (coarse[1, :, 0, 0] == 0).all(), "a coarse patch that touches a rejected fine one"
    assert coarse.sum() == 2 * 5 * 4 - 5
    assert without_rejected(maps, Batch(np.arange(2), {}, None, 32))[0] is maps[0]
