"""Distances of pairs of vectors by class, and mutual matches, against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift.reports.pairs import (
    ALL,
    ANOMALY_ANOMALY,
    NORMAL_ANOMALY,
    NORMAL_NORMAL,
    chance_below,
    matching,
    pair_distances,
)
from tests.reports.material import synthetic_setting


def test_squared_distances_equal_the_theory() -> None:
    vectors, labels = synthetic_setting(16, 2000, 2000, seed=3)
    found = pair_distances(vectors, labels, n=50_000)
    for kind, expected in {NORMAL_NORMAL: 2.0, ANOMALY_ANOMALY: 4.0, NORMAL_ANOMALY: 3 + 1.5**2}.items():
        assert (found[kind] ** 2).mean() == pytest.approx(16 * expected, rel=0.02)


def test_matches_equal_the_definition() -> None:
    vectors, labels = synthetic_setting(3, 60, 20, seed=2)
    gaps = torch.cdist(vectors, vectors).fill_diagonal_(math.inf)
    for k in (1, 3):
        near = gaps.argsort(dim=1)[:, :k].tolist()
        pairs = [(i, j) for i in range(80) for j in near[i] if i in near[j]]
        found = matching(vectors, labels, k=k)
        assert found.matched == len({i for i, _ in pairs}) / 80
        assert found.true_normal == len({i for i, j in pairs if i < 60 and j < 60}) / 60
        assert found.true_anomaly == len({i for i, j in pairs if i >= 60 and j >= 60}) / 20
        assert found.false == len({i for i, j in pairs if (i < 60) != (j < 60)}) / 80


def test_pairs_and_matches_across_images_leave_out_those_within() -> None:
    # two images of two vectors each: close together within, 10 apart across
    vectors, owners = torch.tensor([[0.0], [1.0], [11.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    found = pair_distances(vectors, owners=owners, n=500)[ALL]
    assert sorted(set(found.tolist())) == [10, 11, 12]
    assert matching(vectors).matched == 1
    assert matching(vectors, owners=owners).matched == 0.5
    alone = pair_distances(vectors[:2], owners=owners[:2])
    assert alone == {}, "one image has no pairs across images"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_chance_below_counts_ties_half(a: list[int], b: list[int]) -> None:
    expected = np.mean([[1.0 if x < y else 0.5 if x == y else 0.0 for y in b] for x in a])
    assert chance_below(np.array(a, float), np.array(b, float)) == pytest.approx(expected)
