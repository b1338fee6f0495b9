"""DeSTSeg: a student that restores the teacher's features of a clean image, and a net that segments differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.corruption import corrupted, drawn_views, photo_views
from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import training
from flawsift.detectors.parts.maps import top_mean, upsample
from flawsift.detectors.parts.networks import MULTIPLE, STRIDES, DenoisingStudent, Levels, Segmenter, on_finest
from flawsift.detectors.parts.scaling import channel_statistics, standardized
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device
from flawsift.types import Shape, as_shape

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # section 4.1
GAMMA = 4.0  # exponent of the focal loss
TOP_SHARE, PIXELS_PER_CELL = 100 / 256**2, 4  # the image score is the mean of 100 pixels of the paper's 256 px map
# Corrupted copies are kept in memory up to this size; of larger sets, the rest is drawn anew at each use (25 ms).
COPIES_BYTES = 1 << 30
Copies = dict[tuple[int, str], tuple[Tensor, Tensor]]  # (image id, view) to its pixels and its mask


class Networks(nn.Module):
    """Student and segmenter, of which one is trained at a time."""

    def __init__(self, student: DenoisingStudent, segmenter: Segmenter) -> None:
        super().__init__()
        self.student, self.segmenter = student, segmenter

    def train_one(self, student: bool) -> None:
        """Put the other in eval mode: its batch statistics stay as they are too."""
        self.student.train(student)
        self.segmenter.train(not student)

    def forward(self, pixels: Tensor, teacher: Levels) -> Tensor:
        """(B, h, w) logits on the finest grid; the student gets no gradient from them."""
        with torch.no_grad():
            restored = self.student(pixels)
        logits: Tensor = self.segmenter(disagreement(teacher, restored))
        return logits


def disagreement(teacher: Levels, student: Levels) -> Tensor:
    """(B, C, h, w): minus the product of unit vectors, so that a level's channels sum to minus the cosine."""
    return on_finest({s: -F.normalize(teacher[s], dim=1) * F.normalize(student[s], dim=1) for s in teacher})


def cosine_loss(teacher: Levels, student: Levels) -> Tensor:
    """1 - cosine, averaged over positions, summed over levels and images: the learning rate assumes this sum."""
    distances = [1 - F.cosine_similarity(teacher[s], student[s], dim=1) for s in teacher]
    return torch.stack([distance.mean((1, 2)).sum() for distance in distances]).sum()


def mask_loss(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Focal loss, the mean of (1 - p_t)^gamma (-log p_t), plus the mean absolute error of the probabilities."""
    crossed = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")  # -log p_t
    focal = ((1 - torch.exp(-crossed)) ** gamma * crossed).mean()
    return focal + (logits.sigmoid() - mask).abs().mean()


@dataclass(kw_only=True, eq=False)
class DeSTSeg(Detector):
    """A net that maps where a student, trained to restore clean images, differs from the frozen teacher.

    The student sees pixels with a drawn defect and learns what the teacher sees without it. Then the student is
    frozen, and a segmentation net learns to find the drawn defects from the channel-wise products of both on the
    corrupted image. The map is its probability, the image score the mean of the highest 0.15 % of the upsampled map.

    Cost: `student_steps` + `head_steps` steps, whatever the size of the set, so k + 1 trainings cost k + 1 times one.
        Each training image passes the backbone 1 + `n_copies` times.
    Contamination: Strong. The student learns to reproduce real defects, and the segmentation net to map them as clean.
    Differs from the paper: each image has a fixed bank of `n_copies` corrupted copies, whose teacher features are
        cached, instead of a new corruption at each step; without `textures`, textures are drawn or taken from the image
        itself instead of photographs (DTD), which is expected to cost accuracy; no rotated copies, which the paper has
        for some products. The default has narrow networks, sees 128 px, takes fewer and smaller steps under a falling
        rate, and standardises features, whose student then ends in linear maps: the paper's ReLU fits the taps of a
        ResNet-18. Dilations keep their share of the grid. At prediction, the segmentation net's whole-image branch is
        held within what batch norm allows in training: else images that are anomalous as a whole can get low scores.
        Maps are smoothed like those of all detectors. Always the last step. On a GPU that has bfloat16, and on a CPU
        that multiplies it, the forward pass of a step is in it, the authors' in float32.
    Reference: Zhang et al., "DeSTSeg: Segmentation Guided Denoising Student-Teacher for Anomaly Detection", CVPR 2023,
        arXiv 2211.11317, sections 3 and 4.1.

    Attributes:
        n_copies: Corrupted copies of each training image.
        textures: A folder of photographs of textures, such as the Describable Textures Dataset (DTD) of the paper; None
            draws them.
        student_size: Edge length in pixels, a multiple of 32, that the student sees; teacher features are averaged to
            its grids. None takes the network's input.
        student_width: Channels of the student's first stage; 64 is a ResNet-18.
        head_width: Channels of the segmentation net.
        standardize: Bring each channel of the teacher to mean 0 and standard deviation 1 first.
        batch_size: Images in a step.
        student_steps: Steps of the student.
        head_steps: Steps of the segmentation net after that.
        student_rate: Learning rate of the student, for a loss that is a sum over images.
        residual_rate: Learning rate of the segmentation net's residual blocks.
        head_rate: Learning rate of the rest of it.
        anneal: Let each phase's rates fall by half a cosine.
    """

    name: ClassVar[str] = "destseg"
    reads_pixels: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "budget": {},  # the default
        # section 4.1; 8 copies where the paper draws some 700 per image
        "paper": {
            "n_copies": 8,
            "student_size": None,
            "student_width": 64,
            "head_width": 256,
            "standardize": False,
            "batch_size": 32,
            "student_steps": 1000,
            "head_steps": 4000,
            "residual_rate": 0.1,
            "head_rate": 0.01,
            "anneal": False,
        },
    }

    layers: Sequence[str] = ("stride4", "stride8", "stride16")
    n_copies: int = 4
    textures: str | None = None
    student_size: int | None = 128
    student_width: int = 32
    head_width: int = 64
    standardize: bool = True
    batch_size: int = 8
    student_steps: int = 600
    head_steps: int = 800
    student_rate: float = 0.4
    residual_rate: float = 0.4
    head_rate: float = 0.04
    anneal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.student_size is None or (self.student_size > 0 and self.student_size % MULTIPLE == 0)
        self._require("student_size", whole, f"be a multiple of {MULTIPLE}, or None")
        for count in ("n_copies", "student_width", "head_width", "batch_size", "student_steps", "head_steps"):
            self._require(count, getattr(self, count) >= 1, "be at least 1")
        self._require("batch_size", self.batch_size >= 2, "be at least 2, for batch norm")
        for rate in ("student_rate", "residual_rate", "head_rate"):
            self._require(rate, getattr(self, rate) > 0, "be positive")

    @property
    def views(self) -> tuple[str, ...]:
        """The corrupted copies of each training image."""
        keys = [f"{self.seed}.{copy}" for copy in range(self.n_copies)]
        return drawn_views(keys) if self.textures is None else photo_views(keys, self.textures)

    def fit(self, data: ImageSet, *, device: str = "auto", watch: training.Watch = training.UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        if len(data) < 2:
            raise InputError(f"DeSTSeg.fit needs at least two images for batch norm, got {len(data)}.")
        if self.standardize:
            self.statistics_ = channel_statistics(data, self.layers)
        self._read_taps(next(data.select(data.ids[:1]).batches(self.layers)))
        with training.seeded(self.seed, target):
            nets = self._build().to(target)
        rates = {nets.student: self.student_rate, nets.segmenter.residual: self.residual_rate}
        rates |= {part: self.head_rate for name, part in nets.segmenter.named_children() if name != "residual"}
        views = self.views
        drawn: Copies = {}
        groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates.items()]
        optimizer = torch.optim.SGD(groups, lr=self.head_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

        def loss_of(batch: Batch, step: int) -> Tensor:
            view = views[int(np.random.default_rng([self.seed, step]).integers(self.n_copies))]
            images = data.select(batch.ids)
            pixels, mask = self._copies(images, view, drawn)
            pixels, first_phase = pixels.to(target), step < self.student_steps
            nets.train_one(first_phase)
            teacher = self._teacher(images if first_phase else images.view(view), target)
            if first_phase:  # what the teacher sees of the clean image, from the corrupted one
                return cosine_loss(teacher, nets.student(pixels))
            return mask_loss(nets(pixels, teacher), mask.to(target), GAMMA)

        recipe = training.Recipe(
            steps=self.student_steps + self.head_steps,
            batch_size=self.batch_size,
            seed=self.seed,
            schedule=self._factor if self.anneal else None,
            large_products=True,
        )
        training.train(nets, optimizer, data, (), loss_of, recipe, device=target, watch=watch)
        self.weights_ = training.weights_of(nets)
        return self

    def _read_taps(self, batch: Batch) -> None:
        shapes = [batch.features[layer].shape for layer in self.layers]
        shape = as_shape(batch.size)
        if self.student_size is not None:  # as many pixels as a square of that edge
            scale = self.student_size / math.sqrt(math.prod(shape))
            down, across = (max(1, round(edge * scale / MULTIPLE)) * MULTIPLE for edge in shape)
            shape = down, across
        self.size_ = shape[0] if shape[0] == shape[1] else list(shape)
        height, _ = as_shape(batch.size)
        self.taps_ = [[height // tap[2], tap[1]] for tap in shapes]  # (stride, channels) of each layer
        strides = [stride for stride, _ in self.taps_]
        fits = not any(edge % MULTIPLE for edge in shape)
        if not (set(strides) <= set(STRIDES) and len(set(strides)) == len(strides) and fits):
            raise InputError(
                f"DeSTSeg.fit needs layers of different strides among {STRIDES} and an input edge that is a multiple "
                f"of {MULTIPLE}, got {strides} and {self.size_}."
            )

    def _factor(self, step: int) -> float:
        """On the learning rates at a step: half a cosine from 1 to 0 over each phase."""
        second = step >= self.student_steps
        done = (step - self.student_steps) / self.head_steps if second else step / self.student_steps
        return 0.5 + 0.5 * math.cos(math.pi * done)

    def _maps(self, batch: Batch, device: str) -> Tensor:
        shares: Tensor = self._net(device)(self._pixels(batch, device), self._levels(batch, device)).sigmoid()
        return shares

    def _image_scores(self, maps: Tensor) -> Tensor:
        return top_mean(upsample(maps, (PIXELS_PER_CELL * maps.shape[1], PIXELS_PER_CELL * maps.shape[2])), TOP_SHARE)

    def _expected(self, batch: Batch, device: str) -> Tensor:
        student = self._net(device).student(self._pixels(batch, device))
        return on_finest({stride: F.normalize(level, dim=1) for stride, level in student.items()})

    def _pixels(self, batch: Batch, device: str) -> Tensor:
        assert batch.pixels is not None
        return F.adaptive_avg_pool2d(batch.pixels.to(device), as_shape(self.size_))

    def _teacher(self, images: ImageSet, device: str) -> Levels:
        return self._levels(next(images.batches(self.layers, batch_size=len(images))), device)

    def _levels(self, batch: Batch, device: str) -> Levels:
        """{stride: (B, C, h, w)} teacher features on the student's grids."""
        levels = {}
        for layer, (stride, _) in zip(self.layers, self.taps_, strict=True):
            tap = batch.features[layer].to(device)
            if self.standardize:
                tap = standardized(tap, self.statistics_[layer])
            levels[stride] = F.adaptive_avg_pool2d(tap, self._grid(stride))
        return levels

    def _grid(self, stride: int) -> Shape:
        height, width = as_shape(self.size_)
        return height // stride, width // stride

    def _copies(self, images: ImageSet, view: str, drawn: Copies) -> tuple[Tensor, Tensor]:
        """(B, 3, s, s) pixels in [0, 1] and (B, g, g) masks of corrupted copies, kept in `drawn` up to COPIES_BYTES."""
        grid = self._grid(min(stride for stride, _ in self.taps_))
        copies = []
        for id_ in images.ids.tolist():
            copy = drawn.get((id_, view))
            if copy is None:
                assert images.reader is not None
                made = corrupted(images.pixels_of(id_, images.reader.size), view)
                small = F.adaptive_avg_pool2d(made.image.float(), as_shape(self.size_)).round().to(torch.uint8)
                copy = small, upsample(made.mask[None].float(), grid)[0] >= 0.5  # a sample of the mask, not a mean
                if (len(drawn) + 1) * small.numel() <= COPIES_BYTES:
                    drawn[id_, view] = copy
            copies.append(copy)
        return torch.stack([p for p, _ in copies]).float() / 255, torch.stack([m for _, m in copies]).float()

    def _build(self) -> Networks:
        channels: dict[int, int] = {int(stride): int(width) for stride, width in self.taps_}
        student = DenoisingStudent(self.student_width, channels, linear=self.standardize)
        side = max(self._grid(min(channels)))
        return Networks(student, Segmenter(sum(channels.values()), self.head_width, side, self.batch_size))

    def _net(self, device: str) -> Networks:
        def make() -> Networks:
            with training.seeded(self.seed, "cpu"):  # initial weights, which are not used, are drawn all the same
                return training.restored(self.weights_, self._build(), device)

        return self._cached("net", device, make)
