"""Drawn defects: blends, Perlin noise, and the view that carries them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from flawsift.data import corruption
from flawsift.data.corruption import (
    FIELDS,
    MOST_KEPT,
    _coloured,
    _from_itself,
    corrupted,
    drawn_views,
    perlin_mask,
    perlin_noise,
    photo_views,
)
from flawsift.data.views import derive
from flawsift.errors import InputError
from flawsift.types import Floats


def picture(size: int = 64, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), size=st.integers(8, 80))
def test_a_defect_is_a_blend_inside_and_nothing_outside(seed: int, size: int) -> None:
    pixels = picture(size, seed)
    image, mask, texture, kept = corrupted(pixels, f"perlin:{seed}")
    assert mask.dtype == torch.bool
    assert mask.shape == (size, size)
    assert image.dtype == texture.dtype == torch.uint8
    assert 0 <= kept <= MOST_KEPT
    assert torch.equal(image[:, ~mask], pixels[:, ~mask])
    blend = (1 - kept) * texture.double() + kept * pixels.double()
    assert torch.equal(image[:, mask], blend.round().to(torch.uint8)[:, mask])


def test_name_and_pixels_draw_it() -> None:
    pixels = picture()
    first = corrupted(pixels, "perlin:0:1")
    for a, b in zip(first[:3], corrupted(pixels.clone(), "perlin:0:1")[:3], strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    others = [
        corrupted(pixels, "perlin:0:2"),
        corrupted(pixels, "perlin:1:1"),
        corrupted(picture(seed=1), "perlin:0:1"),
    ]
    assert not any(torch.equal(first.texture, other.texture) for other in others)
    turned = pixels.permute(0, 2, 1)  # not contiguous in memory
    assert torch.equal(corrupted(turned, "x").image, corrupted(turned.contiguous(), "x").image)


def test_three_in_ten_textures_are_of_the_image_itself_and_blends_vary() -> None:
    drawn = [corrupted(torch.full((3, 16, 16), 90, dtype=torch.uint8), f"{k}") for k in range(300)]
    own = [c for c in drawn if (c.texture == c.texture[:, :1, :1]).all()]  # what is drawn has contrast
    assert 0.22 < len(own) / 300 < 0.38
    kept = np.array([c.kept for c in drawn])
    assert kept.mean() == pytest.approx(0.4, abs=0.05)
    assert kept.min() < 0.05
    assert kept.max() > 0.75


def test_a_part_of_the_image_is_changed_strongly() -> None:
    ramp = np.linspace(60, 180, 32).astype(np.uint8)[None, :, None].repeat(3, 0).repeat(32, 2)  # grey, top to bottom
    found = [_from_itself(ramp, np.random.default_rng(seed)).astype(float) for seed in range(60)]
    means = np.array([f.mean((1, 2)) for f in found])  # (60, 3)
    assert (means.max(1) - means.min(1)).mean() > 10, "no colour"
    assert means.mean(1).std() > 25, "no other brightness"
    slopes = np.array([[np.diff(f[0], axis=a).mean() for a in (0, 1)] for f in found])  # down and across
    assert (slopes > 0.1).any(0).all(), "never turned"
    assert (slopes < -0.1).any(0).all(), "never turned over"
    assert len({round(float(np.abs(s).max()), 1) for s in slopes}) > 10, "always one size and contrast"


def test_the_view_is_the_same_image() -> None:
    pixels = picture()
    before = pixels.clone()
    assert torch.equal(derive(pixels, "perlin:3:1"), corrupted(pixels, "perlin:3:1").image)
    assert torch.equal(pixels, before), "the image itself was drawn on"
    assert not torch.equal(derive(pixels, "perlin:3:1"), derive(pixels, "perlin:3:2"))


def test_drawing_leaves_the_global_generators() -> None:
    state = str(np.random.get_state())  # noqa: NPY002 - only compared
    corrupted(picture(), "perlin:0:0")
    assert str(np.random.get_state()) == state  # noqa: NPY002


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), rows=st.sampled_from([1, 2, 4, 8]), columns=st.sampled_from([1, 2, 8]))
def test_noise_is_zero_at_the_nodes_and_within_one(seed: int, rows: int, columns: int) -> None:
    noise = perlin_noise(64, rows, columns, 0.0, np.random.default_rng(seed))
    assert noise.shape == (64, 64)
    assert np.abs(noise[:: 64 // rows, :: 64 // columns]).max() < 1e-12
    assert 0.05 < np.abs(noise).max() <= 1 + 1e-12


def test_noise_equals_the_definition_at_a_point() -> None:
    noise = perlin_noise(64, 2, 4, 0.0, np.random.default_rng(5))
    angle = np.random.default_rng(5).uniform(0, 2 * np.pi, (2 + 1, 4 + 1))
    y, x = 41, 22  # in cell (1, 1): 32 px high, 16 px wide
    dv, du = (y - 32) / 32, (x - 16) / 16
    fade = [6 * t**5 - 15 * t**4 + 10 * t**3 for t in (dv, du)]
    expected = 0.0
    for a in (0, 1):
        for b in (0, 1):
            weight = (fade[0] if a else 1 - fade[0]) * (fade[1] if b else 1 - fade[1])
            gradient = angle[1 + a, 1 + b]
            expected += weight * (np.cos(gradient) * (dv - a) + np.sin(gradient) * (du - b))
    assert noise[y, x] == pytest.approx(np.sqrt(2) * expected)


def test_a_quarter_turn_turns_the_noise() -> None:
    plain = perlin_noise(64, 4, 4, 0.0, np.random.default_rng(1))
    turned = perlin_noise(64, 4, 4, 90.0, np.random.default_rng(1))
    np.testing.assert_allclose(turned[1:], np.rot90(plain)[:-1], atol=1e-9)


@pytest.mark.parametrize("degrees", [-60.0, 20.0, 45.0])
def test_nothing_is_drawn_beyond_the_edges_of_the_turned_square(degrees: float) -> None:
    noise = np.stack([perlin_noise(64, 8, 8, degrees, np.random.default_rng(seed)) for seed in range(20)])
    # in the frame of the lattice, a unit square about its centre
    y, x = np.meshgrid(np.arange(64) / 64 - 0.5, np.arange(64) / 64 - 0.5, indexing="ij")
    turn = np.exp(1j * np.deg2rad(degrees)) * (x + 1j * y)
    reach: Floats = np.stack([np.abs(turn.real), np.abs(turn.imag)]).max(0)
    beyond, within = reach > 0.5 + 1e-6, reach < 0.5 - 1e-6
    assert 0.05 < beyond.mean() < 0.2, "a turned square leaves the corners free"
    assert not noise[:, beyond].any()
    drawn: Floats = np.abs(noise).max(0)
    assert (drawn[within] > 0).mean() > 0.99


def test_names_change_with_the_drawing(monkeypatch: pytest.MonkeyPatch, photographs: Path) -> None:
    before = drawn_views(["0.1"]) + photo_views(["0.1"], str(photographs))
    monkeypatch.setattr(corruption, "DRAWING", 99)
    after = drawn_views(["0.1"]) + photo_views(["0.1"], str(photographs))
    assert not set(before) & set(after), "features of the old drawing would be taken for those of the new"


def test_noise_is_smooth_across_cells() -> None:
    noise = perlin_noise(256, 8, 8, 33.0, np.random.default_rng(2))[40:-40, 40:-40]  # it ends in corners
    assert max(np.abs(np.diff(noise, axis=a)).max() for a in (0, 1)) < 0.15


def test_masks_have_lattices_of_any_form_and_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, float]] = []

    def noise(size: int, rows: int, columns: int, degrees: float, generator: np.random.Generator) -> Floats:
        seen.append((rows, columns, degrees))
        return np.array([[0.49, 0.51]])

    monkeypatch.setattr(corruption, "perlin_noise", noise)
    generator = np.random.default_rng(0)
    masks = [perlin_mask(256, generator) for _ in range(400)]
    assert all(mask.tolist() == [[False, True]] for mask in masks), "above a half"
    assert {(rows, columns) for rows, columns, _ in seen} == {(2**a, 2**b) for a in range(6) for b in range(6)}
    turns = np.array([degrees for *_, degrees in seen])
    assert np.abs(turns).max() <= 90
    assert turns.std() == pytest.approx(180 / 12**0.5, rel=0.1)  # of a uniform variable


def test_masks_cover_some_percent_and_are_seldom_empty() -> None:
    generator = np.random.default_rng(0)
    areas = np.array([perlin_mask(128, generator).mean() for _ in range(300)])
    assert 0.03 < areas.mean() < 0.07
    assert 0 < (areas == 0).mean() < 0.15, "empty masks are good images to learn from, but few"


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.__name__)
def test_fields_are_levels_with_contrast(field: object) -> None:
    assert callable(field)
    for seed in range(5):
        level = field(48, np.random.default_rng(seed))
        assert level.shape == (48, 48)
        assert level.min() >= 0
        assert level.max() <= 1
        assert level.std() > 0.02


def test_colours_lie_between_those_of_the_palette() -> None:
    level = np.linspace(0, 1, 64).reshape(8, 8)
    greys = 0
    for seed in range(20):
        found = _coloured(level, np.random.default_rng(seed)).astype(int)
        assert found.shape == (3, 8, 8)
        greys += int(np.abs(found - found.mean(0)).max() < 12)
    assert greys < 10, "nearly no colours"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three photographs of one colour each, one of them in a folder of its own."""
    folder = tmp_path / "textures"
    (folder / "dots").mkdir(parents=True)
    for value, name in ((10, "a.png"), (120, "dots/b.png"), (240, "c.png")):
        Image.new("RGB", (30, 20), (value, value, value)).save(folder / name)
    return folder


def test_photographs_serve_as_textures(photographs: Path) -> None:
    pixels = picture(32)
    views = photo_views([f"0.{k}" for k in range(40)], str(photographs))
    drawn = [corrupted(pixels, view) for view in views]
    assert {int(v) for d in drawn for v in np.unique(d.texture.numpy())} == {10, 120, 240}, (
        "all of them, and nothing else"
    )
    k = next(k for k, found in enumerate(drawn) if found.mask.any())
    assert torch.equal(derive(pixels, views[k]), drawn[k].image)
    outside = ~drawn[k].mask
    assert torch.equal(drawn[k].image[:, outside], pixels[:, outside])


def test_folders_of_textures_that_are_no_good(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere' does not exist"):
        photo_views(["0.0"], str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        photo_views(["0.0"], str(tmp_path / "empty"))
    (view,) = photo_views(["0.0"], str(photographs))
    Image.new("RGB", (9, 9)).save(photographs / "d.png")
    with pytest.raises(InputError, match="has changed since"):
        corrupted(picture(), view)
    assert photo_views(["0.0"], str(photographs)) != (view,), (
        "features of the old folder are not taken for those of the new"
    )
    for file in photographs.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"png' cannot be read: .*Remove it"):
        corrupted(picture(), photo_views(["0.0"], str(photographs))[0])
