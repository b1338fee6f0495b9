"""How long work says how far it is: one callable, silent unless somebody listens; and what is shown of it to people.

A stage has a name that people understand. One ends where the next one begins, and only the steps of the present one are
told, so whatever is not a stage of its own belongs to the one before it.
"""

import contextlib
import html
import importlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from flawsift.errors import ParameterError

BAR_WIDTH = 20  # columns
MOST_ROWS = 6  # on a terminal: the present stage and those before it; more would push away what was on it
SHORT = 1.0  # seconds: of a stage that took less, nobody needs to know afterwards
SILENT = 10.0  # seconds without a line in a log, after which a stage says how far it is
LONGER = 0.25  # of the time that a stage has taken: so much passes between two such lines, or the log gets long
REDRAWN = 0.1  # seconds between two changes of the bar of a notebook: as often as rich redraws a terminal


class Stage(StrEnum):
    """What is done, by names for people. With bar, count and times, the longest fits in a terminal of 80 columns."""

    STARTING = "Starting"
    FINDING = "Finding images"
    LOADING = "Loading the network"
    MODEL = "Loading the model"
    CHECKING = "Checking images"
    READING = "Reading images"
    LOOKING = "Looking at images"
    LEARNING = "Learning from images"
    COMPARING = "Comparing images"
    PARTS = "Training several models"
    COUNTING = "Counting probable defects"
    TRAINING = "Training the detector"
    THRESHOLD = "Setting the threshold"
    SCORING = "Scoring images"
    MEASURING = "Measuring"
    WRITING = "Writing results"
    COMPARING_DAYS = "Comparing scores"
    OPENING = "Opening the screening"
    EXPORTING = "Exporting the model"
    COMPARED = "Comparing the export"
    VERIFYING = "Checking the cache"
    CELLS = "Running cells"


class Progress(Protocol):
    """Called with the name of a stage, the steps done and the steps in all; of one step in all nothing is counted."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


ProgressOption: TypeAlias = Progress | bool | None


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


def steps_of(progress: Progress, stage: str) -> Progress:
    """A callable whose steps are those of one stage, whatever they are called where they are done."""
    return lambda _, done, total: progress(stage, done, total)


@contextmanager
def as_progress(progress: ProgressOption) -> Iterator[Progress]:
    """What public functions take as `progress`, as a callable to be told.

    Args:
        progress: True shows the stages: on a terminal and in a notebook a bar with the time that is left, which
            vanishes at the end; elsewhere a line on stderr as each begins, and now and then how far a long one is.
            False and None are silent; a callable is told.
    """
    if progress is None or progress is False or (progress is True and sys.stderr is None):
        yield silent
        return
    if progress is not True:
        if not callable(progress):
            raise ParameterError(f"progress must be True, False, None or a function, got {progress!r}.")
        yield progress
        return
    with contextlib.closing(_display()) as display:
        display(Stage.STARTING, 0, 1)
        yield display


def clock(seconds: float) -> str:
    """A time as minutes and seconds, with hours where there are any.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Pace:
    """How far a stage is, and how fast.

    Attributes:
        name: For people.
        total: Steps in all.
        done: Of them.
        began: When, on `time.monotonic`.
    """

    name: str
    total: int
    done: int
    began: float = field(init=False)
    _first: tuple[int, float] = field(init=False)  # steps done and time that the estimate counts from
    _told: float = field(init=False)  # when `done` was last told
    _ended: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.began = self._told = time.monotonic()
        self._first = self.done, self.began

    def tell(self, done: int, total: int) -> None:
        """Take note of steps done."""
        now = time.monotonic()
        if total != self.total:  # other steps, of which some may have been done before this run
            self._first = done, now
        self.done, self.total, self._told = done, total, now

    def end(self) -> None:
        """The next one begins."""
        self._ended = time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds that are left, if the steps to come take as long as those before; None where nothing tells."""
        first, since = self._first
        if self._ended is not None or self.total <= 1 or not first < self.done < self.total:
            return None
        each = (self._told - since) / (self.done - first)
        return max(1.0, each * (self.total - self.done) - (time.monotonic() - self._told))

    @property
    def spent(self) -> float:
        """Seconds that it took, or has taken."""
        return (self._ended or time.monotonic()) - self.began

    @property
    def count(self) -> str:
        """Steps done of all, where there are several."""
        return f"{self.done:,}/{self.total:,}" if self.total > 1 else ""

    @property
    def times(self) -> str:
        """How long it has taken, and what is left."""
        left = self.left
        return clock(self.spent) if left is None else f"{clock(self.spent)}, about {clock(left)} left"


class _Display(ABC):
    """Shows the stages: told of steps, it sees where a stage ends and the next one begins."""

    def __init__(self) -> None:
        self._pace: Pace | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `Progress`. A name that comes again with fewer steps done is the same work on other images."""
        now = self._pace
        if now is not None and now.name == stage and now.done <= done:
            now.tell(done, total)
            self._advance(now)
            return
        if now is not None:
            now.end()
            self._end(now)
        self._pace = Pace(stage, total, done)
        self._begin(self._pace)

    @abstractmethod
    def _begin(self, pace: Pace) -> None: ...

    @abstractmethod
    def _advance(self, pace: Pace) -> None: ...

    def _end(self, pace: Pace) -> None:
        """It is over: shown by the next one, unless a display does more."""
        return

    @abstractmethod
    def close(self) -> None:
        """All is done, or failed."""


def _display() -> _Display:
    if _in_notebook():
        return _NotebookBar()
    return _Bars() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else _Lines()


def _in_notebook() -> bool:
    """Whether a kernel runs this, which shows what is displayed; IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class _Lines(_Display):
    """A line on stderr as each stage begins, with the time since the first one, and now and then more: for logs.

    Each cell of a benchmark has one; of other stages only long ones say how far they are, ever less often.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began = self._wrote = time.monotonic()

    def _begin(self, pace: Pace) -> None:
        self._write(pace.name + (f" ({pace.total:,})" if pace.total > 1 else ""))

    def _advance(self, pace: Pace) -> None:
        silent_for = time.monotonic() - self._wrote
        if pace.name == Stage.CELLS or silent_for >= max(SILENT, LONGER * pace.spent):
            left = "" if pace.left is None else f", about {clock(pace.left)} left"
            self._write(f"{pace.name} {pace.count}{left}".rstrip())

    def _write(self, text: str) -> None:
        self._wrote = time.monotonic()
        with contextlib.suppress(OSError):  # whoever read it has gone: no reason to stop the work
            sys.stderr.write(f"{clock(self._wrote - self._began):>5} {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Nothing."""


class _Bars(_Display):
    """A row for each of the last stages on the terminal, redrawn by a thread so that times go on between steps."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console  # slow to import
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rows

        texts = [f"{{task.fields[pace].{name}}}" for name in ("name", "count", "times")]
        name, count, times = (TextColumn(text, markup=False) for text in texts)
        # stdout stays what it is: rich would send what is printed to it to stderr
        self._rows = Rows(
            name,
            BarColumn(BAR_WIDTH),
            count,
            times,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._tasks: list[Any] = []  # ids of the rows
        self._rows.start()

    def _end(self, pace: Pace) -> None:
        self._rows.update(self._tasks[-1], total=1, completed=1)  # a full bar
        if pace.spent < SHORT:
            self._rows.remove_task(self._tasks.pop())
        elif len(self._tasks) == MOST_ROWS:
            self._rows.remove_task(self._tasks.pop(0))

    def _begin(self, pace: Pace) -> None:
        self._tasks.append(self._rows.add_task("", total=None, pace=pace))
        self._advance(pace)

    def _advance(self, pace: Pace) -> None:
        if pace.total > 1:  # else the bar only moves to and fro
            self._rows.update(self._tasks[-1], total=pace.total, completed=pace.done)

    def close(self) -> None:
        self._rows.stop()


class _NotebookBar(_Display):
    """A bar below the cell, of the present stage. rich would need ipywidgets for it."""

    def __init__(self) -> None:
        super().__init__()
        display = importlib.import_module("IPython.display").display  # an extra of nobody: a notebook has it

        self._drawn = time.monotonic()
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def _begin(self, pace: Pace) -> None:
        self._draw(pace)

    def _advance(self, pace: Pace) -> None:
        if time.monotonic() - self._drawn >= REDRAWN:
            self._draw(pace)

    def _draw(self, pace: Pace) -> None:
        text = " ".join(part for part in (pace.name, pace.count, pace.times) if part)
        value = f' value="{pace.done}" max="{pace.total}"' if pace.total > 1 else ""
        page = f"<progress{value}></progress> {html.escape(text)}"
        self._handle.update({"text/html": page, "text/plain": text}, raw=True)
        self._drawn = time.monotonic()

    def close(self) -> None:
        self._handle.update({"text/html": "", "text/plain": ""}, raw=True)
