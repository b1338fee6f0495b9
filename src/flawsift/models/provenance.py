"""What made the scores of a screening or of a model: written down with them, and compared."""

import platform
from importlib import metadata
from typing import Any

import flawsift
from flawsift.data.images import ImageSet
from flawsift.data.values import VALUE_RANGE, kept
from flawsift.detectors.base import Detector
from flawsift.features.backbones import Backbone
from flawsift.screening.result import Screening

VERSIONED = ("torch", "timm", "openvino", "numpy", "pillow")  # packages whose version can change a score


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


def versions() -> dict[str, str]:
    """Versions of what can change a score."""
    known = {"flawsift": flawsift.__version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = "absent"
    return known
