"""Stage 1 and a fit as one HTML page that needs nothing but a browser: what was set aside, why, and what to do next."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flawsift.data.images import ImageSet
from flawsift.errors import InputError
from flawsift.files import ensure_folder, write_text
from flawsift.models.model import Model
from flawsift.paths import name_some, show
from flawsift.reports.cards import ScreeningCards
from flawsift.reports.histogram import Histogram
from flawsift.reports.pages import REPORT, css_ramp, flat, number, template, unreadable_files
from flawsift.reports.wording import caveat, explanation, headline, next_step
from flawsift.screening.result import Screening


def write_screening_report(screening: Screening, images: ImageSet, folder: str | Path) -> Path:
    """Write `folder/report.html` in one step.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
        OutputError: It cannot be written.
    """
    path = ensure_folder(folder) / REPORT
    write_text(path, screening_report(screening, images))
    return path


def write_fit_report(model: Model, screening: Screening, images: ImageSet, folder: str | Path) -> Path:
    """Write `folder/report.html` of a model: its screening, as decided, and its threshold.

    Args:
        model: Trained on what the screening kept.
        screening: With the decisions of a person.
        images: Where its pictures are read from.
        folder: Where the page goes.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
        OutputError: It cannot be written.
    """
    detector = model.detector
    leaves_out = detector.leaves_out_patches and not screening.learned_whole_by(detector)
    shown = screening if leaves_out else replace(screening, rejected=None)
    path = ensure_folder(folder) / REPORT
    write_text(path, screening_report(shown, images, model=model))
    return path


def screening_report(
    screening: Screening, images: ImageSet, *, n_suspects: int = 24, n_borderline: int = 8, model: Model | None = None
) -> str:
    """Stage 1 as one self-contained HTML page.

    Args:
        screening: From `flawsift.screening.stage1.screen` or `flawsift.pipeline.screen`.
        images: Where its pictures are read from; one that has vanished since is named without a picture.
        n_suspects: How many of the highest-ranked images are shown.
        n_borderline: How many around the cut are shown, half of them on each side.
        model: Trained on what was kept; described with its threshold.

    Raises:
        InputError: An id of the screening is not in the set, or is another image there.
    """
    cards = ScreeningCards(screening, _matching(images, screening))
    sections = [("suspects", "Suspects"), ("borderline", "Borderline"), ("next", "What to do next")]
    sections += [("model", "Model")] if model else []
    sections += [("scores", "Numbers"), ("unreadable", "Unreadable"), ("details", "Parameters"), ("glossary", "Words")]
    trained = _trained_model(model, screening) if model else None
    settings = {"options": screening.options.as_json(), **screening.provenance}
    settings |= {"training": model.training} if model else {}
    return template(REPORT).render(
        title="Fit report" if model else "Screening report",
        headline=_cost(model) if model else headline(screening),
        explanation=headline(screening) if model else "",
        caveat="" if trained and trained["warning"] else caveat(screening),  # the warning says the same of the model
        next_step=next_step(screening),
        numbers=explanation(screening),
        sections=sections,
        n_removed=len(screening.removed),
        **consensus_histogram(screening),
        model=trained,
        **_pictured(screening, cards, n_suspects, n_borderline),
        voters=cards.voters,
        top_share=cards.top_share,
        has_maps=cards.scale is not None,
        has_evidence=screening.evidence is not None,
        ramp=css_ramp(),
        **unreadable_files(screening.unreadable.items()),
        details=list(flat(settings)),
        normalize=screening.options.normalize if cards.voters else "",
    )


def consensus_histogram(screening: Screening) -> dict[str, Any]:
    """The drawing of the consensus scores and the texts that go with it."""
    drawn = Histogram.of(screening.consensus, screening.is_kept)
    cut_text, text = "cut", headline(screening)
    if screening.contamination is not None:
        cut_text += f" (estimated share of defective images: {screening.contamination.text})"
    if drawn.cut is not None:
        text += " All images left of the cut were kept, all right of it set aside."
    return {"histogram": drawn, "cut_text": cut_text, "histogram_text": text}


def _cost(model: Model) -> str:
    """What the threshold of a model costs, in a sentence or two."""
    threshold = model.threshold()
    if threshold is None:
        return "The model ranks parts and stops none: there were too few images for a threshold."
    stopped = f"Parts that score above {number(threshold.value)} are stopped"
    return f"{stopped}: do not rely on it yet." if threshold.warning else f"{stopped}: {threshold.promise}."


def _trained_model(model: Model, screening: Screening) -> dict[str, Any]:
    """What the page says of a trained model: a sentence, and where its threshold lies among the held-out scores."""
    threshold = model.threshold()
    trained = f"{len(screening.kept):,} of {len(screening.ids):,} images"
    if partly := model.training.get("n_partly"):
        some = "the ordinary patches of " if model.training["rejected_patches"] else ""
        trained += f" and {some}{partly:,} more"
        trained += "" if some else ", which were set aside"
    text = f"{type(model.detector).__name__} was trained on {trained}"
    if counts := model.training.get("decisions"):
        text += f"; a person decided to keep {counts['keep']:,} and to remove {counts['remove']:,}"
    if threshold is None:
        return {
            "text": f"{text}. There is no threshold: one image or group gives no held-out scores.",
            "warning": None,
            "histogram": None,
        }
    text += f". Images that score above {number(threshold.value)} are stopped: {threshold.promise}."
    # the scores of stage 1 are the model's own where it had the same detector; else there are none of removed images
    own, kept = model.calibration.scores, screening.held_out_scores[screening.is_kept]
    shared = len(own) == len(kept) and np.allclose(np.sort(own), np.sort(kept), rtol=1e-4)
    if shared:
        drawn = Histogram.of(screening.held_out_scores, screening.is_kept, cut=threshold.value)
    else:
        drawn = Histogram.of(own, np.ones(len(own), bool), cut=threshold.value, sides=("trained on", ""))
    cut_text = f"threshold {number(threshold.value)}"
    return {
        "text": text,
        "warning": model.calibration.warning,
        "histogram": drawn,
        "cut_text": cut_text,
        "has_removed": shared,
    }


def _matching(images: ImageSet, screening: Screening) -> ImageSet:
    """The screening's view of a set; a folder that was listed anew may have other images under the same ids."""
    view = images.select(screening.ids)
    if other := [a for a, b in zip(view.names, screening.names, strict=True) if show(a) != show(b)]:
        raise InputError(
            f"{len(other)} ids of the screening belong to other images in this set: {name_some(other)}. "
            "Give the set that was screened."
        )
    return view


def _pictured(screening: Screening, cards: ScreeningCards, n_suspects: int, n_borderline: int) -> dict[str, Any]:
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
