"""The label-free threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsift.errors import ParameterError
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
