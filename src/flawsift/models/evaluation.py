"""Metrics of predictions on labelled images; a model never sees the labels."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Prediction
from flawsift.errors import InputError
from flawsift.metrics import ranking as metrics
from flawsift.metrics.aupro import StreamingAUPRO
from flawsift.models.predictions import Predictions


@dataclass
class MapCollector:
    """Takes maps as they come: keeps them, or streams them into AUPRO where they are too many.

    Attributes:
        truth: Masks of anomalous images; those without one are left out.
        exact_pixels: With more map pixels than this, maps are streamed; None never streams.
        n_images: How many images there will be.
        kept: Maps in the order of the readable images; None if streamed.
        stream: Where they are streamed to; None if kept.
        hits: {id: whether the highest place of the map lies in the mask} of images with a mask.
    """

    truth: GroundTruth
    exact_pixels: int | None
    n_images: int
    kept: list[npt.NDArray[np.float32]] | None = field(default_factory=list)
    stream: StreamingAUPRO | None = None
    hits: dict[int, bool] = field(default_factory=dict)

    def __call__(self, images: ImageSet, prediction: Prediction) -> None:
        assert prediction.maps is not None
        if self.exact_pixels is not None and self.n_images * prediction.maps[0].size > self.exact_pixels:
            self.kept, self.stream = None, self.stream or StreamingAUPRO()
        if self.kept is not None:
            self.kept.extend(prediction.maps)
        for id_, anomaly_map in zip(prediction.ids.tolist(), prediction.maps, strict=True):
            if self.stream is None and id_ not in self.truth.masks:
                continue
            mask = self.truth.mask(id_, anomaly_map.shape)
            if mask is None:
                continue
            if mask.any():
                self.hits[id_] = bool(mask[np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)])
            if self.stream is not None:
                self.stream.update(anomaly_map, mask)


def measure(predictions: Predictions, truth: GroundTruth, maps: MapCollector | None) -> dict[str, Any]:
    """The metrics of `flawsift.models.model.Model.evaluate`.

    Args:
        predictions: Of labelled images.
        truth: Labels and masks.
        maps: What took the maps of the readable images; None leaves out pixel metrics.

    Raises:
        InputError: No image can be read, or an image has no label.
    """
    readable = np.isfinite(predictions.scores)
    if not readable.any():
        raise InputError(f"None of the {len(predictions)} test images can be read.")
    ids, scores = predictions.ids[readable], predictions.scores[readable]
    result: dict[str, Any] = dict(metrics.evaluate(ids, scores, truth, None if maps is None else maps.kept))
    if maps is not None and maps.stream is not None and result["n_anomalous"] > 0:
        unknown = set(ids[truth.select(ids).labels == 1].tolist()) - set(truth.masks)
        result["n_without_mask"] = len(unknown)
        result |= {"aupro": maps.stream.compute(), "aupro_bound": maps.stream.error_bound()}
    labels = truth.select(ids).labels
    stopped = None if predictions.threshold is None else scores > predictions.threshold.value
    for key, label, wrong in (("false_alarms_per_100", 0, stopped), ("missed_per_100", 1, stopped)):
        mine = labels == label
        share = None if wrong is None or not mine.any() else float((wrong[mine] != bool(label)).mean())
        result[key] = None if share is None else 100 * share
    found = [] if stopped is None or maps is None else [maps.hits[i] for i in ids[stopped].tolist() if i in maps.hits]
    result["hits_per_100"] = 100 * float(np.mean(found)) if found else None
    result["n_unreadable"] = int((~readable).sum())
    return result
