"""What is mutated: images, a model with its screening, exports, a cache and tables, all small."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flawsift.testing import SIZE, easy_set
from tools.campaign.outcome import command

N_PARTS, N_GOOD = 14, 12  # images that are screened, and good ones among them
BACKBONE = ("--backbone", "tiny", "--size", SIZE, "--runtime", "torch")


@dataclass(frozen=True)
class Material:
    """Folders and files that are whole.

    Attributes:
        root: All are below it.
    """

    root: Path

    @property
    def parts(self) -> Path:
        """Unlabelled images."""
        return self.root / "parts"

    @property
    def labelled(self) -> Path:
        """The same kind of images in MVTec layout, with masks."""
        return self.root / "set"

    @property
    def model(self) -> Path:
        """A model with its screening."""
        return self.root / "model"

    @property
    def other(self) -> Path:
        """Another run's."""
        return self.root / "other"

    @property
    def cache(self) -> Path:
        """Features of the parts."""
        return self.root / "cache"

    @property
    def onnx(self) -> Path:
        """The model as ONNX."""
        return self.root / "onnx"

    @property
    def openvino(self) -> Path:
        """The same for OpenVINO."""
        return self.root / "openvino"

    @property
    def predictions(self) -> Path:
        """What was predicted for the parts."""
        return self.root / "predictions"

    @property
    def tables(self) -> Path:
        """What a person writes: decisions.csv, reviewed.csv, groups.csv, labels.csv, and a benchmark's grid.toml."""
        return self.root / "tables"

    def fit(self, out: Path, *more: object) -> tuple[object, ...]:
        """Arguments of a fit on the parts."""
        return ("fit", self.parts, "--out", out, *BACKBONE, "--cache", self.cache, "--json", *more)

    def screen(self, out: Path, *more: object) -> tuple[object, ...]:
        """Arguments of a screening of the parts."""
        return ("screen", self.parts, "--out", out, *BACKBONE, "--cache", self.cache, "--json", *more)


def make_material(root: Path) -> Material:
    """Make it all in an empty folder; the same bytes each time, but for times."""
    made = Material(root)
    _write_images(made)
    run(*made.fit(made.model))
    run(*made.fit(made.other, "--detector", "patchcore", "--seed", 1, "--false-alarm-rate", 0.2))
    run("predict", made.model, made.parts, "--out", made.predictions, "--no-maps", "--runtime", "torch")
    for to, out in (("onnx", made.onnx), ("openvino", made.openvino)):
        run("export-model", made.model, "--out", out, "--to", to)
    made.tables.mkdir()
    names = sorted(path.name for path in made.parts.iterdir())
    _write(made.tables / "decisions.csv", ["path", "decision", "version", "time"], names, ["keep", "remove", "unsure"])
    _write(made.tables / "groups.csv", ["file", "group"], names, list("abcdefg"))
    _write(made.tables / "labels.csv", ["file", "label"], names, ["0", "0", "1"])
    tested = sorted(path.relative_to(made.labelled / "test").as_posix() for path in made.labelled.glob("test/*/*"))
    choices = ["remove" if name.startswith("bad") else "keep" for name in tested]
    _write(made.tables / "reviewed.csv", ["path", "decision"], tested, choices)
    (made.tables / "grid.toml").write_text(GRID.replace("SET", json.dumps(str(made.labelled))), "utf-8")
    return made


GRID = """alphas = [0.0, 0.1]
seeds = [0, 1]
presets = ["none", "default"]
protocols = ["no_overlap"]
subsets = [2]
device = "cpu"
executor = "serial"

[backbone]
name = "tiny"
size = 64
runtime = "torch"

[[data]]
name = SET
n_train = 6

[[detectors]]
name = "patchcore"
params = { coreset_ratio = 0.1 }
"""


def run(*arguments: object) -> str:
    """Run a command that must succeed; what it printed.

    Raises:
        RuntimeError: It failed.
    """
    answer = command(*arguments)
    if answer.code != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed: {answer.err}")
    return answer.out


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a folder in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def _write_images(made: Material) -> None:
    data = easy_set()
    good, bad = data.truth.ids[data.truth.labels == 0].tolist(), data.truth.ids[data.truth.labels == 1].tolist()
    made.parts.mkdir(parents=True)
    for n, id_ in enumerate([*good[:N_GOOD], *bad[: N_PARTS - N_GOOD]]):
        data.images.image(id_).save(made.parts / f"part-{n:02d}.png")
    places = {"train/good": good[12:20], "test/good": good[20:26], "test/bad": bad[2:6]}
    for place, ids in places.items():
        (made.labelled / place).mkdir(parents=True)
        for id_ in ids:
            data.images.image(id_).save(made.labelled / place / f"{id_:03d}.png")
    (made.labelled / "ground_truth" / "bad").mkdir(parents=True)
    for id_ in places["test/bad"]:
        mask = data.truth.mask(id_, (SIZE, SIZE))
        assert mask is not None
        picture = Image.fromarray(np.uint8(255) * mask.astype(np.uint8))
        picture.save(made.labelled / "ground_truth" / "bad" / f"{id_:03d}_mask.png")


def _write(path: Path, header: Sequence[str], names: Sequence[str], values: Sequence[str]) -> None:
    rest = ["1", "2024-05-01T10:00:00"][: len(header) - 2]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([name, values[n % len(values)], *rest] for n, name in enumerate(names))
