"""What commands say about thresholds."""

from dataclasses import replace

import pytest

from flawsift.cli.lines import threshold_lines
from flawsift.models.calibration import Threshold

FEW = Threshold(value=29.5, false_alarm_rate=0.01, expected_rate=0.024, n_calibration=41, interval=(0.0, 0.07))


def test_too_few_images_are_counted() -> None:
    expected = "about 2.4 false alarms per 100 good parts expected (at most 7)"
    assert threshold_lines(FEW) == [
        f"Threshold 29.5: {expected}. 1 in 100 needs 99 good images to be told; about 41 count here."
    ]
    grouped = replace(FEW, n_calibration=120)  # of few groups: their number of images is no reason
    assert threshold_lines(grouped) == [f"Threshold 29.5: {expected}. The images are too few for 1 in 100."]
    enough = replace(FEW, expected_rate=0.01)
    assert len(threshold_lines(enough)) == 1
    assert "needs" not in threshold_lines(enough)[0]


@pytest.mark.parametrize(("missed", "n_suspects", "is_said"), [(0.85, 0, True), (0.3, 0, False), (0.85, 2, False)])
def test_what_to_do_where_most_defects_would_pass(missed: float, n_suspects: int, *, is_said: bool) -> None:
    threshold = replace(FEW, misses=(missed, 0.2, 0.99), n_suspects=n_suspects)
    assert ("--false-alarm-rate" in " ".join(threshold_lines(threshold))) == is_said
