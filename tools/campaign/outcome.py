"""What may come of bad input, and who judges it."""

import contextlib
import io
import json
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from flawsift.cli.main import main
from flawsift.errors import FlawsiftError

# same: the answer of the good input. error: one line that names the file. told: another answer, and a word of why.
# valid: the changed input is itself one that means something, such as another digit in a table that a person writes.
# fault: anything else.
Kind = Literal["same", "error", "told", "valid", "fault"]
STAGE = re.compile(r"^ *\d+(:\d\d)+ .*\n", re.MULTILINE)  # a line of progress, which is no word about the input
KINDS: tuple[Kind, ...] = ("same", "error", "told", "valid", "fault")


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation.

    Attributes:
        kind: See `Kind`.
        what: The mutation, in words.
        said: What was answered, cut to a few lines.
    """

    kind: Kind
    what: str
    said: str = ""


@dataclass(frozen=True)
class Answer:
    """What a command, or a function, did.

    Attributes:
        code: Exit code; None where an exception came out of it.
        out: On stdout.
        err: On stderr, or the traceback.
    """

    code: int | None
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The object that `--json` printed."""
        if not self.out:
            raise ValueError(f"Nothing on stdout, but: {self.err[-800:]}")
        return json.loads(self.out)


def command(*arguments: object) -> Answer:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            return Answer(int(stop.code or 0), out.getvalue(), STAGE.sub("", err.getvalue()))
        except BaseException:  # noqa: BLE001  # of whatever kind, it is what the campaign looks for
            return Answer(None, out.getvalue(), traceback.format_exc())
    return Answer(None, out.getvalue(), "the command came back")


def function(call: Callable[[], Any]) -> Answer:
    """Call a function whose result JSON can hold, as if it were a command."""
    try:
        return Answer(0, json.dumps(call()), "")
    except FlawsiftError as error:
        return Answer(2, "", f"flawsift: error: {error}")
    except Exception:  # noqa: BLE001  # likewise
        return Answer(None, "", traceback.format_exc())


def judged(
    answer: Answer, expected: Any, what: str, names: Iterable[str], *, is_checked: bool, view: Callable[[Any], Any]
) -> Outcome:
    """What an answer is worth.

    Args:
        answer: To the mutated input.
        expected: The view of the result of the good input.
        what: The mutation.
        names: An error or a warning names one of them.
        is_checked: Whether the input is one that flawsift wrote and can tell from any other.
        view: Of a result, what a user would act on.
    """
    said = "\n".join((answer.err or answer.out).strip().splitlines()[-12:])[:1500]
    if answer.code is None or "Traceback" in answer.err + answer.out:
        return Outcome("fault", what, f"traceback: {said}")
    is_named = any(name in answer.err + answer.out for name in names)
    if answer.code:
        last = (answer.err.strip().splitlines() or [""])[-1]
        if answer.code != 2 or not last.startswith("flawsift: error: "):
            return Outcome("fault", what, f"exit code {answer.code}: {said}")
        return Outcome("error" if is_named else "fault", what, said if is_named else f"it names no file: {said}")
    try:
        seen = view(answer.result)
        json.dumps(seen, allow_nan=False)
    except (ValueError, LookupError, TypeError) as error:
        return Outcome("fault", what, f"no result ({error!r}): {said}")
    if seen == expected:
        return Outcome("told" if answer.err and is_named else "same", what, said)
    if is_named and (answer.err or not is_checked):
        return Outcome("told", what, said)
    return Outcome("fault" if is_checked else "valid", what, f"another answer without a word: {said}")
