"""What a screening kept and removed, with a reviewer's decisions, in formats of other tools. Originals stay."""

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

from flawsift import __version__
from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import FileSource, ImageSet
from flawsift.data.joins import find_images
from flawsift.errors import OutputError, ParameterError, unknown_name
from flawsift.files import ensure_folder, new_folder, write_json, write_text
from flawsift.paths import show
from flawsift.reports.evidence import map_scale
from flawsift.reports.overlays import Scale
from flawsift.reports.regions import Region, normal_level, regions
from flawsift.screening.decisions import apply_decisions, located
from flawsift.screening.result import Screening
from flawsift.tables import write_csv

STATUS = ("removed", "kept")  # by whether an image is kept
REGION = "suspect region"


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of an export."""

    id: int
    name: str  # as `show` prints it
    path: Path
    is_kept: bool
    decision: str  # "" where there is none
    defect_type: str  # as a person named it; "" where nobody did
    rank: int
    consensus: float
    held_out_score: float
    position: int

    @property
    def status(self) -> str:
        return STATUS[self.is_kept]


@dataclass(frozen=True, eq=False)
class _Export:
    """What is written, and where."""

    screening: Screening
    images: list[_Image]
    source: FileSource  # of the images
    folder: Path  # of the export
    link: bool
    scale: Scale | None
    level: float  # of what is normal, in the maps

    @property
    def root(self) -> Path:
        return self.source.root

    @property
    def labels(self) -> list[str]:
        """What a region can be: without a name, and by the names that were given."""
        return [REGION, *sorted({image.defect_type for image in self.images} - {"", REGION})]


def export(
    screening: Screening,
    images: ImageSet,
    out: str | Path,
    to: str,
    *,
    choices: Mapping[str, str] | None = None,
    defect_types: Mapping[str, str] | None = None,
    link: bool = False,
) -> dict[str, int]:
    """Write kept and removed images for another tool.

    Args:
        screening: From `flawsift.screening.storage.load_screening`.
        images: Its images, from `flawsift.screening.storage.images_of`.
        out: A folder that is missing or empty, outside of the images' folder.
        to: "folder" (sub-folders kept and removed with copies), "csv" (one table), "coco" (object detection: boxes and
            outlines of the suspect regions of removed images, see `flawsift.reports.regions`), "fiftyone"
            (FiftyOneImageClassificationDataset) or "labelstudio" (tasks with predictions, and with annotations where a
            person decided).
        choices: Decisions in force, from `flawsift.screening.decisions.read_decisions`.
        defect_types: Names of the defects of removed images, from `flawsift.screening.decisions.read_defect_types`.
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
    choices = located(choices or {}, screening.names)
    typed = find_images(defect_types or {}, screening.names, "decisions")
    types = {show(name): (defect_types or {})[row] for row, name in typed.items()}
    is_kept, _ = apply_decisions(screening.names, screening.is_kept, choices)
    rank = {i: r for r, i in enumerate(screening.ranking.tolist(), 1)}
    listed = []
    for p, id_ in enumerate(screening.ids.tolist()):
        name = show(screening.names[p])
        scores = float(screening.consensus[p]), float(screening.held_out_scores[p])
        said = choices.get(name, ""), "" if is_kept[p] else types.get(name, "")
        listed.append(_Image(id_, name, source.path(id_), bool(is_kept[p]), *said, rank[id_], *scores, p))
    level = 0.0 if screening.patch_maps is None else normal_level(screening)
    ensure_folder(out)  # what cannot be written is told before the pictures are copied
    with new_folder(out) as folder:
        missing = FORMATS[to](_Export(screening, listed, source, folder, link, map_scale(screening), level))
    return {"kept": int(is_kept.sum()), "removed": int((~is_kept).sum()), "missing": missing}


def _folder(job: _Export) -> int:
    missing = 0
    for status in STATUS:
        (job.folder / status).mkdir()
    status_of = {image.path: STATUS[True] for image in job.images}
    status_of |= {image.path: image.status for image in job.images if not image.is_kept}  # as one of its pages is
    for path, status in status_of.items():
        target = job.folder / status / path.relative_to(job.root)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():  # a pipe would keep its reader waiting
                missing += 1
            elif job.link:
                target.symlink_to(os.path.abspath(path))
            else:
                shutil.copy2(path, target)
        except OSError as error:
            raise OutputError(f"Cannot write '{show(target)}': {error.strerror or error}.") from error
    return missing


def _csv(job: _Export) -> int:
    header = ["id", "path", "status", "decision", "rank", "consensus", "held_out_score", "file", "defect_type"]
    table = [
        (
            *(i.id, i.name, i.status, i.decision, i.rank, f"{i.consensus:.9g}", f"{i.held_out_score:.9g}"),
            *(_absolute(i.path), i.defect_type),
        )
        for i in job.images
    ]
    write_csv(job.folder / "images.csv", header, table)
    return 0


def _coco(job: _Export) -> int:
    """https://cocodataset.org/#format-data: one file of object detection; kept images have no annotation."""
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    missing = 0
    category = {name: n for n, name in enumerate(job.labels, 1)}
    for image in job.images:
        size = _size(job, image)
        if size is None:
            missing += 1
            continue
        width, height = size
        extra = {"status": image.status, "decision": image.decision, "consensus": image.consensus}
        pictures.append({"id": image.id, "file_name": image.name, "width": width, "height": height, "flawsift": extra})
        for region in () if image.is_kept else _regions(job, image, size):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.id,
                    "category_id": category[image.defect_type or REGION],
                    "bbox": region.box,
                    "area": region.area,
                    "segmentation": region.polygons,
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "Screened by flawsift", "version": __version__},
        "licenses": [],
        "categories": [{"id": n, "name": name, "supercategory": "defect"} for name, n in category.items()],
        "images": pictures,
        "annotations": annotations,
    }
    write_json(job.folder / "annotations.json", content)
    return missing


def _fiftyone(job: _Export) -> int:
    """FiftyOneImageClassificationDataset: labels by absolute path, classes by number, attributes beside them."""
    labels = {}
    for image in job.images:
        attributes: dict[str, Any] = {
            "consensus": image.consensus,
            "held_out_score": image.held_out_score,
            "rank": image.rank,
        }
        attributes |= {"decision": image.decision or None, "defect_type": image.defect_type or None}
        labels[_absolute(image.path)] = {"label": int(image.is_kept), "confidence": None, "attributes": attributes}
    write_json(job.folder / "labels.json", {"classes": list(STATUS), "labels": labels})
    return 0


def _labelstudio(job: _Export) -> int:
    """Tasks of the Basic Label Studio JSON format, images by its local file serving, and the labelling interface."""
    folder = Path(_absolute(job.root)).name
    is_kept = job.screening.is_kept  # without the decisions
    tasks = []
    for image in job.images:
        below = image.path.relative_to(job.root).as_posix()
        address = f"/data/local-files/?d={quote(os.fsencode(f'{folder}/{below}'))}"
        data = {"image": address, "path": image.name, "consensus": image.consensus, "rank": image.rank}
        result = [_choice(f"{image.id}-screening", STATUS[bool(is_kept[image.position])])]
        size = None if image.is_kept else _size(job, image)
        if size is not None:
            for b, region in enumerate(_regions(job, image, size)):
                result.append(_rectangle(f"{image.id}-region-{b}", region.box, size, image.defect_type or REGION))
        prediction = {"model_version": f"flawsift {__version__}", "score": image.consensus, "result": result}
        task: dict[str, Any] = {"data": data, "predictions": [prediction]}
        if image.decision in ("keep", "remove"):
            said = [_choice(f"{image.id}-person", image.status)]
            said += [_choice(f"{image.id}-type", image.defect_type, "defect_type")] if image.defect_type else []
            task["annotations"] = [{"result": said}]
        tasks.append(task)
    write_json(job.folder / "tasks.json", tasks)
    _, *types = job.labels
    status, named = (
        "\n".join(f"    <Choice value={quoteattr(s)}/>" for s in values) for values in (reversed(STATUS), types)
    )
    named = f'  <Choices name="defect_type" toName="image" choice="single">\n{named}\n  </Choices>\n' if types else ""
    labels = "\n".join(f"    <Label value={quoteattr(s)}/>" for s in job.labels)
    write_text(
        job.folder / "interface.xml",
        f'<View>\n  <Image name="image" value="$image"/>\n  <Choices name="status" toName="image" choice="single">\n'
        f'{status}\n  </Choices>\n{named}  <RectangleLabels name="region" toName="image">\n'
        f"{labels}\n  </RectangleLabels>\n</View>\n",
    )
    return 0


FORMATS: Mapping[str, Callable[[_Export], int]] = {
    "folder": _folder,
    "csv": _csv,
    "coco": _coco,
    "fiftyone": _fiftyone,
    "labelstudio": _labelstudio,
}


def _choice(id_: str, value: str, control: str = "status") -> dict[str, Any]:
    return {"id": id_, "type": "choices", "from_name": control, "to_name": "image", "value": {"choices": [value]}}


def _rectangle(id_: str, box: list[float], size: tuple[int, int], label: str) -> dict[str, Any]:
    """Label Studio's boxes are in percent of the picture."""
    (x, y, w, h), (width, height) = box, size
    percent = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
    value = {**{key: round(v, 3) for key, v in percent.items()}, "rotation": 0, "rectanglelabels": [label]}
    common = {"id": id_, "type": "rectanglelabels", "from_name": "region", "to_name": "image", "value": value}
    return {**common, "original_width": width, "original_height": height, "image_rotation": 0}


def _regions(job: _Export, image: _Image, size: tuple[int, int]) -> list[Region]:
    """The suspect regions of an image; the whole picture where there are no maps."""
    maps = job.screening.patch_maps
    flat = np.zeros((1, 1), np.float16)
    return regions(flat if maps is None else maps[image.position], job.scale, job.level, size)


def _size(job: _Export, image: _Image) -> tuple[int, int] | None:
    """(width, height) of a picture upright, from its head; None where it cannot be read."""
    try:
        return job.source.size(image.id)
    except UnreadableImage:
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
