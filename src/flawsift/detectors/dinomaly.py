"""Dinomaly: reconstruction of grouped features by a transformer behind a noisy bottleneck."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import training
from flawsift.detectors.parts.maps import on_one_grid, scaled_shape, smooth, top_mean, upsample
from flawsift.detectors.parts.networks import linear_attention
from flawsift.detectors.parts.scaling import channel_statistics, scaled
from flawsift.detectors.parts.training import UNWATCHED, StableAdamW, Watch, warmup_cosine, without_rejected
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device

HEAD_DIM = 64  # channels per attention head, as in all ViTs of the paper
# The published map is smoothed at 256 px by a 5 x 5 cut of a Gaussian of sigma 4: nearly a box.
SCORE_SIZE, SCORE_SIGMA, SCORE_RADIUS = 256, 4.0, 2
LAYER_NORM_EPS = 1e-8  # the authors'
STABLE_EPS = 1e-10  # of StableAdamW in most of the authors' scripts, 1e-8 in some: far below any gradient's size
ADAM_BETAS = (0.5, 0.999)  # of the two-stage paper's code, not of its text
# groups of ViT-S and ViT-B; a ViT-L has them at 4+6+8+10 and 12+14+16+18
VIT_GROUPS = ("blocks.2+3+4+5", "blocks.6+7+8+9")
# sections 3 and 4.1 with the authors' steps for one product; for vit_base_patch14_reg4_dinov2 at 392 px
PAPER = {"layers": VIT_GROUPS, "width": None, "n_blocks": 8, "scale": False, "steps": 5000, "warmup": 100}
PAPER |= {"easy_ramp": 1000}
# the sub-models of arXiv 2508.07441: its 1000 steps by its code's recipe; see the schedules in `Dinomaly`
LLBNAD = {**PAPER, "steps": 1000, "optimizer": "adam", "learning_rate": 5e-3, "warmup": 0, "final_rate": 1.0}
LLBNAD |= {"weight_decay": 0.0, "clip_norm": 5.0, "init_std": None, "easy_ramp": 0, "easy_gradient": 0.0}


class Block(nn.Module):
    """A pre-norm transformer block with linear attention, in heads of 64 channels or the next number that fits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_heads = next(n for n in range(max(1, width // HEAD_DIM), 0, -1) if width % n == 0)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, p, c = x.shape
        joined = self.qkv(self.norm1(x)).view(b, p, 3, self.n_heads, c // self.n_heads)
        attended = linear_attention(*joined.permute(2, 0, 3, 1, 4))  # (B, heads, P, c)
        x = x + self.project(attended.transpose(1, 2).reshape(b, p, c))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Reconstruction(nn.Module):
    """Noisy bottleneck and decoder: from G groups of (B, C_g, h, w) to their reconstructions.

    Groups of one width enter as their mean; others are concatenated, and their estimates pass a linear map each.
    """

    def __init__(
        self, channels: Sequence[int], *, width: int | None, n_blocks: int, dropout: float, init_std: float | None
    ) -> None:
        super().__init__()
        self.alike = len(set(channels)) == 1
        n_in = channels[0] if self.alike else sum(channels)
        width = width or n_in
        noise = [nn.Dropout(dropout) for _ in range(3)]
        parts = noise[0], nn.Linear(n_in, 4 * width), nn.GELU(), noise[1], nn.Linear(4 * width, width), noise[2]
        self.bottleneck = nn.Sequential(*parts)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.heads = nn.ModuleList(nn.Identity() if c == width else nn.Linear(width, c) for c in channels)
        for part in self.modules():
            if init_std is not None and isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=init_std, a=-3 * init_std, b=3 * init_std)
                nn.init.zeros_(part.bias)

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.stack(list(groups)).mean(0) if self.alike else torch.cat(list(groups), 1)
        b, _, h, w = joined.shape
        x = self.bottleneck(joined.flatten(2).transpose(1, 2))  # (B, P, width)
        outputs: list[Tensor] = []
        for block in self.blocks:
            outputs.insert(0, block(outputs[0] if outputs else x))  # the last blocks answer for the shallowest group
        n = len(outputs) // len(groups)
        means = [torch.stack(outputs[g * n : (g + 1) * n]).mean(0) for g in range(len(groups))]
        tokens = [head(mean) for head, mean in zip(self.heads, means, strict=True)]
        return [t.transpose(1, 2).reshape(b, -1, h, w) for t in tokens]


def mined_loss(
    features: Sequence[Tensor],
    decoded: Sequence[Tensor],
    *,
    easy: float,
    easy_gradient: float,
    upper_trim: float,
) -> Tensor:
    """Mean over groups and images of 1 - cosine of whole (C, h, w) maps; points pass gradients by their difficulty.

    A point's difficulty is its own 1 - cosine over channels. Of all B h w points, the `easy` share with the lowest has
    its gradient multiplied by `easy_gradient`, the `upper_trim` share with the highest by 0. The value is that without
    either.
    """
    losses = []
    for e, d in zip(features, decoded, strict=True):
        distance = 1 - F.cosine_similarity(e, d.detach(), dim=1)  # (B, h, w)
        distance = distance.masked_fill((e == 0).all(1) & (d.detach() == 0).all(1), 0.0)  # patches that are left out
        flat = distance.flatten()
        n_hard, n_trim = max(1, int(len(flat) * (1 - easy))), int(len(flat) * upper_trim)
        ordered = flat.sort(descending=True)
        factor = torch.where(flat < ordered.values[n_hard - 1], easy_gradient, 1.0)
        factor[ordered.indices[:n_trim]] = 0
        if d.requires_grad:
            weight = factor.view_as(distance).unsqueeze(1)
            d.register_hook(partial(torch.mul, weight))  # type: ignore[no-untyped-call]
        losses.append((1 - F.cosine_similarity(e.flatten(1), d.flatten(1))).mean())
    return torch.stack(losses).mean()


@dataclass(kw_only=True, eq=False)
class Dinomaly(Detector):
    """Cosine distance between frozen features and their reconstruction by a transformer.

    Layers are groups of features. Their mean passes a noisy bottleneck (dropout in a perceptron) and a decoder of
    blocks with linear attention, which cannot focus and so cannot copy. Sums of blocks answer for groups, not blocks
    for layers (the loose constraint), under a loss on whole maps in which easy points pass little gradient. The map is
    the mean over groups of 1 - cosine, the image score the mean of the highest `top_share` of the smoothed map.

    Cost: Per step and token 36 width^2 multiply-adds per block, 12 of them forward; linear in tokens. The paper preset
        at ViT-B takes 289 GFLOP per image and step.
    Contamination: Hard points keep their gradient, and defects are hard points, which are learned all the more.
        `upper_trim` drops the gradient of the hardest points.
    Differs from the paper: Class and register tokens do not enter the decoder. Images are resized to the square input;
        the paper sees the central 392 of 448 px. The smoothed map reflects at its borders, where the paper's fades,
        upsampling does not align corners, and pixel maps have the Gaussian of all detectors. The attention's
        denominator is guarded. Where layers differ in shape (the default), channels are divided by their standard
        deviations, groups are brought to one grid and concatenated, and a linear head leads back to each group's
        channels; the default decoder is small. On a GPU that has bfloat16, and on a CPU that multiplies it, the forward
        pass of a step is in it, the authors' in float32.
    Schedules: of the paper preset, warm-up, cosine and ramp of the easy points are the paper's; its 5000 steps are
        those of the authors' scripts for one product, which train 10 000 for all of MVTec AD together. Those of the
        default are ours. Of the preset "llbnad" (arXiv 2508.07441), the 1000 steps and easy points without gradient are
        that paper's; Adam and its rate, torch's initial weights, the clipping and easy points from the first step on
        are its code's alone. A constant rate is ours: the code's falls to a tenth after so many passes that 1000 steps
        see none of it where stage 2 takes 100, and vanishes in the released test setting, of 10 steps and 2 passes. An
        epoch's incomplete last batch, which that code keeps, is left out; maps and scores are Dinomaly's.
    Reference: Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection", CVPR
        2025, arXiv 2405.14325, section 3.

    Attributes:
        width: Channels of the decoder; None takes those of its input.
        n_blocks: Blocks of the decoder, a multiple of the number of layers.
        grid: Which layer's grid the groups are brought to, "finest" or "coarsest".
        scale: Divide each channel by its standard deviation first.
        dropout: Of the bottleneck.
        steps: Gradient steps.
        batch_size: Images in a step.
        optimizer: "stable_adamw", or "adam" with betas 0.5 and 0.999.
        learning_rate: At its peak.
        warmup: Steps of linear increase from 0, fewer than all.
        final_rate: Share of the learning rate that the cosine ends at; 1 keeps it constant.
        weight_decay: On every parameter.
        clip_norm: Most that the gradient norm may be.
        init_std: Of the truncated normal distribution of initial weights; None leaves torch's initialisation.
        easy_share: Share of the points that count as easy, in the end.
        easy_ramp: Steps over which it grows from 0.
        easy_gradient: Factor on the gradients of easy points.
        upper_trim: Share of the points, the hardest, without gradient. 0.02 helped a little on contaminated sets and
            cost a little on clean ones (docs/benchmarks/detectors.md).
        top_share: Share of the map that makes the image score.
    """

    name: ClassVar[str] = "dinomaly"
    leaves_out_patches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "paper": PAPER, "llbnad": LLBNAD, "budget": {}}

    layers: Sequence[str] = ("stride8", "stride16")
    width: int | None = 128
    n_blocks: int = 4
    grid: Literal["finest", "coarsest"] = "coarsest"
    scale: bool = True
    dropout: float = 0.2
    steps: int = 300
    batch_size: int = 16
    optimizer: Literal["stable_adamw", "adam"] = "stable_adamw"
    learning_rate: float = 2e-3
    warmup: int = 20
    final_rate: float = 0.1
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    init_std: float | None = 0.01
    easy_share: float = 0.9
    easy_ramp: int = 100
    easy_gradient: float = 0.1
    upper_trim: float = 0.0
    top_share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("width", self.width is None or self.width >= 1, "be at least 1, or None")
        fits = self.n_blocks >= 1 and self.n_blocks % len(self.layers) == 0
        self._require("n_blocks", fits, "be a multiple of the number of layers")
        self._require("grid", self.grid in ("finest", "coarsest"), "be 'finest' or 'coarsest'")
        self._require("optimizer", self.optimizer in ("stable_adamw", "adam"), "be 'stable_adamw' or 'adam'")
        self._require("init_std", self.init_std is None or self.init_std > 0, "be positive, or None")
        self._require("dropout", 0 <= self.dropout < 1, "be in [0, 1)")
        self._require("easy_share", 0 <= self.easy_share < 1, "be in [0, 1)")
        self._require("top_share", 0 < self.top_share <= 1, "be in (0, 1]")
        hard = 1 - self.easy_share
        self._require("upper_trim", 0 <= self.upper_trim < hard, "be at least 0 and below the share of hard points")
        self._require("steps", self.steps >= 1, "be at least 1")
        self._require("batch_size", self.batch_size >= 1, "be at least 1")
        self._require("learning_rate", self.learning_rate > 0, "be positive")
        self._require("clip_norm", self.clip_norm > 0, "be positive")
        for name in ("warmup", "easy_ramp", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "not be negative")
        # the first rate is 0: a training that ends within its warm-up has hardly begun
        self._require("warmup", self.warmup < self.steps, f"be below the number of steps, {self.steps}")
        self._require("final_rate", 0 <= self.final_rate <= 1, "be in [0, 1]")
        self._require("easy_gradient", 0 <= self.easy_gradient <= 1, "be in [0, 1]")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        if not len(data):
            raise InputError("Dinomaly.fit needs at least one image, got an empty set.")
        target = resolve_device(device)
        if self.scale:
            self.statistics_ = channel_statistics(data, self.layers)
        first = next(data.select(data.ids[:1]).batches(self.layers))
        self.channels_ = [first.features[layer].shape[1] for layer in self.layers]
        with training.seeded(self.seed, target):
            module = self._module()
        module.to(target).train()
        rate, decay = self.learning_rate, self.weight_decay
        optimizer: torch.optim.Optimizer = StableAdamW(module.parameters(), lr=rate, eps=STABLE_EPS, weight_decay=decay)
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=ADAM_BETAS, weight_decay=decay, fused=True)
        schedule = warmup_cosine(self.warmup, self.steps, self.final_rate)
        recipe = training.Recipe(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            clip_norm=self.clip_norm,
            schedule=schedule,
            large_products=True,
        )

        def loss_of(batch: Batch, step: int) -> Tensor:
            groups = self._groups(batch, target)
            decoded = without_rejected([d.float() for d in module(groups)], batch)
            groups = without_rejected(groups, batch)
            easy = self.easy_share * min(1.0, step / self.easy_ramp) if self.easy_ramp else self.easy_share
            return mined_loss(groups, decoded, easy=easy, easy_gradient=self.easy_gradient, upper_trim=self.upper_trim)

        training.train(module, optimizer, data, self.layers, loss_of, recipe, device=target, watch=watch)
        self.weights_ = training.weights_of(module)
        return self

    def _module(self) -> Reconstruction:
        return Reconstruction(
            self.channels_, width=self.width, n_blocks=self.n_blocks, dropout=self.dropout, init_std=self.init_std
        )

    def _groups(self, batch: Batch, device: str) -> list[Tensor]:
        """G groups (B, C_g, h, w) on one grid."""
        taps = [batch.features[layer].to(device) for layer in self.layers]
        if self.scale:
            taps = [scaled(tap, self.statistics_[layer]) for tap, layer in zip(taps, self.layers, strict=True)]
        return on_one_grid(taps, finest=self.grid == "finest")

    def _maps(self, batch: Batch, device: str) -> Tensor:
        groups = self._groups(batch, device)
        decoded = self._net(device)(groups)
        return torch.stack([1 - F.cosine_similarity(e, d, dim=1) for e, d in zip(groups, decoded, strict=True)]).mean(0)

    def _image_scores(self, maps: Tensor) -> Tensor:
        fine = upsample(maps, scaled_shape(maps, SCORE_SIZE))
        return top_mean(smooth(fine, SCORE_SIGMA, radius=SCORE_RADIUS), self.top_share)

    def _expected(self, batch: Batch, device: str) -> Tensor:
        return torch.cat(self._net(device)(self._groups(batch, device)), 1)

    def _net(self, device: str) -> Reconstruction:
        def make() -> Reconstruction:
            with torch.device("meta"):
                module = self._module()
            return training.restored(self.weights_, module, device)

        return self._cached("net", device, make)
