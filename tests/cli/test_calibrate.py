"""flawsift calibrate: from labelled images to a threshold that is stored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flawsift.datasets import write_mvtec
from flawsift.testing import easy_set

TINY = ["--backbone", "tiny", "--size", "64"]
TRAINED = [*range(25), 48, 49]


@pytest.fixture
def model(cli: Any, easy_folder: Path, tmp_path: Path) -> Path:
    """A model of the first 25 good images and two defective ones."""
    (tmp_path / "parts").mkdir()
    for i in TRAINED:
        shutil.copy(easy_folder / f"part-{i:02d}.png", tmp_path / "parts")
    bank = ["--detector", "padim", "--set", "n_features=10", "--no-screen", "--false-alarm-rate", 0.1]
    code, _, err = cli("fit", tmp_path / "parts", "--out", tmp_path / "model", *TINY, *bank)
    assert code == 0, err
    return tmp_path / "model"


@pytest.fixture
def labelled(easy_folder: Path, tmp_path: Path) -> Path:
    """All 50 images in OK/ and nok/, in folders of their own."""
    for i in range(50):
        kind = tmp_path / "labelled" / ("OK" if i < 40 else "nok/scratch")
        kind.mkdir(parents=True, exist_ok=True)
        shutil.copy(easy_folder / f"part-{i:02d}.png", kind)
    return tmp_path / "labelled"


def test_a_model_is_calibrated(cli: Any, model: Path, labelled: Path, tmp_path: Path) -> None:
    old = json.loads((model / "model.json").read_text())
    code, out, err = cli("calibrate", model, labelled, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["n_good"], said["n_defective"], said["n_trained_on"]) == (15, 8, 27)
    assert said["before"]["value"] == pytest.approx(old["threshold"]["value"])
    assert said["threshold"]["false_alarm_rate"] == 0.1, "the model's own rate"
    assert "27 of 50 labelled images were left out" in said["notes"][0]
    assert "Misses against false alarms" in (model / "calibration.html").read_text("utf-8")
    new = json.loads((model / "model.json").read_text())
    assert new["threshold"]["value"] == pytest.approx(said["threshold"]["value"], rel=1e-8)
    assert new["threshold"]["value"] != old["threshold"]["value"]
    assert new["training"]["labelled"]["n_defective"] == 8
    same = {"backbone", "detector_digest", "learned", "format", "flawsift"}
    assert {key: new[key] for key in same} == {key: old[key] for key in same}
    code, out, err = cli("predict", model, labelled / "nok" / "scratch" / "part-45.png")
    assert code == 0, err
    assert "by 15 good and 8 defective labelled images" in out


def test_in_words_and_without_writing(cli: Any, model: Path, labelled: Path) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    code, out, err = cli("calibrate", model, labelled, "--misses", 0.3, "--dry-run")
    assert code == 0, err
    assert "by 15 good and 8 defective labelled images" in out
    assert "Before: threshold " in out
    assert "Nothing was written." in out
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()} == before


def test_a_copy_is_calibrated(cli: Any, model: Path, tmp_path: Path) -> None:
    write_mvtec(easy_set(), tmp_path / "tree")
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    code, _, err = cli("calibrate", model, tmp_path / "tree", "--false-alarm-rate", 0.2, "--out", tmp_path / "copy")
    assert code == 0, err
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()} == before
    copy = json.loads((tmp_path / "copy" / "model.json").read_text())
    assert copy["training"]["false_alarm_rate"] == 0.2
    assert (tmp_path / "copy" / "calibration.html").exists()
    code, _, err = cli("predict", tmp_path / "copy", tmp_path / "tree" / "test" / "good")
    assert code == 0, err


def test_reviewed_images(cli: Any, model: Path, easy_folder: Path, tmp_path: Path) -> None:
    rows = [f"part-{i}.png,{'keep' if i < 40 else 'remove'}" for i in range(25, 48)]
    (tmp_path / "d.csv").write_text("\n".join(["path,decision", *rows, "part-00.png,unsure"]) + "\n")
    code, out, err = cli("calibrate", model, tmp_path / "d.csv", "--images", easy_folder, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["n_good"], said["n_defective"], said["n_trained_on"]) == (15, 8, 0)
    assert said["notes"] == ["27 images have no label, and were left out."]
    code, _, err = cli("calibrate", model, tmp_path / "d.csv")
    assert code == 2
    assert "Where are the images" in err
    (tmp_path / "e.csv").write_text("path,decision\nother/part-25.png,keep\n")
    code, _, err = cli("calibrate", model, tmp_path / "e.csv", "--images", easy_folder)
    assert code == 2
    assert "The decisions name none of the" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{model}", "{missing}"], "does not exist"),
        (["{model}", "{missing}.csv", "--images", "{parts}"], "cannot be read"),
        (["{model}", "{parts}"], "does not say which images are good"),
        (["{model}", "{empty}"], "No images in"),
        (["{model}", "{labelled}", "--images", "{parts}"], "--images goes with a CSV"),
        (["{model}", "{labelled}/OK"], "does not say which images are good"),
        (["{parts}", "{labelled}"], "is not a model folder"),
        (["{model}", "{labelled}", "--false-alarm-rate", "1"], "false_alarm_rate must be in (0, 1), got 1.0"),
        (["{model}", "{labelled}", "--misses", "0"], "misses must be in (0, 1), got 0.0"),
        (["{model}", "{labelled}", "--misses", "0.1", "--false-alarm-rate", "0.1"], "Give either"),
        (["{model}", "{good}"], "says nothing of misses"),
        (["{model}", "{damaged}"], "No labelled image is left (without 2 that cannot be read)"),
        (["{model}", "{labelled}", "--out", "{parts}/part-00.png"], "Cannot write"),
    ],
)
def test_errors_leave_the_model_as_it_is(
    cli: Any, model: Path, labelled: Path, easy_folder: Path, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "empty").mkdir()
    for kind in ("good", "bad"):
        (tmp_path / "damaged" / kind).mkdir(parents=True)
        (tmp_path / "damaged" / kind / "a.png").write_text(kind)
    shutil.copytree(labelled / "OK", tmp_path / "only" / "good")
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    names = {n: str(tmp_path / n) for n in ("missing", "empty", "parts", "damaged")}
    names |= {"model": str(model), "labelled": str(labelled), "good": str(tmp_path / "only")}
    code, out, err = cli("calibrate", *[a.format(**names) for a in arguments], "--quiet")
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()} == before


def test_an_evaluation_says_what_was_trained_on(cli: Any, model: Path, labelled: Path, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", model, labelled, "--out", tmp_path / "e")
    assert code == 0, err
    assert "Note: the model was trained on 27 of these 50 images" in out
    assert "trained on 27 of these images" in (tmp_path / "e" / "report.html").read_text("utf-8")
