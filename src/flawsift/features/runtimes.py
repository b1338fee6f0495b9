"""What runs a trunk: torch, or OpenVINO, which is several times faster on a CPU. An image never meets another."""

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.errors import ParameterError, unknown_name
from flawsift.features.devices import AUTO, resolve_device
from flawsift.features.trunks import Trunk
from flawsift.runtime import import_openvino
from flawsift.types import Shape

Runtime = Literal["auto", "torch", "openvino"]
# On a GPU, batches of one constant size: cuDNN picks kernels by shape, so an image never meets a different one.
CUDA_BATCH = 16
# One request per core beats one image over all cores. On machines with bf16 units OpenVINO would round to 8 bits
# unasked, hence f32.
OPENVINO_OPTIONS = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
log = logging.getLogger("flawsift")


class Engine(Protocol):
    """Runs a trunk: (B, 3, H, W) uint8 on the CPU -> per tap (B, C, h, w) float32 on the CPU."""

    name: str

    def run(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """The outputs of the asked layers."""


def device_for(runtime: Runtime, device: str) -> torch.device:
    """Where a runtime goes for a device as the user names it.

    Raises:
        ParameterError: An unknown runtime, or a device that cannot be had.
    """
    if runtime not in get_args(Runtime):
        raise ParameterError(unknown_name("runtime", runtime, get_args(Runtime)))
    if runtime != "openvino":
        return torch.device(resolve_device(device))
    if device not in (AUTO, "cpu"):
        raise ParameterError(f"runtime 'openvino' runs on device 'cpu' only, got '{device}'.")
    return torch.device("cpu")


def make_engine(trunk: Trunk, name: str, shape: Shape, runtime: Runtime, place: torch.device) -> Engine:
    """What runs a trunk there; "auto" falls back to torch for networks that OpenVINO does not know.

    Raises:
        ParameterError: OpenVINO is asked for and cannot run it.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" or (runtime == "auto" and place.type == "cpu" and installed):
        try:
            return _OpenVinoEngine(trunk, shape)
        except Exception as error:
            if runtime == "openvino":
                raise ParameterError(f"runtime 'openvino' cannot run '{name}', use 'torch': {error}") from error
            log.info("OpenVINO cannot run '%s', torch does instead: %s", name, error)
    return _TorchEngine(trunk, place)


class _TorchEngine:
    """Torch, image by image on a CPU: nothing else is as fast there, and no image can touch another."""

    name = "torch"

    def __init__(self, trunk: Trunk, place: torch.device) -> None:
        # Channels last measured 1.1 to 2 times torch's default layout on lite0's convolutions (benchmarks/features.py).
        self._trunk = trunk.to(place).to(memory_format=torch.channels_last)
        self._place = place
        self._batch = 1 if place.type == "cpu" else CUDA_BATCH

    def run(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        chunks = []
        # TF32 would round products to 10 bits and break the agreement of the runtimes.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(pixels), self._batch):
                batch = pixels[start : start + self._batch]
                padded = F.pad(batch, (0, 0) * 3 + (0, self._batch - len(batch)))
                with torch.inference_mode():
                    outputs = self._trunk.taps(padded.to(self._place), taps)
                chunks.append([output[: len(batch)].float().cpu() for output in outputs])
        return [torch.cat(parts).contiguous() for parts in zip(*chunks, strict=True)]


class _OpenVinoEngine:
    """OpenVINO: one image per request, several requests at once. As fast as batches, and no image meets another."""

    name = "openvino"

    def __init__(self, trunk: Trunk, shape: Shape) -> None:
        self._openvino = import_openvino()
        self._model = _convert(trunk, shape)
        self._queues: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()  # a queue has one callback at a time

    def run(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        with self._lock:
            queue, shapes = self._queue(tuple(taps))
            outputs = [torch.empty(len(pixels), *shape) for shape in shapes]
            arrays, frames = [output.numpy() for output in outputs], pixels.contiguous().numpy()

            def keep(request: Any, row: int) -> None:
                for array, tensor in zip(arrays, request.output_tensors, strict=True):
                    array[row] = tensor.data[0]

            queue.set_callback(keep)
            for row in range(len(frames)):
                queue.start_async([frames[row : row + 1]], row, share_inputs=True)
            queue.wait_all()
        return outputs

    def _queue(self, taps: tuple[int, ...]) -> Any:
        """The compiled network up to the deepest tap: what no result needs is not part of it."""
        if taps not in self._queues:
            results = self._model.get_results()
            part = self._openvino.Model([results[tap] for tap in taps], self._model.get_parameters(), "trunk").clone()
            compiled = self._openvino.Core().compile_model(part, "CPU", OPENVINO_OPTIONS)
            shapes = [tuple(output.shape)[1:] for output in compiled.outputs]
            self._queues[taps] = self._openvino.AsyncInferQueue(compiled), shapes
        return self._queues[taps]


def _convert(trunk: Trunk, shape: Shape) -> Any:
    """An OpenVINO model from (1, 3, H, W) uint8 to all taps, through the frontend below `convert_model`.

    `convert_model` would reset the root logger and report to telemetry.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    pixels = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer tells of shapes it takes as constants, which here they are
        traced = cast(Any, torch.jit).trace(trunk, pixels, check_trace=False)
        decoder = TorchScriptPythonDecoder(traced, example_input=pixels)  # named: the frontend does not keep it alive
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.reshape([1, 3, *shape])
    return model
