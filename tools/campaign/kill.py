"""Kills every command that writes at a random moment, and looks at what it leaves and what the next run makes of it."""

import json
import os
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flawsift.deploy.results import ResultsFile
from flawsift.features.store import FeatureStore
from flawsift.files import content_digest
from flawsift.models.model import load_model
from flawsift.review.refit import main as refit
from flawsift.review.session import Review
from flawsift.runtime import Inspector
from flawsift.screening.decisions import read_decisions
from flawsift.screening.storage import load_screening
from tools.campaign.material import Material, fresh_copy, make_material
from tools.campaign.outcome import Outcome, command

TORCH = ("--runtime", "torch")
LIMIT = 120.0  # seconds for one run
N_DECISIONS = 40  # that a reviewer makes in a row


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        run: Does it in a folder, and returns the exit code.
        result: What it has written there, as far as a rerun gives the same; raises where that cannot be read.
        prepare: Makes the folder what it is before, such as with an earlier result.
        holds: What is true of the folder after a kill, beside that the result is the old or the new one.
    """

    run: Callable[[Path], int]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda work: None
    holds: Callable[[Path], None] = lambda work: None


def jobs_of(material: Material) -> Mapping[str, Job]:
    """Every command that writes, by its name."""

    def job(
        arguments: Callable[[Path], tuple[object, ...]],
        result: Callable[[Path], Any],
        earlier: Callable[[Path], tuple[object, ...]] | None = None,
        more: Callable[[Path], object] = lambda work: None,
    ) -> Job:
        def prepare(work: Path) -> None:
            more(work)
            if earlier is not None:
                command(*earlier(work))

        return Job(lambda work: command(*arguments(work)).code or 0, result, prepare)

    def copied(work: Path) -> None:
        fresh_copy(material.model, work / "model")

    def own_cache(work: Path, *more: object) -> tuple[object, ...]:
        arguments = list(material.screen(work / "out", *more))
        arguments[arguments.index(material.cache)] = work / "cache"
        return tuple(arguments)

    slow = ("--rank-by", "submodels", "--detector", "patchcore", "--subsets", 3)
    given = (material.parts, "--out")
    return {
        "screen": job(
            lambda w: material.screen(w / "out"), _screening, lambda w: material.screen(w / "out", "--keep", 0.6)
        ),
        "screen by sub-models": job(
            lambda w: material.screen(w / "out", *slow), _screening, lambda w: material.screen(w / "out")
        ),
        "cache": job(lambda w: own_cache(w), _cached),
        "fit": job(lambda w: material.fit(w / "out"), _model, lambda w: material.fit(w / "out", "--keep", 0.6)),
        "predict": job(
            lambda w: ("predict", material.model, *given, w / "out", *TORCH),
            _predictions,
            lambda w: ("predict", material.other, *given, w / "out", *TORCH),
        ),
        "evaluate": job(
            lambda w: ("evaluate", material.model, material.labelled, "--out", w / "out", *TORCH),
            _evaluation,
            lambda w: ("evaluate", material.other, material.labelled, "--out", w / "out", *TORCH),
        ),
        "calibrate": job(
            lambda w: ("calibrate", w / "model", material.labelled, "--misses", 0.5, *TORCH), _threshold, more=copied
        ),
        "export-model": job(
            lambda w: ("export-model", material.model, "--out", w / "out", *TORCH),
            _exported,
            lambda w: ("export-model", material.other, "--out", w / "out", *TORCH),
        ),
        "export": job(
            lambda w: ("export", material.model, "--to", "folder", "--out", w / "out"),
            lambda w: sorted((p.relative_to(w).as_posix(), content_digest(p.read_bytes())) for p in _files(w / "out")),
        ),
        "watch": _watch_job(material),
        "review": _review_job(material),
        "refit": Job(
            lambda w: refit(_refit_arguments(material, w)),
            lambda w: _model(w, "model"),
            lambda w: _decided(material, w),
        ),
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def _page(path: Path) -> bool:
    """Whether a page is there, which is whole then."""
    if path.exists():
        assert path.read_text("utf-8").rstrip().endswith("</html>"), f"{path.name} is not whole"
    return path.exists()


def _screening(work: Path, folder: str = "out") -> Any:
    found = load_screening(work / folder)
    return [found.names, found.consensus.tolist(), found.kept.tolist(), _page(work / folder / "report.html")]


def _cached(work: Path) -> Any:
    store = FeatureStore(work / "cache")
    assert not store.verify(), "the cache is damaged"
    return _screening(work)


def _model(work: Path, folder: str = "out") -> Any:
    model = load_model(work / folder, runtime="torch")
    numbers = [np.asarray(value, np.float64).sum() for value in model.calibration.thresholds]
    state = content_digest((next((work / folder).glob("state-*.safetensors"))).read_bytes())
    return [state, numbers, _page(work / folder / "report.html"), _screening(work, f"{folder}/screening")[:3]]


def _predictions(work: Path) -> Any:
    for path in (work / "out" / "maps").rglob("*.png"):
        Image.open(path).load()
    return (work / "out" / "predictions.csv").read_text("utf-8")


def _evaluation(work: Path) -> Any:
    metrics = json.loads((work / "out" / "metrics.json").read_bytes())
    _page(work / "out" / "report.html")
    table = (work / "out" / "predictions.csv").read_text("utf-8")
    assert table.endswith("\n"), "the table is cut off"
    return [metrics, table]


def _threshold(work: Path) -> Any:
    _page(work / "model" / "calibration.html")
    threshold = load_model(work / "model", runtime="torch").threshold()
    return None if threshold is None else [threshold.value, threshold.false_alarm_rate]


def _exported(work: Path) -> Any:
    inspector = Inspector(work / "out", n_threads=1)
    verdict = inspector(np.full((64, 64, 3), 90, np.uint8))
    return [verdict.score, verdict.threshold]


def _watch_job(material: Material) -> Job:
    """Each image has one row and lies where it says, killed or not."""
    names = {path.name: content_digest(path.read_bytes()) for path in material.parts.iterdir()}

    def run(work: Path) -> int:
        arguments = ("--out", work / "results.jsonl", "--once", "--settle", 0, "--sort", "move")
        return command("watch", material.onnx, work / "line", *arguments).code or 0

    def rows(work: Path) -> list[Any]:
        path = work / "results.jsonl"
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        (work / "seen.jsonl").write_bytes(b"".join(whole[:2]))
        return [row for row, _ in ResultsFile(work / "seen.jsonl").rows()]

    def holds(work: Path) -> None:
        found = rows(work)
        assert len({row.file for row in found}) == len(found), "an image has two rows"
        there = {path.name: content_digest(path.read_bytes()) for path in _files(work / "line")}
        assert there == names, "an image is lost, or another one"

    def result(work: Path) -> Any:
        holds(work)
        found = rows(work)
        assert all(not row.to or (work / "line" / row.to).exists() for row in found), (
            "an image is not where its row says"
        )
        return sorted([row.file, row.status, row.score] for row in found)

    return Job(run, result, lambda work: fresh_copy(material.parts, work / "line"), holds)


def _review_job(material: Material) -> Job:
    """What was confirmed is on the disk, and the table is whole."""

    def run(work: Path) -> int:
        review = Review.open(work / "model", cache=material.cache)
        with open(work / "confirmed", "ab", buffering=0) as confirmed:
            for n in range(N_DECISIONS):
                id_ = int(review.screening.ids[n % len(review.screening.ids)])
                name = review.screening.names[n % len(review.screening.ids)]
                seen = review.store.since(-1)[1]
                version = seen[name].version if name in seen else 0
                choice = ("keep", "remove", "unsure")[n // len(review.screening.ids)]
                answer = review.decide([{"id": id_, "decision": choice, "version": version}])
                assert not answer["refused"], answer
                confirmed.write(f"{name},{choice}\n".encode())
        return 0

    def holds(work: Path) -> None:
        path, told = work / "model" / "screening" / "decisions.csv", work / "confirmed"
        lines = told.read_text("utf-8").splitlines() if told.exists() else []
        last = dict(line.split(",") for line in lines if "," in line)
        on_disk = read_decisions(path) if path.exists() else {}
        # of the image at hand, the next choice may be on the disk before it was confirmed
        lost = [name for name, choice in last.items() if name not in on_disk]
        others = [name for name, choice in last.items() if on_disk.get(name) != choice]
        assert not lost, f"decisions are lost: {lost}"
        assert len(others) <= 1, f"decisions are others: {others}"

    def result(work: Path) -> Any:
        holds(work)
        return read_decisions(work / "model" / "screening" / "decisions.csv")

    def prepare(work: Path) -> None:
        fresh_copy(material.model, work / "model")

    return Job(run, result, prepare, holds)


def _decided(material: Material, work: Path) -> None:
    fresh_copy(material.model, work / "model")
    shutil.copy(material.tables / "decisions.csv", work / "decisions.csv")


def _refit_arguments(material: Material, work: Path) -> list[str]:
    arguments = {"screening": work / "model" / "screening", "out": work / "model", "decisions": work / "decisions.csv"}
    arguments |= {"images": material.parts, "cache": material.cache}
    return [text for name, path in arguments.items() for text in (f"--{name}", str(path))]


def started(run: Callable[[], int], log: Path) -> int:
    """Run something in a process of its own, forked so that its imports are made; its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        null = os.open(os.devnull, os.O_RDONLY)
        reading, _ = os.pipe()  # stays open: the process of a refit ends with its stdin
        os.dup2(reading, 0)
        os.close(null)
        code = run()
    except BaseException:  # noqa: BLE001  # nothing may go on as a second campaign
        log.write_text(traceback.format_exc(), "utf-8")
    os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a process, negative of a signal; None where it has not ended in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


class Killer:
    """Kills one job after the other."""

    def __init__(self, material: Material, root: Path, names: Sequence[str] | None) -> None:
        self.root = root
        self.jobs = {name: job for name, job in jobs_of(material).items() if names is None or name in names}
        self.before, self.after, self.seconds = dict[str, Any](), dict[str, Any](), dict[str, float]()
        for n, (name, job) in enumerate(self.jobs.items()):
            work = self._prepared(name, root / f"whole-{n}")
            self.before[name] = _told(job, work)
            begun = time.monotonic()
            code = ended(started(lambda: job.run(work), root / "log"), LIMIT)  # noqa: B023  # likewise
            self.seconds[name] = time.monotonic() - begun
            if code != 0:
                raise RuntimeError(f"{name} fails without a kill: {code}, {(root / 'log').read_text('utf-8')}")
            self.after[name] = job.result(work)

    def _prepared(self, name: str, work: Path) -> Path:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        code = ended(started(lambda: _done(self.jobs[name].prepare, work), self.root / "log"), LIMIT)
        assert code == 0, (name, code)
        return work

    def kill(self, name: str, share: float) -> Outcome:
        """Kill a job after a share of the time that it takes, and run it again."""
        job, what = self.jobs[name], f"{name} killed after {share:.3f} of its time"
        work, log = self._prepared(name, self.root / "killed"), self.root / "log"
        child = started(lambda: job.run(work), log)
        code = ended(child, share * self.seconds[name])
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        elif code != 0:
            return Outcome("fault", what, f"it failed by itself: {log.read_text('utf-8')[-1500:]}")
        try:
            job.holds(work)
        except Exception as error:  # noqa: BLE001  # whatever it is, a kill has left it
            return Outcome("fault", what, f"after the kill: {error!r}")
        left = _told(job, work)
        partial = name in ("watch", "review")  # these go on image by image, see `holds`
        if left not in (self.before[name], self.after[name]) and not partial and not _is_absent(left, name):
            return Outcome("fault", what, f"neither old nor new: {str(left)[:800]}")
        if name == "export" and left == self.after[name]:
            return Outcome("same", what, "the new one")  # once it is whole, nothing replaces it
        child = started(lambda: job.run(work), log)
        code = ended(child, LIMIT)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if code != 0:
            return Outcome("fault", what, f"the next run ended with {code}: {log.read_text('utf-8')[-1500:]}")
        again = _told(job, work)
        if again != self.after[name]:
            return Outcome("fault", what, f"the next run gave another result: {str(again)[:800]}")
        return Outcome("same", what, "the new one" if left == self.after[name] else "the old one")


def _done(prepare: Callable[[Path], object], work: Path) -> int:
    prepare(work)
    return 0


def _told(job: Job, work: Path) -> Any:
    """A result, or why there is none, wherever the folder is."""
    try:
        return job.result(work)
    except Exception as error:  # noqa: BLE001  # it is compared, and shown where it should not be
        return f"{type(error).__name__}: {error}".replace(str(work), "")


def _is_absent(left: Any, name: str) -> bool:
    """Whether the parts that are whole or absent, each by itself, are just not there yet."""
    apart = name in ("predict", "evaluate")  # a table for people beside its pictures
    return apart and isinstance(left, str) and left.startswith("FileNotFoundError")


def kill(
    tries: Iterable[int], seed: int, root: Path, say: Callable[[str], object], names: Sequence[str] | None = None
) -> dict[str, Counter[str]]:
    """Kill each command in turn; counts of outcomes by command.

    Args:
        tries: Which kills of the seed.
        seed: Of all moments.
        root: A new folder for all of it.
        say: Told of faults.
        names: Of the commands; None for all.
    """
    root.mkdir()
    # in a process of its own, since threads of a runtime would not be there in those that are forked
    if ended(started(lambda: _made(root / "material"), root / "log"), LIMIT) != 0:
        raise RuntimeError((root / "log").read_text("utf-8"))
    killer, counts = Killer(Material(root / "material"), root, names), dict[str, Counter[str]]()
    chosen = sorted(killer.jobs)
    for k in tries:
        name, share = chosen[k % len(chosen)], float(np.random.default_rng([seed, k]).uniform(0, 1.05))
        outcome = killer.kill(name, share)
        counts.setdefault(name, Counter())[outcome.kind] += 1
        if outcome.kind == "fault":
            again = f"python -m tools.campaign kill --seed {seed} --only {k}"
            say(f"FAULT: {outcome.what}\n  {outcome.said}\n  again: {again}")
    return counts


def _made(root: Path) -> int:
    make_material(root)
    return 0
