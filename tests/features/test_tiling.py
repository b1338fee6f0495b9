"""Large inputs tile by tile: what comes out is what the whole input gives."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift.errors import ParameterError
from flawsift.features.backbones import load_backbone
from flawsift.features.runtimes import Runtime
from flawsift.features.tiling import GRID, Tiles, spans, tiles_of


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(2, 20), st.data())
def test_tiles_cover_an_edge_once(n: int, edge: int, data: st.DataObject) -> None:
    overlap = 2 * data.draw(st.integers(0, edge // 4))
    made = spans(n * GRID, Tiles(edge * GRID, overlap * GRID))
    assert made[0].first == 0
    assert made[-1].end == n * GRID
    for left, right in pairwise(made):
        assert left.end == right.first
    length = min(edge, n) * GRID
    for span in made:
        assert span.start <= span.first < span.end <= span.start + length
        assert span.start >= 0
        assert span.start + length <= n * GRID
    for left, right in pairwise(made):  # a cell is at least half of the overlap from an edge
        assert left.start + length - left.end >= overlap * GRID / 2
        assert right.first - right.start >= overlap * GRID / 2


def textured(h: int, w: int) -> torch.Tensor:
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:h, 0:w]
    waves = 60 * np.sin(rows / 7)[None] + 40 * np.cos(columns / 11)[None]
    return torch.from_numpy((128 + waves + generator.normal(0, 20, (3, h, w))).clip(0, 255).astype(np.uint8))[None]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_features_of_tiles_are_those_of_the_whole(runtime: Runtime) -> None:
    pixels, layers = textured(256, 512), ["stride4", "stride8", "stride16"]
    whole = load_backbone("tiny", size=(256, 512), runtime=runtime).extract(pixels, layers)
    cut = load_backbone("tiny", size=(256, 512), tiles=(256, 128), runtime=runtime)
    assert cut.tiles == (256, 128)
    tiled = cut.extract(pixels, layers)
    for layer in layers:  # 64 pixels from an edge of a tile, this network sees none of it
        torch.testing.assert_close(tiled[layer], whole[layer], rtol=1e-4, atol=1e-5)
    bare = load_backbone("tiny", size=(256, 512), tiles=(256, 0), runtime=runtime).extract(pixels, layers)
    assert not torch.allclose(bare["stride4"], whole["stride4"], rtol=1e-3), "without an overlap there are seams"


def test_features_of_the_default_network_have_no_seams() -> None:
    pixels, layers = textured(512, 896), ["stride8", "stride16"]
    whole = load_backbone(size=(512, 896)).extract(pixels, layers)
    tiled = load_backbone(size=(512, 896), tiles=(512,)).extract(pixels, layers)
    for layer in layers:
        assert (tiled[layer] - whole[layer]).norm() <= 3e-3 * whole[layer].norm()


def test_tiles_are_part_of_what_features_are_known_by() -> None:
    keys = {
        load_backbone("tiny", size=size, tiles=tiles, runtime="torch").key
        for size, tiles in (
            ((64, 128), None),
            ((64, 128), (64, 0)),
            ((64, 128), None),
            (64, None),
            ((64, 64), None),
        )
    }
    assert len(keys) == 4


def test_a_class_token_is_the_mean_over_the_tiles() -> None:
    name = "random:1:vit_tiny_patch16_224"
    pixels = textured(64, 128)
    tiled = load_backbone(name, size=(64, 128), tiles=(64, 0), runtime="torch")
    one = load_backbone(name, size=(64, 64), runtime="torch")
    layer = one.layers[-1].name
    parts = [one.extract(part, [layer])[layer] for part in (pixels[..., :64], pixels[..., 64:])]
    torch.testing.assert_close(tiled.extract(pixels, [layer])[layer], torch.stack(parts).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given_text", "wanted"), [(None, None), ("auto", None), ("512", (512,)), ("512:128", (512, 128))]
)
def test_what_the_option_says(given_text: str | None, wanted: tuple[int, ...] | None) -> None:
    assert tiles_of(given_text) == wanted


@pytest.mark.parametrize("given_text", ["", "big", "512:", "512:1:2", "-512", "51²"])
def test_what_it_does_not_understand_it_says(given_text: str) -> None:
    with pytest.raises(ParameterError, match="tiles must be auto"):
        tiles_of(given_text)


@pytest.mark.parametrize("tiles", [(100,), (32,), (128, 128), (128, 32), (128, -64)])
def test_tiles_that_do_not_fit_the_grid_are_refused(tiles: tuple[int, ...]) -> None:
    with pytest.raises(ParameterError, match="tiles"):
        load_backbone("tiny", size=(256, 256), tiles=tiles, runtime="torch")
