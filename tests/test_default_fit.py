"""Both stages by the default detector, which needs no sub-models: what it learns, its threshold, few and odd images."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from flawsift import pipeline
from flawsift.cli.main import main
from flawsift.cli.options import DetectorChoice
from flawsift.cli.stages import fitted_lines
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.quorum import Quorum
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.paths import show
from flawsift.screening.held_out import rank_by_held_out_scores
from flawsift.screening.options import OF_SUBMODELS, ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import ranker_of
from flawsift.screening.storage import load_screening
from flawsift.screening.submodels import rank_by_submodels

EXACT = Quorum(precision="float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def screened(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Screening, Path]:
    """The screening by default, and its folder."""
    folder = tmp_path_factory.mktemp("screened")
    return pipeline.screen(easy_folder, EXACT, tiny, store=store, out=folder), folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass over held-out scores was about."""
    passes: list[int] = []
    held_out = Quorum.held_out

    def counted(self: Quorum, data: ImageSet, **options: Any) -> Any:
        passes.append(len(data))
        return held_out(self, data, **options)

    monkeypatch.setattr(Quorum, "held_out", counted)
    return passes


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_all_images_are_learned_and_the_kept_ones_set_the_threshold(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, asked: list[int]
) -> None:
    result = pipeline.fit(easy_folder, EXACT, tiny, store=store)
    screening = result.screening
    assert screening is not None
    assert 0 < len(screening.removed) < 25
    assert result.plan.images.ids.tolist() == list(range(50))
    assert result.plan.kept.tolist() == screening.kept.tolist()
    np.testing.assert_array_equal(
        result.model.calibration.scores, np.sort(screening.held_out_scores[screening.is_kept])
    )
    assert asked == [50], "nothing was left out: the scores of stage 1 are those of the model"


@pytest.mark.parametrize("way", ["anew", "in memory", "on disk", "decided before"])
def test_what_a_person_removed_is_not_learned(
    way: str,
    screened: tuple[Screening, Path],
    easy_folder: Path,
    tiny: Backbone,
    store: FeatureStore,
    asked: list[int],
) -> None:
    screening, folder = screened
    good, suspects = screening.kept[3], screening.removed
    name = dict(zip(screening.ids.tolist(), map(show, screening.names), strict=True))
    choices = {name[int(good)]: "remove", name[int(suspects[0])]: "remove", name[int(suspects[1])]: "keep"}
    ways: dict[str, dict[str, Any]] = {
        "anew": {"decisions": choices},
        "in memory": {"screening": screening, "decisions": choices},
        "on disk": {"screening": folder, "decisions": choices},
        "decided before": {"screening": screening.with_decisions(choices)[0]},
    }
    result = pipeline.fit(easy_folder, EXACT, tiny, store=store, **ways[way])
    learned = sorted({*range(50)} - {int(good), int(suspects[0])})
    kept = sorted(screening.with_decisions(choices)[0].kept.tolist())
    assert not {int(good), int(suspects[0])} & {*kept}
    assert int(suspects[1]) in kept
    assert result.plan.images.ids.tolist() == learned
    assert result.plan.kept.tolist() == kept
    data, _ = attach(ImageSet.from_folder(easy_folder), tiny, EXACT.layers, store=store)
    alone = EXACT.clone().fit(data.select(learned))
    assert asked == ([50] if way == "anew" else []) + [50], "the scores of stage 1 rest on what was removed"
    np.testing.assert_allclose(
        result.model.calibration.scores, np.sort(alone.held_out_scores(data.select(kept))), rtol=1e-5
    )
    np.testing.assert_allclose(
        result.model.detector.predict(data, maps=False).scores, alone.predict(data, maps=False).scores, rtol=1e-5
    )


def test_k_follows_what_a_person_left(easy_folder: Path, tiny: Backbone, store: FeatureStore) -> None:
    """Stage 1 hands over a model of all images; less some, it is the model of the others, k and all."""
    data, _ = attach(ImageSet.from_folder(easy_folder), tiny, EXACT.layers, store=store)
    whole, few = EXACT.clone().fit(data), EXACT.clone().fit(data.select(range(5)))
    left = whole.without(data.select(range(5, 50)))
    assert whole.k_ != few.k_, "this set does not tell"
    assert left.k_ == few.k_
    assert whole.without(data.select([])).k_ == whole.k_


def test_an_edited_table_removes_what_stage_one_had_kept(
    screened: tuple[Screening, Path], easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    screening, folder = screened
    dropped, returned = int(screening.kept[3]), int(screening.removed[0])
    with (folder / "screening.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("screening.json", "maps.npy", "rejected.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for row in rows:
        row["kept"] = {str(dropped): "0", str(returned): "1"}.get(row["id"], row["kept"])
    with (tmp_path / "screening.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert load_screening(folder).removed_by_hand.tolist() == []
    assert load_screening(tmp_path).removed_by_hand.tolist() == [dropped]
    plan = pipeline.fit(easy_folder, EXACT, tiny, store=store, screening=tmp_path).plan
    assert sorted({*range(50)} - {*plan.images.ids.tolist()}) == [dropped]
    assert dropped not in plan.kept
    assert returned in plan.kept
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    choices = {names[dropped]: "keep"}  # a later word counts
    plan = pipeline.fit(easy_folder, EXACT, tiny, store=store, screening=tmp_path, decisions=choices).plan
    assert plan.images.ids.tolist() == list(range(50))


def test_a_share_to_keep_is_what_is_learned(easy_folder: Path, tiny: Backbone, store: FeatureStore) -> None:
    result = pipeline.fit(easy_folder, EXACT, tiny, options=ScreenOptions(keep=0.7), store=store)
    assert len(result.plan.images) == len(result.plan.kept) == 35


def test_it_survives_the_disk_without_submodels(screened: tuple[Screening, Path]) -> None:
    made, folder = screened
    read = load_screening(folder)
    assert made.submodels is None
    assert read.submodels is None
    assert read.options == made.options
    assert (folder / "screening.csv").read_text().splitlines()[0] == (
        "id,path,held_out_score,divergence,consensus,defect_probability,kept,error"
    )
    np.testing.assert_allclose(read.consensus, made.consensus, rtol=1e-8)
    np.testing.assert_allclose(read.probability, made.probability, rtol=1e-3, atol=1e-300)
    assert read.kept.tolist() == made.kept.tolist()
    assert read.evidence is not None
    assert made.evidence is not None
    for name, values in vars(made.evidence).items():
        np.testing.assert_array_equal(getattr(read.evidence, name), values, err_msg=name)
    nearest = read.evidence.nearest(45)
    assert len(nearest) == 3
    assert 45 not in [i for i, _, _ in nearest]


# ---- which kind of stage 1 -------------------------------------------------------------------------------------------


def test_rank_by_is_checked_and_heeded(easy: Dataset, tiny: Backbone, store: FeatureStore) -> None:
    with pytest.raises(ParameterError, match=r"rank_by \(--rank-by\) must be one of auto, submodels, got 'vote'"):
        ScreenOptions(rank_by="vote")  # type: ignore[arg-type]
    by_submodels = ScreenOptions(rank_by="submodels", n_subsets=3)
    result = pipeline.screen(easy.images, EXACT, tiny, options=by_submodels, store=store)
    assert result.submodel_scores.score_matrix.shape == (3, 50)
    assert result.evidence is None
    assert pipeline.screen(easy.images, EXACT, tiny, store=store).evidence is not None


CHANGED: dict[str, Any] = {
    "n_subsets": 3,
    "n_partitions": 2,
    "consensus": "median",
    "normalize": "rank",
    "exclude_own": False,
    "divergence_weight": 0.5,
}


@pytest.mark.parametrize("name", OF_SUBMODELS)
def test_who_sets_an_option_of_submodels_has_them(
    name: str, easy: Dataset, tiny: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(CHANGED) == set(OF_SUBMODELS)
    assert ranker_of(EXACT, ScreenOptions()) is rank_by_held_out_scores
    options = ScreenOptions.of("default", **{name: CHANGED[name]})
    assert ranker_of(EXACT, options) is rank_by_submodels
    few = easy.images.select(easy.images.ids[:12])
    found = pipeline.screen(few, backbone=tiny, options=options, store=FeatureStore(tmp_path))
    assert found.submodels is not None
    assert "Images are ranked by sub-models, since --" in caplog.text
    caplog.clear()
    assert pipeline.screen(few, backbone=tiny, store=FeatureStore(tmp_path)).submodels is None
    assert "sub-models" not in caplog.text


def test_the_final_detector_is_that_of_all_images_whoever_ranked_them(easy: Dataset, tiny: Backbone) -> None:
    """Not a sum of sub-models, whose k and scale are those of a part; a run that went on after a kill has no sum."""
    options = ScreenOptions(rank_by="submodels", n_subsets=2, keep=1.0, reject_patches=0.0)
    by_submodels = pipeline.fit(easy.images, EXACT, tiny, options=options).model.detector
    alone = pipeline.fit(easy.images, EXACT, tiny, no_screen=True).model.detector
    assert isinstance(by_submodels, Quorum)
    assert isinstance(alone, Quorum)
    assert (by_submodels.k_, by_submodels.scale_) == (alone.k_, alone.scale_)


def test_options_of_a_stage_1_that_there_is_not_are_told_before_the_work(
    easy: Dataset, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("features were made")

    monkeypatch.setattr(tiny, "extract", never)
    options = ScreenOptions.of("default", keep=0.5)
    with pytest.raises(ParameterError, match=r"Without stage 1 .*, options of stage 1 \(--.*\) would not be read"):
        pipeline.fit(easy.images, backbone=tiny, options=options, no_screen=True, store=FeatureStore(tmp_path))


# ---- few and odd images ----------------------------------------------------------------------------------------------


def noise(n: int) -> list[npt.NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8))


def assert_finite(result: pipeline.FitResult) -> None:
    predicted = result.model.detector.predict(result.plan.images)
    assert np.isfinite(predicted.scores).all()
    assert predicted.maps is not None
    assert np.isfinite(predicted.maps).all()


ONE_IMAGE, ONE_GROUP = "there is only one image. Add images", "there is only one group of images. Add images"
# images, how many groups of as many images each (or None), and what is refused
ODD: dict[str, tuple[Callable[[], list[npt.NDArray[np.uint8]]], int | None, str | None]] = {
    "one image": (lambda: noise(1), None, ONE_IMAGE),
    "two images": (lambda: noise(2), None, None),
    "one group": (lambda: noise(6), 1, ONE_GROUP),
    "two groups": (lambda: noise(6), 2, None),
    "fewer groups than k": (lambda: noise(3), None, None),
    "identical": (lambda: noise(1) * 12, None, None),
    "constant": (lambda: [np.full((64, 64, 3), 127, np.uint8)] * 12, None, None),
    "black": (lambda: [np.zeros((64, 64, 3), np.uint8)] * 2, None, None),
    "identical but one": (lambda: [*noise(1) * 11, noise(2)[1]], None, None),
}


@pytest.mark.parametrize("detector", [Quorum(), Quorum(n_groups=16, precision="float32")], ids=["auto", "16"])
@pytest.mark.parametrize("name", ODD)
def test_odd_sets_are_fitted_or_refused(name: str, detector: Quorum, tiny: Backbone, tmp_path: Path) -> None:
    make, n_groups, refusal = ODD[name]
    images = ImageSet.from_arrays(make())
    if n_groups:
        images = replace(images, groups={i: f"g{i * n_groups // len(images)}" for i in range(len(images))})
    store = FeatureStore(tmp_path / "cache")
    if refusal:
        for run in (pipeline.screen, pipeline.fit):
            with pytest.raises(InputError, match=refusal):
                run(images, detector, tiny, store=store)
        alone = pipeline.fit(images, detector, tiny, no_screen=True, store=store)
        assert alone.model.threshold() is None
        assert_finite(alone)
        return
    result = pipeline.fit(images, detector, tiny, store=store, out=tmp_path / "m")
    screening = result.screening
    assert screening is not None
    assert np.isfinite(screening.consensus).all()
    assert screening.patch_maps is not None
    assert np.isfinite(screening.patch_maps).all()
    assert len(screening.kept) >= len(images) / 2
    threshold = result.model.threshold()
    assert threshold is not None
    assert np.isfinite(threshold.value)
    assert_finite(result)
    for page in (tmp_path / "m").rglob("report.html"):
        assert not re.search(r"\bnan\b", page.read_text("utf-8"), re.IGNORECASE)
    assert load_screening(tmp_path / "m" / "screening").kept.tolist() == screening.kept.tolist()


@pytest.mark.parametrize("name", ODD)
def test_odd_sets_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, n_groups, refusal = ODD[name]
    (tmp_path / "parts").mkdir()
    arrays = make()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "parts" / f"{i:02d}.png")
    arguments = [str(tmp_path / "parts"), "--out", str(tmp_path / "m"), "--backbone", "tiny", "--size", "64", "--json"]
    if n_groups:
        rows = [f"{i:02d}.png,g{i * n_groups // len(arrays)}\n" for i in range(len(arrays))]
        (tmp_path / "groups.csv").write_text("file,group\n" + "".join(rows))
        arguments += ["--groups", str(tmp_path / "groups.csv")]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--quiet"])
    told = capsys.readouterr()
    assert "nan" not in told.out.lower()
    if refusal:
        assert stop.value.code == 2
        assert told.err == f"flawsift: error: Images are compared with those of other groups, and {refusal}.\n"
    else:
        assert stop.value.code == 0, told.err
        assert np.isfinite(json.loads(told.out)["threshold"]["value"])


def test_what_was_removed_is_replaced_in_a_drawn_bank(easy_folder: Path, tiny: Backbone, store: FeatureStore) -> None:
    small = EXACT.clone(max_images=3)
    first = pipeline.fit(easy_folder, small, tiny, store=store)
    assert first.model.detector.n_drawn == 3
    assert any(
        "3 of them, drawn at random (--set max_images=null for all)" in x for x in fitted_lines(first, Path("m"))
    )
    assert DetectorChoice("quorum", settings=["max_images=null"]).make(0).params()["max_images"] is None
    assert first.screening is not None
    names = dict(zip(first.screening.ids.tolist(), map(show, first.screening.names), strict=True))
    removed = first.model.detector.state()["ids_"].tolist()
    decisions = {names[i]: "remove" for i in removed}
    again = pipeline.fit(easy_folder, small, tiny, store=store, decisions=decisions).model.detector
    assert again.n_drawn == 3
    assert not set(again.state()["ids_"].tolist()) & set(removed)
