"""Stage 1: bookkeeping by ids, proved with a detector that scores an image by its own id."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.robust import robust_units
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.detectors.registry import make_detector
from flawsift.errors import InputError, ParameterError
from flawsift.executors import Run
from flawsift.features.readers import MemoryFeatures
from flawsift.screening.consensus import (
    TAIL,
    Contamination,
    choose,
    combine,
    design_effect,
    estimate_contamination,
    keep_lowest,
    normalize_scores,
    own_mask,
    rejected_patches,
)
from flawsift.screening.mixture import ordinary_scores
from flawsift.screening.options import PRESETS, ScreenOptions
from flawsift.screening.result import Ranking, Screening
from flawsift.screening.stage1 import screen
from flawsift.screening.storage import load_screening, save_screening
from flawsift.screening.submodels import split


@dataclass(kw_only=True, eq=False)
class Oracle(Detector):
    """Scores an image by a table of its id, and remembers whom it was fitted on."""

    name: ClassVar[str] = "oracle"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    layers: tuple[str, ...] = ("x",)
    modulus: int = 101  # a prime beyond the set sizes below: distinct scores in an order unlike that of the ids
    factor: int = 37

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        self.trained_on_ = sorted(data.ids.tolist())
        return self

    def truth(self, ids: Any) -> Any:
        return np.asarray(ids) * self.factor % self.modulus

    def _maps(self, batch: Batch, device: str) -> Tensor:
        # the feature is the id as well: pixels and ids must not part ways
        assert batch.features["x"].flatten().tolist() == batch.ids.tolist()
        return torch.from_numpy(self.truth(batch.ids)).float().view(-1, 1, 1)


def watching(kill_in: int = 0) -> Any:
    """An oracle whose class lists what its clones were fitted on; the fit of that number, from 1, is killed."""

    @dataclass(kw_only=True, eq=False)
    class Watching(Oracle):
        fits: ClassVar[list[list[int]]] = []

        def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
            if len(self.fits) + 1 == kill_in:
                raise KeyboardInterrupt
            self.fits.append(sorted(data.ids.tolist()))
            return super().fit(data, device=device, watch=watch)

    return Watching()


def id_set(ids: Any, groups: Mapping[int, str] | None = None) -> ImageSet:
    """Images whose only feature is their id."""
    ids = [int(i) for i in ids]
    arrays = [np.zeros((2, 2), np.uint8) for _ in ids]
    images = ImageSet.from_arrays(arrays, ids=ids)
    features = np.array(ids, np.float32).reshape(-1, 1, 1, 1)
    reader = MemoryFeatures(2, "ids", {("", i): row for row, i in enumerate(ids)}, {"x": features})
    return ImageSet(images.ids, images.source, groups or {}, reader)


# bookkeeping does not ask how many images are defective, and an estimate takes longer than all the rest
not_estimated = patch(
    "flawsift.screening.stage1.estimate_contamination",
    lambda consensus, *_: (Contamination(0.0, "none: not asked for", {}), np.zeros(len(consensus))),
)

subsets = st.integers(2, 7)
seeds = st.integers(0, 2**31)


@st.composite
def id_lists(draw: st.DrawFn) -> list[int]:
    """7 to 60 distinct ids from anywhere, in any order."""
    offset = draw(st.sampled_from([0, 1, 1000, 10**6]))
    n = draw(st.integers(7, 60))
    return [offset + i for i in draw(st.permutations(range(n)))]


@settings(deadline=None, max_examples=60)
@given(ids=id_lists(), k=subsets, seed=seeds, keep=st.floats(0.05, 1), own=st.booleans())
@not_estimated
def test_an_oracle_is_obeyed(ids: list[int], k: int, seed: int, keep: float, own: bool) -> None:
    oracle = Oracle()
    result = screen(
        id_set(ids), oracle, ScreenOptions(n_subsets=k, keep=keep, exclude_own=own, normalize="none"), Run(seed=seed)
    )
    truth = oracle.truth(ids)
    assert result.ids.tolist() == ids
    np.testing.assert_array_equal(
        result.submodel_scores.score_matrix, np.tile(truth, (k, 1))
    )  # row j, column i belongs to image i
    m = max(1, int(np.floor(keep * len(ids) + 1e-9)))
    assert set(result.kept.tolist()) == set(np.array(ids)[np.argsort(truth)[:m]].tolist())
    assert set(result.kept.tolist()) | set(result.removed.tolist()) == set(ids)
    assert oracle.truth(result.removed).tolist() == sorted(oracle.truth(result.removed), reverse=True)


@settings(deadline=None, max_examples=40)
@given(ids=id_lists(), k=subsets, seed=seeds)
@not_estimated
def test_subsets_partition_and_train_on_their_own(ids: list[int], k: int, seed: int) -> None:
    watched = watching()
    result = screen(id_set(ids), watched, ScreenOptions(n_subsets=k, keep=0.5), Run(seed=seed))
    seen = type(watched).fits
    assert sorted(i for part in seen for i in part) == sorted(ids)
    sizes = [len(part) for part in seen]
    assert max(sizes) - min(sizes) <= 1
    for j, part in enumerate(seen):
        assert part == sorted(np.array(ids)[result.submodel_scores.subset_of[0] == j].tolist())


@settings(deadline=None, max_examples=40)
@given(ids=id_lists(), k=subsets, seed=seeds, offset=st.integers(1, 10**6))
@not_estimated
def test_relabelled_ids_relabel_the_result(ids: list[int], k: int, seed: int, offset: int) -> None:
    moved = [i + offset for i in ids]
    first = screen(id_set(ids), Oracle(modulus=1), ScreenOptions(n_subsets=k, keep=0.4), Run(seed=seed))
    second = screen(id_set(moved), Oracle(modulus=1), ScreenOptions(n_subsets=k, keep=0.4), Run(seed=seed))
    np.testing.assert_array_equal(first.kept + offset, second.kept)
    np.testing.assert_array_equal(first.submodel_scores.subset_of, second.submodel_scores.subset_of)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, k=subsets, sizes=st.lists(st.integers(1, 6), min_size=7, max_size=25))
def test_groups_stay_whole_and_subsets_even(seed: int, k: int, sizes: list[int]) -> None:
    groups: dict[int, str] = {}
    for g, size in enumerate(sizes):
        for _ in range(size):
            groups[len(groups)] = f"g{g}"
    subset_of = split(id_set(range(len(groups)), groups), k, seed=seed)
    for g in range(len(sizes)):
        assert len({int(subset_of[i]) for i, name in groups.items() if name == f"g{g}"}) == 1
    counts = np.bincount(subset_of, minlength=k)
    assert counts.max() - counts.min() <= max(sizes)  # greedy balancing is off by at most one group
    assert counts.min() >= 1


def test_partitions_differ_and_repeat() -> None:
    data = id_set(range(40))
    first, second = split(data, 5, seed=3, partition=0), split(data, 5, seed=3, partition=1)
    assert (first != second).any()
    np.testing.assert_array_equal(first, split(data, 5, seed=3, partition=0))
    result = screen(data, Oracle(), ScreenOptions(n_partitions=3, keep=0.5))
    assert result.submodel_scores.score_matrix.shape == (15, 40)
    assert result.submodel_scores.subset_of.shape == (3, 40)


def test_the_paper_keeps_forty_percent_by_the_plain_mean() -> None:
    result = screen(id_set(range(50)), Oracle(), PRESETS["paper"])
    assert len(result.kept) == 20
    np.testing.assert_allclose(result.consensus, Oracle().truth(np.arange(50)))
    assert result.contamination is None


def test_own_scores_do_not_count_when_excluded() -> None:
    scores = np.array([[0.0, 5.0, 6.0, 7.0], [1.0, 0.0, 2.0, 9.0]], np.float32)
    own = own_mask(np.array([[0, 1, 1, 0]]), 2)
    np.testing.assert_array_equal(own, [[True, False, False, True], [False, True, True, False]])
    np.testing.assert_allclose(combine(scores.astype(float), own, "mean", exclude_own=True), [1, 5, 6, 9])
    np.testing.assert_allclose(combine(scores.astype(float), own, "mean", exclude_own=False), [0.5, 2.5, 4, 8])


def test_consensus_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [100.0, 4.0]])
    none = np.zeros_like(scores, dtype=bool)
    assert combine(scores, none, "mean", exclude_own=False)[0] == pytest.approx(26.5)
    assert combine(scores, none, "median", exclude_own=False)[0] == pytest.approx(2.5)
    assert combine(scores, none, "trimmed_mean", exclude_own=False)[0] == pytest.approx(2.5)
    # ranks among both images: higher in the first, second and last model, lower in the third
    assert combine(scores, none, "rank_mean", exclude_own=False).tolist() == [0.625, 0.375]


@settings(deadline=None, max_examples=50)
@given(
    seed=seeds,
    gain=st.floats(0.01, 1000),
    shift=st.floats(-1000, 1000),
    how=st.sampled_from(["robust", "rank"]),
)
def test_the_scale_of_one_submodel_does_not_matter(seed: int, gain: float, shift: float, how: Any) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(3, 30)).astype(np.float32)
    own = own_mask(split(id_set(range(30)), 3, seed=seed)[None], 3)
    other = scores.astype(np.float64).copy()
    other[1] = gain * other[1] + shift
    a = normalize_scores(scores, own, how)
    b = normalize_scores(other, own, how)  # type: ignore[arg-type]  # float64 keeps the ranks under a large shift
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_robust_units_use_held_out_scores_only() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 1e9]], np.float32)
    own = np.array([[False, False, False, True]])
    result = normalize_scores(scores, own, "robust")[0]
    assert result[1] == 0
    assert result[2] == pytest.approx(1 / 1.4826)
    assert robust_units(np.array([2.0, 2.0, 2.0])).tolist() == [0, 0, 0]


def test_ties_keep_the_first_listed() -> None:
    assert keep_lowest(np.array([9, 4, 7, 1]), np.zeros(4), 0.5).tolist() == [9, 4]
    assert keep_lowest(np.arange(5), np.arange(5.0), 0.6).tolist() == [0, 1, 2]
    assert keep_lowest(np.arange(5), np.arange(5.0), 0.01).tolist() == [0]


def test_divergence_on_scores_by_hand() -> None:
    data = id_set(range(8))

    class Shifted(Oracle):
        def _maps(self, batch: Batch, device: str) -> Tensor:
            return super()._maps(batch, device) * 0 + float(min(self.trained_on_))

    result = screen(data, Shifted(), ScreenOptions(n_subsets=2, keep=1.0, normalize="none", divergence_weight=1.0))
    assert result.submodel_scores.divergence is not None
    gap = abs(float(result.submodel_scores.score_matrix[0, 0]) - float(result.submodel_scores.score_matrix[1, 0]))
    np.testing.assert_allclose(result.submodel_scores.divergence, gap)


def test_a_clean_set_is_no_evidence_of_defects() -> None:
    sets = [np.exp(0.2 * np.random.default_rng(seed).gumbel(size=300)) for seed in range(10)]
    estimates = [estimate_contamination(scores)[0] for scores in sets]
    assert not any(e.is_evident for e in estimates)
    assert np.mean([e.alpha_hat for e in estimates]) < 0.03


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4])
def test_visible_contamination_is_estimated(alpha: float) -> None:
    generator = np.random.default_rng(1)
    bad = round(400 * alpha)
    scores = np.concatenate([generator.gumbel(10, 1, 400 - bad), generator.gumbel(22, 3, bad)])
    estimate, probability = estimate_contamination(scores)
    assert estimate.is_evident
    assert estimate.alpha_hat == pytest.approx(alpha, abs=0.06)
    assert (probability[-bad:] > 0.5).mean() > 0.9
    assert (probability[:-bad] > 0.5).mean() < 0.05


def test_the_estimate_never_keeps_less_than_the_paper() -> None:
    scores = np.concatenate([np.random.default_rng(0).gumbel(0, 1, 40), np.full(60, 50.0)])
    assert estimate_contamination(scores)[0].alpha_hat <= 0.6
    for nothing in (np.full(100, 3.0), np.arange(5.0)):
        estimate, probability = estimate_contamination(nothing)
        assert (estimate.alpha_hat, estimate.interval) == (0, None)
        assert estimate.method == "none: too few or constant scores"
        assert not probability.any()


def test_the_interval_holds_the_estimate_and_shrinks_with_the_number_of_images() -> None:
    widths = []
    for n in (100, 1600):
        scores = np.random.default_rng(0).gumbel(0, 1, n)
        scores[: n // 5] += 9
        found, _ = estimate_contamination(scores)
        assert found.interval is not None
        low, high = found.interval
        assert low <= found.alpha_hat <= high
        assert found == estimate_contamination(scores)[0], "no chance between two calls"
        widths.append(high - low)
    assert widths[1] <= 0.5 * widths[0]  # a quarter, were shares not on a grid


def views(n_objects: int, n_views: int, correlation: float, generator: np.random.Generator) -> np.ndarray:
    """Normal scores of objects of some views each, correlated within an object."""
    shared = np.repeat(generator.normal(size=n_objects), n_views)
    own = generator.normal(size=n_objects * n_views)
    scores: np.ndarray = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return scores


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.65, 1.0])
def test_the_design_effect_is_the_growth_of_the_variance_of_the_tail(correlation: float) -> None:
    generator = np.random.default_rng(0)
    sets = [views(80, 5, correlation, generator) for _ in range(1500)]
    shares = [(s > norm.isf(TAIL)).mean() for s in sets]
    expected = np.var(shares) / (TAIL * (1 - TAIL) / 400)
    members = np.arange(400).reshape(80, 5)
    found = [design_effect(s, list(members)) for s in sets[:50]]
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
    if correlation == 1:
        np.testing.assert_allclose(found, 5)


def test_images_that_are_alone_have_no_design_effect() -> None:
    scores = np.random.default_rng(0).gumbel(size=60)
    alone = [[i] for i in range(60)]
    assert design_effect(scores, [np.array(a) for a in alone]) == 1


def test_odd_objects_are_not_asked_for_the_design_effect() -> None:
    scores = np.random.default_rng(0).gumbel(0, 1, 200)
    scores[:15] += 9
    for members in (np.arange(200).reshape(40, 5), np.arange(200).reshape(5, 40).T):  # three odd objects, or fifteen
        assert design_effect(scores, list(members)) == pytest.approx(1, abs=0.3)


def test_views_that_score_alike_are_weaker_evidence() -> None:
    members = list(np.arange(200).reshape(40, 5))
    found = []
    for seed in range(5):
        scores = -np.log(-np.log(norm.cdf(views(40, 5, 0.8, np.random.default_rng(seed)))))  # Gumbel, correlated
        scores[:20] += 7
        for effect in (1.0, design_effect(scores, members)):
            estimate, _ = estimate_contamination(np.exp(0.3 * scores), effect=effect)
            assert estimate.evidence["design_effect"] == effect
            assert estimate.interval is not None
            found.append(np.ptp(estimate.interval))
    unaware, aware = np.reshape(found, (5, 2)).mean(0)
    assert aware > 1.3 * unaware


def test_the_design_effect_does_not_grow_with_the_defects() -> None:
    generator = np.random.default_rng(0)
    members = list(np.arange(400).reshape(80, 5))
    effects = []
    for n_defective in (0, 15):
        sets = [views(80, 5, 0.3, generator) for _ in range(60)]
        for scores in sets:
            scores[: 5 * n_defective] += 4  # whole objects
        effects.append(np.mean([design_effect(scores, members) for scores in sets]))
    assert effects[1] < 1.25 * effects[0]


def test_groups_may_differ_in_size() -> None:
    generator = np.random.default_rng(0)
    sizes = [1] * 60 + [9] * 20
    members = np.split(np.arange(240), np.cumsum(sizes)[:-1])
    sets = []
    for _ in range(1500):
        shared = np.concatenate([np.full(n, generator.normal()) for n in sizes])
        sets.append(np.sqrt(0.6) * shared + np.sqrt(0.4) * generator.normal(size=240))
    expected = np.var([(s > norm.isf(TAIL)).mean() for s in sets])
    expected /= TAIL * (1 - TAIL) / 240
    assert np.mean([design_effect(s, members) for s in sets[:60]]) == pytest.approx(expected, rel=0.12)


def test_screening_knows_of_the_groups() -> None:
    objects = {i: f"object {i // 5}" for i in range(40)}
    effects = []
    for groups in ({}, objects):
        found = screen(id_set(range(40), groups), Oracle(factor=1), ScreenOptions(n_subsets=4))
        assert found.contamination is not None
        effects.append(found.contamination.evidence["design_effect"])
    assert effects[0] == 1
    assert effects[1] > 1.5


def test_a_defect_and_its_neighbours_are_rejected() -> None:
    grids = np.random.default_rng(0).normal(5, 1, (40, 16, 16))
    grids[7, 4:6, 9] += 50
    expected = np.zeros((16, 16), bool)
    expected[3:7, 8:11] = grids[7, 3:7, 8:11] > np.median(grids, axis=0)[3:7, 8:11]
    found = rejected_patches(grids, 6.0)
    assert (found[7] == expected).all()
    assert found[7, 4:6, 9].all()
    assert not np.delete(found, 7, axis=0).any()


@given(seed=st.integers(0, 99), gain=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_rejection_does_not_depend_on_the_scale_of_scores(seed: int, gain: float, shift: float) -> None:
    grids = np.random.default_rng(seed).gumbel(size=(12, 9, 9)).round(2)
    assert (rejected_patches(grids, 2.5) == rejected_patches(gain * grids + shift, 2.5)).mean() > 0.999


@given(seed=st.integers(0, 99), z=st.floats(0.1, 4))
def test_a_position_that_is_always_hard_is_still_learned(seed: int, z: float) -> None:
    grids = np.random.default_rng(seed).normal(size=(11, 10, 10))
    grids[:, 2, 3] += 100
    assert (rejected_patches(grids, z).mean(0) <= 0.5).all()


def test_coarse_grids_and_constant_scores_lose_no_neighbours() -> None:
    grids = np.random.default_rng(0).normal(size=(30, 4, 4))
    grids[3, 1, 1] += 50
    assert rejected_patches(grids, 8.0).sum() == 1
    assert not rejected_patches(np.ones((5, 9, 9)), 3.0).any()


def gumbel_set(n: int, n_defective: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Consensus and maps of a set whose last images are defective in one patch."""
    generator = np.random.default_rng(seed)
    grids = generator.gumbel(10, 1, (n, 10, 10))
    grids[n - n_defective :, 3, 4] += 40
    return grids.max((1, 2)), grids


def test_a_clean_set_stays_whole() -> None:
    consensus, grids = gumbel_set(300, 0)
    estimate, probability = estimate_contamination(consensus, ordinary_scores(grids))
    assert not estimate.is_evident
    kept, rejected = choose(probability, grids, 3.0, estimate)
    assert kept.all()
    assert rejected is not None
    assert not rejected.any()
    assert choose(probability, grids, 0.0, estimate)[1] is None
    assert choose(probability, None, 3.0, estimate)[1] is None
    doubt = replace(estimate, alpha_hat=0.1, interval=(0.0, 0.2))
    kept, rejected = choose(np.ones(300), grids, 3.0, doubt)
    assert kept.all(), "there may be no defect"
    assert rejected is not None
    assert not rejected.any()


def test_a_contaminated_set_loses_images_and_patches() -> None:
    consensus, grids = gumbel_set(300, 30)
    estimate, probability = estimate_contamination(consensus, ordinary_scores(grids))
    assert estimate.is_evident
    assert estimate.alpha_hat > 0.05
    kept, rejected = choose(probability, grids, 3.0, estimate)
    assert rejected is not None
    assert not kept[270:].any()
    assert kept[:270].mean() > 0.9
    np.testing.assert_array_equal(rejected[kept], rejected_patches(grids, 3.0)[kept])
    np.testing.assert_array_equal(rejected[~kept], rejected_patches(grids, 1.0)[~kept])
    assert rejected[270:, 3, 4].all()


def test_the_ordinary_patches_of_images_set_aside_are_learned_by_who_can() -> None:
    found = decided_set(300, 30)
    assert found.rejected is not None
    train = id_set(range(300))
    banks, others = make_detector("patchcore"), make_detector("softpatch")
    assert not set(found.removed.tolist()) & set(found.purified(train, others).ids.tolist())
    assert not found.purified(train, others).rejected
    learned = found.purified(train, banks)
    assert set(found.removed.tolist()) <= set(learned.ids.tolist())
    assert all((learned.rejected[i] == found.rejected[i]).all() for i in found.removed.tolist())
    consensus, grids = gumbel_set(300, 30)
    estimate, probability = estimate_contamination(consensus, ordinary_scores(grids))
    for z in (2.0, 8.0):
        kept, rejected = choose(probability, grids, z, estimate)
        assert rejected is not None
        assert (rejected[~kept] == rejected_patches(grids, 1.0)[~kept]).all(), "a higher cut does not learn the worst"
    whole = replace(found, rejected=found.rejected | (found.ids == found.removed[2])[:, None, None])
    assert int(found.removed[2]) not in whole.purified(train, banks).ids, "of which nothing is left"
    out = found.names[int(found.removed[0])]
    now, _ = found.with_decisions({out: "remove"})
    assert int(found.removed[0]) not in now.purified(train, banks).ids, "who removes an image removes all of it"
    assert int(found.removed[1]) in now.purified(train, banks).ids


def decided_set(n: int, n_defective: int, seed: int = 0) -> Screening:
    """The default screening of a `gumbel_set`."""
    consensus, grids = gumbel_set(n, n_defective, seed)
    grids = grids.astype(np.float16)
    estimate, probability = estimate_contamination(consensus, ordinary_scores(grids))
    kept, rejected = choose(probability, grids, 2.0, estimate)
    ids = np.arange(n)
    return Screening(
        ids=ids,
        names=[f"{i}.png" for i in ids],
        consensus=consensus,
        held_out_scores=consensus,
        probability=probability,
        kept=ids[kept],
        keep_share=float(kept.mean()),
        options=ScreenOptions(reject_patches=2.0),
        contamination=estimate,
        patch_maps=grids,
        rejected=rejected,
    )


def test_a_person_who_keeps_what_was_set_aside_acquits_the_patches() -> None:
    found = decided_set(300, 30)
    assert found.rejected is not None
    assert found.rejected.any()
    removed = [found.names[int(i)] for i in found.removed]
    assert len(removed) >= 30
    few, counts = found.with_decisions(dict.fromkeys(removed[:3], "keep"))
    assert counts["keep"] == 3
    assert few.contamination is not None
    assert few.contamination.is_evident
    assert few.rejected is not None
    undecided = ~np.isin(found.names, removed[:3])
    assert not few.rejected[~undecided].any()
    assert not few.probability[~undecided].any()
    assert set(found.removed[3:30].tolist()) <= set(few.removed.tolist())
    later, _ = few.with_decisions({found.names[int(found.kept[0])]: "keep"})
    assert not later.probability[~undecided].any(), "what was said before still counts"
    everything, _ = found.with_decisions(dict.fromkeys(removed, "keep"))
    assert everything.contamination is not None
    assert not everything.contamination.is_evident, "what a person kept is no evidence"
    assert len(everything.kept) == 300
    assert everything.rejected is not None
    assert not everything.rejected.any()
    shares = replace(found, contamination=None)  # the share to keep was given
    back, _ = shares.with_decisions(dict.fromkeys(removed, "keep"))
    assert back.rejected is not None
    np.testing.assert_array_equal(back.rejected[found.is_kept], found.rejected[found.is_kept])
    assert found.rejected[found.is_kept].any()
    assert back.contamination is None


def test_a_person_who_finds_defects_is_believed() -> None:
    """On a set that is no evidence by itself: what was removed counts, and is not learned in part either."""
    found = decided_set(300, 0)
    worst = [found.names[int(i)] for i in found.ranking[:6]]
    now, counts = found.with_decisions(dict.fromkeys(worst, "remove"))
    assert counts["remove"] == 6
    assert now.contamination is not None
    assert now.contamination.is_evident, "there are some"
    assert (now.probability[np.isin(now.names, worst)] == 1).all()
    assert not set(now.kept.tolist()) & set(found.ranking[:6].tolist())
    learned = now.purified(id_set(range(300)), make_detector("patchcore"))
    assert not set(learned.ids.tolist()) & set(found.ranking[:6].tolist())


def test_an_image_that_a_person_keeps_is_learned_whole() -> None:
    found = decided_set(300, 30)
    assert found.rejected is not None
    one, out = np.flatnonzero(found.rejected.any((1, 2)) & found.is_kept)[:2].tolist()
    now, _ = found.with_decisions(
        {found.names[one]: "keep", found.names[one + 1]: "unsure", found.names[out]: "remove"}
    )
    assert now.rejected is not None
    assert not now.rejected[one].any()
    assert one in now.kept
    assert out not in now.kept
    others = np.delete(now.rejected, [one, out], 0)
    assert (others == np.delete(found.rejected, [one, out], 0)).mean() > 0.99, "they follow from the estimate alone"


def test_a_screening_that_nobody_has_touched_stays_as_it_is() -> None:
    for n_defective in (0, 10, 30):
        found = decided_set(300, n_defective, seed=n_defective)
        same, _ = found.with_decisions({})
        np.testing.assert_array_equal(same.kept, found.kept)
        np.testing.assert_array_equal(same.rejected, found.rejected)


def test_too_few_images_and_bad_options_are_told() -> None:
    with pytest.raises(InputError, match="5 subsets need at least 5 images, got 3"):
        screen(id_set(range(3)), Oracle())
    with pytest.raises(InputError, match="at least 5 groups"):
        screen(id_set(range(9), dict.fromkeys(range(9), "one")), Oracle())
    bad: list[tuple[dict[str, Any], str]] = [
        (
            {"n_subsets": 1},
            r"n_subsets \(--subsets\) must be a whole number of at least 2 when exclude_own",
        ),
        ({"n_subsets": 1, "exclude_own": False, "divergence_weight": 1.0}, "at least 2 for a divergence"),
        ({"n_subsets": 2.0}, "whole number"),
        ({"exclude_own": "no"}, "True or False"),
        ({"reject_patches": -1.0}, "None or not negative"),
        ({"screener": ""}, "name of a detector"),
        ({"keep": 0}, r"keep \(--keep\) must be 'auto' or in"),
        ({"keep": "most"}, r"keep \(--keep\) must be"),
        ({"n_partitions": 0}, r"n_partitions \(--partitions\) must be a whole number of at least 1, got 0"),
        ({"consensus": "max"}, r"consensus \(--consensus\) must be one of"),
        ({"normalize": "minmax"}, r"normalize \(--normalize\) must be"),
        ({"divergence_weight": -1}, r"divergence_weight \(--divergence-weight\) must be a number that is not negative"),
    ]
    for options, text in bad:
        with pytest.raises(ParameterError, match=text):
            screen(id_set(range(9)), Oracle(), ScreenOptions(**options))


def leave_one_out(train: ImageSet, detector: Any, options: ScreenOptions, run: Run, *, wants_fitted: bool) -> Ranking:
    """A kind of stage 1 without sub-models: the truth, as if each image had been left out once."""
    scores = detector.truth(train.ids).astype(np.float64)
    maps = np.stack([np.full((2, 3), score, np.float16) for score in scores])
    return Ranking(scores / 2, scores, maps, fitted=detector.clone() if wants_fitted else None)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=id_lists(), keep=st.floats(0.1, 1))
def test_another_kind_of_stage_1_is_obeyed_saved_and_read(tmp_path: Path, ids: list[int], keep: float) -> None:
    oracle = Oracle()
    options = ScreenOptions(keep=keep, reject_patches=1.0)
    made = screen(id_set(ids), oracle, options, Run(seed=4), ranker=leave_one_out)
    truth = oracle.truth(ids)
    m = max(1, int(np.floor(keep * len(ids) + 1e-9)))
    assert set(made.kept.tolist()) == set(np.array(ids)[np.argsort(truth)[:m]].tolist())
    assert made.submodels is None
    with pytest.raises(ParameterError, match="not made by sub-models"):
        _ = made.submodel_scores
    provenance = {"detector": {"name": "oracle", "params": {}}}
    read = load_screening(save_screening(replace(made, provenance=provenance), tmp_path))
    order = np.argsort(ids)  # the table is read by ascending id
    np.testing.assert_array_equal(read.ids, made.ids[order])
    np.testing.assert_array_equal(read.held_out_scores, made.held_out_scores[order])
    np.testing.assert_array_equal(read.consensus, made.consensus[order])
    assert sorted(read.kept.tolist()) == sorted(made.kept.tolist())
    assert (read.options, read.seed, read.submodels) == (made.options, 4, None)
    assert read.patch_maps is not None
    assert made.patch_maps is not None
    np.testing.assert_array_equal(read.patch_maps, made.patch_maps[order])


def test_saved_maps_are_means_over_the_submodels_that_did_not_see_the_image() -> None:
    data, oracle = id_set(range(30)), Oracle()
    for k, partitions in ((2, 1), (5, 1), (3, 2)):
        made = screen(data, oracle, ScreenOptions(n_subsets=k, n_partitions=partitions, keep=1.0))
        assert made.patch_maps is not None
        np.testing.assert_array_equal(made.patch_maps[:, 0, 0], oracle.truth(data.ids))


def test_a_killed_run_goes_on_and_trains_only_what_is_missing(tmp_path: Path) -> None:
    data = id_set(range(20))
    whole = screen(data, Oracle(), ScreenOptions(keep=0.5))

    with pytest.raises(KeyboardInterrupt):
        screen(data, watching(kill_in=3), ScreenOptions(keep=0.5), Run(checkpoint=tmp_path))
    again = watching()
    resumed = screen(data, again, ScreenOptions(keep=0.5), Run(checkpoint=tmp_path))
    assert len(type(again).fits) == 3
    np.testing.assert_array_equal(resumed.submodel_scores.score_matrix, whole.submodel_scores.score_matrix)
    np.testing.assert_array_equal(resumed.kept, whole.kept)
    assert resumed.patch_maps is not None
    assert whole.patch_maps is not None
    np.testing.assert_array_equal(resumed.patch_maps, whole.patch_maps)
