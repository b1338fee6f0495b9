"""The command line as a user meets it."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flawsift import __version__
from flawsift.cli.main import main
from flawsift.datasets import write_mvtec
from flawsift.detectors.registry import DETECTORS
from flawsift.screening.storage import load_screening
from flawsift.testing import easy_set

TINY = ["--backbone", "tiny", "--size", "64"]
SUBMODELS = ["--rank-by", "submodels"]


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Result:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process."""

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        found = capsys.readouterr()
        return Result(int(stop.value.code or 0), found.out, found.err)

    return call


def test_tiles_by_position(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    cut = ["--backbone", "tiny", "--size", "128", "--tiles", "64:0", "--tiles-by-position"]
    screened = run("screen", easy_folder, "--out", tmp_path / "s", *cut, "--detector", "quorum", "--json")
    assert screened.code == 0, screened.err
    fitted = run("fit", easy_folder, "--out", tmp_path / "m", *cut, "--screening", tmp_path / "s", "--json")
    assert fitted.code == 0, fitted.err
    assert fitted.json["detector"]["params"]["tiles_by_position"] == "64:0"
    assert run("predict", tmp_path / "m", easy_folder, "--json").code == 0
    whole = run("fit", easy_folder, "--out", tmp_path / "w", *TINY, "--tiles-by-position")
    assert whole.code == 2
    assert "in one piece" in whole.err
    exported = run("export-model", tmp_path / "m", "--to", "onnx", "--out", tmp_path / "e")
    assert exported.code == 2
    assert "by position cannot be exported" in exported.err


def test_the_main_job(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    screened = run("screen", easy_folder, "--out", tmp_path / "s", *TINY, "--json")
    assert screened.code == 0, screened.err
    assert screened.json["n_images"] == 50
    assert {p.name for p in (tmp_path / "s").iterdir() if not p.match(".*.lock")} == {
        "manifest.json",
        "screening.csv",
        "screening-original.csv",
        "screening.json",
        "maps.npy",
        "rejected.npy",
        "descriptions.npy",
        "evidence.npz",
        "report.html",
    }
    bank = ["--detector", "patchcore", "--set", "coreset_ratio=0.05"]  # 64 px images have few patches
    fitted = run("fit", easy_folder, "--out", tmp_path / "m", *TINY, *bank, "--screening", tmp_path / "s", "--json")
    assert fitted.code == 0, fitted.err
    assert fitted.json["n_kept"] == screened.json["n_kept"]
    assert (tmp_path / "m" / "model.json").exists()
    found = run("predict", tmp_path / "m", easy_folder, "--out", tmp_path / "p", "--json")
    assert found.code == 0, found.err
    rows = table(tmp_path / "p" / "predictions.csv")
    assert len(rows) == 50
    assert list(rows[0]) == ["path", "score", "is_anomalous", "p_value", "error", "model", "heatmap"]
    assert sum(int(r["is_anomalous"]) for r in rows) == found.json["n_anomalous"]
    with Image.open(tmp_path / "p" / "maps" / "part-49.png.png") as overlay:
        assert min(overlay.size) > 64, "the image and its heatmap, with a line of text"
    write_mvtec(easy_set(), tmp_path / "tree")
    measured = run("evaluate", tmp_path / "m", tmp_path / "tree", "--out", tmp_path / "e", "--json")
    assert measured.code == 0, measured.err
    keys = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}
    assert keys <= set(measured.json)
    assert Path(measured.json["report"]).read_text("utf-8").count("<h2") == 7
    written = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert written["image_auroc"] > 0.8
    assert written == {k: measured.json[k] for k in written}


def test_images_of_another_camera_are_noticed(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    fitted = run("fit", easy_folder, "--out", tmp_path / "m", *TINY)
    assert fitted.code == 0, fitted.err
    found = run("predict", tmp_path / "m", easy_folder)
    assert "Notice" not in found.out
    assert "this rate" not in found.out
    assert run("predict", tmp_path / "m", easy_folder, "--json").json["notices"] == []
    (tmp_path / "new").mkdir()
    for i in range(3):
        with Image.open(easy_folder / f"part-0{i}.png") as image:
            image.resize((40, 90)).save(tmp_path / "new" / f"{i}.jpg")
    found = run("predict", tmp_path / "m", tmp_path / "new")
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    told = [line for line in lines if line.startswith("Notice: 3 of 3 images")]
    assert any("40 x 90 pixels, in training 64 x 64" in line for line in told)
    assert any("stored as JPEG colour, the training images as PNG colour" in line for line in told)
    assert lines[: len(told)] == told, "they come before the verdicts"
    assert lines[-1].endswith("this rate holds for pictures like the training images, and these differ.")
    notices = run("predict", tmp_path / "m", tmp_path / "new", "--json").json["notices"]
    assert [notice["text"] for notice in notices] == [line.removeprefix("Notice: ") for line in told]
    size = next(notice for notice in notices if notice["kind"] == "size")
    assert (size["n"], size["n_images"]) == (3, 3)
    assert (size["images"]["width"], size["training"]["width"]) == ([40, 40, 40], [64, 64, 64])


def test_predictions_are_written_as_a_page_and_as_lines(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    small = ["--detector", "padim", "--set", "n_features=20"]
    assert run("fit", easy_folder, "--out", tmp_path / "m", *TINY, *small).code == 0
    told = run("predict", tmp_path / "m", easy_folder, "--out", tmp_path / "p", "--json").json
    page = tmp_path / "p" / "report.html"
    assert (told["report"], told["json_lines"]) == (str(page), str(tmp_path / "p" / "predictions.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [row["path"] for row in table(tmp_path / "p" / "predictions.csv")]
    assert page.read_text().count('class="card"') >= 24
    assert run("predict", tmp_path / "m", easy_folder / "part-0*.png", "--out", tmp_path / "p").code == 0
    aside = {path.name for path in (tmp_path / "p" / "earlier-1").iterdir()}
    assert aside == {"maps", "predictions.csv", "predictions.jsonl", "report.html", ".flawsift"}


def test_pictures_of_which_none_can_be_scored_are_an_error(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    small = ["--detector", "padim", "--set", "n_features=20"]
    assert run("fit", easy_folder, "--out", tmp_path / "m", *TINY, *small).code == 0
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").touch()
    found = run("predict", tmp_path / "m", tmp_path / "new", "--out", tmp_path / "p")
    assert (found.code, "The image cannot be scored. 'a.png': " in found.err) == (2, True), found.err
    (tmp_path / "new" / "b.png").write_text("no image")
    found = run("predict", tmp_path / "m", tmp_path / "new", "--json")
    assert (found.code, "None of the 2 images can be scored. 'a.png': " in found.err) == (2, True), found.err
    shutil.copy(easy_folder / "part-00.png", tmp_path / "new")
    assert run("predict", tmp_path / "m", tmp_path / "new").code == 0


def test_days_are_compared(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    small = ["--detector", "padim", "--set", "n_features=20"]
    assert run("fit", easy_folder, "--out", tmp_path / "m", *TINY, *small).code == 0
    for day, images in (("monday", "part-[0-3]*.png"), ("tuesday", "part-4*.png")):  # good ones, defective ones
        found = run("predict", tmp_path / "m", easy_folder / images, "--out", tmp_path / day, "--no-maps")
        assert found.code == 0, found.err
    days = [tmp_path / "monday", tmp_path / "tuesday" / "predictions.csv"]
    found = run("drift", tmp_path / "m", *days, "--out", tmp_path / "d")
    assert found.code == 0, found.err
    warning, *lines = found.out.splitlines()
    assert warning.startswith("WARNING: At least 7 images look defective")
    assert lines[0].startswith("tuesday: scores rose by ")
    assert lines[0].endswith("not explained by chance.")
    assert [line.split()[0] for line in lines[2:5]] == ["training", "monday", "tuesday"]
    assert lines[-1] == f"Report: {tmp_path / 'd' / 'report.html'}"
    result = run("drift", tmp_path / "m", *days, "--json").json
    assert [(one["label"], one["n"]) for one in result["files"]] == [("monday", 40), ("tuesday", 10)]
    stopped = [row["is_anomalous"] for row in table(tmp_path / "tuesday" / "predictions.csv")]
    assert result["files"][1]["share_above"] == stopped.count("1") / 10
    assert json.loads((tmp_path / "d" / "drift.json").read_text())["files"] == result["files"]
    found = run("drift", tmp_path / "m", tmp_path / "monday", tmp_path / "monday")
    assert (found.code, "comes more than once" in found.err) == (2, True)
    assert run("drift", tmp_path / "m").code == 2, "no file"


def test_fit_screens_and_reports(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    found = run("fit", easy_folder, "--out", tmp_path / "m", *TINY, "--preset", "paper", "--seed", 3)
    assert found.code == 0, found.err
    assert "on 20 of 50 images" in found.out
    assert "false alarms per 100 good parts" in found.out
    assert (tmp_path / "m" / "screening" / "report.html").exists()
    content = json.loads((tmp_path / "m" / "screening" / "screening.json").read_text())
    options = content["options"]
    assert (options["keep"], options["exclude_own"], options["seed"]) == (0.4, False, 3)
    assert content["detector"]["name"] == "quorum", "the paper's sub-models are of the final detector"


def test_fit_without_a_detector_trains_quorum(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    found = run("fit", easy_folder, "--out", tmp_path / "m", *TINY)
    assert found.code == 0, found.err
    training = json.loads((tmp_path / "m" / "model.json").read_text())["training"]
    n_kept, aside = training["n_kept"], 50 - training["n_kept"]
    assert f"Trained quorum on {n_kept} of 50 images, and on the {aside} set aside: " in found.out
    page = (tmp_path / "m" / "report.html").read_text("utf-8")
    learned = f"Quorum was trained on {n_kept} of 50 images and {aside} more, which were set aside"
    assert aside
    assert learned in page


@pytest.mark.parametrize(
    ("given", "who"),
    [([], "quorum"), (["--screener", "own"], "padim"), (["--preset", "paper"], "padim"), (["--no-screen"], None)],
)
def test_who_screens(given: list[str], who: str | None, run: Any, easy_folder: Path, tmp_path: Path) -> None:
    small = ["--detector", "padim", "--set", "n_features=20"]
    found = run("fit", easy_folder, "--out", tmp_path / "m", *TINY, *small, *given, "--json")
    assert found.code == 0, found.err
    assert found.json["screener"] == who
    assert json.loads((tmp_path / "m" / "detector.json").read_text())["name"] == "padim"
    assert 0 < found.json["threshold"]["n_calibration"] <= (20 if given == ["--preset", "paper"] else 50)


def test_decisions_reach_fit_and_export(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    screened = run("screen", easy_folder, "--out", tmp_path / "s", *TINY, "--keep", 0.8, "--json")
    assert screened.code == 0, screened.err
    removed = [row["path"] for row in table(tmp_path / "s" / "screening.csv") if row["kept"] == "0"]
    (tmp_path / "s" / "decisions.csv").write_text(f"path,decision\n{removed[0]},keep\n")
    decided = ["--decisions", tmp_path / "s" / "decisions.csv"]
    fitted = run("fit", easy_folder, "--out", tmp_path / "m", *TINY, "--screening", tmp_path / "s", *decided, "--json")
    assert fitted.code == 0, fitted.err
    assert fitted.json["n_kept"] == 41
    assert fitted.json["decisions"]["keep"] == 1
    assert "to keep 1 and to remove 0" in Path(fitted.json["report"]).read_text("utf-8")
    anew = run("fit", easy_folder, "--out", tmp_path / "n", *TINY, "--keep", 0.8, *decided, "--json")
    assert anew.json["n_kept"] == 41
    out = run(
        "export", tmp_path / "s", "--to", "csv", "--out", tmp_path / "x", "--json"
    )  # takes decisions.csv by itself
    assert out.code == 0, out.err
    assert (out.json["kept"], out.json["removed"]) == (41, 9)
    model = run("export", tmp_path / "n", "--to", "folder", "--out", tmp_path / "y", "--json")
    assert (model.json["kept"], model.json["decisions"]) == (40, None)
    assert len(list((tmp_path / "y" / "removed").iterdir())) == 10
    assert "fiftyone.Dataset.from_dir" in run("export", tmp_path / "s", "--to", "fiftyone", "--out", tmp_path / "z").out


def test_review_prints_its_address_first(easy_folder: Path, tmp_path: Path, run: Any) -> None:
    run("screen", easy_folder, "--out", tmp_path / "s", *TINY)
    command = [sys.executable, "-m", "flawsift", "review", str(tmp_path / "s"), "--no-browser"]
    # a shell starts background jobs with SIGINT ignored, and children inherit that
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, preexec_fn=heed, **pipes) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
        with urllib.request.urlopen(address) as answer:
            assert "flawsift review" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.rpartition("/")[0][:-1] + "/")
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130


def test_review_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        f"from flawsift.cli.main import main; main(['review', {str(tmp_path)!r}, '--quiet'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'flawsift[review]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_reach_the_work(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    flags = ["--subsets", 3, "--partitions", 2, "--keep", 0.7, "--consensus", "median", "--normalize", "rank"]
    flags += ["--include-own", "--divergence-weight", 0.5, "--detector", "patchcore"]
    flags += ["--set", "coreset_ratio=0.05", "--set", "coreset=random"]
    found = run("screen", easy_folder, "--out", tmp_path / "s", *TINY, *flags, "--json")
    assert found.code == 0, found.err
    options = found.json["options"]
    assert (options["n_subsets"], options["n_partitions"], options["keep"]) == (3, 2, 0.7)
    assert (options["consensus"], options["normalize"], options["exclude_own"]) == ("median", "rank", False)
    assert options["divergence_weight"] == 0.5
    params = found.json["detector"]["params"]
    assert (params["coreset_ratio"], params["coreset"]) == (0.05, "random")


def test_groups_file(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    lines = "".join(f"part-{i:02d}.png,g{i // 5}\n" for i in range(50))
    (tmp_path / "g.csv").write_text("file,group\n" + lines)
    found = run("screen", easy_folder, "--out", tmp_path / "s", *TINY, "--groups", tmp_path / "g.csv", *SUBMODELS)
    assert found.code == 0, found.err
    rows = table(tmp_path / "s" / "screening.csv")
    assert all(rows[i]["subset"] == rows[i - i % 5]["subset"] for i in range(50))


def test_a_saved_screening_takes_no_options(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    assert run("screen", easy_folder, "--out", tmp_path / "s", *TINY).code == 0
    for given in (["--keep", 0.7], ["--keep", "auto"], ["--preset", "default"], ["--screener", "padim"]):
        found = run("fit", easy_folder, "--out", tmp_path / "m", *TINY, "--screening", tmp_path / "s", *given)
        assert found.code == 2
        assert "would not be read. Leave them out, or screen the images again" in found.err
        assert not (tmp_path / "m").exists()


def test_evaluate_takes_good_and_bad_folders_and_says_what_else(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    assert run("fit", easy_folder, "--out", tmp_path / "m", *TINY).code == 0
    for i, picture in enumerate(sorted(easy_folder.glob("*.png"))[30:]):
        target = tmp_path / "tree" / ("bad" if i >= 10 else "good") / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    measured = run("evaluate", tmp_path / "m", tmp_path / "tree", "--out", tmp_path / "e", "--json")
    assert measured.code == 0, measured.err
    assert measured.json["image_auroc"] > 0.8
    plain = run("evaluate", tmp_path / "m", easy_folder, "--out", tmp_path / "e2")
    assert plain.code == 2
    assert "has no labels to measure with" in plain.err
    assert "Expected normal (or good, ok) and defect (or bad, nok)" in plain.err
    assert "test/good and test/DEFECT_TYPE" in plain.err


def test_odd_names_and_bad_files(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for sub in ("a", "b"):
        (root / sub).mkdir(parents=True)
    picture = (easy_folder / "part-00.png").read_bytes()
    for i in range(4):
        (root / "a" / f"{i}.png").write_bytes(picture)
        (root / "b" / f"{i}.png").write_bytes((easy_folder / f"part-0{i + 1}.png").read_bytes())
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).write_bytes(picture)
    (root / "empty.png").touch()
    found = run("fit", root, "--out", tmp_path / "m", *TINY)
    assert found.code == 0, found.err
    found = run("predict", tmp_path / "m", root, "--out", tmp_path / "p")
    assert found.code == 0, found.err
    assert "Not readable: empty.png: empty file" in found.out
    rows = {r["path"]: r for r in table(tmp_path / "p" / "predictions.csv")}
    assert len(rows) == 10
    assert rows["a/0.png"]["score"] == rows["a/1.png"]["score"] != rows["b/0.png"]["score"]
    assert rows["caf\\udce9.png"]["error"] == ""
    assert rows["empty.png"]["score"] == ""
    assert (tmp_path / "p" / "maps" / "a" / "0.png.png").exists()
    assert (tmp_path / "p" / "maps" / "b" / "0.png.png").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["screen", "{missing}", "--out", "{out}"], "does not exist"),
        (["screen", "{empty}", "--out", "{out}"], "No images in"),
        (["screen", "{images}", "--out", "{file}"], "Cannot write"),
        (["screen", "{images}", "--out", "{out}", "--detector", "pathcore"], "Did you mean 'patchcore'"),
        (["screen", "{images}", "--out", "{out}", "--backbone", "resnet81"], "Unknown backbone 'resnet81'"),
        (["screen", "{images}", "--out", "{out}", "--keep", "some"], "--keep must be 'auto' or a share"),
        (["screen", "{images}", "--out", "{out}", "--keep", "1.5"], "must be 'auto' or in"),
        (["screen", "{images}", "--out", "{out}", "--subsets", "1"], "must be a whole number of at least 2"),
        (["screen", "{images}", "--out", "{out}", "--subsets", "70", *SUBMODELS], "70 subsets need at least 70 images"),
        (["screen", "{images}", "--out", "{out}", "--subsets", "70"], "70 subsets need at least 70 images"),
        (["screen", "{images}", "--out", "{out}", "--rank-by", "vote"], "'vote' is not one of 'auto', 'submodels'"),
        (["screen", "{images}", "--out", "{out}", "--set", "max_images"], "needs name=value"),
        (["screen", "{images}", "--out", "{out}", "--set", "max_images=0"], "must be at least 1"),
        (["screen", "{images}", "--out", "{out}", "--set", "max_images=big"], "must be of type int or None, got 'big'"),
        (["screen", "{images}", "--out", "{out}", "--set", f"max_images={10**30}"], "have at most 18 digits"),
        (["screen", "{images}", "--out", "{out}", "--set", f"layers=[{-(10**19)}]"], "have at most 18 digits"),
        (
            [
                "fit",
                "{images}",
                "--out",
                "{out}",
                "--no-screen",
                *TINY,
                "--detector",
                "inreach",
                "--set",
                "smoothing=3e38",
            ],
            "is too large to compute with",
        ),
        (["screen", "{images}", "--out", "{out}", "--set", "groups=1"], "Unknown parameter of Quorum 'groups'"),
        (["screen", "{images}", "--out", "{out}", "--groups", "{missing}"], "cannot be read"),
        (["screen", "{images}"], "Missing option '--out'"),
        (["fit", "{images}", "--out", "{out}", "--false-alarm-rate", "7"], "false_alarm_rate must be in"),
        (["fit", "{images}", "--out", "{out}", "--detector-preset", "paper"], "Unknown preset of quorum"),
        (["fit", "{images}", "--out", "{out}", "--no-screen", "--keep", "0.7"], "stage 1 (--keep) would not be read"),
        (["fit", "{images}", "--out", "{out}", "--no-screen", "--keep", "auto"], "of stage 1 would not be read"),
        (["fit", "{images}", "--out", "{out}", "--no-screen", "--preset", "default"], "stage 1 would not be read"),
        (["fit", "{images}", "--out", "{out}", "--no-screen", "--include-own"], "(--exclude-own/--include-own) would"),
        (["predict", "{images}", "{images}", "--out", "{out}"], "is not a model folder"),
        (["fit", "{images}", "--out", "{out}", "--decisions", "{missing}"], "cannot be read"),
        (["review", "{empty}", "--no-browser"], "holds no screening"),
        (["export", "{empty}", "--to", "csv", "--out", "{out}"], "holds no screening"),
        (["export", "{empty}", "--to", "tar", "--out", "{out}"], "'tar' is not one of"),
        (["nonsense"], "No such command"),
    ],
)
def test_errors_are_one_line_with_code_two(
    run: Any, easy_folder: Path, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = {n: str(tmp_path / n) for n in ("missing", "empty", "file", "out")} | {"images": str(easy_folder)}
    filled = [a.format(**names) for a in arguments]
    if filled[0] in ("screen", "fit") and "--backbone" not in filled:
        filled += TINY
    found = run(*filled, "--quiet")
    assert found.code == 2
    assert text in found.err
    assert found.err.count("\n") == 1
    assert found.err.startswith("flawsift: error: ")
    assert found.out == ""


def test_cache_commands(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    cache = ["--cache", tmp_path / "c"]
    run("screen", easy_folder, "--out", tmp_path / "s", *TINY, *cache)
    assert "50 images" in run("cache", "list", *cache).out
    assert "intact" in run("cache", "verify", *cache).out
    victim = next((tmp_path / "c").rglob("*.npy"))
    victim.write_bytes(victim.read_bytes()[:-1])
    broken = run("cache", "verify", *cache)
    assert broken.code == 1
    assert "SHA-256" in broken.out
    assert run("cache", "verify", "--repair", *cache).code == 0
    assert "intact" in run("cache", "verify", *cache).out
    assert "MB freed" in run("cache", "clear", *cache).out
    assert "empty" in run("cache", "list", *cache).out


def test_detectors_are_listed(run: Any) -> None:
    listed = run("detectors", "--json").json
    assert set(listed) == set(DETECTORS)
    assert listed["patchcore"]["params"]["coreset_ratio"] > 0
    assert listed["padim"]["presets"] == ["default", "paper"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["screen", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from flawsift.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'timm', 'openvino', 'sklearn', 'scipy', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout or "Options" in done.stdout


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "flawsift", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: flawsift [OPTIONS] COMMAND")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    command = tmp_path / "flawsift"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flawsift "$@"\n')
    command.chmod(0o755)
    script = """
        flawsift --install-completion >&2
        . ~/.bashrc
        COMP_WORDS=(flawsift scr) COMP_CWORD=1; _flawsift_completion flawsift; echo "${COMPREPLY[@]}"
        COMP_WORDS=(flawsift screen parts --det) COMP_CWORD=3; _flawsift_completion flawsift; echo "${COMPREPLY[@]}"
        [ "$(flawsift --show-completion)" = "$(cat ~/.bash_completions/flawsift.sh)" ] && echo same
    """
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["screen", "--detector --detector-preset", "same"], done.stderr
    assert done.stderr.startswith("bash completion installed in ")


def test_results_among_the_parts_are_not_scored(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(easy_folder, tmp_path / "parts"))
    assert run("fit", parts, *TINY, "--detector", "padim", "--no-screen", "--out", tmp_path / "m").code == 0
    for out in (parts, parts / "results"):
        for _ in range(2):
            found = run("predict", tmp_path / "m", parts, "--out", out, "--json")
            assert found.json["n_images"] == 50
    told = [line for line in found.err.splitlines() if line.startswith("flawsift: ")]
    assert found.json["log"] == [line.removeprefix("flawsift: ") for line in told]
    assert found.json["log"][0].startswith("100 pictures are left out, which flawsift wrote there")
    screened = run("screen", parts, *TINY, "--out", tmp_path / "s", "--json")
    assert screened.json["n_images"] == 50
    assert screened.json["log"] == found.json["log"]


def test_heatmaps_of_other_images_are_moved_aside(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    run("fit", easy_folder, *TINY, "--detector", "padim", "--no-screen", "--out", tmp_path / "m")
    one, two, out = easy_folder / "part-01.png", easy_folder / "part-02.png", tmp_path / "o"
    predict = ("predict", tmp_path / "m", "--out", out)

    def maps(folder: Path) -> list[str]:
        return sorted(path.name for path in (folder / "maps").glob("*.png"))

    run(*predict, one)
    assert "flawsift: " not in run(*predict, one).err  # each is replaced
    assert maps(out) == ["part-01.png.png"]
    assert "'earlier-1'" in run(*predict, two).err.replace(str(out) + "/", "")
    assert (maps(out), maps(out / "earlier-1")) == (["part-02.png.png"], ["part-01.png.png"])
    assert [row["path"] for row in table(out / "earlier-1" / "predictions.csv")] == ["part-01.png"]
    run(*predict, two, "--no-maps")
    assert (maps(out), maps(out / "earlier-2")) == ([], ["part-02.png.png"])
    (out / "maps").mkdir()
    shutil.copy(one, out / "maps" / "mine.png")
    (out / "predictions.csv").unlink()
    refused = run(*predict, two)
    assert refused.code == 2
    assert "1 files that are no heatmaps of flawsift: mine.png" in refused.err


def test_a_pipe_among_the_images_is_told(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(easy_folder, tmp_path / "parts"))
    os.mkfifo(parts / "pipe.png")
    (parts / "folder.jpg").mkdir()
    fitted = run("fit", parts, *TINY, "--detector", "padim", "--out", tmp_path / "m", "--json")
    assert (fitted.json["n_images"], fitted.json["n_kept"]) == (52, len(load_screening(tmp_path / "m/screening").kept))
    told = run("predict", tmp_path / "m", parts).out
    assert "Not readable: pipe.png: cannot be read: a named pipe, not a file" in told
    assert "Not readable: folder.jpg: cannot be read: a folder, not a file" in told
    for kind in ("folder", "coco", "labelstudio"):
        assert run("export", tmp_path / "m", "--to", kind, "--out", tmp_path / kind).code == 0


WAITING = """
import time
from flawsift.cli.main import app, main

@app.command()
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(600)

main(["wait"])
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_end_a_command_with_a_word(name: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(getattr(signal, name))
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on where it was" in told
    assert "Traceback" not in told


def test_the_name_of_an_image_is_one_line_and_steers_no_terminal(run: Any, easy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    names = ["a\n0 images are anomalous.png", "\x1b[31mred.png", "\u202egnp.png"]
    for name, part in zip(names, sorted(easy_folder.glob("*.png")), strict=False):
        shutil.copy(part, tmp_path / "parts" / name)
    found = run("screen", tmp_path / "parts", "--out", tmp_path / "s")
    assert found.code == 0, found.err
    for shown in (r"a\n0 images are anomalous.png", r"\x1b[31mred.png", r"\u202egnp.png"):
        assert f"  {shown}\n" in found.out
    missing = run("predict", tmp_path / "m", "\x1b[31m")
    assert "\x1b" not in missing.err
