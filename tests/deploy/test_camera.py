"""Frames of a video and of a stream: one row each, and a lost stream is found again."""

import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flawsift.cli.main import app
from flawsift.deploy.results import ResultsFile, Row
from flawsift.errors import InputError, ParameterError
from flawsift.runtime import Verdict

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'flawsift[camera]'")

from flawsift.deploy.camera import VideoWatch  # noqa: E402  # needs PyAV

LEVELS = (10, 50, 150, 200)  # grey of each second


def brightness(pixels: np.ndarray[Any, Any]) -> Verdict:
    """Stands in for a model: bright pictures are defective."""
    value = float(pixels.mean())
    return Verdict(value, 0.5, value > 100, 100.0, np.zeros((1, 1), np.float32))


def film(path: Path, container: str = "mp4") -> Path:
    """Four seconds of ten frames, each second of one grey."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in np.repeat(LEVELS, 10):
            pixels = np.full((48, 64, 3), level, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


def go(source: str | Path, out: Path, **options: Any) -> list[Row]:
    rows: list[Row] = []
    VideoWatch(brightness, str(source), out, **options).run(threading.Event(), on_row=rows.append)
    return rows


def test_frames_of_a_file_have_a_row_each_and_a_restart_adds_none(tmp_path: Path) -> None:
    clip, out = film(tmp_path / "clip.mp4"), tmp_path / "results.jsonl"
    rows = go(clip, out)
    assert [row.file for row in rows] == [f"clip.mp4#t={second}.000" for second in range(4)]
    assert [row.score for row in rows] == pytest.approx(LEVELS, abs=3)
    assert [row.status for row in rows] == ["ok", "ok", "defect", "defect"]
    assert [row for row, _ in ResultsFile(out).rows()] == rows
    assert go(clip, out) == []
    assert len(go(clip, out, every=0.5)) == 4, "the others are known"
    assert len(go(clip, tmp_path / "all.csv", every=0)) == 40
    assert not list(tmp_path.glob("*-frames"))


@pytest.mark.parametrize(("keep", "kept"), [("none", []), ("defect", [2, 3]), ("all", [0, 1, 2, 3])])
def test_frames_are_kept_as_asked(tmp_path: Path, keep: str, kept: list[int]) -> None:
    rows = go(film(tmp_path / "clip.mp4"), tmp_path / "results.jsonl", keep=keep)
    assert [n for n, row in enumerate(rows) if row.to] == kept
    for row in rows:
        if row.to:
            assert row.to.startswith(f"results-frames/{row.status}/")
            assert np.asarray(Image.open(tmp_path / row.to)).mean() == pytest.approx(row.score)
    assert len(list(tmp_path.rglob("*.png"))) == len(kept)


def test_a_frame_without_a_score_does_not_end_it(tmp_path: Path) -> None:
    def broken(pixels: np.ndarray[Any, Any]) -> Verdict:
        if pixels.mean() < 30:
            raise ValueError("too dark")
        return brightness(pixels)

    rows: list[Row] = []
    watched = VideoWatch(broken, str(film(tmp_path / "a.mp4")), tmp_path / "r.jsonl")
    watched.run(threading.Event(), on_row=rows.append)
    assert [row.status for row in rows] == ["unreadable", "ok", "defect", "defect"]
    assert rows[0].reason == "too dark"
    assert watched.counts == {"unreadable": 1, "ok": 1, "defect": 2}


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[str]:
    """A server that gives the film, then refuses one request, then gives it again, and so on."""
    content, n_asked = film(tmp_path / "film.ts", "mpegts").read_bytes(), 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal n_asked
            n_asked += 1
            if n_asked % 2 == 0:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://user:secret@127.0.0.1:{server.server_port}/secret.ts"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_lost_stream_is_opened_again(stream: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop, rows = threading.Event(), list[Row]()

    def on_row(row: Row) -> None:
        rows.append(row)
        if len(rows) == 60:  # in the second showing
            stop.set()

    with caplog.at_level(logging.WARNING, logger="flawsift"):
        watched = VideoWatch(brightness, stream, tmp_path / "r.jsonl", every=0, pauses=(0.01,))
        watched.run(stop, on_row=on_row)
    assert len(rows) == 60
    assert len({row.key for row in rows}) == 60
    assert all(row.file.startswith("127.0.0.1/20") for row in rows)
    assert [line.split(" is ")[1][:4] for line in caplog.messages] == ["lost", "back"]
    assert "secret" not in caplog.text + (tmp_path / "r.jsonl").read_text()


def test_with_once_a_stream_is_read_to_its_end(stream: str, tmp_path: Path) -> None:
    stop, rows = threading.Event(), list[Row]()

    def on_row(row: Row) -> None:
        rows.append(row)
        if len(rows) > 40:  # it was opened again
            stop.set()

    watched = VideoWatch(brightness, stream, tmp_path / "r.jsonl", every=0, pauses=(0.01,))
    watched.run(stop, once=True, on_row=on_row)
    assert len(rows) == 40


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("camera:99", "'camera-99' cannot be opened"),
        ("camera:front", "its number is missing"),
        ("rtsp://127.0.0.1:1/x", "'127.0.0.1' cannot be opened: Connection refused"),
    ],
)
def test_a_wrong_source_is_told(source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        VideoWatch(brightness, source, tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_a_file_that_is_no_video_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video\n" * 50)
    with pytest.raises(InputError, match="cannot be opened"):
        VideoWatch(brightness, str(tmp_path / "notes.mp4"), tmp_path / "r.jsonl")
    with pytest.raises(ParameterError, match="'defects'. Did you mean 'defect'"):
        VideoWatch(brightness, str(tmp_path / "notes.mp4"), tmp_path / "r.jsonl", keep="defects")  # type: ignore[arg-type]


def test_the_command(exported: Path, tmp_path: Path) -> None:
    clip, out = str(film(tmp_path / "clip.mp4")), str(tmp_path / "r.jsonl")
    done = CliRunner().invoke(app, ["watch", str(exported), clip, "--out", out, "--every", "2", "--keep", "all"])
    assert done.exit_code == 0, done.output
    assert "clip.mp4#t=2.000" in done.output
    assert "Done: " in done.output
    assert len(list((tmp_path / "r-frames").rglob("*.png"))) == 2
    for wrong in (
        ["watch", str(exported), clip, "--sort", "move"],
        ["watch", str(exported), str(tmp_path), "--keep", "all"],
    ):
        refused = CliRunner().invoke(app, [*wrong, "--once", "--out", out])
        assert isinstance(refused.exception, ParameterError)
