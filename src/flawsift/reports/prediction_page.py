"""Predictions as one HTML page: the flagged images with their heatmaps, then all others, ranked."""

import base64
import hashlib
import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.listing import MAPS
from flawsift.detectors.base import Prediction
from flawsift.files import ensure_folder, write_text
from flawsift.models.calibration import Calibration, Threshold
from flawsift.models.predictions import ImagePrediction, Predictions
from flawsift.paths import safe_name, show
from flawsift.reports.heatmaps import Shown
from flawsift.reports.histogram import Histogram
from flawsift.reports.overlays import Scale
from flawsift.reports.pages import REPORT, css_ramp, number, plural, template, unreadable_files
from flawsift.reports.predictions import PNG, scaled_map
from flawsift.reports.regions import outlines_of_prediction

EDGE = 240  # pixels of a picture's long edge: two beside each other in a card
N_HIGHEST = 24  # pictured though not flagged, where fewer are: a screen or two
MAX_BYTES = 10_000_000  # of all pictures: with a row for each of 5,000 images a page stays below 15 MB


@dataclass(eq=False)
class HighestPictures:
    """Keeps pictures of the highest-scoring images as the predictions come: for `on_maps` of `Model.predict`.

    All that are flagged, and `N_HIGHEST` where fewer are, as long as they fit into `max_bytes`.

    Attributes:
        calibration: Anchors the colours to the model, so that they mean the same on every image.
        threshold: In force, or None.
        max_bytes: Of all pictures.
    """

    calibration: Calibration
    threshold: Threshold | None
    max_bytes: int = MAX_BYTES
    _heap: list[tuple[float, int, Shown]] = field(default_factory=list, init=False)  # the lowest score first
    _n_bytes: int = field(default=0, init=False)
    _out_of_reach: float = field(default=-math.inf, init=False)  # the highest score that did not fit

    def __call__(self, images: ImageSet, prediction: Prediction) -> None:
        """Look at a piece."""
        assert prediction.maps is not None
        scores = self.calibration.scores if len(self.calibration.scores) else prediction.scores
        scale = Scale.of(scores, None if self.threshold is None else self.threshold.value)
        for id_, score, map_ in zip(images.ids.tolist(), prediction.scores.tolist(), prediction.maps, strict=True):
            if self._belongs(score):
                try:
                    picture = self._pictured(images.image(id_), scaled_map(map_, score), scale, score)
                except UnreadableImage:  # it has vanished since it was scored
                    continue
                heapq.heappush(self._heap, (score, id_, picture))
                self._n_bytes += picture.n_bytes
                self._drop_lowest()

    @property
    def by_id(self) -> dict[int, Shown]:
        """The pictures."""
        return {id_: picture for _, id_, picture in self._heap}

    def _flagged(self, score: float) -> bool:
        return self.threshold is not None and score > self.threshold.value

    def _belongs(self, score: float) -> bool:
        if score <= self._out_of_reach:
            return False
        return self._flagged(score) or len(self._heap) < N_HIGHEST or score > self._heap[0][0]

    def _drop_lowest(self) -> None:
        while self._heap:
            too_large = self._n_bytes > self.max_bytes
            if not too_large and (len(self._heap) <= N_HIGHEST or self._flagged(self._heap[0][0])):
                return
            score, _, picture = heapq.heappop(self._heap)
            self._n_bytes -= picture.n_bytes
            if too_large:
                self._out_of_reach = max(self._out_of_reach, score)

    def _pictured(self, image: Image.Image, map_: npt.NDArray[np.float32], scale: Scale, score: float) -> Shown:
        cut = None if self.threshold is None else self.threshold.value
        return Shown.of(image, map_, scale, outlines_of_prediction(map_, score, cut, image.size), edge=EDGE)


@dataclass(frozen=True)
class Row:
    """An image as the page lists it; texts that are "" where nothing is known.

    Attributes:
        rank: 1 is the most anomalous.
        name: Relative path, printable.
        flagged: Whether it is called anomalous.
        verdict, score, p_value: What is said of it.
        heatmap: Address of its heatmap, relative to the page.
        shown: In pictures; None where only the row is.
    """

    rank: int
    name: str
    flagged: bool
    verdict: str
    score: str
    p_value: str
    heatmap: str
    shown: Shown | None


def write_prediction_report(
    predictions: Predictions, pictures: HighestPictures, folder: str | Path, *, heatmaps: Iterable[int] = ()
) -> Path:
    """Write `folder/report.html` in one step.

    Args:
        predictions: A row each.
        pictures: That have seen all of them.
        folder: Where the page goes.
        heatmaps: Ids of images whose heatmaps `OverlayWriter` has written beside it: their rows lead there.

    Raises:
        OutputError: It cannot be written.
    """
    path = ensure_folder(folder) / REPORT
    write_text(path, prediction_page(predictions, pictures, heatmaps=heatmaps))
    return path


def prediction_page(predictions: Predictions, pictures: HighestPictures, *, heatmaps: Iterable[int] = ()) -> str:
    """The page; see `write_prediction_report`."""
    drawn, shown = set(heatmaps), pictures.by_id
    order = np.argsort(-predictions.scores, kind="stable")
    readable = [one for one in (predictions[int(p)] for p in order) if one.error is None]
    rows = [_row(rank, one, shown.get(one.id), has_heatmap=one.id in drawn) for rank, one in enumerate(readable, 1)]
    n_flagged, threshold = sum(row.flagged for row in rows), predictions.threshold
    scores = np.array([one.score for one in readable])
    cut = None if threshold is None else threshold.value
    calm = np.ones(len(scores), bool) if cut is None else scores <= cut
    names = dict(zip(predictions.ids.tolist(), predictions.names, strict=True))
    script = (files("flawsift.reports") / "templates" / "filter.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return template("predictions.html").render(
        title="Prediction report",
        headline=_headline(len(predictions), n_flagged, threshold),
        explanation="",
        next_step=_next_step(n_flagged),
        warning=None if threshold is None else threshold.warning,
        notices=[show(str(notice)) for notice in predictions.notices],
        sections=[("images", "Images"), ("numbers", "Numbers"), ("unreadable", "Unreadable"), ("glossary", "Words")],
        n_flagged=n_flagged,
        pictured=[row for row in rows if row.shown is not None],
        rows=[row for row in rows if row.shown is None],
        threshold="" if cut is None else number(cut),
        threshold_text="There is no threshold." if threshold is None else f"{str(threshold).capitalize()}.",
        histogram=Histogram.of(scores, calm, cut=cut, sides=("normal", "flagged") if n_flagged else ("images", "")),
        ramp=css_ramp(),
        script=script,
        script_hash=f"sha256-{digest}",
        **unreadable_files((names[i], reason) for i, reason in predictions.errors.items()),
    )


def _row(rank: int, one: ImagePrediction, shown: Shown | None, *, has_heatmap: bool) -> Row:
    return Row(
        rank=rank,
        name=show(one.name),
        flagged=bool(one.is_anomalous),
        verdict=one.verdict,
        score=number(one.score),
        p_value="" if one.p_value is None else f"{one.p_value:.3g}",
        # a name that is no UTF-8 has no address
        heatmap=quote(f"{MAPS}/{safe_name(one.name, PNG)}", errors="replace") if has_heatmap else "",
        shown=shown,
    )


def _headline(n: int, n_flagged: int, threshold: Threshold | None) -> str:
    """The result in a sentence."""
    if threshold is None:
        return f"{n:,} {plural(n, 'image')} ranked. There is no threshold, so none is called defective."
    if not n_flagged:
        return f"Of {n:,} {plural(n, 'image')}, none looks defective."
    return f"Of {n:,} {plural(n, 'image')}, {n_flagged:,} {'looks' if n_flagged == 1 else 'look'} defective."


def _next_step(n_flagged: int) -> str:
    """What a person does with the result."""
    if n_flagged:
        return "look at the flagged images below, the most unusual first, and check these parts."
    return "look at the first images below: they are the most unusual ones."
