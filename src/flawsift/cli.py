"""The command line: thin commands over public functions.

Results go to stdout (`--json` makes them machine-readable), progress to stderr when it is a terminal, and an error is
one line with exit code 2. Heavy imports live inside the commands, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift import __version__
from flawsift.errors import FlawsiftError, ParameterError

if TYPE_CHECKING:
    from flawsift.backbones import Backbone
    from flawsift.datasets import Dataset
    from flawsift.detector import Detector
    from flawsift.features import FeatureStore
    from flawsift.images import ImageSet
    from flawsift.progress import Progress
    from flawsift.screening import ScreenOptions

# BadParameter < UsageError < ClickException: newer typers carry a click of their own, so it is asked of typer
_UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="flawsift",
    help="Unlabelled product images in; probable defects, a purified set and a trained detector out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="List, verify or clear the feature cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


class Preset(StrEnum):
    """Named options of stage 1."""

    default = "default"
    paper = "paper"


class ConsensusName(StrEnum):
    """See `flawsift.consensus.Consensus`."""

    mean = "mean"
    median = "median"
    trimmed_mean = "trimmed_mean"
    rank_mean = "rank_mean"


class NormalizeName(StrEnum):
    """See `flawsift.consensus.Normalize`."""

    none = "none"
    robust = "robust"
    rank = "rank"


class ExportName(StrEnum):
    """See `flawsift.export.export`."""

    folder = "folder"
    csv = "csv"
    coco = "coco"
    fiftyone = "fiftyone"
    labelstudio = "labelstudio"


class Runtime(StrEnum):
    """See `flawsift.backbones.load_backbone`."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


Images = Annotated[Path, typer.Argument(help="Folder of images, flat or nested.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", show_default=False)]
DetectorName = Annotated[str, typer.Option("--detector", help="See `flawsift detectors`.")]
ScreenerName = Annotated[
    str | None, typer.Option("--screener", help="Detector of stage 1; 'own' for --detector. [preset: patchcore]")
]
DetectorPreset = Annotated[str, typer.Option("--detector-preset", help="'default', or 'paper' for its constants.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Detector parameter, such as coreset_ratio=0.1. Repeatable.")
]
BackboneName = Annotated[str, typer.Option("--backbone", help="efficientnet_lite0 (offline) or any timm name.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Local weights file of the backbone.")]
Size = Annotated[int, typer.Option("--size", help="Edge length in pixels that images are resized to.")]
RuntimeOption = Annotated[Runtime, typer.Option("--runtime", help="What runs the backbone.")]
PresetOption = Annotated[Preset, typer.Option("--preset", help="Options of stage 1, where not given one by one.")]
Subsets = Annotated[int | None, typer.Option("--subsets", help="Disjoint subsets k. [preset: 5]")]
Partitions = Annotated[int | None, typer.Option("--partitions", help="Independent random partitions. [preset: 1]")]
Keep = Annotated[str | None, typer.Option("--keep", help="'auto', or the share to keep such as 0.4. [preset: auto]")]
ConsensusOption = Annotated[ConsensusName | None, typer.Option("--consensus", help="How sub-models vote.")]
NormalizeOption = Annotated[NormalizeName | None, typer.Option("--normalize", help="How they come on one scale.")]
ExcludeOwn = Annotated[
    bool | None, typer.Option("--exclude-own/--include-own", help="Leave out the sub-model that trained on the image.")
]
DivergenceWeight = Annotated[float | None, typer.Option("--divergence-weight", help="Weight of the paper's eq. 2.")]
RejectPatches = Annotated[
    float | None,
    typer.Option("--reject-patches", help="Robust deviations above which a patch is not learned from; 0 rejects none."),
]
Groups = Annotated[
    Path | None, typer.Option("--groups", help="CSV with columns file, group: images that belong together.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="Where sub-models run: serial, process:N or ray:ADDRESS[,gpus=0.25].")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Feature cache. [~/.cache/flawsift or $FLAWSIFT_CACHE]")]
Rate = Annotated[float | None, typer.Option("--false-alarm-rate", help="Share of good parts that may be stopped.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Decisions = Annotated[
    Path | None, typer.Option("--decisions", help="CSV with columns path, decision: keep, remove or unsure.")
]
Reviewed = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a screening, or of a model.", show_default=False)
]
Root = Annotated[
    Path | None, typer.Option("--images", help="Folder of the images, where it is not the one that was screened.")
]
ModelFolder = Annotated[Path, typer.Argument(help="Folder written by `flawsift fit`.", show_default=False)]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"flawsift {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def screen(
    images: Images,
    out: Out,
    detector: DetectorName = "patchcore",
    detector_preset: DetectorPreset = "default",
    settings: Settings = None,
    backbone: BackboneName = "efficientnet_lite0",
    weights: Weights = None,
    size: Size = 256,
    runtime: RuntimeOption = Runtime.auto,
    preset: PresetOption = Preset.default,
    subsets: Subsets = None,
    partitions: Partitions = None,
    keep: Keep = None,
    consensus: ConsensusOption = None,
    normalize: NormalizeOption = None,
    exclude_own: ExcludeOwn = None,
    divergence_weight: DivergenceWeight = None,
    reject_patches: RejectPatches = None,
    groups: Groups = None,
    seed: Seed = 0,
    device: Device = "auto",
    executor: ExecutorOption = "serial",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Stage 1: rank the images of a folder by how defective they look, and say which to keep."""
    from flawsift import pipeline, report
    from flawsift.executors import make_executor
    from flawsift.files import ensure_folder
    from flawsift.results import describe

    options = _screen_options(
        preset, subsets, partitions, keep, consensus, normalize, exclude_own, divergence_weight, reject_patches
    )
    ensure_folder(out)
    found = _images(images, groups)
    with _progress() as progress:
        result = pipeline.screen(
            found,
            _detector(detector, detector_preset, settings, seed),
            _backbone(backbone, weights, size, runtime, device),
            store=_store(cache),
            seed=seed,
            device=device,
            out=out,
            progress=progress,
            executor=make_executor(executor),
            **options,
        )
    page = report.write_screening_report(result, found, out)
    removed = result.removed
    lines = [
        f"{len(result.ids)} images screened, {len(removed)} set aside, {len(result.kept)} kept"
        + (f", {len(result.unreadable)} unreadable" if result.unreadable else "")
        + "."
    ]
    if result.rejected is not None and result.rejected.any():
        share = 100 * float(result.rejected[result.is_kept].mean())
        lines.append(f"Of the kept images, the {share:.1f} % most unusual patches are not learned from.")
    if result.contamination is not None:
        lines.append(f"Estimated share of defective images: {result.contamination.text}.")
    names = dict(zip(result.ids.tolist(), result.names, strict=True))
    lines += ["Most suspicious:", *(f"  {names[int(i)]}" for i in result.ranking[:5])]
    lines += [f"Table:  {out / 'screening.csv'}", f"Report: {page}", f"Decide: flawsift review {out}"]
    _say(as_json, {**describe(result), "out": str(out), "report": str(page)}, lines)


@app.command()
def fit(
    images: Images,
    out: Out,
    detector: DetectorName = "patchcore",
    detector_preset: DetectorPreset = "default",
    settings: Settings = None,
    backbone: BackboneName = "efficientnet_lite0",
    weights: Weights = None,
    size: Size = 256,
    runtime: RuntimeOption = Runtime.auto,
    preset: PresetOption = Preset.default,
    subsets: Subsets = None,
    partitions: Partitions = None,
    keep: Keep = None,
    consensus: ConsensusOption = None,
    normalize: NormalizeOption = None,
    exclude_own: ExcludeOwn = None,
    divergence_weight: DivergenceWeight = None,
    reject_patches: RejectPatches = None,
    groups: Groups = None,
    seed: Seed = 0,
    device: Device = "auto",
    executor: ExecutorOption = "serial",
    cache: Cache = None,
    screener: ScreenerName = None,
    screening: Annotated[Path | None, typer.Option("--screening", help="Use this stage 1, edited or not.")] = None,
    decisions: Decisions = None,
    no_screen: Annotated[bool, typer.Option("--no-screen", help="Train on every image.")] = False,
    false_alarm_rate: Rate = None,
    as_json: AsJson = False,
) -> None:
    """Both stages: screen a folder, then train a detector on what is kept."""
    from flawsift import pipeline, report
    from flawsift.calibration import DEFAULT_RATE
    from flawsift.decisions import read_decisions
    from flawsift.executors import make_executor
    from flawsift.screening import SCREENERS

    choices = None if decisions is None else read_decisions(decisions)
    options = _screen_options(
        preset, subsets, partitions, keep, consensus, normalize, exclude_own, divergence_weight, reject_patches
    )
    found = _images(images, groups)
    with _progress() as progress:
        result = pipeline.fit(
            found,
            _detector(detector, detector_preset, settings, seed),
            _backbone(backbone, weights, size, runtime, device),
            screening=screening,
            decisions=choices,
            no_screen=no_screen,
            screener=SCREENERS[preset.value] if screener is None else screener,
            false_alarm_rate=DEFAULT_RATE if false_alarm_rate is None else false_alarm_rate,
            store=_store(cache),
            seed=seed,
            device=device,
            out=out,
            progress=progress,
            executor=make_executor(executor),
            on_screened=lambda done: report.write_screening_report(done, found, out / "screening"),
            **options,
        )
    threshold = result.threshold()
    training = dict(result.training)
    lines = [f"Trained {detector} on {training['n_kept']} of {training['n_images']} images: {out}"]
    if note := training.get("screening_note"):
        lines.append(f"Note: {note} Screen the folder again to have them judged.")
    lines += _threshold_lines(threshold)
    page = None
    if not no_screen:
        stage1 = out / "screening" if screening is None else screening
        page = report.write_fit_report(result, stage1, out, images=images, choices=choices)
        lines += [f"Report: {page}", f"Decide image by image: flawsift review {stage1 if screening else out}"]
    summary = {"out": str(out), **training, "threshold": None if threshold is None else vars(threshold)}
    _say(as_json, {**summary, "report": None if page is None else str(page)}, lines)


@app.command()
def predict(
    model: ModelFolder,
    images: Images,
    out: Out,
    weights: Weights = None,
    runtime: RuntimeOption = Runtime.auto,
    device: Device = "auto",
    false_alarm_rate: Rate = None,
    maps: Annotated[bool, typer.Option("--maps/--no-maps", help="Write heatmap overlays.")] = True,
    as_json: AsJson = False,
) -> None:
    """Score new images: predictions.csv, and heatmap overlays in OUT/maps."""
    from flawsift import models
    from flawsift.files import ensure_folder
    from flawsift.images import show
    from flawsift.results import OverlayWriter, write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    found = _images(images, None)
    writer = OverlayWriter(out / "maps", loaded.calibration, loaded.threshold(false_alarm_rate)) if maps else None
    with _progress() as progress:
        result = models.predict(
            loaded, found, false_alarm_rate=false_alarm_rate, device=device, on_maps=writer, progress=progress
        )
    table = write_predictions(result, out)
    flagged = result.is_anomalous
    total = len(result.ids)
    lines = [f"{total} images scored." if flagged is None else f"{int(flagged.sum())} of {total} images are anomalous."]
    lines += _threshold_lines(result.threshold)
    lines += [
        f"Not readable: {show(result.names[p])}: {r}" for p, r in enumerate(map(result.errors.get, result.ids)) if r
    ]
    lines.append(f"Table: {table}" + (f"   Heatmaps: {out / 'maps'}" if maps else ""))
    summary = {
        "n_images": total,
        "n_anomalous": None if flagged is None else int(flagged.sum()),
        "n_unreadable": len(result.errors),
        "threshold": None if result.threshold is None else vars(result.threshold),
        "predictions": str(table),
    }
    _say(as_json, summary, lines)


@app.command()
def evaluate(
    model: ModelFolder,
    dataset: Annotated[str, typer.Argument(help="MVTec-style tree, or a named data set.", show_default=False)],
    out: Out,
    weights: Weights = None,
    runtime: RuntimeOption = Runtime.auto,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled images: OUT/metrics.json and OUT/predictions.csv."""
    from flawsift import datasets, models
    from flawsift.evaluation import write_evaluation_report
    from flawsift.files import ensure_folder, write_json
    from flawsift.results import write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    data = datasets.load(dataset)
    images = _test_images(data)
    with _progress() as progress:
        result, predictions = models.evaluate(loaded, images, data.truth, device=device, progress=progress)
    write_predictions(predictions, out, data.truth)
    write_json(out / "metrics.json", result)
    page = write_evaluation_report(loaded, result, predictions, images, data.truth, out, device=device)
    width = max(map(len, result))
    lines = [f"{key:<{width}}  {'-' if value is None else f'{value:.4g}'}" for key, value in result.items()]
    lines += [f"Written: {out / 'metrics.json'}", f"Report:  {page}"]
    _say(as_json, {**result, "out": str(out), "report": str(page)}, lines)


@app.command()
def review(
    folder: Reviewed,
    images: Root = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    cache: Cache = None,
) -> None:
    """Decide image by image in a local page, and refit; decisions go to decisions.csv beside the screening."""
    import webbrowser

    from flawsift.review import Review
    from flawsift.review_server import serve

    def ready(address: str) -> None:
        typer.echo(address)
        sys.stdout.flush()
        typer.echo("Open this address; stop with Ctrl-C. Decisions are saved at once.", err=True)
        if not no_browser:
            webbrowser.open(address)

    serve(Review.open(folder, images=images, cache=cache), port=port, on_ready=ready)


@app.command()
def export(
    folder: Reviewed,
    out: Out,
    to: Annotated[ExportName, typer.Option("--to", help="What reads it.", show_default=False)],
    images: Root = None,
    decisions: Decisions = None,
    link: Annotated[bool, typer.Option("--link", help="With 'folder': links instead of copies.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hand what was kept and removed to other tools. The images themselves stay where they are."""
    from flawsift import export as exporting
    from flawsift.decisions import NAME, read_decisions
    from flawsift.results import images_of, read_screening, screening_folder

    place = screening_folder(folder)
    there = place / NAME if decisions is None and (place / NAME).exists() else decisions
    found = read_screening(place)
    pictures = images_of(found, images)
    choices = None if there is None else read_decisions(there)
    counts = exporting.export(found, pictures, out, to.value, choices=choices, link=link)
    lines = [f"{counts['kept']} kept and {counts['removed']} removed images written to {out}."]
    if counts["missing"]:
        lines.append(f"{counts['missing']} images are missing or unreadable and were left out.")
    root = pictures.source.root  # type: ignore[attr-defined]  # images_of reads files
    note = exporting.opening_note(out, to.value, root)
    lines += [f"Open it with: {note}"] if note else []
    _say(as_json, {**counts, "out": str(out), "decisions": None if there is None else str(there)}, lines)


@app.command()
def diagnose(
    images: Images,
    out: Out,
    labels: Annotated[Path | None, typer.Option("--labels", help="CSV with columns file, label (0 or 1).")] = None,
    layer: Annotated[str, typer.Option("--layer", help="Backbone layer that is looked at.")] = "stride16",
    backbone: BackboneName = "efficientnet_lite0",
    weights: Weights = None,
    size: Size = 256,
    runtime: RuntimeOption = Runtime.auto,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Whether defects vary more than good patches, as methods for contaminated sets assume: OUT/diagnose.html."""
    from flawsift import diagnostics
    from flawsift.features import attach
    from flawsift.files import ensure_folder

    ensure_folder(out)
    found = _images(images, None)
    truth = None if labels is None else diagnostics.read_labels(labels, found)
    chosen = found if truth is None else found.select(truth.ids)
    network = _backbone(backbone, weights, size, runtime, device)
    with _progress() as progress:
        data, failed = attach(chosen, network, (layer,), store=_store(cache), progress=progress)
    result = diagnostics.diagnose(data, layer, truth=truth, seed=seed)
    page = diagnostics.write_diagnosis(result, out)
    counts = {**result.counts, "unlabelled": len(found) - len(chosen), "unreadable": len(failed)}
    without = "" if truth is None else f" {counts['unlabelled']} without a label,"
    lines = [f"{counts['images']} images looked at,{without} {len(failed)} unreadable."]
    lines += [f"Warning: {warning}" for warning in result.warnings] or ["No warning."]
    lines += [f"Page: {page}   Data: {out / diagnostics.DATA}"]
    summary = {"warnings": list(result.warnings), "counts": counts, "twins": list(result.twins)}
    _say(as_json, {**summary, "page": str(page), "data": str(out / diagnostics.DATA)}, lines)


@app.command()
def demo(
    out: Out,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """The whole chain on real solar cells (package elpv-dataset); labels are used only to evaluate."""
    from flawsift.demo import run_demo
    from flawsift.files import ensure_folder

    ensure_folder(out)
    with _progress() as progress:
        result = run_demo(out, seed=seed, device=device, store=_store(cache), progress=progress)
    _say(as_json, result.as_json(), result.lines())


@app.command()
def detectors(as_json: AsJson = False) -> None:
    """List the detectors with their parameters."""
    from flawsift.detector import DETECTORS, detector_class

    table: dict[str, Any] = {}
    lines = []
    for name in DETECTORS:
        cls = detector_class(name)
        summary = (cls.__doc__ or "").splitlines()[0]
        table[name] = {"summary": summary, "presets": sorted(cls.presets), "params": cls().params()}
        lines.append(f"{name:<10} {summary}")
        lines.append("           " + ", ".join(f"{k}={v}" for k, v in table[name]["params"].items()))
    _say(as_json, table, lines)


@app.command()
def benchmark(
    config: Annotated[Path, typer.Argument(help="TOML file of the grid, such as benchmarks/table1.toml.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.csv; rows that are there are kept.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its estimated time only.")] = False,
    executor: Annotated[
        str | None, typer.Option("--executor", help="As for `screen`, for cells or sub-models. [the file's]")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make rows again that are there.")] = False,
    any_commit: Annotated[bool, typer.Option("--any-commit", help="Rows of other commits count as done.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Run a grid of detectors, data sets, contaminations, protocols, presets and seeds; resumable."""
    from flawsift import grid
    from flawsift.benchmark import RESULTS, run
    from flawsift.executors import make_executor
    from flawsift.rows import read_rows, source_commit

    wanted = grid.read_config(config)
    cells = grid.plan(wanted)
    earlier = read_rows(out / RESULTS)
    if dry_run:
        done = set() if fresh else grid.done_places(earlier, None if any_commit else source_commit())
        open_ = [c for c in cells if any(c.place(preset) not in done for preset in c.presets)]
        seconds, unknown = grid.estimate_seconds(open_, earlier)
        lines = grid.describe_plan(wanted, open_, len(cells), seconds, unknown)
        plan = {"n_cells": len(cells), "n_open": len(open_), "seconds": seconds, "n_unknown": unknown}
        _say(as_json, plan, lines)
        return
    with _progress() as progress:
        rows = run(
            wanted,
            out,
            store=_store(cache),
            executor=None if executor is None else make_executor(executor),
            fresh=fresh,
            any_commit=any_commit,
            progress=progress,
        )
    failed = [row for row in rows if row.get("error")]
    lines = [f"{len(cells)} cells, {len(rows)} new rows, {len(failed)} of them failed: {out / RESULTS}"]
    reasons = list(dict.fromkeys(row["error"] for row in failed))
    lines += [f"  {reason}" for reason in reasons[:5]]
    _say(as_json, {"n_cells": len(cells), "n_rows": len(rows), "n_failed": len(failed), "reasons": reasons}, lines)
    if failed:
        raise typer.Exit(1)


@app.command("benchmark-report")
def benchmark_report(
    results: Annotated[Path, typer.Argument(help="results.csv of `flawsift benchmark`, or its folder.")],
    out: Out,
    config: Annotated[
        Path | None, typer.Option("--config", help="The grid's file, to draw example pictures of its data sets.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tables (Markdown, LaTeX, HTML), curves, example pictures and prices of a benchmark."""
    from flawsift.benchmark_report import write_benchmark_report
    from flawsift.grid import read_config

    found = write_benchmark_report(results, out, config=None if config is None else read_config(config))
    _say(as_json, {name: str(path) for name, path in found.items()}, [f"{n}: {p}" for n, p in found.items()])


@cache_app.command("list")
def cache_list(cache: Cache = None, as_json: AsJson = False) -> None:
    """What the feature cache holds."""
    store = _store(cache)
    rows = store.summary()
    lines = [f"{r['key']}: {r['images']} images, {', '.join(r['layers'])}, {r['bytes'] / 1e6:.1f} MB" for r in rows]
    _say(as_json, {"root": str(store.root), "entries": rows}, [f"Feature cache: {store.root}", *(lines or ["empty"])])


@cache_app.command("verify")
def cache_verify(
    cache: Cache = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute the checksums of the feature cache; exit code 1 when something is damaged and left so."""
    problems = _store(cache).verify(repair=repair)
    _say(as_json, {"problems": problems, "repaired": repair}, problems or ["The feature cache is intact."])
    if problems and not repair:
        raise typer.Exit(1)


@cache_app.command("clear")
def cache_clear(cache: Cache = None, as_json: AsJson = False) -> None:
    """Remove everything that flawsift cached."""
    freed = _store(cache).clear()
    _say(as_json, {"freed_bytes": freed}, [f"{freed / 1e6:.1f} MB freed."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command, print errors as one line, exit."""
    _quiet_libraries()
    try:
        code = app(args=arguments, standalone_mode=False)
    except FlawsiftError as error:
        code = _fail(str(error))
    except _UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            code = 2
        else:
            code = _fail(error.format_message())  # type: ignore[attr-defined]  # every ClickException has it
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("stopped; the same command goes on where it was.", 130)
    except OSError as error:
        code = _fail(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else ""))
    except MemoryError:
        code = _fail("out of memory. Use a smaller --size, fewer images or a detector with a smaller state.")
    sys.exit(code or 0)


def _fail(text: str, code: int = 2) -> int:
    line = " ".join(text.split())
    sys.stderr.write(f"flawsift: error: {line}\n".encode("utf-8", "backslashreplace").decode("utf-8"))
    return code


def _quiet_libraries() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _say(as_json: bool, result: dict[str, Any], lines: Sequence[str]) -> None:
    text = json.dumps(result, ensure_ascii=False, default=str) if as_json else "\n".join(lines)
    typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _threshold_lines(threshold: Any) -> list[str]:
    if threshold is None:
        return ["No threshold: one image gives no held-out scores to calibrate with. Scores are still ranked."]
    text = (
        f"Threshold {threshold.value:.4g}: about {threshold.per_hundred:.2g} false alarms per 100 good parts expected"
    )
    if threshold.limited:
        text += f" ({threshold.n_calibration} images cannot support {100 * threshold.false_alarm_rate:g} per 100)"
    return [text + "."]


def _images(folder: Path, groups: Path | None) -> "ImageSet":
    from flawsift.images import ImageSet, read_groups

    return ImageSet.from_folder(folder, groups=None if groups is None else read_groups(groups))


def _test_images(data: "Dataset") -> "ImageSet":
    return data.images.select(data.test_ids) if len(data.test_ids) else data.images


def _detector(name: str, preset: str, settings: Sequence[str] | None, seed: int) -> "Detector":
    from flawsift.detector import make_detector

    params: dict[str, Any] = {"seed": seed}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set needs name=value, got '{setting}'.")
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value  # a bare word is a text: coreset=random
    return make_detector(name, preset, **params)


def _backbone(name: str, weights: Path | None, size: int, runtime: Runtime, device: str) -> "Backbone":
    from flawsift.backbones import load_backbone

    return load_backbone(name, weights=weights, size=size, runtime=runtime.value, device=device)


def _store(cache: Path | None) -> "FeatureStore":
    from flawsift.features import FeatureStore

    return FeatureStore() if cache is None else FeatureStore(cache)


def _screen_options(
    preset: Preset,
    subsets: int | None,
    partitions: int | None,
    keep: str | None,
    consensus: ConsensusName | None,
    normalize: NormalizeName | None,
    exclude_own: bool | None,
    divergence_weight: float | None,
    reject_patches: float | None,
) -> "ScreenOptions":
    from flawsift.screening import PRESETS, check_options

    options: dict[str, Any] = dict(PRESETS[preset.value])
    given = {
        "n_subsets": subsets,
        "n_partitions": partitions,
        "keep": _share(keep),
        "consensus": None if consensus is None else consensus.value,
        "normalize": None if normalize is None else normalize.value,
        "exclude_own": exclude_own,
        "divergence_weight": divergence_weight,
        "reject_patches": reject_patches,
    }
    options |= {key: value for key, value in given.items() if value is not None}
    check_options(options)
    return options  # type: ignore[return-value]  # the keys are those of ScreenOptions, checked just above


def _share(keep: str | None) -> float | str | None:
    if keep is None or keep == "auto":
        return keep
    try:
        return float(keep)
    except ValueError:
        raise ParameterError(f"--keep must be 'auto' or a share such as 0.4, got '{keep}'.") from None


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A progress bar on stderr when that is a terminal, else silence."""
    from flawsift.progress import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


if __name__ == "__main__":
    main()
