"""Whether new images are what a model was trained on: said once for all of them, with the numbers.

A threshold's rate of false alarms is one for images like the training images. Images of another product, or of another
camera, are all called anomalous, or all normal, and no single verdict shows why.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.data.facts import ImageFacts
from flawsift.detectors.base import Prediction
from flawsift.models.calibration import Calibration
from flawsift.models.profile import Profile, Range

MOST = 0.9  # of the images: single ones differ by chance or defect, nearly all only where what is taken has changed
FEW = 5  # fewer training images show no range, and fewer new ones may all be defective by accident
# Times what the median patch of a training image scores. Of tiles, cookies, screws and two papers, nine of ten images
# of the same product, good or defective, stay below 1.43 times, and those of other products lie above 1.69 times, but
# for papers that look alike. Where images are nearly the same and no groups say so, ordinary new ones lie above it too:
# the score must be beyond training as well.
UNLIKE = 1.5
SIZE_MARGIN = 0.1  # of width, height or their ratio: all is resized to one square, which evens out less than that
GREY_MARGIN = 0.05 * 255  # below what lamps and exposures drift by themselves

# What is said beside a rate of false alarms wherever there is a notice.
RESERVATION = "this rate holds for pictures like the training images, and these differ"


@dataclass(frozen=True)
class Notice:
    """One way in which images differ from the training images.

    Attributes:
        kind: "scores", "size", "format", "brightness" or "contrast".
        n: Images of which it is true.
        n_images: Images that were looked at.
        text: A sentence or two, for people.
        details: The numbers: "images" and "training", each {name: value, or [smallest, median, largest]}.
    """

    kind: str
    n: int
    n_images: int
    text: str
    details: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"kind": self.kind, "n": self.n, "n_images": self.n_images, "text": self.text, **self.details}


@dataclass(eq=False)
class Observed:
    """What is remembered of images as they pass: a few numbers each, no pixels and no maps."""

    facts: list[ImageFacts] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    map_medians: list[float] = field(default_factory=list)

    def add(self, facts: Mapping[int, ImageFacts], prediction: Prediction) -> None:
        """Take in some images, readable ones."""
        self.facts += facts.values()
        self.scores += prediction.scores.tolist()
        if prediction.map_medians is not None:
            self.map_medians += prediction.map_medians.tolist()

    def notices(self, profile: Profile | None, calibration: Calibration) -> tuple[Notice, ...]:
        """How the images differ from the training images, the gravest first; empty without a profile."""
        if profile is None:
            return ()
        found = [self._of_scores(profile, calibration), *_of_pictures(profile, self.facts)]
        return tuple(notice for notice in found if notice is not None)

    def _of_scores(self, profile: Profile, calibration: Calibration) -> Notice | None:
        """Defects are in a place; another product, or another camera, is everywhere."""
        n_training = len(calibration.scores)
        if n_training < FEW or not self.scores:
            return None
        scores, highest, usual = np.asarray(self.scores), float(calibration.scores[-1]), profile.map_median
        differs = scores > highest
        here: dict[str, Any] = {"scores": Range.of(self.scores)}
        there: dict[str, Any] = {"n_images": n_training, "highest_score": highest}
        if has_maps := usual is not None and usual > 0 and len(self.map_medians) == len(scores):
            differs &= np.asarray(self.map_medians) > UNLIKE * usual
            here["map_medians"], there["map_median"] = Range.of(self.map_medians), usual
        n = int(differs.sum())
        if not _are_most(n, len(scores)) or (len(scores) < FEW and not has_maps):
            return None
        text = (
            f"{_of(n, len(scores))} {'scores' if n == 1 else 'score'} higher than each of the {n_training:,} training "
        )
        text += "images that the threshold comes from"
        if has_maps:
            text += ", and all over rather than in one place. "
            text += f"{'Is it' if len(scores) == 1 else 'Are they'} of the same product, taken the same way?"
        else:
            text += ". Either nearly all are defective, or they are not of the same product, taken the same way."
        return Notice("scores", n, len(scores), text, {"images": here, "training": there})


def _of_pictures(profile: Profile, facts: Sequence[ImageFacts]) -> Iterator[Notice | None]:
    """What can be told without a look at any score."""
    if not facts:
        return
    yield _of_size(profile, facts)
    yield _of_format(profile, facts)
    if profile.n_images >= FEW:
        yield _of_grey("brightness", profile.brightness, [one.brightness for one in facts], _brightness_text)
        yield _of_grey("contrast", profile.contrast, [one.contrast for one in facts], _contrast_text)


def _of_size(profile: Profile, facts: Sequence[ImageFacts]) -> Notice | None:
    measured: dict[str, Sequence[float]] = {
        "width": [one.width for one in facts],
        "height": [one.height for one in facts],
        "aspect": [one.width / one.height for one in facts],
    }
    known = {name: getattr(profile, name) for name in measured}
    outside = np.zeros(len(facts), bool)
    for name, values in measured.items():
        array, (low, _, high) = np.asarray(values), known[name]
        outside |= (array < low * (1 - SIZE_MARGIN)) | (array > high * (1 + SIZE_MARGIN))
    n = int(outside.sum())
    if not _are_most(n, len(facts)):
        return None
    here = {name: Range.of(values) for name, values in measured.items()}
    text = f"{_of(n, len(facts))} {'is' if n == 1 else 'are'} of another size or shape than the training images: "
    text += f"{_size_text(here)} pixels, in training {_size_text(known)}."
    return Notice("size", n, len(facts), text, {"images": here, "training": known})


def _of_format(profile: Profile, facts: Sequence[ImageFacts]) -> Notice | None:
    stored = [one.encoding for one in facts if one.encoding]
    n = sum(one not in profile.encodings for one in stored)
    if not stored or not profile.encodings or not _are_most(n, len(stored)):
        return None
    here = sorted(set(stored) - set(profile.encodings))
    text = f"{_of(n, len(stored))} {'is' if n == 1 else 'are'} stored as {' or '.join(here)}, "
    text += f"the training images as {' or '.join(profile.encodings)}."
    details = {"images": {"encodings": here}, "training": {"encodings": list(profile.encodings)}}
    return Notice("format", n, len(stored), text, details)


def _of_grey(
    kind: str, known: Range, values: Sequence[float], text_of: Callable[[str, bool, bool], str]
) -> Notice | None:
    array = np.asarray(values)
    below: npt.NDArray[np.bool_] = array < known.low - GREY_MARGIN
    above: npt.NDArray[np.bool_] = array > known.high + GREY_MARGIN
    n, here = int((below | above).sum()), Range.of(values)
    if not _are_most(n, len(array)):
        return None
    text = text_of(_of(n, len(array)), bool(below.any()), bool(above.any()))
    text += f" {_span(here)} of 255, in training {_span(known)}."
    return Notice(kind, n, len(array), text, {"images": {kind: here}, "training": {kind: known}})


def _brightness_text(which: str, below: bool, above: bool) -> str:
    how = " or ".join(word for word, holds in (("darker", below), ("brighter", above)) if holds)
    return f"{which} {'is' if which.endswith('image') else 'are'} {how} than the training images: mean grey value"


def _contrast_text(which: str, below: bool, above: bool) -> str:
    how = " or ".join(word for word, holds in (("less", below), ("more", above)) if holds)
    verb = "has" if which.endswith("image") else "have"
    return f"{which} {verb} {how} contrast than the training images: middle half of the grey values spans"


def _are_most(n: int, n_images: int) -> bool:
    return n >= MOST * n_images


def _of(n: int, n_images: int) -> str:
    return "This image" if n_images == 1 else f"{n:,} of {n_images:,} images"


def _size_text(ranges: Mapping[str, Range]) -> str:
    return " x ".join(_span(ranges[name]) for name in ("width", "height"))


def _span(values: Range) -> str:
    low, high = f"{values.low:.0f}", f"{values.high:.0f}"
    return low if low == high else f"{low}-{high}"
