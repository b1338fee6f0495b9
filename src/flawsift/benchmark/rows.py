"""Measured rows in CSV files, and where a figure comes from: code, machine, memory."""

import csv
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flawsift.benchmark.extra import needed_for
from flawsift.errors import InputError
from flawsift.files import alone, ensure_folder
from flawsift.paths import show
from flawsift.tables import cells_of, write_csv

Row = dict[str, Any]


def machine() -> Row:
    """Processor, cores, memory and system of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    with needed_for("The machine's memory in a row"):
        import psutil
    gib = psutil.virtual_memory().total / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "gib": round(gib), "os": platform.system()}


@functools.cache
def source_commit() -> str:
    """Short hash of the checkout that this package lies in, "-dirty" when its code differs; "" when it is installed."""
    package = Path(__file__).resolve().parent.parent
    try:
        top = Path(_git(package, "rev-parse", "--show-toplevel"))
        if package != top / "src" / "flawsift":
            return ""  # somebody else's repository around an installed package
        return _git(top, "rev-parse", "--short", "HEAD") + (
            "-dirty" if _git(top, "status", "--porcelain", "src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def peak_mb() -> float:
    """The largest resident size of this process so far, in MiB; file pages read through memory maps count."""
    if sys.platform == "win32":
        with needed_for("Peak memory on Windows"):
            import psutil
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource  # Windows has none

    units = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def read_rows(path: Path, needs: Sequence[str] = ()) -> list[dict[str, str]]:
    """All rows of a CSV file; none if it does not exist.

    Raises:
        InputError: It is no CSV table in UTF-8, or has rows and lacks a column of `needs`.
    """
    if not path.exists():
        return []
    try:
        header, *rows = cells_of(path.read_bytes()) or [[]]
        if rows and (lacking := [name for name in needs if name not in header]):
            raise ValueError(f"no column '{lacking[0]}'")
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"'{show(path)}' holds no rows of a benchmark: {error}. Take a copy of it, or move it away and run again."
        ) from error
    return [dict(itertools.zip_longest(header, row[: len(header)], fillvalue="")) for row in rows]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file in one step. Columns keep their place; new ones come last; None is an empty cell.

    Processes that add to one file take turns, so that none loses the rows of another.
    """
    if not rows:
        return
    ensure_folder(path.parent)
    with alone(path):
        all_rows: list[Mapping[str, Any]] = [*read_rows(path), *rows]
        header = list(dict.fromkeys(key for row in all_rows for key in row))
        write_csv(path, header, [[_cell(row.get(key)) for key in header] for row in all_rows])


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value
