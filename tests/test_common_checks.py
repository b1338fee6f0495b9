"""Every registered detector passes every common check."""

from collections.abc import Callable
from typing import Any

import pytest

from flawsift.detector import DETECTORS, Detector, make_detector
from flawsift.testing import CHECKS

# smaller than the defaults, so that a check takes a second
SMALL: dict[str, dict[str, Any]] = {
    "cflow": {"n_blocks": 2, "position_dim": 8, "steps": 40, "learning_rate": 0.01},
    "padim": {"n_features": 30},
    "patchcore": {"coreset_ratio": 0.05},
    "simplenet": {"embedding_dim": 32, "hidden_dim": 32, "steps": 60, "adaptor_rate": 1e-3, "discriminator_rate": 1e-2},
}


def test_every_detector_has_a_small_form() -> None:
    assert set(SMALL) == set(DETECTORS)


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_detector(name: str, check: Callable[[Detector], None]) -> None:
    check(make_detector(name, **SMALL[name]))
