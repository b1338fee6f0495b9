"""What a command writes: its result to stdout, and to stderr its stages, notices and warnings while it works."""

import contextlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from flawsift.errors import OutputError
from flawsift.paths import printed
from flawsift.progress import Progress, as_progress

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Write nothing but the result and errors.")]


class Told(logging.Handler):
    """What the library warns of while a command runs: a line each on stderr, and in the result of --json."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.quiet = False

    def start(self) -> None:
        """A command begins."""
        self.lines.clear()
        self.quiet = False

    def emit(self, record: logging.LogRecord) -> None:
        line = printed(" ".join(record.getMessage().split()))
        self.lines.append(line)
        with contextlib.suppress(OSError):  # that nobody can read it stops no work
            if not self.quiet:
                typer.echo(f"flawsift: {line}", err=True)


TOLD = Told()


@dataclass(frozen=True)
class Notices:
    """What --quiet leaves out."""

    quiet: Quiet = False

    def progress(self) -> AbstractContextManager[Progress]:
        """Stages on stderr. The first one is shown before anything slow is imported: enter it first."""
        TOLD.quiet = self.quiet
        return as_progress(not self.quiet)

    def note(self, line: str) -> None:
        """Write a line to stderr."""
        if not self.quiet:
            typer.echo(line, err=True)


@dataclass(frozen=True)
class Output(Notices):
    """How a result is printed, of --quiet and --json."""

    as_json: AsJson = False

    def say(self, result: dict[str, Any], lines: Sequence[str]) -> None:
        """Print a result: one JSON object, with what was warned of as `log`, or lines for people."""
        told = {"log": TOLD.lines} if TOLD.lines else {}
        if self.quiet and (n := len(TOLD.lines)):
            lines = [*lines, f"Warnings not shown: {n}. Leave out --quiet, or see `log` of --json."]
        result = {**result, **told}
        text = json.dumps(result, ensure_ascii=False, default=str) if self.as_json else "\n".join(map(printed, lines))
        try:
            typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))
        except BrokenPipeError:  # nobody reads on, as of `| head -1`: typer ends quietly
            raise
        except OSError as error:
            raise OutputError(f"Cannot print the result: {error.strerror}. What goes to folders is written.") from error
