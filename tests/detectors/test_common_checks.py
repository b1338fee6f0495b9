"""Every registered detector passes every common check."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flawsift.data.images import Batch
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import DETECTORS, detector_class, make_detector
from flawsift.testing import CHECKS, with_features

# smaller than the defaults, so that a check takes a second
SMALL: dict[str, dict[str, Any]] = {
    "cflow": {"n_blocks": 2, "position_dim": 8, "steps": 40, "learning_rate": 0.01},
    "destseg": {
        "student_size": None,
        "student_width": 8,
        "head_width": 16,
        "n_copies": 2,
        "student_steps": 60,
        "head_steps": 100,
    },
    "dinomaly": {"width": 32, "n_blocks": 2, "steps": 60, "batch_size": 8, "warmup": 5, "easy_ramp": 30},
    "funad": {"layers": ("stride8",), "steps": 60, "hidden": (64, 32), "bank_size": 500},
    "inreach": {"n_seeds": 4, "coreset_ratio": 0.2},
    "padim": {"n_features": 30},
    "patchcore": {"coreset_ratio": 0.05},
    "quorum": {},
    "rd": {"n_blocks": (1, 1, 1, 1), "epochs": 20, "batch_size": 8},
    "simplenet": {"embedding_dim": 32, "hidden_dim": 32, "steps": 60, "adaptor_rate": 1e-3, "discriminator_rate": 1e-2},
    "softpatch": {"coreset_ratio": 0.05},
    "uniad": {"patch": 8, "width": 32, "epochs": 12, "batch_size": 4},
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
def test_a_detector_that_trains_in_bfloat16_says_so(name: str) -> None:
    cls = detector_class(name)
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    if "Recipe(" not in source:  # nothing but `training.train` takes gradient steps
        return
    told = " ".join((cls.__doc__ or "").partition("Differs from the paper:")[2].split())
    assert "bfloat16" in told
    assert ("a CPU that multiplies it" in told) == ("large_products=" in source), "on a CPU as well"


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_detector(name: str, check: Callable[[Detector], None], request: pytest.FixtureRequest) -> None:
    if reason := UNMET.get((name, check.__name__)):
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    check(make_detector(name, **SMALL[name]))


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_detector_says_whether_it_leaves_out_patches(
    name: str, easy: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, Any] = {"steps": 2, "student_steps": 2, "head_steps": 2, "epochs": 2, "warmup": 0}
    short = {key: value for key, value in lengths.items() if key in SMALL[name]}
    detector = make_detector(name, **{**SMALL[name], **short})
    corner = np.zeros((8, 8), bool)
    corner[:2, :2] = True
    images = with_features(easy.images.select(range(8)), detector)
    asked: list[int] = []
    accepted = Batch.accepted

    def ask(batch: Batch, height: int, width: int) -> Any:
        asked.append(1)
        return accepted(batch, height, width)

    monkeypatch.setattr(Batch, "accepted", ask)
    detector.fit(images.without_patches(dict.fromkeys(range(8), corner)))
    assert bool(asked) == detector.leaves_out_patches
