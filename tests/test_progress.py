"""Whom work tells how far it is, and what people see of it."""

import io
import os
import re
import select
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flawsift import progress
from flawsift.progress import Pace, Stage, as_progress, silent, steps_of


@pytest.mark.parametrize("option", [None, False])
def test_silence(option: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with as_progress(option) as tell:
        assert tell is silent
        tell(Stage.LOOKING, 1, 2)
    assert capsys.readouterr() == ("", "")


def test_nobody_can_be_shown_anything_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with as_progress(True) as tell:
        assert tell is silent


def test_a_callable_is_told() -> None:
    told: list[tuple[str, int, int]] = []

    def listen(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))

    with as_progress(listen) as tell, as_progress(tell) as inner:
        inner(Stage.LOOKING, 1, 2)
        steps_of(inner, Stage.TRAINING)("epochs", 3, 4)
    assert told == [(Stage.LOOKING, 1, 2), (Stage.TRAINING, 3, 4)]


class Clock:
    """A time that stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_steps_to_come_take_as_long_as_those_before(clock: Clock) -> None:
    stage = Pace("Looking", 100, 0)
    assert (stage.left, stage.count, stage.times) == (None, "0/100", "0:00")
    clock.now += 10
    stage.tell(20, 100)
    assert stage.left == 40
    clock.now += 15  # no step is done, and yet the time goes on
    assert stage.left == 25
    assert stage.times == "0:25, about 0:25 left"
    clock.now += 3600  # longer than was thought
    assert stage.times == "1:00:25, about 0:01 left"
    stage.tell(100, 100)
    assert stage.left is None
    stage.end()
    clock.now += 1000
    assert stage.times == "1:00:25", "the time of a stage that is over stands still"


def test_steps_of_an_earlier_run_do_not_count_as_quick(clock: Clock) -> None:
    stage = Pace(Stage.TRAINING, 1, 0)
    assert (stage.left, stage.count) == (None, "")
    clock.now += 5
    stage.tell(500, 1000)  # a training that was killed goes on there
    assert stage.left is None
    clock.now += 10
    stage.tell(510, 1000)
    assert stage.left == 490


def told_of(stages: list[tuple[str, int, int]]) -> None:
    with as_progress(True) as tell:
        for stage, done, total in stages:
            tell(stage, done, total)


def test_a_pipe_gets_a_line_for_each_stage(
    capsys: pytest.CaptureFixture[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as machines that test set it, whose logs are no terminals
    with as_progress(True) as tell:
        assert capsys.readouterr().err == " 0:00 Starting\n", "at once"
        clock.now += 75
        tell(Stage.LOOKING, 0, 1500)
        tell(Stage.LOOKING, 64, 1500)
        tell(Stage.LOOKING, 1500, 1500)
        tell(Stage.WRITING, 0, 1)
        tell(Stage.LOOKING, 0, 20)
        tell(Stage.LOOKING, 20, 20)
        tell(Stage.LOOKING, 0, 30)
    lines = ["Looking at images (1,500)", "Writing results", "Looking at images (20)", "Looking at images (30)"]
    assert capsys.readouterr() == ("", "".join(f" 1:15 {line}\n" for line in lines))


def test_a_pipe_hears_of_a_long_stage_ever_less_often(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with as_progress(True) as tell:
        tell(Stage.SCORING, 0, 1000)
        for done in range(1, 1001):
            clock.now += 1
            tell(Stage.SCORING, done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:4] == [
        " 0:00 Scoring images (1,000)",
        " 0:10 Scoring images 10/1,000, about 16:30 left",
        " 0:20 Scoring images 20/1,000, about 16:20 left",
    ]
    assert len(lines) < 25


def test_a_pipe_hears_of_each_cell(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with as_progress(True) as tell:
        for done in range(4):
            tell(Stage.CELLS, done, 3)
            clock.now += 5
    assert capsys.readouterr().err.splitlines()[1:] == [
        " 0:00 Running cells (3)",
        " 0:05 Running cells 1/3, about 0:10 left",
        " 0:10 Running cells 2/3, about 0:05 left",
        " 0:15 Running cells 3/3",
    ]


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_has_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken())
    told_of([(Stage.LOOKING, 0, 20), (Stage.WRITING, 0, 1)])


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A file descriptor of what is written to stderr, which is a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(slave, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield master
    os.close(master)


def read(master: int, wanted: str) -> str:
    """What is written until it holds some text: a thread draws."""
    written = b""
    while wanted.encode() not in written:
        assert select.select([master], [], [], 10)[0], f"waited for {wanted!r}, got {written!r}"
        written += os.read(master, 1 << 16)
    return written.decode(errors="replace")  # the end of a character may be still to come


def test_a_terminal_shows_rows_that_vanish(
    capsys: pytest.CaptureFixture[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal(monkeypatch) as master:
        with as_progress(True) as tell:
            read(master, "Starting")
            tell(Stage.LOOKING, 0, 1500)
            clock.now += 10
            tell(Stage.LOOKING, 750, 1500)
            tell(Stage.TRAINING, 0, 1)
            clock.now += 30
            drawn = read(master, "0:30")
            print("a result")  # noqa: T201  # goes where it went before
        read(master, "\x1b[?25h\r" + 2 * "\x1b[1A\x1b[2K")  # both rows are wiped
    assert capsys.readouterr() == ("a result\n", "")
    last = re.sub(r"\x1b\[[0-9;]*m", "", drawn.rpartition("\x1b[2K")[2])
    looking, training = (re.sub("[━╸╺ ]+", " ", line).strip() for line in last.strip().split("\r\n"))
    assert looking == "Looking at images 750/1,500 0:10"
    assert training == "Training the detector 0:30", "Starting took no time, and is shown no more"


def test_a_terminal_is_not_filled(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal(monkeypatch) as master, as_progress(True) as tell:
        for number in range(10):
            clock.now += 10
            tell(f"Stage {number}", 0, 1)
            read(master, f"Stage {number}")
        clock.now += 50
        drawn = read(master, "0:50").rpartition("\x1b[2K")[2]
        assert re.findall("Stage (.)", drawn) == list("456789")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal(monkeypatch) as master:
        told_of([(Stage.LOOKING, 0, 20)])
        assert read(master, "(20)\r\n") == " 0:00 Starting\r\n 0:00 Looking at images (20)\r\n"


class Notebook:
    """As much of IPython as a bar needs."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.kernel = object()

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> "Notebook":
        assert (raw, display_id) == (True, True)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(bundle["text/html"])


def test_a_notebook_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    notebook: Any = Notebook()
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: notebook
    shown: Any = types.ModuleType("IPython.display")
    shown.display = notebook.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    with as_progress(True) as tell:
        tell(Stage.LOOKING, 0, 50)
        tell(Stage.LOOKING, 1, 50)  # sooner than anybody sees
        clock.now += 10
        tell(Stage.LOOKING, 25, 50)
    assert notebook.shown == [
        "<progress></progress> Starting 0:00",
        '<progress value="0" max="50"></progress> Looking at images 0/50 0:00',
        '<progress value="25" max="50"></progress> Looking at images 25/50 0:10, about 0:10 left',
        "",
    ]
    assert capsys.readouterr() == ("", "")
    notebook.kernel = None  # IPython in a terminal
    told_of([])
    assert capsys.readouterr().err == " 0:00 Starting\n"


def test_every_name_leaves_room_on_a_terminal() -> None:
    beside = " " + progress.BAR_WIDTH * "-" + " 5,000/9,000 2:34, about 2:34 left"
    assert max(map(len, Stage)) + len(beside) <= 80
