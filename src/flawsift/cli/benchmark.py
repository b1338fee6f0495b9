"""The commands around benchmarks and the cache: `flawsift benchmark`, `benchmark-report`, `cache`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flawsift.cli.options import Cache, Out, store_of, takes_groups
from flawsift.cli.output import Output
from flawsift.errors import InputError
from flawsift.paths import show
from flawsift.progress import Stage

cache_app = typer.Typer(help="List, verify or clear the feature cache.", no_args_is_help=True)


DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="Folder that holds downloaded sets, each under its name, such as mvtec or visa. [$FLAWSIFT_DATA]",
    ),
]


# long: each parameter is an option of the command
@takes_groups
def benchmark(
    config: Annotated[Path, typer.Argument(help="TOML file of the grid, such as benchmarks/example.toml.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for results.csv; rows that are there are kept. --dry-run needs none."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would run, which data are missing and about how long it takes."),
    ] = False,
    data_root: DataRoot = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="As for `screen`, for cells or sub-models. [the file's]")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make rows again that are there.")] = False,
    any_commit: Annotated[bool, typer.Option("--any-commit", help="Rows of other commits count as done.")] = False,
    cache: Cache = None,
    *,
    output: Output,
) -> None:
    """Run a grid of detectors, data sets, contaminations, protocols, presets and seeds; resumable.

    Exit code 1 if a cell failed.
    """
    if dry_run:
        with output.progress():
            _use_data_root(data_root)
            plan, lines = _planned(config, out, fresh=fresh, any_commit=any_commit)
        output.say(plan, lines)
        return
    if out is None:
        raise InputError("Where should the rows go? Give --out FOLDER. Only --dry-run needs none.")
    with output.progress() as progress:
        from flawsift.benchmark import grid
        from flawsift.benchmark.config import read_config
        from flawsift.benchmark.runner import RESULTS, run
        from flawsift.executors import make_executor

        _use_data_root(data_root)
        wanted = read_config(config)
        cells = grid.plan(wanted)
        rows = run(
            wanted,
            out,
            store=store_of(cache),
            executor=None if executor is None else make_executor(executor),
            fresh=fresh,
            any_commit=any_commit,
            progress=progress,
        )
    failed = [row for row in rows if row.get("error")]
    lines = [f"{len(cells)} cells, {len(rows)} new rows, {len(failed)} of them failed: {out / RESULTS}"]
    reasons = list(dict.fromkeys(row["error"] for row in failed))
    lines += [f"  {reason}" for reason in reasons[:5]]
    lines.append(f"Tables and curves: flawsift benchmark-report {show(out)} --out REPORT")
    output.say({"n_cells": len(cells), "n_rows": len(rows), "n_failed": len(failed), "reasons": reasons}, lines)
    if failed:
        raise typer.Exit(1)


def _planned(config: Path, out: Path | None, *, fresh: bool, any_commit: bool) -> tuple[dict[str, Any], list[str]]:
    """What would run, for programs and for people."""
    from flawsift.benchmark import forecast, grid
    from flawsift.benchmark.config import read_config
    from flawsift.benchmark.rows import read_rows, source_commit
    from flawsift.benchmark.runner import RESULTS

    wanted = read_config(config)
    cells = grid.plan(wanted)
    earlier = [] if out is None else read_rows(out / RESULTS, ["key"])
    done = set() if fresh else grid.done_places(earlier, None if any_commit else source_commit())
    open_ = [c for c in cells if any(c.place(preset) not in done for preset in c.presets)]
    seconds, unknown = grid.estimate_seconds(open_, earlier)
    rough, missing = forecast.rough_seconds(open_), forecast.missing_data(wanted)
    lines = grid.describe_plan(wanted, open_, len(cells), seconds, unknown)
    if unknown:
        lines.append(
            f"Rough guess for {len(open_)} cells, from their numbers of images alone: {forecast.duration(rough)} "
            "on two cores. It may be several times more or less."
        )
    lines += [f"MISSING {name}: {reason}" for name, reason in missing.items()]
    plan = {"n_cells": len(cells), "n_open": len(open_), "seconds": seconds, "n_unknown": unknown}
    return {**plan, "rough_seconds": rough, "missing": missing}, lines


def _use_data_root(folder: Path | None) -> None:
    """Let data sets, and workers that are started, look for downloaded sets there."""
    from flawsift.datasets.dataset import require_folder
    from flawsift.datasets.folder import DATA_VARIABLE

    if folder is not None:
        os.environ[DATA_VARIABLE] = str(require_folder(folder).resolve())


@takes_groups
def benchmark_report(
    results: Annotated[Path, typer.Argument(help="results.csv of `flawsift benchmark`, or its folder.")],
    out: Out,
    config: Annotated[
        Path | None, typer.Option("--config", help="The grid's file, to draw example pictures of its data sets.")
    ] = None,
    quoted: Annotated[
        bool, typer.Option("--quoted", help="Add figures that others published, apart from the measured ones.")
    ] = False,
    data_root: DataRoot = None,
    *,
    output: Output,
) -> None:
    """Tables (Markdown, LaTeX, HTML), curves, example pictures and prices of a benchmark.

    Exit code 1 if cells failed; the report names them first.
    """
    with output.progress() as progress:
        from flawsift.benchmark.config import read_config
        from flawsift.benchmark.report import failures_of, write_benchmark_report

        _use_data_root(data_root)
        grid = None if config is None else read_config(config)
        progress(Stage.WRITING, 0, 1)
        written = write_benchmark_report(results, out, config=grid, quoted=quoted)
    n_failed = sum(n for _, n in failures_of(results))
    lines = [f"{name}: {path}" for name, path in written.items()]
    if n_failed:
        lines.insert(0, f"WARNING: {n_failed} cells failed. The report names them; its tables lack them.")
    output.say({**{name: str(path) for name, path in written.items()}, "n_failed": n_failed}, lines)
    if n_failed:
        raise typer.Exit(1)


@cache_app.command("list")
@takes_groups
def cache_list(cache: Cache = None, *, output: Output) -> None:
    """What the feature cache holds."""
    with output.progress():
        store = store_of(cache)
        rows = store.summary()
    lines = [f"{r['key']}: {r['images']} images, {', '.join(r['layers'])}, {r['bytes'] / 1e6:.1f} MB" for r in rows]
    output.say({"root": str(store.root), "entries": rows}, [f"Feature cache: {store.root}", *(lines or ["empty"])])


@cache_app.command("verify")
@takes_groups
def cache_verify(
    cache: Cache = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged.")] = False,
    *,
    output: Output,
) -> None:
    """Recompute the checksums of the feature cache; exit code 1 when something is damaged and left so."""
    with output.progress() as progress:
        store = store_of(cache)
        progress(Stage.VERIFYING, 0, 1)
        problems = store.verify(repair=repair)
    output.say({"problems": problems, "repaired": repair}, problems or ["The feature cache is intact."])
    if problems and not repair:
        raise typer.Exit(1)


@cache_app.command("clear")
@takes_groups
def cache_clear(cache: Cache = None, *, output: Output) -> None:
    """Remove everything that flawsift cached."""
    with output.progress():
        freed = store_of(cache).clear()
    output.say({"freed_bytes": freed}, [f"{freed / 1e6:.1f} MB freed."])
