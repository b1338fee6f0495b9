"""What made the scores of a screening or of a model: written down with them, and compared."""

from typing import Any

from flawsift.data.images import ImageSet
from flawsift.data.values import VALUE_RANGE, kept
from flawsift.detectors.base import Detector
from flawsift.features.backbones import Backbone
from flawsift.models.model import versions
from flawsift.screening.result import Screening


def provenance_of(detector: Detector, backbone: Backbone, images: ImageSet) -> dict[str, Any]:
    """Detector, backbone, versions and, where the images have one, their range of values, ready for JSON."""
    return {
        "detector": {"name": detector.name, "params": detector.params()},
        "backbone": {"spec": backbone.spec, "key": backbone.key, "weights_digest": backbone.weights_digest},
        "versions": versions(),
        **kept(images.value_range),
    }


def is_made_by(screening: Screening | None, detector: Detector, backbone: Backbone, images: ImageSet) -> bool:
    """Whether the scores of a screening are this detector's: a threshold from another's would be nonsense."""
    mine = provenance_of(detector, backbone, images)
    if screening is None or screening.provenance.get(VALUE_RANGE) != mine.get(VALUE_RANGE):
        return False
    keys = (("detector", "name"), ("detector", "params"), ("backbone", "key"), ("backbone", "weights_digest"))
    return all(screening.provenance.get(part, {}).get(key) == mine[part][key] for part, key in keys)
