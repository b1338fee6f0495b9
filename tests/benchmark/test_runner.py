"""The grid: cells, rows that are made once, failures that do not stop the rest, and figures that say what they mean."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flawsift.benchmark.config import parse_config
from flawsift.benchmark.forecast import rough_seconds
from flawsift.benchmark.grid import Config, done_places, plan
from flawsift.benchmark.rows import Row, append_rows, read_rows
from flawsift.benchmark.runner import prepare, run
from flawsift.benchmark.trial import Trial
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import make_detector
from flawsift.executors import Processes, Run
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.metrics import ranking
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, evaluate
from flawsift.models.plan import TrainingPlan, calibrate, judge
from flawsift.screening.options import PRESETS
from flawsift.screening.stage1 import reselected, screen
from flawsift.testing import tiny_backbone

SMALL: dict[str, Any] = {
    "alphas": [0.0, 0.2],
    "seeds": [0],
    "presets": ["none", "paper", "default", "oracle_clean"],
    "backbone": {"name": "tiny", "size": 64},
    "data": [{"name": "synthetic", "n_normal": 40, "n_anomalous": 24, "size": 64, "seed": 0}],
    "detectors": [{"name": "padim", "params": {"n_features": 10}}],
    "examples": 2,
}


def grid(**changes: Any) -> Config:
    return parse_config({**SMALL, **changes})


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    """Each test prepares its own data: stores differ."""
    prepare.cache_clear()
    yield
    prepare.cache_clear()


def split(easy: Dataset, tiny: Backbone) -> tuple[ImageSet, ImageSet]:
    cut = contaminate(easy.truth, alpha=0.2, n_train=20, test_normal=10, test_anomalous=5, seed=0)
    images, _ = attach(easy.images, tiny, ("stride8", "stride16"))
    return images.select(cut.train_ids), images.select(cut.test_ids)


def compare(
    train: ImageSet,
    test: ImageSet,
    truth: GroundTruth,
    detector: Detector,
    presets: list[str],
    *,
    seed: int,
    on_fitted: Any = None,
    **options: Any,
) -> list[Row]:
    """The rows of one trial on the test backbone."""
    backbone = tiny_backbone()
    trial = Trial(
        train=train, test=test, truth=truth, detector=detector, backbone=backbone, run=Run(seed=seed), **options
    )
    return trial.rows(presets, on_fitted)


# ---- one cell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_a_selection_from_the_score_matrix_is_that_of_a_screening(easy: Dataset, tiny: Backbone, preset: str) -> None:
    train, _ = split(easy, tiny)
    detector = make_detector("padim", n_features=10)
    other = screen(train, detector, PRESETS["default" if preset == "paper" else "paper"], Run(seed=3))
    mine = screen(train, detector, PRESETS[preset], Run(seed=3))
    again = reselected(other, PRESETS[preset], detector, train)
    assert again.kept.tolist() == mine.kept.tolist()
    np.testing.assert_array_equal(again.consensus, mine.consensus)
    assert (again.contamination is None) == (mine.contamination is None)


def test_compare_trains_each_sub_model_and_each_selection_once(
    easy: Dataset, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = split(easy, tiny)
    detector = make_detector("patchcore", coreset_ratio=0.05)
    fitted: list[list[int]] = []
    original = type(detector).fit

    def fit(self: Any, data: ImageSet, **options: Any) -> Any:
        fitted.append(data.ids.tolist())
        return original(self, data, **options)

    monkeypatch.setattr(type(detector), "fit", fit)
    clean = replace(easy.truth, labels=np.where(np.isin(easy.truth.ids, train.ids), 0, easy.truth.labels))
    rows = compare(train, test, clean, detector, ["none", "oracle_clean", "paper"], seed=0)
    # five sub-models; "none" and "oracle_clean" train on the same images where all are normal
    assert [len(ids) for ids in fitted] == [4, 4, 4, 4, 4, 20, 8]
    assert [row["preset"] for row in rows] == ["none", "oracle_clean", "paper"]
    assert rows[0]["image_auroc"] == rows[1]["image_auroc"]


def test_another_screener_leaves_thresholds_to_halves_of_what_is_kept(easy: Dataset, tiny: Backbone) -> None:
    train, test = split(easy, tiny)
    detector, presets = make_detector("softpatch", coreset_ratio=0.05), ["none", "default"]
    none, default = compare(train, test, easy.truth, detector, presets, seed=0)
    assert (none["screener"], default["screener"]) == (None, "quorum")
    stage1 = screen(train, make_detector("quorum", seed=0), PRESETS["default"], Run(seed=0))
    purified = stage1.purified(train, detector)
    plan = TrainingPlan(purified, stage1.kept, train)
    judged = judge(plan, detector)
    assert judged.ids.tolist() == purified.ids.tolist()
    model = Model(detector.clone().fit(purified), tiny, calibrate(plan, judged), {})
    expected, _ = evaluate(model, test, easy.truth)
    assert {k: default[k] for k in ("image_auroc", "missed_per_100")} == {
        k: expected[k] for k in ("image_auroc", "missed_per_100")
    }
    plain = compare(train, test, easy.truth, detector, presets, seed=0, calibrate=False)
    assert [row["missed_per_100"] for row in plain] == [None, None]
    assert [row["image_auroc"] for row in plain] == [none["image_auroc"], default["image_auroc"]]
    own = compare(train, test, easy.truth, detector, presets, seed=0, screener="own", calibrate=False)
    assert own[1]["screener"] == "softpatch"
    assert own[0]["missed_per_100"] is not None, "the preset's sub-models have judged all images"


def test_figures_of_a_row_mean_what_they_say(easy: Dataset, tiny: Backbone) -> None:
    train, test = split(easy, tiny)
    detector = make_detector("padim", n_features=10)
    fitted: dict[str, Model] = {}
    rows = compare(train, test, easy.truth, detector, ["paper", "oracle_clean"], seed=1, on_fitted=fitted.__setitem__)
    stage1 = screen(train, detector, PRESETS["paper"], Run(seed=1))
    labels = easy.truth.select(stage1.kept).labels
    paper, oracle = rows
    assert (paper["kept_normal"], paper["kept_anomalous"]) == ((labels == 0).sum(), labels.sum())
    assert paper["keep_share"] == 0.4
    assert paper["alpha_kept"] == pytest.approx(labels.mean())
    assert (oracle["kept_normal"], oracle["kept_anomalous"]) == (16, 0)
    assert "alone_normal" not in oracle
    # each sub-model alone keeps as many
    assert paper["alone_normal"] + paper["alone_anomalous"] == pytest.approx(8)
    by_hand = []
    for scores in stage1.submodel_scores.score_matrix:
        kept = train.ids[np.argsort(scores, kind="stable")[:8]]
        by_hand.append(easy.truth.select(kept).labels.sum())
    assert paper["alone_anomalous"] == pytest.approx(np.mean(by_hand))
    # metrics are those of a plain fit on the kept images
    model = Model(
        detector.clone().fit(stage1.purified(train, detector)),
        tiny,
        Calibration.of([]),
        {},
    )
    plan = TrainingPlan(stage1.purified(train, detector), stage1.kept, train, screening=stage1)
    model = replace(model, calibration=calibrate(plan, judge(plan, model.detector, Run(seed=1))))
    expected, _ = evaluate(model, test, easy.truth)
    shown = ("image_auroc", "aupro", "pixel_ap", "missed_per_100", "hits_per_100")
    assert {k: paper[k] for k in shown} == {k: expected[k] for k in shown}
    assert paper["hits_per_100"] is not None
    assert paper["model_bytes"] > 1000
    assert set(fitted) == {"paper", "oracle_clean"}


def test_many_pixels_are_streamed_and_never_held(
    easy: Dataset, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = split(easy, tiny)
    model = Model(make_detector("padim", n_features=10).fit(train), tiny, Calibration.of([]), {})
    exact, prediction = evaluate(model, test, easy.truth)
    held: list[Any] = []
    original = ranking.evaluate

    def watch(ids: Any, scores: Any, truth: Any, maps: Any = None) -> Any:
        held.append(maps)
        return original(ids, scores, truth, maps)

    monkeypatch.setattr(ranking, "evaluate", watch)
    streamed, again = evaluate(model, test, easy.truth, exact_pixels=1000)
    assert held == [None]
    np.testing.assert_array_equal(prediction.scores, again.scores)
    assert streamed["image_auroc"] == exact["image_auroc"]
    assert abs(streamed["aupro"] - exact["aupro"]) <= streamed["aupro_bound"] + 1e-9
    assert streamed["pixel_auroc"] is None
    assert evaluate(model, test, easy.truth, exact_pixels=15 * 64 * 64)[0]["pixel_auroc"] is not None
    normal = test.select(test.ids[easy.truth.select(test.ids).labels == 0])
    assert evaluate(model, normal, easy.truth, exact_pixels=1000)[0]["aupro"] is None


# ---- running ---------------------------------------------------------------------------------------------------------


def test_rows_say_where_they_come_from_and_are_made_once(tmp_path: Path) -> None:
    config = grid()
    first = run(config, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "results.csv")
    assert len(rows) == len(first) == 2 * 4
    wanted = {
        "commit",
        "machine",
        "versions",
        "data_digest",
        "weights_digest",
        "detector",
        "params",
        "alpha",
        "protocol",
    }
    wanted |= {"seed", "image_auroc", "aupro", "seconds_stage1", "seconds_stage2", "peak_mb", "model_bytes", "key"}
    assert wanted <= set(rows[0])
    assert json.loads(rows[0]["params"])["n_features"] == 10
    assert len({r["key"] for r in rows}) == 8
    assert {r["alpha_reached"] for r in rows if r["alpha"] == "0.2"} == {"0.214286"}  # 6 of 28
    assert run(config, tmp_path / "out") == []
    (tmp_path / "out" / "results.csv").write_text(
        "".join((tmp_path / "out" / "results.csv").read_text().splitlines(keepends=True)[:-2])
    )
    again = run(config, tmp_path / "out")
    assert [r["preset"] for r in again] == ["default", "oracle_clean"]  # the cell's other presets were there
    last = {r["key"]: r["image_auroc"] for r in first}
    assert all(last[r["key"]] == r["image_auroc"] for r in again)


def test_a_row_is_found_by_all_that_decides_it(tmp_path: Path) -> None:
    base = grid(alphas=[0.2], presets=["none"])
    keys = {run(base, tmp_path / "a")[0]["key"]}
    changes: list[Mapping[str, Any]] = [
        {"seeds": [1]},
        {"presets": ["paper"]},
        {"subsets": [3]},
        {"protocols": ["overlap"]},
        {"alphas": [0.1]},
        {"detectors": [{"name": "padim", "params": {"n_features": 9}}]},
        {"backbone": {"name": "tiny", "size": 32}},
        {"data": [{**SMALL["data"][0], "seed": 1}]},
        {"data": [{**SMALL["data"][0], "n_train": 20}]},
    ]
    for number, change in enumerate(changes):
        config = parse_config({**SMALL, "alphas": [0.2], "presets": ["none"], **change})
        keys.add(run(config, tmp_path / str(number))[0]["key"])
    assert len(keys) == 1 + len(changes)


def test_other_commits_count_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grid(alphas=[0.0], presets=["none"])
    run(config, tmp_path)
    monkeypatch.setattr("flawsift.benchmark.runner.source_commit", lambda: "another")
    assert run(config, tmp_path, any_commit=True) == []
    assert len(run(config, tmp_path)) == 1
    assert run(config, tmp_path) == []
    assert len(run(config, tmp_path, fresh=True)) == 1


def test_a_failing_cell_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grid(
        data=[{"name": "visa", "categories": ["candle"], "root": str(tmp_path)}, SMALL["data"][0]],
        alphas=[0.0],
        presets=["none", "paper"],
        detectors=[{"name": "padim", "params": {"n_features": 10}}, {"name": "patchcore"}],
    )
    seen: list[int] = []
    made = run(config, tmp_path / "out", on_cell=lambda cell, rows: seen.append(len(rows)))
    failed = [r for r in made if r.get("error")]
    assert {(r["data"], r["category"]) for r in failed} == {("visa", "candle")}
    assert all("1cls.csv' cannot be read" in r["error"] for r in failed)
    assert len(failed) == 4
    assert len(made) - len(failed) == 4
    assert seen == [2, 2, 2, 2]
    rows = read_rows(tmp_path / "out" / "results.csv")
    assert len(done_places(rows)) == 4
    again = run(config, tmp_path / "out")
    assert len(again) == 4
    assert all(r.get("error") for r in again)


def test_anything_that_goes_wrong_in_a_cell_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(self: Any, data: Any, **options: Any) -> Any:
        raise RuntimeError("odd\nnumbers")

    monkeypatch.setattr(type(make_detector("padim")), "fit", fit)
    (row,) = run(grid(alphas=[0.0], presets=["none"]), tmp_path)
    assert row["error"] == "RuntimeError: odd numbers"


def test_workers_make_the_same_rows(tmp_path: Path) -> None:
    config = grid(presets=["none", "default"])
    alone = run(config, tmp_path / "a")
    together = run(config, tmp_path / "b", executor=Processes(workers=2))
    within = run(replace(config, fan_out="submodels", alphas=(0.2,)), tmp_path / "c", executor=Processes(workers=1))
    figures = ("key", "image_auroc", "aupro", "kept_normal", "alone_anomalous", "data_digest")

    def of(rows: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
        return {r["key"]: [r.get(f) for f in figures] for r in rows}

    assert of(alone) == of(together)
    assert of(within) == of([r for r in alone if r["alpha"] == "0.2"])
    for folder, n in (("a", 4), ("b", 4), ("c", 2)):
        assert len(list((tmp_path / folder / "maps").glob("*.npz"))) == n


def test_maps_of_examples_hold_no_picture(tmp_path: Path) -> None:
    rows = run(grid(alphas=[0.2], seeds=[0, 1], presets=["none"]), tmp_path)
    (path,) = (tmp_path / "maps").iterdir()  # of the first seed only
    assert path.stem in {r["key"] for r in rows if r["seed"] == "0"}
    with np.load(path) as arrays:
        assert set(arrays) == {"ids", "scores", "grids", "scale"}
        assert len(arrays["ids"]) == 2
        assert arrays["grids"].shape[0] == 2
        assert arrays["grids"].dtype == np.float16


def test_cells_that_were_done_are_handed_back_empty(tmp_path: Path) -> None:
    config = grid(alphas=[0.0], presets=["none"])
    calls: list[int] = []
    run(config, tmp_path)
    run(config, tmp_path, on_cell=lambda _, rows: calls.append(len(rows)))
    assert calls == [0]


def test_new_columns_keep_old_rows(tmp_path: Path) -> None:
    append_rows(tmp_path / "r.csv", [{"a": 1}])
    append_rows(tmp_path / "r.csv", [{"a": 2, "b": 0.25}])
    with (tmp_path / "r.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "0.25"}]


def test_processes_that_add_rows_at_once_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    code = "import sys; from pathlib import Path; from flawsift.benchmark.rows import Row, append_rows\n"
    code += "for row in range(40): append_rows(Path(sys.argv[1]), [{'worker': sys.argv[2], 'row': row}])"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len(read_rows(path)) == 120
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["r.csv"]


def test_the_command_runs_resumes_plans_and_reports(cli: Any, tmp_path: Path) -> None:
    lines = ["alphas = [0.0, 0.2]", "seeds = [0]", 'presets = ["none", "paper"]', "examples = 1"]
    lines += ["[backbone]", 'name = "tiny"', "size = 64"]
    lines += ["[[data]]", 'name = "synthetic"', "n_normal = 40", "n_anomalous = 24", "size = 64"]
    lines += ["[[detectors]]", 'name = "padim"', "params = {n_features = 10}"]
    (tmp_path / "g.toml").write_text("\n".join(lines))
    out = tmp_path / "out"
    code, text, _ = cli("benchmark", tmp_path / "g.toml", "--out", out, "--dry-run")
    assert code == 0
    assert "2 of 2 cells to run, 2 presets each: none, paper." in text
    assert "No earlier row tells how long 2 of the cells take." in text
    assert "Rough guess for 2 cells" in text
    assert cli("benchmark", tmp_path / "g.toml", "--dry-run")[:2] == (0, text)
    code, _, error = cli("benchmark", tmp_path / "g.toml")
    assert (code, "Give --out FOLDER" in error) == (2, True)
    assert not out.exists()
    code, text, _ = cli("benchmark", tmp_path / "g.toml", "--out", out, "--json")
    assert (code, json.loads(text)["n_rows"]) == (0, 4)
    assert json.loads(cli("benchmark", tmp_path / "g.toml", "--out", out, "--json")[1])["n_rows"] == 0
    assert "0 of 2 cells to run" in cli("benchmark", tmp_path / "g.toml", "--out", out, "--dry-run")[1]
    code, text, _ = cli(
        "benchmark-report", out, "--out", tmp_path / "report", "--config", tmp_path / "g.toml", "--json"
    )
    assert code == 0
    assert set(json.loads(text)) == {"Markdown", "LaTeX", "HTML", "n_failed"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert not list(out.rglob("*.jp*g"))
    (tmp_path / "g.toml").write_text("\n".join(lines).replace('"synthetic"', '"synthetc"'))
    code, text, _ = cli("benchmark", tmp_path / "g.toml", "--out", tmp_path / "bad")
    assert code == 1
    assert "4 of them failed" in text
    assert "synthetc" in text
    code, text, _ = cli("benchmark", tmp_path / "g.toml", "--dry-run", "--json")
    assert (code, list(json.loads(text)["missing"])) == (0, ["synthetc"])
    code, text, _ = cli("benchmark-report", tmp_path / "bad", "--out", tmp_path / "report")
    assert code == 1
    assert text.startswith("WARNING: 2 cells failed.")
    assert (
        (tmp_path / "report" / "table.md")
        .read_text()
        .startswith("2 cells failed; the tables lack them:\n\n- synthetc,")
    )
    assert (tmp_path / "report" / "table.tex").read_text().startswith("% 2 cells failed")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.index("Failed cells") < page.index("Accuracy</h2>")


def test_sets_are_looked_for_below_the_data_root(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSIFT_DATA", "")  # put back afterwards, as the command sets it
    lines = ['presets = ["none"]', "[[data]]", 'name = "cookie"', "[[detectors]]", 'name = "padim"']
    (tmp_path / "g.toml").write_text("\n".join(lines))
    reason = json.loads(cli("benchmark", tmp_path / "g.toml", "--dry-run", "--json")[1])["missing"]["cookie"]
    assert "--data-root" in reason
    call = ("benchmark", tmp_path / "g.toml", "--dry-run", "--json", "--data-root", tmp_path)
    reason = json.loads(cli(*call)[1])["missing"]["cookie"]
    assert f"'{tmp_path / 'cookie'}' does not exist. Get it from https://" in reason
    for folder in ("normal", "defect/scratch", "mask/scratch"):
        (tmp_path / "cookie" / folder).mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "cookie" / folder / "0.png")
    assert json.loads(cli(*call)[1])["missing"] == {}
    assert cli(*call[:-1], tmp_path / "none")[0] == 2


def test_a_training_is_guessed_to_take_longer_and_more_images_too() -> None:
    def guessed(detector: str, n_train: int) -> float:
        data = [{"name": "synthetic", "n_train": n_train}]
        return rough_seconds(plan(parse_config({"data": data, "detectors": [{"name": detector}]})))

    assert guessed("padim", 100) < guessed("padim", 200) < guessed("rd", 200) == guessed("destseg", 200)
