"""A threshold from labelled images: misses and false alarms are measured there, where else they are expected."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from flawsift.data.images import ImageSet
from flawsift.data.inputs import Images, as_images
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError, ParameterError
from flawsift.models.calibration import Calibration, Threshold, missed_shares, n_needed, of_hundred
from flawsift.models.model import Model, content_digests
from flawsift.models.predictions import Predictions
from flawsift.models.record import LABELLED
from flawsift.paths import name_some, show
from flawsift.progress import ProgressOption
from flawsift.screening.decisions import located
from flawsift.types import Floats, Ids

LABEL_OF = {"keep": 0, "remove": 1}  # what a reviewer decided; unsure is no label


@dataclass(frozen=True, eq=False, repr=False)
class Recalibration:
    """A model with a threshold from labelled images.

    Attributes:
        model: With the new threshold.
        before: The threshold that it had, if any.
        predictions: Of the labelled images that it was not trained on, by the new threshold; unreadable ones too.
        truth: (n + m) labels of those that could be read.
        trained_on: Names of labelled images that were left out, since the model was trained on them.
        notes: What a person should know of it, a sentence each.
    """

    model: Model
    before: Threshold | None
    predictions: Predictions
    truth: GroundTruth
    trained_on: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def scores(self) -> Floats:
        """(n + m) scores, in the order of `truth`."""
        return self.predictions.scores[np.isfinite(self.predictions.scores)]

    @property
    def threshold(self) -> Threshold:
        """The new threshold."""
        threshold = self.model.threshold()
        assert threshold is not None  # there are good images
        return threshold

    def at(self, value: float) -> Threshold:
        """What any threshold, such as the one before, does to these images."""
        calibration = self.model.calibration
        j = int(np.searchsorted(calibration.thresholds, value, side="right")) - 1  # the highest of the table up to it
        n = calibration.n_good
        rate = float(calibration.rates[j]) if j >= 0 else 1.0
        low, high = calibration.intervals[j].tolist() if j >= 0 else (float(calibration.intervals[0, 0]), 1.0)
        defective = np.sort(self.scores[self.truth.labels == 1])
        missed, least, most = missed_shares(defective, [value])[0].tolist()
        return Threshold(value, rate, rate, n, (low, high), (missed, least, most), n_defective=len(defective))

    def __repr__(self) -> str:
        return "\n".join([repr(self.model), *self.notes])


# long: both ways to say how strict a threshold is to be, and where it runs
def recalibrate(
    model: Model,
    images: Images,
    truth: GroundTruth,
    *,
    false_alarm_rate: float | None = None,
    misses: float | None = None,
    device: str = "auto",
    progress: ProgressOption = None,
) -> Recalibration:
    """Set a model's threshold from labelled images; what it learned stays.

    Images that the model was trained on are left out: they score low because they were learned.

    Args:
        model: Any; it stays as it is.
        images: As for `Model.predict`; those without a label are left out.
        truth: Labels by global id. Masks are not looked at.
        false_alarm_rate: The share of good parts that may be stopped; None takes the model's.
        misses: In its place, the share of defects that may be missed, see `Calibration.rate_for_misses`.
        device: Where the detector runs.
        progress: As for `Model.predict`.

    Raises:
        InputError: No image has a label, or among those that can be read and were not learned, none is good or none
            is defective.
        ParameterError: A share is not in (0, 1), or both are given.
    """
    if false_alarm_rate is not None and misses is not None:
        raise ParameterError("Give either false_alarm_rate or misses, not both: each decides on the threshold alone.")
    trial = Calibration.of_labelled([0.0], [1.0])  # a bad share is told now, not after the work
    trial.threshold(model.rate if false_alarm_rate is None else false_alarm_rate)
    trial.rate_for_misses(0.5 if misses is None else misses)
    given = as_images(images)
    labelled = given.select(given.ids[np.isin(given.ids, truth.ids)])
    if not len(truth):
        raise InputError("No image is labelled: nothing says of any whether it is good or defective.")
    if not len(labelled):
        raise InputError(
            f"None of the {len(truth):,} labels is of one of these {len(given):,} images. "
            "Give labelled images, and the labels of these."
        )
    digests = content_digests(labelled.within(model.value_range))
    learned = model.trained_on(digests)
    copies = _copies(labelled, truth, digests)
    new = labelled.select(labelled.ids[~np.isin(labelled.ids, [*learned.tolist(), *copies])])
    _require_both_kinds(truth.select(new.ids), n_learned=len(learned), n_unreadable=0)
    predictions = model.predict(new, device=device, progress=progress)
    used = truth.select(predictions.ids[np.isfinite(predictions.scores)])
    _require_both_kinds(used, n_learned=len(learned), n_unreadable=len(predictions.errors))
    scores = predictions.scores[np.isfinite(predictions.scores)]
    calibration = Calibration.of_labelled(scores[used.labels == 0], scores[used.labels == 1])
    rate = model.rate if false_alarm_rate is None else false_alarm_rate
    rate = rate if misses is None else calibration.rate_for_misses(misses)
    record = {
        "n_good": calibration.n_good,
        "n_defective": calibration.n_defective,
        "digest": _digest(used, digests),
        "date": datetime.now(UTC).date().isoformat(),
        **({} if misses is None else {"misses": misses}),
    }
    made = replace(
        model, calibration=calibration, training={**model.training, "false_alarm_rate": rate, LABELLED: record}
    )
    names = tuple(labelled.select(learned).names)
    notes = [*_notes_on_images(given, labelled, new, model, names), *_notes_on_threshold(made, misses)]
    notes += [f"{len(copies):,} labelled images are copies of others, and count once."] if copies else []
    if n_bad := len(predictions.errors):
        notes.append(f"{n_bad:,} labelled images cannot be read, and were left out.")
    predictions = replace(predictions, threshold=made.threshold(), calibration=calibration)
    return Recalibration(made, model.threshold(), predictions, used, names, tuple(notes))


def reviewed_truth(images: ImageSet, choices: Mapping[str, str]) -> GroundTruth:
    """Labels from what a person decided: "keep" is good, "remove" defective, "unsure" no label.

    Args:
        images: That were reviewed.
        choices: {relative path as shown: decision}, from `flawsift.screening.decisions.read_decisions`.

    Raises:
        InputError: No decision is about one of these images.
    """
    id_of = {show(name): id_ for id_, name in zip(images.ids.tolist(), images.names, strict=True)}
    choices = located(choices, images.names)
    decided = {id_of[n]: LABEL_OF[c] for n, c in choices.items() if n in id_of and c in LABEL_OF}
    ids: Ids = np.array(sorted(decided), np.int64)
    labels = np.array([decided[i] for i in ids.tolist()], np.int8)
    return GroundTruth(ids, labels, tuple("defect" if label else "good" for label in labels), {})


def _copies(labelled: ImageSet, truth: GroundTruth, digests: Mapping[int, str]) -> list[int]:
    """Ids of images whose content an earlier one has: they are no further evidence.

    Raises:
        InputError: They have different labels.
    """
    label_of = dict(zip(truth.ids.tolist(), truth.labels.tolist(), strict=True))
    first_of: dict[str, int] = {}
    copies = [i for i, digest in digests.items() if first_of.setdefault(digest, i) != i]
    if wrong := [i for i in copies if label_of[i] != label_of[first_of[digests[i]]]]:
        named = (f"{labelled.source.name(i)} is {labelled.source.name(first_of[digests[i]])}" for i in wrong)
        which = "1 image is" if len(wrong) == 1 else f"{len(wrong):,} images are"
        raise InputError(f"{which} both good and defective: {name_some(named)}. Decide which.")
    return copies


def _require_both_kinds(truth: GroundTruth, *, n_learned: int, n_unreadable: int) -> None:
    n_defective = int(truth.labels.sum())
    n_good = len(truth) - n_defective
    if n_good and n_defective:
        return
    without = [f"{n_learned:,} that the model was trained on"] if n_learned else []
    without += [f"{n_unreadable:,} that cannot be read"] if n_unreadable else []
    left = f" (without {' and '.join(without)})" if without else ""
    if not len(truth) and n_learned:
        raise InputError(
            f"No labelled image is left{left}: training images say nothing of new ones. Label images that the model "
            "has not seen; what you know of its training images goes into `flawsift fit --decisions`."
        )
    if not len(truth):
        raise InputError(f"No labelled image is left{left}. Check the files.")
    if not n_defective:
        raise InputError(
            f"None of the {n_good:,} labelled images{left} is defective: a labelled set without defects says nothing "
            "of misses. Add defective images, or keep the threshold that `flawsift fit` sets without labels."
        )
    raise InputError(
        f"None of the {n_defective:,} labelled images{left} is good: false alarms are counted on good images. Add "
        "some, in a folder good/ where these are in folders."
    )


def _notes_on_images(
    given: ImageSet, labelled: ImageSet, new: ImageSet, model: Model, learned: tuple[str, ...]
) -> list[str]:
    """What was left out, and what the intervals do not know."""
    notes = []
    if learned:
        notes.append(
            f"{len(learned):,} of {len(labelled):,} labelled images were left out, since the model was trained on "
            f"them: {name_some(learned)}."
        )
    if model.learned is None:
        notes.append(
            "The model does not know its training images, since an earlier version saved it: make sure that none of "
            "them is among these, or fit it again."
        )
    if unlabelled := len(given) - len(labelled):
        notes.append(f"{unlabelled:,} images have no label, and were left out.")
    if (n_groups := len(new.members)) < len(new):
        notes.append(
            f"The {len(new):,} images show {n_groups:,} parts: images of one part are alike, so the true shares lie "
            "outside the intervals more often than in one case of ten."
        )
    return notes


def _notes_on_threshold(made: Model, misses: float | None) -> list[str]:
    """Where the images are too few for what was asked."""
    threshold, calibration = made.threshold(), made.calibration
    assert threshold is not None
    assert threshold.misses is not None
    n, m = calibration.n_good, calibration.n_defective
    missed, _, most = threshold.misses
    if misses is not None and missed > misses:
        return [
            f"No threshold misses so few: even the score of the lowest good image misses {of_hundred(missed)} of 100."
        ]
    if misses is not None and misses * m < 1:
        return [
            f"{m:,} defective images are too few to tell {of_hundred(misses)} of 100 from none: none of them is "
            f"missed, and up to {of_hundred(most)} of 100 others may be."
        ]
    if threshold.limited:
        rate = threshold.false_alarm_rate
        return [
            f"{n:,} good images are too few for a false-alarm rate of {of_hundred(rate)} in 100, which needs "
            f"{n_needed(rate):,}: the threshold is the highest that these support."
        ]
    return []


def _digest(truth: GroundTruth, digests: Mapping[int, str]) -> str:
    """SHA-256 of contents and labels, whatever the images are called."""
    known = zip(truth.ids.tolist(), truth.labels.tolist(), strict=True)
    lines = sorted(f"{digests[i]} {label}" for i, label in known)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
