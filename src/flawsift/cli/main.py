"""The command line: thin commands over public functions.

Results go to stdout (`--json` makes them machine-readable), progress to stderr when it is a terminal, and an error is
one line with exit code 2. Heavy imports live inside the commands, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flawsift import __version__
from flawsift.cli.benchmark import benchmark, benchmark_report, cache_app
from flawsift.cli.options import (
    AsJson,
    BackboneName,
    Cache,
    ConsensusOption,
    Decisions,
    DetectorName,
    DetectorPreset,
    Device,
    DivergenceWeight,
    ExcludeOwn,
    ExecutorOption,
    ExportName,
    Groups,
    Images,
    Keep,
    ModelFolder,
    NormalizeOption,
    Out,
    Partitions,
    Preset,
    PresetOption,
    Rate,
    RejectPatches,
    Reviewed,
    Root,
    Runtime,
    RuntimeOption,
    ScreenerName,
    Seed,
    Settings,
    Size,
    Subsets,
    Weights,
    backbone_of,
    detector_of,
    images_in,
    say,
    screen_options,
    shown_progress,
    store_of,
    tested_images,
    threshold_lines,
)
from flawsift.errors import FlawsiftError

# BadParameter < UsageError < ClickException: newer typers carry a click of their own, so it is asked of typer
_UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="flawsift",
    help="Unlabelled product images in; probable defects, a purified set and a trained detector out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    from flawsift import pipeline
    from flawsift.executors import make_executor
    from flawsift.files import ensure_folder
    from flawsift.reports import screening as report
    from flawsift.screening.storage import describe

    options = screen_options(
        preset, subsets, partitions, keep, consensus, normalize, exclude_own, divergence_weight, reject_patches
    )
    ensure_folder(out)
    found = images_in(images, groups)
    with shown_progress() as progress:
        result = pipeline.screen(
            found,
            detector_of(detector, detector_preset, settings, seed),
            backbone_of(backbone, weights, size, runtime, device),
            store=store_of(cache),
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
        lines.append(
            f"Of the kept images, the {share:.1f} % oddest patches are left out by detectors that trust all they get"
            + (", of those set aside all but the most ordinary ones." if result.is_partly_learned.any() else ".")
        )
    if result.contamination is not None:
        lines.append(f"Estimated share of defective images: {result.contamination.text}.")
    names = dict(zip(result.ids.tolist(), result.names, strict=True))
    lines += ["Most suspicious:", *(f"  {names[int(i)]}" for i in result.ranking[:5])]
    lines += [f"Table:  {out / 'screening.csv'}", f"Report: {page}", f"Decide: flawsift review {out}"]
    say(as_json, {**describe(result), "out": str(out), "report": str(page)}, lines)


@app.command()
def fit(
    images: Images,
    out: Out,
    detector: DetectorName = "twobanks",
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
    from flawsift import pipeline
    from flawsift.executors import make_executor
    from flawsift.models.calibration import DEFAULT_RATE
    from flawsift.reports import screening as report
    from flawsift.screening.decisions import read_decisions
    from flawsift.screening.stage1 import SCREENERS

    choices = None if decisions is None else read_decisions(decisions)
    options = screen_options(
        preset, subsets, partitions, keep, consensus, normalize, exclude_own, divergence_weight, reject_patches
    )
    found = images_in(images, groups)
    with shown_progress() as progress:
        result = pipeline.fit(
            found,
            detector_of(detector, detector_preset, settings, seed),
            backbone_of(backbone, weights, size, runtime, device),
            screening=screening,
            decisions=choices,
            no_screen=no_screen,
            screener=SCREENERS[preset.value] if screener is None else screener,
            false_alarm_rate=DEFAULT_RATE if false_alarm_rate is None else false_alarm_rate,
            store=store_of(cache),
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
    partly = training["n_partly"]
    more = f", and on the ordinary patches of {partly} more" if partly else ""
    lines = [f"Trained {result.detector.name} on {training['n_kept']} of {training['n_images']} images{more}: {out}"]
    if note := training.get("screening_note"):
        lines.append(f"Note: {note} Screen the folder again to have them judged.")
    lines += threshold_lines(threshold)
    page = None
    if not no_screen:
        stage1 = out / "screening" if screening is None else screening
        page = report.write_fit_report(result, stage1, out, images=images, choices=choices)
        lines += [f"Report: {page}", f"Decide image by image: flawsift review {stage1 if screening else out}"]
    summary = {"out": str(out), **training, "threshold": None if threshold is None else vars(threshold)}
    say(as_json, {**summary, "report": None if page is None else str(page)}, lines)


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
    from flawsift.files import ensure_folder
    from flawsift.models import model as models
    from flawsift.paths import show
    from flawsift.reports.predictions import OverlayWriter, write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    found = images_in(images, None)
    writer = OverlayWriter(out / "maps", loaded.calibration, loaded.threshold(false_alarm_rate)) if maps else None
    with shown_progress() as progress:
        result = models.predict(
            loaded, found, false_alarm_rate=false_alarm_rate, device=device, on_maps=writer, progress=progress
        )
    table = write_predictions(result, out)
    flagged = result.is_anomalous
    total = len(result.ids)
    lines = [f"{total} images scored." if flagged is None else f"{int(flagged.sum())} of {total} images are anomalous."]
    lines += threshold_lines(result.threshold)
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
    say(as_json, summary, lines)


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
    from flawsift import datasets
    from flawsift.files import ensure_folder, write_json
    from flawsift.models import model as models
    from flawsift.reports.evaluation import write_evaluation_report
    from flawsift.reports.predictions import write_predictions

    ensure_folder(out)
    loaded = models.load_model(model, weights=weights, runtime=runtime.value)
    data = datasets.load(dataset)
    images = tested_images(data)
    with shown_progress() as progress:
        result, predictions = models.evaluate(loaded, images, data.truth, device=device, progress=progress)
    write_predictions(predictions, out, data.truth)
    write_json(out / "metrics.json", result)
    page = write_evaluation_report(loaded, result, predictions, images, data.truth, out, device=device)
    width = max(map(len, result))
    lines = [f"{key:<{width}}  {'-' if value is None else f'{value:.4g}'}" for key, value in result.items()]
    lines += [f"Written: {out / 'metrics.json'}", f"Report:  {page}"]
    say(as_json, {**result, "out": str(out), "report": str(page)}, lines)


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

    from flawsift.review.server import serve
    from flawsift.review.session import Review

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
    from flawsift.reports import export as exporting
    from flawsift.screening.decisions import NAME, read_decisions
    from flawsift.screening.storage import images_of, read_screening, screening_folder

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
    say(as_json, {**counts, "out": str(out), "decisions": None if there is None else str(there)}, lines)


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
    from flawsift.features.store import attach
    from flawsift.files import ensure_folder
    from flawsift.reports import diagnostics

    ensure_folder(out)
    found = images_in(images, None)
    truth = None if labels is None else diagnostics.read_labels(labels, found)
    chosen = found if truth is None else found.select(truth.ids)
    network = backbone_of(backbone, weights, size, runtime, device)
    with shown_progress() as progress:
        data, failed = attach(chosen, network, (layer,), store=store_of(cache), progress=progress)
    result = diagnostics.diagnose(data, layer, truth=truth, seed=seed)
    page = diagnostics.write_diagnosis(result, out)
    counts = {**result.counts, "unlabelled": len(found) - len(chosen), "unreadable": len(failed)}
    without = "" if truth is None else f" {counts['unlabelled']} without a label,"
    lines = [f"{counts['images']} images looked at,{without} {len(failed)} unreadable."]
    lines += [f"Warning: {warning}" for warning in result.warnings] or ["No warning."]
    lines += [f"Page: {page}   Data: {out / diagnostics.DATA}"]
    summary = {"warnings": list(result.warnings), "counts": counts, "twins": list(result.twins)}
    say(as_json, {**summary, "page": str(page), "data": str(out / diagnostics.DATA)}, lines)


@app.command()
def demo(
    out: Out,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """The whole chain on real solar cells (package elpv-dataset); labels are used only to evaluate."""
    from flawsift.cli.demo import run_demo
    from flawsift.files import ensure_folder

    ensure_folder(out)
    with shown_progress() as progress:
        result = run_demo(out, seed=seed, device=device, store=store_of(cache), progress=progress)
    say(as_json, result.as_json(), result.lines())


@app.command()
def detectors(as_json: AsJson = False) -> None:
    """List the detectors with their parameters."""
    from flawsift.detectors.base import DETECTORS, detector_class

    table: dict[str, Any] = {}
    lines = []
    for name in DETECTORS:
        cls = detector_class(name)
        summary = (cls.__doc__ or "").splitlines()[0]
        table[name] = {"summary": summary, "presets": sorted(cls.presets), "params": cls().params()}
        lines.append(f"{name:<10} {summary}")
        lines.append("           " + ", ".join(f"{k}={v}" for k, v in table[name]["params"].items()))
    say(as_json, table, lines)


app.command()(benchmark)
app.command("benchmark-report")(benchmark_report)
app.add_typer(cache_app, name="cache")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command, print errors as one line, exit."""
    _quiet_libraries()
    try:
        code = app(args=arguments, prog_name="flawsift", standalone_mode=False)
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


if __name__ == "__main__":
    main()
