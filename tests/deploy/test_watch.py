"""A watched folder: each image has one row, whatever happens in between, and lies where its row says."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flawsift.datasets import Dataset
from flawsift.deploy import watch as watching
from flawsift.deploy.results import ResultsFile, Row, sole_writer
from flawsift.deploy.watch import FolderWatch, Sort
from flawsift.deploy.webhook import Webhook, _post
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.runtime import Inspector, Verdict
from tests.deploy.test_graph import fitted

NAMES = [f"{n}.png" for n in range(6)]


def picture(value: int, size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(content, "PNG")
    return content.getvalue()


def brightness(content: bytes) -> Verdict:
    """Stands in for a model: bright pictures are defective."""
    try:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except OSError as error:
        raise InputError(f"cannot be read: {error}") from error
    value = float(pixels.mean())
    return Verdict(value, 0.5, value > 100, 100.0, np.zeros((1, 1), np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "line"
    path.mkdir()
    return path


@pytest.fixture
def filled(folder: Path) -> Path:
    for n, name in enumerate(NAMES):
        (folder / name).write_bytes(picture(40 * n))
    return folder


def go(folder: Path, out: Path, score: Callable[[bytes], Verdict] = brightness, **options: Any) -> list[Row]:
    """Score all that is there, and the rows of this run."""
    rows: list[Row] = []
    watched = FolderWatch(score, folder, out, **{"settle": 0.0, "timeout": 0.0, **options})
    watched.run(threading.Event(), once=True, on_row=rows.append)
    return rows


def rows_of(out: Path) -> list[Row]:
    return [row for row, _ in ResultsFile(out).rows()]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_each_image_has_one_row_and_a_restart_adds_none(filled: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"results.{ending}"
    assert len(go(filled, out)) == 6
    assert go(filled, out) == []
    rows = {row.file: row for row in rows_of(out)}
    assert [rows[name].score for name in NAMES] == [0, 40, 80, 120, 160, 200]
    assert [rows[name].status for name in NAMES] == ["ok"] * 3 + ["defect"] * 3
    (filled / NAMES[0]).write_bytes(picture(255, 9))
    assert [(row.file, row.status) for row in go(filled, out)] == [(NAMES[0], "defect")]


@pytest.mark.parametrize("sort", ["move", "link"])
def test_scored_images_go_where_they_belong(filled: Path, tmp_path: Path, sort: Sort) -> None:
    (filled / "deep").mkdir()
    (filled / "deep" / "1.png").write_bytes(picture(9))
    (filled / "ok").mkdir()
    (filled / "ok" / "1.png").write_bytes(b"of somebody")
    go(filled, tmp_path / "out.jsonl", sort=sort)
    assert sorted(p.name for p in (filled / "defect").iterdir()) == NAMES[3:]
    assert sorted(p.name for p in (filled / "ok").iterdir()) == ["0.png", "1-2.png", "1.png", "2.png", "deep"]
    assert (filled / "ok" / "1.png").read_bytes() == b"of somebody"
    for row in rows_of(tmp_path / "out.jsonl"):
        assert (filled / row.file).exists() == (sort == "link")
        assert brightness((filled / row.to).read_bytes()).score == row.score
    assert go(filled, tmp_path / "out.jsonl", sort=sort) == []
    assert [row.file for row in go(filled, tmp_path / "out.jsonl")] == ["ok/1.png"]  # what was moved is known


@pytest.mark.parametrize("sort", ["none", "move", "link"])
def test_killed_at_any_step_on_the_disk_each_image_has_one_row(
    folder: Path, tmp_path: Path, killed_at: Any, sort: Sort
) -> None:
    for n, name in enumerate(NAMES[:3]):
        (folder / name).write_bytes(picture(90 * n))
    n, killed = 0, True
    while killed:
        place, out = tmp_path / f"kill-{n}", tmp_path / f"{n}.jsonl"
        shutil.copytree(folder, place)
        for later in range(2):  # killed again, a step further
            killed = killed_at(n + later, lambda: go(place, out, sort=sort))  # noqa: B023  # called at once
        go(place, out, sort=sort)
        rows = rows_of(out)
        assert sorted(row.file for row in rows) == NAMES[:3]
        for row in rows if sort != "none" else []:
            assert brightness((place / row.to).read_bytes()).score == row.score
        assert sum(p.suffix == ".png" for p in place.rglob("*")) == (6 if sort == "link" else 3)
        n += 1
    assert n > 1


def test_five_kills_of_a_process_lose_and_double_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    program = (
        "import sys, threading, numpy as np\n"
        "from flawsift.deploy.watch import FolderWatch\n"
        "from flawsift.runtime import Verdict\n"
        "def score(content):\n"
        "    return Verdict(float(len(content)), 0.5, len(content) % 2 == 0, 1.0, np.zeros((1, 1)))\n"
        "FolderWatch(score, sys.argv[1], sys.argv[2], sort='move', settle=0.01).run(threading.Event())\n"
    )
    n_written = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", program, str(folder), str(out)])
        n_before = len(out.read_bytes().splitlines()) if out.exists() else 0
        for _ in range(20):
            (folder / f"{n_written}.png").write_bytes(b"x" * (n_written + 1))
            n_written += 1
        wanted = n_before + 7 if n_written < 120 else n_written
        deadline = time.monotonic() + 60
        while not (out.exists() and out.read_bytes().count(b"\n") >= wanted):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows = rows_of(out)
    assert sorted(row.score or 0 for row in rows) == list(range(1, n_written + 1))


def test_what_a_full_disk_or_a_kill_left_of_a_line_is_cut_off(filled: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    go(filled, out)
    whole = out.read_bytes()
    for end in range(len(whole) - len(whole.splitlines()[-1]), len(whole)):
        out.write_bytes(whole[:end])
        assert len(go(filled, out)) == 1
        assert len(rows_of(out)) == 6


def test_a_full_disk_is_told_and_waited_for(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "RETRY", 0.001)
    failures = iter([errno.ENOSPC] * 0)

    def fsync(handle: int) -> None:
        for number in failures:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    watched = FolderWatch(brightness, filled, tmp_path / "out.jsonl", settle=0)
    failures = iter([errno.ENOSPC] * 3)
    watched.run(threading.Event(), once=True)
    assert sorted(row.file for row in rows_of(tmp_path / "out.jsonl")) == NAMES
    assert caplog.text.count("No space left") == 1


def test_half_written_files_are_waited_for(folder: Path, tmp_path: Path) -> None:
    noise, path = io.BytesIO(), folder / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(150, 255, (40, 40, 3)).astype(np.uint8)).save(noise, "PNG")
    whole = noise.getvalue()
    watched = FolderWatch(brightness, folder, tmp_path / "out.jsonl", settle=0, timeout=60)
    stop = threading.Event()
    for end in (0, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:end])
        watched._next_scan = 0
        for _ in range(4):
            assert list(watched.step(stop)) == []
    path.write_bytes(whole)
    rows = [row for _ in range(4) for row in watched.step(stop)]
    assert [(row.status, row.size) for row in rows] == [("defect", len(whole))]


def test_a_file_that_changes_while_it_is_read_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = folder / "a.png"
    path.write_bytes(picture(10))
    seen: list[bytes] = []
    read = Path.read_bytes

    def score(content: bytes) -> Verdict:
        seen.append(content)
        return brightness(content)

    watched = FolderWatch(score, folder, tmp_path / "out.jsonl", settle=0)
    stop, replaced = threading.Event(), picture(200, 30)

    def read_bytes(self: Path) -> bytes:
        content = read(self)
        if self == path and content != replaced:
            path.write_bytes(replaced)
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        rows = [row for _ in range(6) for row in watched.step(stop)]
    assert seen == [replaced]
    assert [row.size for row in rows] == [len(replaced)]


def test_an_image_that_is_written_anew_before_it_is_moved_stays(folder: Path, tmp_path: Path) -> None:
    path = folder / "a.png"
    path.write_bytes(picture(10))
    watched = FolderWatch(brightness, folder, tmp_path / "out.jsonl", sort="move", settle=0)
    append = watched.results.append

    def append_and_replace(row: Row) -> None:
        append(row)
        if row.status == "ok":
            path.write_bytes(picture(200, 30))

    watched.results.append = append_and_replace  # type: ignore[method-assign]
    watched.run(threading.Event(), once=True)
    watched._next_scan = 0
    watched.run(threading.Event(), once=True)
    assert [row.status for row in rows_of(tmp_path / "out.jsonl")] == ["ok", "defect"]
    assert brightness((folder / "defect" / "a.png").read_bytes()).score == 200
    assert not (folder / "ok").exists()


def test_a_row_that_is_taken_back_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, rows = ResultsFile(tmp_path / "out.jsonl"), [Row(name, 1, 1, "ok") for name in "ab"]
    file.open(iter(()))
    file.append(rows[0])
    seen: list[list[Row]] = []

    def fail(handle: int) -> None:  # as a webhook's thread reads at this moment
        seen.append([row for row, _ in file.rows()])
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        file.append(rows[1])
    assert seen == [rows[:1]]
    assert rows_of(file.path) == rows[:1]


def test_what_cannot_be_read_is_listed_and_harms_nobody(filled: Path, tmp_path: Path) -> None:
    (filled / "text.png").write_text("no image")
    (filled / "empty.png").touch()
    (filled / "notes.txt").write_text("not looked at")
    rows = {row.file: row for row in go(filled, tmp_path / "out.jsonl", sort="move")}
    assert sorted(rows) == sorted([*NAMES, "text.png", "empty.png"])
    assert rows["text.png"].status == rows["empty.png"].status == "unreadable"
    assert "cannot be read" in rows["text.png"].reason
    assert (filled / "text.png").exists()

    def broken(content: bytes) -> Verdict:
        raise RuntimeError("of the runtime")

    (filled / "new.png").write_bytes(picture(3))
    assert [row.reason for row in go(filled, tmp_path / "out.jsonl", broken)] == ["of the runtime"]


@pytest.mark.skipif(os.name != "posix", reason="pipes among files are of POSIX systems")
def test_what_is_no_file_is_told_once_and_left_out(
    filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(filled / "pipe.png")
    (filled / "broken.png").symlink_to("nowhere")
    (filled / "zero.png").symlink_to("/dev/zero")
    assert sorted(row.file for row in go(filled, tmp_path / "out.jsonl")) == sorted(NAMES)
    for text in (
        "'pipe.png' is left out: a named pipe, not a file.",
        "'broken.png' is left out: a link to a file that is not there.",
        "'zero.png' is left out: a device, not a file.",
    ):
        assert caplog.text.count(text) == 1


def test_new_only_leaves_out_what_is_there_at_the_first_start(filled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert go(filled, out, new_only=True) == []
    (filled / "late.png").write_bytes(picture(3))
    assert [row.file for row in go(filled, out, new_only=True)] == ["late.png"]
    assert [row.status for row in rows_of(out)] == ["skipped"] * 6 + ["ok"]


def test_a_lost_folder_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "RETRY", 0.01)
    monkeypatch.setattr(watching, "RESCAN", 0.01)
    stop, rows = threading.Event(), list[Row]()
    watched = FolderWatch(brightness, folder, tmp_path / "out.jsonl", settle=0.01)
    thread = threading.Thread(target=watched.run, args=(stop,), kwargs={"on_row": rows.append})
    thread.start()
    try:
        for n in range(3):
            (folder / f"{n}.png").write_bytes(picture(n))
            wait_for(lambda: len(rows) == n + 1)  # noqa: B023  # called at once
            folder.rename(tmp_path / "away")
            wait_for(lambda: caplog.text.count("cannot be listed") == n + 1)  # noqa: B023
            shutil.copytree(tmp_path / "away", folder)
            shutil.rmtree(tmp_path / "away")
    finally:
        stop.set()
        thread.join()
    assert [row.file for row in rows] == ["0.png", "1.png", "2.png"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


TEXT = st.text(st.characters(codec=None, exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda text: not Path(text).is_absolute() and ".." not in Path(text).parts
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=3), st.sampled_from(["jsonl", "csv"]))
def test_rows_of_any_names_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], ending: str
) -> None:
    out = tmp_path_factory.mktemp("rows") / f"out.{ending}"
    rows = [Row(name, n, n + 1, "ok", 0.1, None, 1e-9, to) for n, (name, to) in enumerate(texts)]
    file = ResultsFile(out)
    assert file.open(iter(rows[:1])) == rows[:1]
    for row in rows[1:]:
        file.append(row)
    assert [row for row, _ in file.rows()] == rows
    assert all(line.isprintable() for line in out.read_text("utf-8").split("\n"))


def test_a_name_begins_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "out.csv")
    row = Row("=1+2.png", 1, 2, "ok", -0.5, to="@x.png")
    assert file.open(iter([row])) == [row]
    assert file.line(row).startswith("'=1+2.png,1,2,ok,-0.5,,,'@x.png,")


@pytest.mark.parametrize("content", ['{"file": 3}\n', "mine\n", '["a"]\n', '{"file": "a", "other": 1}\n'])
def test_a_file_of_something_else_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    for name in ("out.jsonl", "out.csv"):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="no file of results"):
            FolderWatch(brightness, folder, tmp_path / name)
        assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    "content", [b'{"setting": 1}', b"notes", b"\x89PNG\r\n\x1a\n1234", b"a,b\n1,2", b'{"file": "a", "other": 1}\n{"fi']
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_nothing_is_cut_off_from_a_file_of_something_else(
    folder: Path, tmp_path: Path, content: bytes, ending: str
) -> None:
    (tmp_path / f"out.{ending}").write_bytes(content)
    with pytest.raises(InputError, match="no file of results"):
        FolderWatch(brightness, folder, tmp_path / f"out.{ending}")
    assert (tmp_path / f"out.{ending}").read_bytes() == content


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_what_is_left_of_a_line_is_cut_off_wherever_it_ends(filled: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"out.{ending}"
    go(filled, out)
    whole = out.read_bytes()
    row = Row(**WHOLE_ROW)
    begun = whole + ResultsFile(out).line(row).encode()
    for size in [*range(len(whole.split(b"\n")[0])), *range(len(whole), len(begun))]:
        out.write_bytes(begun[:size])
        rows = ResultsFile(out).open(iter(()))
        assert out.read_bytes() == begun[: begun.rfind(b"\n", 0, size) + 1]
        assert len(rows) == (len(NAMES) if size >= len(whole) else 0)


WHOLE_ROW = asdict(Row("0.png", 5, 7, "ok", 0.5, 0.5, 1.0, "ok/0.png"))


@pytest.mark.parametrize(
    "change",
    [{"size": "5"}, {"size": 5.0}, {"mtime_ns": None}, {"mtime_ns": True}, {"status": "fine"}, {"status": 3},
     {"score": "0.5"}, {"score": float("nan")}, {"to": 3}, {"file": None}, {"to": "../0.png"}, {"to": "/tmp/0.png"},
     {"file": "a/../../0.png"}, {"to": "a\0"}, {"p_value": []}],
)  # fmt: skip
def test_a_row_that_no_watch_writes_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(WHOLE_ROW) + "\n")
    assert FolderWatch(brightness, folder, out).results.path == out
    out.write_text(json.dumps(WHOLE_ROW | change) + "\n")
    with pytest.raises(InputError, match="no file of results"):
        FolderWatch(brightness, folder, out)


def test_a_table_with_another_head_is_refused(filled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    go(filled, out)
    out.write_text(out.read_text("utf-8").replace("file", "\r", 1), "utf-8", newline="")
    with pytest.raises(InputError, match="no file of results"):
        go(filled, out)


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there"):
        FolderWatch(brightness, tmp_path / "none", tmp_path / "out.jsonl")
    with pytest.raises(ParameterError, match="way to sort"):
        FolderWatch(brightness, folder, tmp_path / "out.jsonl", sort="copy")  # type: ignore[arg-type]


class Receiver:
    """Notes what it gets, and fails when told."""

    def __init__(self) -> None:
        self.failing = False
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []

    def __call__(self, body: bytes, key: str) -> None:
        self.keys.append(key)
        if self.failing:
            raise OSError("away")
        self.bodies.append(json.loads(body))


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Receiver:
    monkeypatch.setattr("flawsift.deploy.webhook.PAUSES", (0.001,))
    return Receiver()


def test_results_reach_a_webhook_once_it_answers(
    filled: Path, tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    ResultsFile(tmp_path / "out.jsonl").open(iter([Row("before", 1, 1, "ok")]))
    watched = FolderWatch(brightness, filled, tmp_path / "out.jsonl", settle=0)
    results = watched.results
    receiver.failing = True
    hook = Webhook("https://host/secret", results, post=receiver)
    hook.start()
    watched.run(threading.Event(), once=True, on_row=lambda row: hook.notify())
    wait_for(lambda: len(receiver.keys) > 2)
    assert hook.stop() == 6
    assert len(set(receiver.keys)) == 1
    assert caplog.text.count("did not reach the webhook at host") == 1
    assert "secret" not in caplog.text
    receiver.failing = False
    hook = Webhook("https://host/secret", results, post=receiver)  # the next run
    hook.start()
    wait_for(lambda: len(receiver.bodies) == 6)
    assert hook.stop() == 0
    assert receiver.bodies == [asdict(row) for row in rows_of(results.path)[1:]]
    assert len(set(receiver.keys)) == 6


def test_an_answer_counts_only_if_it_is_one(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(int(self.path[1:]))
            self.send_header("Location", "/200")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *given: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        _post(f"{base}/204", b"{}", "key")
        for status in (302, 303, 307, 404, 500):
            with pytest.raises(OSError, match=str(status)):
                _post(f"{base}/{status}", b"{}", "key")
        server.shutdown()
        thread.join()
    with pytest.raises(OSError):
        _post(base, b"{}", "key")
    assert got == [b"{}"] * 6
    results = ResultsFile(tmp_path / "out.jsonl")
    results.open(iter(()))
    for url in ("file:///etc/passwd", "host", "http://"):
        with pytest.raises(ParameterError, match="webhook"):
            Webhook(url, results)


def test_the_command_scores_with_a_model(
    cli: Any, exported: Path, easy_folder: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("part-00.png", "part-45.png"):
        shutil.copy(easy_folder / name, folder / name)
    out = tmp_path / "results.jsonl"
    code, said, err = cli("watch", exported, folder, "--out", out, "--once", "--settle", 0, "--sort", "link")
    assert code == 0, err
    inspector = Inspector(exported)
    for row in rows_of(out):
        verdict = inspector(folder / row.file)
        assert (row.score, row.p_value, row.threshold) == (verdict.score, verdict.p_value, verdict.threshold)
        assert row.status in said
        assert len(row.model) == 12
    assert "Done: 1 defect, 1 ok." in err
    with sole_writer(out):
        code, _, err = cli("watch", exported, folder, "--out", out, "--once")
    assert code == 2
    assert "Another program writes" in err
    code, _, err = cli("watch", exported, folder, "--out", tmp_path / "none" / "out.jsonl", "--once")
    assert (code, "no such folder" in err) == (2, True)
    code, _, err = cli("watch", exported, tmp_path / "none", "--out", out)
    assert code == 2
    assert "is not there" in err


def test_it_ends_with_a_word(exported: Path, easy_folder: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(easy_folder / "part-45.png", folder)
    command = [sys.executable, "-m", "flawsift", "watch", str(exported), str(folder), "--settle", "0.01"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("defect     part-45.png  ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped: 1 defect. The same command goes on where it was." in err
    assert [row.file for row in rows_of(tmp_path / "results.jsonl")] == ["part-45.png"]


def test_a_model_folder_is_exported_first(
    cli: Any, easy: Dataset, tiny: Backbone, easy_folder: Path, folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    fitted("padim", easy, tiny).save(model)
    shutil.copy(easy_folder / "part-45.png", folder)
    code, said, err = cli("watch", model, folder, "--out", tmp_path / "r.jsonl", "--once", "--settle", 0)
    assert code == 0, err
    assert said.startswith("defect ")
