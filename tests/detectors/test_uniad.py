"""UniAD against the paper's sizes, Jacobians and brute force."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.datasets.synthetic import synthetic
from flawsift.detectors import uniad
from flawsift.detectors.parts import training
from flawsift.detectors.parts.maps import upsample
from flawsift.detectors.parts.networks import AttentionLayer
from flawsift.detectors.registry import make_detector
from flawsift.detectors.uniad import Transformer, UniAD, jittered, neighbour_mask
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.readers import MemoryFeatures
from flawsift.metrics.ranking import image_auroc

SMALL: dict[str, Any] = {"layers": ("a",), "patch": 4, "width": 16, "epochs": 2}


def feature_set(features: npt.NDArray[np.float32], size: int = 16) -> ImageSet:
    """(N, C, h, w) features as a set with ids 0..N-1, of images of some pixels."""
    n = len(features)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    reader = MemoryFeatures(size, "test", {("", i): i for i in range(n)}, {"a": features})
    return ImageSet(images.ids, images.source, {}, reader)


def random_features(n: int, c: int = 6, side: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(3, 2, (n, c, side, side)).astype(np.float32)


def transformer(channels: int = 5, side: int = 6, **params: Any) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(UniAD(**{**SMALL, **params}), channels, side, side).eval()


def test_the_paper_has_this_many_parameters() -> None:
    paper = make_detector("uniad", "paper")
    assert isinstance(paper, UniAD)
    with torch.device("meta"):
        module = Transformer(paper, 272, 14, 14)
    assert sum(p.numel() for p in module.parameters()) == 7_717_392
    assert paper.jitter * 272**0.5 == pytest.approx(20)
    assert {m.dropout for m in module.modules() if isinstance(m, nn.MultiheadAttention)} == {0.1}


def test_the_paper_hides_seven_by_seven_of_fourteen() -> None:
    mask = neighbour_mask(14, 14, 0.5)
    assert torch.equal(mask, mask.T)
    hidden = mask.sum(1).view(14, 14)
    assert (hidden[3:-3, 3:-3] == 49).all()
    assert hidden[0, 0] == hidden[-1, 0] == hidden[0, -1] == hidden[-1, -1] == 16
    assert neighbour_mask(8, 8, 0.5).sum(1).max() == 9


@given(h=st.integers(2, 9), w=st.integers(2, 9), share=st.floats(0, 1, exclude_max=True))
def test_mask_equals_a_loop_and_leaves_a_key(h: int, w: int, share: float) -> None:
    mask = neighbour_mask(h, w, share).view(h, w, h, w)
    reaches = [max([r for r in range(side) if 2 * r + 1 <= share * side], default=0) for side in (h, w)]
    for i in range(h):
        for j in range(w):
            for k in range(h):
                for m in range(w):
                    near = abs(i - k) <= reaches[0] and abs(j - m) <= reaches[1]
                    assert bool(mask[i, j, k, m]) == near
    assert not mask.flatten(2).flatten(0, 1).all(1).any()


def jacobian(module: Transformer, side: int) -> Tensor:
    """(P, P) size of the derivative of each patch's output (row) by each patch's input (column)."""
    x = torch.randn(1, 5, side, side, generator=torch.Generator().manual_seed(1))
    found: Tensor = torch.autograd.functional.jacobian(module, x)  # type: ignore[no-untyped-call]  # (1, C, h, w, 1, C, h, w)
    return found.abs().sum((0, 1, 4, 5)).reshape(side**2, side**2)


def test_without_encoder_and_with_one_decoder_layer_neighbours_have_no_influence_at_all() -> None:
    sizes = jacobian(transformer(n_encoder=0, n_decoder=1), 6)
    hidden = neighbour_mask(6, 6, 0.5)
    assert (sizes[hidden] == 0).all()
    assert (sizes[~hidden] > 0).all()


def test_the_encoder_and_further_layers_pass_neighbours_on() -> None:
    hidden = neighbour_mask(6, 6, 0.5)
    assert (jacobian(transformer(n_encoder=1, n_decoder=1), 6)[hidden] > 0).any()
    assert (jacobian(transformer(n_encoder=0, n_decoder=2), 6)[hidden] > 0).any()


def test_the_encoder_hides_neighbours_too() -> None:
    module = transformer(n_encoder=1)
    seen: list[Tensor] = []
    module.encoder[0].register_forward_hook(lambda _, inputs, output: seen.append(output))

    def encoded(x: Tensor) -> Tensor:
        module(x)
        return seen[-1][0]  # (P, D)

    x = torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.functional.jacobian(encoded, x)  # type: ignore[no-untyped-call]  # (P, D, 1, C, h, w)
    sizes = found.abs().sum((1, 2, 3)).reshape(36, 36)
    hidden = neighbour_mask(6, 6, 0.5) & ~torch.eye(36, dtype=torch.bool)  # the stream itself keeps each patch
    assert (sizes[hidden] == 0).all()
    assert (sizes[~neighbour_mask(6, 6, 0.5)] > 0).all()


def test_the_second_attention_reads_the_layer_before() -> None:
    module = transformer(n_decoder=2)
    outputs: list[Tensor] = []
    sources: list[Tensor] = []
    for layer in module.decoder:
        assert isinstance(layer, AttentionLayer)
        layer.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        layer.attentions[1].register_forward_pre_hook(lambda _, inputs: sources.append(inputs[2]))
    memory: list[Tensor] = []
    module.encoder[-1].register_forward_hook(lambda _, inputs, output: memory.append(output))
    module(torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(sources[0], memory[0]), "the first layer has none before it"
    assert torch.equal(sources[1], outputs[0])


def test_places_tell_rows_from_columns() -> None:
    module = transformer()
    seen: list[Tensor] = []
    module.encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    module(torch.randn(1, 5, 6, 6))
    place = seen[0].view(6, 6, 16)
    for row, column in ((0, 0), (2, 5), (5, 1)):
        torch.testing.assert_close(place[row, column], torch.cat([module.columns[column], module.rows[row]]))


def test_jitter_has_the_papers_energy() -> None:
    generator = np.random.default_rng(0)
    clean = torch.from_numpy(generator.normal(0, 3, (4, 272, 14, 14))).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = jittered(clean, 20 / 272**0.5) - clean
    ratio = noise.square().sum(1) / clean.square().sum(1)
    assert ratio.mean().item() == pytest.approx(20**2 / 272, rel=0.01)
    assert torch.equal(jittered(clean, 0.0), clean)


def test_prediction_has_no_jitter_and_no_dropout() -> None:
    data = feature_set(random_features(4))
    fitted = UniAD(**SMALL).fit(data)
    first, second = (fitted.predict(data, maps=False).scores for _ in range(2))
    np.testing.assert_array_equal(first, second)
    module = fitted._net("cpu")
    clean = fitted._embed(next(data.batches(("a",))))
    expected = (module(clean) - clean).square().sum(1).sqrt()
    torch.testing.assert_close(fitted.predict_patch_maps(data)[1], expected)


def test_places_enter_queries_and_keys_but_not_values() -> None:
    module = transformer(n_encoder=1)
    x = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    before = module(x)
    with torch.no_grad():
        module.rows.add_(torch.arange(6.0)[:, None])
        assert not torch.allclose(module(x), before)
        for part in module.modules():
            if isinstance(part, nn.MultiheadAttention):  # queries and keys of zero: every visible key counts alike
                part.in_proj_weight[: 2 * part.embed_dim] = 0
        even = module(x)
        module.rows.zero_()
        module.columns.zero_()
    torch.testing.assert_close(module(x), even)


def test_features_reach_the_decoder_as_keys_and_values_only() -> None:
    module = transformer()
    x = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in module.decoder:
            assert isinstance(layer, AttentionLayer)
            for attention in layer.attentions:
                assert isinstance(attention, nn.MultiheadAttention)
                attention.out_proj.weight.zero_()
    assert torch.equal(module(x)[0], module(x)[1]), "features take another way"


def test_each_decoder_layer_has_queries_of_its_own() -> None:
    module = transformer(n_decoder=3)
    tables = list(module.queries)
    assert len({id(t) for t in tables}) == 3
    assert not any(torch.equal(a, b) for k, a in enumerate(tables) for b in tables[:k])
    module(torch.randn(1, 5, 6, 6)).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in tables)


def test_training_undoes_the_jitter_by_clipped_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniad, "jittered", lambda x, scale: scale * x.flip(1))
    # the published decay is below the tolerance after four steps: a larger one shows that it acts
    assert (uniad.WEIGHT_DECAY, uniad.CLIP_NORM) == (1e-4, 0.1)
    monkeypatch.setattr(uniad, "WEIGHT_DECAY", 0.5)
    data = feature_set(random_features(4))
    params: dict[str, Any] = {**SMALL, "epochs": 2, "batch_size": 2, "dropout": 0.0, "learning_rate": 0.01}
    detector = UniAD(**params, jitter=1.5).fit(data)
    with training.seeded(0, "cpu"):
        module = Transformer(detector, 6, 4, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.5, fused=True)
    for step in range(4):
        ids = training.Recipe(steps=4, batch_size=2).ids_at(data.ids, step)
        clean = detector._embed(next(data.select(ids).batches(("a",))))
        optimizer.zero_grad()
        (module(1.5 * clean.flip(1)) - clean).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(detector.weights_[name], value, rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def measured(self: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    UniAD(**SMALL).fit(feature_set(random_features(4)))
    assert len(norms) == 2
    assert max(norms) == pytest.approx(0.1, rel=1e-3), "gradients that need it are as long as allowed"


def test_the_rate_falls_at_four_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def measured(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    UniAD(**{**SMALL, "epochs": 5}, batch_size=2, learning_rate=0.5).fit(feature_set(random_features(4)))
    assert rates == [0.5] * 8 + [pytest.approx(0.05)] * 2


def test_four_images_can_be_learned_by_heart() -> None:
    x = random_features(4)
    detector = UniAD(**{**SMALL, "width": 32, "epochs": 250, "jitter": 0.0, "dropout": 0.0})
    found = detector.fit(feature_set(x)).predict_patch_maps(feature_set(x))[1]
    error = found.square().mean().item() / 6  # features are standardised: variance 1
    assert error < 0.2, f"MSE {error:.2f} of the variance"


def test_image_score_is_the_worst_average_over_a_patch() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=(3, 4, 4)).astype(np.float32))
    fine = upsample(maps, 64).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(fine, (16, 16), (1, 2))
    expected = windows.mean((3, 4)).max((1, 2))
    np.testing.assert_allclose(UniAD()._image_scores(maps).numpy(), expected, rtol=1e-5)


def batch_of(features: npt.NDArray[np.float32], size: int) -> Batch:
    return next(feature_set(features, size).batches(("a",)))


def test_patches_are_averages_or_samples() -> None:
    x = random_features(2, side=8)
    plain: dict[str, Any] = {"layers": ("a",), "patch": 4, "standardize": False}
    average = UniAD(**plain)._embed(batch_of(x, 16))
    np.testing.assert_allclose(average, x.reshape(2, 6, 4, 2, 4, 2).mean((3, 5)), rtol=1e-5)
    sampled = UniAD(**plain, pooling="subsample")._embed(batch_of(x, 16))
    expected = F.interpolate(torch.from_numpy(x), (4, 4), mode="bilinear", align_corners=True)
    torch.testing.assert_close(sampled, expected)
    np.testing.assert_array_equal(sampled[..., [0, -1], [0, -1]], x[..., [0, -1], [0, -1]])


def test_expected_features_have_the_scale_of_the_backbone() -> None:
    x = random_features(4) * 50
    fitted = UniAD(**SMALL).fit(feature_set(x))
    found = fitted._expected(batch_of(x, 16), "cpu")
    assert found.shape == (4, 6, 4, 4)
    statistics = fitted.statistics_["a"]
    scaled = (found - statistics[0, :, None, None]) / statistics[1, :, None, None]
    own = fitted._embed(batch_of(x, 16))
    torch.testing.assert_close((scaled - own).norm(dim=1), fitted._maps(batch_of(x, 16), "cpu"))


def test_one_model_serves_two_products(tiny: Backbone) -> None:
    products = [synthetic(24, 8, size=64, seed=7, texture=texture) for texture in ("stripes", "blobs")]
    detector = UniAD(patch=8, width=32, epochs=15, batch_size=4)
    arrays = [np.asarray(p.images.image(int(i))) for p in products for i in p.images.ids]
    images, _ = attach(ImageSet.from_arrays(arrays), tiny, detector.layers)
    first = 32 * np.arange(2)[:, None]  # where each product's ids begin: 24 good, 8 defective
    fitted = detector.fit(images.select((first + np.arange(16)).ravel()))
    for start in first.ravel():
        found = fitted.predict(images.select(start + np.arange(16, 32)), maps=False)
        assert image_auroc(found.scores, (np.arange(16) >= 8).astype(np.int8)) >= 0.85


def test_bad_use_is_told() -> None:
    with pytest.raises(ParameterError, match=r"UniAD.width must be a multiple of 8, got 12\."):
        UniAD(width=12)
    with pytest.raises(ParameterError, match=r"UniAD.window must be in \[0, 1\), got 1\."):
        UniAD(window=1.0)
    with pytest.raises(ParameterError, match="UniAD.pooling must be 'average' or 'subsample', got 'max'"):
        UniAD(pooling="max")  # type: ignore[arg-type]
    for name, value in {"epochs": 0, "n_decoder": 0, "learning_rate": 0.0, "jitter": -1.0, "dropout": 1.0}.items():
        with pytest.raises(ParameterError, match=f"UniAD.{name} must .*, got {value}"):
            UniAD(**{name: value})  # type: ignore[arg-type]
    data = feature_set(random_features(3))
    with pytest.raises(InputError, match="at least one image"):
        UniAD(**SMALL).fit(data.select([]))
    with pytest.raises(InputError, match=r"at least 2 x 2 patches of 16 px. Take a smaller UniAD.patch"):
        UniAD(**{**SMALL, "patch": 16}).fit(data)
    fitted = UniAD(**SMALL).fit(data)
    with pytest.raises(InputError, match=r"fitted on features of \[6, 4, 4\], these have \[6, 8, 8\]"):
        fitted.predict(feature_set(random_features(3, side=8), 32))
