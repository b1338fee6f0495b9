"""Tables of measured rows beside the figures of papers, as Markdown and LaTeX: best bold, second underlined."""

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from flawsift.benchmark.grid import ADDRESS, NONE, ORACLE

Rows = Sequence[Mapping[str, str]]
PRESET_NAMES = {NONE: "no screening", ORACLE: "oracle"}  # the others are called as they are
TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%_#${}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over seeds; `complete` says whether every seed has every category of the line."""

    mean: float
    sd: float | None
    n_seeds: int
    complete: bool

    def text(self, digits: int = 3) -> str:
        """Such as "0.973 ± 0.012", with a dagger where it is incomplete."""
        sd = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:.{digits}f}{sd}{'' if self.complete else ' †'}"


@dataclass(frozen=True)
class TableCell:
    """Two metrics of one method in one line; a place is 1 for the best of the line, 2 for the second, else 0."""

    first: Figure | None
    second: Figure | None
    first_place: int = 0
    second_place: int = 0


@dataclass(frozen=True)
class Metric:
    """A column of rows; `whole` is what its value is a share of."""

    column: str
    whole: float = 1.0


# (title, metrics) of the tables, side by side in a cell. Hits: of the defective images that are found, in how many the
# highest place of the map lies in the mask.
QUOTED = "Image AUROC / AUPRO"  # what papers publish
PAIRS = {
    QUOTED: (Metric("image_auroc"), Metric("aupro")),
    "Pixel AP / hits": (Metric("pixel_ap"), Metric("hits_per_100", 100.0)),
}


@dataclass(frozen=True)
class Line:
    """One line of a table: where it was measured, and a cell per method."""

    data: str
    alpha: float
    preset: str
    cells: tuple[TableCell, ...]
    quoted: bool = False


@dataclass(frozen=True)
class Table:
    """All lines of one protocol and k."""

    title: str
    methods: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""


def newest(rows: Rows) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """The last good row of each place, and the failed rows of places that have none."""
    good = {tuple(r[key] for key in ADDRESS): r for r in rows if not r.get("error")}
    failed = {tuple(r[key] for key in ADDRESS): r for r in rows if r.get("error")}
    return list(good.values()), [row for place, row in failed.items() if place not in good]


def figure(rows: Rows, metric: Metric, expected: Rows | None = None) -> Figure | None:
    """Mean over the categories of each seed, then mean and standard deviation over seeds.

    Args:
        rows: Of one method.
        metric: What is shown; rows may lack it.
        expected: Rows of all methods; a seed or category that only others have makes the figure incomplete.
    """
    by_seed: dict[str, dict[str, float]] = {}
    column = metric.column
    for row in rows:
        if row.get(column):
            by_seed.setdefault(row["seed"], {})[row["category"]] = float(row[column]) / metric.whole
    if not by_seed:
        return None
    means = [statistics.fmean(by_category.values()) for by_category in by_seed.values()]
    there = {(seed, category) for seed, by_category in by_seed.items() for category in by_category}
    others = {(r["seed"], r["category"]) for r in expected or rows if r.get(column)}
    categories = {category for _, category in others}
    complete = there >= others and all(set(by_category) == categories for by_category in by_seed.values())
    sd = statistics.stdev(means) if len(means) > 1 else None
    return Figure(statistics.fmean(means), sd, len(means), complete)


def measured_tables(rows: Rows) -> list[Table]:
    """Tables of each protocol and k: a line per data set, contamination and preset, a column per method.

    The first has the metrics of papers, the second how well defects are found within the images; what no row has of it
    is left out.
    """
    tables = []
    for (protocol, k), mine in grouped(rows, "protocol", "n_subsets").items():
        methods = tuple(dict.fromkeys(r["detector"] for r in mine))
        registry = {r["detector"]: r.get("method", "") for r in mine}
        subsets = f", k = {k}" if k else ""
        for pair, metrics in PAIRS.items():
            lines = []
            for (data, alpha), here in _sorted_by_alpha(grouped(mine, "data", "alpha")):
                for preset, some in grouped(here, "preset").items():
                    by_method = grouped(some, "detector")
                    cells = [_cell(by_method.get((m,), []), some, metrics) for m in methods]
                    if pair == QUOTED or any(c.first or c.second for c in cells):
                        lines.append(Line(data, alpha, preset[0], ranked(cells)))
                quoted = _quoted_line(data, alpha, protocol, [registry[m] for m in methods]) if pair == QUOTED else None
                lines += [quoted] if quoted else []
            if lines:
                tables.append(Table(f"{pair}, {protocol.replace('_', ' ')}{subsets}", methods, tuple(lines)))
    return tables


def quoted_tables() -> list[Table]:
    """Figures that others published, each in a table of its own."""
    tables = []
    for table in _quoted():
        methods = {r["method"]: r["label"] for r in table["rows"]}
        alphas = dict.fromkeys(r["alpha"] for r in table["rows"])
        lines = [_quoted_line(table["data"], a, table["protocol"], list(methods)) for a in alphas]
        note = f"Quoted from {table['source']}; not measured here. {table['note']}"
        kept = tuple(line for line in lines if line is not None)
        tables.append(Table(f"Quoted: {table['title']}", tuple(methods.values()), kept, note))
    return tables


def ranked(cells: Sequence[TableCell]) -> tuple[TableCell, ...]:
    """The same cells with the best and the second of each metric marked; equal figures share a place."""
    places = []
    for values in ([c.first for c in cells], [c.second for c in cells]):
        known = sorted({round(v.mean, 6) for v in values if v is not None}, reverse=True)
        enough = sum(v is not None for v in values) > 1
        at = [known.index(round(v.mean, 6)) + 1 if v is not None and enough else 0 for v in values]
        places.append([p if p <= 2 else 0 for p in at])
    return tuple(TableCell(c.first, c.second, a, p) for c, a, p in zip(cells, *places, strict=True))


def markdown(table: Table) -> str:
    """A table with the best in bold and the second underlined."""
    header = ["set", "defective in training", "stage 1", *table.methods]
    rule = ["---", "---:", "---", *["---:"] * len(table.methods)]
    mark = {1: "**{}**".format, 2: "<u>{}</u>".format, 0: "{}".format}
    body = [[*_head(line), *(_joined(c, mark) for c in line.cells)] for line in table.lines]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [header, rule, *body]]
    return f"### {table.title}\n\n" + "\n".join(lines) + "\n" + (f"\n{table.note}\n" if table.note else "")


def latex(table: Table) -> str:
    """A booktabs table with the best in bold and the second underlined."""
    mark = {1: "\\textbf{{{}}}".format, 2: "\\underline{{{}}}".format, 0: "{}".format}
    lines = [
        "\\begin{table*}",
        "\\centering",
        f"\\caption{{{_tex(table.title)}.{' ' + _tex(table.note) if table.note else ''}}}",
        f"\\begin{{tabular}}{{lrl{'c' * len(table.methods)}}}",
        "\\toprule",
        " & ".join(["set", "$\\alpha$", "stage 1", *map(_tex, table.methods)]) + " \\\\",
        "\\midrule",
    ]
    for line in table.lines:
        cells = [_joined(c, mark).replace("±", "$\\pm$").replace("†", "$\\dagger$") for c in line.cells]
        lines.append(" & ".join([*map(_tex, _head(line)), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table*}"]) + "\n"


def _joined(cell: TableCell, mark: Mapping[int, Callable[[str], str]]) -> str:
    texts = [
        "-" if value is None else mark[place](value.text())
        for value, place in ((cell.first, cell.first_place), (cell.second, cell.second_place))
    ]
    return "-" if texts == ["-", "-"] else " / ".join(texts)


def _head(line: Line) -> list[str]:
    preset = "quoted" if line.quoted else PRESET_NAMES.get(line.preset, line.preset)
    return [line.data, f"{line.alpha:.0%}", preset]


def _tex(text: str) -> str:
    return text.translate(TEX)


def _cell(rows: Rows, expected: Rows, metrics: tuple[Metric, Metric]) -> TableCell:
    first, second = metrics
    return TableCell(figure(rows, first, expected), figure(rows, second, expected))


@functools.cache
def _quoted() -> list[dict[str, Any]]:
    text = resources.files("flawsift.benchmark").joinpath("quoted.json").read_text("utf-8")
    tables: list[dict[str, Any]] = json.loads(text)["tables"]
    return tables


def _quoted_line(data: str, alpha: float, protocol: str, methods: Sequence[str]) -> Line | None:
    """What others published of these methods on this very split."""
    for table in _quoted():
        if (table["data"], table["protocol"]) == (data, protocol):
            known = {r["method"]: r for r in table["rows"] if r["alpha"] == alpha}
            figures = [known.get(m, {}) for m in methods]
            cells = [TableCell(_given(f.get("image_auroc")), _given(f.get("aupro"))) for f in figures]
            if any(c.first or c.second for c in cells):
                return Line(data, alpha, "quoted", tuple(cells), quoted=True)
    return None


def _given(value: float | None) -> Figure | None:
    return None if value is None else Figure(value, None, 1, True)


def grouped(rows: Rows, *keys: str) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """Rows by the values of some columns."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    return groups


def _sorted_by_alpha(
    groups: Mapping[tuple[str, ...], list[Mapping[str, str]]],
) -> list[tuple[tuple[str, float], list[Mapping[str, str]]]]:
    order = list(dict.fromkeys(key[0] for key in groups))
    by_alpha = [((key[0], float(key[1])), rows) for key, rows in groups.items()]
    return sorted(by_alpha, key=lambda item: (order.index(item[0][0]), item[0][1]))
