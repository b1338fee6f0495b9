"""A row of the benchmark trains on what `fit` trains on: one plan for both."""

from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.benchmark.trial import Trial
from flawsift.data.alignment import learn
from flawsift.data.truth import GroundTruth
from flawsift.datasets import Dataset
from flawsift.detectors.registry import DETECTORS, make_detector
from flawsift.features.backbones import Backbone, fitting_size, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.metrics.ranking import image_auroc
from flawsift.models.model import set_digest
from flawsift.screening.options import PRESETS, ScreenOptions
from flawsift.screening.stage1 import ranker_of, resolve_screener
from flawsift.screening.submodels import rank_by_submodels
from tests.data.nails import nails

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
    "quorum": {},
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
    first = resolve_screener(PRESETS[preset].screener, detector, tiny, 0)
    few = {"n_subsets": 2} if ranker_of(first, PRESETS[preset]) is rank_by_submodels else {}
    fitted = pipeline.fit(images, detector, tiny, options=ScreenOptions.of(preset, **few), store=store)
    layers = tuple(dict.fromkeys([*detector.layers, *first.layers]))
    train, _ = attach(images, tiny, layers, views=tuple(dict.fromkeys([*detector.views, *first.views])), store=store)
    trial = Trial(train=train, test=train, truth=easy.truth, detector=detector, backbone=tiny, n_subsets=2)
    (arm,) = trial.arms([preset])
    assert arm.plan.kept.tolist() == fitted.plan.kept.tolist()
    assert set_digest(arm.plan.images) == set_digest(fitted.plan.images) == fitted.model.training["kept_digest"]
    mine, theirs = arm.plan.judged, fitted.plan.judged
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.scores, theirs.scores)


@pytest.mark.parametrize("n_subsets", [None, 2])
def test_kinds_of_stage_one_are_kept_apart(n_subsets: int | None, easy: Dataset, tiny: Backbone) -> None:
    """The default ranks by Quorum's own scores, the paper's preset by its sub-models; only these have subsets."""
    detector = make_detector("quorum")
    train, _ = attach(easy.images, tiny, detector.layers)
    common: dict[str, Any] = {"train": train, "test": train, "truth": easy.truth, "backbone": tiny}
    trial = Trial(detector=detector, n_subsets=n_subsets, **common)
    default, paper, again = trial.arms(["default", "paper", "default"])
    for arm in (default, again):
        assert arm.plan.screening is not None
        assert arm.plan.screening.submodels is None
        assert arm.plan.screening.evidence is not None
        assert arm.plan.images.ids.tolist() == train.ids.tolist()
    assert again.seconds == default.seconds, "equal presets share a stage 1"
    assert paper.plan.screening is not None
    assert paper.plan.screening.submodel_scores.score_matrix.shape[0] == (n_subsets or 5)
    assert len(paper.plan.kept) == 20
    rows = trial.rows(["default", "paper"])
    assert "alone_normal" not in rows[0]
    assert "alone_normal" in rows[1]
    assert [row["screener"] for row in rows] == ["quorum", "quorum"]
    assert all(row["stage1_auroc"] > 0.9 for row in rows)
    patchcore = Trial(detector=detector, n_subsets=n_subsets, screener="patchcore", **common)
    (by_another,) = patchcore.arms(["default"])
    assert by_another.plan.screening is not None
    assert by_another.plan.screening.submodel_scores.score_matrix.shape[0] == (n_subsets or 5)


def test_test_images_are_looked_at_as_the_training_images() -> None:
    """Aligned: a model that forgot it would compare nails at any angle with nails that lie alike."""
    images = nails(40, marked=8)
    aligned = images.aligned(learn(images))
    backbone = load_backbone("tiny", size=fitting_size(aligned, 128))
    detector = make_detector("quorum")
    seen, _ = attach(aligned, backbone, detector.layers)
    truth = GroundTruth(images.ids, np.r_[np.zeros(32), np.ones(8)], ("good",) * 32 + ("mark",) * 8, {})
    train, test = seen.select(range(24)), seen.select(range(24, 40))
    trial = Trial(train=train, test=test, truth=truth, detector=detector, backbone=backbone)
    (row,) = trial.rows(["none"])
    wanted = image_auroc(detector.clone().fit(train).predict(test).scores, truth.labels[24:])
    assert row["image_auroc"] == wanted == 1
