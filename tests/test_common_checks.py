"""Every registered detector passes every common check."""

from collections.abc import Callable
from typing import Any

import pytest

from flawsift.detector import DETECTORS, Detector, make_detector
from flawsift.testing import CHECKS

# smaller than the defaults, so that a check takes a second
SMALL: dict[str, dict[str, Any]] = {
    "destseg": {
        "student_size": None,
        "student_width": 8,
        "head_width": 16,
        "n_copies": 2,
        "student_steps": 60,
        "head_steps": 100,
    },
    "padim": {"n_features": 30},
    "patchcore": {"coreset_ratio": 0.05},
    "uniad": {"patch": 8, "width": 32, "epochs": 12, "batch_size": 4},
}


def test_every_detector_has_a_small_form() -> None:
    assert set(SMALL) == set(DETECTORS)


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_detector(name: str, check: Callable[[Detector], None]) -> None:
    check(make_detector(name, **SMALL[name]))
