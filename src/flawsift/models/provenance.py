"""What made the scores of a screening or of a model: written down with them, and compared."""

from typing import Any

from flawsift.detectors.base import Detector
from flawsift.features.backbones import Backbone
from flawsift.models.model import versions
from flawsift.screening.result import Screening


def provenance_of(detector: Detector, backbone: Backbone) -> dict[str, Any]:
    """Detector, backbone and versions, ready for JSON."""
    return {
        "detector": {"name": detector.name, "params": detector.params()},
        "backbone": {"spec": backbone.spec, "key": backbone.key, "weights_digest": backbone.weights_digest},
        "versions": versions(),
    }


def is_made_by(screening: Screening, detector: Detector, backbone: Backbone) -> bool:
    """Whether the scores of a screening are this detector's: a threshold from another's would be nonsense."""
    mine = provenance_of(detector, backbone)
    keys = (("detector", "name"), ("detector", "params"), ("backbone", "key"), ("backbone", "weights_digest"))
    return all(screening.provenance.get(part, {}).get(key) == mine[part][key] for part, key in keys)
