"""What the tables are made of: rows of the newest commits, gains by screening, text in Markdown.

A cell is a set, a detector, a contamination and an arm. Its figures are those of the newest commit that has rows of it.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

SET, CELL = ["data", "alpha"], ["data", "detector", "alpha", "arm"]
# columns that tables ask for where a file may lack them
TEXTS = ["commit", "machine", "backbone", "protocol", *CELL[:2], "arm", "variant", "preset"]
NUMBERS = ["alpha", "seed", "image_auroc", "aupro", "pixel_ap", "hits_per_100", "missed_per_100", "alpha_low"]
NUMBERS += ["n_decisions", "seconds"]
ARM_OF = {
    "none": "all_data",
    "default": "default",
    "oracle_clean": "oracle_clean",
}  # of a preset of `flawsift benchmark`
# arms of scripts, and the variant of the ablation that became the default, by one name
VARIANT_OF = {
    "all_data": "all data",
    "oracle_clean": "oracle",
    "images above 2, patches above 2, above 1 in those images": "default",
}
LEAST_GAP = 0.01  # between training on everything and the oracle, for a cell to count in a recovery

Rows = pd.DataFrame


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Rows:
    """All rows of a CSV file; none if it does not exist."""
    rows = pd.read_csv(path, dtype={"commit": str}) if path.exists() else Rows()
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *TEXTS, *NUMBERS])))
    rows = rows.assign(hits=rows["hits_per_100"].astype(float) / 100)  # a share, as the other metrics
    return rows.astype(dict.fromkeys(TEXTS, object)).fillna(dict.fromkeys(TEXTS, ""))


def newest(rows: Rows, cell: Sequence[str] = CELL) -> Rows:
    """Of each cell, the rows of its last row's commit and backbone, the last one of each seed; cell after cell."""
    groups = rows.groupby(list(cell), sort=False)
    same = (rows[["commit", "backbone"]] == groups[["commit", "backbone"]].transform("last")).all(axis=1)
    rows = rows.assign(cell=groups.ngroup())[same].drop_duplicates([*cell, "seed"], keep="last")
    return rows.sort_values("cell", kind="stable")


def accuracy_rows(results: Path, *detectors: str, overlap: bool = False) -> Rows:
    """The newest rows of some detectors, with or without overlap, and with the default network only at 256 pixels."""
    rows = read(results / "accuracy.csv")
    mine = rows["detector"].isin(detectors) & (rows["protocol"].str.endswith("overlap") == overlap)
    larger = rows["backbone"].str.startswith("efficientnet_lite0") & ~rows["backbone"].str.contains("-256-")
    return with_variants(newest(rows[mine & ~larger]))


def ablated_rows(results: Path) -> Rows:
    """The newest rows of an ablation, which is PatchCore's."""
    return newest(read(results / "ablation.csv"), [*SET, "variant"]).assign(detector="patchcore")


def preset_rows(folder: Path) -> Rows:
    """The newest rows of a run of `flawsift benchmark`, under presets that are arms of `accuracy.py`."""
    rows = read(folder / "results.csv")
    rows = rows.assign(arm=rows["preset"].map(ARM_OF)).dropna(subset=["arm"])
    return with_variants(newest(rows))


def with_variants(rows: Rows, column: str = "arm") -> Rows:
    """The rows with the names of `VARIANT_OF` in `variant`."""
    return rows.assign(variant=rows[column].replace(VARIANT_OF))


def with_titles(rows: Rows, titles: Mapping[tuple[str, str], str]) -> Rows:
    """The rows of some detectors and variants with a `title`, in the order of the titles."""
    pairs = zip(rows["detector"], rows["variant"], strict=True)
    titled = rows.assign(title=pd.Categorical([titles.get(pair) for pair in pairs], list(titles.values())))
    return titled.dropna(subset=["title"]).sort_values("title", kind="stable")


def shared(rows: Rows, column: str, n: int) -> Rows:
    """The rows of those sets, contaminations and seeds that have all n values of a column."""
    return rows[rows.groupby([*SET, "seed"])[column].transform("nunique") == n]


def by_set(rows: Rows) -> Iterator[tuple[list[str], Rows]]:
    """([set, contamination], its rows): sets in the order of the rows, contaminations upwards."""
    for data, of_set in rows.groupby("data", sort=False):
        for alpha, some in of_set.groupby("alpha"):
            yield [str(data), f"{alpha:.0%}"], some


# ---- gains -----------------------------------------------------------------------------------------------------------


def gains(rows: Rows, metric: str = "image_auroc", column: str = "variant", base: str = "all data") -> Rows:
    """(sets, contaminations and seeds; variants): gain over training on everything."""
    values = rows.pivot(index=[*SET, "seed"], columns=column, values=metric)
    return values.sub(values[base], axis=0)


def of_cells(gained: Rows, *, clean: bool = False) -> Rows:
    """(sets and contaminations; variants): mean gain over seeds where training has defects, or where it has none."""
    return gained[(gained.index.get_level_values("alpha") == 0) == clean].groupby(SET).mean()


def recovery(gained: Rows, variant: str) -> str:
    """Gain over the oracle's, pooled over the contaminated cells where that is at least a point."""
    cells = of_cells(gained)
    counted = cells[cells["oracle"] >= LEAST_GAP]
    return f"{counted[variant].sum() / counted['oracle'].sum():.0%}"


def worst(cells: Rows, variants: Iterable[str]) -> list[str]:
    """The lowest gain of each variant over some cells, in points."""
    return [f"{100 * cells[variant].min():+.1f}" for variant in variants]


# ---- text ------------------------------------------------------------------------------------------------------------


def mean_sd(values: pd.Series, digits: int = 3) -> str:
    """Mean and, of several seeds, standard deviation; "-" where nothing was measured."""
    values = values.dropna()
    if values.empty:
        return "-"
    sd = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    # exact: a sum that is rounded on the way would decide what becomes of a mean half way between two texts
    return f"{statistics.mean(values):.{digits}f}{sd}"


def texts_of(rows: Rows, digits: Mapping[str, int]) -> list[str]:
    """Mean and deviation of some columns, each with so many digits."""
    return [mean_sd(rows[column], n) for column, n in digits.items()]


def texts_by(rows: Rows, column: str, names: Iterable[str], metric: str = "image_auroc") -> list[str]:
    """Mean and deviation of a metric for some values of a column."""
    return [mean_sd(rows.loc[rows[column] == name, metric]) for name in names]


def bold_best(texts: Sequence[str], values: pd.Series) -> list[str]:
    """The texts, with those of the highest value in bold."""
    return [f"**{text}**" if value == values.max() else text for text, value in zip(texts, values, strict=True)]


def table(header: Sequence[str], body: Iterable[Sequence[str]], rows: Rows, *, seeds: bool = True) -> str:
    """A Markdown table, all columns but the first right-aligned, and a line of where its rows were measured."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    machines = [json.loads(machine) for machine in rows["machine"].unique()]
    places = dict.fromkeys(f"{m['cpu']}, {m['cores']} cores, {m['gib']} GiB, {m['os']}" for m in machines)
    commits = ", ".join(f"`{commit}`" for commit in rows["commit"].unique())
    n = rows["seed"].nunique()
    note = f"; {n} seed{'s' if n > 1 else ''}" if seeds else ""
    return f"{text}\nCommit {commits}; {'; '.join(places)}{note}.\n"
