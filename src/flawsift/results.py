"""Results on disk: tables that a person can read and edit, everything needed to repeat them, and heatmaps."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.calibration import Calibration, Threshold
from flawsift.consensus import MAX_REJECTED, rejected_patches
from flawsift.detector import Prediction
from flawsift.errors import InputError
from flawsift.files import ensure_folder, write_bytes, write_csv, write_json
from flawsift.images import Ids, ImageSet, name_some, show
from flawsift.metrics import GroundTruth
from flawsift.overlays import Scale, save_overlay
from flawsift.screening import Screening

CSV, JSON, MAPS = "screening.csv", "screening.json", "maps.npy"
YES = frozenset({"1", "true", "yes"})  # what counts as kept in an edited table
NO = frozenset({"0", "false", "no", ""})


@dataclass(frozen=True, eq=False)
class SavedScreening:
    """What stage 2 needs of a screening read from disk.

    Attributes:
        folder: Where it was read from.
        kept: {relative path as shown: whether it goes on to stage 2}, unreadable images left out.
        held_out: {relative path as shown: mean raw score of the sub-models that had not seen the image}.
        rejected: {relative path as shown: (h, w) bool}, patches that stage 2 does not learn from.
        content: screening.json.
    """

    folder: Path
    kept: Mapping[str, bool]
    held_out: Mapping[str, float]
    rejected: Mapping[str, npt.NDArray[np.bool_]]
    content: Mapping[str, Any]

    def match(self, images: ImageSet) -> tuple[ImageSet, npt.NDArray[np.float64]]:
        """The kept images of a set, less their rejected patches, and their (m,) held-out scores.

        An image that stage 1 had removed and a person has kept is good: it keeps all its patches.

        Raises:
            InputError: Kept images are missing from the set.
        """
        by_name = {show(name): int(i) for i, name in zip(images.ids, images.names, strict=True)}
        wanted = [name for name, kept in self.kept.items() if kept]
        if missing := [name for name in wanted if name not in by_name]:
            raise InputError(
                f"{len(missing)} images kept by the screening '{show(self.folder)}' are not in the folder: "
                f"{name_some(missing)}. Screen the folder again."
            )
        if not wanted:
            raise InputError(f"The screening '{show(self.folder)}' keeps no image.")
        ids = np.array([by_name[name] for name in wanted], dtype=np.int64)
        rejected = {
            i: self.rejected[name] for i, name in zip(ids.tolist(), wanted, strict=True) if name in self.rejected
        }
        rejected = {i: mask for i, mask in rejected.items() if mask.mean() <= MAX_REJECTED}
        return images.select(ids).without_patches(rejected), np.array([self.held_out[name] for name in wanted])


def save_screening(screening: Screening, folder: str | Path) -> Path:
    """Write screening.csv, screening.json and maps.npy; each file is whole or absent."""
    folder = ensure_folder(folder)
    if screening.grids is not None:
        buffer = io.BytesIO()
        np.save(buffer, screening.grids, allow_pickle=False)
        write_bytes(folder / MAPS, buffer.getvalue())
    write_json(folder / JSON, describe(screening))
    write_csv(folder / CSV, *_table(screening))
    return folder


def describe(screening: Screening) -> dict[str, Any]:
    """Everything but the per-image numbers, ready for JSON."""
    estimate = screening.contamination
    return {
        "n_images": len(screening.ids),
        "n_kept": len(screening.kept),
        "n_unreadable": len(screening.unreadable),
        "options": dict(screening.options),
        "contamination": None
        if estimate is None
        else {"alpha_hat": estimate.alpha_hat, "method": estimate.method, "evidence": dict(estimate.evidence)},
        **screening.provenance,
        "unreadable": {show(name): reason for name, reason in screening.unreadable.items()},
    }


def _table(screening: Screening) -> tuple[list[str], list[list[object]]]:
    n_models = len(screening.score_matrix)
    header = ["id", "path", "subset", *(f"score_{m}" for m in range(n_models)), "held_out_score", "divergence"]
    header += ["consensus", "kept", "error"]
    spread = screening.divergence
    rows: list[list[object]] = []
    for p, (id_, kept) in enumerate(zip(screening.ids, screening.is_kept, strict=True)):
        scores = [f"{s:.7g}" for s in screening.score_matrix[:, p]]
        subset = ";".join(str(s) for s in screening.subset_of[:, p])
        row = [int(id_), screening.names[p], subset, *scores, f"{screening.held_out_scores[p]:.9g}"]
        row += ["" if spread is None else f"{spread[p]:.9g}", f"{screening.consensus[p]:.9g}", int(kept), ""]
        rows.append(row)
    blank = [""] * (n_models + 3)
    rows += [["", name, "", *blank, 0, reason] for name, reason in screening.unreadable.items()]
    return header, rows


def load_screening(folder: str | Path) -> SavedScreening:
    """Read a screening folder, with the `kept` column as a person may have edited it.

    Raises:
        InputError: A file is missing or damaged, or a cell of `kept` is neither yes nor no.
    """
    folder = Path(folder)
    where = show(folder)
    try:
        rows = list(csv.DictReader(io.StringIO((folder / CSV).read_text("utf-8-sig"))))
        content = json.loads((folder / JSON).read_text("utf-8"))
        good = [row for row in rows if not row["error"]]
        held_out = {row["path"]: float(row["held_out_score"]) for row in good}
        kept = {row["path"]: _truth(row["kept"]) for row in good}
        z = content["options"]["reject_patches"]
        masks = rejected_patches(np.load(folder / MAPS, allow_pickle=False), z) if z > 0 else ()
        rejected = {row["path"]: mask for row, mask in zip(good, masks, strict=True)} if z > 0 else {}
    except OSError as error:
        raise InputError(f"'{where}' is not a screening folder: {error.strerror} ({error.filename}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The screening in '{show(folder)}' is damaged: {error!r}. Screen the folder again."
        ) from error
    return SavedScreening(folder, kept, held_out, rejected, content)


def _truth(cell: str) -> bool:
    lowered = cell.strip().lower()
    if lowered not in YES | NO:
        raise ValueError(f"kept must be 1 or 0, got '{cell}'")
    return lowered in YES


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of a folder.

    Attributes:
        ids: (N,) global ids of all images.
        names: (N,) relative paths.
        scores: (N,) raw scores, nan for unreadable images.
        errors: {id: reason} of unreadable images.
        threshold: In force, or None where the model has no calibration.
    """

    ids: Ids
    names: tuple[str, ...]
    scores: npt.NDArray[np.float64]
    errors: Mapping[int, str]
    threshold: Threshold | None

    @property
    def is_anomalous(self) -> npt.NDArray[np.bool_] | None:
        """(N,) scores above the threshold; False for unreadable images, which say nothing."""
        return None if self.threshold is None else self.scores > self.threshold.value


def write_predictions(predictions: Predictions, folder: str | Path, truth: GroundTruth | None = None) -> Path:
    """Write predictions.csv: path, score, is_anomalous, error, and label and defect_type where they are known."""
    flagged = predictions.is_anomalous
    known = {} if truth is None else dict(zip(truth.ids.tolist(), truth.labels.tolist(), strict=True))
    types = {} if truth is None else dict(zip(truth.ids.tolist(), truth.defect_types, strict=True))
    header = ["path", "score", "is_anomalous", "error", *(["label", "defect_type"] if truth is not None else [])]
    rows: list[list[object]] = []
    for p, (id_, name) in enumerate(zip(predictions.ids.tolist(), predictions.names, strict=True)):
        error = predictions.errors.get(id_, "")
        score = "" if error else f"{predictions.scores[p]:.9g}"
        verdict: object = "" if error or flagged is None else int(flagged[p])
        rows.append([name, score, verdict, error, *([known[id_], types[id_]] if truth is not None else [])])
    path = ensure_folder(folder) / "predictions.csv"
    write_csv(path, header, rows)
    return path


@dataclass(frozen=True, eq=False)
class OverlayWriter:
    """Writes a heatmap overlay per image as the predictions come, `folder/<relative path>.png`.

    Smoothing lowers a map's peak below the image score; the map is scaled back to it, so that a line around what lies
    above the threshold is drawn exactly on the images that are called anomalous.

    Attributes:
        folder: Where overlays go, in the sub-folders of the images.
        calibration: Anchors the colours to the model, so that they mean the same on every image.
        threshold: In force, or None.
    """

    folder: Path
    calibration: Calibration
    threshold: Threshold | None

    def __call__(self, images: ImageSet, prediction: Prediction) -> None:
        scores = self.calibration.scores if len(self.calibration.scores) else prediction.scores
        scale = Scale.of(scores, None if self.threshold is None else self.threshold.value)
        assert prediction.maps is not None
        for id_, name, score, found in zip(images.ids, images.names, prediction.scores, prediction.maps, strict=True):
            peak = float(found.max())
            drawn = found * (float(score) / peak) if peak > 0 else found
            save_overlay(self.folder / f"{name}.png", images.image(int(id_)), drawn, scale)
