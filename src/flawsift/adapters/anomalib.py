"""Models of anomalib behind our interface, and its files measured as our models are.

    flawsift.fit("parts", "anomalib:Patchcore")
    metrics, predictions = evaluate_file("model.ckpt", images, truth, model="Patchcore")

Both need anomalib. No pickle is ever loaded.
"""

import contextlib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flawsift.adapters.rows import seeded
from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import Batch, ImageSet
from flawsift.data.inputs import Images, as_images
from flawsift.data.mask_checks import usable_masks
from flawsift.data.truth import GroundTruth
from flawsift.detectors.base import Detector, Prediction
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError, ModelError, ParameterError, TrainingError, one_line, unknown_name
from flawsift.features.devices import resolve_device
from flawsift.models.evaluation import MapCollector, measure
from flawsift.models.predictions import Predictions
from flawsift.runtime import import_openvino
from flawsift.types import Size, as_shape

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from anomalib import models
        from anomalib.data import ImageBatch, ImageItem
        from lightning.pytorch import Trainer
except ImportError as error:
    raise InputError("This needs anomalib 2.7 or later: pip install 'flawsift[anomalib]'.") from error

STRIDE = 8  # pixels of a cell of the maps: as fine as our detectors see
BATCH = 16  # images of a step of training
USUAL = 256  # pixels: the edge that anomalib brings images to, of files that take any
PARTS = ("post_processor", "evaluator", "visualizer")  # that change or draw scores, and are not ours
Answer = tuple[float, Tensor | None]  # score, and (H, W) map
Run = Callable[[Tensor], Answer]


@dataclass(kw_only=True, eq=False)
class Anomalib(Detector):
    """A model of anomalib on the pixels of the network's input, trained by Lightning as its own engine does.

    Scores are the model's own: its post-processing, which clips them to the range of a validation set, is left out. A
    region of interest cuts its maps, not its scores, which look at all pixels.
    Maps are the highest values of cells of 8 pixels. State is the model's `state_dict`; the pre-processing is that of
    the model at the size of our backbone, of which nothing else is read.

    Cost: That of the model, in each of the k + 1 trainings of stage 1. All pixels are in memory: 0.2 MB an image.
    Contamination: None of anomalib's models expects any; stage 1 is what takes it out.
    Differs from the paper: Each model is anomalib's, with its defaults.
    Reference: Akcay et al., "Anomalib: A Deep Learning Library for Anomaly Detection", ICIP 2022.

    Attributes:
        layers: Of our backbone. They are extracted and not read: take few.
        model: Name of the class, such as "Patchcore".
        arguments: Of its constructor, such as {"pre_trained": false} where no weights can be downloaded.
        epochs: Of models that do not say it themselves: a memory bank takes one.
    """

    name: ClassVar[str] = "anomalib"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    reads_pixels: ClassVar[bool] = True

    layers: Sequence[str] = ("stride16",)
    model: str = "Patchcore"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("arguments", isinstance(self.arguments, Mapping), 'be a table, such as {"backbone": "resnet18"}')
        self._require("epochs", self.epochs >= 1, "be at least 1")
        _model_class(self.model)

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        if data.reader is None or not len(data):
            raise InputError("Anomalib.fit needs at least one image, with features attached; see flawsift.attach.")
        target, size = resolve_device(device), data.reader.size
        with seeded(self.seed):
            model = self._made(size)
            with _quiet(), tempfile.TemporaryDirectory(prefix="flawsift-") as folder:
                trainer = Trainer(
                    **{"max_epochs": self.epochs, **model.trainer_arguments, **_where(target)},
                    default_root_dir=folder,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                try:
                    trainer.fit(model, train_dataloaders=_loader(data.pixels(size)))
                    with torch.inference_mode():  # some learn nothing of too few images, and say so when they score
                        _answers(model.cpu().eval(), torch.zeros(1, 3, *as_shape(size)))
                except Exception as error:  # what its models raise is not documented
                    told = f"{self.model} of anomalib cannot learn {len(data)} images: {one_line(error)}"
                    raise TrainingError(told) from error
        self.size_ = list(as_shape(size))
        # copies: a file cannot hold two tensors in one piece of memory
        self.weights_ = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        return self._score_batch(batch, device)[0]

    def _score_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        assert batch.pixels is not None, "it says that it reads them"
        height, width = as_shape(batch.size)
        if [height, width] != self.size_:
            raise InputError(
                f"{self.model} was fitted on images of {self.size_} pixels, these have {batch.size}. Use the same size."
            )
        model = self._cached("model", device, lambda: self._loaded().to(device))
        scores, maps = _answers(model, batch.pixels.to(device))
        if maps is None:
            return scores.view(-1, 1, 1), scores
        grid = max(1, height // STRIDE), max(1, width // STRIDE)
        if maps.shape[1] > grid[0]:
            maps = F.adaptive_max_pool2d(maps[:, None], grid)[:, 0]
        return batch.only_counted(maps), scores

    def _loaded(self) -> nn.Module:
        """The model with what it learned, which includes its network's weights: none are looked for."""
        with seeded(self.seed):
            model: nn.Module = self._made(self.size_, pre_trained=False)
        model.load_state_dict(self.weights_)
        return model.eval()

    def _made(self, size: Size | Sequence[int], **changes: Any) -> Any:
        """The model of anomalib, unfitted; of the changes, those that it knows."""
        cls = _model_class(self.model)
        known = inspect.signature(cls).parameters
        given = {**self.arguments, **{name: value for name, value in changes.items() if name in known}}
        try:
            with _quiet():
                prepare = cls.configure_pre_processor(as_shape(size))
                return cls(**{"pre_processor": prepare, **dict.fromkeys(PARTS, False), **given})
        except Exception as error:  # as above
            offline = (
                ' Without a network, {"pre_trained": false} takes random weights.' if "pre_trained" in known else ""
            )
            raise ParameterError(
                f"anomalib cannot make {self.model}({dict(given)}): {one_line(error)}.{offline}"
            ) from error


def evaluate_file(
    path: str | Path,
    images: Images,
    truth: GroundTruth,
    *,
    model: str | None = None,
    size: int | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """Measure a file that anomalib wrote by the metrics of `Model.evaluate`.

    Of a checkpoint scores are the model's own. An exported file has anomalib's post-processing in it, which clips
    scores to the range of a validation set: its ranking may have ties that the model's has not.

    Args:
        path: model.ckpt of Lightning, model.onnx, or model.xml of OpenVINO.
        images: Test images, as for `flawsift.predict`.
        truth: Labels and masks by global id.
        model: Of a checkpoint, the name of its class, such as "Padim".
        size: Edge length in pixels that images are brought to; None takes the file's, or 256.

    Returns:
        The metrics, and the predictions; there is no threshold of ours, so no false alarms at one.

    Raises:
        ModelError: The file cannot be loaded without unpickling it, or is none of these.
        ParameterError: A checkpoint came without the name of its class.
        InputError: No image can be read, or an image has no label.
    """
    run, own_size = _runner(Path(path), model)
    chosen, edge = as_images(images), size or own_size or USUAL
    truth = usable_masks(truth.select(chosen.ids), chosen)
    maps = MapCollector(truth, None, len(chosen)) if truth.has_masks else None
    scores, errors = np.full(len(chosen), np.nan), dict[int, str]()
    for position, id_ in enumerate(chosen.ids.tolist()):
        try:
            pixels = chosen.pixels_of(id_, edge)
        except UnreadableImage as error:
            errors[id_] = str(error)
            continue
        score, anomaly_map = run(pixels.float().div_(255)[None])
        scores[position] = score
        if maps is not None and anomaly_map is not None:
            one = np.array([id_], np.int64)
            said = Prediction(one, np.array([score], np.float32), anomaly_map[None].numpy())
            maps(chosen.select(one), said)
    if maps is not None and not maps.kept:  # the model has no maps
        maps = None
    predictions = Predictions(chosen.ids, tuple(chosen.names), scores, errors, None)
    return measure(predictions, truth, maps), predictions


def _runner(path: Path, model: str | None) -> tuple[Run, int | None]:
    """What scores (1, 3, S, S) pixels in [0, 1], and S where the file says it."""
    if not path.is_file():
        raise ModelError(f"'{path}' is not there.")
    if path.suffix in (".xml", ".onnx"):
        return _openvino_runner(path)
    if path.suffix == ".ckpt":
        return _checkpoint_runner(path, model), None
    raise ModelError(
        f"'{path}' is no .ckpt, .onnx or .xml. A .pt of anomalib is a pickle, which can run any program when it is "
        "loaded, and is not opened: export the model as ONNX or OpenVINO, or give its checkpoint."
    )


def _checkpoint_runner(path: Path, model: str | None) -> Run:
    if model is None:
        raise ParameterError(f"'{path}' does not say what model it is of: give its class, such as model='Padim'.")
    cls = _model_class(model)
    try:
        with _quiet():
            loaded = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign file raises is not documented
        raise ModelError(
            f"'{path}' cannot be loaded as {model} from tensors and numbers alone, and nothing is unpickled: "
            f"{one_line(error)}. Save it with anomalib 2.7 or later, or export it as ONNX or OpenVINO."
        ) from error
    loaded.post_processor = None
    loaded.eval()

    def run(pixels: Tensor) -> Answer:
        with torch.inference_mode():
            scores, maps = _answers(loaded, pixels)
        return float(scores[0]), None if maps is None else maps[0]

    return run


def _openvino_runner(path: Path) -> tuple[Run, int | None]:
    core = import_openvino().Core()
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        named = {name: output for output in compiled.outputs for name in output.names}
        edge = compiled.input(0).partial_shape[2]
        size = int(edge.get_length()) if edge.is_static else None
    except Exception as error:  # as above
        raise ModelError(f"'{path}' cannot be loaded: {one_line(error)}") from error
    if "pred_score" not in named:
        raise ModelError(f"'{path}' gives {', '.join(sorted(named)) or 'nothing'}, and no pred_score of anomalib.")

    def run(pixels: Tensor) -> Answer:
        outputs = compiled([pixels.numpy()])
        score = float(np.asarray(outputs[named["pred_score"]]).ravel()[0])
        if "anomaly_map" not in named:
            return score, None
        values = torch.from_numpy(np.array(outputs[named["anomaly_map"]], np.float32))
        return score, values.reshape(values.shape[-2:])

    return run, size


def _answers(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B,) scores and (B, H, W) maps of (B, 3, S, S) pixels in [0, 1]; None of models without maps."""
    answer = model(pixels)
    maps = answer.anomaly_map
    if maps is not None:
        maps = maps.float().reshape(len(pixels), *maps.shape[-2:])
    if answer.pred_score is None:
        if maps is None:
            raise ModelError("The model gives neither a score nor a map.")
        return maps.amax((1, 2)), maps
    return answer.pred_score.float().reshape(len(pixels)), maps


def _model_class(name: str) -> Any:
    """A class of anomalib by its name, in upper or lower case.

    Raises:
        ParameterError: There is none.
    """
    known = {key.lower(): key for key in models.__all__ if inspect.isclass(getattr(models, key))}
    if name.lower() not in known:
        raise ParameterError(unknown_name("model of anomalib", name, known.values()))
    return getattr(models, known[name.lower()])


def _loader(pixels: Tensor) -> Any:
    """(N, 3, S, S) uint8 in the batches that anomalib trains on, all of them good as far as it knows."""
    items = [ImageItem(image=image.float() / 255, gt_label=torch.tensor(False)) for image in pixels]
    # a last batch of one image has no variance, which layers that normalise over batches refuse
    size = next((n for n in range(BATCH, 1, -1) if len(items) % n != 1), BATCH)
    rows = cast("Dataset[Any]", items)  # a list has all that is asked of one
    return DataLoader(rows, batch_size=size, shuffle=True, collate_fn=ImageBatch.collate)


def _where(device: str) -> dict[str, Any]:
    kind, _, number = device.partition(":")
    return (
        {"accelerator": "cpu", "devices": 1} if kind == "cpu" else {"accelerator": "gpu", "devices": [int(number or 0)]}
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning and anomalib say of themselves."""
    loggers = [logging.getLogger(name) for name in ("anomalib", "lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
