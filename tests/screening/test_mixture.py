"""The mixture of two laws: its gradient, data drawn from itself, invariances, labels, and odd scores."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from flawsift.models.calibration import Calibration
from flawsift.screening.mixture import (
    BOUNDS,
    DEFECTIVE,
    GOOD,
    INTERVAL,
    MIN_FOR_MIXTURE,
    SHARES,
    UNKNOWN,
    Mixture,
    _loss,
    fit_mixture,
    ordinary_scores,
    says_little,
)

Floats = npt.NDArray[np.float64]
N, DRAWS = 200, 20
TRUE_SHARES = (0.0, 0.05, 0.2, 0.4)
BETA, LAMBDA, GAMMA, M, TAU = 0.6, -0.5, -0.1, 7.0, 2.0
SCALE, SPREAD_OF_B = 0.3, 0.6  # of the logarithms


@dataclass(frozen=True, eq=False)
class Draw:
    """Scores that follow the model, the scores of ordinary patches, and which images are defective."""

    scores: Floats
    ordinary: Floats
    defective: npt.NDArray[np.bool_]


def draw(share: float, seed: int, n: int = N) -> Draw:
    """n images of the model itself; the first are defective."""
    generator = np.random.default_rng(seed)
    defective = np.arange(n) < round(share * n)
    b = generator.normal(0, SPREAD_OF_B, n)
    u = np.where(defective, generator.normal(M, TAU, n), generator.gumbel(size=n))
    return Draw(np.exp(SCALE * (BETA * b + np.exp(LAMBDA + GAMMA * b) * u)), np.exp(SCALE * b), defective)


def mixture_of(drawn: Draw, effect: float = 1.0, known: npt.NDArray[np.int64] | None = None) -> Mixture:
    fitted = fit_mixture(drawn.scores, drawn.ordinary, effect, known)
    assert fitted is not None
    return fitted


@cache
def fits(share: float) -> list[tuple[Draw, Mixture]]:
    drawn = [draw(share, seed) for seed in range(DRAWS)]
    return [(d, mixture_of(d)) for d in drawn]


def nothing_said(n: int) -> npt.NDArray[np.int64]:
    return np.full(n, UNKNOWN)


# ---- the gradient ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from(SHARES.tolist()),
    effect=st.sampled_from([1.0, 3.7]),
    labelled=st.booleans(),
)
def test_the_gradient_is_that_of_the_loss(seed: int, share: float, effect: float, labelled: bool) -> None:
    generator = np.random.default_rng(seed)
    z, b = generator.gumbel(size=40) * 1.5, generator.normal(size=40)
    known = generator.choice([UNKNOWN, GOOD, DEFECTIVE], 40) if labelled else nothing_said(40)
    if share == 0:
        known[known == DEFECTIVE] = GOOD  # of which there is none then
    low, high = np.array([(-1, 1), (-1, 0.5), (0, 1), (-0.4, 0), (3, 10), (0.3, 2)]).T
    theta = generator.uniform(low, high)
    _, gradient = _loss(theta, share, z, b, known, effect)
    for i, step in enumerate(1e-6 * np.eye(6)):
        up, down = (_loss(theta + sign * step, share, z, b, known, effect)[0] for sign in (1, -1))
        rounding = 1e-9 * max(abs(up), abs(down))  # of a difference of two large values
        assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-3, abs=1e-3 + rounding)


def test_without_defects_their_law_has_no_part_in_the_likelihood() -> None:
    drawn = draw(0, 0)
    z, b = np.log(drawn.scores), np.log(drawn.ordinary)
    theta = np.array([0.0, 0.0, 0.5, -0.1, 4.0, np.log(3.0)])  # at the mode of the prior of tau
    _, gradient = _loss(theta, 0.0, z, b, nothing_said(N), 1.0)
    assert gradient[4:].tolist() == [0, 0]


# ---- data of the model itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", TRUE_SHARES)
def test_the_interval_covers_the_truth(share: float) -> None:
    intervals = np.array([m.interval for _, m in fits(share)])
    step = 0.0125  # half of the distance between the shares that are tried
    covered = (intervals[:, 0] - step <= share) & (share <= intervals[:, 1] + step)
    assert covered.mean() >= 0.8
    estimates = np.array([m.share for _, m in fits(share)])
    assert (intervals[:, 0] <= estimates).all()
    assert (estimates <= intervals[:, 1]).all()
    assert np.median(estimates) == pytest.approx(share, abs=0.026)  # the next share that is tried, at most
    assert np.mean(estimates) == pytest.approx(share, abs=0.06)


def test_a_clean_set_is_no_evidence() -> None:
    evident = [m.interval[0] > 0 for _, m in fits(0.0)]
    assert np.mean(evident) <= 0.1
    assert all(m.interval[0] > 0 for _, m in fits(0.2)), "which a fifth of defects always is"


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_probabilities_tell_defects_from_good_images(share: float) -> None:
    p = np.concatenate([m.probability for _, m in fits(share)])
    truth = np.concatenate([d.defective for d, _ in fits(share)])
    assert truth[p > 0.9].mean() > 0.9
    assert truth[p < 0.1].mean() < 0.05
    assert p.mean() == pytest.approx(share, abs=0.04)
    assert p[truth].mean() > 0.7


def table(drawn: Draw, fitted: Mixture) -> Calibration:
    kept = fitted.probability <= 0.5
    return Calibration.of_mixture(fitted, drawn.scores, kept, nothing_said(len(kept)))


@pytest.mark.parametrize("share", TRUE_SHARES)
def test_p_values_of_good_images_are_uniform(share: float) -> None:
    fresh = draw(0.0, 999, 2000).scores
    distances = [kstest(table(d, m).p_values(fresh), "uniform").statistic for d, m in fits(share)[:10]]
    assert np.mean(distances) < 0.1  # samples of a hundred differ from their law by 0.085 on average


@pytest.mark.parametrize("share", TRUE_SHARES)
def test_false_alarms_of_further_images_lie_in_the_intervals(share: float) -> None:
    fresh = draw(0.0, 998, 20_000).scores
    inside = []
    for rate in (0.01, 0.05, 0.2):
        measured, expected = [], []
        for drawn, fitted in fits(share):
            threshold = table(drawn, fitted).threshold(rate)
            assert threshold is not None
            assert threshold.interval is not None
            assert not threshold.limited
            low, high = threshold.interval
            measured.append((fresh > threshold.value).mean())
            expected.append(threshold.expected_rate)
            inside.append(low <= measured[-1] <= high)
        assert 0.7 < np.median(measured) / np.median(expected) < 1.7
    assert np.mean(inside) >= 0.8


def test_misses_of_further_defects_are_as_told() -> None:
    fresh = draw(1.0, 997, 20_000).scores
    measured, expected, inside = [], [], []
    for drawn, fitted in fits(0.2):
        threshold = table(drawn, fitted).threshold(0.01)
        assert threshold is not None
        assert threshold.misses is not None
        told, low, high = threshold.misses
        assert low <= told <= high
        measured.append((fresh <= threshold.value).mean())
        expected.append(told)
        inside.append(low - 0.1 <= measured[-1] <= high + 0.1)  # without chance, which they do not count
    assert np.mean(measured) == pytest.approx(np.mean(expected), abs=0.05)
    assert np.mean(inside) >= 0.8


@pytest.mark.parametrize("share", TRUE_SHARES)
def test_false_alarms_fall_and_misses_rise_with_the_threshold(share: float) -> None:
    drawn, fitted = fits(share)[0]
    for thresholds in (fitted.spaced(drawn.scores, 50), np.array([1e-300, 1e-9, 1.0, 1e9, 1e300])):
        for rates, sign in ((fitted.false_alarms(thresholds), -1), (fitted.misses(thresholds), 1)):
            if np.isnan(rates).all():
                assert share == 0
                continue
            expected, low, high = rates
            assert ((rates >= 0) & (rates <= 1)).all()
            assert (sign * np.diff(rates, axis=1) >= -1e-12).all()
            assert (low <= expected + 2e-3).all()  # the posterior has a little outside of the interval
            assert (expected <= high + 2e-3 + 0.1 * expected).all()
            assert (low <= high).all()
    spaced = fitted.spaced(drawn.scores, 50)
    assert spaced[0] == pytest.approx(drawn.scores.min())
    assert spaced[-1] > drawn.scores.max()
    np.testing.assert_allclose(np.diff(np.log(spaced), n=2), 0, atol=1e-9)


# ---- invariances -----------------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same() -> None:
    drawn = draw(0.1, 5)
    first, second = mixture_of(drawn), mixture_of(drawn)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(second, name), value, err_msg=name)


@pytest.mark.parametrize("gain", [1e-6, 3.0, 1e6])
def test_the_unit_of_scores_does_not_matter(gain: float) -> None:
    drawn = draw(0.1, 6)
    plain = mixture_of(drawn)
    other = Draw(gain * drawn.scores, 7 * drawn.ordinary, drawn.defective)
    scaled = mixture_of(other)
    assert plain.logarithmic
    assert (scaled.share, scaled.interval) == (plain.share, plain.interval)
    np.testing.assert_allclose(scaled.probability, plain.probability, atol=1e-3)
    one, two = table(drawn, plain), table(other, scaled)
    np.testing.assert_allclose(two.thresholds, gain * one.thresholds, rtol=2e-3)
    np.testing.assert_allclose(two.rates, one.rates, rtol=2e-2)


def test_the_order_of_images_does_not_matter() -> None:
    drawn = draw(0.1, 7)
    order = np.random.default_rng(0).permutation(N)
    plain, shuffled = (
        mixture_of(d) for d in (drawn, Draw(drawn.scores[order], drawn.ordinary[order], drawn.defective[order]))
    )
    assert (shuffled.share, shuffled.interval) == (plain.share, plain.interval)
    np.testing.assert_allclose(shuffled.probability, plain.probability[order], atol=1e-3)


def test_ordinary_patches_explain_scores() -> None:
    """Among good images whose texture is more or less coarse, defects that score like coarse ones are found by them."""
    generator = np.random.default_rng(0)
    b, u = np.linspace(0, 8, N), generator.gumbel(size=N)
    u[:20] = generator.normal(8, 1, 20)  # of fine texture
    scores = np.exp(0.2 * (b + u))
    told, blind = fit_mixture(scores, np.exp(0.2 * b)), fit_mixture(scores, None)
    assert told is not None
    assert blind is not None
    assert told.share == pytest.approx(0.1, abs=0.03)
    assert (told.probability[:20] > 0.8).mean() > 0.8
    assert (told.probability[20:] > 0.8).mean() < 0.02
    assert (blind.probability[20:] > 0.8).mean() > 0.2


def test_a_defect_that_covers_an_image_explains_itself_to_a_limit_alone() -> None:
    drawn = draw(0.1, 15)
    ordinary = drawn.ordinary.copy()
    fitted = []
    for far in (1e3, 1e12):
        ordinary[0] = far
        fitted.append(mixture_of(Draw(drawn.scores, ordinary, drawn.defective)))
    np.testing.assert_array_equal(fitted[0].posterior, fitted[1].posterior)
    np.testing.assert_array_equal(fitted[0].probability, fitted[1].probability)
    assert fitted[0].ordinary[0] == fitted[0].ordinary.max() < 5


def test_groups_widen_the_interval() -> None:
    """What counts as fewer images tells less."""
    widths = [[np.ptp(mixture_of(d, effect).interval) for d, _ in fits(0.2)[:5]] for effect in (1.0, 4.0)]
    assert np.mean(widths[1]) > 1.3 * np.mean(widths[0])
    drawn, fitted = fits(0.2)[0]
    few = mixture_of(drawn, 4.0)
    assert (fitted.n_effective, few.n_effective) == (N, N / 4)
    one, four = table(drawn, fitted).threshold(0.05), table(drawn, few).threshold(0.05)
    assert one is not None
    assert four is not None
    assert one.interval is not None
    assert four.interval is not None
    assert np.ptp(four.interval) > 1.3 * np.ptp(one.interval)


def test_images_twice_at_half_their_weight_are_the_set_itself() -> None:
    drawn = draw(0.1, 8)
    twice = Draw(*(np.repeat(values, 2) for values in vars(drawn).values()))
    plain, doubled = mixture_of(drawn), mixture_of(twice, 2.0)
    np.testing.assert_allclose(doubled.posterior, plain.posterior, atol=1e-3)
    np.testing.assert_allclose(doubled.probability[::2], plain.probability, atol=1e-3)


# ---- what a person said ----------------------------------------------------------------------------------------------


def said_of(drawn: Draw, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The truth about some images."""
    known = nothing_said(len(drawn.scores))
    known[positions] = np.where(drawn.defective[positions], DEFECTIVE, GOOD)
    return known


def test_what_a_person_said_is_certain() -> None:
    drawn = draw(0.1, 9)
    known = said_of(drawn, np.arange(0, N, 7))
    fitted = mixture_of(drawn, known=known)
    assert (fitted.probability[known == GOOD] == 0).all()
    np.testing.assert_allclose(fitted.probability[known == DEFECTIVE], 1, rtol=1e-12)
    assert fitted.posterior[0] == 0, "there is one"
    assert fitted.interval[0] > 0
    wrong = np.full(N, GOOD)
    assert mixture_of(drawn, known=wrong).interval == (0, 0), "all are good"
    assert not mixture_of(drawn, known=wrong).probability.any()


@pytest.mark.parametrize(("share", "worst"), [(0.05, True), (0.2, False)])
def test_the_truth_about_ten_images_helps(share: float, worst: bool) -> None:
    """Those that score highest; where all of these are defective anyhow, those that are most in doubt."""
    before, after = [], []
    for drawn, fitted in fits(share)[:10]:
        order = np.argsort(-drawn.scores if worst else abs(fitted.probability - 0.5))
        asked = mixture_of(drawn, known=said_of(drawn, order[:10]))
        before.append((np.ptp(fitted.interval), abs(fitted.share - share)))
        after.append((np.ptp(asked.interval), abs(asked.share - share)))
    (width, error), (asked_width, asked_error) = np.mean(before, axis=0), np.mean(after, axis=0)
    assert asked_width < width or asked_error < error
    assert asked_width <= width + 0.01
    assert asked_error <= error + 0.01


def test_who_acquits_the_worst_images_acquits_the_set() -> None:
    drawn = draw(0.05, 10)
    worst = np.argsort(-drawn.scores)[:10]
    known = nothing_said(N)
    known[worst] = GOOD
    assert mixture_of(drawn).interval[0] > 0
    assert mixture_of(drawn, known=known).interval[0] == 0


# ---- odd scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, MIN_FOR_MIXTURE - 1])
def test_few_images_have_no_mixture(n: int) -> None:
    scores = np.linspace(1, 2, n)
    assert fit_mixture(scores, scores) is None
    assert fit_mixture(scores, None) is None
    assert fit_mixture(np.linspace(1, 2, MIN_FOR_MIXTURE), None) is not None


def test_equal_scores_have_no_mixture() -> None:
    for value in (0.0, 1.0, -3.0):
        assert fit_mixture(np.full(50, value), None) is None
    assert fit_mixture(np.r_[np.ones(40), np.linspace(2, 3, 10)], None) is None, "most of them are"


ODD: dict[str, tuple[Floats, Any]] = {
    "with a zero": (np.r_[0.0, draw(0.1, 11).scores[1:]], None),
    "negative": (draw(0.1, 11).scores - 5, None),
    "two values": (np.repeat([1.0, 2.0], 30), None),
    "as few as may be": (draw(0.1, 12, MIN_FOR_MIXTURE).scores, draw(0.1, 12, MIN_FOR_MIXTURE).ordinary),
    "tiny": (draw(0.1, 11).scores * 1e-300, None),
    "huge": (draw(0.1, 11).scores * 1e300, None),
    "one far above": (np.r_[1e9, draw(0.1, 11).scores], None),
    "one far below": (np.r_[1e-9, draw(0.1, 11).scores], None),
    "nearly equal": (1 + 1e-12 * draw(0.1, 11).scores, None),
    "constant maps": (draw(0.1, 11).scores, np.ones(N)),
    "empty maps": (draw(0.1, 11).scores, np.zeros(N)),
    "ordinary scores of both signs": (draw(0.1, 11).scores, np.log(draw(0.1, 11).ordinary)),
    "ordinary scores far above": (draw(0.1, 11).scores, np.r_[1e12, draw(0.1, 11).ordinary[1:]]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_nan_never_comes_out(name: str) -> None:
    scores, ordinary = ODD[name]
    fitted = fit_mixture(scores, ordinary)
    assert fitted is not None
    assert fitted.posterior.sum() == pytest.approx(1)
    assert ((fitted.probability >= 0) & (fitted.probability <= 1)).all()
    low, high = fitted.interval
    assert 0 <= low <= fitted.share <= high <= SHARES[-1]
    made = Calibration.of_mixture(fitted, scores, fitted.probability <= 0.5, nothing_said(len(scores)))
    for values in (fitted.parameters, made.thresholds, made.rates, made.intervals):
        assert np.isfinite(values).all()
    assert (np.diff(made.rates) <= 0).all()
    assert (np.diff(made.thresholds) >= 0).all()
    inside = [(lo <= p) & (p <= hi) for p, (lo, hi) in zip(fitted.parameters.T, BOUNDS, strict=True)]
    assert np.all(inside)


@pytest.mark.parametrize("low", [0.3, 1e-3, 1e-12])
def test_an_image_that_scores_lower_than_all_others_is_not_defective_for_it(low: float) -> None:
    """Such as one of which there is a copy."""
    drawn = draw(0.0, 13)
    fitted = fit_mixture(np.r_[low * drawn.scores.min(), drawn.scores], None)
    assert fitted is not None
    assert fitted.probability[0] <= 0.1
    assert fitted.probability[0] <= fitted.probability[1:].max()


def test_with_scores_that_are_not_positive_a_shift_does_not_matter() -> None:
    scores = np.log(draw(0.1, 14).scores) - 5
    plain, moved = (fit_mixture(s, None) for s in (scores, 10 * scores - 30))
    assert plain is not None
    assert moved is not None
    assert not plain.logarithmic
    assert (moved.share, moved.interval) == (plain.share, plain.interval)
    np.testing.assert_allclose(moved.probability, plain.probability, atol=1e-3)
    np.testing.assert_allclose(moved.spaced(10 * scores - 30, 9), 10 * plain.spaced(scores, 9) - 30)


def test_the_ordinary_score_is_moved_by_what_covers_three_quarters_alone() -> None:
    maps = np.arange(16.0).reshape(1, 4, 4).repeat(2, 0)
    maps[1, 1, 1:] = maps[1, 2:] = 1000  # a defect that covers less
    assert ordinary_scores(maps.astype(np.float16)).tolist() == [3.75, 3.75]


def test_a_wide_interval_says_little() -> None:
    assert not says_little((0.0, 0.3))
    assert says_little((0.0, 0.325))
    assert INTERVAL == 0.9


def test_clean_sets_of_a_normal_law_are_no_evidence() -> None:
    """Good scores need not follow the law that the mixture has for them."""
    evident = []
    for seed in range(12):
        mixture = fit_mixture(np.exp(0.2 * np.random.default_rng(seed).normal(size=200)), None)
        assert mixture is not None
        evident.append(mixture.interval[0] > 0)
    assert sum(evident) <= 1


def test_an_exact_copy_changes_next_to_nothing() -> None:
    scores = np.exp(0.2 * np.random.default_rng(0).gumbel(size=200))
    copied = np.where(np.arange(200) == 7, 0.0, scores)
    with_copy, without = fit_mixture(copied, None), fit_mixture(scores, None)
    assert with_copy is not None
    assert without is not None
    assert with_copy.logarithmic
    assert with_copy.share == pytest.approx(without.share, abs=0.03)
    thresholds = with_copy.spaced(copied, 50)
    assert thresholds[0] == pytest.approx(np.sort(scores)[:2].min(), rel=0.2)


def test_scores_that_are_no_numbers_have_no_mixture() -> None:
    assert fit_mixture(np.array([*range(1, 40), np.inf], float), None) is None
