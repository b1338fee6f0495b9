"""Every registered detector passes every common check."""

from collections.abc import Callable
from typing import Any

import pytest

from flawsift.detector import DETECTORS, Detector, make_detector
from flawsift.testing import CHECKS

# smaller than the defaults, so that a check takes a second
SMALL: dict[str, dict[str, Any]] = {
    "funad": {"layers": ("stride8",), "steps": 60, "hidden": (64, 32), "bank_size": 500},
    "padim": {"n_features": 30},
    "patchcore": {"coreset_ratio": 0.05},
}

# what cannot hold, and why
UNMET = {
    (
        "funad",
        "check_easy_defects_are_found",
    ): "it learns from the anomalies in training, and this check trains on none",
}


def test_every_detector_has_a_small_form() -> None:
    assert set(SMALL) == set(DETECTORS)


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_detector(name: str, check: Callable[[Detector], None], request: pytest.FixtureRequest) -> None:
    if reason := UNMET.get((name, check.__name__)):
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    check(make_detector(name, **SMALL[name]))
