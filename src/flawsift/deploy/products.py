"""What is served: models by the name of their product, each loaded anew once its file has changed."""

import base64
import contextlib
import io
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flawsift.data import decoding
from flawsift.data.values import VALUE_RANGE, ValueRange
from flawsift.errors import FlawsiftError, InputError, ParameterError, one_line
from flawsift.reports.overlays import Scale, painted, shrink
from flawsift.reports.regions import outlines_of_prediction, regions_of_prediction
from flawsift.runtime import Inspector, Verdict

log = logging.getLogger("flawsift")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # part of an address
MAP_EDGE = 1024  # pixels of a heatmap's long edge: a screen
FILES = ("model.onnx", "model.xml", "model.bin")
Stamp = tuple[tuple[int, int, int] | None, ...]


class TooManyPixels(InputError):
    """A picture that is larger than the server decodes."""


class Loaded(NamedTuple):
    """A model that is served; a request keeps the one it began with.

    Attributes:
        inspector: Runs it.
        digest: Begin of the SHA-256 of its file.
    """

    inspector: Inspector
    digest: str


@dataclass(frozen=True)
class Wanted:
    """What is told of a picture besides its score.

    Attributes:
        regions: Where it is anomalous.
        map: The heatmap over it.
    """

    regions: bool = False
    map: bool = False


class Product:
    """A model under its name.

    Attributes:
        current: The model in use.
        problem: Why its file, which has changed, was not taken; "" where all is well.
    """

    def __init__(
        self, path: str | Path, *, false_alarm_rate: float | None = None, n_threads: int | None = None
    ) -> None:
        """Load it; see `Inspector`.

        Raises:
            ModelError: It is no exported file, or cannot be run.
            ParameterError: A package is missing, or the rate is none.
        """
        self.path, self._rate, self._n_threads = Path(path), false_alarm_rate, n_threads
        self._parts = [self.path / name for name in FILES] if self.path.is_dir() else [self.path]
        if self.path.suffix == ".xml":
            self._parts.append(self.path.with_suffix(".bin"))
        self._lock = threading.Lock()
        self._stamp = self._seen = self._stamp_now()
        self.current = self._load()
        self.problem = ""

    def refresh(self) -> bool | None:
        """Take the file if it has changed and is now at rest; the old model serves until the new one has run.

        Returns:
            Whether the new one was taken; None where there is none.
        """
        with self._lock:
            seen, self._seen = self._seen, self._stamp_now()
            if self._seen in (self._stamp, (None,) * len(self._parts)) or self._seen != seen:
                return None
            self._stamp = self._seen  # one that cannot be loaded is not tried again until it changes
            try:
                self.current, self.problem = self._load(), ""
            except Exception as error:  # noqa: BLE001  # whatever a new file does, the old model goes on
                self.problem = one_line(error)
                log.warning("'%s' has changed, and is not taken: %s", self.path, self.problem)
                return False
            return True

    def _load(self) -> Loaded:
        inspector = Inspector(self.path, false_alarm_rate=self._rate, n_threads=self._n_threads)
        with contextlib.suppress(InputError):  # the first picture takes longer, and shows that the model runs
            inspector(np.full((64, 64, 3), 128, np.uint8))
        return Loaded(inspector, inspector.digest)

    def _stamp_now(self) -> Stamp:
        return tuple(map(_stamp_of, self._parts))


def read_products(models: list[str]) -> dict[str, str]:
    """{name: path} of arguments NAME=MODEL; one without a name is called default.

    Raises:
        ParameterError: A name is no part of an address, or is there twice.
    """
    products: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals:
            name, path = "default", model
        if not NAME.fullmatch(name):
            raise ParameterError(f"'{name}' is no name of a product: letters, digits, '.', '_' and '-' only.")
        if name in products:
            raise ParameterError(f"Two models are called '{name}'. Name them: NAME=MODEL.")
        products[name] = path
    return products


def inspect(loaded: Loaded, content: bytes, wanted: Wanted, max_pixels: int) -> dict[str, Any]:
    """What is answered of one picture.

    Args:
        loaded: The model.
        content: Of a file.
        wanted: What is told besides the score.
        max_pixels: Larger pictures are not decoded.

    Raises:
        TooManyPixels: It is larger.
        InputError: It cannot be read.
    """
    width, height = decoding.size_of(content)
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} pixels; at most {max_pixels / 1e6:g} megapixels are taken")
    card = loaded.inspector.card
    picture = decoding.decode(content, ValueRange.from_json(card["training"].get(VALUE_RANGE)))
    verdict = loaded.inspector(np.asarray(picture, np.uint8))
    told: dict[str, Any] = {
        "verdict": "defect" if verdict.anomalous else "ok",
        "score": verdict.score,
        "p_value": verdict.p_value,
        "threshold": verdict.threshold,
        "width": picture.width,
        "height": picture.height,
    }
    if wanted.regions:
        told["regions"] = _regions(verdict, picture.size)
    if wanted.map:
        told["map_png"] = base64.b64encode(heatmap(verdict, picture, card)).decode()
    return told


def heatmap(verdict: Verdict, picture: Image.Image, card: Mapping[str, Any]) -> bytes:
    """A PNG of the map over its picture, in colours that mean the same on all pictures of a model.

    Args:
        verdict: Of the picture.
        picture: RGB.
        card: The model's, whose table of thresholds says what good pictures score.
    """
    scale = Scale.of(card["calibration"]["thresholds"], verdict.threshold)
    shown = shrink(picture, MAP_EDGE)
    values = np.nan_to_num(verdict.map.astype(np.float32), nan=scale.low, posinf=scale.threshold, neginf=scale.low)
    stretched = Image.fromarray(values).resize(shown.size, Image.Resampling.BILINEAR)
    content = io.BytesIO()
    outlines = outlines_of_prediction(verdict.map, verdict.score, verdict.threshold, shown.size)
    heat = painted(np.asarray(stretched, np.float32), scale, outlines)
    Image.alpha_composite(shown.convert("RGBA"), heat).convert("RGB").save(content, "PNG")
    return content.getvalue()


def _regions(verdict: Verdict, size: tuple[int, int]) -> list[dict[str, Any]]:
    """None of a good picture."""
    if not verdict.anomalous:
        return []
    return [one._asdict() for one in regions_of_prediction(verdict.map, verdict.threshold, size)]


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def error_of(error: BaseException) -> dict[str, str]:
    """What is answered of a picture that has no score."""
    if isinstance(error, TooManyPixels):
        return {"code": "too_large", "message": one_line(error)}
    if isinstance(error, FlawsiftError):
        return {"code": "unreadable", "message": one_line(error)}
    log.warning("A picture could not be scored: %s", one_line(error))
    return {"code": "failed", "message": "The picture could not be scored; the server's log says why."}
