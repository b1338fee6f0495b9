"""Decisions survive, merge per image, and reach stage 2."""

import csv
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift import pipeline
from flawsift.errors import InputError, OutputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.screening.decisions import CHOICES, Change, DecisionStore, apply_decisions, read_decisions
from flawsift.screening.options import ScreenOptions
from flawsift.screening.storage import load_screening


def rows(path: Path) -> dict[str, tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["path"]: (row["decision"], row["version"]) for row in csv.DictReader(file)}


def test_every_write_is_on_disk_at_once(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    odd = 'b, "x"\r\n\r.png'
    store.write([Change("a.png", "keep", 0), Change(odd, "remove", 0)])
    assert rows(store.path) == {"a.png": ("keep", "1"), odd: ("remove", "1")}
    assert read_decisions(store.path) == {"a.png": "keep", odd: "remove"}
    again = DecisionStore(store.path)
    assert {n: d.choice for n, d in again.since(-1)[1].items()} == read_decisions(store.path)
    again.write([Change("a.png", "", 1)])
    assert rows(store.path)["a.png"] == ("", "2")
    assert "a.png" not in read_decisions(store.path)


def test_two_writers_merge_per_image_and_the_later_on_one_image_is_told(tmp_path: Path) -> None:
    first, second = (DecisionStore(tmp_path / "decisions.csv") for _ in range(2))  # as two programs would have
    first.write([Change("a", "keep", 0)])
    written, refused = second.write([Change("a", "remove", 0), Change("b", "unsure", 0)])
    assert {n: d.choice for n, d in written.items()} == {"b": "unsure"}
    assert {n: (d.choice, d.version) for n, d in refused.items()} == {"a": ("keep", 1)}
    assert rows(first.path) == {"a": ("keep", "1"), "b": ("unsure", "1")}
    assert second.write([Change("a", "remove", 1)])[1] == {}
    assert first.since(0)[1].keys() == {"a", "b"}
    assert first.since(-1)[1]["a"].choice == "remove"


def test_the_same_choice_by_both_is_no_conflict(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    store.write([Change("a", "keep", 0)])
    written, refused = store.write([Change("a", "keep", 0)])
    assert (written["a"].version, refused) == (1, {})


def test_news_are_what_changed_since(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    store.write([Change("a", "keep", 0)])
    revision, _ = store.since(-1)
    store.write([Change("b", "keep", 0)])
    assert store.since(revision)[1].keys() == {"b"}
    assert store.since(store.revision)[1] == {}


def test_an_edit_by_hand_is_seen(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    store.write([Change("a", "keep", 0), Change("b", "keep", 0)])
    store.path.write_text("path,decision\na,remove\n")
    news = store.since(store.revision)[1]
    assert {n: d.choice for n, d in news.items()} == {"a": "remove", "b": ""}
    store.path.write_text("path,decision\na,perhaps\n")
    with pytest.raises(InputError, match="row 2: decision must be keep, remove or unsure, got 'perhaps'"):
        store.write([Change("b", "keep", 0)])
    assert "perhaps" in store.path.read_text()


def test_an_edit_by_hand_is_not_overwritten_by_those_who_have_not_seen_it(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    for version, choice in enumerate(("keep", "remove", "keep")):
        store.write([Change("a", choice, version), Change("b", "keep", version)])
    store.path.write_text("path,decision\na,unsure\nb,keep\n")  # a hand writes no versions
    revision = store.revision
    _, refused = store.write([Change("a", "remove", 3)])
    assert (refused["a"].choice, refused["a"].version) == ("unsure", 4)
    assert store.since(revision)[1].keys() == {"a"}
    assert store.since(-1)[1]["b"].version == 1  # its choice is that of before, and so is its version
    assert store.write([Change("a", "remove", 4)])[1] == {}
    assert rows(store.path) == {"a": ("remove", "5"), "b": ("keep", "1")}
    store.path.write_text("path,decision,version\na,keep,1\n")
    assert store.write([Change("a", "remove", 1)])[1]["a"].version == 6


def test_rows_taken_out_twice_are_news_once(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    store.write([Change("a", "keep", 0), Change("b", "keep", 0)])
    store.path.write_text("path,decision\nb,keep\n")
    revision, found = store.since(-1)
    assert (found["a"].choice, found["a"].version) == ("", 2)
    store.path.write_text("path,decision\nb,unsure\n")
    assert store.since(revision)[1].keys() == {"b"}


def test_a_folder_that_is_gone_or_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    store = DecisionStore(tmp_path / "d" / "decisions.csv")

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    store.write([Change("a", "keep", 0)])
    assert read_decisions(store.path) == {"a": "keep"}
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(OutputError, match="Cannot write .*No such file"):
        store.write([Change("b", "keep", 0)])
    (tmp_path / "d").touch()
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        store.since(-1)


def test_threads_lose_nothing(tmp_path: Path) -> None:
    stores = [DecisionStore(tmp_path / "decisions.csv") for _ in range(3)]

    def work(n: int) -> None:
        for i in range(15):
            stores[n].write([Change(f"{n}-{i}", "keep", 0)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_decisions(tmp_path / "decisions.csv")) == 45


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([*CHOICES, ""]), st.integers(0, 4)), max_size=12))
def test_a_row_changes_only_for_those_who_saw_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    store = DecisionStore(tmp_path_factory.mktemp("d") / "decisions.csv")
    model: dict[str, tuple[str, int]] = {}
    for name, choice, seen in steps:
        there = model.get(name, ("", 0))
        store.write([Change(name, choice, seen)])
        if choice != there[0] and seen == there[1]:
            model[name] = (choice, seen + 1)
    assert {n: (d.choice, d.version) for n, d in DecisionStore(store.path).since(-1)[1].items()} == model


def test_unknown_choices_and_unwritable_folders(tmp_path: Path) -> None:
    store = DecisionStore(tmp_path / "decisions.csv")
    with pytest.raises(ParameterError, match="got 'perhaps'"):
        store.write([Change("a", "perhaps", 0)])
    assert not store.path.exists()
    store.path.mkdir()
    with pytest.raises((OutputError, InputError)):
        store.write([Change("a", "keep", 0)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na\n", "needs the columns 'path' and 'decision'"),
        ("path,decision\na,maybe\n", "row 2: decision must be"),
        ("path,decision\na,keep\na,remove\n", "row 3: 'a' is decided twice"),
        ("path,decision,version\na,keep,x\n", "version must be a whole number"),
        (f"path,decision,version\na,keep,{'9' * 5000}\n", "version must be a whole number"),
        ("", "is empty"),
        ("path,deci", "needs the columns 'path' and 'decision'"),
        ("path,decision\na,kee", "row 2: decision must be"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_decisions(tmp_path / "d.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_decisions(tmp_path / "missing.csv")


def test_keep_and_remove_override_and_unsure_leaves() -> None:
    names, kept = ["a", "b", "c", "caf\udce9"], np.array([True, False, True, True])
    choices = {"a": "remove", "b": "keep", "c": "unsure", "caf\\udce9": "remove", "gone": "keep"}
    result, counts = apply_decisions(names, kept, choices)
    assert result.tolist() == [False, True, True, False]
    assert counts == {"keep": 1, "remove": 2, "unsure": 1, "elsewhere": 1}
    assert kept.tolist() == [True, False, True, True]
    with pytest.raises(InputError, match="None of the 1 decisions is about an image of this set"):
        apply_decisions(names, kept, {"other": "keep"})
    with pytest.raises(InputError, match="leave no image"):
        apply_decisions(["a"], np.array([True]), {"a": "remove"})


def test_fit_trains_on_what_a_person_decided(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    found = pipeline.screen(easy_folder, "padim", tiny, out=tmp_path / "s")
    first_removed, first_kept = int(found.removed[0]), int(found.kept[0])
    names = dict(zip(found.ids.tolist(), found.names, strict=True))
    (tmp_path / "d.csv").write_text(
        f"path,decision\n{names[first_removed]},keep\n{names[first_kept]},remove\n{names[int(found.removed[1])]},unsure\n"
    )
    model = pipeline.fit(
        easy_folder, "padim", tiny, screening=tmp_path / "s", decisions=tmp_path / "d.csv", out=tmp_path / "m"
    ).model
    saved, _ = load_screening(tmp_path / "s").with_decisions(read_decisions(tmp_path / "d.csv"))
    wanted = saved.kept.tolist()
    assert first_removed in wanted
    assert first_kept not in wanted
    again, _ = saved.with_decisions({})
    assert again.kept.tolist() == wanted, "what was decided stays decided"
    assert model.training["n_kept"] == len(wanted)
    assert model.training["decisions"] == {"keep": 1, "remove": 1, "unsure": 1, "elsewhere": 0}
    assert len(model.calibration.scores) == len(wanted)
    anew = pipeline.fit(
        easy_folder, "padim", tiny, options=ScreenOptions(screener="own"), decisions={names[first_kept]: "remove"}
    ).model
    assert anew.training["n_kept"] == len(found.kept) - 1
    with pytest.raises(InputError, match="The decisions name none of the 50 images"):
        pipeline.fit(easy_folder, "padim", tiny, screening=tmp_path / "s", decisions={"x": "keep"})


def test_a_screening_is_read_as_it_was_written(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    found = pipeline.screen(easy_folder, "padim", tiny, out=tmp_path / "s")
    again = load_screening(tmp_path / "s")
    for name in ("ids", "kept", "patch_maps", "descriptions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    for name in ("held_out_scores", "consensus"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), rtol=1e-5)
    mine, theirs = again.submodel_scores, found.submodel_scores
    np.testing.assert_array_equal(mine.subset_of, theirs.subset_of)
    np.testing.assert_allclose(mine.score_matrix, theirs.score_matrix, rtol=1e-5)
    assert (again.seed, again.keep_share) == (found.seed, found.keep_share)
    assert (list(again.names), again.options, again.unreadable) == (list(found.names), found.options, found.unreadable)
    assert (again.contamination, again.submodel_scores.divergence) == (found.contamination, None)
    assert again.provenance["images_root"] == str(easy_folder)


def test_a_name_may_hold_line_ends(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(easy_folder, tmp_path / "parts"))
    (parts / "part-07.png").rename(parts / "a\rb\n.png")
    found = pipeline.screen(parts, "padim", tiny, out=tmp_path / "s")
    assert list(load_screening(tmp_path / "s").names) == list(found.names)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_a_screening_that_leads_out_of_its_folder_is_refused(
    easy_folder: Path, tiny: Backbone, tmp_path: Path, name: str
) -> None:
    pipeline.screen(easy_folder, "padim", tiny, out=tmp_path / "s")
    table = tmp_path / "s" / "screening.csv"
    table.write_text(table.read_text().replace("part-03.png", name))
    with pytest.raises(InputError, match=r"screening\.csv lists other images than were screened"):
        load_screening(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()  # as in a screening of an earlier version
    with pytest.raises(InputError, match="leads out of the image folder"):
        load_screening(tmp_path / "s")
