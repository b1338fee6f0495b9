"""A model folder that was used before: nothing passes for a part of the new model, nothing of a person is lost."""

import csv
import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.errors import InputError, OutputError
from flawsift.features.backbones import Backbone
from flawsift.features.store import FeatureStore
from flawsift.files import MANIFEST
from flawsift.models.model import load_model
from flawsift.screening.options import ScreenOptions
from flawsift.screening.storage import FILES, TURNS, load_screening, save_screening, screening_folder

DECIDED = "path,decision,version,time\npart-03.png,remove,1,2024-05-01T10:00:00\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def first(easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its screening, in which a person has decided."""
    folder = tmp_path_factory.mktemp("m")
    pipeline.fit(easy_folder, backbone=tiny, options=ScreenOptions(keep=0.8), store=store, out=folder)
    (folder / "screening" / "decisions.csv").write_text(DECIDED)
    return folder


@pytest.fixture
def model(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "m"))


@pytest.fixture
def other(easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path) -> Path:
    """Another screening."""
    pipeline.screen(easy_folder, None, tiny, options=ScreenOptions(keep=0.6), store=store, out=tmp_path / "s")
    return tmp_path / "s"


def fit(images: Path, tiny: Backbone, store: FeatureStore, out: Path, **options: Any) -> pipeline.FitResult:
    return pipeline.fit(images, backbone=tiny, store=store, out=out, **options)


def visible(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.match("state-*.safetensors") and not p.match(".*.lock")}


BARE = {"model.json", "detector.json", MANIFEST}


def test_without_a_screening_no_earlier_one_stays(
    model: Path, easy_folder: Path, tiny: Backbone, store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    page = (model / "report.html").read_text("utf-8")
    result = fit(easy_folder, tiny, store, model, no_screen=True)
    assert result.report is None
    assert visible(model) == {*BARE, "earlier-1"}
    assert (model / "earlier-1" / "report.html").read_text("utf-8") == page
    assert (model / "earlier-1" / "screening" / "decisions.csv").read_text() == DECIDED
    assert len(load_screening(model / "earlier-1" / "screening").kept) == 40, "it can still be used"
    assert caplog.text.count(f"is not about the new model. It is now in '{model / 'earlier-1'}'.") == 2
    with pytest.raises(InputError, match="holds no screening"):
        screening_folder(model)
    fit(easy_folder, tiny, store, model, options=ScreenOptions(keep=0.7))
    assert visible(model) == {*BARE, "report.html", "screening", "earlier-1"}
    fit(easy_folder, tiny, store, model, no_screen=True)
    fit(easy_folder, tiny, store, model, no_screen=True)
    assert visible(model) == {*BARE, "earlier-1", "earlier-2"}


def test_one_kept_image_gives_a_model_and_a_page_without_a_threshold(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    fit(easy_folder, tiny, store, tmp_path / "m", options=ScreenOptions(keep=0.001))
    assert load_model(tmp_path / "m").threshold() is None
    assert "There is no threshold" in (tmp_path / "m" / "report.html").read_text("utf-8")


def test_a_screening_from_elsewhere_takes_the_place_of_an_earlier_one(
    model: Path, other: Path, easy_folder: Path, tiny: Backbone, store: FeatureStore
) -> None:
    fit(easy_folder, tiny, store, model, screening=other)
    assert visible(model) == {*BARE, "report.html", "earlier-1"}
    assert visible(model / "earlier-1") == {"screening"}
    assert "was trained on 30 of 50" in (model / "report.html").read_text("utf-8")
    assert load_model(model).training["n_kept"] == 30


@pytest.mark.parametrize("way", ["plain", "odd", "in memory", "new"])
def test_a_screening_of_the_new_model_stays(
    way: str, model: Path, easy_folder: Path, tiny: Backbone, store: FeatureStore
) -> None:
    place = model / "screening"
    given: Any = {"plain": place, "odd": str(model / ".." / "m" / "screening"), "in memory": load_screening(place)}
    asked = {"options": ScreenOptions(keep=0.7)} if way == "new" else {"screening": given[way]}
    fit(easy_folder, tiny, store, model, **asked)
    assert visible(model) == {*BARE, "report.html", "screening"}
    assert (place / "decisions.csv").read_text() == DECIDED


def test_no_model_goes_into_a_screening_folder(
    other: Path, easy_folder: Path, tiny: Backbone, store: FeatureStore
) -> None:
    before = visible(other)
    with pytest.raises(OutputError, match="holds a screening"):
        fit(easy_folder, tiny, store, other, no_screen=True)
    assert visible(other) == before


@pytest.mark.parametrize("asked", [{"no_screen": True}, {"screening": "other"}])
def test_a_fit_that_fails_moves_nothing(
    asked: dict[str, Any],
    model: Path,
    other: Path,
    easy_folder: Path,
    tiny: Backbone,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("full")

    before = visible(model)
    monkeypatch.setattr("flawsift.detectors.base.write_json", full)
    with pytest.raises(OutputError, match="full"):
        fit(easy_folder, tiny, store, model, **{k: other if v == "other" else v for k, v in asked.items()})
    shutil.rmtree(model / ".resume", ignore_errors=True)
    assert visible(model) == before
    assert load_model(model).training["n_kept"] == 40


def test_no_two_runs_mix_wherever_a_fit_is_killed(
    model: Path,
    easy_folder: Path,
    tiny: Backbone,
    store: FeatureStore,
    killed_at: Callable[[int, Callable[[], object]], bool],
) -> None:
    """Model, screening and page are all of the first run or all of the second."""

    def kept_of(folder: Path) -> set[str]:
        of_model = load_model(folder).training["n_kept"]  # whoever reads first finishes what was ready
        page = (folder / "report.html").read_text("utf-8")
        of_page = next(str(n) for n in (40, 35) if f"was trained on {n} of 50" in page)
        return {of_page, str(of_model), str(len(load_screening(folder / "screening").kept))}

    assert kept_of(model) == {"40"}
    seen: list[str] = []
    for n in itertools.count(0, 17):  # of about 120 steps; tests/test_files.py takes every one of a small result
        folder = Path(shutil.copytree(model, model.with_name(f"m{n}")))
        again = functools.partial(fit, easy_folder, tiny, store, folder, options=ScreenOptions(keep=0.7))
        if not killed_at(n, again):
            break
        kept = kept_of(folder)
        assert len(kept) == 1
        seen += kept
        assert (folder / "screening" / "decisions.csv").read_text() == DECIDED
    assert seen == sorted(seen, reverse=True)
    assert {*seen} == {"40", "35"}


def test_a_screening_is_checked_when_it_is_read(other: Path) -> None:
    for name in sorted({*FILES} - {TURNS}):  # which only aligned images have
        path = other / name
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if name == "screening-original.csv":
            load_screening(other)  # nobody needs it as long as the table is not edited
            table = other / "screening.csv"
            table.write_bytes(table.read_bytes().replace(b",1,\n", b",0,\n", 1))
        if name != "screening.csv":  # see the next test
            with pytest.raises(InputError, match=f"is damaged: {name}"):
                load_screening(other)
        path.write_bytes(whole)
    (other / "maps.npy").unlink()
    with pytest.raises(InputError, match=r"maps\.npy is missing"):
        load_screening(other)
    (other / MANIFEST).unlink()
    assert load_screening(other).patch_maps is None, "screenings of earlier versions have no manifest"


def test_of_an_edited_table_only_the_kept_column_counts(other: Path) -> None:
    before = load_screening(other)
    with (other / "screening.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # as a spreadsheet may round them
        row |= {"consensus": f"{float(row['consensus']):.2f}", "held_out_score": "1", "kept": "yes"}
    with (other / "screening.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(reversed(rows))
    after = load_screening(other)
    assert len(before.kept) < len(after.kept) == 50
    np.testing.assert_array_equal(after.consensus, before.consensus)
    np.testing.assert_array_equal(after.held_out_scores, before.held_out_scores)
    (other / "screening.csv").write_text((other / "screening.csv").read_text().replace("part-03", "part-77"))
    with pytest.raises(InputError, match=r"screening\.csv lists other images than were screened"):
        load_screening(other)


def test_a_table_that_was_edited_is_not_written_over(
    other: Path, easy_folder: Path, tiny: Backbone, store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    screening = load_screening(other)
    save_screening(screening, other)
    assert not list(other.glob("earlier-*")), "nobody has edited it"
    with (other / "screening.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lowest, highest = screening.ranking[-1], screening.ranking[0]
    for row in rows:  # as many are kept as before
        row["kept"] = {str(lowest): "0", str(highest): "yes"}.get(row["id"], row["kept"])
    with (other / "screening.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    edited = (other / "screening.csv").read_bytes()
    pipeline.screen(easy_folder, None, tiny, options=ScreenOptions(keep=0.6), store=store, out=other)
    assert (other / "earlier-1" / "screening.csv").read_bytes() == edited
    assert load_screening(other).kept.tolist() == screening.kept.tolist()
    assert "was edited by hand, and another screening takes its place" in caplog.text
