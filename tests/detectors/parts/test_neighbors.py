"""`flawsift.detectors.parts.neighbors` against brute force in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from flawsift.detectors.parts import neighbors
from flawsift.detectors.parts.neighbors import (
    NearestNeighbors,
    local_outlier_factor,
    mutual_nearest,
    nearest,
    nearest_others,
    query_grid,
)
from flawsift.detectors.parts.robust import group_medians
from flawsift.errors import ParameterError

EXAMPLES = settings(max_examples=60, deadline=None)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


def integers(*shape: int, high: int, seed: int = 0) -> Tensor:
    """Integer-valued float32: every distance is exact, and many are equal."""
    return torch.randint(high, shape, generator=rng(seed)).float()


def brute(queries: Tensor, bank: Tensor, k: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k nearest by direct float64 subtraction; ties to the lowest row; `hidden` (Q, M) rows are not eligible."""
    squared = (queries.double()[:, None] - bank.double()[None]).square().sum(dim=2)
    if hidden is not None:
        squared = squared.masked_fill(hidden, torch.inf)
    squared, ids = squared.sort(dim=1, stable=True)
    return squared[:, :k].sqrt(), ids[:, :k]


# --- nearest neighbours ---


@EXAMPLES
@given(st.integers(0, 40), st.integers(1, 150), st.integers(1, 20), st.integers(1, 7), st.integers(0, 10**6))
def test_nearest_is_brute_force(q: int, m: int, c: int, k: int, seed: int) -> None:
    k = min(k, m)
    queries, bank = normal(q, c, seed=seed), normal(m, c, seed=seed + 1)
    distances, ids = nearest(queries, bank, k=k)
    expected, expected_ids = brute(queries, bank, k)
    assert distances.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


@EXAMPLES
@given(st.integers(1, 30), st.integers(1, 150), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_ties_go_to_the_lowest_bank_row(q: int, m: int, c: int, k: int, seed: int) -> None:
    k = min(k, m)
    queries, bank = integers(q, c, high=4, seed=seed), integers(m, c, high=4, seed=seed + 1)
    assert torch.equal(nearest(queries, bank, k=k)[1], brute(queries, bank, k)[1])


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_a_row_of_the_bank_is_at_distance_zero_from_itself(offset: float) -> None:
    bank = normal(3000, 40) + offset
    distances, ids = nearest(bank, bank)
    assert not distances.any()
    assert torch.equal(ids[:, 0], torch.arange(3000))


def test_near_duplicates_far_from_the_mean_are_told_apart() -> None:
    # two tight clusters: squared distances inside one are far below float32 rounding of the squared norms
    side = torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0)[:, None]
    bank = side + 1e-5 * normal(400, 16)
    queries = side[:50] + 1e-5 * normal(50, 16, seed=1)
    distances, ids = nearest(queries, bank, k=3)
    expected, expected_ids = brute(queries, bank, 3)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=0)


def test_an_offset_costs_neither_accuracy_nor_a_second_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(NearestNeighbors, "_search_double")
    # on a grid of 1/16, an offset of 1000 is exact: everything must stay as it is
    queries, bank = (16 * normal(200, 64)).round() / 16, (16 * normal(500, 64, seed=1)).round() / 16
    plain, shifted = nearest(queries, bank, k=3), nearest(queries + 1000, bank + 1000, k=3)
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1])


@pytest.mark.parametrize("k", [1, 4])
def test_neither_blocks_nor_company_nor_order_change_a_bit(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.cat([normal(500, 33), normal(500, 33)[:100], 1 + 1e-5 * normal(100, 33, seed=2)])
    queries = torch.cat([normal(100, 33, seed=1), bank[::17], 1 + 1e-5 * normal(30, 33, seed=3)])
    index = NearestNeighbors(bank)
    distances, ids = index.query(queries, k=k)
    for rows in (20, 64, 10_000):
        monkeypatch.setattr(neighbors, "_MIN_BLOCK_ROWS", rows)
        monkeypatch.setattr(neighbors, "_BLOCK_FLOATS", rows * len(bank))
        assert torch.equal(index.query(queries, k=k)[0], distances)
        assert torch.equal(index.query(queries, k=k)[1], ids)
    order = torch.randperm(len(queries), generator=rng())
    for company in (order, order[:3], order[40:41]):
        some = index.query(queries[company], k=k)
        assert torch.equal(some[0], distances[company])
        assert torch.equal(some[1], ids[company])


def test_small_parts_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = integers(60, 3, high=5), integers(150, 3, high=5, seed=1)
    expected = nearest(queries, bank, k=3)
    monkeypatch.setattr(neighbors, "_PART_ROWS", 17)
    monkeypatch.setattr(neighbors, "_BLOCK_FLOATS", 1)
    monkeypatch.setattr(neighbors, "_MIN_BLOCK_ROWS", 5)
    distances, ids = nearest(queries, bank, k=3)
    assert torch.equal(distances, expected[0])
    assert torch.equal(ids, expected[1])


@EXAMPLES
@given(st.integers(2, 80), st.integers(2, 6), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_rows_of_the_same_owner_are_not_eligible(m: int, n_owners: int, k: int, ties: bool, seed: int) -> None:
    bank = integers(m, 2, high=4, seed=seed) if ties else normal(m, 5, seed=seed)
    owners = 100 * (torch.arange(m) % n_owners)
    hidden = owners[:, None] == owners[None]
    k = min(k, int((~hidden).sum(dim=1).min()))
    distances, ids = NearestNeighbors(bank, owners=owners).query(bank, k=k, owners=owners)
    expected, expected_ids = brute(bank, bank, k, hidden)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_query_owners_without_bank_rows_exclude_nothing() -> None:
    bank, queries = normal(20, 4), normal(6, 4, seed=1)
    index = NearestNeighbors(bank, owners=torch.arange(20))
    distances, ids = index.query(queries, k=20, owners=torch.full((6,), 99))
    assert torch.equal(distances, index.query(queries, k=20)[0])
    assert torch.equal(ids.sort(dim=1).values, torch.arange(20).expand(6, 20))


def test_the_bank_is_not_changed_and_gradients_do_not_flow() -> None:
    bank, queries = normal(30, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    distances, _ = nearest(queries, bank)
    assert not distances.requires_grad
    assert torch.equal(bank, normal(30, 4))


def test_half_precision_is_compared_as_float32() -> None:
    queries, bank = normal(20, 8).half(), normal(50, 8, seed=1).half()
    assert torch.equal(nearest(queries, bank)[0], nearest(queries.float(), bank.float())[0])


def test_errors_of_nearest() -> None:
    bank = normal(10, 4)
    with pytest.raises(ParameterError, match=r"at least one row, got \(0, 4\)"):
        NearestNeighbors(bank[:0])
    with pytest.raises(ParameterError, match=r"\(Q, 4\) like the bank, got \(10, 3\)"):
        nearest(bank[:, :3], bank)
    for k in (0, 11):
        with pytest.raises(ParameterError, match=rf"k must be in \[1, 10\].*got {k}"):
            nearest(bank, bank, k=k)
    owners = torch.tensor([0] * 8 + [1] * 2)
    with pytest.raises(ParameterError, match=r"k must be in \[1, 2\].*got 3"):
        NearestNeighbors(bank, owners=owners).query(bank, k=3, owners=owners)
    with pytest.raises(ParameterError, match="without owners"):
        NearestNeighbors(bank).query(bank, owners=owners)
    with pytest.raises(ParameterError, match=r"bank owners must be \(10,\), got \(9,\)"):
        NearestNeighbors(bank, owners=owners[:9])
    with pytest.raises(ParameterError, match=r"query owners must be \(10,\), got \(9,\)"):
        NearestNeighbors(bank, owners=owners).query(bank, owners=owners[:9])


@pytest.mark.parametrize(("n", "k"), [(10, 5), (60, 5), (60, 6), (60, 20), (230, 6), (230, 20)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_outlier_factors_equal_scikit_learn(n: int, k: int, offset: float) -> None:
    points = normal(3, n, 16, seed=n + k)
    points[:, :2] *= 4  # outliers
    points += offset
    expected = torch.stack(
        [
            torch.from_numpy(-LocalOutlierFactor(n_neighbors=k).fit(group).negative_outlier_factor_)
            for group in points.double().numpy()
        ]
    )
    torch.testing.assert_close(local_outlier_factor(points, k).double(), expected, atol=1e-5, rtol=0)


def test_outlier_factors_of_copies_are_finite() -> None:
    points = torch.cat([torch.ones(1, 9, 3), normal(1, 6, 3)], 1)  # 9 copies, k = 5
    found = local_outlier_factor(points, 5)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :9], torch.ones(9))
    torch.testing.assert_close(local_outlier_factor(torch.ones(2, 4, 3), 3), torch.ones(2, 4))


@EXAMPLES
@given(g=st.integers(1, 4), n=st.integers(2, 12), high=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_nearest_others_are_brute_force(g: int, n: int, high: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    points = integers(g, n, 3, high=high, seed=seed)
    distances, ids = nearest_others(points, k)
    for group, found, others in zip(points, distances, ids, strict=True):
        every = torch.cdist(group, group, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        torch.testing.assert_close(found, every.sort(1).values[:, :k])
        torch.testing.assert_close(every.gather(1, others), found)
        assert all(len(set(row)) == k for row in others.tolist())


def test_groups_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(5, 9, 4)
    whole = nearest_others(points, 3)
    monkeypatch.setattr(neighbors, "_BLOCK_FLOATS", 1)
    parts = nearest_others(points, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    with pytest.raises(ParameterError, match=r"k must be in \[1, 8\], the number of other points, got 9"):
        nearest_others(points, 9)


@EXAMPLES
@given(q=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 999))
def test_mutual_neighbours_are_mutual(q: int, m: int, seed: int) -> None:
    queries, bank = normal(q, 3, seed=seed), normal(m, 3, seed=seed + 1000)
    rows, distances, mutual = mutual_nearest(queries, bank)
    every = torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(rows, every.argmin(1))
    torch.testing.assert_close(distances, every.amin(1))
    assert mutual.tolist() == [int(every[:, row].argmin()) == i for i, row in enumerate(rows.tolist())]


@EXAMPLES
@given(q=st.integers(1, 20), m=st.integers(1, 20), high=st.integers(1, 3), seed=st.integers(0, 999))
def test_of_equal_queries_the_first_is_mutual(q: int, m: int, high: int, seed: int) -> None:
    queries, bank = integers(q, 2, high=high, seed=seed), integers(m, 2, high=high, seed=seed + 1000)
    rows, _, mutual = mutual_nearest(queries, bank)
    every = torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")
    partners = rows[mutual].tolist()
    assert partners
    assert len(set(partners)) == len(partners), "two queries share a mutual neighbour"
    for i in mutual.nonzero()[:, 0].tolist():
        assert every[i, rows[i]] == every[i].min() == every[:, rows[i]].min()


@pytest.mark.parametrize("k", [1, 2])
def test_a_grid_is_searched_cell_by_cell(k: int) -> None:
    bank, grid = normal(9, 4), normal(2, 4, 3, 5, seed=1)
    distances, rows = query_grid(NearestNeighbors(bank), grid, k=k)
    for b, y, x in itertools.product(range(2), range(3), range(5)):
        expected = nearest(grid[b, :, y, x][None], bank, k=k)
        assert torch.equal(distances[b, y, x], expected[0][0])
        assert torch.equal(rows[b, y, x], expected[1][0])


@EXAMPLES
@given(members=st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), max_size=30))
def test_group_medians_are_medians(members: list[tuple[int, float]]) -> None:
    groups = np.array([g for g, _ in members], np.int64)
    values = np.array([v for _, v in members], np.float64)
    expected = [np.median(values[groups == g]) if (groups == g).any() else 0.0 for g in range(6)]
    np.testing.assert_array_equal(group_medians(groups, values, 6), expected)
