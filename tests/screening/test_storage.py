"""Screenings on disk whose values are of other kinds than were written, and whose names a spreadsheet would run."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.errors import FlawsiftError, InputError
from flawsift.features.backbones import Backbone
from flawsift.reports.export import export
from flawsift.reports.wording import explanation, headline
from flawsift.screening.decisions import Change, DecisionStore, read_decisions
from flawsift.screening.storage import images_of, load_screening, save_screening
from flawsift.tables import cells_of
from tests.reports.material import make_evidence, make_screening, noise

WRONG: Sequence[Any] = (None, -1, 10**40, "x", [[]], {"a": 1}, float("inf"))
IDS = [3, 7, 5, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    screening = make_screening(ImageSet.from_arrays(noise(len(IDS)), ids=IDS), n_removed=1, evidence=make_evidence(IDS))
    save_screening(screening, tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()  # as in a screening of an earlier version
    return tmp_path / "s"


def variants(value: Any) -> Iterator[Any]:
    """JSON with one value of another kind each, however deep."""
    yield from WRONG
    keys = value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
    for key in keys:
        for other in variants(value[key]):
            changed = value.copy()
            changed[key] = other
            yield changed


def test_values_of_other_kinds_are_told(folder: Path) -> None:
    content = json.loads((folder / "screening.json").read_text())
    content |= {"images_root": str(folder), "unreadable": {"a.png": "empty"}}
    assert {"contamination", "options", "set_aside"} <= set(content)
    n_refused = 0
    for changed in variants(content):
        (folder / "screening.json").write_text(json.dumps(changed))
        try:
            screening = load_screening(folder)
            assert headline(screening)
            assert explanation(screening)
            assert all(reason.strip() for reason in screening.unreadable.values())
            images_of(screening)
        except FlawsiftError:
            n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize("name", ["screening.json", "manifest.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "", "\0"])
def test_what_is_no_table_of_values_is_told(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        load_screening(folder)


@pytest.mark.parametrize("name", ["maps.npy", "descriptions.npy", "evidence.npz"])
def test_an_array_that_its_manifest_has_lost_is_told(
    name: str, easy_folder: Path, tiny: Backbone, tmp_path: Path
) -> None:
    pipeline.screen(easy_folder, None, tiny, out=tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    content = json.loads(path.read_text())
    del content["files"][name]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name} is not what was written with the others"):
        load_screening(tmp_path / "s")


def test_an_array_with_values_that_are_no_numbers_is_told(folder: Path) -> None:
    values = np.load(folder / "maps.npy")
    values[1, 0, 0] = np.nan
    np.save(folder / "maps.npy", values)
    with pytest.raises(InputError, match=r"maps\.npy holds values that are no numbers"):
        load_screening(folder)


def test_the_head_of_an_array_may_be_anything(folder: Path) -> None:
    whole = (folder / "maps.npy").read_bytes()
    assert whole.startswith(b"\x93NUMPY")
    for text in (b"{'descr': (", b"{'descr'", b"\x00" * 9, b"'" * 3, b"{}", b"1 +", b"lambda: 0"):
        (folder / "maps.npy").write_bytes(whole[:10] + text.ljust(54) + whole[64:])
        with pytest.raises(InputError, match="is damaged"):
            load_screening(folder)


@pytest.mark.parametrize("content", ["", "id,path\n", "id,path,kept,error\n" + "a" * 200_000 + ",b,1,\n", '"', "\0"])
def test_a_table_that_cannot_be_read_is_told(folder: Path, content: str) -> None:
    (folder / "screening.csv").write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        load_screening(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",", ";").encode(), "no column 'id' among id;path;.*cells are parted by commas"),
        (lambda text: text.encode("utf-16"), "is no table of a screening any more: 'utf-8' codec can't decode.*UTF-8"),
        (lambda text: text[: text.rindex(",", 0, text.rindex(",1,"))].encode(), "the row of '.*' is cut off"),
    ],
)
def test_an_edited_table_says_how_to_save_it(
    easy_folder: Path, tiny: Backbone, tmp_path: Path, change: Any, message: str
) -> None:
    pipeline.screen(easy_folder, backbone=tiny, out=tmp_path)
    table = tmp_path / "screening.csv"
    table.write_bytes(change(table.read_text("utf-8").rstrip()))
    with pytest.raises(InputError, match=message) as told:
        load_screening(tmp_path)
    assert "screening.csv" in str(told.value)
    assert len(str(told.value)) < 400


def test_spreadsheets_leave_out_empty_cells_at_the_end_of_a_row(
    easy_folder: Path, tiny: Backbone, tmp_path: Path
) -> None:
    made, table = pipeline.screen(easy_folder, backbone=tiny, out=tmp_path), tmp_path / "screening.csv"
    table.write_text("".join(f"{line.removesuffix(',')}\n" for line in table.read_text("utf-8").splitlines()))
    assert load_screening(tmp_path).kept.tolist() == made.kept.tolist()


def test_no_cell_of_a_path_begins_a_formula_and_all_are_understood(
    easy_folder: Path, tiny: Backbone, tmp_path: Path
) -> None:
    parts = Path(shutil.copytree(easy_folder, tmp_path / "parts"))
    odd = ["=cmd.png", "+1.png", "-2.png", "@sum.png", "\tb.png", "'=c.png"]
    for i, name in enumerate(odd):
        (parts / f"part-{i:02}.png").rename(parts / name)
    pipeline.screen(parts, "padim", tiny, out=tmp_path / "s")
    screening = load_screening(tmp_path / "s")
    assert set(odd) < set(screening.names)
    store = DecisionStore(tmp_path / "s" / "decisions.csv", screening.names)
    store.write([Change(name, "remove", 0) for name in odd])
    assert read_decisions(store.path) == dict.fromkeys(odd, "remove")
    export(screening, images_of(screening), tmp_path / "e", "csv", choices=read_decisions(store.path))
    for table in (tmp_path / "s" / "screening.csv", store.path, tmp_path / "e" / "images.csv"):
        header, *rows = cells_of(table.read_bytes())
        names = [row[header.index("path")] for row in rows]
        assert set(odd) <= set(names)
        for line in table.read_bytes().splitlines()[1:]:
            assert not any(cell.strip(b'"')[:1] in (b"=", b"+", b"@", b"\t") for cell in line.split(b","))
            assert b",-2" not in line
    kept = pipeline.fit(parts, "padim", tiny, screening=tmp_path / "s", decisions=store.path).model.training["n_kept"]
    assert kept <= len(screening.ids) - len(odd)
