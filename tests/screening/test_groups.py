"""Which images belong together is known from a screening on: it is saved, and used by whoever trains from it."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.cli.main import main
from flawsift.data.images import ImageSet
from flawsift.data.inputs import as_images
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError
from flawsift.features.backbones import Backbone
from flawsift.features.store import FeatureStore
from flawsift.models.model import load_model
from flawsift.review.refit import refit
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen_and_fit
from flawsift.screening.storage import grouped, images_of, load_screening, matched

PAIRS = {f"part-{i:02d}.png": f"pair {i // 2}" for i in range(50)}
FIVES = {name: f"five {i // 5}" for i, name in enumerate(PAIRS)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def screened(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Screening, Path]:
    """A screening of pairs, and its folder."""
    folder = tmp_path_factory.mktemp("s")
    return pipeline.screen(as_images(easy_folder, groups=PAIRS), None, tiny, store=store, out=folder), folder


@pytest.fixture
def folder(screened: tuple[Screening, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(screened[1], tmp_path / "s"))


def edit(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the rows of the table of a screening."""
    path = folder / "screening.csv"
    with path.open(newline="") as file:
        rows = [change(row) for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_groups_survive_the_disk(screened: tuple[Screening, Path], easy_folder: Path) -> None:
    made, folder = screened
    read = load_screening(folder)
    assert read.groups == made.groups == {i: f"pair {i // 2}" for i in range(50)}
    assert read.n_groups == made.n_groups == 25
    assert images_of(read, easy_folder).groups == made.groups
    assert json.loads((folder / "screening.json").read_text())["n_groups"] == 25


def test_an_image_without_a_group_is_alone(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path
) -> None:
    some = {"part-03.png": "x", "part-07.png": "x", "part-09.png": "y"}
    images = replace(as_images(easy_folder, groups=some), groups={3: "x", 7: "x", 9: "y", 11: "", 13: ""})
    made = pipeline.screen(images, None, tiny, store=store, out=tmp_path)
    assert made.n_groups == images.n_groups == 49
    assert load_screening(tmp_path).groups == made.groups == {3: "x", 7: "x", 9: "y"}


def test_screenings_of_earlier_versions_are_read(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    edit(folder, lambda row: {key: cell for key, cell in row.items() if key != "group"})
    with pytest.raises(InputError, match="damaged: KeyError\\('group'\\)"):
        load_screening(folder)
    content = json.loads((folder / "screening.json").read_text())
    del content["n_groups"]
    (folder / "screening.json").write_text(json.dumps(content))
    read = load_screening(folder)
    assert (read.groups, read.n_groups) == ({}, None)
    edit(folder, lambda row: {**row, "group": f"g{int(row['id']) // 10}"})  # a person knows better
    assert load_screening(folder).n_groups == 5


def test_groups_that_were_edited_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda row: {**row, "group": "one", "kept": "1"})
    read = load_screening(folder)
    assert (read.n_groups, len(read.kept)) == (25, 50)
    assert "Groups that were edited in" in caplog.text


@pytest.mark.parametrize("detector", ["quorum", "padim", "patchcore"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_fit_is_in_the_groups_of_its_screening(
    detector: str, saved: bool, screened: tuple[Screening, Path], easy_folder: Path, tiny: Backbone, store: FeatureStore
) -> None:
    made, folder = screened
    params: dict[str, Any] = {"coreset_ratio": 0.02} if detector == "patchcore" else {}
    final = make_detector(detector, **params)
    images = as_images(easy_folder)
    result = pipeline.fit(images, final, tiny, store=store, screening=folder if saved else made)
    told = pipeline.fit(as_images(easy_folder, groups=PAIRS), final, tiny, store=store, screening=made)
    assert result.plan.images.groups == told.plan.images.groups
    assert result.model.training["n_groups"] == told.model.training["n_groups"] == 25
    assert "groups_note" not in told.model.training
    np.testing.assert_allclose(result.model.calibration.scores, told.model.calibration.scores, rtol=1e-6)
    forgotten = replace(made, groups={}, provenance={})  # calibrated anew
    other = pipeline.fit(images, final, tiny, store=store, screening=forgotten).model
    assert other.training["n_groups"] is None
    assert not np.allclose(other.calibration.scores, told.model.calibration.scores, rtol=1e-3)


def test_groups_that_are_given_win_and_a_difference_is_told(
    screened: tuple[Screening, Path], easy_folder: Path, tiny: Backbone, store: FeatureStore
) -> None:
    made, folder = screened
    fives = as_images(easy_folder, groups=FIVES)
    result = pipeline.fit(fives, "quorum", tiny, store=store, screening=folder)
    assert result.plan.images.groups == fives.groups
    assert result.model.training["n_groups"] == 10
    note = "The 10 groups that were given are not those of the screening, which has 25. "
    assert result.model.training["groups_note"].startswith(note)
    anew = pipeline.fit(fives, "quorum", tiny, store=store, screening=replace(made, provenance={}))
    # held-out scores of the screening left out pairs only
    np.testing.assert_array_equal(result.model.calibration.scores, anew.model.calibration.scores)
    assert not np.allclose(np.sort(made.held_out_scores[made.is_kept]), anew.model.calibration.scores, rtol=1e-3)
    alone = replace(made, groups={})
    assert "not those of the screening, which has none." in (grouped(alone, fives)[1] or "")
    renamed = as_images(easy_folder, groups={name: group.upper() for name, group in PAIRS.items()})
    assert grouped(made, renamed) == (renamed, None)


def test_groups_are_found_by_name(screened: tuple[Screening, Path], easy_folder: Path) -> None:
    made, _ = screened
    names = dict(enumerate(sorted(PAIRS, reverse=True)))  # another order, so other ids
    images, note = grouped(made, ImageSet.from_files(easy_folder, names).select(range(5, 50)))
    assert note is None
    assert {names[i]: group for i, group in images.groups.items()} == {n: PAIRS[n] for n in list(names.values())[5:]}
    here = matched(made, ImageSet.from_files(easy_folder, names))
    assert {names[i]: group for i, group in here.groups.items()} == PAIRS
    new = ImageSet.from_files(easy_folder, {0: "part-00.png", 1: "part-01.png", 2: "new.png"})
    assert grouped(made, new)[0].members == {"pair 0": [0, 1], "\0id:2": [2]}


def test_commands_say_what_they_do_with_groups(
    easy_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--backbone", "tiny", "--size", "64"])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return printed.out

    (tmp_path / "g.csv").write_text("file,group\n" + "".join(f"{n},{g}\n" for n, g in FIVES.items()))
    told = run("screen", easy_folder, "--out", tmp_path / "s5", "--groups", tmp_path / "g.csv")
    assert "They are in 10 groups; `flawsift fit --screening` will know them." in told
    told = run("fit", easy_folder, "--out", tmp_path / "m", "--screening", folder)
    assert "They are in 25 groups; none was judged by images of its own group." in told
    assert load_model(tmp_path / "m").training["n_groups"] == 25
    told = run("fit", easy_folder, "--out", tmp_path / "m", "--screening", folder, "--groups", tmp_path / "g.csv")
    assert "Note: The 10 groups that were given are not those of the screening, which has 25." in told
    assert "Screen the folder with --groups to have them judged by these." in told
    assert "groups" not in run("fit", easy_folder, "--out", tmp_path / "n", "--no-screen")


def test_a_refit_is_in_the_groups_of_the_screening(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("path,decision\npart-03.png,remove\n")
    result = refit(folder, tmp_path / "m", decisions=tmp_path / "d.csv")
    assert result.plan.images.groups == load_screening(folder).groups
    assert load_model(tmp_path / "m").training["n_groups"] == 25  # the other of the pair is left


def test_unfinished_work_of_other_groups_is_not_taken(
    easy_folder: Path, tiny: Backbone, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path | None] = []

    def killed(data: ImageSet, screener: Any, options: Any, run: Any, **more: Any) -> Any:
        folders.append(run.checkpoint)
        return screen_and_fit(data, screener, options, run, **more)

    monkeypatch.setattr(pipeline, "screen_and_fit", killed)
    options = ScreenOptions(rank_by="submodels", n_subsets=2)
    for groups in (PAIRS, FIVES, {}, PAIRS):
        images = as_images(easy_folder, groups=groups)
        pipeline.screen(images, "padim", tiny, options=options, store=store, out=tmp_path)
    assert len(set(folders[:3])) == 3
    assert folders[3] == folders[0]


def test_groups_of_no_image_are_refused(easy_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = {f"parts/{name}": group for name, group in PAIRS.items()}
    with pytest.raises(InputError, match=r"name none of the 50 images: one of them is parts/part-00.png, an image is"):
        as_images(easy_folder, groups=wrong)
    with pytest.raises(InputError, match="Write paths relative to the folder"):
        ImageSet.from_folder(easy_folder, groups=wrong)
    as_images(easy_folder, groups=PAIRS | {"gone.png": "x"})
    assert "1 of 51 groups are about no image here: gone.png." in caplog.text
