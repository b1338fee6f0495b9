"""What every benchmark shares: where a figure comes from, rows in CSV files, and work in processes of its own."""

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawsift.benchmark.rows import Row, append_rows, machine, peak_mb, read_rows

__all__ = ["Row", "append_rows", "machine", "peak_mb", "read_rows"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = "figures.csv"  # one row per finished script
MIB = 2**20
# Choices are made on the first; the second, of the same kinds, is looked at once, when all of them are made.
DEVELOPMENT = ("magnetic_tile", "screw", "elpv", "piped/PA_BDP01_TL", "piped/PA_BFT01_TL", "piped/PA_BRG01_RL")
CONFIRMATION = ("cookie", "piped/PA_BRG02_RL", "piped/PA_BRG03_TL", "piped/PA_BTN01_RL")
CODE = ("src", "benchmarks/*.py", "constraints.txt")  # a change of these makes a commit "-dirty"


@functools.cache
def commit() -> str:
    """Short hash of the checkout at the first call, "-dirty" when its code differs; "unknown" without a repository."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of what can change a score or its speed."""
    from flawsift.models.provenance import versions as known

    return known()


def provenance() -> Row:
    """The columns that every row starts with."""
    import torch

    return {
        "commit": commit(),
        "machine": json.dumps(machine()),
        "versions": json.dumps(versions()),
        "n_threads": torch.get_num_threads(),
    }


class PeakAnonymous:
    """The largest anonymous resident size during a block, sampled; memory maps of files do not count.

    Attributes:
        mb: MiB, or None where the system does not tell.
    """

    mb: float | None = None

    def __enter__(self) -> "PeakAnonymous":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.mb = max(self.mb or 0.0, int(line.split()[1]) / 1024)


def common_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Flags of every script."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
    return parser


def finish(name: str, figures: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Append the figures of a finished script to figures.csv and print them as the last line of stdout."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    # paths are those of a machine, and change no figure
    params = {k: v for k, v in vars(args).items() if k != "child" and v is not None and not isinstance(v, Path)}
    row = {"name": name, **provenance(), "params": json.dumps(params, default=str), "figures": json.dumps(shown)}
    append_rows(args.results / FIGURES, [row])
    print(json.dumps({"benchmark": name, "commit": row["commit"], **shown}), flush=True)


def say(text: str) -> None:
    """For people: stderr, so that stdout stays JSON."""
    print(text, file=sys.stderr, flush=True)


def run_json(
    script: str | Path, *arguments: object, python: str | Path = sys.executable, environment: Mapping[str, str] = {}
) -> Row:
    """Run a script in its own process; what its last line of stdout says.

    Raises:
        RuntimeError: It fails or says nothing.
    """
    command = [str(python), str(script), *(str(a) for a in arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command[1:])} ended with code {done.returncode}; its messages are above.")
    result: Row = json.loads(lines[-1])
    return result
