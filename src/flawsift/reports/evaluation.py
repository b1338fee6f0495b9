"""How a model did on labelled images, as one HTML page: metrics, scores by truth, and the errors to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Prediction
from flawsift.files import ensure_folder, write_text
from flawsift.models import model as models
from flawsift.models.predictions import Predictions
from flawsift.paths import show
from flawsift.reports.heatmaps import Shown
from flawsift.reports.histogram import Histogram
from flawsift.reports.overlays import Scale
from flawsift.reports.pages import REPORT, css_ramp, flat, number, template, unreadable_files
from flawsift.reports.predictions import scaled_map
from flawsift.reports.regions import outlines_of_prediction
from flawsift.types import Floats

N_WORST = 12  # of each kind of error: a screen or two
SECTIONS = (
    ("missed", "Missed defects"),
    ("false-alarms", "False alarms"),
    ("metrics", "Metrics"),
    ("scores", "Scores"),
    ("unreadable", "Unreadable"),
    ("details", "Parameters"),
    ("glossary", "Words"),
)
METRICS = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "aupro": "AUPRO",
    "false_alarms_per_100": "False alarms per 100 good",
    "missed_per_100": "Missed per 100 defective",
    "hits_per_100": "Hottest place in the mask, per 100 found",
}


@dataclass(frozen=True)
class EvaluationCard:
    """One test image as the page shows it: texts, and pictures where it can be read."""

    name: str
    truth: str
    verdict: str
    is_wrong: bool  # on the wrong side of the threshold
    score: str
    shown: Shown | None = None
    problem: str = ""


def write_evaluation_report(
    model: models.Model,
    metrics: Mapping[str, Any],
    predictions: Predictions,
    images: ImageSet,
    truth: GroundTruth,
    folder: str | Path,
    *,
    device: str = "auto",
) -> Path:
    """Write `folder/report.html` in one step.

    Args:
        model: That made the predictions; it scores the few images that are shown again, for their maps.
        metrics: From `flawsift.models.model.evaluate`, as `predictions`.
        predictions: Of all test images.
        images: The test images.
        truth: Their labels.
        folder: Where the page goes.
        device: Where the detector runs.

    Raises:
        OutputError: It cannot be written.
    """
    images = images.within(model.value_range)
    readable = np.isfinite(predictions.scores)
    ids, scores = predictions.ids[readable], predictions.scores[readable]
    truth = truth.select(ids)
    defective = truth.labels == 1
    cut = _cut(predictions)
    highest_good = ids[~defective][np.argsort(-scores[~defective], kind="stable")][:N_WORST]
    lowest_defective = ids[defective][np.argsort(scores[defective], kind="stable")][:N_WORST]
    cards = _cards(model, predictions, images, truth, [*highest_good.tolist(), *lowest_defective.tolist()], device)
    alarms, missed = metrics["false_alarms_per_100"], metrics["missed_per_100"]
    names = dict(zip(predictions.ids.tolist(), predictions.names, strict=True))
    path = ensure_folder(folder) / REPORT
    page = template("evaluation.html").render(
        title="Evaluation report",
        headline=headline(metrics),
        explanation="Labels were used for these metrics only, not for training." + _overlap(metrics),
        warning=None if predictions.threshold is None else predictions.threshold.warning,
        next_step=_next_step(metrics, warned=predictions.threshold is not None and bool(predictions.threshold.warning)),
        sections=SECTIONS,
        metrics=[(label, "-" if metrics.get(key) is None else f"{metrics[key]:.4g}") for key, label in METRICS.items()],
        histogram=Histogram.of(scores, ~defective, cut=cut, sides=("good", "defective")),
        histogram_text=headline(metrics),
        types=_types(truth, scores, cut),
        threshold="" if cut is None else number(cut),
        groups=[
            _group("missed", "Missed defects", "defective", [cards[i] for i in lowest_defective.tolist()], missed),
            _group("false-alarms", "False alarms", "good", [cards[i] for i in highest_good.tolist()], alarms),
        ],
        has_maps=any(card.shown and card.shown.heatmap for card in cards.values()),
        ramp=css_ramp(),
        **unreadable_files((names[i], reason) for i, reason in predictions.errors.items()),
        details=list(flat(_settings(model, predictions))),
    )
    write_text(path, page)
    return path


def _cut(predictions: Predictions) -> float | None:
    """The score above which an image was called anomalous."""
    return None if predictions.threshold is None else predictions.threshold.value


def _settings(model: models.Model, predictions: Predictions) -> dict[str, Any]:
    """What the page lists of the model."""
    return {
        "detector": {"name": model.detector.name, "params": model.detector.params()},
        "backbone": {"spec": model.backbone.spec, "weights_digest": model.backbone.weights_digest},
        "threshold": {} if predictions.threshold is None else vars(predictions.threshold),
        "training": model.training,
    }


def headline(metrics: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    n, n_defective = metrics["n_images"], metrics["n_anomalous"]
    text = f"{n:,} test images, {n_defective:,} of them defective."
    alarms, missed = metrics["false_alarms_per_100"], metrics["missed_per_100"]
    if alarms is not None and missed is not None:
        text += (
            f" At the model's threshold {alarms:.3g} of 100 good parts are stopped, {missed:.3g} of 100 defective pass."
        )
    return text


def _next_step(metrics: Mapping[str, Any], *, warned: bool) -> str:
    """What a person does with the result."""
    alarms, missed = metrics["false_alarms_per_100"], metrics["missed_per_100"]
    if alarms is None and missed is None:
        return "train on more images: the model has no threshold, so it stops no part."
    if missed and warned:
        return (
            "decide on the most unusual training images (flawsift review MODEL) and train again: the threshold may "
            "be too high (see above)."
        )
    if missed:
        return "look at the missed defects below. Where the heatmap does not show the defect, try a larger --size."
    if alarms:
        return "look at the false alarms below. If there are too many, train with more good images."
    return "no error was found. Look at the images that came closest, and try more of them."


def _overlap(metrics: Mapping[str, Any]) -> str:
    """What is said where test images were trained on."""
    n = metrics.get("n_trained_on")
    return f" The model was trained on {n:,} of these images: on new ones it is worse." if n else ""


def _types(truth: GroundTruth, scores: Floats, cut: float | None) -> list[tuple[str, int, str, str]]:
    """(kind, images, median score, share above the threshold) of each kind of image."""
    kinds = np.array(truth.defect_types, dtype=object)
    rows = []
    for kind in dict.fromkeys(truth.defect_types):
        of_kind = scores[kinds == kind]
        share = "" if cut is None else f"{100 * float((of_kind > cut).mean()):.0f} %"
        rows.append((show(kind), len(of_kind), number(float(np.median(of_kind))), share))
    return rows


def _group(
    id_: str, title: str, kind: str, cards: Sequence[EvaluationCard], per_hundred: float | None
) -> dict[str, Any]:
    """The errors of one kind; without any, the images that came closest."""
    wrong = [card for card in cards if card.is_wrong]
    most = "highest-scoring good" if kind == "good" else "lowest-scoring defective"
    if not cards:
        text = f"There are no {kind} images."
    elif per_hundred is None:
        text = f"The model has no threshold. The {most} images:"
    elif wrong:
        text, cards = f"The {most} images on the wrong side of the threshold, the worst first:", wrong
    else:
        text = f"None. The {most} images came closest:"
    return {"id": id_, "title": title, "text": text, "cards": cards}


def _cards(
    model: models.Model,
    predictions: Predictions,
    images: ImageSet,
    truth: GroundTruth,
    ids: Sequence[int],
    device: str,
) -> dict[int, EvaluationCard]:
    """Cards by id, with maps from a second prediction of these few images."""
    maps: dict[int, npt.NDArray[np.float32]] = {}

    def take(part: ImageSet, prediction: Prediction) -> None:
        assert prediction.maps is not None
        for id_, score, map_ in zip(part.ids.tolist(), prediction.scores, prediction.maps, strict=True):
            maps[id_] = scaled_map(map_, float(score))

    chosen = images.select(ids)
    if len(chosen):
        models.predict(model, chosen, device=device, on_maps=take)
    cut = _cut(predictions)
    sample = model.calibration.scores if len(model.calibration.scores) else predictions.scores
    scale = Scale.of(sample, cut)
    score_of = dict(zip(predictions.ids.tolist(), predictions.scores.tolist(), strict=True))
    truth_of = dict(zip(truth.ids.tolist(), zip(truth.labels.tolist(), truth.defect_types, strict=True), strict=True))
    cards = {}
    for id_, name in zip(chosen.ids.tolist(), chosen.names, strict=True):
        label, kind = truth_of[id_]
        stopped = None if cut is None else score_of[id_] > cut
        cards[id_] = EvaluationCard(
            name=show(name),
            truth=show(kind),
            verdict="no threshold" if stopped is None else "stopped" if stopped else "passed",
            is_wrong=stopped is not None and stopped != bool(label),
            score=number(score_of[id_]),
            **_pictures(chosen, id_, maps.get(id_), scale, score_of[id_], cut),
        )
    return cards


def _pictures(
    images: ImageSet, id_: int, map_: npt.NDArray[np.float32] | None, scale: Scale, score: float, cut: float | None
) -> dict[str, Any]:
    try:
        image = images.image(id_)
    except UnreadableImage as error:
        return {"problem": show(str(error))}
    outlines = [] if map_ is None else outlines_of_prediction(map_, score, cut, image.size)
    return {"shown": Shown.of(image, map_, scale, outlines)}
