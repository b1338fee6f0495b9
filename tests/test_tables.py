"""Tables are read as they were written, and begin no formula in a spreadsheet."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flawsift.tables import cells_of, write_csv

# any text that UTF-8 can hold, with beginnings of formulas often among them
TEXTS = st.tuples(
    st.sampled_from(["", "'", "''", "=", "'=", "''+", "-", "@", "\t", "\r", "\n", "'\r\n"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
).map("".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=5))
@example([("=HYPERLINK(1).png", "'=x"), ("a\rb", "a\r\nb"), ('a"b', " a,b "), ("", "\r\n")])
def test_every_cell_is_read_as_it_was_written_and_begins_no_formula(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_csv(path, ["x", "y"], rows)
    content = path.read_bytes()
    assert cells_of(content) == [["x", "y"], *map(list, rows)]
    for row in csv.reader(io.StringIO(content.decode(), newline="")):
        assert all(cell[:1] not in tuple("=+-@\t\r\n") or _is_number(cell) for cell in row)


def _is_number(cell: str) -> bool:
    try:
        return float(cell) is not None and cell == cell.strip()
    except ValueError:
        return False


@pytest.mark.parametrize("cell", ["-1.25", "+3", "-.5e-07", "-1e+20", "-inf", "nan", "7"])
def test_numbers_stay_numbers(tmp_path: Path, cell: str) -> None:
    write_csv(tmp_path / "t.csv", ["score"], [[cell], [float(cell)]])
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == cell
    assert float((tmp_path / "t.csv").read_text().splitlines()[2]) == pytest.approx(float(cell), nan_ok=True)


def test_two_names_are_never_written_alike(tmp_path: Path) -> None:
    names = ["=a", "'=a", "''=a", "a", "'a", "-1", "'-1", "''-1"]
    write_csv(tmp_path / "t.csv", ["path"], [[name] for name in names])
    assert len(set((tmp_path / "t.csv").read_text().splitlines()[1:])) == len(names)
    assert [row[0] for row in cells_of((tmp_path / "t.csv").read_bytes())[1:]] == names


def test_what_a_person_wrote_without_apostrophes_is_read_as_it_stands() -> None:
    assert cells_of(b"\xef\xbb\xbfpath\r\n-a.png\r\n\r\n=b.png\r\nit's.png\r\n'c'.png\r\n") == [
        ["path"], ["-a.png"], ["=b.png"], ["it's.png"], ["'c'.png"],
    ]  # fmt: skip


def test_names_that_are_not_utf8_and_empty_cells(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    write_csv(tmp_path / "t.csv", ["path"], [[odd], [None], ['a,"b"']])
    assert (tmp_path / "t.csv").read_text() == 'path\ncaf\\udce9.png\n""\n"a,""b"""\n'
