"""Exported files say what the model says, for every detector and in both formats, and name what they cannot do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flawsift.data.decoding import to_pixels
from flawsift.data.frames import Region, content_of
from flawsift.data.images import ImageSet
from flawsift.data.roi import REGION
from flawsift.datasets import Dataset
from flawsift.deploy.export import AGREES, export_model, in_float32, made_up_pictures
from flawsift.deploy.graph import resized
from flawsift.detectors.quorum import Quorum
from flawsift.detectors.registry import DETECTORS, make_detector
from flawsift.errors import InputError, ModelError, ParameterError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, load_model
from flawsift.runtime import CARD, SEAL, Inspector, seal
from flawsift.types import Size
from tests.detectors.test_common_checks import SMALL

SHORT: dict[str, Any] = {"steps": 2, "student_steps": 2, "head_steps": 2, "epochs": 2, "warmup": 0}
ROUNDED = 2e-3  # as far as OpenVINO's own exponentials and sums go on networks that are hardly trained


def fitted(name: str, easy: Dataset, tiny: Backbone, **changes: Any) -> Model:
    short = {key: value for key, value in SHORT.items() if key in SMALL[name]}
    detector = make_detector(name, **{**SMALL[name], **short, **changes})
    images, _ = attach(easy.images.select(range(20)), tiny, detector.layers, views=detector.views)
    detector.fit(images)
    scores = detector.predict(images, maps=False).scores
    return Model(detector, tiny, Calibration.of(scores), {"false_alarm_rate": 0.1})


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_an_exported_detector_says_what_the_model_says(
    name: str, easy: Dataset, tiny: Backbone, tmp_path: Path
) -> None:
    model = fitted(name, easy, tiny)
    inspector = Inspector(export_model(model, tmp_path / "out"))
    for id_ in (0, 30, 45):  # of the training, a good one and a defective one
        picture = np.asarray(easy.images.image(id_), np.uint8)
        said, wanted = inspector(picture), model.predict([picture], maps=True).item()
        assert said.score == pytest.approx(wanted.score, rel=1e-3, abs=1e-4)
        assert said.anomalous == wanted.is_anomalous or abs(said.score / said.threshold - 1) < 1e-3
        assert wanted.map is not None
        if name != "quorum":  # near what it learned its map is rounded, see the test below
            np.testing.assert_allclose(said.map, wanted.map, rtol=5e-3, atol=5e-3 * abs(wanted.map).max())


def framed_picture(easy: Dataset, id_: int) -> np.ndarray:
    """Of three shapes: the input's, wider and higher."""
    picture = np.asarray(easy.images.image(id_), np.uint8)
    return (picture[8:56], picture[:32], picture[:, 10:42])[id_ % 3]


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_pictures_of_other_shapes_and_a_region_count_alike(name: str, easy: Dataset, tmp_path: Path) -> None:
    region = Region(np.tri(8, 8, 3, dtype=np.bool_))
    backbone = load_backbone("tiny", size=(96, 128), runtime="torch")
    short = {key: value for key, value in SHORT.items() if key in SMALL[name]}
    detector = make_detector(name, **{**SMALL[name], **short})
    given = ImageSet.from_arrays([framed_picture(easy, id_) for id_ in range(20)])
    images, _ = attach(given, backbone, detector.layers, views=detector.views)
    images = images.looked_at(region)
    detector.fit(images)
    scores = detector.predict(images, maps=False).scores
    record = {"false_alarm_rate": 0.1, REGION: region.as_json()}
    model = Model(detector, backbone, Calibration.of(scores), record)
    inspector = Inspector(export_model(model, tmp_path / "out"))
    for id_ in (30, 31, 32, 45, 46, 47):
        picture = framed_picture(easy, id_)
        said, wanted = inspector(picture), in_float32(model).predict([picture], maps=True).item()
        assert said.score == pytest.approx(wanted.score, rel=1e-3, abs=1e-4)
        assert wanted.map is not None
        assert said.map.shape == wanted.map.shape == (96, 128)
        off = abs(said.map - wanted.map) > 0.05 * abs(wanted.map).max()
        # which places Quorum draws finer is told by scores that are nearly equal on such even pictures
        assert off.mean() <= (0.1 if name == "quorum" else 0)


def test_the_gaussian_of_the_detector_is_exported(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    model = fitted("padim", easy, tiny, sigma=5.0)
    picture = np.asarray(easy.images.image(45), np.uint8)
    said, wanted = (
        Inspector(export_model(model, tmp_path / "out"))(picture),
        model.predict([picture], maps=True).item(),
    )
    assert wanted.map is not None
    np.testing.assert_allclose(said.map, wanted.map, rtol=5e-3, atol=5e-3 * abs(wanted.map).max())


@pytest.mark.parametrize("name", ["quorum", "padim", "patchcore"])
def test_openvino_says_the_same(name: str, easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    model = fitted(name, easy, tiny)
    inspector = Inspector(export_model(model, tmp_path / "out", "openvino"))
    for picture in made_up_pictures(64):
        said, wanted = inspector(picture), model.predict([picture]).item()
        assert said.score == pytest.approx(wanted.score, rel=ROUNDED)
        assert said.p_value == pytest.approx(wanted.p_value)


@pytest.mark.parametrize("groups", [None, 3])
def test_a_quorum_of_groups_and_of_patches_that_were_left_out(
    groups: int | None, easy: Dataset, tiny: Backbone, tmp_path: Path
) -> None:
    model = fitted("quorum", easy, tiny, precision="float32")
    quorum = model.detector
    assert isinstance(quorum, Quorum)
    quorum.usable_[4, :5] = False
    if groups is not None:
        quorum.groups_ = [str(i // groups) for i in range(len(quorum.groups_))]
    vars(quorum).pop("_cache", None)
    inspector = Inspector(export_model(model, tmp_path / "out"))
    for id_ in (4, 30, 45):
        picture = np.asarray(easy.images.image(id_), np.uint8)
        said, wanted = inspector(picture), model.predict([picture], maps=True).item()
        assert said.score == pytest.approx(wanted.score, rel=1e-3)
        assert wanted.map is not None
        if id_ != 4:
            np.testing.assert_allclose(said.map, wanted.map, atol=0.05 * wanted.map.max())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 700), st.integers(0, 9), st.sampled_from([32, 64, (64, 96), (48, 32)]))
def test_pixels_are_those_of_pillow(h: int, w: int, seed: int, size: Size) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)
    wanted = to_pixels(Image.fromarray(image), size).int()
    pixels, contents = resized(torch.from_numpy(image), size)
    found = pixels.int()
    if isinstance(size, int):
        assert contents is None
    else:
        assert contents is not None
        assert tuple(contents.tolist()) == content_of((w, h), size)
    assert torch.equal(found, wanted)


def test_the_runtime_needs_no_torch(easy: Dataset, tiny: Backbone, easy_folder: Path, tmp_path: Path) -> None:
    path = export_model(fitted("quorum", easy, tiny), tmp_path / "out")
    program = (
        "import sys; sys.modules['torch'] = None; from flawsift.runtime import Inspector; "
        f"print(Inspector({str(path)!r})({str(easy_folder / 'part-45.png')!r}).anomalous)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "True\n"
    )


def test_the_file_carries_its_card_and_answers_at_any_rate(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    model = fitted("quorum", easy, tiny)
    path = export_model(model, tmp_path / "out")
    inspector = Inspector(path.parent)
    beside = json.loads((path.parent / "model-card.json").read_text("utf-8"))
    assert {key: value for key, value in beside.items() if key != "parity"} == inspector.card
    for rate in (0.05, 0.1, 0.5, 0.999):
        threshold = model.threshold(rate)
        assert threshold is not None
        assert Inspector(path, false_alarm_rate=rate).threshold == threshold.value


def test_many_keep_their_order_in_threads(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    inspector = Inspector(export_model(fitted("quorum", easy, tiny), tmp_path / "out"), n_threads=1)
    pictures = [np.asarray(easy.images.image(i), np.uint8) for i in range(30, 42)]
    serial = [verdict.score for verdict in inspector.many(pictures)]
    assert [verdict.score for verdict in inspector.many(iter(pictures), n_workers=3)] == serial


def test_what_is_wrong_is_said(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    model = fitted("quorum", easy, tiny)
    with pytest.raises(ParameterError, match="format"):
        export_model(model, tmp_path / "x", "tflite")  # type: ignore[arg-type]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    with pytest.raises(ParameterError, match=r"mine\.txt"):
        export_model(model, tmp_path / "photos")
    path = export_model(model, tmp_path / "out")
    inspector = Inspector(path)
    picture: npt.NDArray[Any] = np.zeros((8, 8, 3), np.uint8)
    for bad, error in ((picture[:0], InputError), ("gone.png", InputError), (3, InputError), (b"x", InputError)):
        with pytest.raises(error):
            inspector(bad)
    for rate in (0.0, 1.0, 2.0):
        with pytest.raises(ParameterError, match="false_alarm_rate"):
            Inspector(path, false_alarm_rate=rate)
    with pytest.raises(ModelError, match="not there"):
        Inspector(tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Inspector(damaged)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_changed_byte_of_an_exported_file_is_told(to: Any, easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    path = export_model(fitted("padim", easy, tiny), tmp_path / "model", to)
    generator = np.random.default_rng(0)
    for part in [path] if to == "onnx" else [path, path.with_suffix(".bin")]:
        whole = part.read_bytes()
        for at in (*generator.integers(0, len(whole) - 100, 30).tolist(), len(whole) - 1, len(whole) - 40):
            part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ModelError, match=part.name.replace(".", r"\.")):
                Inspector(path)
        for n in (1, 3, len(seal(b"", None if to == "onnx" else b""))):  # the last takes all of the seal away
            part.write_bytes(whole[:-n])
            with pytest.raises(ModelError, match=r"model\.(onnx|xml|bin)"):
                Inspector(path)
        part.write_bytes(whole)
    assert Inspector(path).threshold > 0
    if to == "openvino":
        path.with_suffix(".bin").unlink()
        with pytest.raises(ModelError, match=r"model\.bin' cannot be read"):
            Inspector(path)


def test_files_of_earlier_versions_have_no_seal_and_those_of_later_ones_are_refused(
    easy: Dataset, tiny: Backbone, tmp_path: Path
) -> None:
    import onnx

    path = export_model(fitted("padim", easy, tiny), tmp_path / "model")
    picture = np.asarray(easy.images.image(45), np.uint8)
    expected = Inspector(path)(picture).score
    for card_format, told in ((1, None), (2, "its end is missing"), (3, "newer flawsift")):
        model = onnx.load(path)
        entries = {entry.key: entry.value for entry in model.metadata_props if entry.key != SEAL}
        card = json.loads(entries[CARD]) | {"format": card_format}
        onnx.helper.set_model_props(model, {**entries, CARD: json.dumps(card)})
        other = tmp_path / f"{card_format}.onnx"
        other.write_bytes(model.SerializeToString())
        if told is None:
            assert Inspector(other)(picture).score == expected
        else:
            with pytest.raises(ModelError, match=told):
                Inspector(other)


@pytest.mark.real
def test_the_default_network_says_the_same(easy_folder: Path, tmp_path: Path) -> None:
    import flawsift

    flawsift.fit(easy_folder, out=tmp_path / "model", no_screen=True)
    model = load_model(tmp_path / "model")
    inspector = Inspector(export_model(model, tmp_path / "out"))
    for part in ("part-03.png", "part-44.png"):
        wanted = in_float32(model).predict(easy_folder / part).item()
        assert inspector(easy_folder / part).score == pytest.approx(wanted.score, rel=1e-3)


def test_the_command_exports_and_compares(cli: Any, easy_folder: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "line"
    code, _, err = cli("fit", easy_folder, "--out", model, "--backbone", "tiny", "--size", "64", "--no-screen")
    assert code == 0, err
    code, said, err = cli("export-model", model, "--out", out, "--check", easy_folder, "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["check"]["n_images"] == 50
    assert found["check"]["largest_difference"] < AGREES
    assert Path(found["file"]).is_file()
    code, said, _ = cli("export-model", model, "--out", out)
    assert code == 0
    assert "Scores are those of the model" in said
    (out / "mine.txt").write_text("mine")
    code, _, err = cli("export-model", model, "--out", out)
    assert code == 2
    assert "mine.txt" in err
