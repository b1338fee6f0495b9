"""Curves of a benchmark's rows, drawn by matplotlib as SVG that takes colours and font from the page around it."""

import html
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flawsift.benchmark.extra import needed_for
from flawsift.benchmark.grid import NONE, ORACLE
from flawsift.benchmark.tables import PRESET_NAMES, Figure, Metric, Rows, figure, grouped

DEFECTIVE = "defective in training, %"
SIZE = (3.1, 2.1)  # inches at 72 points: four in a row of the page
STEP = 0.05  # limits of an axis are multiples of it


@dataclass(frozen=True)
class Style:
    """How a line looks, here and in the key of the page.

    Attributes:
        colour: One of the page's, by the name of its CSS variable.
        dashed: Dashed with hollow points.
    """

    colour: str
    dashed: bool = False


PRESET_STYLES: Mapping[str, Style] = {
    NONE: Style("untouched"),
    "paper": Style("paper"),
    "default": Style("normal"),
    ORACLE: Style("oracle", dashed=True),
}
OTHER = Style("anomalous")  # of a preset that is none of those
# column of the rows, kind of image, name, style
KEPT = (
    ("kept_normal", "normal", "normal, consensus", Style("normal")),
    ("alone_normal", "normal", "normal, sub-model alone", Style("normal", dashed=True)),
    ("kept_anomalous", "anomalous", "anomalous, consensus", Style("anomalous")),
    ("alone_anomalous", "anomalous", "anomalous, sub-model alone", Style("anomalous", dashed=True)),
)
# matplotlib knows no CSS variables, and the page has a light and a dark scheme: what is drawn in one of these colours
# gets the variable of that name
_STAND_INS = {
    name: f"#0102{number:02x}"
    for number, name in enumerate(("untouched", "paper", "normal", "oracle", "anomalous", "muted", "line", "card"))
}


@dataclass(frozen=True)
class Series:
    """Values of one line, None where nothing was measured, and their standard deviations, drawn as a band."""

    style: Style
    values: Sequence[float | None]
    deviations: Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """A drawing and the numbers in it.

    Attributes:
        title: What it is of.
        svg: The drawing, inline.
        header: Where values are, as texts.
        table: The name of each line and its values, as texts.
    """

    title: str
    svg: str
    header: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def accuracy_curves(rows: Rows) -> list[Curve]:
    """Image AUROC over the contamination: a drawing for each set and detector, a line for each preset of stage 1.

    Mean over categories, then mean and standard deviation over seeds. All drawings of a set have one scale.
    """
    curves = []
    for (data, protocol, k), of_set in grouped(rows, "data", "protocol", "n_subsets").items():
        alphas = sorted({float(row["alpha"]) for row in of_set})
        figures = _figures(of_set, alphas)
        measured = [f for of_preset in figures.values() for f in of_preset if f is not None]
        if len(alphas) < 2 or not measured:
            continue
        high = min(1.0, math.ceil(max(f.mean + (f.sd or 0) for f in measured) / STEP) * STEP)
        low = math.floor(min(f.mean - (f.sd or 0) for f in measured) / STEP) * STEP
        limits = min(low, high - STEP), high  # all may be equal
        for method in dict.fromkeys(method for method, _ in figures):
            title = _title(data, method, _protocol(protocol), f"k = {k}" if k else "")
            presets = {preset: of_preset for (m, preset), of_preset in figures.items() if m == method}
            curves.append(_accuracy(title, alphas, presets, limits))
    return curves


def _figures(rows: Rows, alphas: Sequence[float]) -> dict[tuple[str, ...], list[Figure | None]]:
    """{(detector, preset): its image AUROC at each contamination}."""
    at = [[row for row in rows if float(row["alpha"]) == alpha] for alpha in alphas]
    return {
        key: [figure(grouped(some, "detector", "preset").get(key, []), Metric("image_auroc"), some) for some in at]
        for key in grouped(rows, "detector", "preset")
    }


def _accuracy(
    title: str, alphas: Sequence[float], presets: Mapping[str, Sequence[Figure | None]], limits: tuple[float, float]
) -> Curve:
    percent = [100 * alpha for alpha in alphas]
    lines, table = [], []
    for preset, figures in presets.items():
        means, sds = [None if f is None else f.mean for f in figures], [None if f is None else f.sd for f in figures]
        lines.append(Series(PRESET_STYLES.get(preset, OTHER), means, sds))
        table.append((PRESET_NAMES.get(preset, preset), *("-" if f is None else f.text() for f in figures)))
    svg = draw(percent, lines, limits, DEFECTIVE, f"Image AUROC over contamination: {title}")
    return Curve(title, svg, tuple(f"{x:g} %" for x in percent), tuple(table))


def kept_curves(rows: Rows) -> list[Curve]:
    """Shares of the images that stage 1 keeps, by its consensus and by a sub-model alone, over the contamination.

    Over k, too, where several were run. A drawing for each set, detector and preset that selects.
    """
    chosen = [r for r in rows if r.get("alone_normal") and r["preset"] not in (NONE, ORACLE)]
    curves: list[Curve] = []
    for (data, protocol, method, preset, k), mine in _by(chosen, "n_subsets"):
        title = _title(data, method, preset, _protocol(protocol), f"k = {k}" if k else "")
        curves += _kept(mine, "alpha", 100.0, DEFECTIVE, title)
    for (data, protocol, method, preset, alpha), mine in _by(chosen, "alpha"):
        if float(alpha):  # a clean set has nothing to keep apart
            title = _title(data, method, preset, _protocol(protocol), f"{float(alpha):.0%} defective")
            curves += _kept(mine, "n_subsets", 1.0, "subsets k", title)
    return curves


def _by(rows: Rows, fixed: str) -> Sequence[tuple[tuple[str, ...], Rows]]:
    return list(grouped(rows, "data", "protocol", "detector", "preset", fixed).items())


def _kept(rows: Rows, column: str, scale: float, axis: str, title: str) -> list[Curve]:
    """The curve of rows that differ in one column; none where that has one value."""
    points = sorted({float(r[column]) for r in rows if r[column]})
    if len(points) < 2:
        return []
    at = [[r for r in rows if r[column] and float(r[column]) == x] for x in points]
    shares = [[_share(some, kept, kind) for some in at] for kept, kind, _, _ in KEPT]
    lines = [Series(style, values, [None] * len(values)) for values, (*_, style) in zip(shares, KEPT, strict=True)]
    xs = [scale * x for x in points]
    texts = [
        (name, *("-" if value is None else f"{value:.0f}" for value in values))
        for values, (_, _, name, _) in zip(shares, KEPT, strict=True)
    ]
    return [
        Curve(
            title,
            draw(xs, lines, (0, 100), axis, f"Percent of images kept: {title}"),
            tuple(f"{x:g} %" if column == "alpha" else f"k = {x:g}" for x in xs),
            tuple(texts),
        )
    ]


def _share(rows: Rows, column: str, kind: str) -> float | None:
    """Percent of all normal or anomalous training images, averaged over categories and seeds."""
    shares = []
    for row in rows:
        anomalous = float(row["n_train"]) * float(row["alpha_reached"])
        of = anomalous if kind == "anomalous" else float(row["n_train"]) - anomalous
        if round(of) and row.get(column):
            shares.append(100 * float(row[column]) / of)
    return statistics.fmean(shares) if shares else None


def _title(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _protocol(name: str) -> str:
    """The usual protocol goes without saying."""
    return "" if name == "no_overlap" else name.replace("_", " ")


# ---- how -------------------------------------------------------------------------------------------------------------


def draw(xs: Sequence[float], series: Sequence[Series], limits: tuple[float, float], axis: str, label: str) -> str:
    """Lines as SVG for a page of HTML; the same input gives the same text.

    Args:
        xs: Where values are.
        series: Each with a value for each x.
        limits: Of the y axis.
        axis: What x is.
        label: What is seen, for those who cannot see it.

    Raises:
        InputError: matplotlib is not installed.
    """
    with needed_for("A curve"):
        import matplotlib
        from matplotlib.figure import Figure as Drawing
    muted, line_colour, card = (_STAND_INS[name] for name in ("muted", "line", "card"))
    # the salt makes ids that no other drawing on the page has, and that do not change from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}):
        drawing = Drawing(figsize=SIZE, layout="constrained")
        axes = drawing.subplots()
        for one in series:
            colour = _STAND_INS[one.style.colour]
            values, deviations = np.array(one.values, float), np.array(one.deviations, float)  # None becomes nan
            if not np.isnan(deviations).all():
                axes.fill_between(xs, values - deviations, values + deviations, color=colour, alpha=0.12, linewidth=0)
            dashes, inner = ("--", card) if one.style.dashed else ("-", colour)
            axes.plot(xs, values, dashes, color=colour, marker="o", markersize=4, mfc=inner, clip_on=False)
        axes.set_ylim(*limits)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.locator_params(axis="y", nbins=4)
        axes.set_xlabel(axis, color=muted)
        axes.tick_params(colors=muted, length=0)
        axes.grid(axis="y", color=line_colour)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """A drawing as a part of a page: named, in the page's colours and font, without what a file needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    linked = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in linked else "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><").strip()
    named = f'role="img" aria-label="{html.escape(label, quote=True)}"'
    return re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', lambda match: f"<svg {match[1]} {named}>", svg, count=1)
