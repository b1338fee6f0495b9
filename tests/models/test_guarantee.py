"""Screening helps where there are defects and never hurts where there are none, for any detector behind it."""

from typing import Any

import numpy as np
import pytest

from flawsift.benchmark.trial import Trial
from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.datasets.synthetic import synthetic
from flawsift.detectors.registry import make_detector
from flawsift.executors import Run
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.testing import SIZE

SEEDS = range(3)
FINAL: dict[str, dict[str, Any]] = {
    "patchcore": {"coreset_ratio": 0.02},
    "padim": {"n_features": 30},
    "softpatch": {"coreset_ratio": 0.02},
    "quorum": {},
    "rd": {"layers": ("stride4", "stride8", "stride16"), "epochs": 8},
}


@pytest.fixture(scope="module")
def sets(tiny: Backbone) -> list[tuple[Dataset, ImageSet]]:
    """Three synthetic sets with the features that the detectors read."""
    found = []
    for seed in SEEDS:
        data = synthetic(160, 100, size=SIZE, seed=seed)
        images, _ = attach(data.images, tiny, ("stride4", "stride8", "stride16"))
        found.append((data, images))
    return found


def gains(sets: list[tuple[Dataset, ImageSet]], tiny: Backbone, name: str, alpha: float) -> tuple[float, float]:
    """Mean gain of the default over no screening, and of a perfect screening, in image AUROC."""
    rows = []
    for seed, (data, images) in zip(SEEDS, sets, strict=True):
        cut = contaminate(data.truth, alpha=alpha, n_train=80, test_normal=60, test_anomalous=60, seed=seed)
        train, test = images.select(cut.train_ids), images.select(cut.test_ids)
        detector = make_detector(name, seed=seed, **FINAL[name])
        presets = ["none", "default", "oracle_clean"]
        trial = Trial(
            train=train,
            test=test,
            truth=data.truth,
            detector=detector,
            backbone=tiny,
            run=Run(seed=seed),
            calibrate=False,
        )
        rows.append(trial.rows(presets))
    none, default, oracle = (np.array([float(r[i]["image_auroc"]) for r in rows]) for i in range(3))
    return float((default - none).mean()), float((oracle - none).mean())


@pytest.mark.parametrize("name", sorted(FINAL))
def test_a_clean_set_loses_nothing(sets: list[tuple[Dataset, ImageSet]], tiny: Backbone, name: str) -> None:
    gain, _ = gains(sets, tiny, name, 0.0)
    assert gain >= -0.003


@pytest.mark.parametrize("name", sorted(FINAL))
def test_a_contaminated_set_gains(sets: list[tuple[Dataset, ImageSet]], tiny: Backbone, name: str) -> None:
    gain, most = gains(sets, tiny, name, 0.2)
    if most >= 0.01:
        assert gain >= 0.4 * most
    else:  # there is nothing to win: this detector withstands defects by itself, on these sets
        assert gain >= -0.01
