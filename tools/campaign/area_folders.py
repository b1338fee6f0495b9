"""Folders that flawsift wrote: a model with its screening, exported files, the feature cache."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

from flawsift.files import MANIFEST
from flawsift.review.session import Review
from flawsift.runtime import Inspector
from tools.campaign.material import Material, fresh_copy
from tools.campaign.mutate import Generator, change_bytes, change_json, change_table
from tools.campaign.outcome import Answer, Outcome, command, function, judged

PAGES = {"report.html"}  # for people: whole or absent, and read by nothing
NAMES = ("fit", "predict", "layers", "__class__", "memory_bank_", "extra_", "")  # of tensors


def files_of(folder: Path) -> list[Path]:
    """Relative paths of what a folder holds, but for pages and hidden files."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if path.name not in PAGES and not path.name.startswith(".")]


def mutate_file(folder: Path, name: Path, other: Path | None, draw: Generator) -> str:
    """Change a file of a folder in place; what was done."""
    path = folder / name
    content = path.read_bytes()
    if draw.random() < 0.08:
        path.unlink()
        return f"{name}: taken away"
    if draw.random() < 0.04:
        path.unlink()
        path.mkdir()
        return f"{name}: a folder in its place"
    others = [p.read_bytes() for p in sorted(other.rglob(f"*{path.suffix}")) if p.is_file()] if other else []
    if path.suffix == ".json" and draw.random() < 0.6:
        what, changed = change_json(content, draw)
    elif path.suffix == ".csv" and draw.random() < 0.6:
        what, changed = change_table(content, draw)
    elif path.suffix == ".safetensors" and draw.random() < 0.4:
        what, changed = _change_tensors(content, draw)
    else:
        what, changed = change_bytes(content, draw, others)
    path.write_bytes(changed)
    return f"{name}: {what}"


def _change_tensors(content: bytes, draw: Generator) -> tuple[str, bytes]:
    tensors = load(content)
    names = sorted(tensors)
    name = names[int(draw.integers(len(names)))]
    tensor, way = tensors[name].clone(), int(draw.integers(6))
    if way == 0 and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[int(draw.integers(tensor.numel()))] = float(("nan", "inf", "-inf")[int(draw.integers(3))])
        tensors[name] = tensor
    elif way == 1:
        tensors[NAMES[int(draw.integers(len(NAMES)))]] = torch.zeros(1)
    elif way == 2:
        del tensors[name]
    elif way == 3:
        tensors[name] = tensor.reshape(-1)[: max(tensor.numel() - 1, 0)].contiguous()
    elif way == 4:
        tensors[name] = tensor.double()
    else:
        tensors[name] = torch.zeros(0)
    return f"tensor {name} changed in way {way}", save(tensors)


def seal(folder: Path) -> None:
    """Make all digests fit what is there now, so that what stands behind them is asked."""
    for place in {path.parent for path in folder.rglob(MANIFEST)}:
        digests = {p.name: _digest(p) for p in sorted(place.iterdir()) if p.is_file() and p.name != MANIFEST}
        known = {name: digest for name, digest in digests.items() if name not in PAGES and not name.startswith(".")}
        detector, model = place / "detector.json", place / "model.json"
        try:
            state = next(iter(sorted(place.glob("state-*.safetensors"))))
            content = json.loads(detector.read_bytes())
            detector.write_text(json.dumps({**content, "sha256": _digest(state)}), "utf-8")
            content = json.loads(model.read_bytes())
            model.write_text(json.dumps({**content, "detector_digest": _digest(detector)}), "utf-8")
            known |= {detector.name: _digest(detector), model.name: _digest(model)}
        except (OSError, ValueError, TypeError, StopIteration, RecursionError):
            pass  # what was mutated is no such file any more
        (place / MANIFEST).write_text(json.dumps({"files": known}), "utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Models:
    """A file of a model folder, or of the screening in it."""

    name = "models"

    def __init__(self, material: Material, work: Path) -> None:
        self.material, self.folder, self.out = material, work / "model", work / "out"
        self.files = files_of(material.model)
        fresh_copy(material.model, self.folder)
        self.uses: dict[str, tuple[Callable[[], Answer], Callable[[Any], Any]]] = {
            "predict": (
                lambda: command("predict", self.folder, material.parts, "--runtime", "torch", "--json"),
                lambda result: [(one["path"], round(one["score"], 3)) for one in result["images"]],
            ),
            "drift": (
                lambda: command("drift", self.folder, material.predictions, "--json"),
                lambda result: [result["training"], result["files"]],
            ),
            "calibrate": (
                lambda: command(
                    *("calibrate", self.folder, material.labelled, "--runtime", "torch", "--dry-run", "--json")
                ),
                lambda result: result["threshold"]["value"],
            ),
            "export-model": (
                lambda: command("export-model", self.folder, "--out", self.out / "line", "--json"),
                lambda result: result["threshold"]["value"],
            ),
            "export": (
                lambda: command("export", self.folder, "--to", "csv", "--out", self.out / "lists", "--json"),
                lambda result: [result["kept"], result["removed"]],
            ),
            "review": (lambda: function(self._reviewed), lambda result: result),
            "fit": (
                lambda: command(*material.fit(self.out / "model", "--screening", self.folder / "screening")),
                lambda result: [result["n_kept"], round(result["threshold"]["value"], 3)],
            ),
        }
        self.expected = {name: view(use().result) for name, (use, view) in self.uses.items()}

    def _reviewed(self) -> Any:
        review = Review.open(self.folder, cache=self.material.cache)
        review.page()
        review.overview()
        cards = review.content()
        return json.loads(json.dumps(cards, allow_nan=False))

    def try_one(self, draw: Generator) -> Outcome:
        """Mutate one file, with digests that fit or not, and use the folder."""
        fresh_copy(self.material.model, self.folder)
        shutil.rmtree(self.out, ignore_errors=True)
        name = self.files[int(draw.integers(len(self.files)))]
        what = mutate_file(self.folder, name, self.material.other, draw)
        is_sealed = name.name != MANIFEST and draw.random() < 0.4
        if is_sealed:
            seal(self.folder)
        of_screening = name.parts[0] == "screening"
        all_uses = ("export", "review", "fit") if of_screening else ("predict", "drift", "calibrate", "export-model")
        # a full export takes a second
        chances = None if of_screening else [0.6, 0.2, 0.15, 0.05]
        use = all_uses[int(draw.choice(len(all_uses), p=chances))]
        run, view = self.uses[use]
        # a person may edit the column kept; and who makes the digests fit may write what means something
        is_checked = not is_sealed and name.name != "screening.csv"
        names = [name.name, str(self.folder), "screening", "predictions.csv", "--images"]
        what = f"{what}{', digests made to fit' if is_sealed else ''}; {use}"
        return judged(run(), self.expected[use], what, names, is_checked=is_checked, view=view)


class Exports:
    """An exported file, and its card."""

    name = "exports"

    def __init__(self, material: Material, work: Path) -> None:
        self.sources, self.folder = {"onnx": material.onnx, "openvino": material.openvino}, work / "line"
        pictures = [material.parts / f"part-{n:02d}.png" for n in (0, 13)]
        self.pictures = [np.asarray(Image.open(path).convert("RGB"), np.uint8) for path in pictures]
        self.expected = {name: self._inspected(source) for name, source in self.sources.items()}

    def _inspected(self, folder: Path) -> Any:
        inspector = Inspector(folder, n_threads=1)
        verdicts = [inspector(picture) for picture in self.pictures]
        maps = [hashlib.sha256(v.map.tobytes()).hexdigest() for v in verdicts]
        told = [(v.score, v.p_value, v.threshold, bool(v.anomalous)) for v in verdicts]
        return json.loads(json.dumps([told, maps, inspector.card["calibration"]]))

    def try_one(self, draw: Generator) -> Outcome:
        """Mutate one file, and run what is there."""
        to = sorted(self.sources)[int(draw.integers(2))]
        fresh_copy(self.sources[to], self.folder)
        files = files_of(self.folder)
        name = files[int(draw.integers(len(files)))]
        what = f"{to}: {mutate_file(self.folder, name, None, draw)}"
        answer = function(lambda: self._inspected(self.folder))
        names = [name.name, name.with_suffix(".xml").name, str(self.folder)]
        return judged(answer, self.expected[to], what, names, is_checked=True, view=lambda result: result)


class Caches:
    """A file of the feature cache, or of unfinished work."""

    name = "caches"

    def __init__(self, material: Material, work: Path) -> None:
        self.material, self.work = material, work
        self.cache, self.out, self.resume = work / "cache", work / "out", work / "resume"
        fresh_copy(material.cache, self.cache)
        self.files = files_of(self.cache)
        self.expected = self._screened()
        self._leave_unfinished()

    def _arguments(self, *more: object) -> tuple[object, ...]:
        arguments = list(self.material.screen(self.out, *more))
        arguments[arguments.index(self.material.cache)] = self.cache
        return tuple(arguments)

    def _screened(self) -> Any:
        shutil.rmtree(self.out, ignore_errors=True)
        answer = command(*self._arguments())
        return [answer.code, (self.out / "screening.csv").read_text("utf-8")]

    def _leave_unfinished(self) -> None:
        """What a run by sub-models leaves that is ended after the last of them."""
        shutil.rmtree(self.out, ignore_errors=True)
        kept, rmtree = self.resume, shutil.rmtree

        def keep(path: Any, *args: Any, **options: Any) -> None:
            if Path(path).name == ".resume" and Path(path).is_dir():
                shutil.copytree(path, kept, dirs_exist_ok=True)
            rmtree(path, *args, **options)

        shutil.rmtree = keep  # type: ignore[assignment]
        try:
            answer = command(*self._arguments(*SUBMODELS))
        finally:
            shutil.rmtree = rmtree
        self.unfinished = files_of(self.resume)
        self.expected_submodels = [answer.code, (self.out / "screening.csv").read_text("utf-8")]

    def try_one(self, draw: Generator) -> Outcome:
        """Mutate one file, and screen."""
        fresh_copy(self.material.cache, self.cache)
        shutil.rmtree(self.out, ignore_errors=True)
        of_run = draw.random() < 0.3
        if of_run:
            folder, files, expected = self.out / ".resume", self.unfinished, self.expected_submodels
            fresh_copy(self.resume, folder)
        else:
            folder, files, expected = self.cache, self.files, self.expected
        name = files[int(draw.integers(len(files)))]
        what = mutate_file(folder, name, self.resume if of_run else self.cache, draw)
        verifies = not of_run and draw.random() < 0.2
        verified = command("cache", "verify", "--cache", self.cache, "--json") if verifies else None
        answer = command(*self._arguments(*(SUBMODELS if of_run else ())))
        names = [name.name, *name.parts[-2:-1], str(self.cache)]

        def view(_: Any) -> Any:
            return [answer.code, (self.out / "screening.csv").read_text("utf-8")]

        outcome = judged(answer, expected, what, names, is_checked=True, view=view)
        if verified is not None and verified.code not in (0, 1):
            return Outcome("fault", f"{what}; cache verify", verified.err)
        return outcome


SUBMODELS = ("--rank-by", "submodels", "--detector", "padim", "--subsets", "3")
