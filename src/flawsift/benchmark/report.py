"""A benchmark's rows as tables (Markdown, LaTeX), and as one HTML page with curves, example pictures and prices.

Figures are means over categories, then mean and standard deviation over seeds. Figures that others published are added
where they are asked for, apart from ours; they are never ranked.
"""

import functools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flawsift.benchmark.curves import KEPT, OTHER, PRESET_STYLES, accuracy_curves, kept_curves
from flawsift.benchmark.grid import ADDRESS, Config
from flawsift.benchmark.rows import read_rows
from flawsift.benchmark.runner import MAPS, RESULTS
from flawsift.benchmark.tables import (
    PRESET_NAMES,
    Rows,
    grouped,
    latex,
    markdown,
    measured_tables,
    newest,
    quoted_tables,
)
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets import load
from flawsift.detectors.parts.maps import scaled_shape, to_image_grid
from flawsift.errors import FlawsiftError, InputError
from flawsift.files import ensure_folder, write_text
from flawsift.occupied import refuse_other_results
from flawsift.paths import show
from flawsift.reports.overlays import Scale, overlay, shrink
from flawsift.reports.pages import data_uri, template
from flawsift.reports.regions import outlines_of_prediction

PAGE, MARKDOWN, LATEX = "report.html", "table.md", "table.tex"
EXAMPLE_ALPHA = 0.2  # the contamination of the example pictures, where the rows have it
EXAMPLE_ROWS = 12  # pictures: a page of them
THUMB = 180  # pixels of an example's long edge


def write_benchmark_report(
    results: str | Path, folder: str | Path, *, config: Config | None = None, quoted: bool = False
) -> dict[str, Path]:
    """Write table.md, table.tex and report.html.

    Args:
        results: results.csv of `flawsift.benchmark.runner.run`, or its folder.
        folder: For the report.
        config: The grid, to find the pictures of its examples again. They are drawn into the report only.
        quoted: Whether to add figures that others published, after the measured ones.

    Returns:
        {what: path}.

    Raises:
        InputError: There are no rows, or matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    path = _rows_file(results)
    rows = read_rows(path, ADDRESS)
    if not rows:
        raise InputError(f"'{show(path)}' has no rows. Run `flawsift benchmark` first.")
    refuse_other_results(folder)
    folder = ensure_folder(folder)
    good, failed = newest(rows)
    unfinished = failures(failed)
    tables = [replace(t, lines=tuple(line for line in t.lines if not line.quoted)) for t in measured_tables(good)]
    tables += quoted_tables() if quoted else []
    written = {"Markdown": folder / MARKDOWN, "LaTeX": folder / LATEX, "HTML": folder / PAGE}
    write_text(written["Markdown"], _warning(unfinished) + "\n".join(markdown(t) for t in tables))
    write_text(written["LaTeX"], _warning(unfinished, "% ") + "\n".join(latex(t) for t in tables))
    presets = dict.fromkeys(r["preset"] for r in good)
    page = template("benchmark.html", "benchmark").render(
        tables=tables,
        names=PRESET_NAMES,
        accuracy=accuracy_curves(good),
        accuracy_key=[(PRESET_NAMES.get(p, p), PRESET_STYLES.get(p, OTHER)) for p in presets],
        kept=kept_curves(good),
        kept_key=[(name, style) for _, _, name, style in KEPT],
        prices=prices(good),
        examples=examples(good, path.parent / MAPS, config),
        failures=unfinished,
        origin=origin(good),
        n_rows=len(good),
    )
    write_text(written["HTML"], page)
    return written


def failures_of(results: str | Path) -> list[tuple[str, int]]:
    """(data, method and reason; how many cells) of what failed and was not made good by a later row.

    Args:
        results: As for `write_benchmark_report`.
    """
    return failures(newest(read_rows(_rows_file(results), ADDRESS))[1])


def _rows_file(results: str | Path) -> Path:
    path = Path(results)
    return path / RESULTS if path.is_dir() else path


def _warning(unfinished: Sequence[tuple[str, int]], mark: str = "") -> str:
    """The first lines of a table file: what failed, each line after a mark; nothing where all is well."""
    if not unfinished:
        return ""
    lines = [f"{sum(n for _, n in unfinished)} cells failed; the tables lack them:", ""]
    lines += [f"- {text} ({n} cells)" for text, n in unfinished]
    return "".join(f"{mark}{line}\n" for line in lines) + "\n"


# ---- prices, failures, origin ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """What a method costs, as texts."""

    method: str
    data: str
    images: str
    stage1: str
    stage2: str
    per_image: str
    size: str
    memory: str


def prices(rows: Rows) -> list[Price]:
    """Means over all rows of each method on each set, whatever their preset; the largest peak memory."""
    prices = []
    for (data, method), mine in grouped(rows, "data", "detector").items():
        tests = [1000 * float(r["seconds_evaluate"]) / float(r["n_test"]) for r in mine if r.get("seconds_evaluate")]
        peak = max((float(r["peak_mb"]) for r in mine if r.get("peak_mb")), default=0.0)
        prices.append(
            Price(
                method=method,
                data=data,
                images=f"{_mean(mine, 'n_train'):,.0f}",
                stage1=_short(_mean(mine, "seconds_stage1")),
                stage2=_short(_mean(mine, "seconds_stage2")),
                per_image=_short(statistics.fmean(tests)) if tests else "-",
                size=_bytes(_mean(mine, "model_bytes")),
                memory=f"{peak:,.0f}",
            )
        )
    return prices


def _mean(rows: Rows, column: str) -> float:
    values = [float(r[column]) for r in rows if r.get(column)]
    return statistics.fmean(values) if values else float("nan")


def _short(value: float) -> str:
    """Two digits at least, and no decimals that say nothing; "-" where nothing was measured."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _bytes(n: float) -> str:
    if math.isnan(n):
        return "-"
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def failures(rows: Rows) -> list[tuple[str, int]]:
    """(data, method and reason; how many cells) of what failed, presets of a cell counted once."""
    cells = {tuple(r[key] for key in ADDRESS[:-1]): r for r in rows}
    texts = [f"{r['data']} {r['category']}, {r['detector']}: {r['error']}".replace(" ,", ",") for r in cells.values()]
    return [(text, texts.count(text)) for text in dict.fromkeys(texts)]


def origin(rows: Rows) -> list[str]:
    """One line for each commit, machine and set of versions behind the rows."""
    lines = []
    for (commit, machine, versions), mine in grouped(rows, "commit", "machine", "versions").items():
        m = json.loads(machine or "{}")
        v = ", ".join(f"{k} {n}" for k, n in json.loads(versions or "{}").items())
        where = f"{m.get('cpu', '?')}, {m.get('cores', '?')} cores, {m.get('gib', '?')} GiB, {m.get('os', '?')}"
        lines.append(f"{len(mine)} rows: {f'commit {commit}; ' if commit else ''}{where}; {v}.")
    return lines


# ---- example pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Pictures in lines: the image, its mask, and each method's map.

    Attributes:
        caption: What they are of.
        methods: Names of the columns behind image and mask.
        lines: (name, pictures as data URIs, "" where there is none).
        problem: Why there are none.
    """

    caption: str = ""
    methods: tuple[str, ...] = ()
    lines: tuple[tuple[str, tuple[str, ...]], ...] = ()
    problem: str = ""


def examples(rows: Rows, maps: Path, config: Config | None) -> Examples:
    """Maps of all methods on the same images, of one contamination, preset and seed."""
    with_maps = [r for r in rows if (maps / f"{r.get('key', '')}.npz").is_file()]
    if not with_maps:
        return Examples(problem="The rows have no anomaly maps beside them.")
    if config is None:
        return Examples(problem="Pictures need the grid's file: give it with --config.")
    alpha = min({float(r["alpha"]) for r in with_maps}, key=lambda a: abs(a - EXAMPLE_ALPHA))
    presets = list(dict.fromkeys(r["preset"] for r in with_maps))
    preset = "default" if "default" in presets else presets[0]
    first = with_maps[0]
    mine = [
        r
        for r in with_maps
        if (float(r["alpha"]), r["preset"], r["protocol"], r["n_subsets"])
        == (alpha, preset, first["protocol"], first["n_subsets"])
    ]
    methods = tuple(dict.fromkeys(r["detector"] for r in mine))
    lines: list[tuple[str, tuple[str, ...]]] = []
    groups = grouped(mine, "data", "category")
    per_set = max(1, EXAMPLE_ROWS // max(1, len(groups)))
    for (data, category), here in groups.items():
        spec = next((d for d in config.data if d.name == data), None)
        if spec is None:
            continue
        try:
            options = {**dict(spec.options), **({"category": category} if category else {})}
            if data == "realiad":
                options["alpha"] = alpha if first["protocol"] == "official" else 0.0
            loaded = load(data, **options)
            lines += _example_lines(loaded.images, loaded.truth, here, methods, maps, per_set)
        except FlawsiftError as error:
            return Examples(problem=f"The pictures of {data} cannot be drawn: {error}")
    name = PRESET_NAMES.get(preset, preset)
    return Examples(f"{alpha:.0%} of the training images defective; stage 1: {name}.", methods, tuple(lines))


def _example_lines(
    images: ImageSet, truth: GroundTruth, rows: Rows, methods: Sequence[str], maps: Path, n: int
) -> Iterable[tuple[str, tuple[str, ...]]]:
    maps_of: dict[str, dict[str, Any]] = {}
    sharp = functools.partial(data_uri, subsampling=0)
    for row in rows:
        with np.load(maps / f"{row['key']}.npz", allow_pickle=False) as content:
            maps_of[row["detector"]] = dict(content)
    ids = next(iter(maps_of.values()))["ids"][:n].tolist()
    for id_ in ids:
        picture = shrink(images.image(id_), THUMB)
        mask = truth.mask(id_, (picture.height, picture.width))
        drawn = [sharp(picture), "" if mask is None else sharp(Image.fromarray(mask).convert("RGB"))]
        for method in methods:
            arrays = maps_of.get(method)
            place = [] if arrays is None else np.flatnonzero(arrays["ids"] == id_).tolist()
            drawn.append("" if arrays is None or not place else sharp(_heatmap(picture, arrays, place[0])))
        kind = truth.select([id_]).defect_types[0]
        yield f"{' '.join(filter(None, (rows[0]['data'], rows[0]['category'])))}, {kind}", tuple(drawn)


def _heatmap(picture: Image.Image, arrays: Mapping[str, Any], at: int) -> Image.Image:
    """A method's map over a picture; its colours are the same on all pictures of a set."""
    low, threshold = arrays["scale"].tolist()
    middle = float(np.median(arrays["scores"]))  # a threshold that no picture reaches would leave them all blank
    scale = Scale.of([low], min(middle, threshold) if np.isfinite(threshold) else middle)
    grid = torch.from_numpy(arrays["grids"][at : at + 1].astype(np.float32))
    fine = to_image_grid(grid, scaled_shape(grid, THUMB))[0]
    peak = float(fine.max())  # smoothing lowers it below the score
    score = float(arrays["scores"][at])
    drawn = fine.numpy() * np.float32(score / peak) if peak > 0 else fine.numpy()
    outlines = outlines_of_prediction(drawn, score, scale.threshold, picture.size)
    return overlay(picture, drawn, scale, outlines, max_edge=THUMB)
