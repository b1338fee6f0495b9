"""Parts at any angle: where they lie, images turned and cropped, and maps that lie over the images again."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from flawsift import pipeline
from flawsift.cli.main import app
from flawsift.data.alignment import ALIGNMENT, Alignment, Pose, find_part, learn
from flawsift.data.checks import ready_to_train
from flawsift.data.frames import Frame, Region
from flawsift.data.images import ImageSet
from flawsift.deploy.export import export_model, in_float32
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError
from flawsift.features.backbones import fitting_size, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, load_model
from flawsift.runtime import Inspector
from flawsift.screening.seen import alignment_of
from flawsift.screening.storage import load_screening
from flawsift.testing import tiny_backbone
from tests.data.nails import LENGTH, SIZE, nail, nails, noisy


@settings(max_examples=40, deadline=None)
@given(st.floats(-math.pi, math.pi), st.floats(80, 120), st.floats(80, 120))
def test_a_part_is_found_at_any_angle(angle: float, x: float, y: float) -> None:
    still = find_part(nail())
    part = find_part(nail(angle, x, y))
    off = math.remainder(part.angle - angle - still.angle, math.tau)
    assert abs(off) < math.radians(2), "neither turned wrongly nor the wrong way round"
    middle = np.array(still.middle) - 100
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    np.testing.assert_allclose(part.middle, middle @ turn + [x, y], atol=1)


@settings(max_examples=20, deadline=None)
@given(st.floats(-math.pi, math.pi), st.floats(80, 120), st.floats(80, 120))
def test_crops_show_the_part_in_one_place(angle: float, x: float, y: float) -> None:
    alignment = learn(nails(12))
    crops = []
    for picture in (nail(), nail(angle, x, y)):
        crops.append(np.asarray(alignment.crop(picture, alignment.pose(picture)), float))
    assert crops[0].shape == crops[1].shape
    assert np.abs(crops[0] - crops[1]).mean() < 4, "but for what resampling changes at edges"
    assert crops[0].shape[1] == pytest.approx(LENGTH * 1.1, abs=6), "the length of the nail and a margin"
    assert crops[0].shape[0] < 50


@settings(max_examples=30, deadline=None)
@given(st.floats(-math.pi, math.pi), st.floats(90, 110), st.floats(90, 110))
def test_places_agree_with_pixels(angle: float, x: float, y: float) -> None:
    """A dot of the image is in the crop where `to_crop` says."""
    alignment = learn(nails(12))
    picture = np.array(nail(angle, x, y))
    pose = alignment.pose(Image.fromarray(picture))
    column, row = round(x) + 6, round(y) - 8
    picture[row : row + 4, column : column + 4] = (255, 0, 0)
    crop = np.asarray(alignment.crop(Image.fromarray(picture), pose), float)
    red = np.clip(crop[..., 0] - crop[..., 1], 0, None)
    rows, columns = np.mgrid[: crop.shape[0], : crop.shape[1]] + 0.5
    seen = np.array([(red * columns).sum(), (red * rows).sum()]) / red.sum()
    middle = np.array([column + 2, row + 2]) / SIZE
    wanted = alignment.to_crop(pose) @ [*middle, 1] * [crop.shape[1], crop.shape[0]]
    np.testing.assert_allclose(seen, wanted, atol=0.7)


def turned_frame(angle: float, contents: list[float] | None = None) -> tuple[Frame, Alignment]:
    """Of one picture of 200 x 200, the part in the middle of which lies at an angle."""
    alignment = Alignment(left=0.3, right=0.3, top=0.1, bottom=0.1, turned=True, aspect=1.0)
    pose = Pose(100.0, 100.0, angle, 200, 200, (0, 0, 0), True)
    turns = torch.from_numpy(alignment.to_crop(pose))[None]
    given = None if contents is None else torch.tensor([contents], dtype=torch.float64)
    return Frame((32, 96), given, turns=turns, finer=alignment.finer), alignment


@pytest.mark.parametrize("contents", [None, [32.0, 60.0], [20.0, 96.0]])
@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, -2.0, math.pi])
def test_maps_and_places_over_the_image_agree(angle: float, contents: list[float] | None) -> None:
    """The peak of a map is over the image where `place_over_image` puts it, and where geometry says."""
    frame, _ = turned_frame(angle, contents)
    h, w = 8, 24
    rows, columns = (h, w) if contents is None else (int(contents[0] / 4), int(contents[1] / 4))
    height, width = frame.over_grid(h, w)
    assert (height, width) == (32, 40), (
        "a cell over the image is as large as one of the crop, but for four times at most"
    )
    for row, column in ((1, 2), (rows - 2, columns - 3), (rows // 2, columns // 2)):
        maps = torch.zeros(1, h, w)
        maps[0, row, column] = 1
        over = frame.over_image(maps)[0]
        assert over.shape == (height, width)
        peak = divmod(int(over.argmax()), width)
        place = divmod(int(frame.place_over_image(torch.tensor([row * w + column]), h, w)), width)
        along, across = (
            ((column + 0.5) / columns - 0.5) * 120,
            ((row + 0.5) / rows - 0.5) * 40,
        )  # pixels from the middle
        x = 100 + along * math.cos(angle) - across * math.sin(angle)
        y = 100 + along * math.sin(angle) + across * math.cos(angle)
        at = y / 200 * height, x / 200 * width
        assert all(cell - 1e-6 <= there <= cell + 1 + 1e-6 for cell, there in zip(place, at, strict=True))
        assert max(abs(peak[0] - place[0]) / 2, abs(peak[1] - place[1])) <= 1, (
            "cells over the image are higher in number"
        )


@settings(max_examples=25, deadline=None)
@given(st.floats(-math.pi, math.pi), st.integers(0, 99))
def test_marked_places_come_back(angle: float, seed: int) -> None:
    """By brute force: a cell of the crop is marked where one of its 4 x 4 places lies on a marked cell of the image."""
    frame, alignment = turned_frame(angle)
    h, w = 6, 18
    marked = torch.from_numpy(np.random.default_rng(seed).random((1, h, w)) < 0.2)
    found = frame.marks_turned(marked, h, w)[0].numpy()
    inverse = np.linalg.inv(np.vstack([alignment.to_crop(Pose(100, 100, angle, 200, 200, (0, 0, 0), True)), [0, 0, 1]]))
    for row, column in np.ndindex(h, w):
        hit = False
        for i, j in np.ndindex(4, 4):
            x, y, _ = inverse @ [(column + (j + 0.5) / 4) / w, (row + (i + 0.5) / 4) / h, 1]
            if 0 <= x < 1 and 0 <= y < 1:
                hit |= bool(marked[0, int(y * h), int(x * w)])
        assert found[row, column] == hit


def test_what_was_filled_in_counts_for_nothing() -> None:
    alignment = Alignment(left=0.3, right=0.3, top=0.1, bottom=0.1, turned=True, aspect=1.0)
    pose = Pose(20.0, 100.0, 0.0, 200, 200, (0, 0, 0), True)  # 40 of 120 pixels lie beyond the left edge
    frame = Frame((32, 96), turns=torch.from_numpy(alignment.to_crop(pose))[None], finer=alignment.finer)
    counted = frame.counted(4, 12)
    assert counted is not None
    assert counted[0].any(0).tolist() == [False] * 4 + [True] * 8
    maps = torch.rand(1, 4, 12)
    over = frame.over_image(maps)[0]
    assert (over[0] == maps.min()).all(), "and what lies beyond the crop is as low as the lowest within"


def test_round_parts_are_shifted_only() -> None:
    pictures = []
    for i in range(8):
        picture = Image.new("RGB", (SIZE, SIZE), (30, 30, 30))
        ImageDraw.Draw(picture).ellipse((40 + 5 * i, 50, 120 + 5 * i, 130), fill=(180, 170, 90))
        pictures.append(np.asarray(picture))
    images = ImageSet.from_arrays(pictures)
    alignment = learn(images)
    assert not alignment.turned
    assert alignment.size((SIZE, SIZE)) == pytest.approx((89, 89), abs=3)
    crops = [np.asarray(alignment.crop(images.image(i), alignment.pose(images.image(i))), float) for i in range(8)]
    assert max(np.abs(crop - crops[0]).mean() for crop in crops) < 3


def test_what_cannot_be_aligned_is_refused() -> None:
    generator = np.random.default_rng(0)
    texture = ImageSet.from_arrays([generator.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(6)])
    with pytest.raises(
        InputError, match="needs parts before a plain background, and 6 of 6 images have none that covers 0.2 % of them"
    ):
        learn(texture)
    pictures = [np.asarray(nail())] * 6 + [np.asarray(nail().resize((80, 80)).crop((-60, -60, 140, 140)))] * 6
    padded = [np.where(picture == 0, 200, picture).astype(np.uint8) for picture in pictures]
    with pytest.raises(InputError, match="needs parts of one size"):
        learn(ImageSet.from_arrays(padded))
    images = nails(8)
    aligned = images.aligned(learn(images))
    whole = Region(np.ones((4, 4), bool))
    with pytest.raises(InputError, match="exclude each other"):
        aligned.looked_at(whole)
    with pytest.raises(InputError, match="exclude each other"):
        images.looked_at(whole).aligned(aligned.alignment)


def test_aligning_is_proposed_where_parts_lie_at_different_angles(caplog: pytest.LogCaptureFixture) -> None:
    def told(images: ImageSet) -> bool:
        caplog.clear()
        ready_to_train(images)
        return "--align turns all alike" in caplog.text

    turned = nails(12)
    assert told(turned)
    assert not told(turned.aligned(learn(turned)))
    assert not told(turned.looked_at(Region(np.ones((4, 4), bool))))
    generator = np.random.default_rng(0)
    assert not told(ImageSet.from_arrays([noisy(nail(a, 100, 100), generator) for a in np.linspace(-0.3, 0.3, 12)]))
    assert told(ImageSet.from_arrays([noisy(nail(i % 2 * math.pi, 100, 100), generator) for i in range(12)]))
    texture = generator.integers(0, 256, (6, 64, 64, 3)).astype(np.uint8)
    assert not told(ImageSet.from_arrays(list(texture)))


def test_it_survives_json_and_damage_is_an_error() -> None:
    alignment = learn(nails(8))
    assert Alignment.from_json(json.loads(json.dumps(alignment.as_json()))) == alignment
    assert Alignment.from_json(None) is None
    for broken in ({"left": -1.0}, {"aspect": 0.0}, {"top": math.nan}, {"right": "wide"}):
        with pytest.raises((ValueError, TypeError)):
            Alignment.from_json({**alignment.as_json(), **broken})


def test_features_of_the_cache_are_not_mixed_up(tmp_path: Path) -> None:
    images = nails(6)
    aligned = images.aligned(learn(images))
    backbone, store = tiny_backbone(), FeatureStore(tmp_path)
    plain, _ = attach(images, backbone, ["stride8"], store=store)
    turned, _ = attach(aligned, backbone, ["stride8"], store=store)
    again, _ = attach(aligned, backbone, ["stride8"], store=store)
    memory, _ = attach(aligned, backbone, ["stride8"])
    [a], [b], [c], [d] = (
        [batch.features["stride8"] for batch in one.batches(["stride8"])] for one in (plain, turned, again, memory)
    )
    assert not torch.equal(a, b)
    assert torch.equal(b, c)
    assert torch.equal(b, d)
    assert again.poses == turned.poses == memory.poses
    assert aligned.aligned(None).poses == {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """Trained on nails at any angle, by the command's functions."""
    images = nails(24)
    aligned = images.aligned(learn(images))
    backbone = load_backbone("tiny", size=fitting_size(aligned, 128))
    out = tmp_path_factory.mktemp("aligned") / "model"
    return pipeline.fit(aligned, make_detector("quorum"), backbone, out=out).model, out


@pytest.mark.parametrize("detector", ["quorum", "patchcore", "padim"])
def test_the_peak_is_where_the_mark_is(detector: str, model: tuple[Model, Path]) -> None:
    """For nails at twelve angles, marked at three places of each."""
    fitted = model[0]
    if detector != "quorum":
        images = nails(24)
        aligned = images.aligned(learn(images))
        fitted = pipeline.fit(aligned, detector, fitted.backbone, no_screen=True).model
    for n, angle in enumerate(np.linspace(-3, 3, 12)):
        x, y = 100 + 3 * (n % 4), 96 + 2 * (n % 3)
        mark = ((-20.0, 0.0), (5.0, 0.0), (25.0, 0.0))[n % 3]
        [found] = fitted.predict([noisy(nail(angle, x, y, mark=mark), np.random.default_rng(n))], maps=True)
        assert found.map is not None
        rows, columns = found.map.shape
        peak = np.unravel_index(int(found.map.argmax()), found.map.shape)
        there = np.array([x + mark[0] * math.cos(angle), y + mark[0] * math.sin(angle)])
        seen = np.array([(peak[1] + 0.5) / columns, (peak[0] + 0.5) / rows]) * SIZE
        assert np.abs(seen - there).max() <= 10, (angle, mark, seen, there)


def test_a_model_keeps_how_it_looks(model: tuple[Model, Path]) -> None:
    fitted, folder = model
    loaded = load_model(folder)
    assert loaded.alignment == fitted.alignment
    assert fitted.alignment is not None
    new = nails(6, seed=3, marked=2)
    assert np.array_equal(loaded.predict(new).scores, fitted.predict(new).scores)
    scores = fitted.predict(new).scores
    assert scores[4:].min() > scores[:4].max()
    assert alignment_of(load_screening(folder / "screening")) == fitted.alignment


@pytest.mark.parametrize("detector", ["quorum", "padim"])
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_exported_models_align_too(to: Any, detector: str, model: tuple[Model, Path], tmp_path: Path) -> None:
    """Scores and maps of the file are those of the model, also where a part lies partly beyond the border."""
    fitted = model[0]
    if detector != "quorum":
        images = nails(24)
        fitted = pipeline.fit(images.aligned(learn(images)), detector, fitted.backbone, no_screen=True).model
        scores = np.linspace(1, 30, 40)
        fitted = dataclasses.replace(fitted, calibration=Calibration.of(scores))
    inspector = Inspector(export_model(fitted, tmp_path / "exported", to))
    exact = in_float32(fitted)
    for x, angle, mark in ((100, 0.3, None), (112, 2.0, (20.0, 0.0)), (60, math.pi, None)):
        picture = np.asarray(nail(angle, x, 100, mark=mark))
        wanted = exact.predict([picture], maps=True).item()
        got = inspector(picture)
        assert got.score == pytest.approx(wanted.score, rel=3e-3)  # PaDiM of 24 images is sensitive to rounding
        assert wanted.map is not None
        assert got.map.shape == wanted.map.shape
        np.testing.assert_allclose(got.map, wanted.map, atol=1e-2 * float(wanted.map.max()))


def test_an_image_without_a_part_is_looked_at_and_told(
    model: tuple[Model, Path], caplog: pytest.LogCaptureFixture
) -> None:
    empty = np.full((SIZE, SIZE, 3), 200, np.uint8)
    found = model[0].predict([np.asarray(nail(0.3)), empty])
    assert found.scores[1] > found.scores[0]
    assert "1 of 2 images show no part before the background" in caplog.text


def test_the_commands_align(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, id_ in enumerate((images := nails(12, marked=2)).ids.tolist()):
        images.image(id_).save(parts / f"{i:02}.png")
    cache = ["--cache", str(tmp_path / "cache")]
    runner = CliRunner()
    ran = runner.invoke(
        app, ["screen", str(parts), "--align", "--backbone", "tiny", "--out", str(tmp_path / "s"), *cache]
    )
    assert ran.exit_code == 0, ran.output
    assert "Before that they are turned and cropped to" in ran.output
    given = ["fit", str(parts), "--screening", str(tmp_path / "s"), "--backbone", "tiny", "--out", str(tmp_path / "m")]
    ran = runner.invoke(app, [*given, *cache])
    assert ran.exit_code == 0, ran.output
    assert "Before that they are turned and cropped to" in ran.output
    kept = json.loads((tmp_path / "s" / "screening.json").read_text())
    assert load_model(tmp_path / "m").training[ALIGNMENT] == kept[ALIGNMENT]
    wrong = ["fit", str(parts), "--align", "--roi", "auto", "--backbone", "tiny", "--out", str(tmp_path / "x"), *cache]
    ran = runner.invoke(app, wrong)
    assert "exclude each other" in str(ran.exception)
