"""Texts that all pages share."""

import pytest

from flawsift.reports.pages import number, plural


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (-1e-13, "0"), (1e-11, "1e-11"), (1234.56, "1235"), (-2.50004, "-2.5")],
)
def test_numbers_have_four_digits_and_no_negative_zero(value: float, text: str) -> None:
    assert number(value) == text


def test_only_one_thing_is_singular() -> None:
    assert [plural(n, "image") for n in (0, 1, 2)] == ["images", "image", "images"]
