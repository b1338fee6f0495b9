"""Does the assumption hold that normal patches vary less than anomalous ones? Distances, matches, and a warning.

Every method here that learns from contaminated data, FUN-AD above all, rests on it: pairs of normal patches are nearer
to each other than pairs with an anomalous one, and mutually nearest patches are of one class. Identical defects that
recur break it. With labels that is measured; without, one sign of it can be seen (`Recurrence`).

Letters: N vectors of C channels, P patches per image, R reference images.

Reference: Im et al. (FUN-AD), WACV 2025, arXiv 2411.16110, the analysis of pairwise distances and mutual matches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flawsift.data.folders import read_joined
from flawsift.data.images import ImageSet
from flawsift.data.joins import images_named
from flawsift.data.truth import GroundTruth
from flawsift.detectors.parts.neighbors import NearestNeighbors
from flawsift.detectors.parts.scaling import channel_statistics, standardized
from flawsift.errors import InputError
from flawsift.files import ensure_folder, write_json, write_text
from flawsift.metrics.ranking import image_auroc
from flawsift.paths import name_some, show
from flawsift.reports.pages import css_ramp, template
from flawsift.reports.pairs import (
    ANOMALY_ANOMALY,
    NORMAL_ANOMALY,
    NORMAL_NORMAL,
    Matching,
    chance_below,
    histogram,
    matching,
    pair_distances,
)
from flawsift.reports.recurrence import Recurrence, find_recurrence, reference_distances
from flawsift.types import Floats

PAGE, DATA = "diagnose.html", "diagnostics.json"
KS = (1, 2, 5)  # neighbours for the matches
PATCHES = 16  # per image, at random: enough for the statistics of 10 images, few enough that no image dominates
WORST_SHARE = 0.01  # of an anomalous image's patches that count as anomalous when there is no mask, one at least
MAX_IMAGES = 500  # more are drawn from; the cost is images x references
RARE_SHARE = 0.1  # of them that the rarer class has, if there are as many: two images tell little of their class
MAX_REFERENCES = 64  # a defect in 5 % of the images is in three of them
MIN_IMAGES = 4  # with fewer, "most images" means nothing

WIDTH, HEIGHT = 720.0, 220.0  # of the drawing, in its own units
MAX_NAMED = 24  # files that the page names; the JSON has all


LIMITS = (
    "A group of look-alikes may be a defect that recurs, but also a rare variant of good parts, a label or a fixture "
    "in some of the pictures, or copies of one file: look at the images named.",
    "A defect in more than half of the images counts as normal, and is not seen.",
    "A defect that the features do not tell from good texture is not seen.",
    "No warning is no proof: that defects vary more than good patches can only be measured with labels (--labels).",
)


@dataclass(frozen=True)
class Diagnosis:
    """What distances, matches and look-alikes of a set of patches say about the assumption.

    Attributes:
        counts: How many images and vectors of which kind.
        distances: {kind of pair: (Q,) distances}.
        matching: For each k, among all vectors.
        matching_across: The same, with vectors of one image no neighbours of each other; empty if each has its own.
        recurrence: The sign that needs no labels.
        nearest_auroc: How well the distance to the nearest vector of another image tells anomalous from normal; None
            without labels.
        warnings: Why the assumption looks violated; empty if it does not.
        twins: Names of images with an unusual patch that is close to another image.
    """

    counts: Mapping[str, int]
    distances: Mapping[str, Floats]
    matching: Sequence[Matching]
    matching_across: Sequence[Matching]
    recurrence: Recurrence
    nearest_auroc: float | None
    warnings: Sequence[str]
    twins: Sequence[str] = field(default=())

    @property
    def order(self) -> dict[str, float]:
        """The chance that a pair of one kind is nearer than one of another, by "first < second"."""
        kinds = [kind for kind in (NORMAL_NORMAL, ANOMALY_ANOMALY, NORMAL_ANOMALY) if kind in self.distances]
        pairs = [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :]]
        return {f"{a} < {b}": chance_below(self.distances[a], self.distances[b]) for a, b in pairs}

    def as_json(self) -> dict[str, Any]:
        """All but the raw distances, ready for JSON."""
        edges, densities = histogram(self.distances)
        return {
            "warnings": list(self.warnings),
            "counts": dict(self.counts),
            "distances": {kind: _summary(values) for kind, values in self.distances.items()},
            "histogram": {"edges": edges.tolist(), **{kind: d.tolist() for kind, d in densities.items()}},
            "order": self.order,
            "nearest_auroc": self.nearest_auroc,
            "matching": [asdict(m) for m in self.matching],
            "matching_across_images": [asdict(m) for m in self.matching_across],
            "recurrence": {
                "n_unusual": len(self.recurrence.unusual),
                "n_twins": len(self.recurrence.twins),
                "fence": self.recurrence.fence,
                "ordinary": self.recurrence.ordinary,
                "twins": list(self.twins),
            },
            "cannot_say": list(LIMITS),
        }


def diagnose(data: ImageSet, layer: str = "stride16", *, truth: GroundTruth | None = None, seed: int = 0) -> Diagnosis:
    """Look at the patches of a set of images.

    Vectors are some patches of each image at random, standardised per channel. With labels, anomalous ones are patches
    under the mask; of an image without a mask, those that are farthest from the normal images.

    Args:
        data: Images with features attached; of more than 500, as many are drawn. With labels the rarer class is
            drawn as often as it occurs, but a tenth of the time at least.
        layer: Whose features are looked at.
        truth: Labels, and masks where they are known, of all these images.
        seed: Of all draws.

    Raises:
        InputError: Fewer than 4 images, or, with labels, fewer than 2 of a class.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(data) < MIN_IMAGES:
        raise InputError(f"A diagnosis needs at least {MIN_IMAGES} images, got {len(data)}.")
    labels = None if truth is None else torch.from_numpy(truth.select(data.ids).labels).bool()
    if labels is not None and (few := min(int(labels.sum()), int((~labels).sum()))) < 2:
        raise InputError(f"Labels must name at least 2 normal and 2 anomalous images, one class has {few}.")
    drawn = _draw(len(data), labels, generator)
    data, labels = data.select(data.ids[drawn.numpy()]), None if labels is None else labels[drawn]
    statistics = channel_statistics(data, (layer,))[layer]
    features = [standardized(batch.features[layer], statistics) for batch in data.batches((layer,))]
    patches = torch.cat(features).flatten(2).transpose(1, 2).contiguous()  # (N, P, C)
    grid = features[0].shape[2:]
    references = torch.randperm(len(data), generator=generator)[:MAX_REFERENCES]
    recurrence = find_recurrence(*reference_distances(patches, references))
    chosen, flags = _choose(data, patches, grid, labels, truth, generator)
    owners, vectors = chosen[:, 0], patches[chosen[:, 0], chosen[:, 1]]
    diagnosis = examine(vectors, flags, owners=owners, recurrence=recurrence, seed=seed)
    counts = {"images": len(data), **({} if labels is None else {"anomalous images": int(labels.sum())})}
    names = [data.names[i] for i in recurrence.twins]
    return replace(diagnosis, counts={**counts, **diagnosis.counts}, twins=names)


def examine(
    vectors: Tensor,
    labels: Tensor | None = None,
    *,
    owners: Tensor | None = None,
    recurrence: Recurrence | None = None,
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> Diagnosis:
    """The diagnosis of vectors, whatever they are of.

    Args:
        vectors: (N, C).
        labels: (N,) True, or 1, for anomalous; None if they are not known.
        owners: (N,) image of each; None if each has its own. Pairs and nearest neighbours are across images.
        recurrence: If it was found from more than these vectors; else its positions are those of vectors.
        ks: Neighbours for the matches.
        seed: Of the draw of pairs.

    Raises:
        InputError: The vectors are of fewer than 2 images, or, with labels, of one class only.
    """
    own = torch.arange(len(vectors)) if owners is None else owners
    if (n_images := len(torch.unique(own))) < 2:
        raise InputError(f"A diagnosis compares vectors of at least 2 images, got {n_images}.")
    labels = None if labels is None else labels.bool()
    if recurrence is None:
        everything = torch.arange(len(vectors))
        recurrence = find_recurrence(*reference_distances(vectors.unsqueeze(1), everything, owners=own))
    distances = pair_distances(vectors, labels, owners=own, seed=seed)
    auroc = None
    if labels is not None:
        to_nearest, _ = NearestNeighbors(vectors, owners=own).query(vectors, owners=own)
        auroc = image_auroc(to_nearest[:, 0].numpy(), labels.numpy().astype(np.int8))
    across = [] if owners is None else [matching(vectors, labels, k=k, owners=own) for k in ks]
    counts = {"vectors": len(vectors), **({} if labels is None else {"anomalous vectors": int(labels.sum())})}
    plain = [matching(vectors, labels, k=k) for k in ks]
    warnings = _warnings(distances, auroc, recurrence)
    return Diagnosis(counts, distances, plain, across, recurrence, auroc, warnings)


def read_labels(path: str | Path, images: ImageSet) -> GroundTruth:
    """Labels from a CSV file with the columns `file` (or `path`) and `label` (0 is normal, 1 anomalous).

    Returns:
        The truth of the images that it names; others have no label.

    Raises:
        InputError: The file is missing, lacks a column, has another label or two for one image, or names images that
            are not there.
    """
    read = [(file, label.strip()) for file, label in read_joined(path, "Labels file", "label")]
    labels = dict(read)
    if twice := sorted({file for file, label in read if labels[file] != label}):
        raise InputError(f"{len(twice)} files have two labels in '{show(path)}': {name_some(twice)}.")
    if wrong := {label for label in labels.values() if label not in ("0", "1")}:
        raise InputError(f"Labels in '{show(path)}' must be 0 or 1, got {name_some(sorted(wrong))}.")
    name_of = images_named(labels, images.names, "labels", quiet=True)
    if unknown := sorted(set(labels) - set(name_of)):
        raise InputError(
            f"{len(unknown)} labelled files are not among the images: {name_some(unknown)}. "
            f"Write paths in '{show(path)}' relative to the image folder."
        )
    labels = {name_of[file]: label for file, label in labels.items()}
    ids = dict(zip(images.names, images.ids.tolist(), strict=True))
    flags = [int(label) for label in labels.values()]
    types = tuple("defect" if flag else "good" for flag in flags)
    return GroundTruth(np.array([ids[n] for n in labels], np.int64), np.array(flags, np.int8), types, {})


def write_diagnosis(diagnosis: Diagnosis, folder: str | Path) -> Path:
    """Write `folder/diagnose.html`, which needs nothing but a browser, and `folder/diagnostics.json`.

    Raises:
        OutputError: They cannot be written.
    """
    folder = ensure_folder(folder)
    write_json(folder / DATA, diagnosis.as_json())
    write_text(folder / PAGE, diagnosis_page(diagnosis))
    return folder / PAGE


def diagnosis_page(diagnosis: Diagnosis) -> str:
    """The diagnosis as one self-contained HTML page."""
    twins, labelled = diagnosis.twins, diagnosis.nearest_auroc is not None
    return template(PAGE).render(
        title="Diagnosis",
        headline=_headline(bool(diagnosis.warnings), labelled),
        explanation=f"{', '.join(f'{count:,} {name}' for name, count in diagnosis.counts.items())} compared.",
        next_step=_next_step(bool(twins), labelled),
        sections=[(name, name.capitalize()) for name in ("recurrence", "limits", "distances", "matches")],
        ramp=css_ramp(),
        plot=_plot(diagnosis.distances),
        width=WIDTH,
        height=HEIGHT,
        twins=[show(name) for name in twins[:MAX_NAMED]],
        n_more=max(0, len(twins) - MAX_NAMED),
        tables=[("all vectors", diagnosis.matching), ("vectors of different images only", diagnosis.matching_across)],
        labelled=labelled,
        **diagnosis.as_json(),
    )


def _headline(warned: bool, labelled: bool) -> str:
    """The result in a sentence."""
    if warned:
        return "Defects may look like each other here, and be learned as normal."
    if labelled:
        return "Anomalous patches vary more than normal ones, as methods for contaminated sets assume."
    return "No sign that defects recur. Without labels that is all that can be said."


def _next_step(recurs: bool, labelled: bool) -> str:
    """What a person does with the result."""
    if recurs:
        return "look at the images that are named below, and set those aside that have a defect."
    return "rank the images and train." if labelled else "rank the images and train; labels of some would say more."


def _plot(distances: Mapping[str, Floats]) -> dict[str, Any]:
    """Outlines of the histograms in a box of WIDTH x HEIGHT units, and the ticks of the x axis."""
    edges, densities = histogram(distances)
    top = max(float(d.max()) for d in densities.values())
    x = WIDTH * (edges - edges[0]) / (edges[-1] - edges[0])
    curves = {}
    for kind, density in densities.items():
        y = HEIGHT * (1 - density / top)
        steps = [(px, py) for left, right, py in zip(x[:-1], x[1:], y, strict=True) for px in (left, right)]
        points = [(0.0, HEIGHT), *steps, (WIDTH, HEIGHT)]
        curves[kind] = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    ticks = [(float(px), f"{value:.3g}") for px, value in zip(x[::8], edges[::8], strict=True)]
    return {"curves": curves, "ticks": ticks}


def _draw(n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Positions, ascending, of at most MAX_IMAGES of n images; a rarer class is not thinned out below RARE_SHARE."""
    order = torch.randperm(n, generator=generator)
    if labels is not None and n > MAX_IMAGES:
        rare = (labels if 2 * int(labels.sum()) <= n else ~labels)[order]
        n_rare = int(rare.sum())
        kept = max(round(MAX_IMAGES * n_rare / n), min(n_rare, round(RARE_SHARE * MAX_IMAGES)))
        order = torch.cat([order[rare][:kept], order[~rare][: MAX_IMAGES - kept]])
    return order[:MAX_IMAGES].sort().values


def _choose(
    data: ImageSet,
    patches: Tensor,
    grid: Sequence[int],
    labels: Tensor | None,
    truth: GroundTruth | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """(M, 2) image and patch of each vector, and (M,) whether it is anomalous."""
    n, p, _ = patches.shape
    if labels is None or truth is None:
        drawn = [torch.randperm(p, generator=generator)[:PATCHES] for _ in range(n)]
        return torch.cat([_of_image(i, d) for i, d in enumerate(drawn)]), None
    normal = (~labels).nonzero()[:, 0]
    references = normal[torch.randperm(len(normal), generator=generator)[:MAX_REFERENCES]]
    _, to_median = reference_distances(patches, references)
    chosen, flags = [], []
    for i, id_ in enumerate(data.ids.tolist()):
        order = torch.randperm(p, generator=generator)
        if labels[i]:
            mask = truth.mask(id_, (int(grid[0]), int(grid[1])))
            inside = None if mask is None else torch.from_numpy(mask.reshape(-1))
            worst = to_median[i].argsort(descending=True)[: max(1, int(WORST_SHARE * p))]
            order = worst if inside is None or not inside.any() else order[inside[order]]
        chosen.append(_of_image(i, order[:PATCHES]))
        flags.append(torch.full((len(chosen[-1]),), bool(labels[i])))
    return torch.cat(chosen), torch.cat(flags)


def _of_image(image: int, places: Tensor) -> Tensor:
    return torch.stack([torch.full_like(places, image), places], dim=1)


def _warnings(distances: Mapping[str, Floats], auroc: float | None, recurrence: Recurrence) -> list[str]:
    warnings = []
    if NORMAL_NORMAL in distances and ANOMALY_ANOMALY in distances:
        normal, anomalous = distances[NORMAL_NORMAL].mean(), distances[ANOMALY_ANOMALY].mean()
        if anomalous < normal:
            warnings.append(
                f"Anomalous patches vary less than normal ones: their mean distance is {anomalous:.3g} against "
                f"{normal:.3g}. Methods that treat patches with near neighbours as normal will treat them as normal."
            )
    if auroc is not None and auroc < 0.5:
        warnings.append(
            f"Anomalous patches have nearer neighbours than normal ones (AUROC {auroc:.2f} of the distance to the "
            "nearest): pseudo-labels from such distances are the wrong way round."
        )
    if recurrence.suspicious:
        warnings.append(
            f"{len(recurrence.twins)} of {len(recurrence.unusual)} unusual images have a patch that is far from most "
            "images, yet closer to another image than ordinary patches are: a defect that recurs, perhaps. Set such "
            "images aside before training a method that learns from distances."
        )
    return warnings


def _summary(values: Floats) -> dict[str, float]:
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = {f"q{100 * q:.0f}": float(v) for q, v in zip(levels, np.quantile(values, levels), strict=True)}
    return {"mean": float(values.mean()), "sd": float(values.std()), **quantiles}
