"""RD: a student decoder that reconstructs a teacher's features from their bottleneck."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import training
from flawsift.detectors.parts.maps import SIGMA_PER_PIXEL, on_one_grid, smooth
from flawsift.detectors.parts.networks import conv, kaiming_
from flawsift.detectors.parts.scaling import channel_statistics, scaled
from flawsift.detectors.parts.training import UNWATCHED, Watch, without_rejected
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device

BETAS = (0.5, 0.999)  # of Adam, the authors'
EXPANSION = 4  # a ResNet's bottleneck block is a quarter as wide inside; twice that in a wide one
INSIDE = {"bottleneck": 1, "wide": 2}
Kind = Literal["basic", "bottleneck", "wide"]
# section 4.1, for wide_resnet50_2 at 256 px, whose taps end with a ReLU
PAPER = {"block": "wide", "n_blocks": (3, 3, 4, 6), "final_relu": True, "scale": False, "loss": "position"}
PAPER |= {"layers": ("stride4", "stride8", "stride16"), "epochs": 200}


def up(n_in: int, n_out: int) -> nn.Sequential:
    """A 2 x 2 transposed convolution that doubles the grid, and batch norm."""
    return nn.Sequential(nn.ConvTranspose2d(n_in, n_out, 2, 2, bias=False), nn.BatchNorm2d(n_out))


class Residual(nn.Module):
    """A ResNet block whose resolution may halve or, mirrored, double. Returns the sum before its ReLU."""

    def __init__(self, n_in: int, n_out: int, kind: Kind, change: Literal["down", "up", ""]) -> None:
        super().__init__()
        inside = n_out if kind == "basic" else n_out // EXPANSION * INSIDE[kind]
        source = n_in if kind == "basic" else inside
        stride = 2 if change == "down" else 1
        resize = up(source, inside) if change == "up" else conv(source, inside, 3, stride=stride)
        if kind == "basic":
            parts = [resize, nn.ReLU(), conv(inside, n_out, 3)]
        else:
            parts = [conv(n_in, inside, 1), nn.ReLU(), resize, nn.ReLU(), conv(inside, n_out, 1)]
        self.body = nn.Sequential(*parts)
        self.shortcut: nn.Module = nn.Identity()
        if change:
            self.shortcut = up(n_in, n_out) if change == "up" else conv(n_in, n_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x) + self.shortcut(x))


def stage(n_in: int, n_out: int, n_blocks: int, kind: Kind, change: Literal["down", "up"]) -> nn.Sequential:
    """Residual blocks, of which the first changes the resolution; no ReLU after the last."""
    parts: list[nn.Module] = [Residual(n_in, n_out, kind, change)]
    for _ in range(n_blocks - 1):
        parts += [nn.ReLU(), Residual(n_out, n_out, kind, "")]
    return nn.Sequential(*parts)


class Student(nn.Module):
    """One-class bottleneck and mirrored decoder: from taps (B, C_l, h_l, w_l) to estimates of those shapes.

    Each tap has half the grid of the one before. All but the last are halved by strided convolutions to the last one's
    grid and joined with it (MFF); one more stage halves the result (OCE); the decoder doubles it again, tap by tap.
    """

    def __init__(self, channels: Sequence[int], kind: Kind, n_blocks: Sequence[int], *, final_relu: bool) -> None:
        super().__init__()
        self.final_relu = final_relu
        self.fuse = nn.ModuleList()
        for i in range(len(channels)):
            steps = [(conv(a, b, 3, stride=2), nn.ReLU()) for a, b in pairwise(channels[i:])]
            self.fuse.append(nn.Sequential(*(part for step in steps for part in step)))
        last = channels[-1]
        self.embed = stage(len(channels) * last, 2 * last, n_blocks[0], kind, "down")
        widths = [2 * last, *reversed(channels)]
        self.decode = nn.ModuleList(
            stage(a, b, n, kind, "up") for (a, b), n in zip(pairwise(widths), n_blocks[1:], strict=True)
        )
        kaiming_(self)  # transposed convolutions keep torch's own weights, as in the authors' code

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        x = self.embed(torch.cat([path(tap) for path, tap in zip(self.fuse, taps, strict=True)], 1))
        estimates = []
        for decode, tap in zip(self.decode, reversed(taps), strict=True):
            x = decode(F.relu(x))[..., : tap.shape[2], : tap.shape[3]]  # an odd grid was rounded up on the way down
            estimates.append(F.relu(x) if self.final_relu else x)
        return estimates[::-1]


def flattened_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Sum over taps of 1 - cosine of whole (C, h, w) maps, averaged over images: positions count by their norms."""
    pairs = zip(teacher, student, strict=True)
    return torch.stack([(1 - F.cosine_similarity(t.flatten(1), s.flatten(1))).mean() for t, s in pairs]).sum()


def position_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Sum over taps of 1 - cosine over channels, averaged over positions and images (equations 1 and 2)."""
    return torch.stack([distance.mean() for distance in distances(teacher, student)]).sum()


def distances(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """Per tap (B, h_l, w_l): 1 - cosine over channels; 0 where both are zero vectors, as they agree."""
    maps = []
    for t, s in zip(teacher, student, strict=True):
        zero = (t == 0).all(1) & (s == 0).all(1)
        maps.append((1 - F.cosine_similarity(t, s, dim=1)).masked_fill(zero, 0.0))
    return maps


LOSSES = {"flattened": flattened_loss, "position": position_loss}


@dataclass(kw_only=True, eq=False)
class RD(Detector):
    """Cosine distance between a teacher's features and a student's reconstruction of them.

    The teacher is the frozen backbone. Its taps are fused into a one-class embedding too small for what is unusual,
    from which a mirrored decoder, the student, estimates the taps. The map is the sum over taps of 1 - cosine on the
    largest grid, the image score the maximum of the smoothed map.

    Cost: Convolutions, forward and backward, for each image and epoch: 53 GMAC for a WideResNet-50 at 256 px, 1.1 for
        the default taps. The features are read, not computed again.
    Contamination: Mild: rare defects are reconstructed badly as long as training is short; long training on few images
        fits the defects, too.
    Differs from the paper: `loss` is by default that of the authors' code, which is the more stable one. The default
        divides channels by their standard deviations, ends no decoder stage with a ReLU, since the taps of the embedded
        network are signed, and trains for fewer epochs. Upsampling does not align corners. Smoothing before the image
        score is done on the patch grid with the same Gaussian in image units. A position where teacher and student are
        both zero vectors counts as equal. An epoch's incomplete last batch, and a convolution that the authors' module
        holds but never uses, are left out. On a GPU that has bfloat16, and on a CPU that multiplies it where grids
        allow, the forward pass of a step is in it, the authors' in float32.
    Reference: Deng & Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022, arXiv
        2201.10703, section 3.

    Attributes:
        block: Residual block of the student: "basic" as in ResNet-18, "bottleneck" as in ResNet-50, "wide" as in
            WideResNet-50.
        n_blocks: Blocks of the embedding's stage, then of the decoder's stages from the deepest tap to the finest.
        final_relu: End each decoder stage with a ReLU, for taps that come from one.
        scale: Divide each channel by its standard deviation first.
        loss: "flattened" or "position".
        epochs: Passes over the training set.
        batch_size: Images in a step.
        learning_rate: Of Adam.
    """

    name: ClassVar[str] = "rd"
    leaves_out_patches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": PAPER,
        "budget": {},
    }

    layers: Sequence[str] = ("stride4", "stride8", "stride16")
    block: Kind = "basic"
    n_blocks: Sequence[int] = (2, 2, 2, 2)
    final_relu: bool = False
    scale: bool = True
    loss: Literal["flattened", "position"] = "flattened"
    epochs: int = 40
    batch_size: int = 16
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_blocks = tuple(self.n_blocks)  # JSON has lists only
        self._require("block", self.block in ("basic", "bottleneck", "wide"), "be 'basic', 'bottleneck' or 'wide'")
        fits = len(self.n_blocks) == len(self.layers) + 1 and all(type(n) is int and n >= 1 for n in self.n_blocks)
        self._require("n_blocks", fits, "have a positive number for the embedding and for each layer")
        self._require("loss", self.loss in LOSSES, "be 'flattened' or 'position'")
        self._require("epochs", self.epochs >= 1, "be at least 1")
        self._require("batch_size", self.batch_size >= 1, "be at least 1")
        self._require("learning_rate", self.learning_rate > 0, "be positive")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        if not len(data):
            raise InputError("RD.fit needs at least one image, got an empty set.")
        target = resolve_device(device)
        if self.scale:
            self.statistics_ = channel_statistics(data, self.layers)
        size = min(self.batch_size, len(data))
        shapes = self._checked_shapes(data, size)
        self.channels_ = [c for c, _, _ in shapes]
        with training.seeded(self.seed, target):
            module = self._module()
        module.to(target).train()
        optimizer = torch.optim.Adam(module.parameters(), lr=self.learning_rate, betas=BETAS, fused=True)
        steps = self.epochs * (len(data) // size)
        # not where one cell is halved: oneDNN's bfloat16 gradient of a strided convolution over it reads unset memory
        large = min(shapes[-1][1:]) > 1
        recipe = training.Recipe(steps=steps, batch_size=self.batch_size, seed=self.seed, large_products=large)

        def loss_of(batch: Batch, step: int) -> Tensor:
            teacher = self._taps(batch, target)
            student = [s.float() for s in module(teacher)]
            return LOSSES[self.loss](without_rejected(teacher, batch), without_rejected(student, batch))

        training.train(module, optimizer, data, self.layers, loss_of, recipe, device=target, watch=watch)
        self.weights_ = training.weights_of(module)
        return self

    def _checked_shapes(self, data: ImageSet, batch_size: int) -> list[tuple[int, ...]]:
        first = next(data.select(data.ids[:1]).batches(self.layers))
        shapes = [tuple(first.features[layer].shape[1:]) for layer in self.layers]
        for (_, *fine), (_, *coarse) in pairwise(shapes):
            if coarse != [-(-n // 2) for n in fine]:
                grids = ", ".join(f"{h} x {w}" for _, h, w in shapes)
                raise InputError(f"RD.layers must each have half the grid of the one before, got {grids}.")
        if self.final_relu and any(first.features[layer].min() < 0 for layer in self.layers):
            raise InputError("RD.final_relu must be False for these layers: they have negative values.")
        if batch_size == 1 and max(shapes[-1][1:]) <= 2:
            raise InputError("RD cannot normalise one image on so small a grid. Add images, or use a larger size.")
        return shapes

    def _module(self) -> Student:
        return Student(self.channels_, self.block, self.n_blocks, final_relu=self.final_relu)

    def _taps(self, batch: Batch, device: str) -> list[Tensor]:
        taps = [batch.features[layer].to(device) for layer in self.layers]
        if self.scale:
            taps = [scaled(tap, self.statistics_[layer]) for tap, layer in zip(taps, self.layers, strict=True)]
        return taps

    def _maps(self, batch: Batch, device: str) -> Tensor:
        teacher = self._taps(batch, device)
        maps = [distance.unsqueeze(1) for distance in distances(teacher, self._net(device)(teacher))]
        return torch.cat(on_one_grid(maps), 1).sum(1)

    def _image_scores(self, maps: Tensor) -> Tensor:
        return smooth(maps, SIGMA_PER_PIXEL * maps.shape[2]).amax((1, 2))

    def _expected(self, batch: Batch, device: str) -> Tensor:
        """The estimates of all taps on the finest grid, joined."""
        return torch.cat(on_one_grid(self._net(device)(self._taps(batch, device))), 1)

    def _net(self, device: str) -> Student:
        def make() -> Student:
            with torch.device("meta"):
                module = self._module()
            return training.restored(self.weights_, module, device)

        return self._cached("net", device, make)
