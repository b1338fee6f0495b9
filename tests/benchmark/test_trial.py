"""A row of the benchmark trains on what `fit` trains on: one plan for both."""

from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.benchmark.trial import Trial
from flawsift.datasets import Dataset
from flawsift.detectors.base import DETECTORS, make_detector
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.models.model import set_digest
from flawsift.screening.options import PRESETS, ScreenOptions

# as short as they get: what is learned does not matter here
SHORT: dict[str, dict[str, Any]] = {
    "cflow": {"n_blocks": 1, "position_dim": 8, "steps": 1},
    "destseg": {
        "student_size": None,
        "student_width": 4,
        "head_width": 4,
        "n_copies": 1,
        "student_steps": 1,
        "head_steps": 1,
    },
    "dinomaly": {"width": 16, "n_blocks": 2, "steps": 1, "batch_size": 4, "warmup": 0, "easy_ramp": 1},
    "funad": {"layers": ("stride8",), "steps": 1, "hidden": (8,), "bank_size": 200},
    "inreach": {"n_seeds": 4, "coreset_ratio": 0.2},
    "padim": {"n_features": 10},
    "rd": {"n_blocks": (1, 1, 1, 1), "epochs": 1, "batch_size": 8},
    "simplenet": {"embedding_dim": 8, "hidden_dim": 8, "steps": 1},
    "uniad": {"patch": 8, "width": 16, "epochs": 1, "batch_size": 4},
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_both_ways_train_on_the_same_ids_and_masks(
    name: str, preset: str, easy: Dataset, tiny: Backbone, tmp_path: Any
) -> None:
    detector = make_detector(name, **SHORT.get(name, {"coreset_ratio": 0.05}))
    images = easy.images.select(np.r_[0:22, 40:48])  # more than a quarter is defective: the default finds evidence
    store = FeatureStore(tmp_path)
    fitted = pipeline.fit(images, detector, tiny, options=ScreenOptions.of(preset, n_subsets=2), store=store)
    first = pipeline.resolve_screener(PRESETS[preset].screener, detector, tiny, 0)
    layers = tuple(dict.fromkeys([*detector.layers, *first.layers]))
    train, _ = attach(images, tiny, layers, views=tuple(dict.fromkeys([*detector.views, *first.views])), store=store)
    trial = Trial(train=train, test=train, truth=easy.truth, detector=detector, backbone=tiny, n_subsets=2)
    (arm,) = trial.arms([preset])
    assert arm.plan.kept.tolist() == fitted.plan.kept.tolist()
    assert set_digest(arm.plan.images) == set_digest(fitted.plan.images) == fitted.model.training["kept_digest"]
    mine, theirs = arm.plan.held_out_scores, fitted.plan.held_out_scores
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        np.testing.assert_array_equal(mine, theirs)
