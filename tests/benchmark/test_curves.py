"""Curves show what the rows say, on one scale, and the same rows give the same drawing."""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from flawsift.benchmark.curves import Series, Style, accuracy_curves, draw, kept_curves
from flawsift.errors import InputError


def row(**changes: Any) -> dict[str, str]:
    base = {
        "data": "tiles",
        "category": "",
        "detector": "PaDiM",
        "alpha": 0.2,
        "protocol": "no_overlap",
        "n_subsets": "",
        "seed": 0,
        "preset": "paper",
        "image_auroc": 0.9,
        "n_train": 100,
        "alpha_reached": 0.2,
        "kept_normal": 40,
        "kept_anomalous": 5,
        "alone_normal": 32,
        "alone_anomalous": 13,
    }
    return {k: str(v) for k, v in {**base, **changes}.items()}


def heights(svg: str, colour: str) -> list[float]:
    """Of the points of one colour, upwards."""
    return [-float(y) for y in re.findall(rf'<use [^>]*y="([\d.]+)" style="[^"]*stroke: var\(--{colour}\)', svg)]


def test_accuracy_is_the_mean_over_seeds_with_its_deviation() -> None:
    values = {(0.0, 0): 0.9, (0.0, 1): 0.8, (0.2, 0): 0.7, (0.2, 1): 0.5}
    rows = [row(alpha=a, seed=s, preset="none", image_auroc=v) for (a, s), v in values.items()]
    rows += [row(alpha=a, seed=0, preset="default", image_auroc=0.95) for a in (0.0, 0.2)]
    (curve,) = accuracy_curves(rows)
    assert (curve.title, curve.header) == ("tiles, PaDiM", ("0 %", "20 %"))
    assert curve.table == (
        ("no screening", "0.850 ± 0.071", "0.600 ± 0.141"),
        ("default", "0.950 †", "0.950 †"),  # it lacks a seed
    )
    low, high = heights(curve.svg, "untouched"), heights(curve.svg, "normal")
    assert high[0] == high[1] > low[0] > low[1]
    assert (high[0] - low[1]) / (high[0] - low[0]) == pytest.approx(3.5, rel=1e-3)
    assert curve.svg.count("fill-opacity") == 1  # the band of the preset that has two seeds
    assert 'role="img" aria-label="Image AUROC over contamination: tiles, PaDiM"' in curve.svg
    assert ">defective in training, %</text>" in curve.svg
    assert accuracy_curves([r for r in rows if r["alpha"] == "0.2"]) == []  # one point is no curve


def test_drawings_of_one_set_have_one_scale() -> None:
    rows = [row(alpha=a, detector=d, image_auroc=v) for d, v in (("PaDiM", 0.4), ("RD", 0.9)) for a in (0.0, 0.2)]
    low, high = accuracy_curves(rows)
    assert heights(high.svg, "paper")[0] > heights(low.svg, "paper")[0]
    ticks = [re.findall(r">(0\.\d+)</text>", curve.svg) for curve in (low, high)]
    assert ticks[0] == ticks[1] != []
    (perfect,) = accuracy_curves([row(alpha=a, image_auroc=1.0) for a in (0.0, 0.2)])
    assert len(heights(perfect.svg, "paper")) == 2


def test_the_kept_are_shares_of_the_images_of_a_kind() -> None:
    clean = {"alpha": 0.0, "alpha_reached": 0.0, "kept_anomalous": 0, "alone_anomalous": 0}
    rows = [row(), row(kept_normal=60, alone_normal=60, **clean)]
    (curve,) = kept_curves(rows)
    assert (curve.title, curve.header) == ("tiles, PaDiM, paper", ("0 %", "20 %"))
    # 40 of 80 normal and 5 of 20 anomalous images; without anomalous ones there is no share of them
    assert curve.table == (
        ("normal, consensus", "60", "50"),
        ("normal, sub-model alone", "60", "40"),
        ("anomalous, consensus", "-", "25"),
        ("anomalous, sub-model alone", "-", "65"),
    )
    assert (len(heights(curve.svg, "normal")), len(heights(curve.svg, "anomalous"))) == (4, 2)
    assert kept_curves([row()]) == []  # one point is no curve
    assert kept_curves([row(preset="oracle_clean"), row(alpha=0.4, preset="oracle_clean")]) == []


def test_the_kept_over_k() -> None:
    rows = [row(n_subsets=k, kept_anomalous=a) for k, a in ((3, 10), (5, 4), (7, 2))]
    (curve,) = kept_curves(rows)
    assert curve.title == "tiles, PaDiM, paper, 20% defective"
    assert curve.header == ("k = 3", "k = 5", "k = 7")
    assert curve.table[2] == ("anomalous, consensus", "50", "20", "10")
    assert all(a > b for a, b in pairwise(heights(curve.svg, "anomalous")[:3]))
    assert kept_curves([row(n_subsets=k, alpha=0.0, alpha_reached=0.0) for k in (3, 5)]) == []


def drawn(values: Sequence[float | None], label: str = "x") -> str:
    return draw([0, 1, 2], [Series(Style("paper"), values, [None] * len(values))], (0, 1), "axis", label)


def test_a_drawing_is_the_same_each_time_and_takes_its_colours_from_the_page() -> None:
    first = drawn([0.2, 0.4, 0.1])
    assert first == drawn([0.2, 0.4, 0.1])
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata", first)
    assert len(heights(drawn([0.2, None, 0.1]), "paper")) == 2
    assert drawn([None, None, None]).startswith("<svg viewBox=")
    assert 'aria-label="&lt;&quot;&gt;"' in drawn([0.2, 0.4, 0.1], '<">')


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"A curve needs the package matplotlib: pip install 'flawsift\[benchmark\]'"):
        drawn([0.2, 0.4, 0.1])
