"""Screenings on disk: a table that a person can read and edit, arrays, and everything needed to repeat them."""

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from flawsift.damage import DAMAGE, json_object
from flawsift.data.images import FileSource, ImageSet
from flawsift.errors import InputError
from flawsift.files import DamagedPart, Parts, new_result, settle, write_bytes, write_json
from flawsift.paths import find_name, name_some, show
from flawsift.screening.consensus import Contamination, keep_lowest
from flawsift.screening.evidence import load_evidence, save_evidence
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening, SubModelScores
from flawsift.screening.seen import alignment_of, as_seen_by, range_of, region_of
from flawsift.screening.table import is_yes, rows_of, safe_path, table_of
from flawsift.tables import write_csv
from flawsift.types import Floats, Ids

CSV, JSON = "screening.csv", "screening.json"
MAPS, REJECTED, DESCRIPTIONS, EVIDENCE = "maps.npy", "rejected.npy", "descriptions.npy", "evidence.npz"
TURNS = "turns.npy"  # of aligned images
ORIGINAL = "screening-original.csv"  # the table as it was written, for that of `CSV` may be edited
FILES = (CSV, JSON, ORIGINAL, MAPS, TURNS, REJECTED, DESCRIPTIONS, EVIDENCE)
ROOT = "images_root"  # in screening.json: the folder that the paths are relative to
log = logging.getLogger("flawsift")
Kind = TypeVar("Kind", bound=np.generic)
Told = TypeVar("Told")


def save_screening(screening: Screening, folder: str | Path) -> Path:
    """Write a screening folder: all of its files are new together, or none is.

    What a screening does not have has no file. An earlier table in which a person has edited what is kept is moved
    aside, not lost.

    Raises:
        OutputError: It cannot be written; the earlier screening is whole.
    """
    folder = Path(folder)
    with new_result(folder, old=FILES, aside=edited_table(folder)) as new:
        write_files(screening, new)
    return folder


def write_files(screening: Screening, folder: Path) -> None:
    """Write what a screening folder holds into an empty folder, of `flawsift.files.new_result`.

    Arrays have the images in the order of their ids, so that a table which a person has sorted still fits them.
    """
    order = np.argsort(screening.ids)
    arrays = {MAPS: screening.patch_maps, TURNS: screening.turns, REJECTED: screening.rejected}
    arrays |= {DESCRIPTIONS: screening.descriptions}
    for name, values in arrays.items():
        if values is not None:
            buffer = io.BytesIO()
            np.save(buffer, values[order], allow_pickle=False)
            write_bytes(folder / name, buffer.getvalue())
    save_evidence(screening.evidence, order, folder / EVIDENCE)
    write_json(folder / JSON, summary_of(screening))
    for name in (CSV, ORIGINAL):
        write_csv(folder / name, *table_of(screening))


def edited_table(folder: Path) -> dict[str, str]:
    """Of a folder where another screening is to be written, what a person has worked in; for `new_result`."""
    return {CSV: "was edited by hand, and another screening takes its place"} if _is_edited(folder) else {}


def _is_edited(folder: Path) -> bool:
    """Whether there is a table that a person has worked in: it keeps others than stage 1 did, or cannot be read now."""
    try:
        rows, content = _read(Parts.of(folder))
        ids = np.array([int(row["id"]) for row in rows], np.int64)
        removed = ids[[not is_yes(row["kept"]) for row in rows]]
        return not np.array_equal(removed, np.sort(_set_aside(rows, content)))
    except OSError:  # there is none
        return False
    except DAMAGE:
        return True


def summary_of(screening: Screening) -> dict[str, Any]:
    """Everything but the per-image numbers, ready for JSON."""
    estimate = screening.contamination
    return {
        "n_images": len(screening.ids),
        "n_kept": len(screening.kept),
        "n_unreadable": len(screening.unreadable),
        "n_groups": screening.n_groups,
        "options": {
            **screening.options.as_json(),
            "seed": screening.seed,
            "keep_share": screening.keep_share,
        },
        "contamination": None if estimate is None else {**vars(estimate), "evidence": dict(estimate.evidence)},
        "set_aside": sorted(set(screening.ids.tolist()) - set(screening.kept_by_itself.tolist())),
        **screening.provenance,
        "unreadable": {show(name): reason for name, reason in screening.unreadable.items()},
    }


def load_screening(folder: str | Path) -> Screening:
    """All of a screening from its folder, with the `kept` column as a person may have edited it, by ascending id.

    Names are as `show` prints them; `images_of` finds their files.

    Raises:
        InputError: A file is missing or damaged, or a cell of `kept` is neither yes nor no.
    """
    screening = _load(Path(folder))
    root = Path(str(screening.provenance.get(ROOT, "")))
    # for pictures in a notebook: those that are gone by then have none
    return replace(screening, images=_files(screening, root)) if root.is_absolute() and root.is_dir() else screening


def _load(folder: Path) -> Screening:
    with _damage_told(folder):
        parts = Parts.of(folder)
        rows, content = _read(parts)
        if not rows:
            raise ValueError("no scored image")
        ids = np.array([int(row["id"]) for row in rows], np.int64)
        is_kept = np.array([is_yes(row["kept"]) for row in rows])
        consensus = np.array([float(row["consensus"]) for row in rows])
        estimate, options = content.pop("contamination"), content["options"]
        if content.get(ROOT) is not None:
            _of_kind(content[ROOT], str)
        # screenings of earlier versions do not name the screener among the options
        options = {"screener": content.get("detector", {}).get("name", "own"), **options}
        seed, keep_share = options.pop("seed"), options.pop("keep_share")
        known = {"options", "unreadable", "n_images", "n_kept", "n_unreadable", "n_groups", "set_aside"}
        has_groups = content.get("n_groups") is not None or "group" in rows[0]  # a column that was lost is damage
        set_aside = _set_aside(rows, content)
        loaded = Screening(
            ids=ids,
            names=[safe_path(row["path"]) for row in rows],
            consensus=consensus,
            held_out_scores=np.array([float(row["held_out_score"]) for row in rows]),
            probability=_probability(rows, np.isin(ids, set_aside)),
            kept=ids[is_kept],
            keep_share=keep_share,
            options=ScreenOptions(**options),
            seed=seed,
            contamination=_estimate(estimate),
            patch_maps=_array(parts, MAPS, len(rows), 3, np.float16),
            turns=_turns(parts, len(rows)),
            rejected=_array(parts, REJECTED, len(rows), 3, np.bool_),
            submodels=_submodels(rows),
            descriptions=_array(parts, DESCRIPTIONS, len(rows), 2, np.float16),
            unreadable={name: str(reason) for name, reason in content["unreadable"].items()},
            evidence=load_evidence(parts.read(EVIDENCE), EVIDENCE, ids) if EVIDENCE in parts else None,
            set_aside=set_aside,
            groups={int(row["id"]): row["group"] for row in rows if row["group"]} if has_groups else {},
            provenance={key: value for key, value in content.items() if key not in known},
        )
        range_of(loaded), region_of(loaded), alignment_of(loaded)  # damage is told now
        return replace(loaded, removed_by_hand=np.setdiff1d(loaded.kept_by_itself, loaded.kept))  # by an edit


def _turns(parts: Parts, n: int) -> npt.NDArray[np.float64] | None:
    turns = _array(parts, TURNS, n, 3, np.float64)
    if turns is not None and not (turns.shape[1:] == (2, 3) and (np.abs(np.linalg.det(turns[:, :, :2])) > 0).all()):
        raise ValueError(f"{TURNS} holds no turns")
    return turns


def _set_aside(rows: list[dict[str, str]], content: Mapping[str, Any]) -> Ids:
    """Ids that stage 1 set aside; screenings of earlier versions set aside the highest, and do not list them."""
    if "set_aside" in content:
        return np.array(content["set_aside"], np.int64)
    ids = np.array([int(row["id"]) for row in rows], np.int64)
    consensus = np.array([float(row["consensus"]) for row in rows])
    return np.setdiff1d(ids, keep_lowest(ids, consensus, content["options"]["keep_share"]))


def _probability(rows: list[dict[str, str]], is_set_aside: npt.NDArray[np.bool_]) -> Floats:
    """(N,) of defects; screenings of earlier versions have none, and say what was set aside only."""
    if "defect_probability" not in rows[0]:
        return is_set_aside.astype(np.float64)
    return np.array([float(row["defect_probability"]) for row in rows])


def _submodels(rows: list[dict[str, str]]) -> SubModelScores | None:
    columns = [c for c in rows[0] if c.startswith("score_")]
    if not columns:
        return None
    divergence = [row["divergence"] for row in rows]
    return SubModelScores(
        subset_of=np.array([[int(s) for s in row["subset"].split(";")] for row in rows], np.int64).T,
        score_matrix=np.array([[float(row[c]) for row in rows] for c in columns], np.float32),
        divergence=np.array([float(d) for d in divergence]) if all(divergence) else None,
    )


def _estimate(saved: Mapping[str, Any] | None) -> Contamination | None:
    """From JSON, which has no tuples; screenings of earlier versions have no interval."""
    if saved is None:
        return None
    ends = saved.get("interval")
    estimate = {**saved, "interval": None if ends is None else (float(ends[0]), float(ends[1]))}
    estimate |= {"alpha_hat": float(saved["alpha_hat"]), "method": _of_kind(saved["method"], str)}
    return Contamination(**{**estimate, "evidence": dict(saved["evidence"])})


def _of_kind(value: Any, kind: type[Told]) -> Told:
    if not isinstance(value, kind):
        raise TypeError(f"{JSON} has {value!r} where it should have {kind.__name__}")
    return value


def images_of(screening: Screening, root: str | Path | None = None) -> ImageSet:
    """The images of a screening read from disk, under its ids and in its groups.

    Args:
        screening: From `load_screening`.
        root: Their folder; None takes the one that the screening was made of.

    Raises:
        InputError: The folder is not known or missing, or has none of the images.
    """
    known = root if root is not None else screening.provenance.get(ROOT)
    if known is None:
        raise InputError("The screening does not say where its images are. Give their folder with --images.")
    folder = Path(known)
    if not folder.is_dir():
        raise InputError(f"Image folder '{show(folder)}' does not exist. Give the images' folder with --images.")
    images = _files(screening, folder)
    source = images.source
    if not any(isinstance(source, FileSource) and source.path(i).exists() for i in images.ids.tolist()):
        n = len(images)
        raise InputError(
            f"None of the {n} images of the screening is in '{show(folder)}'. Give their folder with --images."
        )
    return images


def _files(screening: Screening, folder: Path) -> ImageSet:
    """The files below a folder that a screening names, under its ids."""
    named = zip(screening.ids.tolist(), screening.names, strict=True)
    files = ImageSet.from_files(folder, {id_: find_name(folder, name) for id_, name in named})
    return replace(as_seen_by(screening, files), groups=screening.groups)


def matched(screening: Screening, images: ImageSet) -> Screening:
    """A screening under the ids of another listing of its images, found by name.

    Args:
        screening: Of the same images, from disk or not.
        images: The set to train on. Images that are not kept may be missing; they have negative ids then.

    Raises:
        InputError: Kept images are missing from the set, or there are none.
    """
    by_name = _ids_by_name(images)
    names = [show(name) for name in screening.names]
    wanted = [name for name, kept in zip(names, screening.is_kept, strict=True) if kept]
    if missing := [name for name in wanted if name not in by_name]:
        raise InputError(
            f"{len(missing)} images kept by the screening are not among those to train on: "
            f"{name_some(missing)}. Screen the images again."
        )
    if not wanted:
        raise InputError("The screening keeps no image.")
    ids = np.array([by_name.get(name, -1 - p) for p, name in enumerate(names)], np.int64)
    shown = images if (ids >= 0).all() else None  # pictures would be of nothing where an image is missing
    evidence, new_id = screening.evidence, dict(zip(screening.ids.tolist(), ids.tolist(), strict=True))
    if evidence is not None:
        evidence = evidence.renamed(new_id)
    return replace(
        screening,
        ids=ids,
        kept=ids[screening.is_kept],
        images=shown,
        evidence=evidence,
        groups={new_id[i]: group for i, group in screening.groups.items()},
        removed_by_hand=ids[np.isin(screening.ids, screening.removed_by_hand)],
        kept_by_hand=ids[np.isin(screening.ids, screening.kept_by_hand)],
        set_aside=None if screening.set_aside is None else ids[np.isin(screening.ids, screening.set_aside)],
    )


def grouped(screening: Screening, images: ImageSet) -> tuple[ImageSet, str | None]:
    """The images to train on with the groups of their screening and as it saw them, or as they are given.

    Args:
        screening: Of the same images, from disk or not, which are found by name.
        images: The set to train on. Its own groups are the newer word of the two, and win.

    Returns:
        The images; and what a person should know where both have groups and put the images together in other ways.
    """
    images = as_seen_by(screening, images)
    by_name = _ids_by_name(images)
    new_id = {i: by_name.get(show(name)) for i, name in zip(screening.ids.tolist(), screening.names, strict=True)}
    known = {id_: group for i, group in screening.groups.items() if (id_ := new_id[i]) is not None}
    theirs = replace(images, groups=known)
    if images.n_groups is None:
        return theirs, None
    common = [id_ for id_ in new_id.values() if id_ is not None]
    ours, before = images.select(common), theirs.select(common)
    if list(ours.members.values()) == list(before.members.values()):  # whatever the groups are called
        return images, None
    those = "which has none" if before.n_groups is None else f"which has {before.n_groups}"
    return images, (
        f"The {ours.n_groups} groups that were given are not those of the screening, {those}. The detector and its "
        "threshold follow those given; which images are kept was judged with the others."
    )


def _ids_by_name(images: ImageSet) -> dict[str, int]:
    return {show(name): i for i, name in zip(images.ids.tolist(), images.names, strict=True)}


def screening_folder(folder: str | Path) -> Path:
    """The screening in a folder: itself, or `screening` in a model folder.

    Raises:
        InputError: There is none.
    """
    folder = Path(folder)
    for place in (folder, folder / "screening"):
        settle(place)
        if (place / CSV).is_file():
            return place
    raise InputError(
        f"'{show(folder)}' holds no screening. Give the folder that `flawsift screen` wrote, or `flawsift fit` without "
        "--no-screen."
    )


def _read(parts: Parts) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows of the images that could be read, by id, and screening.json.

    Of a table that was edited only the column `kept` counts; numbers, which a spreadsheet may have rounded, are those
    that were written.
    """
    content = json_object(parts.read(JSON))
    if parts.digests is None or parts.is_unchanged(CSV):
        return rows_of((parts.folder / CSV).read_bytes()), content
    rows = rows_of(parts.read(ORIGINAL))
    try:
        edited = rows_of((parts.folder / CSV).read_bytes())
    except DAMAGE as error:
        raise DamagedPart(
            f"{CSV}, which was edited, is no table of a screening any more: {error}. Save it as 'CSV UTF-8' with commas"
        ) from error
    if [(row["id"], row["path"]) for row in edited] != [(row["id"], row["path"]) for row in rows]:
        raise DamagedPart(f"{CSV} lists other images than were screened; only its column kept may be edited")
    if [row.get("group") for row in edited] != [row.get("group") for row in rows]:
        log.warning("Groups that were edited in '%s' are not used. Give them with --groups.", show(parts.folder / CSV))
    return [{**row, "kept": other["kept"]} for row, other in zip(rows, edited, strict=True)], content


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"'{show(folder)}' is not a screening folder: {error.strerror} ({error.filename}). Give the one that "
            "`flawsift screen` wrote, or the folder 'screening' in that of a model."
        ) from error
    except DamagedPart as error:
        raise InputError(
            f"The screening in '{show(folder)}' is damaged: {error}. Take a copy of it, or screen the folder again."
        ) from error
    except DAMAGE as error:
        raise InputError(
            f"The screening in '{show(folder)}' is damaged: {error!r}. Screen the folder again."
        ) from error


def _array(parts: Parts, name: str, n: int, n_dims: int, kind: type[Kind]) -> npt.NDArray[Kind] | None:
    if name not in parts:
        return None
    values = np.load(io.BytesIO(parts.read(name)), allow_pickle=False)
    if len(values) != n or values.ndim != n_dims:
        raise ValueError(f"{name} has the shape {values.shape}, {n} images are listed")
    if np.isnan(values).any():
        raise ValueError(f"{name} holds values that are no numbers")
    return np.asarray(values, kind)
