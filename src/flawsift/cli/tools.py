"""The commands around a screening: review, export, diagnose, demo, and the list of detectors."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flawsift.cli.options import (
    BackboneChoice,
    Cache,
    Decisions,
    Device,
    ExportName,
    Images,
    Out,
    Reviewed,
    Root,
    Seed,
    images_in,
    store_of,
    takes_groups,
)
from flawsift.cli.output import Notices, Output
from flawsift.progress import Stage


@takes_groups
def review(
    folder: Reviewed,
    images: Root = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    cache: Cache = None,
    *,
    notices: Notices,
) -> None:
    """Decide image by image in a local page, and refit; decisions go to decisions.csv beside the screening."""
    with notices.progress() as progress:
        import webbrowser

        from flawsift.review.server import serve
        from flawsift.review.session import Review

        progress(Stage.OPENING, 0, 1)
        session = Review.open(folder, images=images, cache=cache)

    def ready(address: str) -> None:
        typer.echo(address)
        sys.stdout.flush()
        notices.note("Open this address; stop with Ctrl-C. Decisions are saved at once.")
        if not no_browser:
            webbrowser.open(address)

    serve(session, port=port, on_ready=ready)


@takes_groups
def export(
    folder: Reviewed,
    out: Out,
    to: Annotated[ExportName, typer.Option("--to", help="What reads it.", show_default=False)],
    images: Root = None,
    decisions: Decisions = None,
    link: Annotated[bool, typer.Option("--link", help="With 'folder': links instead of copies.")] = False,
    *,
    output: Output,
) -> None:
    """Hand what was kept and removed to other tools. The images themselves stay where they are."""
    with output.progress() as progress:
        from flawsift.reports import export as exporting
        from flawsift.screening.decisions import NAME, read_decisions, read_defect_types
        from flawsift.screening.storage import images_of, load_screening, screening_folder

        progress(Stage.OPENING, 0, 1)
        place = screening_folder(folder)
        there = place / NAME if decisions is None and (place / NAME).exists() else decisions
        found = load_screening(place)
        pictures = images_of(found, images)
        choices = None if there is None else read_decisions(there)
        types = None if there is None else read_defect_types(there)
        progress(Stage.WRITING, 0, 1)
        counts = exporting.export(found, pictures, out, to.value, choices=choices, defect_types=types, link=link)
    lines = [f"{counts['kept']} kept and {counts['removed']} removed images written to {out}."]
    if counts["missing"]:
        lines.append(f"{counts['missing']} images are missing or unreadable and were left out.")
    root = pictures.source.root  # type: ignore[attr-defined]  # images_of reads files
    note = exporting.opening_note(out, to.value, root)
    lines += [f"Open it with: {note}"] if note else []
    output.say({**counts, "out": str(out), "decisions": None if there is None else str(there)}, lines)


@takes_groups
# long: a command's options are its parameters
def diagnose(
    images: Images,
    out: Out,
    *,
    labels: Annotated[Path | None, typer.Option("--labels", help="CSV with columns file, label (0 or 1).")] = None,
    layer: Annotated[str, typer.Option("--layer", help="Backbone layer that is looked at.")] = "stride16",
    backbone: BackboneChoice,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    output: Output,
) -> None:
    """Whether defects vary more than good patches, as methods for contaminated sets assume: OUT/diagnose.html."""
    with output.progress() as progress:
        from flawsift.features.extraction import attach
        from flawsift.files import ensure_folder
        from flawsift.reports import diagnostics

        ensure_folder(out)
        found = images_in(images, None, progress=progress)
        truth = None if labels is None else diagnostics.read_labels(labels, found)
        chosen = found if truth is None else found.select(truth.ids)
        progress(Stage.LOADING, 0, 1)
        network = backbone.load(device, found)
        data, failed = attach(chosen, network, (layer,), store=store_of(cache), progress=progress)
        progress(Stage.COMPARING, 0, 1)
        result = diagnostics.diagnose(data, layer, truth=truth, seed=seed)
        progress(Stage.WRITING, 0, 1)
        page = diagnostics.write_diagnosis(result, out)
    counts = {**result.counts, "unlabelled": len(found) - len(chosen), "unreadable": len(failed)}
    without = "" if truth is None else f" {counts['unlabelled']} without a label,"
    lines = [f"{counts['images']} images looked at,{without} {len(failed)} unreadable."]
    lines += [f"Warning: {warning}" for warning in result.warnings] or ["No warning."]
    lines += [f"Page: {page}   Data: {out / diagnostics.DATA}"]
    summary = {"warnings": list(result.warnings), "counts": counts, "twins": list(result.twins)}
    output.say({**summary, "page": str(page), "data": str(out / diagnostics.DATA)}, lines)


@takes_groups
def demo(
    out: Out,
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = None,
    *,
    output: Output,
) -> None:
    """The whole chain on real solar cells (package elpv-dataset); labels are used only to evaluate."""
    with output.progress() as progress:
        from flawsift.cli.demo import run_demo
        from flawsift.files import ensure_folder

        ensure_folder(out)
        result = run_demo(out, seed=seed, device=device, store=store_of(cache), progress=progress)
    output.say(result.as_json(), result.lines())


@takes_groups
def detectors(output: Output) -> None:
    """List the detectors with their parameters."""
    table: dict[str, Any] = {}
    lines = []
    with output.progress():
        from flawsift.detectors.registry import DETECTORS, detector_class

        for name in DETECTORS:
            cls = detector_class(name)
            summary = (cls.__doc__ or "").splitlines()[0]
            table[name] = {"summary": summary, "presets": sorted(cls.presets), "params": cls().params()}
            lines.append(f"{name:<10} {summary}")
            lines.append("           " + ", ".join(f"{k}={v}" for k, v in table[name]["params"].items()))
    output.say(table, lines)
