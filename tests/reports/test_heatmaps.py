"""Images beside their heatmaps: text and scale bar of files, and the part at 1:1 of pages."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.errors import OutputError
from flawsift.reports.heatmaps import CLOSE, Shown, bar_length, close_up, save, sheet
from flawsift.reports.overlays import Scale
from tests.reports.material import noise, picture

SCALE = Scale(1.0, 2.0)


@pytest.mark.parametrize(("width", "length"), [(1, 1), (5, 1), (6, 2), (60, 20), (299, 50), (300, 100), (4096, 1000)])
def test_a_scale_bar_is_a_round_number_of_pixels(width: int, length: int) -> None:
    assert bar_length(width) == length


@pytest.mark.parametrize("size", [(64, 48), (1500, 900), (300, 700)])
def test_a_sheet_has_the_original_the_heatmap_and_a_bar_as_long_as_it_says(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (100, 110, 120))
    made = np.asarray(sheet(image, np.full((4, 4), 3.0), SCALE, [], "score 3"))
    scale = min(1, 512 / max(size))
    width, height = round(size[0] * scale), round(size[1] * scale)
    assert (made[:height, :width] == (100, 110, 120)).all()
    assert (made[:height, width + 8 : 2 * width + 8] != (100, 110, 120)).any(2).all()
    strip = (made[height:] == 255).all(2)
    longest = max(len(run) for row in strip for run in "".join(map(str, row.astype(int))).split("0"))
    assert longest == max(1, round(bar_length(size[0]) * scale)) > 10


def test_the_part_at_1_to_1_is_the_images_own_pixels_around_the_highest_place() -> None:
    image = Image.fromarray(noise(1, edge=900)[0])
    map_ = np.zeros((9, 9), np.float32)
    map_[6, 4] = 3
    part = np.asarray(close_up(image, map_, []))
    assert part.shape == (CLOSE, CLOSE, 3)
    assert (part == np.asarray(image)[490 : 490 + CLOSE, 290 : 290 + CLOSE]).all()
    map_[8, 0] = 4  # at a corner the part is moved into the image
    part = np.asarray(close_up(image, map_, [[0, 880, 50, 880, 50, 900, 0, 900]]))
    differs = np.argwhere((part != np.asarray(image)[-CLOSE:, :CLOSE]).any(2))
    assert differs.min(0).tolist() == [298, 0], "the line lies outside"
    assert part[299, :50].tolist() == [[255] * 3] * 50
    small = Image.fromarray(noise(1, edge=24)[0])
    assert (np.asarray(close_up(small, map_, [])) == np.asarray(small)).all()


def test_without_a_map_there_is_the_image_alone() -> None:
    shown = Shown.of(Image.new("RGB", (640, 480)), None, None)
    assert picture(shown.picture).size == (320, 240)
    assert (shown.heatmap, shown.close) == ("", "")


def test_save_makes_folders_and_leaves_no_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "part.jpg.png"
    save(path, Image.new("RGB", (20, 10)))
    with Image.open(path) as saved:
        assert (saved.format, saved.size) == ("PNG", (20, 10))
    assert [file.name for file in path.parent.iterdir()] == ["part.jpg.png"]
    with pytest.raises(OutputError):
        save(path / "below-a-file" / "x.png", Image.new("RGB", (2, 2)))
