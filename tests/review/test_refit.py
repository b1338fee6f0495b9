"""Stage 2 with decisions, in a process of its own."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from flawsift import pipeline
from flawsift.detectors.registry import make_detector
from flawsift.errors import ModelError
from flawsift.features.backbones import Backbone
from flawsift.models import model as models
from flawsift.paths import show
from flawsift.progress import Stage
from flawsift.review.process import Refit
from flawsift.review.refit import LEFT_OUT, TAKEN_BACK, Before, refit, summary_of
from flawsift.review.server import make_app
from flawsift.review.session import Review
from flawsift.screening.options import FINAL
from flawsift.screening.storage import load_screening
from tests.review.material import BASE, PORT, TOKEN


def test_a_refit_runs_in_its_own_process_and_says_how_far_it_is(folder: Path) -> None:
    review = Review.open(folder)
    assert review.refit.command[1:4] == ["-P", "-m", "flawsift.review.refit"]
    report = (
        "import json, os, sys\nprint(json.dumps({'stage': 'detector', 'done': 1, 'total': os.getpid()}), flush=True)"
    )
    review.refit.command = [sys.executable, "-c", f"{report}\nsys.stdin.read()"]
    with TestClient(make_app(review, TOKEN, PORT), base_url=BASE) as client:
        assert client.post(f"/{TOKEN}/refit", json={}).status_code == 202
        assert client.post(f"/{TOKEN}/refit", json={}).status_code == 409
        deadline = time.monotonic() + 30
        while not (process := review.refit.status["total"]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process, 0)  # asks whether it is there
    with pytest.raises(ProcessLookupError):  # ended with the server
        os.kill(process, 0)


def test_a_refit_runs_no_code_of_the_working_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    review = Review.open(folder.resolve())
    review.store.touch()
    working = tmp_path / "working"
    working.mkdir()
    for name in ("csv", "random", "torch", "argparse"):
        (working / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(working)
    assert review.refit.start()
    deadline = time.monotonic() + 300
    while review.refit.status["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert review.refit.status["state"] == "done", review.refit.status
    assert not (tmp_path / "RAN").exists()


def test_a_refit_that_fails_says_why() -> None:
    failing = Refit([sys.executable, "-c", "print('noise'); print('{\"error\": \"no space\"}'); raise SystemExit(2)"])
    assert failing.start()
    deadline = time.monotonic() + 30
    while failing.status["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert failing.status == {"state": "failed", "message": "no space"}
    missing = Refit(["/nonexistent/python"])
    missing.start()
    assert missing.status["state"] == "failed"


@pytest.mark.parametrize(
    "noise", ["5", "null", '"text"', "[1]", '{"other": 1}', '{"stage": "x", "state": "done"}', "[" * 20_000]
)
def test_what_libraries_print_does_not_disturb_a_refit(noise: str) -> None:
    result = json.dumps({"result": {"n_kept": 3, "threshold": float("nan")}})
    made = Refit([sys.executable, "-c", f"print({noise!r}); print({result!r}); print({noise!r})"])
    assert made.start()
    deadline = time.monotonic() + 30
    while made.status["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert made.status == {"state": "done", "n_kept": 3, "threshold": None}


def test_refit_trains_with_the_decisions_and_reports(folder: Path, tmp_path: Path) -> None:
    screening = load_screening(folder)
    back = int(screening.removed[0])
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    (tmp_path / "d.csv").write_text(f"path,decision\n{names[back]},keep\n")
    stages: list[str] = []
    out = tmp_path / os.fsdecode(b"mod\xe9l")  # the page is told in UTF-8
    told = refit(folder, out, decisions=tmp_path / "d.csv", progress=lambda stage, done, total: stages.append(stage))
    result = summary_of(told, out, Before.of(screening, out))
    kept = screening.with_decisions({names[back]: "keep"})[0].kept
    assert back in kept
    assert result["n_kept"] == len(kept)
    assert result["promise"] == str(told.model.threshold()).partition(": ")[2]
    assert result["warning"] == told.model.calibration.warning
    json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
    assert Stage.TRAINING in stages
    assert (out / "model.json").exists()
    page = (out / "report.html").read_text("utf-8")
    assert "a person decided to keep 1 and to remove 0" in page
    assert models.load_model(out).training["n_kept"] == len(kept)


def test_a_refit_says_what_it_changed(folder: Path) -> None:
    screening, out = load_screening(folder), folder / "model"
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    back, gone = names[int(screening.removed[0])], names[int(screening.kept[0])]
    before = Before.of(screening, out)
    assert (before.n_kept, before.threshold) == (None, None)
    (folder / "d.csv").write_text(f"path,decision\n{back},keep\n")
    first = summary_of(refit(folder, out, decisions=folder / "d.csv"), out, before)
    before = Before.of(screening, out)
    assert before.n_kept == first["n_kept"]
    assert before.threshold == pytest.approx(first["threshold"], rel=1e-6)  # what is on disk is rounded
    (folder / "d.csv").write_text(f"path,decision\n{back},keep\n{gone},remove\n")
    second = summary_of(refit(folder, out, decisions=folder / "d.csv"), out, before)
    assert second["before"] == {"n_kept": before.n_kept, "threshold": before.threshold}
    wanted = screening.with_decisions({back: "keep", gone: "remove"})[0].is_kept
    moved = {part["to"]: part for part in second["moved"]}
    for to, stays in ((LEFT_OUT, True), (TAKEN_BACK, False)):
        expected = [
            show(n)
            for n, was, now in zip(screening.names, screening.is_kept, wanted, strict=True)
            if was != now and was == stays
        ]
        assert (moved[to]["names"], moved[to]["n"]) == (expected, len(expected))
    assert gone in moved[LEFT_OUT]["names"]
    assert back in moved[TAKEN_BACK]["names"]
    (out / "model.json").write_text("{")
    assert Before.of(screening, out).n_kept is None


def test_a_refit_replaces_a_model_by_one_of_its_kind(folder: Path, screened: Path, tiny: Backbone) -> None:
    out = folder / "model"
    final = make_detector("patchcore", coreset_ratio=0.02)
    pipeline.fit(screened / "parts", final, tiny, screening=folder, out=out, false_alarm_rate=0.07)
    (folder / "d.csv").write_text("path,decision\n")
    refit(folder, out, decisions=folder / "d.csv")
    model = models.load_model(out)
    assert (model.detector.name, model.detector.params()) == ("patchcore", final.params()), "the screening's is padim"
    assert model.training["false_alarm_rate"] == 0.07


@pytest.mark.parametrize("name", ["model.json", "detector.json", "manifest.json"])
def test_a_damaged_model_is_not_replaced_by_one_of_another_kind(
    name: str, folder: Path, screened: Path, tiny: Backbone
) -> None:
    out = folder / "model"
    pipeline.fit(screened / "parts", make_detector("patchcore", coreset_ratio=0.02), tiny, screening=folder, out=out)
    (folder / "d.csv").write_text("path,decision\n")
    whole = (out / name).read_bytes()
    for content in (whole.replace(b"0.02", b"0.03").replace(b'files"', b'file"'), b"", None):
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        if content is None and name == "manifest.json":
            break  # as of an earlier version
        with pytest.raises(ModelError, match="is damaged"):
            refit(folder, out, decisions=folder / "d.csv")


@pytest.mark.parametrize("named", [None, "patchcore"])
def test_a_first_refit_has_the_detector_of_the_screening(
    named: str | None, screened: Path, tiny: Backbone, tmp_path: Path
) -> None:
    pipeline.screen(screened / "parts", named, tiny, out=tmp_path / "s", seed=3)
    (tmp_path / "d.csv").write_text("path,decision\n")
    for _ in range(2):  # without a model to replace, then with one
        refit(tmp_path / "s", tmp_path / "m", decisions=tmp_path / "d.csv")
        model = models.load_model(tmp_path / "m")
        assert model.detector.name == (named or FINAL)
        assert model.detector.params() == make_detector(named or FINAL, seed=3).params()
