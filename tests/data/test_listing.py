"""What is listed of a folder: everything that could be a part, and nothing that flawsift or a data set put there."""

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.data.listing import mark_results
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError


def part(path: Path, seed: int = 0) -> Path:
    """A picture of many colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    return path


def mask(path: Path, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(576).reshape(24, 24) > 500).astype(np.uint8) * 255).convert(mode).save(path)
    return path


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A folder with a picture, and five things with the name of a picture that are none."""
    folder = tmp_path / "odd"
    part(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "linked.png").symlink_to(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))
        yield folder


REASONS = {"pipe": "a named pipe", "linked": "a named pipe", "folder": "a folder", "device": "a device"}
REASONS |= {"socket": "a socket"}


def test_what_is_no_file_is_listed_and_cannot_be_read(odd: Path) -> None:
    for images in (ImageSet.from_folder(odd), as_images(sorted(odd.glob("[!f]*.png")))):
        reasons = {}
        for id_, name in zip(images.ids.tolist(), images.names, strict=True):
            try:
                images.image(id_)
                images.source.digest(id_)
            except UnreadableImage as error:
                reasons[name] = str(error)
        assert reasons == {
            f"{name}.png": f"cannot be read: {why}, not a file"
            for name, why in REASONS.items()
            if f"{name}.png" in images.names
        }
    assert set(ImageSet.from_folder(odd).names) == {"a.png", *(f"{name}.png" for name in REASONS)}


def test_a_folder_called_like_an_image_is_one_folder_where_images_are_in_it(tmp_path: Path) -> None:
    part(tmp_path / "scan.tif" / "0.png")
    assert ImageSet.from_folder(tmp_path).names == ["scan.tif/0.png"]


def test_a_mask_that_is_a_pipe_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.png")
    truth = GroundTruth(np.array([0]), np.array([1], np.int8), ("hole",), {0: tmp_path / "m.png"})
    with pytest.raises(InputError, match="cannot be read: a named pipe"):
        truth.mask(0, (4, 4))


TREES = {  # name of the convention: (parts, masks)
    "MVTec AD": (
        ["train/good/000.png", "test/hole/000.png", "test/good/000.png"],
        ["ground_truth/hole/000_mask.png"],
    ),
    "MVTec LOCO": (
        ["train/good/000.png", "test/logical_anomalies/000.png"],
        ["ground_truth/logical_anomalies/000/000.png", "ground_truth/logical_anomalies/000/001.png"],
    ),
    "VisA": (["Data/Images/Normal/000.png", "Data/Images/Anomaly/000.png"], ["Data/Masks/Anomaly/000.png"]),
    "Real-IAD": (["OK/S0001/a_C1.jpg", "NG/BX/S0003/b_C2.jpg"], ["NG/BX/S0003/b_C2.png"]),
    "beside": (["a.png", "b.jpg"], ["a_mask.png", "b_MASK.PNG"]),
    "Kolektor": (["kos01/Part0.jpg", "20000.png"], ["kos01/Part0_label.bmp", "20000_GT.png"]),
    "categories": (["b/test/hole/0.png", "c/train/good/0.png"], ["b/ground_truth/hole/0.png"]),
}


@pytest.mark.parametrize("convention", TREES)
def test_masks_are_no_parts(convention: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts, masks = TREES[convention]
    for seed, name in enumerate(parts):
        part(tmp_path / name, seed)
    for name in masks:
        mask(tmp_path / name)
    with caplog.at_level(logging.WARNING, "flawsift"):
        assert ImageSet.from_folder(tmp_path).names == sorted(parts)
    (told,) = [r.getMessage() for r in caplog.records]
    assert told.startswith(f"{len(masks)} pictures are left out, which are masks of a data set")
    assert masks[0] in told
    pattern = as_images(str(tmp_path / "**" / "*.*")).names
    assert [name.split("/")[-1] for name in pattern] == [name.split("/")[-1] for name in sorted(parts)]


def test_parts_whose_names_only_remind_of_masks_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["mask/ffp2.png", "labels/jar.png", "x_mask.png", "a.jpg", "a.png", "_mask.png", "ground_truth.png"]
    for seed, name in enumerate(names):
        part(tmp_path / name, seed)
    mask(tmp_path / "flat.png")  # a plain part without a counterpart
    assert ImageSet.from_folder(tmp_path).names == sorted([*names, "flat.png"])
    assert not caplog.records


def test_a_folder_that_is_named_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    root = tmp_path / "ground_truth"
    mask(root / "hole" / "0_mask.png")
    assert ImageSet.from_folder(root).names == ["hole/0_mask.png"]
    assert as_images(str(root / "hole" / "*.png")).names == ["0_mask.png"]
    mask(tmp_path / "maps" / "a.png.png")
    mark_results(tmp_path)
    assert ImageSet.from_folder(tmp_path / "maps").names == ["a.png.png"]
    assert ImageSet.from_folder(root).names == ["hole/0_mask.png"]
    assert as_images([root / "hole" / "0_mask.png"]).names == ["0_mask.png"]
    with pytest.raises(InputError, match="No images"):
        ImageSet.from_folder(tmp_path)


def test_heatmaps_are_no_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part(tmp_path / "a.png")
    part(tmp_path / "maps" / "b.png", 1)  # somebody's own
    part(tmp_path / "results" / "maps" / "deep" / "a.png.png", 2)
    (tmp_path / "results" / "predictions.csv").write_text("path,score,is_anomalous\n")  # of an earlier version
    part(tmp_path / "killed" / "maps" / "a.png.png", 3)
    mark_results(tmp_path / "killed")
    (tmp_path / "predictions.csv").write_text("path,other\n")
    assert ImageSet.from_folder(tmp_path).names == ["a.png", "maps/b.png"]
    assert "2 pictures are left out, which flawsift wrote there" in caplog.text


@pytest.mark.parametrize("ending", ["gif", "webp", "mpo", "apng"])
def test_animations_are_counted_and_named(ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    kind = {"apng": "PNG", "mpo": "MPO"}.get(ending, ending.upper())
    frames[0].save(tmp_path / f"moving.{ending}", kind, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    os.mkfifo(tmp_path / "pipe.gif")
    line = f"1 file has several frames, of which only the first is looked at: moving.{ending}."
    with caplog.at_level(logging.WARNING, "flawsift"):
        images = ImageSet.from_folder(tmp_path)
        assert [line in r.getMessage() for r in caplog.records] == [True]
        name = f"moving.{ending}"
        colour = np.asarray(images.image(int(images.ids[images.names.index(name)])), int)[0, 0]
        assert np.abs(colour - (255, 0, 0)).max() < 20
        caplog.clear()
        as_images([tmp_path / name, np.zeros((4, 4), np.uint8)])
        as_images([tmp_path / name])
        assert ["several frames" in r.getMessage() for r in caplog.records] == [True, True]
        caplog.clear()
        as_images([tmp_path / "still.gif"])
        assert not caplog.records
