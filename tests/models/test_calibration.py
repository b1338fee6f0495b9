"""The label-free threshold."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flawsift.errors import InputError, ParameterError
from flawsift.models.calibration import Calibration


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
        "(between 0 and 34), measured on 40 good and 12 defective labelled images"
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
