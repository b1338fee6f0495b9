"""`flawsift.detectors.parts.coreset` against plain farthest-first selection in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flawsift.detectors.parts import coreset
from flawsift.detectors.parts.coreset import k_center_greedy, project, random_projection
from flawsift.errors import ParameterError

EXAMPLES = settings(max_examples=60, deadline=None)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


def integers(*shape: int, high: int, seed: int = 0) -> Tensor:
    """Integer-valued float32: every distance is exact, and many are equal."""
    return torch.randint(high, shape, generator=rng(seed)).float()


def naive_greedy(features: Tensor, n_select: int, start: int) -> tuple[list[int], list[float], float]:
    """Farthest-first by direct float64 distances.

    Returns:
        rows, the squared radius after each centre, and the smallest relative lead of a pick over its runner-up.
    """
    x: NDArray[np.float64] = features.double().numpy()
    closest = ((x - x[start]) ** 2).sum(axis=1)
    rows, radii, lead = [start], [float(closest.max())], np.inf
    while len(rows) < n_select and closest.max() > 0:
        pick = int(closest.argmax())
        second, first = np.partition(closest, -2)[-2:]
        lead = min(lead, (first - second) / first)
        closest = np.minimum(closest, ((x - x[pick]) ** 2).sum(axis=1))
        rows.append(pick)
        radii.append(float(closest.max()))
    return rows, radii, float(lead)


# --- projection ---


def test_projection_keeps_distances_and_is_drawn_from_the_generator() -> None:
    x = normal(60, 2000)
    y = project(x, 500, rng(3))
    assert y.shape == (60, 500)
    assert y.dtype == torch.float32
    ratio = torch.pdist(y) / torch.pdist(x)
    assert abs(float(ratio.mean()) - 1) < 0.01
    assert float(ratio.std()) < 0.05  # sqrt(1 / (2 * 500)) = 0.032
    assert torch.equal(y, x @ random_projection(2000, 500, rng(3)))


def test_projection_is_skipped_when_there_is_nothing_to_gain() -> None:
    x, generator = normal(5, 8), rng()
    before = generator.get_state()
    assert project(x, 8, generator) is x
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ParameterError, match="got 0 and 3"):
        random_projection(0, 3, generator)


# --- k-center greedy ---


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 120), st.integers(1, 4), st.integers(2, 30), st.integers(0, 10**6))
def test_greedy_equals_naive_on_integers(data: st.DataObject, n: int, c: int, high: int, seed: int) -> None:
    features = integers(n, c, high=high, seed=seed)
    n_select, start = data.draw(st.integers(1, n - 1)), data.draw(st.integers(0, n - 1))
    sizes = data.draw(st.sampled_from([(1, 1), (2, 3), (7, 4), (4096, 256)]))
    with pytest.MonkeyPatch.context() as patch:  # small sizes: many rounds, ties across their borders
        patch.setattr(coreset, "_CANDIDATES", sizes[0])
        patch.setattr(coreset, "_CENTRE_BLOCK", sizes[1])
        selected = k_center_greedy(features, n_select, rng(), start=start)
    assert selected.dtype == torch.int64
    assert selected.tolist() == naive_greedy(features, n_select, start)[0]


@pytest.mark.parametrize("candidates", [50, 4096])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_greedy_equals_naive_on_a_fine_grid(candidates: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # clustered, as patch features are; integers keep float32 exact, so that no near-tie can be decided by rounding
    centres, cluster = normal(40, 32), torch.randint(40, (5000,), generator=rng(1))
    features = (30 * centres[cluster] + 8 * normal(5000, 32, seed=2)).round() + offset
    monkeypatch.setattr(coreset, "_CANDIDATES", candidates)
    assert k_center_greedy(features, 500, rng(), start=7).tolist() == naive_greedy(features, 500, 7)[0]


def test_greedy_equals_naive_on_floats() -> None:
    features = normal(3000, 24, seed=5)
    expected, _, lead = naive_greedy(features, 200, 11)
    assert lead > 2e-6  # or the data have a near-tie that float32 cannot decide: choose another seed
    assert k_center_greedy(features, 200, rng(), start=11).tolist() == expected


def test_plain_loop_of_other_devices_selects_the_same() -> None:
    features = integers(400, 6, high=9)
    expected = naive_greedy(features, 120, 3)[0]
    assert coreset._greedy_plain(features, 120, 3).tolist() == expected
    copies = normal(5, 64).repeat(8, 1)
    assert coreset._greedy_plain(copies, 20, 0).tolist() == naive_greedy(copies, 20, 0)[0]


@EXAMPLES
@given(st.integers(3, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_radius_never_grows_and_is_at_most_twice_the_optimum(n: int, n_select: int, seed: int) -> None:
    n_select = min(n_select, n - 1)
    features = normal(n, 2, seed=seed)
    distances = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    selected = k_center_greedy(features, n_select, rng(seed)).tolist()
    radii = [float(distances[:, selected[:m]].amin(dim=1).max()) for m in range(1, n_select + 1)]
    best = min(float(distances[:, list(c)].amin(dim=1).max()) for c in itertools.combinations(range(n), n_select))
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] <= 2 * best * (1 + 1e-6)


def test_greedy_is_a_function_of_features_and_generator() -> None:
    features, before = normal(500, 8), torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    first, again = (k_center_greedy(features, 50, rng(4)) for _ in range(2))
    assert torch.equal(first, again)
    starts = {int(k_center_greedy(features, 1, rng(seed))[0]) for seed in range(8)}
    assert len(starts) > 1
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(features, normal(500, 8))


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normal(6000, 40)
    expected = k_center_greedy(features, 600, rng(), start=5)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if threads > 1 else 4)
    assert torch.equal(k_center_greedy(features, 600, rng(), start=5), expected)


def test_fewer_centres_are_a_prefix() -> None:
    features = normal(2000, 8)
    many = k_center_greedy(features, 300, rng(), start=5)
    assert torch.equal(k_center_greedy(features, 40, rng(), start=5), many[:40])


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_are_not_selected_again(offset: float) -> None:
    distinct = normal(30, 64) + offset
    features = distinct.repeat(20, 1)
    selected = k_center_greedy(features, 100, rng(), start=0)
    assert sorted((selected % 30).tolist()) == list(range(30))
    assert k_center_greedy(torch.ones(50, 3), 10, rng()).shape == (1,)


def test_all_rows_when_no_fewer_are_asked_for() -> None:
    features = normal(6, 3)
    for n_select in (6, 7, 1000):
        assert k_center_greedy(features, n_select, rng()).tolist() == list(range(6))


def test_errors_of_greedy() -> None:
    features = normal(6, 3)
    with pytest.raises(ParameterError, match=r"at least one row, got \(0, 3\)"):
        k_center_greedy(features[:0], 1, rng())
    with pytest.raises(ParameterError, match="n_select must be at least 1, got 0"):
        k_center_greedy(features, 0, rng())
    for bad in (torch.nan, torch.inf, 1e30):
        with pytest.raises(ParameterError, match="must be finite"):
            k_center_greedy(torch.cat([features, torch.full((1, 3), bad)]), 2, rng(), start=0)
    for start in (-1, 6):
        with pytest.raises(ParameterError, match=rf"start must be in \[0, 5\], got {start}"):
            k_center_greedy(features, 2, rng(), start=start)
