"""Both stages on folders: what is trained on, what is written, what is refused."""

import copy
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import flawsift
from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.quorum import Quorum
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ModelError, OutputError, ParameterError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models import model as models
from flawsift.screening.options import FINAL, ScreenOptions
from flawsift.screening.stage1 import resolve_screener
from flawsift.screening.stage1 import screen as screen_features
from flawsift.screening.storage import load_screening, matched, save_screening
from flawsift.testing import SIZE

HALVES = ScreenOptions(n_subsets=2, keep=1.0, reject_patches=0.0)  # what a threshold is cross-fitted with
SMALL: dict[str, Detector] = {
    "patchcore": make_detector("patchcore", coreset_ratio=0.05),
    "padim": make_detector("padim", n_features=30),
}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache")


def left_out_scores(detector: Detector, data: ImageSet) -> Any:
    """Each image's score by a model of all others."""
    scores = []
    for i in data.ids:
        rest = data.select(data.ids[data.ids != i])
        scores.append(detector.clone().fit(rest).predict(data.select([i]), maps=False).scores[0])
    return np.array(scores)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_stage_two_trains_on_exactly_what_was_kept(
    name: str, tiny: Backbone, easy: Dataset, store: FeatureStore
) -> None:
    detector = SMALL[name]
    screening = pipeline.screen(easy.images, detector, tiny, options=ScreenOptions(keep=0.7), store=store)
    model = pipeline.fit(
        easy.images, detector, tiny, options=ScreenOptions(keep=0.7, screener="own"), store=store
    ).model
    data, _ = attach(easy.images, tiny, detector.layers, store=store)
    direct = detector.clone().fit(screening.purified(data, detector))
    test = data.select(easy.truth.ids[::3])
    found, expected = model.detector.predict(test, maps=False).scores, direct.predict(test, maps=False).scores
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert model.training["n_kept"] == 35
    judged = screening.held_out_scores[screening.is_kept]
    if name == "padim":
        judged = left_out_scores(detector, screening.purified(data, detector))
    np.testing.assert_allclose(model.calibration.scores, np.sort(judged), rtol=1e-2 if name == "padim" else 2e-3)


def test_the_default_detector_is_that_of_its_name(tiny: Backbone, easy: Dataset, store: FeatureStore) -> None:
    model = pipeline.fit(easy.images, backbone=tiny, store=store).model
    assert model.detector.name == FINAL
    assert model.training["detector"] == {"name": FINAL, "params": model.detector.params()}
    assert model.training["screener"] == FINAL
    assert model.training["rejected_patches"] == 0, "it resists defects: all of all images is learned"
    assert model.training["n_partly"] == 50 - model.training["n_kept"] > 0
    named = pipeline.fit(easy.images, Quorum(), tiny, store=store).model
    np.testing.assert_array_equal(model.calibration.scores, named.calibration.scores)


@pytest.mark.parametrize("screener", [FINAL, "patchcore"])
def test_a_saved_stage_one_gives_the_same_model(
    screener: str, tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    pipeline.screen(easy_folder, screener, tiny, store=store, out=tmp_path / "s")
    model = pipeline.fit(easy_folder, backbone=tiny, store=store, screening=tmp_path / "s").model
    expected = pipeline.fit(easy_folder, backbone=tiny, options=ScreenOptions(screener=screener), store=store).model
    assert model.detector.name == FINAL
    # those of stage 1 where it was of the same detector, from a table with nine digits; never those of PatchCore
    np.testing.assert_allclose(model.calibration.scores, expected.calibration.scores, rtol=1e-8)
    data, _ = attach(ImageSet.from_folder(easy_folder), tiny, model.detector.layers, store=store)
    found, wanted = (m.detector.predict(data, maps=False).scores for m in (model, expected))
    np.testing.assert_array_equal(found, wanted)


def test_a_screening_without_its_estimate_is_damaged(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    pipeline.screen(easy_folder, SMALL["patchcore"], tiny, store=store, out=tmp_path / "s")
    content = json.loads((tmp_path / "s" / "screening.json").read_text())
    del content["contamination"]
    (tmp_path / "s" / "screening.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged"):
        load_screening(tmp_path / "s")


def test_a_detector_that_learns_from_defects_keeps_them(tiny: Backbone, easy: Dataset, store: FeatureStore) -> None:
    detector = make_detector("funad", "budget", steps=2, hidden=(8,))
    result = pipeline.fit(easy.images, detector, tiny, store=store)
    model, stage1 = result.model, result.screening
    assert stage1 is not None
    assert model.training["n_kept"] == 50
    assert model.training["rejected_patches"] == 0
    assert model.training["screener"] == FINAL
    assert stage1.consensus[40:].mean() > np.quantile(stage1.consensus[:40], 0.9), "suspects are told all the same"
    told = pipeline.fit(easy.images, detector, tiny, options=ScreenOptions(keep=0.8), store=store)
    assert told.model.training["n_kept"] == 40


def test_padim_reads_removed_images_only_for_stage_two(tiny: Backbone, easy: Dataset, store: FeatureStore) -> None:
    fits: list[int] = []

    class Watched(type(SMALL["padim"])):  # type: ignore[misc]
        def _moments(self, data: ImageSet, device: str) -> Any:
            fits.append(len(data))
            return super()._moments(data, device)

    pipeline.fit(
        easy.images,
        Watched(n_features=30),
        tiny,
        options=ScreenOptions(screener="own", keep=0.9, reject_patches=0.0),
        store=store,
    )
    stages = [10, 10, 10, 10, 10, 5]  # k sub-models, then the five removed images are taken out
    assert fits == stages, "and nothing for the threshold"


def test_defects_are_ranked_first_and_a_screening_can_be_edited(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "screening"
    result = pipeline.screen(
        easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.8), store=store, out=out
    )
    assert set(result.ranking[:8].tolist()) <= set(range(40, 50))
    rows = table(out / "screening.csv")
    assert len(rows) == 50
    assert [r["path"] for r in rows if r["kept"] == "0"] == np.array(result.names)[~result.is_kept].tolist()
    content = json.loads((out / "screening.json").read_text())
    assert content["n_kept"] == 40
    assert content["options"]["keep"] == 0.8
    assert content["backbone"]["weights_digest"] == tiny.weights_digest
    assert np.load(out / "maps.npy").shape[0] == 50
    for row in rows:
        row["kept"] = "no" if row["path"] in ("part-00.png", "part-01.png") else "yes"
    with (out / "screening.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    model = pipeline.fit(easy_folder, SMALL["patchcore"], tiny, store=store, screening=out).model
    assert model.training["n_kept"] == 48


@pytest.mark.parametrize(("name", "saved"), [("padim", False), ("padim", True), ("softpatch", False)])
def test_another_detector_screens_and_the_threshold_is_the_final_ones_own(
    name: str, saved: bool, tiny: Backbone, easy: Dataset, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    final, first = SMALL.get(name) or make_detector(name), make_detector("patchcore")
    stage1 = pipeline.screen(easy_folder, first, tiny, store=store, out=tmp_path / "s")
    anew = {"options": ScreenOptions(screener="patchcore"), "out": tmp_path / "m"}
    given: dict[str, Any] = {"screening": tmp_path / "s"} if saved else anew
    model = pipeline.fit(easy_folder, final, tiny, store=store, **given).model
    data, _ = attach(ImageSet.from_folder(easy_folder), tiny, final.layers, store=store)
    purified = stage1.purified(data, final)
    assert model.training["kept_digest"] == models.set_digest(purified)
    if name == "padim":
        judged = left_out_scores(final, purified)[np.isin(purified.ids, stage1.kept)]
    else:
        judged = screen_features(purified, final, HALVES).held_out_scores
    np.testing.assert_allclose(model.calibration.scores, np.sort(judged), rtol=1e-2 if name == "padim" else 2e-3)
    direct = final.clone().fit(purified)
    test = data.select(easy.truth.ids[::3])
    np.testing.assert_allclose(model.detector.predict(test).scores, direct.predict(test).scores, rtol=2e-3)
    if not saved:
        assert model.training["screener"] == "patchcore"
        content = json.loads((tmp_path / "m" / "screening" / "screening.json").read_text())
        assert content["detector"]["name"] == "patchcore", "the screening says who made it"
        assert not (tmp_path / "m" / ".resume").exists()


def test_the_screener_reads_the_layers_of_the_detector_where_its_own_are_missing(tiny: Backbone) -> None:
    final = make_detector("padim", layers=("stride4", "stride8"), seed=3)
    assert resolve_screener("own", final, tiny, 3) is final
    assert resolve_screener("padim", final, tiny, 3) is final
    assert resolve_screener("patchcore", final, tiny, 3).layers == make_detector("patchcore").layers
    assert resolve_screener("patchcore", final, tiny, 3).seed == 3
    shallow = copy.copy(tiny)
    shallow.layers = tiny.layers[:2]
    assert resolve_screener("patchcore", final, shallow, 3).layers == ("stride4", "stride8")
    with pytest.raises(ParameterError, match="patchcore"):
        resolve_screener("patchcor", final, tiny, 3)


def test_a_screening_of_other_images_is_told(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(easy_folder, folder)
    pipeline.screen(folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.8), store=store, out=tmp_path / "s")

    def note() -> str | None:
        model = pipeline.fit(folder, SMALL["patchcore"], tiny, store=store, screening=tmp_path / "s").model
        assert model.training["n_kept"] == 40
        found: str | None = model.training.get("screening_note")
        return found

    assert note() is None
    first, second, *_ = sorted(folder.glob("*.png"))
    shutil.copy(second, first)
    assert note() == "Some images have changed since the screening."
    shutil.copy(second, folder / "zz.png")
    assert note() == "Not in the screening, and so not trained on (1 in all): zz.png."


def test_a_screening_of_something_else_is_refused(
    tiny: Backbone, easy: Dataset, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    pipeline.screen(easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.8), store=store, out=out)
    with pytest.raises(InputError, match="40 images kept by the screening are not among those to train on"):
        pipeline.fit(easy.images, SMALL["patchcore"], tiny, store=store, screening=out)
    with pytest.raises(InputError, match="either a screening or no_screen"):
        pipeline.fit(easy_folder, SMALL["patchcore"], tiny, store=store, screening=out, no_screen=True)
    text = (out / "screening.csv").read_text().replace(",1,\n", ",maybe,\n")
    (out / "screening.csv").write_text(text)
    with pytest.raises(InputError, match="damaged: .*kept must be 1 or 0"):
        load_screening(out)
    with pytest.raises(InputError, match="is not a screening folder"):
        load_screening(tmp_path / "none")


@pytest.mark.parametrize("name", ["patchcore", "padim"])
def test_decisions_hold_without_a_screening(name: str, tiny: Backbone, easy_folder: Path, store: FeatureStore) -> None:
    images = ImageSet.from_folder(easy_folder)
    choices = {images.names[3]: "remove", images.names[4]: "keep"}
    model = pipeline.fit(images, SMALL[name], tiny, store=store, no_screen=True, decisions=choices).model
    assert model.training["n_kept"] == len(images) - 1
    assert model.training["decisions"] == {"keep": 1, "remove": 1, "unsure": 0, "elsewhere": 0}


def test_options_of_a_stage_one_that_is_not_made_are_refused(
    tiny: Backbone,
    easy_folder: Path,
    easy: Dataset,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screening = pipeline.screen(easy_folder, None, tiny, store=store, out=tmp_path / "s")
    monkeypatch.setattr(pipeline, "attach", None)  # told before any work
    options: list[Any] = [ScreenOptions(keep=0.7), ScreenOptions(), "default", "paper"]
    for given in options:
        for stage1 in (screening, tmp_path / "s"):
            with pytest.raises(ParameterError, match="Stage 1 is the screening that is given, so options of stage 1"):
                pipeline.fit(easy_folder, backbone=tiny, store=store, screening=stage1, options=given)
        with pytest.raises(ParameterError, match="Without stage 1"):
            pipeline.fit(easy_folder, backbone=tiny, store=store, no_screen=True, options=given)
    with pytest.raises(ParameterError, match=r"\(--keep, --subsets\) would not be read"):
        changed = ScreenOptions(keep=0.7, n_subsets=3)
        pipeline.fit(easy_folder, backbone=tiny, store=store, no_screen=True, options=changed)


def test_no_screen_trains_on_everything_and_still_has_a_threshold(
    tiny: Backbone, easy: Dataset, store: FeatureStore
) -> None:
    model = pipeline.fit(easy.images, SMALL["patchcore"], tiny, store=store, no_screen=True).model
    assert model.training["n_kept"] == 50
    assert model.training["rejected_patches"] == 0
    data, _ = attach(easy.images, tiny, model.detector.layers, store=store)
    halves = screen_features(data, SMALL["patchcore"], HALVES)
    np.testing.assert_array_equal(model.calibration.scores, np.sort(halves.held_out_scores))
    few = pipeline.fit(easy.images.select([0, 1, 2]), SMALL["patchcore"], tiny, store=store, no_screen=True).model
    assert len(few.calibration.scores) == 3
    one = pipeline.fit(easy.images.select([0]), SMALL["patchcore"], tiny, store=store, no_screen=True).model
    assert one.threshold() is None
    found = models.predict(one, easy.images.select([5, 45]))
    assert found.is_anomalous is None
    assert np.isfinite(found.scores).all()
    with pytest.raises(InputError, match="5 subsets need at least 5 images, got 3"):
        by_itself = ScreenOptions(screener="own")
        pipeline.fit(easy.images.select([0, 1, 2]), SMALL["patchcore"], tiny, options=by_itself, store=store)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_model_survives_the_disk(
    name: str, tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    backbone = load_backbone("tiny", size=SIZE)
    model = pipeline.fit(easy_folder, SMALL[name], backbone, store=store, out=tmp_path / "m").model
    loaded = models.load_model(tmp_path / "m")
    before, after = models.predict(model, easy_folder), models.predict(loaded, easy_folder)
    np.testing.assert_array_equal(before.scores, after.scores)
    assert before.threshold is not None
    assert after.threshold is not None
    assert after.threshold.value == pytest.approx(before.threshold.value, rel=1e-8)
    assert str(tmp_path) not in (tmp_path / "m" / "model.json").read_text()
    strict = loaded.threshold(0.4)
    assert strict is not None
    assert strict.value < after.threshold.value
    assert not list((tmp_path / "m").rglob("*.p*kl"))


def test_damaged_and_foreign_models_are_refused(
    tiny: Backbone, easy: Dataset, store: FeatureStore, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    pipeline.fit(easy.images, SMALL["patchcore"], load_backbone("tiny", size=SIZE), store=store, out=folder)
    content = json.loads((folder / "model.json").read_text())

    def with_change(**change: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "model.json").write_text(json.dumps({**content, **change}))
        (copy / "manifest.json").unlink()  # else it tells of every change
        return copy

    with pytest.raises(ModelError, match="is not a model folder"):
        models.load_model(tmp_path / "none")
    with pytest.raises(ModelError, match="update flawsift"):
        models.load_model(with_change(format=99))
    with pytest.raises(ModelError, match="damaged model.json"):
        models.load_model(with_change(backbone={}))
    with pytest.raises(ModelError, match="other weights of tiny"):
        models.load_model(with_change(backbone={**content["backbone"], "weights_digest": "0" * 64}))
    with pytest.raises(ModelError, match="parts of two models"):
        models.load_model(with_change(detector_digest="0" * 64))
    copy = with_change()
    state = next(copy.glob("state-*.safetensors"))
    state.write_bytes(state.read_bytes()[:-4] + b"oops")
    with pytest.raises(ModelError, match=r"does not match detector\.json"):
        models.load_model(copy)


def test_an_interrupted_save_leaves_the_old_model(
    tiny: Backbone, easy: Dataset, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone("tiny", size=SIZE)
    folder = tmp_path / "m"
    pipeline.fit(easy.images, SMALL["patchcore"], backbone, options=ScreenOptions(keep=0.8), store=store, out=folder)
    pipeline.fit(easy.images, SMALL["patchcore"], backbone, options=ScreenOptions(keep=0.6), store=store, out=folder)
    assert models.load_model(folder).training["n_kept"] == 30
    assert len(list(folder.glob("state-*.safetensors"))) == 1

    def fail(*_: Any) -> None:
        raise OutputError("full")

    monkeypatch.setattr("flawsift.detectors.base.write_json", fail)
    with pytest.raises(OutputError):
        pipeline.fit(
            easy.images, SMALL["patchcore"], backbone, options=ScreenOptions(keep=0.9), store=store, out=folder
        )
    assert models.load_model(folder).training["n_kept"] == 30


def test_a_killed_screening_goes_on_to_the_same_result(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.screen(easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.7), store=store)
    fit = type(SMALL["patchcore"]).fit
    fitted: list[int] = []

    def killed(self: Detector, data: ImageSet, **kwargs: Any) -> Detector:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(len(data))
        return fit(self, data, **kwargs)

    monkeypatch.setattr(type(SMALL["patchcore"]), "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.screen(
            easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.7), store=store, out=tmp_path / "o"
        )
    fitted.clear()
    again = pipeline.screen(
        easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.7), store=store, out=tmp_path / "o"
    )
    assert len(fitted) == 2
    np.testing.assert_array_equal(again.submodel_scores.score_matrix, whole.submodel_scores.score_matrix)
    assert again.kept.tolist() == whole.kept.tolist()
    assert not (tmp_path / "o" / ".resume").exists()


def test_changed_content_is_not_resumed(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    shutil.copytree(easy_folder, root)
    monkeypatch.setattr("flawsift.pipeline.shutil.rmtree", lambda *_, **__: None)  # keep the finished sub-models
    first = pipeline.screen(
        root, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.7), store=store, out=tmp_path / "o"
    )
    shutil.copy(root / "part-45.png", root / "part-00.png")
    second = pipeline.screen(
        root, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.7), store=store, out=tmp_path / "o"
    )
    assert (first.submodel_scores.score_matrix[:, 0] != second.submodel_scores.score_matrix[:, 0]).all()


def test_unreadable_images_are_reported_everywhere(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(easy_folder, root)
    (root / "bad.png").write_text("no")
    result = pipeline.screen(
        root, SMALL["patchcore"], tiny, options=ScreenOptions(keep=0.8), store=store, out=tmp_path / "o"
    )
    assert len(result.ids) == 50
    (row,) = [r for r in table(tmp_path / "o" / "screening.csv") if r["error"]]
    assert row["path"] == "bad.png"
    assert "not an image" in row["error"]
    assert row["kept"] == "0"
    assert json.loads((tmp_path / "o" / "screening.json").read_text())["n_unreadable"] == 1
    model = pipeline.fit(root, SMALL["patchcore"], tiny, store=store, screening=tmp_path / "o").model
    assert model.training["n_images"] == 51
    found = models.predict(model, root)
    assert list(found.errors.values()) == [row["error"]]
    assert np.isnan(found.scores).sum() == 1
    assert found.is_anomalous is not None
    assert not found.is_anomalous[np.isnan(found.scores)].any()


def test_evaluation_sees_labels_and_prediction_does_not(tiny: Backbone, easy: Dataset, store: FeatureStore) -> None:
    model = pipeline.fit(easy.images.select(range(30)), SMALL["patchcore"], tiny, store=store, no_screen=True).model
    test = easy.images.select(range(30, 50))
    result, found = models.evaluate(model, test, easy.truth)
    assert result["image_auroc"] > 0.9
    assert result["aupro"] is not None
    assert result["n_images"] == 20
    assert found.threshold is not None
    labels = easy.truth.select(test.ids).labels
    flagged = found.scores > found.threshold.value
    assert result["false_alarms_per_100"] == pytest.approx(100 * flagged[labels == 0].mean())
    assert result["missed_per_100"] == pytest.approx(100 * (~flagged[labels == 1]).mean())
    flipped = replace(easy.truth, labels=1 - easy.truth.labels, masks={})
    other, again = models.evaluate(model, test, flipped)
    np.testing.assert_array_equal(found.scores, again.scores)
    assert other["image_auroc"] == pytest.approx(1 - result["image_auroc"])
    assert other["aupro"] is None


def test_attached_features_are_not_extracted_again(
    tiny: Backbone, easy: Dataset, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline.fit(easy.images, SMALL["patchcore"], tiny, store=store).model
    data, _ = attach(easy.images, tiny, model.detector.layers, store=store)
    expected = models.predict(model, easy.images).scores

    def never(pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        raise AssertionError("extracted again")

    monkeypatch.setattr(tiny, "extract", never)
    np.testing.assert_array_equal(models.predict(model, data).scores, expected)
    with pytest.raises(AssertionError):
        models.predict(model, easy.images)


def test_groups_reach_the_split(tiny: Backbone, easy: Dataset, store: FeatureStore) -> None:
    grouped = replace(easy.images, groups={int(i): f"g{int(i) // 2}" for i in easy.images.ids})
    result = pipeline.screen(grouped, SMALL["padim"], tiny, options=ScreenOptions(keep=0.5), store=store)
    assert (result.submodel_scores.subset_of[0][::2] == result.submodel_scores.subset_of[0][1::2]).all()


def test_odd_options_are_told_before_the_work(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="false_alarm_rate"):
        pipeline.fit(easy.images, "patchcore", tiny, false_alarm_rate=2)
    with pytest.raises(ParameterError, match="Did you mean 'patchcore'"):
        pipeline.screen(easy.images, "pathcore", tiny)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pipeline.fit(easy.images, "patchcore", tiny, out=tmp_path / "file")


def test_a_saved_screening_reads_back(tiny: Backbone, easy: Dataset, store: FeatureStore, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_partitions": 2, "divergence_weight": 0.5, "consensus": "median"}
    result = pipeline.screen(easy.images, SMALL["patchcore"], tiny, options=ScreenOptions(**options), store=store)
    saved = load_screening(save_screening(result, tmp_path))
    now = matched(saved, easy.images)
    assert now.kept.tolist() == result.kept.tolist()
    for detector in (SMALL["patchcore"], make_detector("softpatch")):
        purified, expected = (s.purified(easy.images, detector) for s in (now, result))
        assert purified.ids.tolist() == expected.ids.tolist()
        assert purified.rejected.keys() == expected.rejected.keys()
        assert all((purified.rejected[i] == expected.rejected[i]).all() for i in expected.rejected)
    np.testing.assert_allclose(now.held_out_scores, result.held_out_scores, rtol=1e-6)
    assert result.submodel_scores.divergence is not None
    assert result.contamination is not None
    assert saved.contamination == result.contamination


def test_an_image_that_a_person_keeps_has_all_its_patches(
    tiny: Backbone, easy: Dataset, store: FeatureStore, tmp_path: Path
) -> None:
    result = pipeline.screen(
        easy.images, SMALL["patchcore"], tiny, options=ScreenOptions(reject_patches=1.0), store=store
    )
    assert result.rejected is not None
    assert len(result.removed)
    removed = set(result.removed.tolist())
    save_screening(result, tmp_path)
    rows = table(tmp_path / "screening.csv")
    last = str(result.removed[-1])
    for row in rows:
        row["kept"] = "1" if row["kept"] == "1" or row["id"] == last else "0"
    with (tmp_path / "screening.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    now, _ = load_screening(tmp_path).with_decisions({})
    assert len(now.kept) == 51 - len(removed)
    purified = now.purified(easy.images, make_detector("patchcore"))
    assert int(last) in purified.ids
    assert int(last) not in purified.rejected
    assert purified.rejected, "patches of other images are still rejected"


def test_decisions_reach_the_patches_of_a_fit(
    tiny: Backbone, easy_folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    options = ScreenOptions(reject_patches=1.0, screener="own")
    result = pipeline.screen(
        easy_folder, SMALL["patchcore"], tiny, options=ScreenOptions(reject_patches=1.0), store=store, out=tmp_path
    )
    assert result.rejected is not None
    one = int(np.flatnonzero(result.rejected.any((1, 2)))[0])
    choices = {result.names[one]: "keep"}
    learned = result.is_kept | result.is_partly_learned
    expected = (result.rejected[learned].sum() - result.rejected[one].sum()) / (learned.sum() * result.rejected[0].size)
    givens: list[dict[str, Any]] = [{"screening": tmp_path}, {"screening": result}, {"options": options}]
    for given in givens:
        model = pipeline.fit(
            easy_folder, SMALL["patchcore"], tiny, decisions=choices, **{"store": store, **given}
        ).model
        assert model.training["rejected_patches"] == pytest.approx(expected)
        assert model.training["n_kept"] == result.is_kept.sum()
        assert model.training["n_partly"] == result.is_partly_learned.sum() > 0
        assert len(model.calibration.scores) == result.is_kept.sum(), "what was set aside sets no threshold"


def test_a_sorted_table_keeps_its_patches(tiny: Backbone, easy: Dataset, store: FeatureStore, tmp_path: Path) -> None:
    shuffled = easy.images.select(np.random.default_rng(0).permutation(easy.images.ids))
    result = pipeline.screen(shuffled, SMALL["patchcore"], tiny, options=ScreenOptions(reject_patches=1.0), store=store)
    expected = result.purified(easy.images, SMALL["patchcore"]).rejected
    rows = table(save_screening(result, tmp_path) / "screening.csv")
    for key in ("consensus", "path"):
        with (tmp_path / "screening.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row[key]))
        now = matched(load_screening(tmp_path), easy.images)
        found = now.purified(easy.images, SMALL["patchcore"]).rejected
        assert found.keys() == expected.keys()
        assert all((found[i] == expected[i]).all() for i in expected)
    with (tmp_path / "screening.csv").open("a", newline="") as file:
        csv.DictWriter(file, list(rows[0])).writerow(rows[3])
    with pytest.raises(InputError, match="is there twice"):
        load_screening(tmp_path)


def test_public_names_exist_and_are_sorted() -> None:
    for name in flawsift.__all__:
        assert getattr(flawsift, name) is not None
    assert flawsift.__all__[1:] == sorted(flawsift.__all__[1:], key=lambda n: (not n.isupper(), n))
    with pytest.raises(AttributeError):
        _ = flawsift.nothing
