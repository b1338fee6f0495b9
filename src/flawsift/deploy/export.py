"""Write a model as one file for a runtime without torch: ONNX or OpenVINO, from pixels to verdict."""

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch

import flawsift
from flawsift.data.alignment import Alignment
from flawsift.deploy.graph import Graph, traceable_pooling
from flawsift.detectors.registry import ADAPTERS
from flawsift.errors import ModelError, ParameterError, unknown_name
from flawsift.features.backbones import load_backbone
from flawsift.files import new_folder, write_bytes, write_json
from flawsift.models.model import Model
from flawsift.runtime import CARD, CARD_FORMAT, INPUTS, OUTPUTS, Inspector, Verdict, import_openvino, seal
from flawsift.types import Size, as_shape

Format = Literal["onnx", "openvino"]
OPSET = 18  # the first that has minima by scatter
# Relative difference of scores up to which an export is taken as right. Features are stored as float16, and two ways of
# rounding a sum before may end in neighbouring ones, which moves a score by up to a two thousandth.
AGREES = 1e-3
OWN_FILES = {"model.onnx", "model.xml", "model.bin", "model-card.json"}


def export_model(model: Model, out: str | Path, to: Format = "onnx", *, now: datetime | None = None) -> Path:
    """Write a model as one graph, which `flawsift.runtime.Inspector` and any client of the format runs.

    Its input "image" is (H, W, 3) uint8 RGB, upright, of any size. Its outputs are "score" (1,), "p_value" (1,),
    "anomalous" (1,) bool, by the threshold of the model, and "map" (S, S) on the grid of the network's input: resizing,
    normalisation, backbone, detector and threshold are in it, so that no client can differ from the training.

    Where the model aligns parts, finding them is no matter of a graph: "image" is the crop then, and a second input
    "turn" (2, 3) says where it lies, both by `flawsift.data.alignment`, as `Inspector` does it. The map is over the
    whole image all the same.

    The file is scored against the model on made-up pictures before it appears.

    Args:
        model: Fitted, with a threshold.
        out: A folder, which is made anew: model.onnx, or model.xml and model.bin; and model-card.json, which the file
            carries inside, too.
        to: The format.
        now: What the card is dated with; None for the present.

    Returns:
        The file to run.

    Raises:
        ParameterError: An unknown format, a package that it needs is missing, or the folder holds something else.
        ModelError: The detector cannot be written as a graph, or the file gives other scores.
        OutputError: The folder cannot be written.
    """
    if to not in get_args(Format):
        raise ParameterError(unknown_name("format", to, get_args(Format)))
    if model.detector.name in ADAPTERS:
        raise ModelError(f"{model.detector.name} is another library's model, which cannot be written as our graph.")
    _require("onnx", *(["onnxruntime"] if to == "onnx" else ["openvino"]))
    out = Path(out)
    _check_replaceable(out)
    card = card_of(model, now or datetime.now(UTC))
    graph = _to_onnx(model)
    with new_folder(out) as folder:
        target = folder / ("model.onnx" if to == "onnx" else "model.xml")
        if to == "onnx":
            _write_onnx(graph, card, target)
        else:
            _write_openvino(graph, card, target)
        card["parity"] = parity(model, Inspector(target), made_up_pictures(model.backbone.size, model.alignment))
        if not card["parity"]["largest_difference"] <= AGREES:
            raise ModelError(
                f"The exported {model.detector.name} scores made-up pictures differently from the model, by up to "
                f"{100 * card['parity']['largest_difference']:.2g} %. It was not written; please report this."
            )
        write_json(folder / "model-card.json", card)
    return out / target.name


def card_of(model: Model, now: datetime) -> dict[str, Any]:
    """What the file says of itself: what it was made of, what it promises, what it is for."""
    threshold = model.threshold()
    if threshold is None:
        raise ModelError("The model has no threshold, since it was fitted on too few images. Fit it on more.")
    training = dict(model.training)
    return {
        "format": CARD_FORMAT,
        "product": None,
        "exported": now.isoformat(timespec="seconds"),
        "flawsift": flawsift.__version__,
        "detector": {"name": model.detector.name, "params": model.detector.params()},
        "backbone": {"name": model.backbone.name, "weights_digest": model.backbone.weights_digest},
        "size": model.backbone.size,
        "training": training,  # with the alignment, if there is one
        "contamination": model.calibration.contamination,
        "threshold": {**vars(threshold), "promise": threshold.promise, "warning": model.calibration.warning},
        "calibration": {
            "thresholds": model.calibration.thresholds.tolist(),
            "rates": model.calibration.rates.tolist(),
        },
        "profile": None if model.profile is None else model.profile.as_json(),
        "intended_use": (
            "Finds what is unusual in pictures of the product, camera and light that it was trained on. It is no "
            "measurement, and no replacement for a person's final inspection where safety depends on it."
        ),
    }


def read_card(path: Path) -> dict[str, Any]:
    """The model card beside an exported file."""
    card: dict[str, Any] = json.loads((path.parent / "model-card.json").read_text("utf-8"))
    return card


def parity(
    model: Model, inspect: Callable[[npt.NDArray[np.uint8]], Verdict], images: Iterable[npt.NDArray[np.uint8]]
) -> dict[str, Any]:
    """How far the scores of an exported file are from those of the model.

    Args:
        model: What was exported.
        inspect: Runs the file, as an `Inspector` does.
        images: (H, W, 3) RGB; read one by one, and not kept.

    Returns:
        n_images, largest_difference (relative) and n_other_verdicts.
    """
    exact, differences, n_other = in_float32(model), [], 0
    for image in images:
        wanted = exact.predict([image]).item()
        got = inspect(image)
        differences.append(abs(got.score - wanted.score) / max(abs(wanted.score), 1e-6))
        n_other += got.anomalous != wanted.is_anomalous
    return {
        "n_images": len(differences),
        "largest_difference": max(differences, default=0.0),
        "n_other_verdicts": n_other,
    }


def made_up_pictures(size: Size, alignment: Alignment | None = None) -> Iterator[npt.NDArray[np.uint8]]:
    """Smooth pictures with noise: of the network's own size, larger, and so wide that blocks of pixels are averaged.

    For models that align, as parts before a plain background, one of them reaching over the border.
    """
    generator = np.random.default_rng(0)
    h, w = as_shape(size)
    for height, width in ((h, w), (h + 17, 2 * w), (h // 2 + 5, 4 * w)):
        rows, columns = np.mgrid[0:height, 0:width]
        phases = generator.uniform(0, 6, (3, 1, 1))
        waves = np.sin(rows / 9 + phases) + np.cos(columns / 13 - phases)  # (3, height, width)
        picture = 128 + 50 * waves + generator.normal(0, 8, (3, height, width))
        if alignment is not None:
            along, across = alignment.along * max(height, width) / 2.5, alignment.across * max(height, width) / 2.5
            x, y = columns - generator.uniform(0.2, 0.8) * width, (rows - generator.uniform(0.2, 0.8) * height)
            angle = generator.uniform(-np.pi, np.pi)
            turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            picture = np.where((turned[0] / along) ** 2 + (turned[1] / across) ** 2 < 1, picture / 2, 240)
        yield picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def in_float32(model: Model) -> Model:
    """The model with products of full precision, where its detector rounds them on this machine."""
    detector = model.detector
    if "precision" in detector.params():
        detector = detector.clone(precision="float32").with_state(detector.state())
    return replace(model, detector=detector)


def _to_onnx(model: Model) -> Any:
    """An `onnx.ModelProto`."""
    import onnx

    threshold = model.threshold()
    assert threshold is not None
    spec = {**model.backbone.spec, "runtime": "torch", "device": "cpu"}  # what another runtime holds cannot be traced
    backbone = load_backbone(**spec)
    alignment = model.alignment
    finer = None if alignment is None else alignment.finer
    graph = Graph(backbone, model.detector, model.calibration, threshold.value, model.region, finer).eval()
    example: tuple[torch.Tensor, ...] = (torch.from_numpy(next(iter(made_up_pictures(model.backbone.size)))),)
    if alignment is not None:
        example += (torch.eye(2, 3, dtype=torch.float64),)
    content = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad(), traceable_pooling():
            warnings.simplefilter("ignore")  # the tracer tells of what it takes as constants, which here they are
            cast(Any, torch.onnx).export(  # its stub knows no file in memory
                graph,
                example,
                content,
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,  # the bank stays float16 in the file
                input_names=list(INPUTS[: len(example)]),
                output_names=list(OUTPUTS),
                dynamic_axes={"image": {0: "height", 1: "width"}},
            )
    except (RuntimeError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ModelError(
            f"A {model.detector.name} cannot be written as a graph: {str(error).splitlines()[0]}"
        ) from error
    made = onnx.load_model_from_string(content.getvalue())
    onnx.checker.check_model(made)
    return made


def _write_onnx(graph: Any, card: dict[str, Any], path: Path) -> None:
    entry = graph.metadata_props.add()
    entry.key, entry.value = CARD, json.dumps(card, allow_nan=False)
    content = graph.SerializeToString()
    write_bytes(path, content + seal(content, None))


def _write_openvino(graph: Any, card: dict[str, Any], path: Path) -> None:
    openvino = import_openvino()
    model = openvino.Core().read_model(graph.SerializeToString())
    for output, name in zip(model.outputs, OUTPUTS, strict=True):
        output.tensor.set_names({name})
    model.set_rt_info(json.dumps(card, allow_nan=False), [CARD])
    openvino.save_model(model, str(path), compress_to_fp16=False)
    content = path.read_bytes()
    write_bytes(path, content + seal(content, path.with_suffix(".bin").read_bytes()))


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ParameterError(f"An export needs {' and '.join(missing)}: pip install 'flawsift[export]'.")


def _check_replaceable(out: Path) -> None:
    """Only an earlier export is replaced."""
    with contextlib.suppress(OSError):
        others = [path.name for path in out.iterdir() if path.name not in OWN_FILES]
        if others:
            raise ParameterError(
                f"'{out}' holds other files, such as '{others[0]}', which an export would replace. Name a new folder."
            )
