"""What aligned parts, and regions of interest, touch: statistics of maps, evidence, the review page, damaged files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flawsift import pipeline
from flawsift.data.alignment import ALIGNMENT, Alignment, learn
from flawsift.data.frames import Frame, Region
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.deploy.export import export_model
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone, fitting_size, load_backbone
from flawsift.features.extraction import attach
from flawsift.files import content_digest
from flawsift.models.plan import Judged
from flawsift.review.region import ALIGNED, Drawing
from flawsift.runtime import Inspector
from flawsift.screening.counted import Counted
from flawsift.screening.storage import load_screening
from tests.data.nails import nail, nails, noisy


def aligned_nails(n: int, *, edge: int = 160) -> tuple[ImageSet, Backbone]:
    images = nails(n)
    aligned = images.aligned(learn(images))
    return aligned, load_backbone("tiny", size=fitting_size(aligned, edge))


def somewhere_marked(n: int, marked: int, seed: int) -> ImageSet:
    """Nails at any angle, the last ones with a mark at another place each."""
    generator = np.random.default_rng(seed)
    pictures = []
    for i in range(n):
        angle, x, y = generator.uniform(-math.pi, math.pi), *generator.uniform(85, 115, 2)
        mark = (generator.uniform(-20, 30), 0.0) if i >= n - marked else None
        pictures.append(noisy(nail(angle, x, y, mark=mark), generator))
    return ImageSet.from_arrays(pictures)


def written(folder: Path, n: int) -> ImageSet:
    folder.mkdir()
    for i, id_ in enumerate((images := nails(n)).ids.tolist()):
        images.image(id_).save(folder / f"{i:02}.png")
    found = as_images(folder)
    return found.aligned(learn(found))


def test_maps_over_images_come_back_into_the_crop() -> None:
    """And marked cells of the crop over the images: each of them lies where it was."""
    images, backbone = aligned_nails(6)
    data, _ = attach(images, backbone, ["stride8"])
    counted = Counted.of(data)
    frame = data.frame_of(data.ids.tolist(), backbone.size)
    h, w = backbone.shape[0] // 8, backbone.shape[1] // 8
    counts = frame.counted(h, w)
    assert counts is not None
    rows, columns = np.mgrid[:h, :w].astype(np.float32)
    smooth = torch.from_numpy(np.stack([rows + 2 * columns] * 6))
    over = frame.over_image(smooth).numpy()
    assert over.shape[1:] == frame.over_grid(h, w)
    seen = counted.seen(over)
    assert seen.shape == (6, h, w)
    assert np.nanmax(np.abs(seen - smooth.numpy())[:, 1:-1, 1:-1]) < 0.7, "what two resamplings change"
    marked = np.zeros((6, h, w), bool)
    marked[:, 2, 5] = True
    again = frame.marks_turned(torch.from_numpy(counted.over_images(marked, over.shape[1:])), h, w).numpy()
    assert again[:, 2, 5].all()
    assert again.sum((1, 2)).max() <= 12
    rejected = dict(zip(data.ids.tolist(), counted.over_images(marked, over.shape[1:]), strict=True))
    [batch] = data.without_patches(rejected).batches(["stride8"])
    accepted = batch.accepted(h, w)
    assert accepted is not None
    np.testing.assert_array_equal(~accepted & counts, again & counts.numpy())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.2])
def test_a_small_part_in_a_large_image_costs_no_more_memory(share: float) -> None:
    """And pixels of a map are squares of the image, here of 2 x 1."""
    alignment = Alignment(share / 2, share / 2, share / 8, share / 8, turned=True, aspect=2.0)
    pose = alignment.pose(Image.new("RGB", (200, 100)))
    turns = torch.from_numpy(alignment.to_crop(pose))[None]
    height, width = Frame((128, 512), turns=turns, finer=alignment.finer).map_shape
    assert height * width <= 1.02 * 128 * 512
    assert width / height == pytest.approx(2, rel=0.02)


def test_what_does_not_count_is_left_out_of_statistics() -> None:
    maps = np.ones((2, 4, 4), np.float32)
    maps[:, :, :3] = 0.0  # as low as the lowest within
    maps[:, :, 3] = [1, 2, 3, 4]
    assert Counted().seen(maps) is maps
    cells = np.zeros((4, 4), bool)
    cells[:, 3] = True
    seen = Counted(region=Region(cells)).seen(maps)
    judged = Judged.of_maps(np.arange(2), np.ones(2), seen)
    assert judged.median_patch(np.arange(2)) == 2.5
    assert judged.ordinary is not None
    assert judged.ordinary.tolist() == [1.75, 1.75]


def test_a_small_mark_is_no_other_product() -> None:
    """The median patch of training is one of the parts, as that of new images is, not one of the background."""
    images, backbone = aligned_nails(24, edge=256)
    model = pipeline.fit(images, "quorum", backbone).model
    generator = np.random.default_rng(1)
    marked = [noisy(nail(angle, mark=(20, 0)), generator) for angle in np.linspace(-3, 3, 5)]
    found = model.predict(marked)
    assert found.scores.min() > model.calibration.scores.max()
    assert [notice.kind for notice in found.notices] == []


def test_patches_are_rejected_of_what_is_defective(tmp_path: Path) -> None:
    """Not nearly all of every part, because most of the maps is background; also after decisions, and from disk."""
    images = somewhere_marked(48, 12, seed=11)
    images = images.aligned(learn(images))
    backbone = load_backbone("tiny", size=fitting_size(images, 256))
    job = pipeline.screen(images, "quorum", backbone, out=tmp_path / "s")
    assert job.contamination is not None
    assert job.contamination.is_evident
    data, _ = attach(images, backbone, ["stride8"])
    h, w = backbone.shape[0] // 8, backbone.shape[1] // 8

    def shares(rejected: np.ndarray | None) -> tuple[float, float]:
        assert rejected is not None
        frame = data.frame_of(data.ids.tolist(), backbone.size)
        lost = frame.marks_turned(torch.from_numpy(rejected), h, w).numpy().mean((1, 2))
        assert rejected.shape[1:] == frame.over_grid(h // 2, w // 2), "of the patches of Quorum"
        return float(lost[:36].mean()), float(lost[36:].mean())

    good, bad = shares(job.rejected)
    assert good < 0.25
    assert bad > 2 * good
    loaded = load_screening(tmp_path / "s")
    assert loaded.turns is not None
    np.testing.assert_array_equal(loaded.turns, job.turns)
    decided, _ = loaded.with_decisions({loaded.names[40]: "remove"})
    good, bad = shares(decided.rejected)
    assert good < 0.25
    assert bad > good
    model = pipeline.fit(images, "patchcore", backbone).model
    new = somewhere_marked(20, 10, seed=5)
    scores = model.predict(new).scores
    assert scores[10:].min() > scores[:10].max()


@pytest.mark.parametrize("n", [2, 3])
def test_few_aligned_images_have_fewer_neighbours(n: int, tmp_path: Path) -> None:
    images = written(tmp_path / "parts", n)
    backbone = load_backbone("tiny", size=fitting_size(images, 160))
    pipeline.screen(images, backbone=backbone, out=tmp_path / "s")
    evidence = load_screening(tmp_path / "s").evidence
    assert evidence is not None
    assert [len(evidence.nearest(p)) for p in range(n)] == [n - 1] * n


def test_few_images_of_other_shapes_have_fewer_neighbours() -> None:
    pictures = [np.asarray(nail().crop((0, 0, 200, height))) for height in (200, 200, 150)]
    found = pipeline.screen(pictures, backbone=load_backbone("tiny", size=(96, 96))).evidence
    assert found is not None
    assert ((found.image_places >= 0) == (found.images >= 0)).all()


def test_a_place_that_one_image_alone_shows() -> None:
    """All parts but one lie so near to the border that their crops begin beyond it."""
    generator = np.random.default_rng(0)
    images = ImageSet.from_arrays([noisy(nail(0, 100, 100 if i == 3 else 12), generator) for i in range(12)])
    images = images.aligned(learn(images))
    backbone = load_backbone("tiny", size=fitting_size(images, 160))
    threshold = pipeline.fit(images, "padim", backbone, no_screen=True).model.threshold()
    assert threshold is not None
    assert math.isfinite(threshold.value)


def test_no_region_is_drawn_over_aligned_parts(tmp_path: Path) -> None:
    images = nails(4)
    path = tmp_path / "roi.json"
    drawing = Drawing(path, images.aligned(learn(images)), None)
    corner = [[0, 0], [10, 0], [10, 10]]
    with pytest.raises(ParameterError, match="no fixed place"):
        drawing.save([corner])
    assert not path.exists()
    Drawing(path, images, None).save([corner])
    state = drawing.state()
    assert (state["problem"], state["command"], state["is_new"]) == (ALIGNED, None, False)
    assert drawing.save([])["problem"] is None


def test_a_damaged_alignment_of_a_screening_is_told(tmp_path: Path) -> None:
    images = written(tmp_path / "parts", 6)
    pipeline.screen(images, backbone=load_backbone("tiny", size=fitting_size(images, 160)), out=(out := tmp_path / "s"))
    content = json.loads((out / "screening.json").read_text())
    content[ALIGNMENT]["left"] = "wide"
    (out / "screening.json").write_text(json.dumps(content))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["screening.json"] = content_digest((out / "screening.json").read_bytes())
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged: ValueError"):
        load_screening(out)


def test_a_picture_of_one_pixel_is_no_part() -> None:
    images, _ = aligned_nails(4)
    assert images.alignment is not None
    for size in ((1, 1), (3, 200), (6000, 2)):
        pose = images.alignment.pose(picture := Image.new("RGB", size, (9, 9, 9)))
        assert not pose.found
        assert images.alignment.crop(picture, pose).size == images.alignment.size(size)


def test_an_exported_model_scores_a_picture_of_which_one_patch_counts(tmp_path: Path) -> None:
    """It is thinner than a patch of the crop: all other patches lie beyond it."""
    images, backbone = aligned_nails(24, edge=256)
    model = pipeline.fit(images, "quorum", backbone, no_screen=True).model
    inspector = Inspector(export_model(model, tmp_path / "exported"))
    for shape in ((3, 400, 3), (400, 3, 3), (40, 400, 3)):
        picture = np.full(shape, 200, np.uint8)
        assert inspector(picture).score == pytest.approx(float(model.predict([picture]).scores[0]), rel=0.01)
