"""How the images of a screening were looked at: range of values, region of interest, alignment."""

from flawsift.data.alignment import ALIGNMENT, Alignment
from flawsift.data.frames import Region
from flawsift.data.images import ImageSet
from flawsift.data.roi import REGION
from flawsift.data.values import VALUE_RANGE, ValueRange
from flawsift.screening.result import Screening


def as_seen_by(screening: Screening, images: ImageSet) -> ImageSet:
    """Images as a screening looked at its own, but for what they have of their own: that is the newer word."""
    if images.value_range is None:
        images = images.within(range_of(screening))
    if images.region is None and images.alignment is None:
        images = images.looked_at(region_of(screening)).aligned(alignment_of(screening))
    return images


def range_of(screening: Screening) -> ValueRange | None:
    """The range of values that its images of more than 8 bits were read by."""
    return ValueRange.from_json(screening.provenance.get(VALUE_RANGE))


def region_of(screening: Screening) -> Region | None:
    """The part of its images that was looked at; None for all."""
    return Region.from_json(screening.provenance.get(REGION))


def alignment_of(screening: Screening) -> Alignment | None:
    """How its images were turned and cropped; None where they were not."""
    return Alignment.from_json(screening.provenance.get(ALIGNMENT))
