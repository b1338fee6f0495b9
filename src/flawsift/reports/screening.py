"""Stage 1 and a fit as one HTML page that needs nothing but a browser: who was set aside, why, and what to do next."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.detectors.parts.maps import to_image_grid
from flawsift.errors import InputError
from flawsift.files import ensure_folder, write_text
from flawsift.models.model import Model
from flawsift.paths import name_some, show
from flawsift.reports.histogram import Histogram
from flawsift.reports.overlays import Scale, overlay, shrink
from flawsift.reports.pages import css_ramp, data_uri, flat, number, plural, template
from flawsift.screening.consensus import MIN_KEEP, SUSPECT, own_mask
from flawsift.screening.lookalikes import most_alike
from flawsift.screening.result import Screening

NAME = "report.html"
TITLE, FIT_TITLE = "Screening report", "Fit report"
THUMB = 320  # pixels: sharp at half a phone's width
SMALL = 160  # pixels, of pictures for comparison: a third of a card
N_ALIKE = 3  # typical images beside each suspect
MAP_SIZE = 64  # pixels; just fine enough for the smoothing's sigma of 1, and cheap for thousands of maps
SCALE_SAMPLE = 500  # kept maps, evenly spaced, that the colours rest on: enough for a 99 % quantile
TOP_SHARE = 0.1  # a sub-model suspects at least this share of the images, however few were set aside
MAX_UNREADABLE = 200  # rows; the table of the screening has all


@dataclass(frozen=True)
class Card:
    """One image as the page shows it.

    Attributes:
        rank: 1 is the most anomalous.
        name: Relative path, printable.
        kept: Whether it goes on to stage 2.
        consensus, held_out: Scores as text.
        votes: Sub-models that suspect the image on their own.
        picture, heatmap: Data URIs; "" where there is none.
        alike: (name, data URI) of the typical images that look most like it.
        place: Where its map is highest, in words.
        problem: Why there is no picture.
    """

    rank: int
    name: str
    kept: bool
    consensus: str
    held_out: str
    votes: int
    picture: str = ""
    heatmap: str = ""
    place: str = ""
    problem: str = ""
    alike: Sequence[tuple[str, str]] = ()


def write_screening_report(screening: Screening, images: ImageSet, folder: str | Path) -> Path:
    """Write `folder/report.html` in one step.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
        OutputError: It cannot be written.
    """
    path = ensure_folder(folder) / NAME
    write_text(path, screening_report(screening, images))
    return path


def write_fit_report(model: Model, screening: Screening, images: ImageSet, folder: str | Path) -> Path:
    """Write `folder/report.html` of a model: its screening, as decided, and its threshold.

    Args:
        model: Trained on what the screening kept.
        screening: With the decisions of a person, and without rejected patches where the model learns them all.
        images: Where its pictures are read from.
        folder: Where the page goes.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
        OutputError: It cannot be written.
    """
    path = ensure_folder(folder) / NAME
    write_text(path, screening_report(screening, images, title=FIT_TITLE, model=model))
    return path


def screening_report(
    screening: Screening,
    images: ImageSet,
    *,
    n_suspects: int = 24,
    n_borderline: int = 8,
    title: str = TITLE,
    model: Model | None = None,
) -> str:
    """Stage 1 as one self-contained HTML page.

    Args:
        screening: From `flawsift.screening.stage1.screen` or `flawsift.pipeline.screen`.
        images: Where its pictures are read from; one that has vanished since is named without a picture.
        n_suspects: How many of the highest-ranked images are shown.
        n_borderline: How many around the cut are shown, half of them on each side.
        title: Of the page.
        model: Trained on what was kept; described with its threshold.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
    """
    cards = _Cards(screening, _matching(images, screening))
    unreadable = [(show(name), show(reason)) for name, reason in screening.unreadable.items()]
    sections = [("scores", "Scores"), ("suspects", "Suspects"), ("borderline", "Borderline")]
    sections += [("model", "Model")] if model else []
    sections += [("unreadable", "Unreadable"), ("details", "Parameters"), ("next", "What to do next")]
    settings = {
        "options": screening.options.as_json(),
        **screening.provenance,
        **({"training": model.training} if model else {}),
    }
    return template(NAME).render(
        title=title,
        headline=headline(screening),
        explanation=explanation(screening),
        sections=sections,
        counts={"removed": len(screening.removed), "kept": len(screening.kept)},
        **histogram_of(screening),
        model=_model(model, screening) if model else None,
        **_pictured(screening, cards, n_suspects, n_borderline),
        voters=cards.voters,
        top_share=cards.top_share,
        has_maps=cards.scale is not None,
        ramp=css_ramp(),
        unreadable=unreadable[:MAX_UNREADABLE],
        n_unreadable=len(unreadable),
        details=list(flat(settings)),
        normalize=screening.options.normalize,
    )


def histogram_of(screening: Screening) -> dict[str, Any]:
    """The drawing of the consensus scores and the texts that go with it."""
    drawn = Histogram.of(screening.consensus, screening.is_kept)
    cut_text, text = "cut", headline(screening)
    if screening.contamination is not None:
        cut_text += f" (estimated share of defective images: {screening.contamination.text})"
    if drawn.cut is not None:
        text += " All images left of the cut were kept, all right of it set aside."
    return {"histogram": drawn, "cut_text": cut_text, "histogram_text": text}


def _model(model: Model, screening: Screening) -> dict[str, Any]:
    """What the page says of a trained model."""
    threshold = model.threshold()
    trained = f"{len(screening.kept):,} of {len(screening.ids):,} images"
    if partly := model.training.get("n_partly"):
        trained += f" and the ordinary patches of {partly:,} more"
    text = f"{type(model.detector).__name__} was trained on {trained}"
    if counts := model.training.get("decisions"):
        text += f"; a person decided to keep {counts['keep']:,} and to remove {counts['remove']:,}"
    if threshold is None:
        return {"text": f"{text}. There is no threshold: one image gives no held-out scores.", "histogram": None}
    text += (
        f". Images that score above {number(threshold.value)} are called anomalous: "
        f"about {threshold.per_hundred:.2g} false alarms per 100 good parts are expected."
    )
    # the scores of stage 1 are the model's own where it had the same detector; else there are none of removed images
    own, kept = model.calibration.scores, screening.held_out_scores[screening.is_kept]
    shared = len(own) == len(kept) and np.allclose(np.sort(own), np.sort(kept), rtol=1e-4)
    if shared:
        drawn = Histogram.of(screening.held_out_scores, screening.is_kept, cut=threshold.value)
    else:
        drawn = Histogram.of(own, np.ones(len(own), bool), cut=threshold.value, sides=("trained on", ""))
    cut_text = f"threshold {number(threshold.value)}"
    return {"text": text, "histogram": drawn, "cut_text": cut_text, "has_removed": shared}


def _matching(images: ImageSet, screening: Screening) -> ImageSet:
    """The screening's view of a set; a folder that was listed anew may have other images under the same ids."""
    view = images.select(screening.ids)
    if other := [a for a, b in zip(view.names, screening.names, strict=True) if show(a) != show(b)]:
        raise InputError(
            f"{len(other)} ids of the screening belong to other images in this set: {name_some(other)}. "
            "Give the set that was screened."
        )
    return view


def _pictured(screening: Screening, cards: "_Cards", n_suspects: int, n_borderline: int) -> dict[str, Any]:
    """The images that are shown: the highest-ranked, and those on both sides of the cut."""
    ranking, removed = screening.ranking.tolist(), screening.removed.tolist()
    out = set(removed)
    kept = [i for i in ranking if i not in out] if out else []
    half = n_borderline // 2
    return {
        "suspects": [cards.compared(i) for i in ranking[:n_suspects]],
        # a line between the two only where all above it were set aside and all below it kept
        "cut_after": len(removed) if ranking[: len(removed)] == removed else 0,
        "last_removed": [cards.of(i) for i in removed[max(0, len(removed) - half) :]],
        "first_kept": [cards.of(i) for i in kept[: n_borderline - half]],
    }


def headline(screening: Screening) -> str:
    """The result in one sentence or two."""
    n, n_kept, n_bad = len(screening.ids), len(screening.kept), len(screening.unreadable)
    n_removed = n - n_kept
    start = f"Of {n:,} {plural(n, 'image')}, "
    end = f"{n_kept:,} {'was' if n_kept == 1 else 'were'} kept."
    if not n_removed:
        text = f"{start}none was set aside; all were kept." if n > 1 else "The only image was kept."
    elif screening.contamination is None:
        text = f"{start}the {n_removed:,} most unusual {'was' if n_removed == 1 else 'were'} set aside; {end}"
    else:
        looks = "looks defective and was" if n_removed == 1 else "look defective and were"
        text = f"{start}{n_removed:,} {looks} set aside; {end}"
    return text + (f" {n_bad:,} {plural(n_bad, 'file')} could not be read." if n_bad else "")


def contamination_text(screening: Screening) -> str:
    """Where the share that was set aside comes from."""
    found = screening.contamination
    if found is None:
        kept = screening.keep_share  # whatever a person has decided since
        if kept == 1:
            return "To keep all images was set by the user, so the share of defective ones was not estimated."
        share = 100 * (1 - kept)
        return (
            f"The share to set aside ({share:.0f}\u00a0%) was set by the user, not estimated from the images: "
            "it says nothing about how many are defective."
        )
    if found.method.startswith("none"):
        return f"The share of defective images could not be estimated ({found.method.removeprefix('none: ')})."
    if found.alpha_hat <= 0:
        return (
            "No more images score high than would in a set of good images. "
            "Defects that look ordinary can still be among the highest-ranked."
        )
    text = f"Estimated share of defective images, by the {found.method}: {found.text}. "
    if found.alpha_hat >= 1 - MIN_KEEP - 1e-9:
        return text + "This is the largest share that the estimate can give; the true one may be higher."
    return text + "The estimate errs on the low side when defects score like good images."


def explanation(screening: Screening) -> str:
    """What stands below the headline: the estimate, and what stage 2 leaves out."""
    return f"{contamination_text(screening)} {selection_text(screening)}".strip()


def selection_text(screening: Screening) -> str:
    """What stage 2 leaves out of the kept images; empty when it is nothing, unless a person has decided so."""
    if screening.rejected is None:
        return ""
    if screening.overruled_by_reviewer:
        return "Most of the images that were set aside are kept by decision, so all patches of kept images are learned."
    if not screening.rejected.any():
        return ""
    share = 100 * float(screening.rejected[screening.is_kept].mean())
    text = f"Of the kept images, the {share:.1f} % of the patches that look least like the others are suspect,"
    text += " and left out of training, except where a detector judges its patches itself."
    if screening.contamination is None:
        return text
    text += f" Images more than {SUSPECT:g} robust deviations above the median score were set aside."
    if screening.is_partly_learned.any():
        text += " A detector that leaves out patches learns only the most ordinary ones of these."
    return text


class _Cards:
    """Makes cards by global id; each image is read once."""

    def __init__(self, screening: Screening, images: ImageSet) -> None:
        self.screening, self.images = screening, images
        self.position = {i: p for p, i in enumerate(screening.ids.tolist())}
        self.rank = {i: r for r, i in enumerate(screening.ranking.tolist(), 1)}
        self.kept = screening.is_kept
        self.votes, self.voters, self.top_share = agreement(screening)
        self.scale = map_scale(screening)
        self._made: dict[int, Card] = {}
        self._small: dict[int, str] = {}

    def of(self, id_: int) -> Card:
        if id_ not in self._made:
            self._made[id_] = self._make(id_)
        return self._made[id_]

    def compared(self, id_: int) -> Card:
        """With the typical images that look most like it, as far as they can be read."""
        s = self.screening
        if s.descriptions is None:
            return self.of(id_)
        near = most_alike(s.descriptions, self.position[id_], typical(s), N_ALIKE)
        pictures = [(show(s.names[p]), self._small_picture(int(s.ids[p]))) for p in near]
        return replace(self.of(id_), alike=[(name, picture) for name, picture in pictures if picture])

    def _small_picture(self, id_: int) -> str:
        if id_ not in self._small:
            try:
                self._small[id_] = data_uri(shrink(self.images.image(id_), SMALL))
            except UnreadableImage:
                self._small[id_] = ""
        return self._small[id_]

    def _make(self, id_: int) -> Card:
        p = self.position[id_]
        s = self.screening
        picture = heatmap = problem = ""
        try:
            image = self.images.image(id_)
            picture = data_uri(shrink(image, THUMB))
            heatmap = self._heatmap(image, p)
        except UnreadableImage as error:
            problem = show(str(error))
        return Card(
            rank=self.rank[id_],
            name=show(s.names[p]),
            kept=bool(self.kept[p]),
            consensus=number(s.consensus[p]),
            held_out=number(s.held_out_scores[p]),
            votes=int(self.votes[p]),
            picture=picture,
            heatmap=heatmap,
            place=place_of(s.patch_maps[p]) if s.patch_maps is not None else "",
            problem=problem,
        )

    def _heatmap(self, image: Image.Image, p: int) -> str:
        if self.screening.patch_maps is None or self.scale is None:
            return ""
        # full chroma resolution: the contour is one pixel wide
        return data_uri(
            overlay(image, shown_map(self.screening.patch_maps[p]), self.scale, max_edge=THUMB), subsampling=0
        )


def shown_map(grid: npt.NDArray[np.float16]) -> Tensor:
    """A map (h, w) of the screening as it is drawn: smoothed, (MAP_SIZE, MAP_SIZE)."""
    clean = torch.from_numpy(np.nan_to_num(grid.astype(np.float32)))
    return to_image_grid(clean.unsqueeze(0), MAP_SIZE)[0]


def typical(screening: Screening) -> npt.NDArray[np.bool_]:
    """(N,) the more ordinary half of the kept images: what to compare a suspect with.

    Of all kept images the nearest to a defective one would often be one with the same defect that was missed.
    """
    kept = screening.is_kept
    if not kept.any():
        return kept
    ordinary: npt.NDArray[np.bool_] = kept & (screening.consensus <= np.median(screening.consensus[kept]))
    return ordinary


def agreement(screening: Screening) -> tuple[npt.NDArray[np.int64], int, float]:
    """How many sub-models suspect an image on their own, those that trained on it left out.

    A sub-model suspects an image that is in the top share of all images that it did not train on. The share is the one
    that was set aside, and 10 % at least. An image that ties with others is in the top only if all of them are.

    Returns:
        (N,) votes, the number of voters of each image, the top share.
    """
    if screening.submodels is None:
        return np.zeros(len(screening.ids), np.int64), 0, 0.0
    scores, (n_partitions, n) = screening.submodels.score_matrix, screening.submodels.subset_of.shape
    own = own_mask(screening.submodels.subset_of, len(scores) // n_partitions)
    if own.all(0).any():  # a single subset: nobody is held out, so everybody votes
        own = np.zeros_like(own)
    share = max(TOP_SHARE, 1 - len(screening.kept) / n)
    votes = np.zeros(n, np.int64)
    for row, mine in zip(scores, own, strict=True):
        others = np.sort(row[~mine])
        at_or_above = len(others) - np.searchsorted(others, row, "left")
        votes += ~mine & (at_or_above <= max(1, round(share * len(others))))
    return votes, int((~own).sum(0).max()), share


def map_scale(screening: Screening) -> Scale | None:
    """Colours anchored to the kept images; None without maps.

    Transparent up to the median of the kept images' peaks, outlined from the 99 % quantile on: of the smoothed maps,
    as they are shown, since smoothing lowers a peak.
    """
    if screening.patch_maps is None:
        return None
    kept = screening.patch_maps[screening.is_kept]
    sample = kept[:: max(1, len(kept) // SCALE_SAMPLE)]
    maps = to_image_grid(torch.from_numpy(np.nan_to_num(sample.astype(np.float32))), MAP_SIZE)
    return Scale.of(maps.amax((1, 2)).numpy(), None)


def place_of(grid: npt.NDArray[np.float16]) -> str:
    """Where a map is highest, for those who cannot see it."""
    h, w = grid.shape
    row, column = divmod(int(np.nan_to_num(grid.astype(np.float32), nan=-np.inf).argmax()), w)
    return f"highest {100 * (column + 0.5) / w:.0f} % from the left and {100 * (row + 0.5) / h:.0f} % from the top"
