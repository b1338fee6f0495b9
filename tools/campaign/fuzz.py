"""Runs areas of mutations: each in a process of its own, so that a crash or a hang is one more outcome."""

import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tools.campaign.area_folders import Caches, Exports, Models
from tools.campaign.area_images import Images
from tools.campaign.area_requests import Requests
from tools.campaign.area_tables import Options, Tables
from tools.campaign.material import Material, make_material
from tools.campaign.outcome import Outcome

LIMIT = 60.0  # seconds for one mutation: the slowest takes two


class Area(Protocol):
    """One kind of input."""

    def try_one(self, draw: np.random.Generator) -> Outcome:
        """Mutate something, use it, and say what came of it."""


AREAS: Mapping[str, Callable[[Material, Path], Area]] = {
    area.name: area for area in (Images, Models, Exports, Caches, Tables, Options, Requests)
}


def tried(area: Area, name: str, seed: int, n: int) -> Outcome:
    """Mutation n of an area, which follows from seed and n alone."""
    return area.try_one(np.random.default_rng([seed, sorted(AREAS).index(name), n]))


def work(name: str, material: Path, seed: int, first: int) -> None:
    """Mutate from `first` on until the process is ended; a line of JSON on stdout before and after each."""
    with tempfile.TemporaryDirectory(prefix="flawsift-fuzz-") as folder:
        out = os.fdopen(os.dup(1), "w")  # before anything else writes to stdout
        area = AREAS[name](Material(material), Path(folder) / name)
        for n in itertools.count(first):
            out.write(json.dumps({"n": n}) + "\n")
            out.flush()
            outcome = tried(area, name, seed, n)
            out.write(json.dumps({"n": n, **vars(outcome)}) + "\n")
            out.flush()


class Worker:
    """A process that mutates in one area, and is started again where it dies."""

    def __init__(self, name: str, material: Path, seed: int, first: int) -> None:
        self.name, self.material, self.seed = name, material, seed
        self.first = self.next = first
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tools.campaign", "work", "--area", self.name, "--seed", str(self.seed)]
        command += ["--material", str(self.material), "--first", str(self.next)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # until the process has ended
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, env=environment)
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: "subprocess.Popen[bytes]", lines: "queue.Queue[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(b"")

    def outcomes(self, until: float) -> Iterator[tuple[int, Outcome]]:
        """Outcomes until a time of the monotonic clock."""
        begun = False
        while True:
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                line = self.lines.get(timeout=min(LIMIT, left) if begun else left)
            except queue.Empty:
                if time.monotonic() >= until:
                    break
                yield self._died(f"a hang: no end within {LIMIT:g} s")
                begun = False
                continue
            if not line and not begun and self.next == self.first:
                raise RuntimeError(f"{self.name} cannot begin: {self._said()}")
            if not line:
                yield self._died(f"the process ended: {self._said()}")
                begun = False
                continue
            told = json.loads(line)
            begun = True
            if "kind" in told:
                n = told.pop("n")
                self.next = n + 1
                yield n, Outcome(**told)

    def _said(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        return f"code {code}: {self.errors.read().decode('utf-8', 'replace')[-1500:]}"

    def _died(self, why: str) -> tuple[int, Outcome]:
        self.end()
        n, self.next = self.next, self.next + 1
        self._start()
        return n, Outcome("fault", "see the reproduction", why)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()


def fuzz(minutes: float, seed: int, areas: list[str], say: Callable[[str], object]) -> dict[str, Counter[str]]:
    """Mutate in all areas, two at a time, for some minutes together; counts of outcomes by area.

    Args:
        minutes: For all areas.
        seed: Of every mutation.
        areas: Names.
        say: Told of faults, and how far it is.
    """
    with tempfile.TemporaryDirectory(prefix="flawsift-material-") as folder:
        material = make_material(Path(folder) / "material").root
        counts: dict[str, Counter[str]] = {name: Counter() for name in areas}
        waiting: queue.Queue[str] = queue.Queue()
        for name in areas:
            waiting.put(name)
        lanes = min(2, len(areas))
        seconds = 60 * minutes * lanes / len(areas)

        def lane() -> None:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                worker = Worker(name, material, seed, 0)
                try:
                    for n, outcome in worker.outcomes(time.monotonic() + seconds):
                        counts[name][outcome.kind] += 1
                        if outcome.kind == "fault":
                            say(fault_line(name, seed, n, outcome))
                finally:
                    worker.end()
                say(f"{name}: {dict(counts[name])}")

        threads = [threading.Thread(target=lane) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return counts


def fault_line(name: str, seed: int, n: int, outcome: Outcome) -> str:
    """A fault, with how to see it again."""
    again = f"python -m tools.campaign fuzz --area {name} --seed {seed} --only {n}"
    return f"FAULT in {name}: {outcome.what}\n  {outcome.said}\n  again: {again}"


def only(name: str, seed: int, n: int) -> Outcome:
    """One mutation in this process, to see it again."""
    with tempfile.TemporaryDirectory(prefix="flawsift-fuzz-") as folder:
        material: Any = make_material(Path(folder) / "material")
        return tried(AREAS[name](material, Path(folder) / name), name, seed, n)
