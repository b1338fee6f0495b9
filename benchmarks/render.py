"""Render the tables of benchmarks/README.md and README.md from the rows of benchmarks/results.

A table stands between `<!-- rows:NAME -->` and `<!-- /rows -->`; one without rows stays as it is. Accuracy is the mean
and the standard deviation over seeds, of the newest commit that has rows of a cell.

    python benchmarks/render.py           write
    python benchmarks/render.py --check   write nothing; exit 1 if a table is stale
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import _rows
from flawsift.files import write_text

PAGES = (_rows.ROOT / "benchmarks" / "README.md", _rows.ROOT / "README.md")
MARKERS = re.compile(r"(<!-- rows:([\w-]+) -->\n)(.*?)(<!-- /rows -->)", re.DOTALL)
ARMS = {"all_data": "no screening", "paper": "paper", "default": "default", "oracle_clean": "oracle"}
DETECTORS = {
    "twobanks": "TwoBanks",
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "softpatch": "SoftPatch",
    "inreach": "InReaCh",
    "funad": "FUN-AD",
    "cflow": "CFlow",
    "simplenet": "SimpleNet",
    "uniad": "UniAD",
    "destseg": "DeSTSeg",
    "rd": "RD",
    "dinomaly": "Dinomaly",
}
CELL = ("data", "detector", "alpha", "arm")

Rows = Sequence[Mapping[str, str]]

# figures.csv: (script, key, what, format, goal); the same key of a later run replaces an earlier one
SPEED = (
    (
        "screening",
        "patchcore_cost_ratio",
        "PatchCore: screening and training against one plain fit",
        "{:.2f} x",
        "<= 3",
    ),
    ("screening", "padim_cost_ratio", "PaDiM: the same, by sub-models of its own", "{:.2f} x", "<= 1.5"),
    ("screening", "padim_cost_ratio_by_patchcore", "PaDiM: the same, screened by PatchCore", "{:.2f} x", ""),
    (
        "screening",
        "twobanks_cost_ratio_by_patchcore",
        "TwoBanks, what `fit` does by default: both stages against one plain fit",
        "{:.2f} x",
        "",
    ),
    ("screening", "twobanks_by_patchcore_seconds", "the same in seconds, 400 images, cold cache", "{:.0f} s", ""),
    ("screening", "backbone_passes_per_image", "backbone passes per image", "{:.2f}", "1"),
    ("peers", "patchcore_speedup", "PatchCore fit and test against anomalib 2.7.0", "{:.1f} x faster", ""),
    ("peers", "padim_speedup", "PaDiM fit and test against anomalib 2.7.0", "{:.1f} x faster", ""),
    ("peers", "coreset_speedup", "greedy coreset alone, against anomalib 2.7.0", "{:.1f} x faster", ""),
    ("peers", "coreset_equal_picks", "its picks that are equal, index for index", "{:.1%}", "100 %"),
    ("peers", "aupro_speedup", "AUPRO of the same maps against anomalib 2.7.0", "{:.1f} x faster", ""),
    ("peers", "padim_file_ratio", "PaDiM model on disk against anomalib's", "{:.2f} x", ""),
    (
        "features",
        "openvino_speedup",
        "backbone by OpenVINO against torch eager, its best batch",
        "{:.1f} x faster",
        ">= 4 x",
    ),
    ("features", "openvino_images_per_s", "images per second through the backbone", "{:.0f}", ""),
    ("scale", "features_peak_mb_4000", "peak memory, features of 4,000 images", "{:,.0f} MiB", ""),
    ("scale", "patchcore_peak_mb_4000", "peak memory, PatchCore on 4,000 images", "{:,.0f} MiB", ""),
    (
        "scale",
        "two_stage_peak_mb_2000",
        "peak memory, both stages of PatchCore on 2,000 images",
        "{:,.0f} MiB",
        "< 4,096 MiB",
    ),
    ("scale", "padim_peak_mb_4000", "peak memory, PaDiM on 4,000 images", "{:,.0f} MiB", ""),
)


def latest(rows: Rows, cell: Sequence[str] = CELL) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """{cell: its rows of the newest commit, the last one of each seed}."""
    found: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in cell), []).append(row)
    for key, mine in found.items():
        same = [r for r in mine if all(r.get(k) == mine[-1].get(k) for k in ("commit", "backbone"))]
        found[key] = list({r["seed"]: r for r in same}.values())
    return found


def mean_sd(rows: Rows, metric: str, digits: int = 3) -> str:
    """Mean and, of several seeds, standard deviation of a column; "-" where it is empty."""
    values = [float(row[metric]) for row in rows if row.get(metric)]
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(rows: Rows, seeds: bool = True) -> str:
    """One line: the commits and machines behind a table."""
    machines = {_machine(row["machine"]): None for row in rows}
    commits = {f"`{row['commit']}`": None for row in rows}
    note = f"Commit {', '.join(commits)}; {'; '.join(machines)}"
    if not seeds:
        return f"\n{note}.\n"
    n = len({row["seed"] for row in rows})
    return f"\n{note}; {n} seed{'s' if n > 1 else ''}.\n"


def _machine(text: str) -> str:
    m = json.loads(text)
    return f"{m['cpu']}, {m['cores']} cores, {m['gib']} GiB, {m['os']}"


def accuracy_cells(
    results: Path, *detectors: str, overlap: bool = False
) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """The newest rows of some detectors with or without overlap, by cell."""
    rows = [row for row in _rows.read_rows(results / "accuracy.csv") if row["detector"] in detectors]
    return latest([row for row in rows if row.get("protocol", "").endswith("overlap") == overlap])


ARM_OF = {"none": "all_data", "default": "default", "oracle_clean": "oracle_clean"}  # by preset


def preset_rows(folder: Path) -> Rows:
    """Rows of a run of `flawsift benchmark` under presets that are arms of `accuracy.py`, with those arms."""
    rows = _rows.read_rows(folder / "results.csv")
    return [{**row, "arm": ARM_OF[row["preset"]]} for row in rows if row["preset"] in ARM_OF]


def bold_best(texts: Sequence[str], values: Sequence[float]) -> list[str]:
    """The texts, with those of the highest value in bold."""
    return [f"**{text}**" if value == max(values) >= 0 else text for text, value in zip(texts, values, strict=True)]


def detectors(results: Path, arm: str, metric: str, *, overlap: bool = False) -> str | None:
    """One row per set and alpha, one column per detector, of one arm; the best of a row is bold."""
    cells = accuracy_cells(results, *DETECTORS, overlap=overlap)
    cells = {key: rows for key, rows in cells.items() if key[3] == arm and any(row.get(metric) for row in rows)}
    if not cells:
        return None
    names = [name for name in DETECTORS if any(key[1] == name for key in cells)]
    body = []
    for data, alpha in _sets(cells):
        found = [cells.get((data, name, alpha, arm), []) for name in names]
        means = [statistics.mean(float(r[metric]) for r in rows) if rows else -1.0 for rows in found]
        body.append([data, f"{float(alpha):.0%}", *bold_best([mean_sd(rows, metric) for rows in found], means)])
    sets = {key[0] for key in cells}
    for alpha in sorted({key[2] for key in cells}, key=float):
        means = []
        for name in names:
            found = [cells.get((data, name, alpha, arm), []) for data in sets]
            of_sets = [statistics.mean(float(r[metric]) for r in rows) for rows in found if rows]
            means.append(statistics.mean(of_sets) if len(of_sets) == len(sets) else -1.0)
        shown = bold_best([f"{mean:.3f}" if mean >= 0 else "-" for mean in means], means)
        body.append(["mean of sets", f"{float(alpha):.0%}", *shown])
    return table(["set", "defective in training", *(DETECTORS[name] for name in names)], body) + source(_joined(cells))


def threshold(results: Path) -> str | None:
    """What the default detector's threshold without labels does on test images."""
    cells = accuracy_cells(results, "twobanks")
    cells = {k: rows for k, rows in cells.items() if k[3] == "default" and all(r["missed_per_100"] for r in rows)}
    if not cells:
        return None
    columns = ("false_alarms_per_100", "missed_per_100", "keep_share")
    body = [
        [data, f"{float(alpha):.0%}", *(mean_sd(rows, c, 2 if c == "keep_share" else 1) for c in columns)]
        for (data, _, alpha, _), rows in cells.items()
    ]
    header = ["set", "defective in training", "false alarms per 100 good", "missed per 100 defective", "kept"]
    return table(header, body) + source(_joined(cells))


def trim(results: Path) -> str | None:
    """Dinomaly with and without the gradient of its hardest points."""
    rows = preset_rows(results / "trim")
    if not rows:
        return None
    cells = latest(rows)
    names = list(dict.fromkeys(row["detector"] for row in rows))
    body = []
    for data, alpha in _sets(cells):
        found = [cells.get((data, name, alpha, "all_data"), []) for name in names]
        shown = [f"{mean_sd(r, 'image_auroc')} / {mean_sd(r, 'aupro')}" for r in found]
        body.append([data, f"{float(alpha):.0%}", *shown])
    return table(["set", "defective in training", *names], body) + source(rows)


def semantic(results: Path) -> str | None:
    """One row per ratio, one column per detector, over digits and seeds."""
    rows = _rows.read_rows(results / "semantic.csv")
    if not rows:
        return None
    newest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    names = list(dict.fromkeys(row["detector"] for row in newest))
    body = []
    for alpha in sorted({row["alpha"] for row in newest}, key=float):
        mine = [[r for r in newest if (r["detector"], r["alpha"]) == (name, alpha)] for name in names]
        body.append([f"{float(alpha):.0%}", *(mean_sd(each, "image_auroc") for each in mine)])
    shown = {"funad": "FUN-AD", "nearest": "nearest neighbour"}
    return table(["anomalies added", *(shown[name] for name in names)], body) + source(newest)


def accuracy(results: Path, detector: str, metric: str) -> str | None:
    """One row per set and alpha, one column per arm."""
    cells = accuracy_cells(results, detector)
    cells = {key: rows for key, rows in cells.items() if any(row.get(metric) for row in rows)}
    if not cells:
        return None
    body = []
    for data, alpha in _sets(cells):
        found = [cells.get((data, detector, alpha, arm), []) for arm in ARMS]
        body.append([data, f"{float(alpha):.0%}", *(mean_sd(rows, metric) for rows in found)])
    return table(["set", "defective in training", *ARMS.values()], body) + source(_joined(cells))


def _sets(cells: Mapping[tuple[str, ...], Rows]) -> list[tuple[str, str]]:
    order = list(dict.fromkeys(key[0] for key in cells))
    return sorted({(key[0], key[2]) for key in cells}, key=lambda pair: (order.index(pair[0]), float(pair[1])))


def _joined(cells: Mapping[tuple[str, ...], Rows]) -> Rows:
    return [row for rows in cells.values() for row in rows]


def goals(results: Path) -> str | None:
    """What the default screening was built for, by detector, against what came out."""
    body, used = [], []
    for title, cells in _judged(results):
        at = _by_seed(cells)
        if not {"all data", "default", "oracle"} <= {key[3] for key in at}:
            continue
        used += _joined(cells)
        gains = {cell: gain_of(at, cell, "default") for cell in {key[:2] for key in at}}
        clean = min((gain, data) for (data, alpha), gain in gains.items() if float(alpha) == 0)
        worst = min((gain, data, alpha) for (data, alpha), gain in gains.items() if float(alpha) > 0)
        body.append(
            [
                title,
                f"{100 * clean[0]:+.1f} ({clean[1]})",
                f"{recovery(at, 'default'):.0%}",
                f"{100 * worst[0]:+.1f} ({worst[1]}, {float(worst[2]):.0%})",
                f"{recovery(at, 'paper'):.0%}" if any(key[3] == "paper" for key in at) else "-",
            ]
        )
    if not body:
        return None
    body.append(["goal", ">= -0.3", ">= 60 %", ">= -0.5", ""])
    header = ["detector", "clean set, worst", "recovery", "contaminated cell, worst", "recovery of the paper's preset"]
    return table(header, body) + source(used)


def _judged(results: Path) -> Iterator[tuple[str, dict[tuple[str, ...], list[Mapping[str, str]]]]]:
    """(title, rows by cell) of each detector: those of `accuracy.py`, then those of the full table."""
    for name, title in DETECTORS.items():
        yield title, accuracy_cells(results, name)
    full = preset_rows(results / "table1")
    for title in dict.fromkeys(row["detector"] for row in full):
        cells = latest([row for row in full if row["detector"] == title])
        clean = dict.fromkeys(key[0] for key in cells if float(key[2]) == 0 and key[3] == "default")
        told = f"{title} ({', '.join(clean)}; full table)"
        yield told, {key: rows for key, rows in cells.items() if key[0] in clean}


LEAST_GAP = 0.01  # between training on everything and the oracle, for a cell to count in a recovery
VARIANT_OF = {
    "all_data": "all data",
    "oracle_clean": "oracle",
    "images above 2, patches above 2, above 1 in those images": "default",
}


def _by_seed(cells: Mapping[tuple[str, ...], Rows]) -> dict[tuple[str, str, str, str], float]:
    """{(set, alpha, seed, variant): image AUROC}, arms under the names of their variants."""
    return {
        (data, alpha, row["seed"], VARIANT_OF.get(arm, arm)): float(row["image_auroc"])
        for (data, _, alpha, arm), rows in cells.items()
        for row in rows
    }


def _ablated(results: Path) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """PatchCore's rows of an ablation by cell, whose chosen cuts are the default."""
    rows = _rows.read_rows(results / "ablation.csv")
    return latest([{**row, "detector": "patchcore", "arm": row["variant"]} for row in rows])


def confirmation(results: Path) -> str | None:
    """Cell by cell, on seeds that no choice was made on: no screening, and the gains of default and oracle."""
    folder = results / "confirmation"
    body, used = [], []
    for name, cells in (("patchcore", _ablated(folder)), ("padim", accuracy_cells(folder, "padim"))):
        at = _by_seed(cells)
        used += _joined(cells)
        for data, alpha in _sets(cells):
            rows = [r for key, mine in cells.items() if key[:3] == (data, name, alpha) for r in mine]
            base = [r for r in rows if VARIANT_OF.get(r["arm"], r["arm"]) == "all data"]
            gains = [f"{100 * gain_of(at, (data, alpha), variant):+.1f}" for variant in ("default", "oracle")]
            body.append([f"{DETECTORS[name]}, {data}", f"{float(alpha):.0%}", mean_sd(base, "image_auroc"), *gains])
        if cells:
            won = f"{recovery(at, 'default'):.0%}"
            body.append([f"{DETECTORS[name]}, recovery", "", "", won, "100%"])
    if not body:
        return None
    return table(["detector, set", "defective", "no screening", "default", "oracle"], body) + source(used)


# Columns of `finals`: the variant's name for `recovery`, the title, the detector and the arm.
FINALS = (
    ("all data", "PatchCore", "patchcore", "all data"),
    ("SoftPatch", "SoftPatch", "softpatch", "all data"),
    ("TwoBanks", "TwoBanks", "twobanks", "all data"),
    ("default", "PatchCore, screened", "patchcore", "default"),
    ("SoftPatch, default", "SoftPatch, screened", "softpatch", "default"),
    ("TwoBanks, default", "TwoBanks, screened", "twobanks", "default"),
    ("oracle", "PatchCore, oracle", "patchcore", "oracle"),
    ("TwoBanks, oracle", "TwoBanks, oracle", "twobanks", "oracle"),
)


def finals(results: Path, metric: str = "image_auroc", *, confirmed: bool = False) -> str | None:
    """What the default final detector is worth beside its two parts, with and without the default screening."""
    folder = results / "confirmation" if confirmed else results
    first = _ablated(folder) if confirmed else accuracy_cells(folder, "patchcore")
    cells = {**first, **accuracy_cells(folder, "softpatch", "twobanks")}
    cells = {key: rows for key, rows in cells.items() if all(row.get(metric) for row in rows)}
    of = {
        (data, alpha, row["seed"], name, VARIANT_OF.get(arm, arm)): row
        for (data, name, alpha, arm), rows in cells.items()
        for row in rows
    }
    body, used = [], []
    at: dict[tuple[str, str, str, str], float] = {}
    for data, alpha in _sets(cells):
        seeds = sorted({key[2] for key in of if key[:2] == (data, alpha)})
        seeds = [s for s in seeds if all((data, alpha, s, name, arm) in of for _, _, name, arm in FINALS)]
        if not seeds:
            continue
        shown = [f"{float(alpha):.0%}"]
        for variant, _, name, arm in FINALS:
            rows = [of[data, alpha, seed, name, arm] for seed in seeds]  # the same seeds in all columns
            at |= {(data, alpha, row["seed"], variant): float(row[metric]) for row in rows}
            shown.append(mean_sd(rows, metric))
            used += rows
        body.append([data, *shown])
    if not body:
        return None
    variants = [variant for variant, *_ in FINALS]
    for alpha in sorted({key[1] for key in at}, key=float):
        means = [statistics.mean(v for k, v in at.items() if (k[1], k[3]) == (alpha, variant)) for variant in variants]
        body.append(["mean of sets", f"{float(alpha):.0%}", *(f"{mean:.3f}" for mean in means)])
    body.append(["recovery", "", *(f"{recovery(at, variant):.0%}" for variant in variants)])
    contaminated = {key[:2] for key in at if float(key[1]) > 0}
    for what, some in (("contaminated cell", contaminated), ("clean set", {key[:2] for key in at} - contaminated)):
        body.append([f"worst {what}, points", "", *worst_gains(at, some, variants)])
    return table(["set", "defective", *(title for _, title, _, _ in FINALS)], body) + source(used)


def rivals(results: Path, metric: str) -> str | None:
    """Mean of the sets: both stages by default against the detectors that resist contamination on their own."""
    columns = (
        ("TwoBanks, screened", "twobanks", "default"),
        ("SoftPatch", "softpatch", "all_data"),
        ("InReaCh", "inreach", "all_data"),
        ("FUN-AD", "funad", "all_data"),
    )
    body, used = [], []
    for folder in (results, results / "confirmation"):
        cells = accuracy_cells(folder, *(name for _, name, _ in columns))
        cells = {key: rows for key, rows in cells.items() if all(row.get(metric) for row in rows)}
        for alpha in sorted({key[2] for key in cells}, key=float):
            found = [
                [r for k, rows in cells.items() if k[1:] == (name, alpha, arm) for r in rows]
                for _, name, arm in columns
            ]
            sets = [{r["data"] for r in rows} for rows in found]
            seeds = set.intersection(*({r["seed"] for r in rows if r["data"] == d} for rows in found for d in sets[0]))
            if not seeds or any(mine != sets[0] for mine in sets):
                continue  # a mean of other sets or seeds would be another figure
            found = [[r for r in rows if r["seed"] in seeds] for rows in found]
            used += [r for rows in found for r in rows]
            means = [statistics.mean(float(r[metric]) for r in rows) for rows in found]
            shown = (
                f"{min(map(int, seeds))} to {max(map(int, seeds))}, {len(sets[0])} set{'s' if len(sets[0]) > 1 else ''}"
            )
            body.append([shown, f"{float(alpha):.0%}", *bold_best([f"{mean:.3f}" for mean in means], means)])
    if not body:
        return None
    return table(["seeds", "defective", *(title for title, *_ in columns)], body) + source(used)


def decisions(results: Path, detector: str) -> str | None:
    """What a person's first decisions are worth beside the default screening alone."""
    rows = _rows.read_rows(results / "decisions.csv")
    rows = [row for row in rows if (row["detector"], row["n_decisions"]) == (detector, "10")]
    cells = latest(rows)
    if not cells:
        return None
    arms = {
        "all_data": "no screening",
        "default": "default",
        "decided": "default, then ten decisions",
        "oracle_clean": "oracle",
    }
    body = []
    for data, alpha in _sets(cells):
        found = [cells.get((data, detector, alpha, arm), []) for arm in arms]
        shown = [mean_sd(mine, "image_auroc") for mine in found]
        body.append([data, f"{float(alpha):.0%}", mean_sd(found[2], "n_removed", 1), *shown])
    at = _by_seed(cells)
    variants = [VARIANT_OF.get(arm, arm) for arm in arms]
    body.append(["recovery", "", "", *(f"{recovery(at, variant):.0%}" for variant in variants)])
    contaminated = {key[:2] for key in at if float(key[1]) > 0}
    body.append(["worst contaminated cell, points", "", "", *worst_gains(at, contaminated, variants)])
    header = ["set", "defective in training", "defective among the ten", *arms.values()]
    return table(header, body) + source(_joined(cells))


def headline(results: Path) -> str | None:
    """Both stages by default, beside PatchCore on everything and the same detector on the good images alone."""
    columns = (
        ("PatchCore on everything", "patchcore", "all_data"),
        ("SoftPatch on everything", "softpatch", "all_data"),
        ("flawsift fit", "twobanks", "default"),
        ("the same detector, trained on the good images only", "twobanks", "oracle_clean"),
    )
    cells = accuracy_cells(results, "patchcore", "softpatch", "twobanks")
    body, used = [], []
    mine = {key: rows for key, rows in cells.items() if key[1] == "twobanks"}
    if not mine:
        return None
    for data, alpha in _sets(mine):
        found = [cells.get((data, name, alpha, arm), []) for _, name, arm in columns]
        shared = set.intersection(*({row["seed"] for row in rows} for rows in found))
        found = [[row for row in rows if row["seed"] in shared] for rows in found]
        used += [row for rows in found for row in rows]
        body.append([data, f"{float(alpha):.0%}", *(mean_sd(rows, "image_auroc") for rows in found)])
    return table(["set", "defective in training", *(title for title, *_ in columns)], body) + source(used)


def gain_of(at: Mapping[tuple[str, str, str, str], float], cell: tuple[str, str], variant: str) -> float:
    """Mean gain of a variant over training on everything, over the seeds of a cell."""
    mine = {key[2]: value for key, value in at.items() if key[:2] == cell and key[3] == variant}
    return statistics.mean(value - at[*cell, seed, "all data"] for seed, value in mine.items())


def worst_gains(
    at: Mapping[tuple[str, str, str, str], float], cells: Iterable[tuple[str, str]], variants: Iterable[str]
) -> list[str]:
    """The lowest gain of each variant over some cells, in points."""
    cells = list(cells)
    worst = (min((gain_of(at, cell, variant) for cell in cells), default=math.nan) for variant in variants)
    return [f"{100 * gain:+.1f}" for gain in worst]


def estimates(results: Path) -> str | None:
    """How far the estimated share of defective images is from the true one, by contamination."""
    cells = accuracy_cells(results, "patchcore")
    rows = [r for key, rows in cells.items() if key[3] == "default" for r in rows if r.get("alpha_low")]
    if not rows:
        return None
    body = []
    for alpha in sorted({r["alpha"] for r in rows}, key=float):
        mine = [r for r in rows if r["alpha"] == alpha]
        errors = [float(r["alpha_hat"]) - float(r["alpha_reached"]) for r in mine]
        inside = [float(r["alpha_low"]) <= float(r["alpha_reached"]) <= float(r["alpha_high"]) for r in mine]
        seen = sum(float(r["alpha_hat"]) > 0 for r in mine)
        rms = statistics.mean(e * e for e in errors) ** 0.5
        shown = [f"{statistics.mean(float(r['alpha_hat']) for r in mine):.1%}", f"{statistics.mean(errors):+.1%}"]
        body.append(
            [f"{float(alpha):.0%}", *shown, f"{rms:.1%}", f"{seen} of {len(mine)}", f"{sum(inside)} of {len(mine)}"]
        )
    header = ["defective", "estimated, mean", "error, mean", "error, root mean square", "above 0", "interval holds it"]
    return table(header, body) + source(rows)


def stage1(results: Path, detector: str) -> str | None:
    """How well stage 1 ranks and what is left in the kept set."""
    cells = accuracy_cells(results, detector)
    cells = {key: rows for key, rows in cells.items() if key[3] in ("paper", "default")}
    if not cells:
        return None
    columns = ("stage1_auroc", "alpha_hat", "keep_share", "alpha_kept", "false_alarms_per_100", "missed_per_100")
    body = []
    for data, alpha in _sets(cells):
        for arm in ("paper", "default"):
            rows = cells.get((data, detector, alpha, arm), [])
            values = [mean_sd(rows, c, 1 if c.endswith("per_100") else 3) for c in columns]
            body.append([data, f"{float(alpha):.0%}", ARMS[arm], *values])
    header = ["set", "defective in training", "preset", "AUROC of the ranking", "estimated share", "kept"]
    header += ["defective in kept", "false alarms per 100 good", "missed per 100 defective"]
    return table(header, body) + source(_joined(cells))


def ablation(results: Path) -> str | None:
    """Mean gain over training on everything, per variant and contamination; the share of the oracle's gain won.

    Over the sets and seeds that all variants have.
    """
    rows = _joined(latest(_rows.read_rows(results / "ablation.csv"), ("data", "alpha", "variant")))
    if not rows:
        return None
    at = {(r["data"], r["alpha"], r["seed"], r["variant"]): float(r["image_auroc"]) for r in rows}
    variants = dict.fromkeys(r["variant"] for r in rows)
    # the seeds that all variants have
    at = {key: value for key, value in at.items() if all((*key[:3], variant) in at for variant in variants)}
    alphas = sorted({key[1] for key in at}, key=float)
    body = []
    for variant in variants:
        if variant == "all data":
            continue
        pairs = [(key, value - at[*key[:3], "all data"]) for key, value in at.items() if key[3] == variant]
        means = [statistics.mean(gain for key, gain in pairs if key[1] == alpha) for alpha in alphas]
        worst = min(gain_of(at, cell, variant) for cell in {key[:2] for key, _ in pairs})
        won = recovery(at, variant)
        body.append([variant, *(f"{100 * m:+.1f}" for m in means), f"{100 * worst:+.1f}", f"{won:.0%}"])
    header = ["variant", *(f"{float(a):.0%} defective" for a in alphas), "worst cell", "recovery"]
    return table(header, body) + source(rows)


def recovery(at: Mapping[tuple[str, str, str, str], float], variant: str) -> float:
    """Gain over gap, pooled over the cells (set and alpha above 0) whose gap to the oracle is at least a point."""
    won, gap = 0.0, 0.0
    for data, alpha in {key[:2] for key in at if float(key[1]) > 0}:
        seeds = {key[2] for key in at if key[:2] == (data, alpha)}
        base, mine, best = (
            statistics.mean(at[data, alpha, seed, v] for seed in seeds) for v in ("all data", variant, "oracle")
        )
        if best - base >= LEAST_GAP:
            won, gap = won + mine - base, gap + best - base
    return won / gap if gap else float("nan")


def _figures(results: Path) -> dict[tuple[str, str], tuple[float, Mapping[str, str]]]:
    found: dict[tuple[str, str], tuple[float, Mapping[str, str]]] = {}
    for row in _rows.read_rows(results / _rows.FIGURES):
        for key, value in json.loads(row["figures"]).items():
            if isinstance(value, int | float):
                found[row["name"], key] = (float(value), row)
    return found


def speed(results: Path) -> str | None:
    """The headline figures of all speed scripts."""
    found = _figures(results)
    lines = [line for line in SPEED if line[:2] in found]
    if not lines:
        return None
    body = [[what, form.format(found[name, key][0]), goal] for name, key, what, form, goal in lines]
    return table(["what", "measured", "goal"], body) + source([found[line[:2]][1] for line in lines], seeds=False)


def scale(results: Path) -> str | None:
    """Time and memory per number of images."""
    cells = latest(_rows.read_rows(results / "scale.csv"), ("stage", "n_images"))
    if not cells:
        return None
    body = []
    for (stage, n), rows in sorted(cells.items(), key=lambda item: (item[0][0], int(item[0][1]))):
        per_image = f"{1000 * float(rows[-1]['seconds_per_image']):.1f}"
        memory = [f"{float(rows[-1][key]):,.0f}" if rows[-1].get(key) else "-" for key in ("peak_mb", "anonymous_mb")]
        body.append([stage, f"{int(n):,}", mean_sd(rows, "seconds", 1), per_image, *memory])
    header = ["stage", "images", "seconds", "ms per image", "peak MiB", "of it anonymous, MiB"]
    return table(header, body) + source(_joined(cells), seeds=False)


def training(results: Path) -> str | None:
    """What a budget preset costs."""
    rows = [r for r in _rows.read_rows(results / "training.csv") if r.get("seconds")]
    newest = {r["detector"]: r for r in rows}
    if not newest:
        return None
    body = [
        [
            DETECTORS[name],
            f"{float(r['seconds']):.0f}",
            f"{float(r['seconds_per_step']):.3f}",
            f"{float(r['passes_per_image']):.0f}",
            f"{float(r['share_outside_products']):.0%}",
            f"{float(r['batched_ratio']):.2f}" if r.get("batched_ratio") else "-",
            f"{float(r['peak_mb']):,.0f}",
        ]
        for name, r in newest.items()
    ]
    header = ["detector", "seconds", "per step", "backbone passes per image", "outside matrix products"]
    header += ["five sub-models batched, against in turn", "peak MiB"]
    return table(header, body) + source(list(newest.values()), seeds=False)


def peers(results: Path) -> str | None:
    """Both libraries side by side."""
    cells = latest(_rows.read_rows(results / "peers.csv"), ("task", "library"))
    if not cells:
        return None
    columns = {"seconds_fit": 1, "seconds_test": 1, "seconds": 3, "peak_mb": 0, "file_mb": 1, "value": 6}
    columns |= {"image_auroc": 4, "pixel_auroc": 4, "aupro": 4, "seconds_import": 1}
    body = [
        [task, library, *(mean_sd(rows, c, d) for c, d in columns.items())] for (task, library), rows in cells.items()
    ]
    header = ["task", "library", "fit s", "test s", "alone s", "peak MiB", "model MB", "value"]
    return table([*header, "image AUROC", "pixel AUROC", "AUPRO", "import s"], body) + source(
        _joined(cells), seeds=False
    )


TABLES: Mapping[str, Callable[[Path], str | None]] = {
    "accuracy": lambda r: accuracy(r, "patchcore", "image_auroc"),
    "accuracy-padim": lambda r: accuracy(r, "padim", "image_auroc"),
    "aupro": lambda r: accuracy(r, "patchcore", "aupro"),
    "aupro-padim": lambda r: accuracy(r, "padim", "aupro"),
    "detectors": lambda r: detectors(r, "all_data", "image_auroc"),
    "detectors-screened": lambda r: detectors(r, "default", "image_auroc"),
    "detectors-aupro": lambda r: detectors(r, "all_data", "aupro"),
    "training": training,
    "goals": goals,
    "estimates": estimates,
    "ablation": ablation,
    "stage1": lambda r: stage1(r, "patchcore"),
    "stage1-padim": lambda r: stage1(r, "padim"),
    "speed": speed,
    "scale": scale,
    "confirmation": confirmation,
    "headline": headline,
    "trim": trim,
    "threshold": threshold,
    "finals": finals,
    "finals-aupro": lambda r: finals(r, "aupro"),
    "finals-confirmed": lambda r: finals(r, confirmed=True),
    "decisions": lambda r: decisions(r, "twobanks"),
    "decisions-patchcore": lambda r: decisions(r, "patchcore"),
    "rivals": lambda r: rivals(r, "image_auroc"),
    "rivals-aupro": lambda r: rivals(r, "aupro"),
    "overlap": lambda r: detectors(r, "all_data", "image_auroc", overlap=True),
    "semantic": semantic,
    "peers": peers,
}


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
