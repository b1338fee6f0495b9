"""The last campaign as rows of a CSV file, of which benchmarks/render.py makes the table of docs/reliability.md."""

import csv
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from flawsift.tables import write_csv
from tools.campaign.outcome import KINDS

HEADER = ["commit", "seed", "task", "name", *KINDS]


def write_rows(path: Path, task: str, seed: int, counts: Mapping[str, Counter[str]]) -> None:
    """Write the rows of a task in place of its earlier ones of the same names."""
    rows: list[list[object]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            earlier = [row for row in csv.DictReader(file) if row["task"] != task or row["name"] not in counts]
            rows = [[row[name] for name in HEADER] for row in earlier]
    rows += [[_commit(), seed, task, name, *(count[kind] for kind in KINDS)] for name, count in sorted(counts.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, HEADER, sorted(rows, key=lambda row: (str(row[2]), str(row[3]))))


def _commit() -> str:
    """Of the checkout; "-dirty" where its code differs, "unknown" without one."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ":/src", ":/tools")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
