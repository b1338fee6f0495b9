"""Frames of a camera, a stream or a video file, scored as they come."""

import io
import logging
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from flawsift.deploy.results import ResultsFile, Row
from flawsift.errors import InputError, ParameterError, one_line, unknown_name
from flawsift.files import ensure_folder, write_bytes
from flawsift.paths import show
from flawsift.runtime import Verdict

try:
    import av
except ImportError as error:
    raise InputError("Watching a camera or a video needs one more package: pip install 'flawsift[camera]'.") from error

log = logging.getLogger("flawsift")

Keep = Literal["none", "defect", "all"]
Pixels = npt.NDArray[np.uint8]
PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before a lost stream is tried again; the last from then on
TIMEOUT = 10.0  # seconds without a frame after which a stream is lost
RETRY = 5.0  # seconds before a full disk is tried again


class Frame(NamedTuple):
    """A frame that is to be scored: its name, what else its row is known by, and (H, W, 3) RGB."""

    name: str
    size: int
    mtime_ns: int
    pixels: Pixels


class VideoWatch:
    """Scores frames, a row of results for each; rows are as those of a folder.

    A frame of a file is named by its place in it, as "clip.mp4#t=2.500", and has one row however often the command is
    run. One of a camera or a stream is named by the time at which it came. A lost stream is opened again until it is
    back.

    Attributes:
        counts: Rows of this run by their status.
        results: Where rows go.
    """

    def __init__(
        self,
        score: Callable[[Pixels], Verdict],
        source: str,
        results: str | Path,
        *,
        every: float = 1.0,
        keep: Keep = "none",
        model: str = "",
        pauses: tuple[float, ...] = PAUSES,
    ) -> None:
        """Open the source.

        Args:
            score: Scores (H, W, 3) uint8 RGB, such as an `Inspector`.
            source: "camera:0", an address such as rtsp://host/path, or a video file.
            results: File of results, .jsonl or .csv; see `flawsift.deploy.results.Row`.
            every: Seconds between frames that are scored; 0 for all.
            keep: Which frames are saved as PNG, in the folder NAME-frames beside the file of results.
            model: What rows say of the model.
            pauses: Seconds before each new try of a lost stream; the last one from then on.

        Raises:
            InputError: There is no such camera, stream or video, or the file holds no results.
            ParameterError: An unknown way to keep, or a negative time.
            OutputError: The file of results cannot be written.
        """
        if keep not in get_args(Keep):
            raise ParameterError(unknown_name("choice of frames to keep", keep, get_args(Keep)))
        if not every >= 0:
            raise ParameterError(f"every must not be negative, got {every}.")
        self.counts: dict[str, int] = {}
        self.results = ResultsFile(results)
        self._score, self._every, self._keep, self._model, self._pauses = score, every, keep, model, pauses
        self._source, self._file = source, Path(source) if Path(source).is_file() else None
        self._frames = self.results.path.with_name(f"{self.results.path.stem}-frames")
        self._container = self._opened()
        self._done = {row.key for row in self.results.open(iter(()))}

    def run(
        self, stop: threading.Event, *, once: bool = False, on_row: Callable[[Row], object] = lambda row: None
    ) -> None:
        """Score frames until it is stopped or, of a file, until its end.

        Args:
            stop: Ends it after the frame at hand.
            once: End where a stream ends, too, instead of opening it again.
            on_row: Called with each row after it is on the disk.

        Raises:
            InputError: A file is damaged so that no frame can be read.
            OutputError: A frame that is to be kept cannot be written.
        """
        while True:
            n_frames = 0
            try:
                for frame in self._chosen(stop):
                    n_frames += 1
                    if (frame.name, frame.size, frame.mtime_ns) not in self._done:
                        self._take(frame, stop, on_row)
                reason = "it ended"
            except (av.FFmpegError, OSError) as error:
                reason = _reason(error)
                if self._file is not None and not n_frames:
                    raise InputError(f"'{show(self._source)}' is damaged: {reason}.") from error
                if self._file is not None:
                    log.warning("'%s' is damaged, and was read up to there: %s.", show(self._source), reason)
            finally:
                self._container.close()
            if stop.is_set() or once or self._file is not None or not self._is_back(reason, stop):
                return

    def _opened(self) -> Any:
        """The source.

        Raises:
            InputError: There is none.
        """
        address, kind, options = self._source, None, dict[str, str]()
        if camera := re.fullmatch(r"camera:(\d+)", self._source):
            address, kind = f"/dev/video{camera[1]}", "v4l2"
        elif self._source.startswith("camera:"):
            raise InputError(f"'{show(self._source)}' is no camera: its number is missing, as in camera:0.")
        elif self._source.startswith("rtsp"):
            options = {"rtsp_transport": "tcp"}  # frames that come by UDP may miss pieces
        try:
            container = av.open(address, format=kind, options=options, timeout=TIMEOUT)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise InputError(
                f"'{_label(self._source)}' cannot be opened: {_reason(error)}. "
                "Give camera:0, an address such as rtsp://host/path, a video file, or a folder of images."
            ) from error
        if not container.streams.video:
            container.close()
            raise InputError(f"'{_label(self._source)}' holds no video.")
        return container

    def _chosen(self, stop: threading.Event) -> Iterator[Frame]:
        """Frames at the times asked for: of a file by its own clock, else by ours."""
        following, stream = -np.inf, self._container.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        status = None if self._file is None else self._file.stat()
        for number, frame in enumerate(self._container.decode(stream)):
            if stop.is_set():
                return
            place = float(frame.time if frame.time is not None else number / rate)
            now = place if status is not None else time.monotonic()
            if now < following:
                continue
            # from the frame that was taken: a stream that was silent is not caught up with
            following = now + self._every
            pixels = frame.to_ndarray(format="rgb24")
            if self._file is not None and status is not None:
                yield Frame(f"{self._file.name}#t={place:.3f}", status.st_size, status.st_mtime_ns, pixels)
            else:
                came = datetime.now(UTC)
                name = f"{_label(self._source)}/{came.strftime('%Y-%m-%dT%H-%M-%S.%f')}"
                yield Frame(name, 0, int(came.timestamp() * 1e9), pixels)

    def _take(self, frame: Frame, stop: threading.Event, on_row: Callable[[Row], object]) -> None:
        """Score a frame, keep it where that is asked for, and write its row."""
        told: dict[str, Any] = {"model": self._model, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            verdict = self._score(frame.pixels)
        except Exception as error:  # noqa: BLE001  # no frame, of whatever kind, may end the watch
            row = Row(*frame[:3], "unreadable", reason=show(one_line(error)), **told)
        else:
            status = "defect" if verdict.anomalous else "ok"
            to = self._kept(frame, status) if self._keep in ("all", status) else ""
            row = Row(*frame[:3], status, verdict.score, verdict.p_value, verdict.threshold, to, **told)
        while True:
            try:
                self.results.append(row)
            except OSError as error:
                log.warning("'%s' cannot be written: %s.", show(self.results.path), error.strerror or error)
                if stop.wait(RETRY):
                    return
                continue
            break
        self._done.add(row.key)
        self.counts[row.status] = self.counts.get(row.status, 0) + 1
        on_row(row)

    def _kept(self, frame: Frame, status: str) -> str:
        """Where the frame lies, from the folder of the results; it is there whole or not at all."""
        path = self._frames / status / (re.sub(r"[^A-Za-z0-9.=-]", "_", frame.name) + ".png")
        content = io.BytesIO()
        Image.fromarray(frame.pixels).save(content, "PNG")
        ensure_folder(path.parent)
        write_bytes(path, content.getvalue())
        return path.relative_to(self.results.path.parent).as_posix()

    def _is_back(self, reason: str, stop: threading.Event) -> bool:
        """Open a lost stream again, until it is there or the watch is stopped."""
        label = _label(self._source)
        log.warning("'%s' is lost: %s. It is opened again until it is back.", label, reason)
        n_tries = 0
        while not stop.wait(self._pauses[min(n_tries, len(self._pauses) - 1)]):
            n_tries += 1
            try:
                self._container = self._opened()
            except InputError:
                continue
            log.warning("'%s' is back.", label)
            return True
        return False


def _reason(error: Exception) -> str:
    """Why a source cannot be read, without the address, which whole texts of errors hold."""
    return str(getattr(error, "strerror", None) or type(error).__name__)


def _label(source: str) -> str:
    """A source as it may be shown: of an address the host alone, since the rest may be a secret."""
    parts = urllib.parse.urlsplit(source) if "://" in source else None
    return show(source.replace(":", "-")) if parts is None else show(parts.hostname or parts.scheme)
