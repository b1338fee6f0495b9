"""Names of results: every system can write them, they tell which image they are of, and no two are alike."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsift.paths import safe_name

DEVICES = ["CON", "nul.png", "Aux.tar.gz", "COM1", "lpt9.jpg", "COM\u00b9.png", "PRN .png", "CONOUT$"]
ODD = [*DEVICES, "a.", "a ", "a. .", ".", "x" * 252, "\u00e9" * 130, "a~0123456789ab", "_NUL.png"]
PARTS = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=300))


@pytest.mark.parametrize(
    "name", ["a.png", "sub/deep er/b.c.jpg", "two.tif#page=2", "console.png", "COM.png", "x" * 251]
)
def test_ordinary_names_stay(name: str) -> None:
    assert safe_name(name, ".png") == f"{name}.png"


@pytest.mark.parametrize("name", ODD[:-1])
def test_odd_names_are_written_and_recognised(tmp_path: Path, name: str) -> None:
    for safe in (safe_name(name, ".png"), safe_name(f"{name}/x.jpg", ".png")):
        path = tmp_path / safe
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        part = safe.split("/")[0]
        assert part.split("~")[0].lstrip("_")[:3] == name.rstrip(". ").split("~")[0][:3]
        assert part.split(".")[0].upper().rstrip() not in {
            "CON",
            "NUL",
            "AUX",
            "COM1",
            "LPT9",
            "COM\u00b9",
            "PRN",
            "CONOUT$",
        }
        assert part[-1] not in ". "


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join), st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_no_two_are_alike_and_all_fit(one: str, other: str) -> None:
    a, b = safe_name(one, ".png"), safe_name(other, ".png")
    assert (a == b) == (one == other)
    assert all(len(part.encode("utf-8", "surrogatepass")) <= 255 for part in a.split("/"))
    assert a.count("/") == one.count("/")


def test_a_name_made_safe_is_not_that_of_another_image() -> None:
    made = safe_name("NUL", ".png").removesuffix(".png")
    assert safe_name(made, ".png") != safe_name("NUL", ".png")
