"""Files that people write about images: what is understood, what is told, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsift.data.folders import groups_by_id, read_groups
from flawsift.data.joins import images_named, joined, read_table
from flawsift.errors import InputError

NAMES = ["sub/01.png", "sub/02.png", "other/02.png", "caf\u00e9.png", "03.png", "deep/03.png", "odd\udce9.png"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("sub/01.png", "sub/01.png"),
        ("sub\\01.png", "sub/01.png"),
        (".\\sub\\01.png", "sub/01.png"),
        ("./sub/01.png", "sub/01.png"),
        ("01.png", "sub/01.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),  # as macOS writes it
        ("03.png", "03.png"),  # an image of that very name comes first
        ("odd\\udce9.png", "odd\udce9.png"),  # as `show` prints it
        ("02.png", None),  # of two images
        ("b/01.png", None),
        ("1.png", None),
        ("", None),
    ],
)
def test_rows_and_the_images_that_they_are_about(row: str, name: str | None, caplog: pytest.LogCaptureFixture) -> None:
    found = images_named([row, "other/02.png"], NAMES, "groups")
    assert found == {"other/02.png": "other/02.png", **({} if name is None else {row: name})}
    assert ("1 of 2 groups are about no image here" in caplog.text) == (name is None)


@given(
    st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1).filter(lambda n: n.strip("./")), unique=True)
)
def test_every_image_is_found_by_its_own_name(names: list[str]) -> None:
    assert joined({name: str(n) for n, name in enumerate(names)}, names, "x") == {
        name: str(n) for n, name in enumerate(names)
    }


def test_rows_about_nothing_or_about_one_image_twice_are_refused() -> None:
    assert images_named([], NAMES, "groups") == {}
    with pytest.raises(InputError, match="The groups name none of the 7 images: one of them is x.png"):
        images_named(["x.png", "y.png"], NAMES, "groups")
    with pytest.raises(InputError, match="1 images are named twice by the groups"):
        images_named(["sub/01.png", "01.png"], NAMES, "groups")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n\n", "is empty"),
        ("file,group\na,b\n".encode("utf-16"), "is not a CSV table in UTF-8"),
        (b"file,group\n\xe9.png,b\n", "is not a CSV table in UTF-8"),
        (b"file,group\na\0,b\n", "holds NUL bytes"),
        (b"file,group\n" + b"a" * 200_000 + b",b\n", "field larger than field limit"),
        (b"file;group\na;b\n", "needs the columns 'file' and 'group', has file;group"),
        (b"file,gro", "no 'group'"),
        (b"file,group\na,b\nc,d.png,e\n", "row 3, has more cells than the 2 columns"),
    ],
)
def test_what_is_no_table_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(path, "Groups file", [("file", "path"), ("group",)])


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_bytes(b'\xef\xbb\xbf"path", group \r\n"a,b.png",x\r\n\r\n"c\rd.png"\r\n')
    rows = read_table(path, "Groups file", [("file", "path"), ("group",)])
    assert rows == [{"path": "a,b.png", "group": "x"}, {"path": "c\rd.png", "group": ""}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,1\na.png,2\n", "1 images are in two groups in .*: a.png"),
        ("", "names no group"),
        ("a.png,\nb.png,\n", "names no group"),
        ('a.png,1\n"b.p', "is not a CSV table in UTF-8: unexpected end of data"),
    ],
)
def test_groups_that_say_nothing_or_two_things_are_refused(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text(f"file,group\n{rows}")
    with pytest.raises(InputError, match=message):
        read_groups(tmp_path / "groups.csv")


def test_images_without_a_group_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert groups_by_id({0: "a.png", 1: "b.png", 2: "c.png"}, {"a.png": "x", "b.png": "x"}) == {0: "x", 1: "x"}
    assert "1 of 3 images have no group, and are a group each: c.png." in caplog.text
    caplog.clear()
    groups_by_id({0: "a.png", 1: "b.png"}, {})
    assert not caplog.text
