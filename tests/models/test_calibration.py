"""The label-free threshold."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import beta

from flawsift.errors import InputError, ParameterError
from flawsift.models.calibration import Calibration, Threshold
from flawsift.screening.mixture import DEFECTIVE, GOOD, UNKNOWN, Mixture, fit_mixture
from flawsift.types import Floats


def test_by_hand() -> None:
    scores = np.arange(1.0, 100.0)[::-1]  # 99 scores, unsorted
    one = Calibration.of(scores).threshold(0.01)
    assert one is not None
    assert (one.value, one.expected_rate, one.limited) == (99.0, 0.01, False)
    five = Calibration.of(scores).threshold(0.05)
    assert five is not None
    assert five.value == 95.0
    assert five.per_hundred == pytest.approx(5.0)


def test_too_few_scores_say_so() -> None:
    found = Calibration.of([3.0, 1.0, 2.0]).threshold(0.01)
    assert found is not None
    assert found.value == 3.0
    assert found.limited
    assert found.expected_rate == 0.25
    assert Calibration.of([]).threshold(0.01) is None
    for rate in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match="false_alarm_rate must be in"):
            Calibration.of([1.0]).threshold(rate)


@given(
    scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200),
    rate=st.floats(0.001, 0.5),
)
def test_no_more_than_the_rate_lie_above(scores: list[float], rate: float) -> None:
    found = Calibration.of(scores).threshold(rate)
    assert found is not None
    above = sum(s > found.value for s in scores)
    assert (above + 1) / (len(scores) + 1) <= found.expected_rate + 1e-12
    assert found.limited or found.expected_rate <= rate + 1e-9


def test_the_rate_holds_for_exchangeable_scores() -> None:
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(300):
        sample = generator.gumbel(size=200)
        found = Calibration.of(sample).threshold(0.05)
        assert found is not None
        rates.append((generator.gumbel(size=200) > found.value).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.006)


SCORES = st.integers(-5, 5).map(float) | st.floats(-1e6, 1e6)  # integers make ties


@given(calibration=st.lists(SCORES, min_size=1, max_size=60), scores=st.lists(SCORES, max_size=20))
def test_p_values_by_counting(calibration: list[float], scores: list[float]) -> None:
    found = Calibration.of(calibration).p_values(scores)
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    assert found.tolist() == expected


@given(calibration=st.lists(SCORES, min_size=1, max_size=120), score=SCORES, rate=st.floats(0.001, 0.999))
def test_the_threshold_and_the_p_value_agree(calibration: list[float], score: float, rate: float) -> None:
    of = Calibration.of(calibration)
    threshold = of.threshold(rate)
    assert threshold is not None
    for tested in (score, threshold.value, *calibration):
        p_value = float(of.p_values(tested))
        assert (tested > threshold.value) == (p_value <= threshold.expected_rate)
        if not threshold.limited:  # then it is the rate that was asked for, too
            assert (tested > threshold.value) == (p_value <= rate + 1e-9)


def test_p_values_without_anything_to_compare_with() -> None:
    assert np.isnan(Calibration.of([]).p_values([1.0, 2.0])).all()
    found = Calibration.of([1.0, 2.0, 3.0]).p_values([[np.nan, 9.0], [3.0, 0.0]])
    np.testing.assert_array_equal(found, [[np.nan, 0.25], [0.5, 1.0]])


def test_p_values_of_exchangeable_scores_are_uniform() -> None:
    generator = np.random.default_rng(0)
    p_values = np.concatenate([Calibration.of(s[:99]).p_values(s[99:]) for s in generator.gumbel(size=(400, 120))])
    for rate in (0.01, 0.1, 0.5):
        assert (p_values <= rate).mean() == pytest.approx(rate, abs=0.15 * rate + 0.002)


# ---- a table that comes from a mixture of good and defective images --------------------------------------------------


def unlabelled(share: float = 0.1, seed: int = 0, n: int = 200, at: float = 8.0) -> Floats:
    """Scores of n images; the first are defective, and lie about so many scales above the others."""
    generator = np.random.default_rng(seed)
    u = generator.gumbel(size=n)
    u[: round(share * n)] = generator.normal(at, 2, round(share * n))
    return np.exp(0.2 * u)


@cache
def mixed(share: float = 0.1, seed: int = 0) -> tuple[Floats, Mixture]:
    scores = unlabelled(share, seed)
    mixture = fit_mixture(scores, None)
    assert mixture is not None
    return scores, mixture


def made(share: float = 0.1, *, kept: Any = None, known: Any = None) -> Calibration:
    scores, mixture = mixed(share)
    is_kept = mixture.probability <= 0.5 if kept is None else kept
    return Calibration.of_mixture(mixture, scores, is_kept, nothing_said() if known is None else known)


def nothing_said(n: int = 200) -> npt.NDArray[np.int64]:
    return np.full(n, UNKNOWN)


def threshold_of(calibration: Calibration, rate: float) -> Threshold:
    threshold = calibration.threshold(rate)
    assert threshold is not None
    return threshold


@settings(deadline=None)
@given(score=st.floats(-1, 1e6), rate=st.floats(0.0005, 0.999), share=st.sampled_from([0.0, 0.1, 0.3]))
def test_the_threshold_and_the_p_value_agree_in_a_table_of_a_mixture(score: float, rate: float, share: float) -> None:
    for of in (made(share), Calibration.from_json(made(share).to_json())):
        threshold = threshold_of(of, rate)
        for tested in (score, threshold.value, np.nextafter(threshold.value, np.inf), *of.thresholds[::40]):
            p_value = float(of.p_values(tested))
            assert (tested > threshold.value) == (p_value <= threshold.expected_rate)
            if not threshold.limited:
                assert (tested > threshold.value) == (p_value <= rate * (1 + 1e-9))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_a_table_is_in_order(share: float) -> None:
    table = made(share)
    assert (np.diff(table.thresholds) >= 0).all()
    assert (np.diff(table.rates) <= 0).all()
    low, high = table.intervals.T
    assert (low <= table.rates).all()
    assert (table.rates <= high).all()
    assert ((table.intervals >= 0) & (table.intervals <= 1)).all()
    assert (np.diff(table.intervals, axis=0) <= 1e-12).all()
    _, lowest, highest = mixed(share)[1].false_alarms(table.thresholds)
    assert (low < lowest).all(), "chance, on top of what the share of defects leaves open"
    assert (highest <= high).all()
    assert table.rates[0] > 0.95
    neighbours = table.rates[1:] / table.rates[:-1]
    assert neighbours.min() > 0.85, "rates are spaced evenly, on a logarithmic scale"
    assert (table.misses is None) == (share == 0)
    if table.misses is not None:
        expected, lowest, highest = table.misses.T
        assert ((lowest <= highest) & (lowest >= 0) & (highest <= 1)).all()
        assert (np.diff(table.misses, axis=0) >= -1e-12).all()
        assert expected[0] < 0.02
        assert expected[-1] > 0.05


def test_the_rate_holds_on_a_contaminated_set() -> None:
    """Unlike that of the kept images, of which none lies where defects do."""
    fresh = np.exp(0.2 * np.random.default_rng(1).gumbel(size=20_000))
    rates = []
    for seed in range(8):
        scores, mixture = mixed(0.2, seed)
        table = Calibration.of_mixture(mixture, scores, mixture.probability <= 0.5, nothing_said())
        rates.append((fresh > threshold_of(table, 0.05).value).mean())
    assert np.median(rates) == pytest.approx(0.05, rel=0.5)


def test_rates_that_the_images_do_not_support_are_limited() -> None:
    table = made(0.1)
    few = threshold_of(table, 0.0001)
    assert few.limited
    assert few.expected_rate == pytest.approx(1 / 181, rel=0.1), "one of the good ones"
    assert few.value == table.thresholds[-1]
    assert not threshold_of(table, 0.01).limited
    assert threshold_of(table, 0.01).expected_rate <= 0.01
    assert threshold_of(table, 0.01).n_calibration == table.n_good
    assert table.n_good == pytest.approx(180, abs=8)


def test_intervals_hold_what_chance_does_to_few_images() -> None:
    """Clopper & Pearson's interval of two false alarms among a hundred good images."""
    table = Calibration.of(np.arange(99.0))
    threshold = threshold_of(table, 0.02)
    assert threshold.interval is not None
    assert threshold.interval == pytest.approx((beta.ppf(0.05, 2, 98), beta.ppf(0.95, 2, 98)))
    rates = 1 - np.sort(np.random.default_rng(0).uniform(size=(4000, 99)), axis=1)[:, 97]  # true rates of such
    assert np.mean((threshold.interval[0] <= rates) & (rates <= threshold.interval[1])) == pytest.approx(0.9, abs=0.02)


# ---- what a person is told -------------------------------------------------------------------------------------------


def test_kept_defects_are_warned_of_until_a_person_has_seen_them() -> None:
    everything = np.ones(200, bool)
    defective = np.arange(200) < 20

    def reviewed(kept: npt.NDArray[np.bool_], known: npt.NDArray[np.int64]) -> Calibration:
        return Calibration.of_unlabelled(unlabelled(at=20.0), None, 1.0, kept, known)

    table = reviewed(everything, nothing_said())
    assert 10 <= table.n_suspects <= 22
    assert table.warning is not None
    assert table.warning.startswith(f"At least {table.n_suspects} images look defective and still count")
    assert threshold_of(table, 0.01).promise == "provisional, since defective images still count for it"
    assert "between" not in str(threshold_of(table, 0.01))
    removed = reviewed(~defective, np.where(defective, DEFECTIVE, UNKNOWN))
    assert removed.warning is None
    assert "false alarm" in threshold_of(removed, 0.01).promise
    assert reviewed(everything, np.where(defective, GOOD, UNKNOWN)).warning is None, "confirmed as good"
    assert reviewed(everything, np.where(defective, DEFECTIVE, UNKNOWN)).warning is None, "seen, and kept all the same"
    one = replace(table, n_suspects=1)
    assert one.warning is not None
    assert one.warning.startswith("At least 1 image looks defective and")


def test_a_share_that_the_scores_do_not_tell_is_warned_of() -> None:
    table = replace(made(), n_suspects=0, contamination=(0.0, 0.45))
    assert table.warning is not None
    assert table.warning.startswith("Nobody knows how many training images are defective: between 0 and 45 % may be.")
    threshold = table.threshold()
    assert threshold is not None
    assert threshold.warning == table.warning
    assert "per 100" not in threshold.promise
    assert replace(table, contamination=(0.1, 0.3)).warning is None
    assert replace(table, contamination=None).warning is None


def test_a_promise_tells_the_interval_and_the_misses() -> None:
    plain = Threshold(1.5, 0.01, 0.01, 100)
    assert plain.promise == "about 1 false alarm per 100 good parts expected"
    wide = replace(plain, expected_rate=0.02, interval=(0.003, 0.0251))
    assert wide.promise == "about 2 false alarms per 100 good parts expected (between 0.3 and 2.5)"
    assert str(wide) == f"threshold 1.5: {wide.promise}"
    assert replace(wide, interval=(0.0004, 0.0251)).promise.endswith(" (at most 2.5)")
    missing = replace(wide, misses=(0.123, 0.04, 0.3))
    assert missing.promise == f"{wide.promise}, and 12 of 100 defects missed (between 4 and 30)"
    assert "expected" not in replace(missing, n_suspects=1).promise


def test_few_images_have_the_table_of_the_kept_ones() -> None:
    scores = unlabelled(n=19)
    kept = np.arange(19) >= 2
    few = Calibration.of_unlabelled(scores, None, 1.0, kept, nothing_said(19))
    np.testing.assert_array_equal(few.thresholds, np.sort(scores[kept]))
    assert (few.contamination, few.misses, few.n_suspects) == (None, None, 0)
    many = unlabelled()
    of = Calibration.of_unlabelled(many, None, 1.0, np.arange(200) >= 20, nothing_said())
    assert of.contamination == mixed()[1].interval
    np.testing.assert_array_equal(of.scores, np.sort(many[20:]))


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: made(0.0), lambda: made(0.3), lambda: Calibration.of([]), lambda: Calibration.of([2.0, 1.0])],
    ids=["clean", "some", "none", "two"],
)
def test_a_table_survives_the_disk(make: Callable[[], Calibration]) -> None:
    table = make()
    read = Calibration.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    for name, value in vars(table).items():
        if isinstance(value, np.ndarray):
            assert getattr(read, name).shape == value.shape, name
            np.testing.assert_allclose(getattr(read, name), value, rtol=1e-8, err_msg=name)
        elif name == "contamination" and value is not None:
            assert read.contamination == pytest.approx(value, abs=1e-9)
        else:
            assert getattr(read, name) == value, name
    again = Calibration.from_json(read.to_json())
    np.testing.assert_array_equal(again.thresholds, read.thresholds)


def test_a_list_of_scores_of_earlier_versions_is_read() -> None:
    scores = [3.0, 1.0, 2.0]
    read, of = Calibration.from_json(scores), Calibration.of(scores)
    assert read.to_json() == of.to_json()
    assert read.warning is None


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": [2.0, 1.0]},
        {"rates": [0.1, 0.2]},
        {"thresholds": [1.0]},
        {"intervals": [[0.0, 1.0]]},
        {"misses": [[0.0, 0.0, 0.0]]},
        {"rates": ["many", "few"]},
        {"n_good": None},
        {"contamination": [0.1, "half"]},
        {"contamination": 0.1},
        {"scores": None},
    ],
    ids=str,
)
def test_a_damaged_table_is_refused(change: dict[str, Any]) -> None:
    whole = Calibration.of([1.0, 2.0]).to_json()
    Calibration.from_json(whole)
    with pytest.raises((ValueError, TypeError)):
        Calibration.from_json({**whole, **change})


@pytest.mark.parametrize(
    "name", sorted({*Calibration.of([1.0]).to_json()} - {"n_defective"})
)  # which earlier ones lack
def test_a_table_with_a_part_missing_is_refused(name: str) -> None:
    whole = Calibration.of([1.0, 2.0]).to_json()
    del whole[name]
    with pytest.raises(KeyError):
        Calibration.from_json(whole)


def test_labelled_by_hand() -> None:
    found = Calibration.of_labelled([4.0, 1.0, 3.0, 2.0], [2.0, 2.5, 9.0, 9.0, 3.0])
    plain = Calibration.of([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(found.thresholds, plain.thresholds)
    np.testing.assert_array_equal(found.rates, plain.rates)
    np.testing.assert_array_equal(found.intervals, plain.intervals)
    assert (found.n_good, found.n_defective, found.n_suspects, found.contamination) == (4, 5, 0, None)
    assert found.warning is None
    assert found.misses is not None
    # a score that equals the threshold is not above it: missed
    assert found.misses[:, 0].tolist() == [0.0, 0.2, 0.6, 0.6]
    # of none missed the upper end, of one missed the lower end, in closed form
    np.testing.assert_allclose(found.misses[0, 1:], [0.0, 1 - 0.05 ** (1 / 5)])
    np.testing.assert_allclose(found.misses[1, 1], 1 - 0.95 ** (1 / 5))
    everything = Calibration.of_labelled([5.0], [1.0, 2.0, 3.0])
    assert everything.misses is not None
    np.testing.assert_allclose(everything.misses, [[1.0, 0.05 ** (1 / 3), 1.0]])


@given(
    good=st.lists(SCORES, min_size=1, max_size=40),
    defective=st.lists(SCORES, min_size=1, max_size=40),
    rate=st.floats(0.01, 0.9),
    share=st.floats(0.01, 0.99),
)
def test_labelled_by_counting(good: list[float], defective: list[float], rate: float, share: float) -> None:
    found = Calibration.of_labelled(good, defective)
    threshold = found.threshold(rate)
    assert threshold is not None
    assert threshold.misses is not None
    expected, low, high = threshold.misses
    missed = sum(d <= threshold.value for d in defective)
    assert expected == missed / len(defective)
    # Clopper and Pearson: at each end, so many misses or more (or fewer) have a probability of 5 %
    assert missed == 0 or stats.binom.sf(missed - 1, len(defective), low) == pytest.approx(0.05, rel=1e-6)
    assert missed == len(defective) or stats.binom.cdf(missed, len(defective), high) == pytest.approx(0.05, rel=1e-6)
    few_enough = [g for g in good if sum(d <= g for d in defective) <= share * len(defective)]
    chosen = found.threshold(found.rate_for_misses(share))
    assert chosen is not None
    assert chosen.value == max(few_enough, default=min(good))
    again = Calibration.from_json(json.loads(json.dumps(found.to_json())))
    reread = again.threshold(found.rate_for_misses(share))  # the rate is saved elsewhere, with all its digits
    assert reread is not None
    assert reread.value == pytest.approx(chosen.value, rel=1e-8)
    assert reread.expected_rate == pytest.approx(chosen.expected_rate, rel=1e-8)
    assert (again.n_good, again.n_defective) == (len(good), len(defective))


@pytest.mark.parametrize(("good", "defective"), [([], [1.0]), ([1.0], []), ([], [])])
def test_labelled_needs_both_kinds(good: list[float], defective: list[float]) -> None:
    with pytest.raises(InputError, match="needs good ones and defective ones"):
        Calibration.of_labelled(good, defective)


def test_misses_that_cannot_be_asked_for() -> None:
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ParameterError, match="misses must be in"):
            Calibration.of_labelled([1.0], [2.0]).rate_for_misses(share)
    with pytest.raises(ParameterError, match="Nothing is known of misses"):
        Calibration.of([1.0]).rate_for_misses(0.1)


def test_what_is_measured_is_said_to_be() -> None:
    measured = Calibration.of_labelled(range(40), [20.5, *range(100, 111)]).threshold(0.3)
    assert measured is not None
    assert str(measured) == (
        "threshold 28: about 29 false alarms per 100 good parts (between 18 and 41), and 8 of 100 defects missed "
        "(between 0 and 34), by 40 good and 12 defective labelled images"
    )
    expected = Calibration.of(range(40)).threshold(0.3)
    assert str(expected).endswith("about 29 false alarms per 100 good parts expected (between 18 and 41)")


def test_a_further_defect_is_missed_no_more_often_than_said() -> None:
    generator = np.random.default_rng(0)
    missed = []
    for _ in range(2000):
        good, defective = generator.gumbel(size=60), generator.gumbel(1, 1, 21)
        calibration = Calibration.of_labelled(good, defective[:20])
        threshold = calibration.threshold(calibration.rate_for_misses(0.1))
        assert threshold is not None
        missed.append(defective[20] <= threshold.value)
    assert np.mean(missed) <= 3 / 21 + 0.01
