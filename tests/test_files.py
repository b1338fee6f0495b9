"""Files are whole or absent."""

import errno
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flawsift.errors import OutputError
from flawsift.files import (
    MANIFEST,
    NEW,
    PENDING,
    PLAN,
    DamagedPart,
    Parts,
    alone,
    ensure_folder,
    new_folder,
    new_result,
    settle,
    temporary_beside,
    write_bytes,
    write_json,
)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        real(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as inner:
        inner.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="the disk is full"):
            write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with new_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("second")
        raise RuntimeError
    assert (target / "a").read_text() == "first"
    with new_folder(target) as folder:
        (folder / "b").write_text("third")
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["result"]


def test_a_folder_that_is_there_by_then_may_stay(tmp_path: Path) -> None:
    with new_folder(tmp_path / "result", keep=True) as slower:
        (slower / "a").write_text("slower")
        with new_folder(tmp_path / "result", keep=True) as faster:
            (faster / "a").write_text("faster")
    assert (tmp_path / "result" / "a").read_text() == "faster"
    assert os.listdir(tmp_path) == ["result"]


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace

    def logged_sync(handle: int) -> None:
        steps.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name.split("-")[0])
        sync(handle)

    def logged_replace(old: Any, new: Any) -> None:
        steps.append(f"rename to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr("os.fsync", logged_sync)
    monkeypatch.setattr("os.replace", logged_replace)
    write_bytes(tmp_path / "file", b"x")
    assert steps == ["sync .flawsift", "rename to file"]
    steps.clear()
    with new_folder(tmp_path / "result") as folder:
        (folder / "a").write_text("x")
    assert steps == ["sync a", "sync .flawsift", "rename to result", f"sync {tmp_path.name.split('-')[0]}"]
    steps.clear()
    write_result(tmp_path / "r", {"a": "x"})
    ready = steps.index(f"rename to {PENDING}")
    assert {"sync a", "sync manifest.json", "sync plan.json", "sync new", "sync .flawsift"} <= {*steps[:ready]}
    assert steps[ready + 1] == "sync r"


def test_two_writers_never_share_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 7)  # as two machines may have it
    assert temporary_beside(tmp_path / "a") != temporary_beside(tmp_path / "a")
    assert len(temporary_beside(tmp_path / ("a" * 255)).name) < 64, "the longest name can be written too"
    write_bytes(tmp_path / ("a" * 255), b"x")


Killed = Callable[[int, Callable[[], object]], bool]
# what a result is made of, by name; "c" is a part of the second one only and "b" of the first; where the second one has
# its page another one lies that is not the first one's
FIRST = {"a": "first a", "b": "first b", "sub/d": "first d"}
SECOND = {"a": "second a", "c": "second c", "page": "second page", "sub/d": "second d"}


def write_result(folder: Path, files: Mapping[str, str]) -> None:
    moved = {"page": "is of another result", "sub/edited": "was edited"}
    with new_result(folder, old=("[abc]", "sub/d"), aside=moved) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


def read_result(folder: Path) -> dict[str, str]:
    parts, sub = Parts.of(folder), Parts.of(folder / "sub")
    assert parts.digests is not None
    return {**{name: parts.read(name).decode() for name in parts.digests}, "sub/d": sub.read("d").decode()}


def old_result(folder: Path) -> Path:
    write_result(folder, FIRST)
    (folder / "page").write_text("of the first")
    (folder / "sub" / "edited").write_text("by a person")
    (folder / "mine").write_text("of nobody's result")
    return folder


def test_a_result_is_old_or_new_wherever_a_run_is_killed(tmp_path: Path, killed_at: Killed) -> None:
    seen = []
    for n in itertools.count():
        folder = old_result(tmp_path / f"{n}")
        if not killed_at(n, functools.partial(write_result, folder, SECOND)):
            break
        copy = Path(shutil.copytree(folder, tmp_path / f"{n}-read"))
        read = read_result(copy)  # a reader finishes it
        assert read in (FIRST, SECOND)
        seen.append(read == SECOND)
        places = [copy / "sub" / "earlier-1" / "edited", copy / "sub" / "edited"]
        assert [place.exists() for place in places] == [seen[-1], not seen[-1]]
        assert (copy / "earlier-1" / "page" if seen[-1] else copy / "page").read_text() == "of the first"
        assert (copy / "b").exists() == (not seen[-1]), "no file of another result stays"
        write_result(folder, SECOND)  # and so does the next writer
        assert read_result(folder) == SECOND
        assert (folder / "mine").read_text() == "of nobody's result"
    assert seen == sorted(seen), "once it is new it stays so"
    assert 10 < sum(seen) < len(seen) - 10


def test_a_reader_that_is_killed_while_it_finishes_a_result(tmp_path: Path, killed_at: Killed) -> None:
    """At any step from the commit on, again where the next one comes as far, and then one comes to the end."""
    ready = tmp_path
    for n in itertools.count():
        ready = old_result(tmp_path / f"{n}")
        assert killed_at(n, functools.partial(write_result, ready, SECOND))
        if (ready / PENDING).is_dir():
            break
    for n in itertools.count():
        folder = Path(shutil.copytree(ready, tmp_path / f"ready-{n}"))
        if not killed_at(n, functools.partial(settle, folder)):
            break
        killed_at(n, functools.partial(settle, folder))
        assert read_result(folder) == SECOND
        assert (folder / "earlier-1" / "page").read_text() == "of the first"
        assert (folder / "sub" / "earlier-1" / "edited").read_text() == "by a person"


def test_a_result_that_fails_keeps_the_old_one(tmp_path: Path) -> None:
    folder = old_result(tmp_path / "r")
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(RuntimeError), new_result(folder, old=("[abc]",)) as new:
        (new / "a").write_text("half")
        raise RuntimeError
    assert read_result(folder) == FIRST
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_part_that_was_changed_is_named(tmp_path: Path) -> None:
    folder = old_result(tmp_path)
    (folder / "a").write_text("first A")
    with pytest.raises(DamagedPart, match="a is not what was written with the others"):
        Parts.of(folder).read("a")
    (folder / "b").unlink()
    with pytest.raises(DamagedPart, match="b is missing"):
        Parts.of(folder).read("b")
    parts = Parts.of(folder)
    write_result(folder, SECOND)
    with pytest.raises(DamagedPart, match="a is replaced while it was read; try again"):
        parts.read("a")
    for content in ("", "[]", '{"files": 3}'):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(DamagedPart, match="manifest.json cannot be read"):
            Parts.of(folder)
    (folder / MANIFEST).unlink()
    assert Parts.of(folder).read("a") == b"second a", "results of earlier versions have none"


def test_a_part_that_is_replaced_alone(tmp_path: Path) -> None:
    folder = old_result(tmp_path)
    with new_result(folder, adds=True) as new:
        (new / "a").write_text("other a")
    assert read_result(folder) == {**FIRST, "a": "other a"}
    (folder / MANIFEST).unlink()
    with new_result(folder, adds=True) as new:
        (new / "a").write_text("last a")
    assert Parts.of(folder).read("b") == b"first b", "of an earlier version"


def test_left_over_files_go_when_old(tmp_path: Path) -> None:
    for name, age in ((".flawsift-1.tmp", 48), (".flawsift-2.tmp", 1), (".mine.tmp", 48), ("flawsift-1.tmp", 48)):
        (tmp_path / name).mkdir()
        stamp = time.time() - age * 3600
        os.utime(tmp_path / name, (stamp, stamp))
    ensure_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".flawsift-2.tmp", ".mine.tmp", "flawsift-1.tmp"]


def test_output_problems_are_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        ensure_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        ensure_folder(tmp_path / "file" / "sub")

    def denied(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("flawsift.files.tempfile.TemporaryFile", denied)
    with pytest.raises(OutputError, match="permission denied"):
        ensure_folder(tmp_path / "new")


def test_odd_names_and_no_nan(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "t.json", {"name": odd})
    assert "caf" in (tmp_path / "t.json").read_text()
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "nan.json", {"x": float("nan")})
    assert not (tmp_path / "nan.json").exists()
    write_bytes(tmp_path / "b", b"x")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_a_second_program_waits_for_the_first(tmp_path: Path) -> None:
    path, code = tmp_path / "t", "from pathlib import Path; import sys; from flawsift.files import alone\n"
    code += "with alone(Path(sys.argv[1])): Path(sys.argv[1]).write_text('second')"
    with alone(path):
        second = subprocess.Popen([sys.executable, "-c", code, str(path)])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(3)
        path.write_text("first")
    assert second.wait() == 0
    assert path.read_text() == "second"


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_drive_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone(tmp_path / "t"), alone(tmp_path / "t"):
        write_bytes(tmp_path / "t", b"x")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["t"]


def test_a_lock_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Cannot write '.*gone.t': No such file"), alone(tmp_path / "gone" / "t"):
        pytest.fail("nothing is to be done here")


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/hostname", "a/../../mine.txt", ""])
def test_a_plan_of_somebody_else_touches_nothing_outside(name: str, tmp_path: Path) -> None:
    folder, mine = tmp_path / "model", tmp_path / "mine.txt"
    for kind in ("gone", "aside"):
        pending = folder / PENDING
        (pending / NEW).mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        plan = {"gone": [name], "aside": {}} if kind == "gone" else {"gone": [], "aside": {name: "x"}}
        (pending / PLAN).write_text(json.dumps(plan))
        with pytest.raises(OutputError, match="leads out of the folder"):
            settle(folder)
        assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "plan",
    [
        "[" * 100_000, "[]", "{}", '{"gone": 3, "aside": {}}', '{"gone": [3], "aside": {}}',
        '{"gone": ["../mine"], "aside": {}}', '{"gone": [], "aside": {"../mine": "x"}}',
        '{"gone": [], "aside": {"new": "/mine"}}',
    ],
)  # fmt: skip
def test_a_damaged_plan_is_told_and_reaches_no_file_outside(tmp_path: Path, plan: str) -> None:
    (tmp_path / "mine").write_text("work")
    pending = tmp_path / "r" / PENDING
    (pending / "new").mkdir(parents=True)
    (pending / "plan.json").write_text(plan)
    with pytest.raises(OutputError, match=r"cannot be finished: its plan.json is damaged"):
        settle(tmp_path / "r")
    assert (tmp_path / "mine").read_text() == "work"
    assert pending.is_dir()


def test_a_folder_takes_the_place_of_no_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OutputError, match="it is a file, not a folder"), new_folder(tmp_path / "x"):
        raise AssertionError("work was done")
    assert (tmp_path / "x").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
