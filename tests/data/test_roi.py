"""Regions of interest from masks, drawings and the images themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.data.roi import read_region
from flawsift.errors import InputError
from flawsift.models.model import load_model
from flawsift.pipeline import fit, screen
from flawsift.screening.seen import region_of
from flawsift.screening.storage import load_screening

NONE = ImageSet.from_arrays([np.zeros((4, 4), np.uint8)])


def test_a_mask_is_white_where_to_look(tmp_path: Path) -> None:
    mask = np.zeros((300, 600), np.uint8)
    mask[:150] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    region = read_region(str(tmp_path / "roi.png"), NONE)
    assert region.cells.shape == (128, 256), "as fine as any grid of patches, no finer"
    assert region.cells[:64].all()
    assert not region.cells[64:].any()


@pytest.mark.parametrize(
    "content",
    [
        {"size": [20, 10], "polygons": [[[0, 0], [9, 0], [9, 9], [0, 9]]]},
        {
            "imageWidth": 20,
            "imageHeight": 10,
            "shapes": [{"label": "part", "points": [[0, 0], [9, 0], [9, 9], [0, 9]]}],
        },
        {
            "imageWidth": 20,
            "imageHeight": 10,
            "shapes": [{"label": "part", "points": [[9, 0], [0, 9]], "shape_type": "rectangle"}],
        },
    ],
)
def test_polygons_are_in_pixels(tmp_path: Path, content: object) -> None:
    (tmp_path / "roi.json").write_text(json.dumps(content))
    region = read_region(str(tmp_path / "roi.json"), NONE)
    assert region.cells.shape == (10, 20)
    assert region.cells[:, :10].all()
    assert not region.cells[:, 10:].any()
    assert region.share == 0.5


def test_a_circle_of_labelme_is_its_middle_and_a_point_of_its_edge(tmp_path: Path) -> None:
    shape = {"points": [[100, 60], [130, 100]], "shape_type": "circle"}
    (tmp_path / "roi.json").write_text(json.dumps({"imageWidth": 200, "imageHeight": 120, "shapes": [shape]}))
    region = read_region(str(tmp_path / "roi.json"), NONE)
    y, x = np.mgrid[:120, :200]
    distances = np.hypot(x - 100, y - 60)
    assert region.cells[distances < 48].all()
    assert not region.cells[distances > 52].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no region"),
        ("[1, 2]", "holds no region"),
        ('{"size": [20, 10], "polygons": [[[0, 0], [5, 5]]]}', "2 points"),
        ('{"size": [20, 10], "polygons": [[[100, 100], [105, 100], [105, 105]]]}', "hold no pixel of 20 x 10"),
        ('{"size": [20, 1e9], "polygons": [[[0, 0], [5, 0], [5, 5]]]}', "holds no region"),
        (
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [{"points": [[0, 0], [5, 5]], "shape_type": "line"}]}',
            "'line'",
        ),
        ('{"imageWidth": 9, "imageHeight": 9, "shapes": [{"points": [[0, 0]], "shape_type": "circle"}]}', "no region"),
        ('{"size": [20, 10], "polygons": [[["a", 0], [5, 0], [5, 5]]]}', "holds no region"),
        ('{"size": [20, 10], "polygons": [[[1e400, 0], [5, 0], [5, 5]]]}', "holds no region"),
    ],
)
def test_what_is_no_region_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "roi.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_region(str(tmp_path / "roi.json"), NONE)


def test_a_file_that_is_missing_or_black_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty.png cannot be read: empty file \(0 bytes\)"):
        read_region(str(tmp_path / "empty.png"), NONE)
    with pytest.raises(InputError, match="is not there"):
        read_region(str(tmp_path / "no.png"), NONE)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(InputError, match="empty"):
        read_region(str(tmp_path / "black.png"), NONE)


def parts(*, noise: float = 2.0) -> list[np.ndarray]:
    """A bright part before a dark background, here and there."""
    generator = np.random.default_rng(0)
    pictures = []
    for shift in range(6):
        picture = 30 + generator.normal(0, noise, (80, 120, 3))
        picture[20:50, 40 + shift : 70 + shift] += 120
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return pictures


def test_auto_finds_what_stands_before_the_background() -> None:
    region = read_region("auto", ImageSet.from_arrays(parts()))
    truth = np.zeros((80, 120), np.bool_)
    truth[20:50, 40:75] = True
    assert region.cells[truth].all(), "wherever any of the parts was"
    assert region.cells.sum() < 1.6 * truth.sum()


def test_auto_says_where_it_cannot_be() -> None:
    with pytest.raises(InputError, match="background of one colour"):
        read_region("auto", ImageSet.from_arrays(parts(noise=60)))
    with pytest.raises(InputError, match="nothing before the background"):
        read_region("auto", ImageSet.from_arrays([np.full((40, 40, 3), 9, np.uint8)] * 3))


def test_a_region_goes_with_the_screening_and_the_model(tmp_path: Path) -> None:
    """What is marked outside is seen by no command; what is inside is."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(14):
        picture = (120 + generator.normal(0, 3, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        if i == 3:
            picture[8:14, 8:14] = 255
        if i == 7:
            picture[50:60, 50:60] = 255
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32, :32] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    images = ImageSet.from_folder(folder)
    looked_at = images.looked_at(read_region(str(tmp_path / "roi.png"), images))
    screening = screen(looked_at, out=tmp_path / "screening")
    order = [Path(name).stem for name in np.array(screening.names)[np.argsort(-screening.consensus)]]
    assert order[0] == "03"
    assert "07" not in order[:2]
    assert region_of(load_screening(tmp_path / "screening")) == looked_at.region
    everything = screen(images)
    assert everything.names[int(everything.consensus.argmax())] == "07.png", "it is the larger one"

    fit(images, screening=tmp_path / "screening", out=tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.region == looked_at.region
    predictions = model.predict(folder, maps=True)
    scores = dict(zip(predictions.names, predictions.scores.tolist(), strict=True))
    assert max(scores, key=lambda name: scores[name]) == "03.png"
    assert predictions.maps is not None
    seven = predictions.maps[7]
    assert seven[40:, 40:].max() <= seven[:32, :32].max()
