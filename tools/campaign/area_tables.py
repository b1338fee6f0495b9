"""Tables and options that people write."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.campaign.material import BACKBONE, Material
from tools.campaign.mutate import ODD_VALUES, Generator, change_bytes, change_table
from tools.campaign.outcome import Answer, Outcome, command, judged

# What errors call the rows of a table that was given by an option of that name, or by the argument LABELLED.
CALLED = {
    "decisions.csv": ["decisions"],
    "reviewed.csv": ["decisions", "labelled"],
    "groups.csv": ["groups"],
    "labels.csv": ["labels"],
}


class Tables:
    """Decisions, groups, labels, tables of predictions, and the results of a watch."""

    name = "tables"

    def __init__(self, material: Material, work: Path) -> None:
        self.material, self.work, self.out = material, work, work / "out"
        work.mkdir(parents=True)
        tables, model = material.tables, material.model
        self.sources = {
            "decisions.csv": tables / "decisions.csv",
            "groups.csv": tables / "groups.csv",
            "labels.csv": tables / "labels.csv",
            "reviewed.csv": tables / "reviewed.csv",
            "predictions.csv": material.predictions / "predictions.csv",
        }
        fit = ("--no-screen", "--detector", "padim")
        self.uses: dict[str, list[Callable[[Path], Answer]]] = {
            "decisions.csv": [
                lambda path: command(*material.fit(self.out / "m", "--decisions", path, *fit)),
                lambda path: command("export", model, "--to", "csv", "--out", self.out, "--decisions", path, "--json"),
            ],
            "reviewed.csv": [
                lambda path: command(
                    *("calibrate", model, path, "--images", material.labelled / "test", "--dry-run"),
                    *("--runtime", "torch", "--json"),
                )
            ],
            "groups.csv": [lambda path: command(*material.screen(self.out / "s", "--groups", path))],
            "labels.csv": [
                lambda path: command(
                    *("diagnose", material.parts, "--labels", path, "--layer", "stride8", *BACKBONE),
                    *("--cache", material.cache, "--out", self.out, "--json"),
                )
            ],
            "predictions.csv": [lambda path: command("drift", model, path, "--json")],
        }
        for ending in ("jsonl", "csv"):
            name = f"results.{ending}"
            run = command("watch", material.onnx, material.parts, "--out", work / name, "--once", "--settle", 0)
            assert run.code == 0, run.err
            self.sources[name] = work / f"whole.{ending}"
            (work / name).rename(self.sources[name])
            self.uses[name] = [self._watched]
        self.expected = {
            (name, n): _plain(self._use(name, n, source.read_bytes()).result)
            for name, source in self.sources.items()
            for n in range(len(self.uses[name]))
        }

    def _use(self, name: str, use: int, content: bytes) -> Answer:
        path = self.work / name
        path.write_bytes(content)
        shutil.rmtree(self.out, ignore_errors=True)
        return self.uses[name][use](path)

    def _watched(self, path: Path) -> Answer:
        """Of rows that are there, none is lost; a changed one may stand for another image, which is scored then."""
        before = path.read_bytes()
        answer = command(
            *("watch", self.material.onnx, self.material.parts, "--out", path, "--once"),
            *("--settle", 0, "--timeout", 0),
        )
        if answer.code != 0:
            return answer
        whole = before[: before.rfind(b"\n") + 1]
        return Answer(0, json.dumps(path.read_bytes().startswith(whole)), "")

    def try_one(self, draw: Generator) -> Outcome:
        """Mutate one table, and use it."""
        names = sorted(self.sources)
        name = names[int(draw.integers(len(names)))]
        content = self.sources[name].read_bytes()
        others = [source.read_bytes() for source in self.sources.values()]
        if name.endswith(".csv") and draw.random() < 0.7:
            what, changed = change_table(content, draw)
        else:
            what, changed = change_bytes(content, draw, others)
        use = int(draw.integers(len(self.uses[name])))
        answer = self._use(name, use, changed)
        if name.startswith("results") and answer.code == 0 and not answer.result:
            return Outcome("fault", f"{name}: {what}", "whole rows were lost")
        is_checked = name.startswith("results")
        names, expected = [name, *CALLED.get(name, ())], self.expected[name, use]
        return judged(answer, expected, f"{name}: {what}", names, is_checked=is_checked, view=_plain)


def _plain(result: Any) -> Any:
    """A result without what differs from run to run."""
    if isinstance(result, dict):
        return {k: _plain(v) for k, v in result.items() if k not in ("seconds", "out", "report", "log", "versions")}
    return [_plain(one) for one in result] if isinstance(result, list) else result


# Values of options: of other types, beyond every range, and a few that are right. Of whole numbers no large ones: work
# that takes hours when it is asked for is no fault.
VALUES = (
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "x",
    "",
    "None",
    "null",
    "true",
    "[]",
    "{}",
    "[1]",
    '"x"',
    "[" * 3000,
    "é",
    "auto",
    "mean",
    "quorum",
    "../x",
    "0.001",
    "5",
    "٣",
    "1_0",
    "\x00",
    "9" * 30,
)
FLAGS = (
    "--keep",
    "--subsets",
    "--partitions",
    "--size",
    "--seed",
    "--false-alarm-rate",
    "--backbone",
    "--runtime",
    "--detector",
    "--detector-preset",
    "--preset",
    "--rank-by",
    "--device",
    "--executor",
    "--screener",
    "--consensus",
    "--groups",
    "--decisions",
    "--weights",
    "--screening",
    "--normalize",
    "--set",
)
DETECTORS = ("quorum", "padim", "patchcore", "softpatch", "inreach")


class Options:
    """Options of commands, parameters of detectors, and the file of a benchmark."""

    name = "options"

    def __init__(self, material: Material, work: Path) -> None:
        self.material, self.work, self.out = material, work, work / "out"
        work.mkdir(parents=True)
        self.grid = (material.tables / "grid.toml").read_text("utf-8")
        self.plan = command("benchmark", material.tables / "grid.toml", "--out", self.out, "--dry-run", "--json").result
        from flawsift.detectors.registry import detector_class

        self.params = {name: sorted(detector_class(name)().params()) for name in DETECTORS}

    def try_one(self, draw: Generator) -> Outcome:
        """Give a command something odd."""
        shutil.rmtree(self.out, ignore_errors=True)
        value = VALUES[int(draw.integers(len(VALUES)))]
        way = int(draw.integers(3))
        if way == 0:
            return self._try_grid(draw)
        if way == 1:
            detector = DETECTORS[int(draw.integers(len(DETECTORS)))]
            names = self.params[detector]
            name = names[int(draw.integers(len(names)))]
            more = ["--no-screen", "--detector", detector, "--set", f"{name}={value}"]
            names = [name, "--set", detector]
        else:
            flag = FLAGS[int(draw.integers(len(FLAGS)))]
            more = [flag, value]
            names = [flag, flag.strip("-").replace("-", "_"), flag.strip("-"), value[:20]]
        answer = command(*self.material.fit(self.out / "m", *more))
        what = f"fit {' '.join(more)[:80]}"
        # an odd value that is refused is named by its option, by its parameter or by itself; which error it is depends
        outcome = judged(answer, None, what, [*names, ""], is_checked=False, view=_threshold)
        return Outcome("valid", what, outcome.said) if outcome.kind == "told" else outcome

    def _try_grid(self, draw: Generator) -> Outcome:
        path = self.work / "grid.toml"
        if draw.random() < 0.5:
            what, content = change_bytes(self.grid.encode(), draw)
        else:
            what, content = _other_value(self.grid, draw)
        path.write_bytes(content)
        answer = command("benchmark", path, "--out", self.out, "--dry-run", "--json")
        return judged(answer, self.plan, f"grid.toml: {what}", [""], is_checked=False, view=lambda result: result)


def _threshold(result: Any) -> Any:
    """Of a fit that took what was given: its threshold, which is a number or none."""
    threshold = result["threshold"]
    assert threshold is None or math.isfinite(threshold["value"])
    return threshold


def _other_value(grid: str, draw: Generator) -> tuple[str, bytes]:
    lines = grid.splitlines()
    at = [n for n, line in enumerate(lines) if " = " in line]
    n = at[int(draw.integers(len(at)))]
    key = lines[n].partition(" = ")[0]
    odd = ODD_VALUES[int(draw.integers(len(ODD_VALUES)))]
    texts = (
        json.dumps(odd),
        "nan",
        "-inf",
        "1979-05-27",
        "[[1]]",
        "{}",
        "{ x = 1 }",
        "'''",
        "0x" + "f" * 40,
        "[-1, 0.5, 2]",
    )
    text = texts[int(draw.integers(len(texts)))]
    lines[n] = f"{key} = {text}" if draw.random() < 0.8 else f"{key}x = {text}"
    return f"{lines[n][:60]!r}", "\n".join(lines).encode("utf-8", "surrogatepass")
