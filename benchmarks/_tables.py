"""Tables of what detectors and screenings are worth. Each reads the rows that it is of; without rows there is none."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from _frames import (
    CELL,
    SET,
    Rows,
    ablated_rows,
    accuracy_rows,
    bold_best,
    by_set,
    gains,
    mean_sd,
    newest,
    of_cells,
    preset_rows,
    read,
    recovery,
    shared,
    table,
    texts_by,
    texts_of,
    with_titles,
    with_variants,
    worst,
)
from _rows import CONFIRMATION, DEVELOPMENT
from flawsift.metrics.shares import share_interval
from flawsift.screening.options import FINAL

ARMS = {"all_data": "no screening", "paper": "paper", "default": "default", "oracle_clean": "oracle"}
DETECTORS = {
    "quorum": "Quorum",
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
HALF_STEP = 0.005  # half of the finest step between shares that the estimate tells apart
SET_HEADER = ["set", "defective in training"]


# ---- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(results: Path, detector: str, metric: str) -> str | None:
    """One row per set and alpha, one column per arm."""
    rows = accuracy_rows(results, detector).dropna(subset=[metric])
    if rows.empty:
        return None
    body = [[*place, *texts_by(some, "arm", ARMS, metric)] for place, some in by_set(rows)]
    return table([*SET_HEADER, *ARMS.values()], body, rows)


def detectors(results: Path, arm: str, metric: str, *, overlap: bool = False) -> str | None:
    """One row per set and alpha, one column per detector, of one arm; the best of a row is bold."""
    rows = accuracy_rows(results, *DETECTORS, overlap=overlap).dropna(subset=[metric])
    rows = rows[rows["arm"] == arm]
    if rows.empty:
        return None
    names = [name for name in DETECTORS if name in set(rows["detector"])]
    body = []
    for place, some in by_set(rows):
        means = some.groupby("detector")[metric].mean().reindex(names)
        body.append([*place, *bold_best(texts_by(some, "detector", names, metric), means)])
    sets = rows["data"].unique()
    for alpha, some in rows.groupby("alpha"):
        means = some.groupby(["data", "detector"])[metric].mean().unstack("detector").reindex(sets, columns=names)
        means = means.mean(skipna=False)  # of all sets, or none
        texts = ["-" if pd.isna(mean) else f"{mean:.3f}" for mean in means]
        body.append(["mean of sets", f"{alpha:.0%}", *bold_best(texts, means)])
    return table([*SET_HEADER, *(DETECTORS[name] for name in names)], body, rows)


def localised(make: Callable[[str], str | None]) -> str | None:
    """The table of AUPRO that `make` makes of a metric, and those of the other measures of maps that rows have."""
    first = make("aupro")
    others = {
        "Pixel AP": "pixel_ap",
        "Hits: of the defective images found, the share whose hottest place is marked": "hits",
    }
    more = [f"\n\n{title}:\n\n{text}" for title, metric in others.items() if (text := make(metric))]
    return None if first is None else first + "".join(more)


def trim(results: Path) -> str | None:
    """Dinomaly with and without the gradient of its hardest points."""
    rows = preset_rows(results / "trim")
    if rows.empty:
        return None
    names = list(rows["detector"].unique())
    body = []
    for place, some in by_set(rows):
        aurocs, aupros = (texts_by(some, "detector", names, metric) for metric in ("image_auroc", "aupro"))
        body.append([*place, *(f"{auroc} / {aupro}" for auroc, aupro in zip(aurocs, aupros, strict=True))])
    return table([*SET_HEADER, *names], body, rows)


def semantic(results: Path) -> str | None:
    """One row per ratio, one column per detector, over digits and seeds."""
    rows = read(results / "semantic.csv")
    if rows.empty:
        return None
    rows = rows[rows["commit"] == rows["commit"].iloc[-1]]
    titles = {"funad": "FUN-AD", "nearest": "nearest neighbour"}
    body = [[f"{alpha:.0%}", *texts_by(some, "detector", titles)] for alpha, some in rows.groupby("alpha")]
    return table(["anomalies added", *titles.values()], body, rows)


def stage1(results: Path, detector: str) -> str | None:
    """How well stage 1 ranks and what is left in the kept set."""
    rows = accuracy_rows(results, detector)
    rows = rows[rows["arm"].isin(["paper", "default"])]
    if rows.empty:
        return None
    digits = {"stage1_auroc": 3, "alpha_hat": 3, "keep_share": 3, "alpha_kept": 3}
    digits |= {"false_alarms_per_100": 1, "missed_per_100": 1}
    body = [
        [*place, ARMS[arm], *texts_of(some[some["arm"] == arm], digits)]
        for place, some in by_set(rows)
        for arm in ("paper", "default")
    ]
    header = [*SET_HEADER, "preset", "AUROC of the ranking", "estimated share", "kept", "defective in kept"]
    return table([*header, "false alarms per 100 good", "missed per 100 defective"], body, rows)


def estimates(results: Path, sets: Sequence[str]) -> str | None:
    """How far the estimated share of defective images is from the true one, without and with ten decisions."""
    rows = verdicts(results, FINAL, sets)
    if rows.empty:
        return None
    rows = rows[rows["asked"] == rows["asked"].min()]
    body = []
    for (n, alpha), some in rows.groupby(["n_decisions", "alpha"]):
        errors = (some["alpha_hat"] - some["alpha_reached"]).abs()
        inside = some["alpha_reached"].between(some["alpha_low"] - HALF_STEP, some["alpha_high"] + HALF_STEP)
        widths = some["alpha_high"] - some["alpha_low"]
        shown = [f"{value.mean():.1%}" for value in (some["alpha_hat"], errors.groupby(some["data"]).mean(), widths)]
        body.append([f"{alpha:.0%}", f"{n:.0f}", *shown, f"{inside.sum()} of {len(some)}"])
    header = ["defective", "decisions", "estimate, mean", "absolute error, mean", "width of the interval, mean"]
    return table([*header, "interval holds it"], body, rows)


def verdicts(results: Path, detector: str, sets: Sequence[str]) -> Rows:
    """Newest rows of `verdict.py` of some sets."""
    rows = read(results / "verdict.csv")
    if rows.empty:
        return rows
    rows = rows[(rows["detector"] == detector) & rows["data"].isin(sets)]
    rows = rows[rows["backbone"].str.contains("-256-")]
    return newest(rows, ["data", "detector", "alpha", "n_decisions", "asked"])


def verdict(results: Path, detector: str, sets: Sequence[str]) -> str | None:
    """Promised against measured, mean of the sets: a row per rate, decisions and contamination."""
    rows = verdicts(results, detector, sets)
    if rows.empty:
        return None
    body = []
    for (asked, n, alpha), some in rows.groupby(["asked", "n_decisions", "alpha"]):
        per_set = {
            key: 100 * (some[f"{key}n_{what}"] / some[f"n_{of}"]).groupby(some["data"]).mean().mean()
            for key, what, of in (("", "false_alarms", "good"), ("best_", "false_alarms", "good"))
        }
        missed = {
            key: 100 * (some[f"{key}n_missed"] / some["n_defective"]).groupby(some["data"]).mean().mean()
            for key in ("", "best_")
        }
        low, high = _rate_interval(some)
        holds = ((some["promised_low"] <= high) & (low <= some["promised_high"])).sum()
        wanted = some["promised"].clip(lower=asked)
        near = ((low <= 3 * wanted) & (wanted / 3 <= high)).sum()
        cells = f"of {len(some)}"
        body.append(
            [
                f"{asked:.0%}",
                f"{n:.0f}",
                f"{alpha:.0%}",
                f"{100 * some['promised'].groupby(some['data']).mean().mean():.1f}",
                f"{per_set['']:.1f}",
                f"{per_set['best_']:.1f}",
                f"{missed['']:.1f}",
                f"{missed['best_']:.1f}",
                f"{holds} {cells}",
                f"{near} {cells}",
                f"{int(some['warned'].sum())} {cells}",
            ]
        )
    header = ["asked", "decisions", "defective", "promised", "false alarms", "best possible", "missed", "best possible"]
    return table([*header, "interval holds", "within a third to three times", "warned"], body, rows)


def _rate_interval(rows: Rows) -> tuple[Any, Any]:
    """What the counted false alarms say of the true rate: 90 % intervals (Clopper and Pearson)."""
    return share_interval(rows["n_false_alarms"], rows["n_good"])


# ---- what screening wins ---------------------------------------------------------------------------------------------


def goals(results: Path) -> str | None:
    """What the default screening was built for, by detector, against what came out."""
    body, used = [], []
    for title, rows in _judged(results):
        if not {"all data", "default", "oracle"} <= set(rows["variant"]):
            continue
        used.append(rows)
        gained = gains(rows)
        clean, contaminated = of_cells(gained, clean=True)["default"], of_cells(gained)["default"]
        data, alpha = contaminated.idxmin()
        body.append(
            [
                title,
                f"{100 * clean.min():+.1f} ({clean.idxmin()[0]})",
                recovery(gained, "default"),
                f"{100 * contaminated.min():+.1f} ({data}, {alpha:.0%})",
                recovery(gained, "paper") if "paper" in gained else "-",
            ]
        )
    if not body:
        return None
    body.append(["goal", ">= -0.3", ">= 60 %", ">= -0.5", ""])
    header = ["detector", "clean set, worst", "recovery", "contaminated cell, worst", "recovery of the paper's preset"]
    return table(header, body, pd.concat(used))


def _judged(results: Path) -> Iterator[tuple[str, Rows]]:
    """(title, rows) of each detector: those of `accuracy.py`, then those of the full table."""
    for name, title in DETECTORS.items():
        yield title, accuracy_rows(results, name)
    for title, rows in preset_rows(results / "table1").groupby("detector", sort=False):
        clean = rows.loc[(rows["alpha"] == 0) & (rows["arm"] == "default"), "data"].unique()
        yield f"{title} ({', '.join(clean)}; full table)", rows[rows["data"].isin(clean)]


def confirmation(results: Path) -> str | None:
    """Cell by cell, on seeds that no choice was made on: no screening, and the gains of default and oracle."""
    folder = results / "confirmation"
    parts = {"patchcore": with_variants(ablated_rows(folder), "variant"), "padim": accuracy_rows(folder, "padim")}
    parts = {name: rows for name, rows in parts.items() if len(rows)}
    if not parts:
        return None
    body = []
    for name, rows in parts.items():
        for (data, alpha), some in by_set(rows):
            won = [f"{100 * gains(some)[variant].mean():+.1f}" for variant in ("default", "oracle")]
            body.append([f"{DETECTORS[name]}, {data}", alpha, *texts_by(some, "variant", ["all data"]), *won])
        body.append([f"{DETECTORS[name]}, recovery", "", "", recovery(gains(rows), "default"), "100%"])
    header = ["detector, set", "defective", "no screening", "default", "oracle"]
    return table(header, body, pd.concat(parts.values()))


def ablation(results: Path) -> str | None:
    """Mean gain over training on everything, per variant and contamination; the share of the oracle's gain won.

    Over the sets and seeds that all variants have.
    """
    rows = ablated_rows(results)
    if rows.empty:
        return None
    variants = rows["variant"].unique()
    gained = gains(shared(rows, "variant", len(variants)))
    means = 100 * gained.groupby("alpha").mean()
    body = []
    for variant in variants[variants != "all data"]:
        lowest = 100 * gained.groupby(SET)[variant].mean().min()
        body.append([variant, *(f"{points:+.1f}" for points in (*means[variant], lowest)), recovery(gained, variant)])
    header = ["variant", *(f"{alpha:.0%} defective" for alpha in means.index), "worst cell", "recovery"]
    return table(header, body, rows)


def quorum(results: Path, metric: str, sets: Sequence[str]) -> str | None:
    """Quorum beside detectors on everything, on some sets, and the mean of the sets.

    A detector with fewer rows than Quorum is left out.
    """
    columns = {
        ("patchcore", "all data"): "PatchCore",
        ("softpatch", "all data"): "SoftPatch",
        ("inreach", "all data"): "InReaCh",
        ("quorum", "default"): "Quorum, both stages",
        ("quorum", "oracle"): "Quorum, good images only",
    }
    rows = accuracy_rows(results, *{detector for detector, _ in columns})
    rows = rows[rows["data"].isin(sets)].dropna(subset=[metric])
    counts = with_titles(rows, columns)["title"].value_counts()
    least = max(1, counts.get("Quorum, both stages", 0))
    columns = {pair: title for pair, title in columns.items() if counts.get(title, 0) >= least}
    rows = shared(with_titles(rows, columns), "title", len(columns))
    if rows.empty:
        return None
    names = list(columns.values())
    rows = rows.sort_values("data", key=lambda data: data.map(list(sets).index), kind="stable")
    body = [[*place, *texts_by(some, "title", names, metric)] for place, some in by_set(rows)]
    for alpha, some in rows.groupby("alpha"):
        means = some.groupby("title", observed=True)[metric].mean()
        body.append(["mean of sets", f"{alpha:.0%}", *(f"{means[name]:.3f}" for name in names)])
    gained = gains(rows, metric, "title", names[0])
    body.append(["worst cell, points to PatchCore", "", *worst(gained.groupby(SET).mean(), names)])
    return table([*SET_HEADER, *names], body, rows)


def ranked(results: Path, detector: str, sets: Sequence[str]) -> str | None:
    """How well stage 1 by default ranks the training images: its AUROC by the hidden labels."""
    rows = accuracy_rows(results, detector)
    rows = rows[rows["data"].isin(sets) & (rows["arm"] == "default")].dropna(subset=["stage1_auroc"])
    if rows.empty:
        return None
    alphas = sorted(rows["alpha"].unique())
    body = [
        [name, *(mean_sd(some.loc[some["alpha"] == alpha, "stage1_auroc"]) for alpha in alphas)]
        for name, some in ((name, rows[rows["data"] == name]) for name in sets)
        if len(some)
    ]
    return table(["set", *(f"{alpha:.0%} defective" for alpha in alphas)], body, rows)


def sizes(results: Path, detector: str) -> str | None:
    """Image AUROC and AUPRO of both stages by default, by the size of the network's input, where there are several."""
    rows = read(results / "accuracy.csv")
    rows = rows[(rows["detector"] == detector) & rows["arm"].isin(["default", "all_data"])]  # Quorum learns the same
    rows = newest(rows.assign(size=rows["backbone"].str.extract(r"-(\d+)-(?:openvino|torch)")[0]), [*CELL, "size"])
    rows = rows[rows.groupby("data")["size"].transform("nunique") > 1]
    if rows.empty:
        return None
    body = [
        [data, size, f"{alpha:.0%}", *texts_of(some, {"image_auroc": 3, "aupro": 3, "stage1_auroc": 3})]
        for (data, size, alpha), some in rows.groupby(["data", "size", "alpha"])
    ]
    header = ["set", "pixels", "defective", "image AUROC", "AUPRO", "AUROC of the ranking"]
    return table(header, body, rows)


def framed(results: Path, detector: str) -> str | None:
    """Sets whose images are not square, squeezed into a square and with their aspect ratio, in as many pixels."""
    rows = read(results / "accuracy.csv")
    rows = rows[(rows["detector"] == detector) & (rows["arm"] == "default")]
    shape = rows["backbone"].str.extract(r"-(256|\d+x\d+)-(?:openvino|torch)")[0]
    rows = newest(rows.assign(shape=shape).dropna(subset=["shape"]), [*CELL, "shape"])
    rows = rows[rows.groupby("data")["shape"].transform("nunique") > 1]
    if rows.empty:
        return None
    metrics = {"image_auroc": 3, "aupro": 3, "pixel_ap": 3, "hits": 3}
    body = [
        [
            data,
            f"{alpha:.0%}",
            "squeezed, 256 x 256" if shape == "256" else f"fitted in, {shape}",
            *texts_of(some, metrics),
        ]
        for (data, alpha, shape), some in rows.groupby(["data", "alpha", "shape"])
    ]
    return table(["set", "defective", "images are", "image AUROC", "AUPRO", "pixel AP", "hits"], body, rows)


def aligned(results: Path) -> str | None:
    """Detectors on images as they are and aligned (`align.py`), by as many pixels of the network's input."""
    cell = ["edge", "detector", "position", "alpha"]
    rows = newest(read(results / "align.csv"), cell) if (results / "align.csv").exists() else None
    if rows is None:
        return None
    metrics = {"image_auroc": 3, "aupro": 3, "pixel_ap": 3}
    body = [
        [detector, f"{edge} x {edge}", position, f"{alpha:.0%}", *texts_of(some, metrics)]
        for (edge, detector, position, alpha), some in rows.groupby(cell, sort=False)
    ]
    header = ["detector", "as many pixels as", "screws", "defective", "image AUROC", "AUPRO", "pixel AP"]
    return table(header, body, rows)


def headline(results: Path) -> str | None:
    """Both stages by default, beside detectors on everything and the same one on the good images: means of the sets."""
    titles = {
        ("patchcore", "all data"): "PatchCore on everything",
        ("softpatch", "all data"): "SoftPatch on everything",
        (FINAL, "default"): "flawsift fit",
        (FINAL, "oracle"): "the same detector, trained on the good images only",
    }
    rows = with_titles(accuracy_rows(results, "patchcore", "softpatch", FINAL), titles)
    rows = shared(rows, "title", len(titles))
    body = []
    for name, sets in (
        ("those that choices were made on", DEVELOPMENT),
        ("those looked at once, at the end", CONFIRMATION),
    ):
        some = rows[rows["data"].isin(sets)]
        for alpha, part in some.groupby("alpha"):
            means = part.groupby(["data", "title"], observed=True)["image_auroc"].mean().unstack("title").mean()
            shown = [f"{means[title]:.3f}" for title in titles.values()]
            body.append(
                [
                    f"{some['data'].nunique()}, {name}",
                    f"{alpha:.0%}",
                    *bold_best(shown[:3], means[list(titles.values())[:3]]),
                    shown[3],
                ]
            )
    if not body:
        return None
    return table(["mean of sets", SET_HEADER[1], *titles.values()], body, rows)


def rivals(results: Path, metric: str) -> str | None:
    """Mean of the sets: both stages by default against the detectors that resist contamination on their own."""
    titles = {
        (FINAL, "default"): f"{DETECTORS[FINAL]}, screened",
        ("softpatch", "all data"): "SoftPatch",
        ("inreach", "all data"): "InReaCh",
        ("funad", "all data"): "FUN-AD",
    }
    body, used = [], []
    for folder in (results, results / "confirmation"):
        rows = accuracy_rows(folder, *(name for name, _ in titles)).dropna(subset=[metric])
        for alpha, some in with_titles(rows, titles).groupby("alpha"):
            values = some.pivot(index="seed", columns=["title", "data"], values=metric)
            n = some["data"].nunique()
            values = values.dropna() if values.shape[1] == n * len(titles) else values[:0]
            if values.empty:
                continue  # a mean of other sets or seeds would be another figure
            used.append(some[some["seed"].isin(values.index)])
            means = used[-1].groupby("title", observed=True)[metric].mean()
            shown = f"{values.index.min()} to {values.index.max()}, {n} set{'s' if n > 1 else ''}"
            body.append([shown, f"{alpha:.0%}", *bold_best([f"{mean:.3f}" for mean in means], means)])
    if not body:
        return None
    return table(["seeds", "defective", *titles.values()], body, pd.concat(used))


def decisions(results: Path, detector: str) -> str | None:
    """What a person's first decisions are worth beside the default screening alone."""
    rows = read(results / "decisions.csv")
    rows = with_variants(newest(rows[(rows["detector"] == detector) & (rows["n_decisions"] == 10)]))
    if rows.empty:
        return None
    titles = {
        "all data": "no screening",
        "default": "default",
        "decided": "default, then ten decisions",
        "oracle": "oracle",
    }
    body = []
    for place, some in by_set(rows):
        removed = texts_of(some[some["arm"] == "decided"], {"n_removed": 1})
        body.append([*place, *removed, *texts_by(some, "variant", titles)])
    gained = gains(rows)
    body.append(["recovery", "", "", *(recovery(gained, variant) for variant in titles)])
    body.append(["worst contaminated cell, points", "", "", *worst(of_cells(gained), titles)])
    return table([*SET_HEADER, "defective among the ten", *titles.values()], body, rows)
