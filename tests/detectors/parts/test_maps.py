"""Smoothing equals scipy's; upsampling keeps what it should."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from flawsift.data.images import Batch
from flawsift.detectors.parts.maps import (
    embed_batch,
    embed_patches,
    on_one_grid,
    smooth,
    to_image_grid,
    top_mean,
    upsample,
)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(16, 16), (5, 9), (40, 33)])
def test_smoothing_equals_scipy(sigma: float, shape: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).random((3, *shape))
    expected = np.stack([gaussian_filter(m, sigma, mode="reflect") for m in maps])
    np.testing.assert_allclose(smooth(torch.from_numpy(maps), sigma).numpy(), expected, atol=1e-9)


def test_no_sigma_no_change() -> None:
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smooth(maps, 0), maps)


def test_constant_maps_stay_constant() -> None:
    found = to_image_grid(torch.full((1, 7, 7), 3.5), 64)
    assert found.shape == (1, 64, 64)
    torch.testing.assert_close(found, torch.full((1, 64, 64), 3.5))


def test_a_peak_stays_where_it_is() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 2, 5] = 1
    found = to_image_grid(maps, 128)[0]
    row, column = divmod(int(found.argmax()), 128)
    assert abs(row - (2.5 * 16)) <= 8
    assert abs(column - (5.5 * 16)) <= 8
    assert upsample(maps, 128).max() <= 1


def test_top_mean_by_sorting() -> None:
    maps = torch.arange(100.0).flip(0).reshape(1, 10, 10)
    assert top_mean(maps, 0.05).item() == pytest.approx((99 + 98 + 97 + 96 + 95) / 5)
    assert top_mean(maps, 1e-9).item() == 99


def test_one_grid_is_the_finest_or_the_mean_over_the_coarsest() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(2, 3, 8, 6, generator=generator)
    up, same = on_one_grid([coarse, fine])
    torch.testing.assert_close(up, F.interpolate(coarse, (8, 6), mode="bilinear", align_corners=False))
    assert torch.equal(same, fine)
    same, down = on_one_grid([coarse, fine], finest=False)
    assert torch.equal(same, coarse)
    torch.testing.assert_close(down, fine.view(2, 3, 4, 2, 3, 2).mean((3, 5)))


def test_a_radius_cuts_the_kernel() -> None:
    spike = torch.zeros(1, 9, 9)
    spike[0, 4, 4] = 1
    found = smooth(spike, 4.0, radius=2)[0]
    assert (found > 0).sum() == 25
    assert float(found.sum()) == pytest.approx(1)


def test_embedding_is_the_mean_of_unfolded_neighbourhoods() -> None:
    generator = torch.Generator().manual_seed(0)
    fine, coarse = torch.randn(2, 3, 8, 6, generator=generator), torch.randn(2, 5, 4, 3, generator=generator)
    parts = []
    for tap in (fine, coarse):
        unfolded = F.unfold(tap, 3, padding=1).view(2, tap.shape[1], 9, *tap.shape[2:])
        parts.append(F.interpolate(unfolded.mean(2), (8, 6), mode="bilinear", align_corners=False))
    torch.testing.assert_close(embed_patches([fine, coarse]), torch.cat(parts, 1))
    assert embed_patches([coarse, fine]).shape == (2, 8, 8, 6)


def test_a_batch_embeds_each_choice_of_layers_once() -> None:
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(2, 3, 8, 8, generator=generator) for name in "ab"}
    batch = Batch(np.arange(2), features, None, 32)
    for layers in (("a", "b"), ("b", "a"), ("a",)):
        found = embed_batch(batch, layers)
        torch.testing.assert_close(found, embed_patches([features[name] for name in layers]))
        assert embed_batch(batch, list(layers)) is found
