"""What made the scores of a screening or of a model: written down with them, and compared."""

import platform
from importlib import metadata
from typing import Any

import flawsift
from flawsift.data.alignment import ALIGNMENT
from flawsift.data.images import ImageSet
from flawsift.data.roi import REGION
from flawsift.data.values import VALUE_RANGE, kept
from flawsift.detectors.base import Detector
from flawsift.features.backbones import Backbone, typical_picture
from flawsift.screening.result import Screening

PICTURES = "pictures"  # under which a screening and a model keep what their images' size is
SEEN = (VALUE_RANGE, REGION, ALIGNMENT)  # what changes scores of it
VERSIONED = ("torch", "timm", "openvino", "numpy", "pillow")  # packages whose version can change a score


def provenance_of(detector: Detector, backbone: Backbone, images: ImageSet) -> dict[str, Any]:
    """Detector, backbone, versions and how the images were looked at, ready for JSON."""
    return {
        "detector": {"name": detector.name, "params": detector.params()},
        "backbone": {"spec": backbone.spec, "key": backbone.key, "weights_digest": backbone.weights_digest},
        "versions": versions(),
        **how_seen(images),
    }


def how_seen(images: ImageSet) -> dict[str, Any]:
    """What a screening and a model keep of how their images were looked at, and of what size they usually are."""
    picture = typical_picture(images)
    return {
        **kept(images.value_range),
        **({} if images.region is None else {REGION: images.region.as_json()}),
        **({} if images.alignment is None else {ALIGNMENT: images.alignment.as_json()}),
        **({} if picture is None else {PICTURES: list(picture)}),
    }


def is_made_by(screening: Screening | None, detector: Detector, backbone: Backbone, images: ImageSet) -> bool:
    """Whether the scores of a screening are this detector's: a threshold from another's would be nonsense."""
    mine = provenance_of(detector, backbone, images)
    if screening is None or any(screening.provenance.get(key) != mine.get(key) for key in SEEN):
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
