"""Render the tables of README.md, benchmarks/README.md and docs from the rows of benchmarks/results.

A table stands between `<!-- rows:NAME -->` and `<!-- /rows -->`; one without rows stays as it is. Accuracy is the mean
and the standard deviation over seeds, of the newest commit that has rows of a cell.

    python benchmarks/render.py           write
    python benchmarks/render.py --check   write nothing; exit 1 if a table is stale
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

import _answers
import _rows
import _tables
from _frames import Rows, newest, read, table, texts_of
from _rows import CONFIRMATION, DEVELOPMENT
from flawsift.files import write_text
from flawsift.screening.options import FINAL

PAGES = (
    _rows.ROOT / "README.md",
    _rows.ROOT / "benchmarks" / "README.md",
    *sorted((_rows.ROOT / "docs").rglob("*.md")),
)
MARKERS = re.compile(r"(<!-- rows:([\w-]+) -->\n)(.*?)(<!-- /rows -->)", re.DOTALL)
SPEED = Path(__file__).with_name("speed.csv")  # the lines of `speed`: script, key of its figures, text, format and goal


# ---- time and memory -------------------------------------------------------------------------------------------------


def speed(results: Path) -> str | None:
    """The headline figures of all speed scripts; the same key of a later run replaces an earlier one."""
    rows = {
        (row["name"], key): {**row, "value": value}
        for row in read(results / _rows.FIGURES).to_dict("records")
        for key, value in json.loads(row["figures"]).items()
    }
    lines = pd.read_csv(SPEED, dtype=str, keep_default_na=False).to_dict("records")
    used = [(line, rows[line["name"], line["key"]]) for line in lines if (line["name"], line["key"]) in rows]
    if not used:
        return None
    body = [[line["what"], line["format"].format(row["value"]), line["goal"]] for line, row in used]
    return table(["what", "measured", "goal"], body, Rows([row for _, row in used]), seeds=False)


def scale(results: Path) -> str | None:
    """Time and memory per number of images."""
    rows = read(results / "scale.csv")
    if rows.empty:
        return None
    rows = newest(rows, ["stage", "n_images"])
    body = []
    for (stage, n), some in rows.groupby(["stage", "n_images"]):
        last = some.iloc[-1]
        memory = ["-" if pd.isna(last[key]) else f"{last[key]:,.0f}" for key in ("peak_mb", "anonymous_mb")]
        per_image = f"{1000 * last['seconds_per_image']:.1f}"
        body.append([stage, f"{n:,}", *texts_of(some, {"seconds": 1}), per_image, *memory])
    header = ["stage", "images", "seconds", "ms per image", "peak MiB", "of it anonymous, MiB"]
    return table(header, body, rows, seeds=False)


def tiles(results: Path) -> str | None:
    """What the features of large pictures cost, by the way they are looked at."""
    rows = read(results / "tiles.csv")
    if rows.empty:
        return None
    rows = newest(rows, ["mode", "height", "width"]).sort_values("width", kind="stable")
    body = []
    for (width, height, mode), some in rows.groupby(["width", "height", "mode"], sort=False):
        last = some.iloc[-1]
        cut = f" of {str(last['tiles']).replace(':', ' that share ')}"
        if pd.isna(last["tiles"]):
            cut = ", of which one holds it" if mode.startswith("in tiles") else ""
        figures = [f"{last[key]:.2f}" for key in ("looked_at", "seconds", "cpu_seconds", "cpu_per_megapixel")]
        way, comma, by = mode.partition(", ")
        body.append([f"{width} x {height}", f"{way}{cut}{comma}{by}", *figures, f"{last['peak_mb']:,.0f}"])
    header = ["picture", "looked at", "megapixels of it", "seconds", "core seconds", "per megapixel", "peak MiB"]
    return table(header, body, rows, seeds=False)


def training(results: Path) -> str | None:
    """What a budget preset costs."""
    rows = read(results / "training.csv").dropna(subset=["seconds"])
    if rows.empty:
        return None
    rows = rows.groupby("detector", sort=False).tail(1)
    body = [
        [
            _tables.DETECTORS[row["detector"]],
            f"{row['seconds']:.0f}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['passes_per_image']:.0f}",
            f"{row['share_outside_products']:.0%}",
            "-" if pd.isna(row["batched_ratio"]) else f"{row['batched_ratio']:.2f}",
            f"{row['peak_mb']:,.0f}",
        ]
        for row in rows.to_dict("records")
    ]
    header = ["detector", "seconds", "per step", "backbone passes per image", "outside matrix products"]
    return table([*header, "five sub-models batched, against in turn", "peak MiB"], body, rows, seeds=False)


def peers(results: Path) -> str | None:
    """Both libraries side by side."""
    rows = read(results / "peers.csv")
    if rows.empty:
        return None
    rows = newest(rows, ["task", "library"])
    digits = {"seconds_fit": 1, "seconds_test": 1, "seconds": 3, "peak_mb": 0, "file_mb": 1, "value": 6}
    digits |= {"image_auroc": 4, "pixel_auroc": 4, "aupro": 4, "seconds_import": 1}
    groups = rows.groupby(["task", "library"], sort=False)
    body = [[task, library, *texts_of(some, digits)] for (task, library), some in groups]
    header = ["task", "library", "fit s", "test s", "alone s", "peak MiB", "model MB", "value"]
    return table([*header, "image AUROC", "pixel AUROC", "AUPRO", "import s"], body, rows, seeds=False)


def quorum_cost(results: Path) -> str | None:
    """Time and memory of Quorum by the number of images."""
    rows = read(results / "quorum.csv")
    rows = rows[rows["kind"] == "cost"] if len(rows) else rows
    if rows.empty:
        return None
    rows = rows[rows["commit"] == rows["commit"].iloc[-1]]
    body = [
        [
            f"{int(row['n']):,}",
            f"{row['seconds_fit'] + row['seconds_held_out']:.0f} s",
            f"{row['ms_score']:.0f} ms",
            f"{row['ms_score_and_map']:.0f} ms",
            f"{row['model_mb']:.0f} MB",
            f"{row['peak_mb'] / 1024:.1f} GiB",
        ]
        for _, row in rows.iterrows()
    ]
    header = ["images", "stage 1", "one image", "one image, with map", "model", "peak memory"]
    return table(header, body, rows, seeds=False)


def quorum_precision(results: Path) -> str | None:
    """Scores of Quorum by products of bfloat16 beside those of float32."""
    rows = read(results / "quorum.csv")
    rows = rows[(rows["kind"] == "precision") & rows["bfloat16"].astype(bool)] if len(rows) else rows
    if rows.empty:
        return None
    rows = rows.drop_duplicates("data", keep="last")
    header = ["set", "image AUROC", "by float32", "rank correlation of the scores"]
    body = [
        [row["data"], f"{row['auroc']:.4f}", f"{row['auroc_float32']:.4f}", f"{row['rank_correlation']:.5f}"]
        for _, row in rows.iterrows()
    ]
    return table(header, body, rows, seeds=False)


def export(results: Path) -> str | None:
    """Exported files beside the models that they were made of, the mean of the sets; differences are the largest."""
    rows = read(results / "export.csv")
    if rows.empty:
        return None
    rows = rows[rows["commit"] == rows["commit"].iloc[-1]]
    header = [
        "detector",
        "format",
        "sets",
        "largest difference of a score",
        "other verdicts",
        "image AUROC",
        "exported",
    ]
    header += ["ms a picture", "99th percentile", "by the model, ms", "start, s", "peak, MB", "file, MB"]
    body = []
    for (detector, to), some in rows.groupby(["detector", "to"], sort=False):
        texts = [str(detector), str(to), f"{len(some)}", f"{some['largest_difference'].max():.1g}"]
        texts += [f"{some['n_other_verdicts'].sum():.0f} of {some['n_test'].sum():.0f}"]
        texts += [f"{some[column].mean():.4f}" for column in ("auroc", "auroc_exported")]
        texts += [f"{some[column].mean():.0f}" for column in ("ms_median", "ms_p99", "ms_median_model")]
        texts += [f"{some['seconds_start'].mean():.2f}", f"{some['peak_mb'].max():.0f}", f"{some['file_mb'].max():.0f}"]
        body.append(texts)
    return table(header, body, rows)


def latency(results: Path) -> str | None:
    """One picture after the other, ours beside the inferencer of another library, all in one run."""
    rows = read(results / "latency.csv")
    if rows.empty:
        return None
    rows = rows[rows["commit"] == rows["commit"].iloc[-1]]
    body = [
        [
            *(str(row[column]) for column in ("detector", "library", "n_train")),
            *(f"{row[column]:.0f}" for column in ("ms_median", "ms_p99")),
            f"{row['seconds_start']:.2f}",
            *(f"{row[column]:.0f}" for column in ("peak_mb", "file_mb")),
        ]
        for row in rows.to_dict("records")
    ]
    header = [
        "detector",
        "run by",
        "training images",
        "ms a picture",
        "99th percentile",
        "start, s",
        "peak, MB",
        "file, MB",
    ]
    return table(header, body, rows, seeds=False)


def serving(results: Path) -> str | None:
    """Many clients of one server."""
    rows = read(results / "serving.csv")
    if rows.empty:
        return None
    rows = newest(rows, ["n_clients"])
    columns = ["n_clients", "n_requests", "n_damaged", "n_failed", "n_other_answers", "n_told_to_come_again"]
    body = [
        [
            *(f"{row[column]:,.0f}" for column in columns),
            *(f"{row[column]:,.0f}" for column in ("ms_median", "ms_p99")),
            f"{row['per_second']:.0f}",
        ]
        for row in rows.to_dict("records")
    ]
    header = [
        "clients",
        "requests",
        "damaged",
        "failed",
        "other answers",
        "told to come again",
        "median, ms",
        "99th percentile, ms",
    ]
    return table([*header, "requests a second"], body, rows, seeds=False)


def campaign(results: Path) -> str | None:
    """What came of mutated input and of kills in the last campaign."""
    path = results / "campaign.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path, dtype={"commit": str})
    called = {"fuzz": "input", "kill": "killed"}
    outcomes = ["same", "error", "told", "valid", "fault"]
    body = [
        [
            f"{called[row['task']]}: {row['name']}",
            f"{sum(row[o] for o in outcomes):,}",
            *(f"{row[o]:,}" for o in outcomes),
        ]
        for row in rows.to_dict("records")
    ]
    header = ["", "tries", "same answer", "clear error", "told", "other valid input", "faults"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    runs = [
        f"`{name}` at `{commit}`, seed {seed}: {', '.join(some['name']) if name == 'fuzz' else 'all'}"
        for (name, commit, seed), some in rows.groupby(["task", "commit", "seed"], sort=False)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{'; '.join(runs)}."


def plain(text: str | None) -> str | None:
    """A table without the line of where it was measured, for pages that link to one with it."""
    return None if text is None else text.split("\nCommit ")[0]


# ---- pages -----------------------------------------------------------------------------------------------------------


MEASURED: Mapping[str, Callable[[Path], str | None]] = {
    "accuracy": lambda r: _tables.accuracy(r, "patchcore", "image_auroc"),
    "accuracy-padim": lambda r: _tables.accuracy(r, "padim", "image_auroc"),
    "aupro": lambda r: _tables.localised(lambda metric: _tables.accuracy(r, "patchcore", metric)),
    "aupro-padim": lambda r: _tables.localised(lambda metric: _tables.accuracy(r, "padim", metric)),
    "detectors": lambda r: _tables.detectors(r, "all_data", "image_auroc"),
    "detectors-screened": lambda r: _tables.detectors(r, "default", "image_auroc"),
    "detectors-aupro": lambda r: _tables.localised(lambda metric: _tables.detectors(r, "all_data", metric)),
    "training": training,
    "goals": _tables.goals,
    "estimates": lambda r: _tables.estimates(r, DEVELOPMENT),
    "estimates-confirmed": lambda r: _tables.estimates(r, CONFIRMATION),
    "ablation": _tables.ablation,
    "stage1": lambda r: _tables.stage1(r, "patchcore"),
    "stage1-padim": lambda r: _tables.stage1(r, "padim"),
    "speed": speed,
    "scale": scale,
    "align": _tables.aligned,
    "framed": lambda r: _tables.framed(r, FINAL),
    "tiles": tiles,
    "confirmation": _tables.confirmation,
    "headline": _tables.headline,
    "headline-plain": lambda r: plain(_tables.headline(r)),
    "trim": _tables.trim,
    "verdict": lambda r: _tables.verdict(r, FINAL, DEVELOPMENT),
    "verdict-confirmed": lambda r: _tables.verdict(r, FINAL, CONFIRMATION),
    "verdict-patchcore": lambda r: _tables.verdict(r, "patchcore", DEVELOPMENT),
    "verdict-softpatch": lambda r: _tables.verdict(r, "softpatch", DEVELOPMENT),
    "verdict-padim": lambda r: _tables.verdict(r, "padim", DEVELOPMENT),
    "decisions": lambda r: _tables.decisions(r, FINAL),
    "decisions-patchcore": lambda r: _tables.decisions(r, "patchcore"),
    "quorum": lambda r: _tables.quorum(r, "image_auroc", DEVELOPMENT),
    "quorum-aupro": lambda r: _tables.localised(lambda metric: _tables.quorum(r, metric, DEVELOPMENT)),
    "quorum-confirmed": lambda r: _tables.quorum(r, "image_auroc", CONFIRMATION),
    "quorum-aupro-confirmed": lambda r: _tables.localised(lambda metric: _tables.quorum(r, metric, CONFIRMATION)),
    "quorum-stage1": lambda r: _tables.ranked(r, FINAL, DEVELOPMENT),
    "quorum-sizes": lambda r: _tables.sizes(r, FINAL),
    "patchcore-sizes": lambda r: _tables.sizes(r, "patchcore"),
    "quorum-cost": quorum_cost,
    "quorum-precision": quorum_precision,
    "rivals": lambda r: _tables.rivals(r, "image_auroc"),
    "rivals-aupro": lambda r: _tables.localised(lambda metric: _tables.rivals(r, metric)),
    "overlap": lambda r: _tables.detectors(r, "all_data", "image_auroc", overlap=True),
    "semantic": _tables.semantic,
    "peers": peers,
    "export": export,
    "latency": latency,
    "serving": serving,
    "campaign": campaign,
}
TABLES = {**MEASURED, **_answers.answers(MEASURED)}


def render(text: str, results: Path) -> str:
    """A page with its tables brought up to date.

    Raises:
        SystemExit: The page names an unknown table.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"Unknown table '{name}'; known are {', '.join(TABLES)}.")
        new = TABLES[name](results)
        return start + (old if new is None else f"\n{new}\n") + end

    return MARKERS.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Render all pages, or check them; the exit code."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    args = parser.parse_args(arguments)
    stale = []
    for page in PAGES:
        old = page.read_text("utf-8") if page.exists() else ""
        new = render(old, args.results)
        if new != old:
            stale.append(str(page.relative_to(_rows.ROOT)))
            if not args.check:
                write_text(page, new)
    if stale:
        _rows.say(f"{'Stale' if args.check else 'Rendered'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
