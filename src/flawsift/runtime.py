"""Exported models, run without torch: NumPy and onnxruntime, or NumPy and OpenVINO.

    inspector = Inspector("exported/model.onnx")
    verdict = inspector(image)  # (H, W, 3) uint8 RGB, or a file's path
    verdict.score, verdict.anomalous, verdict.p_value, verdict.map

`flawsift.deploy.export` writes such files.
"""

import functools
import hashlib
import importlib
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from flawsift.damage import DAMAGE, json_object
from flawsift.errors import InputError, ModelError, ParameterError
from flawsift.files import content_digest

INPUTS = ("image", "turn")  # of the graph; the second of models that align parts
OUTPUTS = ("score", "p_value", "anomalous", "map")  # of the graph, in this order
CARD = "flawsift"  # the key under which a file carries its model card
CARD_FORMAT = 2  # from which on files end with `seal`
SEAL = "flawsift.sha256"  # the key of that; what reads these formats passes over it
Image = npt.NDArray[np.uint8]
Run = Callable[[Sequence[npt.NDArray[Any]]], list[npt.NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is said of one picture.

    Attributes:
        score: Anomaly score; higher is more anomalous.
        p_value: How unusual the score is among good pictures: the false-alarm rate at which it would just be flagged.
        anomalous: Whether the score is above the threshold.
        threshold: That.
        map: (H, W) float32 anomaly map over the picture, as many cells as the network's input has pixels.
    """

    score: float
    p_value: float
    anomalous: bool
    threshold: float
    map: npt.NDArray[np.float32]


class Inspector:
    """Runs one exported model. Calls from several threads at once are fine.

    Attributes:
        card: The model card: what it was made of, what it promises, what it is for.
        threshold: Scores above it are anomalous.
    """

    def __init__(
        self, path: str | Path, *, false_alarm_rate: float | None = None, n_threads: int | None = None
    ) -> None:
        """Load a file.

        Args:
            path: model.onnx, or model.xml beside its model.bin, or the folder of one.
            false_alarm_rate: For the threshold; None takes the model's.
            n_threads: That one picture is scored with; None for as many as the runtime finds good.

        Raises:
            ModelError: There is no such file, it is damaged, or none of flawsift's.
            ParameterError: The package that runs it is missing, or the rate is not in (0, 1).
        """
        if n_threads is not None and n_threads < 1:
            raise ParameterError(f"n_threads must be at least 1, got {n_threads}.")
        self.path = _file_of(Path(path))
        is_sealed = _is_sealed(self.path)
        load = _load_onnx if self.path.suffix == ".onnx" else _load_openvino
        self._run, content = load(self.path, n_threads)
        try:
            self.card = json_object(content)
            self._thresholds = np.array(self.card["calibration"]["thresholds"], np.float64)
            self._rates = np.array(self.card["calibration"]["rates"], np.float64)
            self.threshold = float(self.card["threshold"]["value"])
            self._range = self.card["training"].get("value_range")  # of images of more than 8 bits
            self._alignment = _alignment(self.card["training"].get("alignment"))
            is_known = self.card["format"] <= CARD_FORMAT
            is_whole = is_sealed or self.card["format"] < CARD_FORMAT
        except DAMAGE as error:
            raise ModelError(f"'{self.path}' carries no model card of flawsift: it was not exported by it.") from error
        if not is_known:
            raise ModelError(f"'{self.path}' was written by a newer flawsift; update flawsift to read it.")
        if not is_whole:
            raise ModelError(f"'{self.path}' is damaged: its end is missing. Take a copy of it, or export it again.")
        if false_alarm_rate is not None:
            self.threshold = self._threshold_at(false_alarm_rate)

    @functools.cached_property
    def digest(self) -> str:
        """Begin of the SHA-256 of the file."""
        return content_digest(self.path.read_bytes())[:12]

    def __call__(self, image: npt.NDArray[Any] | str | Path | bytes | Any) -> Verdict:
        """Score one picture.

        Args:
            image: (H, W, 3) uint8 RGB. What else `flawsift.data.decoding` reads is read by it, with Pillow: a file's
                path or content, a PIL image, grey and 16-bit arrays.

        Raises:
            InputError: It is no image, or cannot be read.
        """
        score, p_value, _, anomaly_map = self._run(self._inputs(_pixels(image, self._range)))
        value = float(score[0])
        if not math.isfinite(value):
            raise InputError("The model gives no number for this picture.")
        return Verdict(value, float(p_value[0]), value > self.threshold, self.threshold, anomaly_map)

    def many(self, images: Iterable[Any], *, n_workers: int = 1) -> Iterator[Verdict]:
        """Verdicts of pictures in their order, as they are made; an iterator is read as it is needed.

        Args:
            images: Each as for a call.
            n_workers: Pictures at a time, each in a thread.
        """
        if n_workers == 1:
            yield from map(self, images)
            return
        with ThreadPoolExecutor(n_workers) as pool:
            waiting = []
            for image in images:
                waiting.append(pool.submit(self, image))
                if len(waiting) > 2 * n_workers:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def _inputs(self, pixels: Image) -> list[npt.NDArray[Any]]:
        """Of the graph: all of the picture, or its part, turned and cropped, and where it lies."""
        if self._alignment is None:
            return [pixels]
        from PIL import Image as Pictures

        picture = Pictures.fromarray(pixels)
        pose = self._alignment.pose(picture)
        return [np.asarray(self._alignment.crop(picture, pose)), self._alignment.to_crop(pose)]

    def _threshold_at(self, rate: float) -> float:
        """As `Calibration.threshold`."""
        if not 0 < rate < 1:
            raise ParameterError(f"false_alarm_rate must be in (0, 1), got {rate}.")
        within = self._rates <= rate * (1 + 1e-8)
        return float(self._thresholds[within.argmax() if within.any() else -1])


def _alignment(content: Any) -> Any:
    """What a model aligns parts by, which needs Pillow and SciPy; None where it does not."""
    if content is None:
        return None
    from flawsift.data.alignment import Alignment

    return Alignment.from_json(content)


def _file_of(path: Path) -> Path:
    if path.is_dir():
        there = [path / name for name in ("model.onnx", "model.xml") if (path / name).is_file()]
        if not there:
            raise ModelError(f"'{path}' holds no model.onnx or model.xml. Export one: flawsift export-model.")
        return there[0]
    if not path.is_file():
        raise ModelError(f"'{path}' is not there.")
    if path.suffix not in (".onnx", ".xml"):
        raise ModelError(f"'{path}' is neither .onnx nor .xml.")
    return path


def seal(content: bytes, weights: bytes | None) -> bytes:
    """What an exported file ends with: the SHA-256 of all before it, for neither format tells a changed number.

    Args:
        content: The file without it.
        weights: Of the file beside it, of OpenVINO; None of ONNX.

    Returns:
        An XML comment; or an entry of ONNX metadata, which is field 14 of the file with a key (1) and a value (2).
    """
    digest = hashlib.sha256(content + (weights or b"")).hexdigest()
    if weights is not None:
        return f"<!-- {SEAL} {digest} -->\n".encode()
    entry = b"".join(bytes([8 * n + 2, len(text)]) + text.encode() for n, text in ((1, SEAL), (2, digest)))
    return bytes([8 * 14 + 2, len(entry)]) + entry


def _is_sealed(path: Path) -> bool:
    """Whether a file ends with `seal`; those of earlier versions do not.

    Raises:
        ModelError: It does, and is not what was written; or it cannot be read.
    """
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else None
    try:
        content = path.read_bytes()
        weights = None if beside is None else beside.read_bytes()
    except OSError as error:
        raise ModelError(f"'{error.filename or path}' cannot be read: {error.strerror or error}.") from error
    start = len(content) - len(seal(b"", weights))
    if SEAL.encode() not in content[max(start, 0) :]:
        return False
    if content[start:] != seal(content[:start], weights):
        files = f"'{path}'" if beside is None else f"'{path}' or '{beside.name}'"
        raise ModelError(f"{files} is damaged: it does not match its SHA-256. Take a copy of it, or export it again.")
    return True


def _load_onnx(path: Path, n_threads: int | None) -> tuple[Run, str]:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    # threads that wait in a loop are no quicker on two cores, and take them from whatever else runs there
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if n_threads is not None:
        options.intra_op_num_threads = n_threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        card = session.get_modelmeta().custom_metadata_map.get(CARD, "")
    except Exception as error:  # what a damaged file raises is not documented
        raise ModelError(f"'{path}' cannot be loaded: {_first_line(error)}") from error

    def run(inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        named = dict(zip(INPUTS, inputs, strict=False))
        outputs: list[npt.NDArray[Any]] = session.run(list(OUTPUTS), named)
        return outputs

    return run, card


def _load_openvino(path: Path, n_threads: int | None) -> tuple[Run, str]:
    openvino = _package("openvino")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if n_threads is not None:
        options["INFERENCE_NUM_THREADS"] = n_threads
    try:
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # who overwrites a mapped file in place kills those that run it
        model = core.read_model(str(path))
        card = model.get_rt_info([CARD]).astype(str) if model.has_rt_info([CARD]) else ""
        compiled = core.compile_model(model, "CPU", options)
    except Exception as error:  # what a damaged file raises is not documented
        raise ModelError(f"'{path}' cannot be loaded: {_first_line(error)}") from error
    own = threading.local()  # a request answers one call at a time

    def run(inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        own.request.infer(dict(zip(INPUTS, inputs, strict=False)))
        return [own.request.get_tensor(name).data.copy() for name in OUTPUTS]

    return run, card


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which asks Google Analytics at import unless the module is absent."""
    if "openvino" not in sys.modules:
        known = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = cast(Any, None)
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules["openvino_telemetry"]
            if known is not None:
                sys.modules["openvino_telemetry"] = known
    return sys.modules["openvino"]


def _package(name: str) -> Any:
    try:
        return import_openvino() if name == "openvino" else importlib.import_module(name)
    except ImportError as error:
        raise ParameterError(f"This file needs {name}: pip install {name}.") from error


def _pixels(image: Any, value_range: Any) -> Image:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        if not image.size:
            raise InputError(f"The picture has no pixels: {image.shape}.")
        return np.ascontiguousarray(image)
    from flawsift.data import decoding  # needs Pillow
    from flawsift.data.values import ValueRange

    ranged = ValueRange.from_json(value_range)

    if isinstance(image, str | Path):
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"'{image}' cannot be read: {error.strerror or error}.") from error
    if isinstance(image, bytes):
        picture = decoding.decode(image, ranged)
    elif isinstance(image, np.ndarray):
        picture = decoding.from_array(image, ranged)
    elif hasattr(image, "getbands"):
        picture = decoding.from_picture(image, ranged)
    else:
        raise InputError(
            f"A picture is {decoding.ARRAYS}, a PIL image, or a file's path or content; got {type(image)}."
        )
    return np.asarray(picture, np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
