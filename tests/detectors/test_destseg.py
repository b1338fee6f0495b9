"""DeSTSeg against the paper's sizes, plain re-derivations, and what each phase may touch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flawsift.data.corruption import corrupted
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors import destseg
from flawsift.detectors.destseg import DeSTSeg, cosine_loss, disagreement, mask_loss
from flawsift.detectors.parts.networks import BasicBlock, DenoisingStudent, Segmenter, WholeImage, on_finest
from flawsift.detectors.parts.training import Watch
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.metrics.ranking import pixel_ap

SMALL: dict[str, Any] = {
    "student_size": None,
    "student_width": 8,
    "head_width": 8,
    "n_copies": 2,
    "student_steps": 2,
    "head_steps": 2,
}


def small(**changes: Any) -> DeSTSeg:
    return DeSTSeg(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def data(tiny: Backbone) -> ImageSet:
    from flawsift.testing import easy_set

    detector = small()
    return attach(easy_set().images.select(np.arange(8)), tiny, detector.layers, views=detector.views)[0]


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def levels(seed: int = 0, batch: int = 2) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.randn(batch, c, 64 // s, 64 // s, generator=generator) for s, c in ((4, 3), (8, 4), (16, 5))}


def test_the_paper_has_this_many_parameters() -> None:
    paper = make_detector("destseg", "paper")
    assert isinstance(paper, DeSTSeg)
    with torch.device("meta"):
        student = DenoisingStudent(paper.student_width, {4: 64, 8: 128, 16: 256}, linear=paper.standardize)
        segmenter = Segmenter(64 + 128 + 256, paper.head_width, 64, paper.batch_size)
    assert count(student.stem, student.encoder) == 11_176_512  # a ResNet-18 without classifier
    assert count(student.decoder) == 13_488_512
    assert count(student.heads) == 0
    assert count(segmenter.residual) == 2_918_912
    assert count(segmenter) == 7_706_369
    dilated = [m.dilation[0] for m in segmenter.pyramid.modules() if isinstance(m, nn.Conv2d)]
    assert dilated == [6, 12, 18]


def test_the_head_starts_with_torch_s_weights_and_the_residual_blocks_with_a_resnet_s() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(48, 64, 16, 8)
    for name, layer in segmenter.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            area = layer.kernel_size[0] * layer.kernel_size[1]
            of_head = (3 * layer.in_channels * area) ** -0.5  # uniform within 1 / sqrt(inputs)
            of_resnet = (2 / (layer.out_channels * area)) ** 0.5
            expected = of_resnet if name.startswith("residual") else of_head
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_the_whole_image_stays_within_what_batch_norm_allows() -> None:
    torch.manual_seed(0)
    whole = WholeImage(4, 8)
    norm = whole.layer[1]
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(20):
        whole(torch.randn(8, 4, 5, 5))
    for strange in (-1.0, 1.0):  # one image far from seven others: as far as it goes in training
        batch = torch.zeros(8, 4, 5, 5)
        batch[0] = strange * 1e4
        limit = whole(batch)[0]
        torch.testing.assert_close(whole.eval()(batch[:1])[0], limit, rtol=1e-3, atol=1e-3)
        whole.train()
    usual = torch.randn(3, 4, 5, 5)
    plain = norm.eval()(whole.layer[0](usual.mean((2, 3), keepdim=True))).relu()
    torch.testing.assert_close(whole.eval()(usual), plain)


def test_an_image_that_is_strange_all_over_is_a_defect(tiny: Backbone, easy: Dataset) -> None:
    # the segmenter trains on masks of some percent, and its whole-image branch never sees a whole image of them
    detector = small(seed=6, student_steps=60, head_steps=100, head_width=16)
    train, _ = attach(easy.images.select(np.arange(24)), tiny, detector.layers, views=detector.views)
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    strange, _ = attach(ImageSet.from_arrays(list(noise)), tiny, detector.layers)
    fitted = detector.fit(train)
    assert fitted.predict(strange, maps=False).scores.min() > fitted.predict(train, maps=False).scores.max()


def test_the_students_levels_have_the_teachers_shapes() -> None:
    student = DenoisingStudent(4, {4: 6, 8: 16, 16: 16}, linear=False).eval()
    found = student(torch.rand(2, 3, 64, 64))
    assert {s: tuple(level.shape[1:]) for s, level in found.items()} == {16: (16, 4, 4), 8: (16, 8, 8), 4: (6, 16, 16)}
    assert (found[16] >= 0).all(), "where widths agree, as in the paper, the block's ReLU ends the level"
    assert (found[4] < 0).any(), "signed features need a linear end"
    linear = DenoisingStudent(4, {16: 16}, linear=True).eval()
    assert "8" not in linear.decoder, "a decoder group that nothing reads"
    assert (linear(torch.rand(2, 3, 64, 64))[16] < 0).any()


def test_the_encoder_starts_as_its_shortcuts_and_the_decoder_does_not() -> None:
    student = DenoisingStudent(4, {4: 4}, linear=False)
    last = [block.body[-1][1].weight for block in student.encoder if isinstance(block, BasicBlock)]  # type: ignore[index]
    assert len(last) == 8
    assert all(bool((gain == 0).all()) for gain in last)
    assert all(bool((m.weight == 1).all()) for m in student.decoder.modules() if isinstance(m, nn.BatchNorm2d))


def test_equal_features_agree_fully() -> None:
    features = levels()
    assert cosine_loss(features, features).item() == pytest.approx(0, abs=1e-4)
    found = disagreement(features, {s: 3 * level for s, level in features.items()})
    assert found.shape == (2, 12, 16, 16)
    torch.testing.assert_close(found[:, :3].sum(1), torch.full((2, 16, 16), -1.0))
    own = -(F.normalize(features[8], dim=1) ** 2)
    torch.testing.assert_close(found[:, 3:7], F.interpolate(own, (16, 16), mode="bilinear", align_corners=False))


def test_cosine_loss_is_a_sum_over_images_of_means_over_positions() -> None:
    teacher, student = levels(0), levels(1)
    expected = 0.0
    for s in teacher:
        t, u = teacher[s].double().numpy(), student[s].double().numpy()
        cosine = (t * u).sum(1) / np.sqrt((t**2).sum(1) * (u**2).sum(1))  # (B, h, w)
        expected += (1 - cosine).mean((1, 2)).sum()
    assert cosine_loss(teacher, student).item() == pytest.approx(expected, rel=1e-5)
    twice = [{s: torch.cat([x, x]) for s, x in part.items()} for part in (teacher, student)]
    assert cosine_loss(*twice).item() == pytest.approx(2 * expected, rel=1e-5)


def test_dead_features_have_finite_gradients() -> None:
    dead = {s: torch.zeros_like(level).requires_grad_() for s, level in levels().items()}
    (cosine_loss(levels(), dead) + disagreement(levels(), dead).sum()).backward()  # type: ignore[no-untyped-call]
    assert all(level.grad is not None and bool(level.grad.isfinite().all()) for level in dead.values())


def test_focal_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 5, generator=generator)
    mask = (torch.rand(2, 5, 5, generator=generator) < 0.3).float()
    p = logits.sigmoid()
    error = (p - mask).abs().mean()
    plain = F.binary_cross_entropy(p, mask)
    torch.testing.assert_close(mask_loss(logits, mask, 0.0), plain + error)
    right = torch.where(mask == 1, p, 1 - p)
    torch.testing.assert_close(mask_loss(logits, mask, 4.0), ((1 - right) ** 4 * -right.log()).mean() + error)
    assert mask_loss(40 * (2 * mask - 1), mask, 4.0).item() == pytest.approx(0, abs=1e-6)


def test_image_score_is_the_mean_of_the_hundred_highest_pixels() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).random((3, 64, 64), dtype=np.float32))
    fine = F.interpolate(maps[:, None], (256, 256), mode="bilinear", align_corners=False).flatten(1).numpy()
    expected = np.sort(fine, 1)[:, -100:].mean(1)
    np.testing.assert_allclose(DeSTSeg()._image_scores(maps).numpy(), expected, rtol=1e-5)
    turned = maps.flip(1).transpose(1, 2).contiguous()
    np.testing.assert_allclose(DeSTSeg()._image_scores(turned).numpy(), expected, rtol=1e-5)


def parts(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key.startswith(name)}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_each_phase_leaves_the_other_net_alone(data: ImageSet) -> None:
    short = small(anneal=False).fit(data)
    longer = small(anneal=False, head_steps=4).fit(data)
    assert same(parts(short.weights_, "student"), parts(longer.weights_, "student")), "phase 2 trains the student"
    assert not same(parts(short.weights_, "segmenter"), parts(longer.weights_, "segmenter"))
    seen = parts(short.weights_, "segmenter")
    steps = [value for key, value in seen.items() if key.endswith("num_batches_tracked")]
    assert {int(s) for s in steps} == {2}, "phase 1 runs the segmenter's batch norm"
    trained = [v for k, v in parts(short.weights_, "student").items() if k.endswith("num_batches_tracked")]
    assert {int(s) for s in trained} == {2}


def test_what_each_phase_compares(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    teacher, copies = DeSTSeg._teacher, DeSTSeg._copies

    def seen_by_teacher(self: DeSTSeg, images: ImageSet, device: str) -> Mapping[int, Tensor]:
        calls.append(("teacher", images.derived))
        return teacher(self, images, device)

    def seen_by_student(self: DeSTSeg, images: ImageSet, view: str, drawn: destseg.Copies) -> tuple[Tensor, Tensor]:
        calls.append(("student", view))
        return copies(self, images, view, drawn)

    monkeypatch.setattr(DeSTSeg, "_teacher", seen_by_teacher)
    monkeypatch.setattr(DeSTSeg, "_copies", seen_by_student)
    detector = small(student_steps=8, head_steps=8).fit(data)
    students = [view for who, view in calls if who == "student"]
    teachers = [view for who, view in calls if who == "teacher"]
    assert set(students[:8]) == set(students[8:]) == set(detector.views), "each phase sees all copies"
    assert teachers == [*8 * [""], *students[8:]], "clean in phase 1, the same corrupted copy in phase 2"


@pytest.mark.parametrize("at", [1, 2, 3])  # in the first phase, between both, in the second
def test_a_killed_training_goes_on_in_its_phase(
    at: int, data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)  # a checkpoint after every step

    def killed(stage: str, done: int, total: int) -> None:
        if done == at + 1:
            raise KeyboardInterrupt

    expected = small().fit(data)
    with pytest.raises(KeyboardInterrupt):
        small().fit(data, watch=Watch(killed, tmp_path / "state"))
    seen: list[int] = []
    again = small().fit(data, watch=Watch(lambda _, done, total: seen.append(done), tmp_path / "state"))
    assert seen == list(range(at + 1, 5)), "finished steps were taken again"
    assert same(again.weights_, expected.weights_)


def test_each_part_has_the_papers_optimiser_at_its_own_rate(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[tuple[float, float, float, int]]] = []
    gammas: list[float] = []
    step = torch.optim.SGD.step

    def measured(self: torch.optim.SGD, *args: Any) -> Any:
        names = ("lr", "momentum", "weight_decay")
        steps.append([(*(g[n] for n in names), sum(p.numel() for p in g["params"])) for g in self.param_groups])
        return step(self, *args)

    def loss(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
        gammas.append(gamma)
        return mask_loss(logits, mask, gamma)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    monkeypatch.setattr(destseg, "mask_loss", loss)
    nets = small(student_rate=0.3, residual_rate=0.2, head_rate=0.1).fit(data)._build()
    parts = (0.3, count(nets.student)), (0.2, count(nets.segmenter.residual)), (0.1, 0)
    for k, factor in enumerate((1, 0.5, 1, 0.5)):  # two steps of each phase, each down half a cosine
        found = [[(lr, n) for lr, _, _, n in steps[k] if lr == pytest.approx(rate * factor)] for rate, _ in parts]
        assert [sum(n for _, n in group) for group in found[:2]] == [parts[0][1], parts[1][1]]
        assert sum(n for _, n in found[2]) == count(nets.segmenter) - parts[1][1]
        assert {(m, w) for _, m, w, _ in steps[k]} == {(0.9, 1e-4)}
    assert gammas == [4.0, 4.0]
    steps.clear()
    small(anneal=False).fit(data)
    assert {lr for groups in steps for lr, *_ in groups} == {0.4, 0.04}, "the head's is a tenth, as in the paper"


def test_copies_are_those_of_the_view(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small().fit(data)
    view = detector.views[1]
    drawn: destseg.Copies = {}
    pixels, masks = detector._copies(data, view, drawn)
    assert torch.equal(pixels, data.view(view).pixels(64).float() / 255)
    for id_, mask in zip(data.ids, masks, strict=True):
        full = corrupted(data.pixels_of(int(id_), 64), view).mask.float()
        # a bilinear sample in the middle of a cell of 4 x 4 pixels is the mean of the 2 x 2 around it; half counts
        expected = full.view(16, 4, 16, 4)[:, 1:3, :, 1:3].mean((1, 3)) >= 0.5
        assert torch.equal(mask, expected.float())
    assert len(drawn) == len(data)
    again = detector._copies(data, view, drawn)
    monkeypatch.setattr(destseg, "COPIES_BYTES", 0)
    drawn.clear()
    assert torch.equal(detector._copies(data, view, drawn)[0], again[0]), "memory changes a copy"
    assert not drawn


def test_photographs_may_be_pasted(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (255, 0, 255)).save(tmp_path / "pink.png")
    detector = small(textures=str(tmp_path))
    images, _ = attach(easy.images.select(np.arange(8)), tiny, detector.layers, views=detector.views)
    fitted = detector.fit(images)
    pixels, masks = fitted._copies(images, detector.views[0], {})
    assert masks.any()
    red, green = (pixels[:, channel][masks.repeat_interleave(4, 1).repeat_interleave(4, 2) > 0] for channel in (0, 1))
    assert (red.mean() - green.mean()) > 0.3, "what is pasted is pink"
    assert np.isfinite(fitted.predict(images, maps=False).scores).all()


def test_the_student_may_see_fewer_pixels(data: ImageSet) -> None:
    fitted = small(student_size=32).fit(data)
    batch = next(data.batches(fitted.layers, pixels=True))
    taps = fitted._levels(batch, "cpu")
    assert {s: tap.shape[2] for s, tap in taps.items()} == {4: 8, 8: 4, 16: 2}
    wanted = (batch.features["stride8"] - fitted.statistics_["stride8"][0, :, None, None]) / (
        fitted.statistics_["stride8"][1, :, None, None]
    )
    torch.testing.assert_close(taps[8], F.avg_pool2d(wanted, 2))
    assert fitted.predict_patch_maps(data)[1].shape == (8, 8, 8)


def test_rates_fall_in_each_phase() -> None:
    factors = [small(student_steps=4, head_steps=2)._factor(step) for step in range(6)]
    np.testing.assert_allclose(factors, [1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5, 1, 0.5])


def test_drawn_defects_are_found_after_training(tiny: Backbone, easy: Dataset) -> None:
    detector = small(student_steps=40, head_steps=100, head_width=16, n_copies=6)
    views = (*detector.views, "perlin:99:0")  # the last one is not trained on
    images, _ = attach(easy.images.select(np.arange(12)), tiny, detector.layers, views=views)
    fitted = detector.fit(images)
    found = fitted.predict(images.view("perlin:99:0"))
    assert found.maps is not None
    masks = np.stack([corrupted(images.pixels_of(int(i), 64), "perlin:99:0").mask.numpy() for i in images.ids])
    prior = masks.mean()
    assert pixel_ap(found.maps, masks) > 3 * prior


def test_expected_features_are_the_students(data: ImageSet) -> None:
    fitted = small().fit(data)
    batch = next(data.batches(fitted.layers, pixels=True))
    found = fitted._expected(batch, "cpu")
    assert batch.pixels is not None
    student = fitted._net("cpu").student(batch.pixels)
    torch.testing.assert_close(found, on_finest({s: F.normalize(level, dim=1) for s, level in student.items()}))
    torch.testing.assert_close(found[:, :16].norm(dim=1), torch.ones(8, 16, 16))


def test_bad_use_is_told(data: ImageSet, tiny: Backbone) -> None:
    with pytest.raises(ParameterError, match="DeSTSeg.student_size must be a multiple of 32, or None, got 100"):
        DeSTSeg(student_size=100)
    with pytest.raises(ParameterError, match="DeSTSeg.batch_size must be at least 2, for batch norm, got 1"):
        DeSTSeg(batch_size=1)
    for name, value in {"n_copies": 0, "head_steps": 0, "head_rate": 0.0}.items():
        with pytest.raises(ParameterError, match=f"DeSTSeg.{name} must .*, got {value}"):
            DeSTSeg(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least two images for batch norm, got 1\."):
        small().fit(data.select([0]))
    with pytest.raises(InputError, match=r"The derived view 'perlin:2\.1\.[01]' of these images were not extracted"):
        small(seed=1).fit(data)
    with pytest.raises(InputError, match=r"layers of different strides among \(4, 8, 16, 32\)"):
        small(layers=("stride4", "stage1")).fit(attach(data, tiny, ("stride4", "stage1"))[0])
