"""Nearest patches of groups against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flawsift.detectors.parts.groups import GroupNeighbors

INF = float("inf")


def brute_force(bank: Tensor, groups: Tensor, usable: Tensor, queries: Tensor, own: Tensor) -> Tensor:
    """(Q, G) distances to the nearest usable patch of each group, inf for the query's own."""
    n, p, c = bank.shape
    each = torch.cdist(queries.double(), bank.double().reshape(n * p, c)).view(len(queries), n, p)
    each = each.masked_fill(~usable, INF).amin(2)
    by_group = [each[:, groups == g].amin(1).masked_fill(own == g, INF) for g in sorted(set(groups.tolist()))]
    return torch.stack(by_group, 1)


@given(
    n=st.integers(1, 9),
    p=st.integers(1, 5),
    n_groups=st.integers(1, 4),
    k=st.integers(1, 6),
    far=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_distances_equal_brute_force(n: int, p: int, n_groups: int, k: int, far: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn((n, p, 7), generator=generator) + far
    groups = torch.randint(0, n_groups, (n,), generator=generator) * 3 - 1  # any integers, in any order
    usable = torch.rand((n, p), generator=generator) > 0.3
    queries = torch.randn((11, 7), generator=generator) + far
    own = torch.randint(-1, n_groups, (11,), generator=generator) * 3 - 1
    expected = brute_force(bank, groups, usable, queries, own).sort(1).values[:, :k]
    for exact, tolerance in ((True, 1e-3), (False, 1e-2)):
        found = GroupNeighbors(bank, groups, usable=usable, exact=exact).query(queries, k, own)
        assert found.shape == (11, k)
        assert found[:, expected.shape[1] :].isinf().all()
        torch.testing.assert_close(found[:, : expected.shape[1]].double(), expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_loses_nothing_where_patches_are_near() -> None:
    """Products of rounded numbers, each some thousands, would not tell distances of 1 apart."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn((6, 16, 32), generator=generator) * 0.2 + torch.randn(32, generator=generator) * 50
    queries = bank[0] + torch.randn((16, 32), generator=generator) * 0.1
    search = GroupNeighbors(bank, torch.arange(6))
    search_exact = GroupNeighbors(bank, torch.arange(6), exact=True)
    torch.testing.assert_close(search.query(queries, 3), search_exact.query(queries, 3), rtol=0.01, atol=0)


def test_many_queries_and_images_are_taken_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn((70, 100, 4), generator=generator), torch.randn((1500, 4), generator=generator)
    groups, own = torch.arange(70) // 2, torch.arange(1500) % 35
    found = GroupNeighbors(bank, groups, exact=True).query(queries, 2, own)
    expected = brute_force(bank, groups, torch.ones(70, 100).bool(), queries, own).sort(1).values[:, :2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_nearest_patches_are_named() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = torch.randn((9, 5, 4), generator=generator), torch.randn((70, 4), generator=generator)
    groups, usable = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]), torch.rand((9, 5), generator=generator) > 0.3
    own = torch.arange(70) % 5  # 4 is no group
    distances, images, places = GroupNeighbors(bank, groups, usable=usable, exact=True).nearest_patches(queries, 4, own)
    expected = brute_force(bank, groups, usable, queries, own).sort(1).values
    there = expected.isfinite()
    torch.testing.assert_close(distances[there].double(), expected[there], rtol=1e-5, atol=1e-5)
    assert distances[~there].isnan().all()
    assert (images[~there] == -1).all()
    assert (places[~there] == -1).all()
    named = bank[images[there], places[there]]
    measured = (named - queries[:, None].expand(-1, 4, -1)[there]).norm(dim=1)
    torch.testing.assert_close(measured, distances[there])
    assert usable[images[there], places[there]].all()
    chosen = groups[images].masked_fill(~there, -1)
    for row, mine in zip(chosen.tolist(), own.tolist(), strict=True):
        present = [g for g in row if g >= 0]
        assert len(set(present)) == len(present)
        assert mine not in present


@pytest.mark.parametrize("exact", [True, False])
def test_copies_are_near_and_nothing_is_nan(exact: bool) -> None:
    bank = torch.full((4, 3, 8), 7.25)
    found = GroupNeighbors(bank, torch.arange(4), exact=exact).query(bank[0], 5, torch.zeros(3))
    assert np.allclose(found[:, :3], 0, atol=0.05)
    assert found[:, 3:].isinf().all()
