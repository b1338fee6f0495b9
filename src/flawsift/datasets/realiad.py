"""Real-IAD: 30 kinds of objects, five camera views each, and FUIAD, its official contaminated splits.

    realiad_1024/CATEGORY/OK/S0001/CATEGORY_0001_OK_C1_20231021130235.jpg
    realiad_1024/CATEGORY/NG/BX/S0003/CATEGORY_0003_NG_BX_C2_20231023111640.jpg (and .png, the mask of its defect)
    realiad_jsons_fuiad_{0.0,0.1,0.2,0.4}/CATEGORY.json    perhaps below a folder realiad_jsons, as in the archive

A split file is {"meta": {"prefix": "CATEGORY/", "normal_class": "OK", ...}, "train": [...], "test": [...]}; a row has
category, anomaly_class, image_path and mask_path, the paths relative to the prefix.

A label is the annotation of the *image*: a defective object (NG in its path) shows its defect in about two of three
views only, and its other views are annotated OK. So `alpha`, which counts all views of defective objects, is larger
than the share of anomalous images: 0.1, 0.2 and 0.4 stand for about 6.5, 13 and 26.5 % of the training images. The
views of one object are a group.

Source: Wang et al., "Real-IAD", CVPR 2024, https://realiad4ad.github.io/Real-IAD (CC BY-NC-SA 4.0).
"""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from flawsift.damage import DAMAGE, json_object
from flawsift.datasets.dataset import NORMAL, Dataset, Entry, from_entries
from flawsift.datasets.published import SOURCES, find_root, require_files
from flawsift.errors import InputError, ParameterError
from flawsift.paths import name_some, show

ALPHAS = (0.0, 0.1, 0.2, 0.4)  # of the four official splits
RESOLUTIONS = ("256", "512", "1024", "raw")
FIELDS = ("anomaly_class", "image_path", "mask_path")


def load_realiad(
    category: str, root: str | Path | None = None, *, alpha: float = 0.0, resolution: str | int = 1024
) -> Dataset:
    """One category under an official contaminated split; ids in the order of the split file, training images first.

    No image and no object is on both sides of the split; this is checked here.

    Args:
        category: Such as "audiojack".
        root: The folder that holds realiad_1024 and the split files; by default FLAWSIFT_DATA/realiad.
        alpha: Contamination of the training set, 0, 0.1, 0.2 or 0.4: the share of the views of defective objects.
        resolution: 256, 512, 1024 or "raw": which of the published sizes.

    Raises:
        InputError: The category is unknown, files are missing, the split file is not as published, has an empty side
            or leads out of its folder, or an image or an object is on both sides.
        ParameterError: There is no such split or resolution.
    """
    if alpha not in ALPHAS:
        raise ParameterError(f"load_realiad.alpha must be one of {', '.join(map(str, ALPHAS))}, got {alpha}.")
    if str(resolution) not in RESOLUTIONS:
        raise ParameterError(f"load_realiad.resolution must be one of {', '.join(RESOLUTIONS)}, got {resolution}.")
    folder = find_root("realiad", category, root)
    path = _split_file(folder, category, alpha)
    content = _read(path, category)
    images = folder / f"realiad_{resolution}" / PurePosixPath(content["meta"]["prefix"])
    normal = content["meta"]["normal_class"]
    entries = [_entry(row, images, normal, part) for part in ("train", "test") for row in content[part]]
    _check_paths(path, entries)
    _check_disjoint(path, entries)
    require_files("realiad", images, entries, f"the files of '{show(path)}' below it")
    groups = {e.file: str(PurePosixPath(e.file).parent) for e in entries}
    return from_entries(category, images, entries, groups)


def _split_file(folder: Path, category: str, alpha: float) -> Path:
    name = f"realiad_jsons_fuiad_{alpha:.1f}/{category}.json"
    places = [folder / name, folder / "realiad_jsons" / name]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"The split file of '{category}' at alpha {alpha:g} is missing. Looked for {' and '.join(map(show, places))}. "
        f"It comes with {SOURCES['realiad']}."
    )


def _read(path: Path, category: str) -> dict[str, Any]:
    try:
        content = json_object(path.read_bytes())
        rows = [*content["train"], *content["test"]]
        missing = [f for f in FIELDS if any(f not in row for row in rows)]
        missing += [f"meta.{f}" for f in ("prefix", "normal_class") if not isinstance(content["meta"].get(f), str)]
        if not missing and not all(isinstance(row["image_path"], str) and _is_mask(row["mask_path"]) for row in rows):
            raise TypeError("a path is no text")
        empty = [part for part in ("train", "test") if not content[part]]
        others = sorted({str(row["category"]) for row in rows if "category" in row} - {category})
    except OSError as error:
        raise InputError(f"The split file '{show(path)}' cannot be read: {error.strerror}.") from error
    except DAMAGE as error:
        raise InputError(
            f"The split file '{show(path)}' is damaged: {error!r}. Expected meta, train and test as published."
        ) from error
    if missing:
        raise InputError(f"The split file '{show(path)}' lacks the fields {', '.join(missing)}.")
    if empty:
        raise InputError(f"The split file '{show(path)}' has no image in {' and in '.join(empty)}.")
    if others:
        raise InputError(f"The split file '{show(path)}' names images of {name_some(others)}, not of {category} only.")
    return content


def _is_mask(path: object) -> bool:
    return path is None or isinstance(path, str)


def _entry(row: dict[str, Any], images: Path, normal: str, part: str) -> Entry:
    # by the annotation, not by the path: one of three views of a defective object does not show its defect
    kind = NORMAL if row["anomaly_class"] == normal else str(row["anomaly_class"])
    mask = images / row["mask_path"] if row["mask_path"] and kind != NORMAL else None
    file = str(PurePosixPath(row["image_path"]))  # one spelling for one file, so that equal ones are seen
    return Entry(file, kind, mask, part)  # type: ignore[arg-type]


def _check_paths(path: Path, entries: list[Entry]) -> None:
    files = [PurePosixPath(e.file) for e in entries]
    if outside := [str(f) for f in files if f.is_absolute() or ".." in f.parts or len(f.parts) < 2]:
        raise InputError(
            f"The split file '{show(path)}' names {len(outside)} images that are in no folder of an object: "
            f"{name_some(outside)}. Expected paths such as OK/S0001/NAME.jpg."
        )


def _check_disjoint(path: Path, entries: list[Entry]) -> None:
    twice = sorted(file for file, n in Counter(e.file for e in entries).items() if n > 1)
    if twice:
        raise InputError(f"The split file '{show(path)}' names {len(twice)} images more than once: {name_some(twice)}.")
    sides = [{str(PurePosixPath(e.file).parent) for e in entries if e.part == part} for part in ("train", "test")]
    if both := sorted(sides[0] & sides[1]):
        raise InputError(
            f"The split file '{show(path)}' has {len(both)} objects on both sides: {name_some(both)}. "
            "A test would tell how well they are remembered."
        )
