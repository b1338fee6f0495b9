"""What a screening kept and removed, with a person's decisions, in the forms that other tools read. Originals stay."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from flawsift import __version__
from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import FileSource, ImageSet
from flawsift.errors import OutputError, ParameterError, unknown_name
from flawsift.files import ensure_folder, write_csv, write_json, write_text
from flawsift.paths import show
from flawsift.reports.overlays import Scale
from flawsift.reports.screening import map_scale, shown_map
from flawsift.screening.decisions import apply_decisions
from flawsift.screening.result import Screening

STATUS = ("removed", "kept")  # by whether an image is kept
SUSPECT = "suspect region"
ORIENTATION = 0x0112  # the EXIF tag
TURNED = 5  # orientations from here on swap width and height


@dataclass(frozen=True, eq=False)
class _Row:
    """One image of the export."""

    id: int
    name: str  # as `show` prints it
    path: Path
    is_kept: bool
    decision: str  # "" where nobody decided
    rank: int
    consensus: float
    held_out_score: float
    position: int

    @property
    def status(self) -> str:
        return STATUS[self.is_kept]


def export(
    screening: Screening,
    images: ImageSet,
    out: str | Path,
    to: str,
    *,
    choices: Mapping[str, str] | None = None,
    link: bool = False,
) -> dict[str, int]:
    """Write kept and removed images for another tool.

    Args:
        screening: From `flawsift.screening.storage.load_screening`.
        images: Its images, from `flawsift.screening.storage.images_of`.
        out: A folder that is missing or empty, outside of the images' folder.
        to: "folder" (sub-folders kept and removed with copies), "csv" (one table), "coco" (object detection: boxes
            around the suspect regions of removed images), "fiftyone" (FiftyOneImageClassificationDataset) or
            "labelstudio" (tasks with predictions, and with annotations where a person decided).
        choices: Decisions in force, from `flawsift.screening.decisions.read_decisions`.
        link: For "folder": symbolic links instead of copies.

    Returns:
        How many images were kept, removed, and missing on disk ("folder" and "coco" leave those out).

    Raises:
        ParameterError: There is no such form.
        OutputError: `out` has content, lies in the images' folder or cannot be written.
    """
    if to not in FORMATS:
        raise ParameterError(unknown_name("export", to, FORMATS))
    source = images.source
    assert isinstance(source, FileSource)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"'{show(out)}' is not an empty folder. Choose another one.")
    if out.resolve().is_relative_to(source.root.resolve()):
        raise OutputError(
            f"'{show(out)}' lies in the image folder, whose next screening would find it. Choose another."
        )
    is_kept, _ = apply_decisions(screening.names, screening.is_kept, choices or {})
    rank = {i: r for r, i in enumerate(screening.ranking.tolist(), 1)}
    rows = []
    for p, id_ in enumerate(screening.ids.tolist()):
        name = show(screening.names[p])
        scores = float(screening.consensus[p]), float(screening.held_out_scores[p])
        decision = (choices or {}).get(name, "")
        rows.append(_Row(id_, name, source.path(id_), bool(is_kept[p]), decision, rank[id_], *scores, p))
    folder = ensure_folder(out)
    missing = FORMATS[to](rows, folder, screening, source.root, link)
    return {"kept": int(is_kept.sum()), "removed": int((~is_kept).sum()), "missing": missing}


def _folder(rows: list[_Row], out: Path, screening: Screening, root: Path, link: bool) -> int:
    missing = 0
    for status in STATUS:
        (out / status).mkdir()
    for row in rows:
        target = out / row.status / row.path.relative_to(root)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not row.path.exists():
                missing += 1
            elif link:
                target.symlink_to(os.path.abspath(row.path))
            else:
                shutil.copy2(row.path, target)
        except OSError as error:
            raise OutputError(f"Cannot write '{show(target)}': {error.strerror or error}.") from error
    return missing


def _csv(rows: list[_Row], out: Path, screening: Screening, root: Path, link: bool) -> int:
    header = ["id", "path", "status", "decision", "rank", "consensus", "held_out_score", "file"]
    table = [
        (r.id, r.name, r.status, r.decision, r.rank, f"{r.consensus:.9g}", f"{r.held_out_score:.9g}", _absolute(r.path))
        for r in rows
    ]
    write_csv(out / "images.csv", header, table)
    return 0


def _coco(rows: list[_Row], out: Path, screening: Screening, root: Path, link: bool) -> int:
    """https://cocodataset.org/#format-data: one file of object detection; kept images have no annotation."""
    scale = map_scale(screening)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    missing = 0
    for row in rows:
        size = _size(row.path)
        if size is None:
            missing += 1
            continue
        width, height = size
        extra = {"status": row.status, "decision": row.decision, "consensus": row.consensus}
        listed.append({"id": row.id, "file_name": row.name, "width": width, "height": height, "flawsift": extra})
        for box in () if row.is_kept else _boxes(screening, scale, row.position, size):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": row.id,
                    "category_id": 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "Screened by flawsift", "version": __version__},
        "licenses": [],
        "categories": [{"id": 1, "name": SUSPECT, "supercategory": "defect"}],
        "images": listed,
        "annotations": annotations,
    }
    write_json(out / "annotations.json", content)
    return missing


def _fiftyone(rows: list[_Row], out: Path, screening: Screening, root: Path, link: bool) -> int:
    """FiftyOneImageClassificationDataset: labels by absolute path, classes by number, attributes beside them."""
    labels = {}
    for row in rows:
        attributes: dict[str, Any] = {
            "consensus": row.consensus,
            "held_out_score": row.held_out_score,
            "rank": row.rank,
        }
        attributes["decision"] = row.decision or None
        labels[_absolute(row.path)] = {"label": int(row.is_kept), "confidence": None, "attributes": attributes}
    write_json(out / "labels.json", {"classes": list(STATUS), "labels": labels})
    return 0


def _labelstudio(rows: list[_Row], out: Path, screening: Screening, root: Path, link: bool) -> int:
    """Tasks of the Basic Label Studio JSON format, images by its local file serving, and the labelling interface."""
    scale = map_scale(screening)
    folder = Path(_absolute(root)).name
    tasks = []
    for row in rows:
        address = f"/data/local-files/?d={quote(os.fsencode(f'{folder}/{row.path.relative_to(root).as_posix()}'))}"
        data = {"image": address, "path": row.name, "consensus": row.consensus, "rank": row.rank}
        screened = STATUS[bool(screening.is_kept[row.position])]
        result = [_choice(f"{row.id}-screening", screened)]
        size = None if row.is_kept else _size(row.path)
        if size is not None:
            for b, box in enumerate(_boxes(screening, scale, row.position, size)):
                result.append(_rectangle(f"{row.id}-region-{b}", box, size))
        prediction = {"model_version": f"flawsift {__version__}", "score": row.consensus, "result": result}
        task: dict[str, Any] = {"data": data, "predictions": [prediction]}
        if row.decision in ("keep", "remove"):
            task["annotations"] = [{"result": [_choice(f"{row.id}-person", row.status)]}]
        tasks.append(task)
    write_json(out / "tasks.json", tasks)
    choices = "\n".join(f"    <Choice value={quoteattr(s)}/>" for s in reversed(STATUS))
    write_text(
        out / "interface.xml",
        f'<View>\n  <Image name="image" value="$image"/>\n  <Choices name="status" toName="image" choice="single">\n'
        f'{choices}\n  </Choices>\n  <RectangleLabels name="region" toName="image">\n'
        f"    <Label value={quoteattr(SUSPECT)}/>\n  </RectangleLabels>\n</View>\n",
    )
    return 0


FORMATS: Mapping[str, Callable[[list[_Row], Path, Screening, Path, bool], int]] = {
    "folder": _folder,
    "csv": _csv,
    "coco": _coco,
    "fiftyone": _fiftyone,
    "labelstudio": _labelstudio,
}


def _choice(id_: str, value: str) -> dict[str, Any]:
    return {"id": id_, "type": "choices", "from_name": "status", "to_name": "image", "value": {"choices": [value]}}


def _rectangle(id_: str, box: list[float], size: tuple[int, int]) -> dict[str, Any]:
    """Label Studio's boxes are in percent of the picture."""
    (x, y, w, h), (width, height) = box, size
    percent = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
    value = {**{key: round(v, 3) for key, v in percent.items()}, "rotation": 0, "rectanglelabels": [SUSPECT]}
    common = {"id": id_, "type": "rectanglelabels", "from_name": "region", "to_name": "image", "value": value}
    return {**common, "original_width": width, "original_height": height, "image_rotation": 0}


def _boxes(screening: Screening, scale: Scale | None, position: int, size: tuple[int, int]) -> list[list[float]]:
    """[x, y, width, height] in pixels around each region outlined in the heatmap; the whole picture without one."""
    width, height = size
    whole = [[0.0, 0.0, float(width), float(height)]]
    if screening.patch_maps is None or scale is None:
        return whole
    above: npt.NDArray[np.bool_] = shown_map(screening.patch_maps[position]).numpy() > scale.threshold
    rows, columns = above.shape
    labelled, _ = ndimage.label(above, np.ones((3, 3)))
    boxes = []
    for vertical, horizontal in ndimage.find_objects(labelled):
        x, w = horizontal.start * width / columns, (horizontal.stop - horizontal.start) * width / columns
        y, h = vertical.start * height / rows, (vertical.stop - vertical.start) * height / rows
        boxes.append([round(v, 2) for v in (x, y, w, h)])
    return boxes or whole


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a picture upright, from its head; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= TURNED
            return (image.height, image.width) if turned else image.size
    except (OSError, UnreadableImage, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _absolute(path: Path) -> str:
    return os.path.abspath(path)


def opening_note(out: Path, to: str, root: Path) -> str:
    """How the tool opens what was written, for the command line."""
    if to == "fiftyone":
        return (
            "fiftyone.Dataset.from_dir(dataset_type=fiftyone.types.FiftyOneImageClassificationDataset, "
            f"labels_path={json.dumps(_absolute(out / 'labels.json'))})"
        )
    if to == "labelstudio":
        folder = Path(_absolute(root))
        return (
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={shlex.quote(show(folder.parent))} label-studio start\n"
            # it serves no file that lies outside of all storages of the project, whatever the document root
            f"In the project, add a source storage of the type Local Files with the path {show(folder)} and do not "
            "sync it, paste interface.xml as the labelling interface, and import tasks.json."
        )
    return ""
