"""What the commands say about thresholds, sizes and ranges, in the same words everywhere."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flawsift.models.calibration import Threshold

SMALLEST_SEEN = 4  # pixels of a network's input: half of the finest cells that the default detectors read
MOST = 0.5  # of the defects: when more are missed, it is said what to do
MUCH_REDUCED = 8  # pixels of an image for one of the input: a mark of 30 is then smaller than that


def warning_lines(threshold: "Threshold | None") -> list[str]:
    """What a person must know before a threshold is trusted: above everything else."""
    return [f"WARNING: {threshold.warning}"] if threshold is not None and threshold.warning is not None else []


def threshold_lines(threshold: "Threshold | None", *, reservation: str = "") -> list[str]:
    """What is said about a threshold, with what its rate does not hold for."""
    if threshold is None:
        return ["No threshold: one image or group gives no held-out scores to calibrate with. Scores are still ranked."]
    text = str(threshold).replace("threshold", "Threshold", 1)
    if threshold.limited:
        text += f". {_too_few(threshold)}"
    promises = threshold.warning is None
    lines = [f"{text}; {reservation}." if reservation and promises else f"{text}."]
    if promises and threshold.misses is not None and threshold.misses[0] > MOST:
        lines.append("Note: most defects would pass. A higher --false-alarm-rate, such as 0.05, stops more of them.")
    return lines


def _too_few(threshold: "Threshold") -> str:
    """Why a threshold has a higher rate than was asked for."""
    from flawsift.models.calibration import n_needed

    needed, there = n_needed(threshold.false_alarm_rate), threshold.n_calibration
    asked = f"{100 * threshold.false_alarm_rate:g} in 100"
    if there >= needed:
        return f"The images are too few for {asked}"
    return f"{asked} needs {needed:,} good images to be told; about {there:,} count here"


def range_lines(record: Mapping[str, Any]) -> list[str]:
    """What is said about the range of values that a screening or a model keeps; nothing where it has none."""
    from flawsift.data.values import VALUE_RANGE, ValueRange

    value_range = ValueRange.from_json(record.get(VALUE_RANGE))
    return [] if value_range is None else [value_range.line]


def size_lines(backbone: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What is said about the size that images were looked at, and the part of them.

    Args:
        backbone: Arguments that load it.
        record: Of a screening or a model.
    """
    from flawsift.data.alignment import ALIGNMENT, Alignment
    from flawsift.data.frames import Region
    from flawsift.data.roi import REGION
    from flawsift.models.provenance import PICTURES
    from flawsift.types import as_shape

    size = backbone["size"]
    height, width = as_shape(size)
    line, notes = f"Images are looked at in {width} x {height} pixels", []
    alignment = Alignment.from_json(record.get(ALIGNMENT))
    if picture := record.get(PICTURES):
        seen = picture if alignment is None else alignment.size((picture[0], picture[1]))
        reduced = math.sqrt(seen[0] * seen[1] / (width * height))
        line += f", most have {picture[0]} x {picture[1]}"
        if reduced > 1:
            least = math.ceil(SMALLEST_SEEN * reduced)
            line += f": what is smaller than about {least} pixels may go unseen"
            if reduced > MUCH_REDUCED:
                notes.append(f"Note: images are reduced {reduced:.0f} times. Small defects need a larger --size.")
    region = Region.from_json(record.get(REGION))
    if region is not None:
        notes.append(f"Only the region of interest counts: {100 * region.share:.0f} % of each image.")
    if alignment is not None and picture:
        how = "turned and cropped" if alignment.turned else "shifted and cropped (parts are too round to be turned)"
        notes.append(f"Before that they are {how} to {seen[0]} x {seen[1]} pixels, so that all parts lie alike.")
    squeezed = ", squeezed into a square" if isinstance(size, int) else ""
    return [f"{line}{squeezed}.", *notes]
