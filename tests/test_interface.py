"""What users hand in and get back: any kind of images, stage 1 into stage 2, the same files as the commands write."""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image

import flawsift
from flawsift import pipeline
from flawsift.cli.main import main
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.detectors.patchcore import PatchCore
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.executors import Processes, Run
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.devices import resolve_device
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models.model import set_digest
from flawsift.progress import Stage
from flawsift.screening.options import ScreenOptions

SMALL = make_detector("patchcore", coreset_ratio=0.05)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kind", ["pattern", "list", "iterator", "arrays", "pil"])
def test_both_stages_take_what_users_have(kind: str, easy_folder: Path, tiny: Backbone, store: FeatureStore) -> None:
    paths = sorted(easy_folder.glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    given: dict[str, Any] = {
        "pattern": str(easy_folder / "*.png"),
        "list": paths,
        "iterator": iter(paths),
        "arrays": [np.asarray(picture) for picture in pictures],
        "pil": pictures,
    }
    expected = pipeline.screen(easy_folder, SMALL, tiny, store=store)
    screening = pipeline.screen(given[kind], SMALL, tiny, store=store)
    np.testing.assert_array_equal(screening.consensus, expected.consensus)
    images = paths if kind == "iterator" else given[kind]
    fitted = pipeline.fit(images, SMALL, tiny, screening=screening, store=store)
    assert fitted.plan.kept.tolist() == expected.kept.tolist()
    assert fitted.screening is screening
    assert fitted.model.predict(images).scores.tolist() == fitted.model.predict(easy_folder).scores.tolist()


def test_what_is_no_image_is_told_in_one_line(tiny: Backbone) -> None:
    for wrong in (3, None, {"a": 1}, [1, 2], ["a.png", object()]):
        with pytest.raises(TypeError, match="array") as error:
            pipeline.screen(wrong, SMALL, tiny)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["patchcore", "padim", "softpatch"])
def test_a_screening_in_memory_and_on_disk_give_the_same_model(
    name: str, easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    detector = make_detector(name)
    made = pipeline.screen(easy_folder, SMALL, tiny, store=store, out=tmp_path / "s")
    in_memory, on_disk = (
        pipeline.fit(easy_folder, detector, tiny, screening=given, store=store) for given in (made, tmp_path / "s")
    )
    assert in_memory.plan.kept.tolist() == on_disk.plan.kept.tolist()
    assert set_digest(in_memory.plan.images) == set_digest(on_disk.plan.images)
    np.testing.assert_allclose(
        in_memory.model.calibration.scores, on_disk.model.calibration.scores, rtol=1e-6
    )  # the table has nine digits


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_functions_write_the_files_that_the_commands_write(
    easy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--backbone", "tiny", "--size", "64", "--cache", str(tmp_path / "cache")]
    backbone, store = flawsift.load_backbone("tiny", size=64), FeatureStore(tmp_path / "cache")
    for command, function in (("screen", flawsift.screen), ("fit", flawsift.fit)):
        by_command, by_function = tmp_path / f"{command}-1", tmp_path / f"{command}-2"
        with pytest.raises(SystemExit) as ended:
            main([command, str(easy_folder), "--out", str(by_command), *network])
        assert ended.value.code == 0
        function(easy_folder, backbone=backbone, store=store, out=by_function)
        states = {name for name in files_below(by_command) if name.startswith("state-")}
        assert files_below(by_command) == files_below(by_function)
        assert "report.html" in files_below(by_function)
        assert bool(states) == (command == "fit")
    capsys.readouterr()


def test_a_screening_from_memory_lies_beside_its_model(
    easy: Dataset, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    """Images in memory have no folder: the page shows them all the same."""
    screening = pipeline.screen(easy.images, SMALL, tiny, store=store)
    fitted = pipeline.fit(easy.images, SMALL, tiny, screening=screening, store=store, out=tmp_path / "m")
    assert fitted.report == tmp_path / "m" / "report.html"
    assert fitted.report.read_text("utf-8").count("data:image/jpeg") > 20
    again = flawsift.load_screening(tmp_path / "m" / "screening")
    assert again.kept.tolist() == screening.kept.tolist()
    assert fitted.decisions == {"keep": 0, "remove": 0, "unsure": 0, "elsewhere": 0}


def test_progress_is_told_to_whoever_asks(easy: Dataset, tiny: Backbone, store: FeatureStore, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def listen(stage: str, done: int, total: int) -> None:
        told.setdefault(stage, []).append((done, total))

    for screener, own in (("quorum", Stage.LEARNING), ("patchcore", Stage.PARTS)):
        told.clear()
        options = ScreenOptions(screener=screener)
        fresh = FeatureStore(tmp_path / screener)
        pipeline.fit(easy.images, SMALL, tiny, options=options, store=fresh, progress=listen, out=tmp_path / "m")
        # PatchCore's threshold comes from two more models
        last = [
            Stage.COMPARING,
            Stage.COUNTING,
            Stage.TRAINING,
            Stage.THRESHOLD,
            *([Stage.PARTS] if own != Stage.PARTS else []),
            Stage.WRITING,
        ]
        assert list(told) == [Stage.CHECKING, Stage.READING, Stage.LOOKING, own, *last]
        for stage in (Stage.READING, Stage.LOOKING, Stage.COMPARING):
            assert (50, 50) in told[stage]
        # of 50 images k is chosen, and of 25 the scale
        steps = [(0, 1), *((i, 75) for i in range(50)), (50, 75), (75, 75)]
        models = [(m, 5) for m in range(5)]
        assert told[own] == (steps if own == Stage.LEARNING else models)
    for progress in (True, False, None):
        pipeline.screen(easy.images, SMALL, tiny, store=store, progress=progress)


class Stepwise(PatchCore):
    """Tells of four steps, as a training does."""

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        for step in range(4):
            watch.progress("training", step + 1, 4)
        return super().fit(data, device=device)


def test_the_steps_of_several_models_are_counted_together(easy: Dataset, tiny: Backbone, store: FeatureStore) -> None:
    told: list[tuple[str, int, int]] = []
    options = ScreenOptions(rank_by="submodels", n_subsets=2, n_partitions=2)
    detector = Stepwise(coreset_ratio=0.05)
    pipeline.screen(easy.images, detector, tiny, options=options, store=store, progress=lambda *one: told.append(one))
    parts = [(done, total) for stage, done, total in told if stage == Stage.PARTS]
    assert parts[0] == (0, 4), "how many steps a training takes is not known yet"
    assert [total for _, total in parts[1:]] == [16] * (len(parts) - 1)
    assert [done for done, _ in parts] == [0, *range(1, 5), *range(4, 9), *range(8, 13), *range(12, 17)]
    compared = [stage for stage, done, total in told if stage == Stage.COMPARING and done == total == 50]
    assert len(compared) == 2, "once for each partition"


def test_a_screening_shows_itself(easy: Dataset, tiny: Backbone, store: FeatureStore) -> None:
    screening = pipeline.screen(easy.images, SMALL, tiny, options=ScreenOptions(keep=0.8), store=store)
    text = repr(screening)
    assert text.startswith("Screening of 50 images, 10 set aside, 40 kept\nmost anomalous: array-")
    page = screening._repr_html_()
    assert page.count("<img") == 12
    assert "set aside" in page
    table = screening.to_pandas()
    assert table["kept"].sum() == 40
    assert table.loc[int(screening.ranking[0]), "consensus"] == screening.consensus.max()


def test_a_fit_shows_itself(easy: Dataset, tiny: Backbone, store: FeatureStore, tmp_path: Path) -> None:
    fitted = pipeline.fit(easy.images, SMALL, tiny, store=store, out=tmp_path / "m")
    assert repr(fitted).startswith("Model: patchcore on tiny at 64 pixels, trained on ")
    assert repr(fitted).endswith(f"\nwritten to {tmp_path / 'm'}")
    assert "\n" not in repr(fitted.plan)


def test_options_at_the_wrong_place_are_told_where_they_belong(easy: Dataset, tiny: Backbone) -> None:
    for function in (pipeline.screen, pipeline.fit):
        with pytest.raises(TypeError, match=r"options=ScreenOptions\(keep=...\)"):
            function(easy.images, SMALL, tiny, keep=0.8)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="Did you mean 'device'"):
            function(easy.images, SMALL, tiny, devise="cpu")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"executor": "proces:2"}, r"Unknown executor 'proces'. Did you mean 'process'\? Known: process, ray, serial"),
        ({"executor": 2}, "executor must be a text such as 'process:4', or Serial.*, got 2"),
        ({"device": "tpu"}, "device 'tpu' cannot be used here: there is auto, cpu"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": None}, "device 'None' cannot be used here"),
        ({"seed": "x"}, "seed must be a whole number that is not negative, got 'x'"),
        ({"seed": -1}, "seed must be a whole number that is not negative, got -1"),
        ({"progress": "yes"}, "progress must be True, False, None or a function, got 'yes'"),
        ({"store": "cache"}, "store must be a FeatureStore, such as FeatureStore.folder., got 'cache'"),
    ],
)
def test_resources_that_are_not_there_are_told_before_any_work(
    given: dict[str, Any], text: str, easy: Dataset, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "attach", None)
    for function in (pipeline.screen, pipeline.fit):
        with pytest.raises(ParameterError, match=text):
            function(easy.images, SMALL, tiny, **given)


def test_an_executor_by_its_line(easy: Dataset, tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def seen(data: Any, screener: Any, options: Any, run: Run, **_: Any) -> Any:
        runs.append(run)
        raise InputError("seen")

    monkeypatch.setattr(pipeline, "screen_and_fit", seen)
    for given in ("process:2", Processes(workers=2)):
        with pytest.raises(InputError, match="seen"):
            pipeline.screen(easy.images, SMALL, tiny, executor=given)
    assert [run.executor for run in runs] == [Processes(workers=2), Processes(workers=2)]
    with pytest.raises(ParameterError, match="executor must be Serial"):
        Run(executor="process:2")  # type: ignore[arg-type]


def test_a_device_is_one_for_backbones_and_detectors(easy: Dataset, tiny: Backbone, store: FeatureStore) -> None:
    data = attach(easy.images.select(range(6)), tiny, SMALL.layers, store=store)[0]
    fitted = SMALL.clone().fit(data, device="cpu")
    for work in (
        lambda: SMALL.clone().fit(data, device="tpu"),
        lambda: fitted.predict(data, device="tpu"),
        lambda: load_backbone("tiny", device="tpu"),
        lambda: resolve_device("tpu"),
    ):
        with pytest.raises(ParameterError, match="device 'tpu' cannot be used here: there is auto, cpu"):
            work()
    assert resolve_device("cpu") == "cpu"


def test_decisions_of_a_caller_are_checked_as_those_of_a_file(
    easy: Dataset, tiny: Backbone, store: FeatureStore
) -> None:
    screening = pipeline.screen(easy.images, SMALL, tiny, options=ScreenOptions(keep=0.8), store=store)
    first = screening.names[int(np.flatnonzero(screening.is_kept)[0])]
    kept = pipeline.fit(easy.images, SMALL, tiny, screening=screening, decisions={first: " Keep"}, store=store)
    assert kept.plan.kept.tolist() == screening.kept.tolist()
    with pytest.raises(ParameterError, match="must be keep, remove or unsure, got 'maybe'"):
        pipeline.fit(easy.images, SMALL, tiny, screening=screening, decisions={first: "maybe"}, store=store)
    with pytest.raises(TypeError, match="screening must be a Screening or its folder"):
        pipeline.fit(easy.images, SMALL, tiny, screening=3, store=store)  # type: ignore[arg-type]


def test_options_come_from_sweeps_and_not_from_infinity() -> None:
    swept = ScreenOptions(keep=np.float32(0.5), n_subsets=np.int64(3))  # type: ignore[arg-type]
    assert json.dumps([swept.keep, swept.n_subsets]) == "[0.5, 3]"
    for name in ("keep", "reject_patches", "divergence_weight"):
        for bad in (float("inf"), float("nan")):
            with pytest.raises(ParameterError, match=name):
                ScreenOptions.of("default", **{name: bad})
    with pytest.raises(ParameterError, match="ScreenOptions or default or paper, got None"):
        ScreenOptions.of(None)  # type: ignore[arg-type]


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(InputError, match="path of the images is empty"):
        flawsift.as_images("")


def test_a_screening_under_other_ids_shows_their_images(
    easy: Dataset, easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    pipeline.screen(easy_folder, SMALL, tiny, options=ScreenOptions(keep=0.8), store=store, out=tmp_path / "s")
    loaded = flawsift.load_screening(tmp_path / "s")
    backwards = sorted(easy_folder.glob("*.png"), reverse=True)
    planned = pipeline.fit(backwards, SMALL, tiny, screening=loaded, store=store).plan.screening
    assert planned is not None
    for screening in (loaded, planned):
        assert screening.images is not None
        shown = dict(zip(screening.images.ids.tolist(), screening.images.names, strict=True))
        assert [shown[i] for i in screening.ids.tolist()] == list(screening.names)
    kept = [
        path for path in backwards if path.name in {loaded.names[p] for p in np.flatnonzero(loaded.is_kept).tolist()}
    ]
    partial = pipeline.fit(kept, SMALL, tiny, screening=loaded, store=store).plan.screening
    assert partial is not None
    assert "<img" not in partial._repr_html_()


def test_options_are_presets_with_changes() -> None:
    paper = ScreenOptions.of("paper", n_subsets=3)
    assert (paper.n_subsets, paper.keep, paper.exclude_own) == (3, 0.4, False)
    assert ScreenOptions.of(paper, keep=0.5).n_subsets == 3
    with pytest.raises(ParameterError, match="Did you mean 'paper'"):
        ScreenOptions.of("papr")
    with pytest.raises(ParameterError, match="Did you mean 'n_subsets'"):
        ScreenOptions.of("paper", n_subset=3)


def test_every_option_of_stage_1_is_an_option_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """And reaches the screening: each is given another value than its preset's."""
    from flawsift.cli import options as cli

    fit_stage, screening_stage = (getattr(cli, name) for name in ("FitStage", "ScreeningStage"))

    changed: dict[str, Any] = {
        "screener": "padim",
        "rank_by": "submodels",
        "keep": "0.7",
        "reject_patches": 1.5,
        "n_subsets": 4,
        "n_partitions": 2,
        "consensus": "median",
        "normalize": "rank",
        "exclude_own": False,
        "divergence_weight": 0.5,
    }
    assert set(changed) == set(ScreenOptions().as_json())
    assert all(changed[name] != value for name, value in ScreenOptions().as_json().items())
    options = fit_stage(preset=cli.Preset["default"], **changed).options
    assert options.as_json() == {**changed, "keep": 0.7}
    assert fit_stage().options is None, "nothing was given"
    assert fit_stage(preset=cli.Preset["default"]).options == ScreenOptions()
    del changed["screener"]  # of `screen` that is --detector
    assert screening_stage(preset=cli.Preset["paper"], **changed).options == ScreenOptions.of(
        "paper", **{**changed, "keep": 0.7}
    )
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    others = ("--keep", "--reject-patches", "--subsets", "--include-own", "--divergence-weight")
    for flag in ("--screener", "--rank-by", *others):
        assert flag in text


def test_predict_answers_for_one_image(easy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = flawsift.load_backbone("tiny", size=64)
    flawsift.fit(easy_folder, SMALL, backbone, out=tmp_path / "m")
    files = [str(easy_folder / "part-45.png"), str(easy_folder / "part-00.png")]

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(tmp_path / "m"), *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    first = run(files[0]).splitlines()
    assert first[0].startswith("part-45.png  score ")
    assert "anomalous" in first[0]
    assert "p-value 0.0" in first[0]
    both = run(*files).splitlines()
    assert [line.split()[0] for line in both[:2]] == ["part-45.png", "part-00.png"], "the most anomalous first"
    assert both[2] == "1 of 2 images looks defective."
    told = json.loads(run(*reversed(files), "--json"))
    assert [image["path"] for image in told["images"]] == ["part-00.png", "part-45.png"], "in the order given"
    assert "20 more" not in run(str(easy_folder / "part-0*.png"))
    assert "and 30 more, which score lower" in run(str(easy_folder))
