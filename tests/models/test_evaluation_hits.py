"""Whether the highest place of a map lies in the defect."""

import numpy as np

from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.quorum import Quorum
from flawsift.features.backbones import load_backbone
from flawsift.features.extraction import attach
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model


def test_hits_are_of_the_found_defects_with_a_mask() -> None:
    generator = np.random.default_rng(0)
    good = [(120 + generator.normal(0, 3, (64, 64, 3))).clip(0, 255).astype(np.uint8) for _ in range(14)]
    backbone = load_backbone("tiny", size=64, runtime="torch")
    detector = Quorum()
    train, _ = attach(ImageSet.from_arrays(good[:10]), backbone, detector.layers)
    detector.fit(train)
    model = Model(detector, backbone, Calibration.of(detector.held_out_scores(train)), {"false_alarm_rate": 0.1})
    marked = [good[10].copy() for _ in range(3)]
    for picture in marked:
        picture[40:48, 8:16] = 255
    there, elsewhere = np.zeros((64, 64), np.bool_), np.zeros((64, 64), np.bool_)
    there[36:60, 4:24] = True
    elsewhere[:6, 50:] = True
    tested = ImageSet.from_arrays([*good[11:13], *marked, good[13]])
    # found and hit, found and not hit, found without a mask; a missed one with a mask
    masks = {2: there, 3: elsewhere, 5: there}
    truth = GroundTruth(tested.ids, np.array([0, 0, 1, 1, 1, 1], np.int8), ("good", "good", *["mark"] * 4), masks)
    metrics, predictions = model.evaluate(tested, truth)
    assert predictions.is_anomalous is not None
    assert predictions.is_anomalous.tolist()[2:] == [True, True, True, False]
    assert metrics["hits_per_100"] == 50
    streamed, _ = model.evaluate(tested, truth, exact_pixels=10)
    assert streamed["hits_per_100"] == 50
    unmasked, _ = model.evaluate(tested, GroundTruth(tested.ids, truth.labels, truth.defect_types, {}))
    assert unmasked["hits_per_100"] is None
