"""The commands that bring a model to a production line."""

import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.cli.lines import threshold_lines, warning_lines
from flawsift.cli.options import ModelChoice, Rate, takes_groups
from flawsift.cli.output import Notices, Output
from flawsift.errors import InputError, ParameterError
from flawsift.paths import show
from flawsift.progress import Progress, Stage

if TYPE_CHECKING:
    import numpy.typing as npt

    from flawsift.deploy.camera import VideoWatch
    from flawsift.deploy.results import Row
    from flawsift.deploy.watch import FolderWatch
    from flawsift.models.model import Model

MAX_CHECKED = 200  # pictures that an export is compared on: a minute


class ExportFormat(StrEnum):
    """As `flawsift.deploy.export.Format`."""

    onnx = "onnx"
    openvino = "openvino"


class Sorting(StrEnum):
    """As `flawsift.deploy.watch.Sort`."""

    none = "none"
    move = "move"
    link = "link"


class Keeping(StrEnum):
    """As `flawsift.deploy.camera.Keep`."""

    none = "none"
    defect = "defect"
    all = "all"


Exported = Annotated[
    str,
    typer.Argument(
        metavar="Stage.MODEL", help="File or folder of `flawsift export-model`, or a model folder.", show_default=False
    ),
]


@takes_groups
def export_model(
    model: ModelChoice,
    out: Annotated[Path, typer.Option("--out", help="Folder for the file; an earlier export in it is replaced.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="Format of the file.")] = ExportFormat.onnx,
    check: Annotated[
        str | None, typer.Option("--check", help=f"Compare on images of this folder too, on {MAX_CHECKED} at most.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Write a model as one file for a machine without torch: from pixels to score, p-value, verdict and map."""
    with output.progress() as progress:
        from flawsift.deploy import export

        progress(Stage.MODEL, 0, 1)
        loaded = model.load()
        progress(Stage.EXPORTING, 0, 1)
        path = export.export_model(loaded, out, to.value)
        found = None if check is None else _checked(loaded, path, check, progress)
    compared = export.read_card(path)["parity"]
    n_bytes = sum(part.stat().st_size for part in path.parent.iterdir())
    lines = [
        f"Exported {loaded.detector.name}: {path} ({n_bytes / 1e6:.1f} MB)",
        f"Scores are those of the model, within {_percent(compared)}, on {compared['n_images']} made-up pictures.",
    ]
    summary: dict[str, Any] = {"file": str(path), "bytes": n_bytes, "parity": compared}
    if found is not None:
        summary["check"] = found
        lines.append(
            f"On {found['n_images']} images of '{check}': scores within {_percent(found)}, other verdicts on "
            f"{found['n_other_verdicts']}; {found['ms_median']:.0f} ms a picture "
            f"(99 of 100 within {found['ms_p99']:.0f})."
        )
    threshold = loaded.threshold()
    summary["threshold"] = None if threshold is None else vars(threshold)
    lines += threshold_lines(threshold)
    lines = [*warning_lines(threshold), *lines]
    lines.append(f"Run it: flawsift watch {path} FOLDER, flawsift serve {path}, or in Python")
    lines.append(f'  flawsift.runtime.Inspector("{path}")(image)')
    output.say(summary, lines)


@takes_groups
# long: the options of the command
def watch(
    model: Exported,
    source: Annotated[
        str, typer.Argument(help="Folder where images appear; camera:0, rtsp://..., or a video.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Results, a line an image: .jsonl, or .csv.")] = Path(
        "results.jsonl"
    ),
    sort: Annotated[Sorting, typer.Option("--sort", help="Put scored images into ok/ and defect/ in it.")] = (
        Sorting.none
    ),
    webhook: Annotated[str | None, typer.Option("--webhook", help="Address that each result is sent to.")] = None,
    new_only: Annotated[bool, typer.Option("--new-only", help="Leave out what is there at the first start.")] = False,
    once: Annotated[bool, typer.Option("--once", help="End when all that is there has been scored.")] = False,
    settle: Annotated[float, typer.Option("--settle", min=0, help="Seconds a file must be unchanged.")] = 0.5,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds after which a broken file is listed as unreadable.")
    ] = 30.0,
    every: Annotated[
        float | None, typer.Option("--every", min=0, help="Of a camera or video: seconds between frames. [1]")
    ] = None,
    keep: Annotated[
        Keeping, typer.Option("--keep", help="Frames that are saved, of a camera or video.")
    ] = Keeping.none,
    rate: Rate = None,
    *,
    notices: Notices,
) -> None:
    """Score images of a folder as they appear, or frames; started again, it goes on where it was."""
    with contextlib.ExitStack() as stack:
        with notices.progress() as progress:
            from flawsift.deploy.results import one_line_of, sole_writer
            from flawsift.deploy.webhook import Webhook
            from flawsift.runtime import Inspector

            path = stack.enter_context(_exported(model, progress))
            stack.enter_context(sole_writer(out))
            progress(Stage.MODEL, 0, 1)
            inspector = Inspector(path, false_alarm_rate=rate)
        watched: FolderWatch | VideoWatch
        if _is_video(source):
            if sort is not Sorting.none or new_only:
                raise ParameterError("--sort and --new-only are for a folder of images. Of frames take --keep.")
            from flawsift.deploy import camera

            seconds = 1.0 if every is None else every
            watched = camera.VideoWatch(inspector, source, out, every=seconds, keep=keep.value, model=inspector.digest)
        else:
            if every is not None or keep is not Keeping.none:
                raise ParameterError("--every and --keep are for a camera or a video. Of a folder take --sort.")
            from flawsift.deploy import watch as of_folders

            watched = of_folders.FolderWatch(
                inspector,
                source,
                out,
                sort=sort.value,
                new_only=new_only,
                settle=settle,
                timeout=timeout,
                model=inspector.digest,
            )
        hook = None if webhook is None else Webhook(webhook, watched.results)

        def on_row(row: "Row") -> None:
            if hook is not None:
                hook.notify()
            score = row.reason if row.score is None else f"{row.score:.4g} (p-value {row.p_value:.2g})"
            typer.echo(f"{row.status:<10} {one_line_of(row.file)}  {score}")
            sys.stdout.flush()

        notices.note(f"Watching '{_shown(source)}'; results go to '{show(out)}'. Stop with Ctrl-C.")
        with _stopped_by_signals() as stop:
            if hook is not None:
                hook.start()
            watched.run(stop, once=once, on_row=on_row)
            left = 0 if hook is None else hook.stop()
        counts = ", ".join(f"{n} {status}" for status, n in sorted(watched.counts.items())) or "no images"
        unsent = f" {left} results are still to be sent to the webhook." if left else ""
        word = "Done" if stop.number is None else "Stopped"
        notices.note(f"{word}: {counts}.{unsent} The same command goes on where it was.")
        if stop.number is not None:
            raise typer.Exit(128 + stop.number)


def _is_video(source: str) -> bool:
    """Whether it is a camera, an address or a file, and no folder."""
    return source.startswith("camera:") or "://" in source or Path(source).is_file()


def _shown(source: str) -> str:
    """Without what may be a secret of an address: its user, password and path."""
    return show(urllib.parse.urlsplit(source).hostname or "stream") if "://" in source else show(source)


@takes_groups
# long: the options of the command
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]Stage.MODEL...",
            help="Files or folders of `flawsift export-model`, or model folders.",
            show_default=False,
        ),
    ],
    *,
    host: Annotated[str, typer.Option("--host", help="Another address than this machine's needs an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File that holds the API key. [$FLAWSIFT_API_KEY]")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Pictures that are scored at a time.")] = 2,
    max_requests: Annotated[
        int, typer.Option("--max-requests", min=1, help="Requests at a time; more are told to come again.")
    ] = 32,
    max_megabytes: Annotated[int, typer.Option("--max-megabytes", min=1, help="Of a request.")] = 64,
    max_megapixels: Annotated[int, typer.Option("--max-megapixels", min=1, help="Of a picture.")] = 50,
    rate: Rate = None,
    notices: Notices,
) -> None:
    """Answer pictures over HTTP with scores and verdicts; a changed model file is taken without a pause."""
    with contextlib.ExitStack() as stack:
        with notices.progress() as progress:
            from flawsift.deploy.gate import Limits, check_key
            from flawsift.deploy.products import Product, read_products
            from flawsift.deploy.serve import serve as run

            key = os.environ.get("FLAWSIFT_API_KEY") if key_file is None else key_file.read_text("utf-8")
            check_key(key, host)  # before models are loaded
            limits = Limits(
                max_body=max_megabytes << 20,
                max_pixels=max_megapixels * 10**6,
                max_requests=max_requests,
                workers=workers,
            )
            served = {}
            for name, path in read_products(models).items():
                exported = stack.enter_context(_exported(path, progress))
                progress(Stage.MODEL, 0, 1)
                threads = max((os.cpu_count() or 1) // workers, 1)
                served[name] = Product(exported, false_alarm_rate=rate, n_threads=threads)

        def ready(address: str) -> None:
            notices.note(f"Serving at {address}; stop with Ctrl-C. A line for each request follows.")

        run(served, host=host, port=port, key=key, limits=limits, log=_log_line, on_ready=ready)


def _log_line(told: Mapping[str, Any]) -> None:
    """A request as JSON on stdout. A log that cannot be written is no reason to refuse it."""
    with contextlib.suppress(OSError):
        typer.echo(json.dumps(told))


class _Stop(threading.Event):
    """Set by a signal, of which it keeps the number."""

    number: int | None = None


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[_Stop]:
    """The first Ctrl-C, or wish of the system, lets the image at hand be finished; the second ends at once."""
    stop, before = _Stop(), dict[int, Any]()

    def ask(number: int, frame: object) -> None:
        stop.number = number
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # only that one may say so
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _exported(model: str, progress: Progress) -> Iterator[Path]:
    """An exported file, or that of a model folder, made for as long as it is needed."""
    path = Path(model)
    if not (path / "model.json").is_file():
        yield path
        return
    from flawsift.deploy.export import export_model as export
    from flawsift.models.model import load_model

    with tempfile.TemporaryDirectory(prefix="flawsift-") as folder:
        progress(Stage.MODEL, 0, 1)
        loaded = load_model(path)
        progress(Stage.EXPORTING, 0, 1)
        yield export(loaded, Path(folder) / "exported")


def _percent(parity: dict[str, Any]) -> str:
    return f"{100 * parity['largest_difference']:.2g} %"


def _checked(model: "Model", path: Path, folder: str, progress: Progress) -> dict[str, Any]:
    """Parity on the images of a folder, and how long one takes from its pixels to its verdict."""
    import numpy as np

    from flawsift.data.decoding import UnreadableImage
    from flawsift.data.inputs import as_images
    from flawsift.deploy.export import parity
    from flawsift.runtime import Inspector, Verdict

    images, inspector, taken = as_images(folder).within(model.value_range), Inspector(path), []

    def pictures() -> "Iterator[npt.NDArray[np.uint8]]":
        for n, id_ in enumerate(images.ids.tolist()):
            progress(Stage.COMPARED, n, min(len(images), MAX_CHECKED))
            with contextlib.suppress(UnreadableImage):  # it has no score either way
                yield np.asarray(images.image(id_), np.uint8)

    def timed(picture: "npt.NDArray[np.uint8]") -> Verdict:
        started = time.perf_counter()
        verdict = inspector(picture)
        taken.append(1000 * (time.perf_counter() - started))
        return verdict

    found = parity(model, timed, itertools.islice(pictures(), MAX_CHECKED))
    if not taken:
        raise InputError(f"None of the {len(images)} images of '{folder}' can be read.")
    return {**found, "ms_median": statistics.median(taken), "ms_p99": float(np.quantile(taken, 0.99))}
