"""FUN-AD: a patch classifier trained on pseudo-labels: distances to a memory bank, which is rebuilt from its scores."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import training
from flawsift.detectors.parts.coreset import random_projection
from flawsift.detectors.parts.maps import on_one_grid
from flawsift.detectors.parts.neighbors import NearestNeighbors, mutual_pairs
from flawsift.detectors.parts.scaling import channel_statistics, standardized
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device

SLOPE = 0.2  # of all LeakyReLUs, as the authors have it
MEMORY = 0.9  # of running values: about the last ten batches, 320 images
MOMENTUM = 0.2  # of RMSprop, as the authors have it
COPY = 1e-2  # squared distances below it are copies, the patch itself among them: the authors' constant
DRAWN = 0.5  # share of the candidate images that enter the bank, as the authors have it
CANDIDATE = 0.5  # images below this place between the lowest and the highest image score are candidates ("minmax")
RANKED = 0.6  # or this share, by rank ("robust"): at higher contamination no method here is of use
MIN_IMAGES, MIN_SHARE = 8, 0.1  # the bank has images enough, whatever the scores
TYPICAL, EXTREME = 0.5, 0.999  # quantiles of a batch's distances that the running scale rests on
WARMUP = 20  # steps: RMSprop's first steps are ten times the learning rate, as its averages start at 0


class Head(nn.Module):
    """Adaptor and discriminator: image vectors and patches to logits.

    W [image; patch] = W_i image + W_p patch, so the image vector is multiplied once per image.
    """

    def __init__(self, n_image: int, n_patch: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.n_image, sizes = n_image, [n_image + n_patch, *hidden]
        self.adaptor = nn.Linear(sizes[0], sizes[0])
        pairs = [(nn.Linear(a, b), nn.LeakyReLU(SLOPE)) for a, b in itertools.pairwise(sizes)]
        self.discriminator = nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Linear(sizes[-1], 1))

    def adapt(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P, D) adapted features before their LeakyReLU, from (B, I) and (B, P, C) with D = I + C."""
        weight = self.adaptor.weight
        whole = F.linear(image, weight[:, : self.n_image], self.adaptor.bias)
        return whole.unsqueeze(1) + F.linear(patches, weight[:, self.n_image :])

    def discriminate(self, adapted: Tensor) -> Tensor:
        """(...) logits of (..., D) adapted features before their LeakyReLU."""
        logits: Tensor = self.discriminator(F.leaky_relu(adapted, SLOPE))
        return logits.squeeze(-1)

    def forward(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P) logits."""
        return self.discriminate(self.adapt(image, patches))


class Memory(nn.Module):
    """What a training keeps between its steps, in buffers, so that a checkpoint has it.

    `bank`: (M, D) image vector and patch of each entry, before the adaptor, whose weights change; `owners`: (M,) ids of
    their images, -1 where there is no entry; `scale`: (2,) running typical and extreme squared distance; `positive`:
    running share of patches that are labelled anomalous.
    """

    bank: Tensor
    owners: Tensor
    scale: Tensor
    positive: Tensor

    def __init__(self, size: int, width: int, *, keep: bool) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(size, width), persistent=keep)
        self.register_buffer("owners", torch.full((size,), -1), persistent=keep)
        self.register_buffer("scale", torch.full((2,), torch.nan))
        self.register_buffer("positive", torch.tensor(torch.nan))


def follow(running: Tensor, value: Tensor) -> Tensor:
    """Moves a running value, nan before the first, in place towards that of a batch; returns it."""
    return running.copy_(torch.where(running.isnan(), value, MEMORY * running + (1 - MEMORY) * value))


def spread(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values on a scale with `low` at 0 and `high` at 1; all 0 where the two are equal."""
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the anomalous patches plus that of the normal ones; a class without patches adds 0."""
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return each[labels].sum() / labels.sum().clamp_min(1) + each[~labels].sum() / (~labels).sum().clamp_min(1)


def smoothness_loss(scores: Tensor, pairs: Tensor) -> Tensor:
    """0.5 mean |s_i - s_j| over (M, 2) mutual pairs, each once; 0 without pairs."""
    return 0.5 * (scores[pairs[:, 0]] - scores[pairs[:, 1]]).abs().sum() / max(1, len(pairs))


@dataclass(kw_only=True, eq=False)
class FUNAD(Detector):
    """A classifier of patches, trained on pseudo-labels: distances to a memory bank that is rebuilt from its scores.

    A patch carries its image's vector: the class token where a layer has one cell per image, else the mean of the
    image's patches. Every `rebuild_every` steps the head scores all training images; half of those that score low fill
    the bank. A patch far from it (scaled squared distance above `tau`) is labelled anomalous, the head learns these
    labels by a class-balanced cross entropy, and uncertain anomalies (below `tau_sure`) get Gaussian noise. The scores
    of mutually nearest patches are drawn together. The map is the head's logit, the image score its maximum.

    Cost: `steps` passes of `batch_size` x `patches_per_image` patches through the head and their search among
        `bank_size` patches and each other; a pass over all patches per rebuild. Scoring is the head alone.
    Contamination: What it is made for, while normal patches vary less than anomalous ones. It learns from the defects:
        a screening that takes them out makes it worse, so `flawsift.fit` keeps all unless told how many. Identical
        recurring defects invert the labels: see `flawsift diagnose`. In a clean set the most unusual patches are
        labelled anomalous.
    Differs from the paper: Logits instead of their sigmoids, which saturate; the last step, never the best on a test
        set; channels are standardised in place of the backbone's last LayerNorm, which no layer has; where `layers`
        name no class token (such as "blocks.11.cls"; CNNs have none), the mean of an image's patches stands for it;
        squared distances, as in the authors' code; never fewer than 8 images, or a tenth, in the bank; on a GPU that
        has bfloat16, the forward pass of a step is in it, but for the searches, and the authors' in float32. In the
        default preset only: 3 x 3 means of the cells, as a CNN's see less than a ViT's tokens; distances between
        features, not between adapted ones, which move with the large steps of a short training and take the labels
        along (`search`); no neighbours from the same image, instead of the second one for copies (`exclude_own`);
        scales and candidates by running quantiles and ranks, as extremes make anomalies in any batch (`scaling`);
        scores without noise in the smoothness loss, whose pairs have none (`smooth_noisy`; in the authors' code it
        leaks); a decaying learning rate, so that the last step is no draw; and sizes for a CPU.
    Reference: Im et al., "FUN-AD: Fully Unsupervised Learning for Anomaly Detection with Noisy Training Data", WACV
        2025, arXiv 2411.16110. Its authors give notice of a patent application and limit commercial use of the method.

    Attributes:
        patch_size: Edge of the square of cells whose mean is a patch; odd.
        image_branch: Whether patches carry their image's vector.
        hidden: Widths of the discriminator's hidden layers.
        steps: Gradient steps.
        batch_size: Images in a batch.
        patches_per_image: Patches of each that a step sees, the same places in all; None for all.
        learning_rate: Of RMSprop.
        decay: Whether it rises for some steps and then falls to 0.
        rebuild_every: Steps between two choices of the bank.
        bank_size: Most patches in the bank, evenly from its images, two images at least; None for all.
        projection_dim: Of a random projection for the searches; None for none.
        search: What is searched: "patch" without the image's vector, or "adapted" features.
        exclude_own: Whether patches of the same image are left out of the search in the bank.
        scaling: "robust" or "minmax": how distances come to the scale of `tau`, and image scores to a choice.
        tau, tau_sure: Scaled distances above which a patch counts as anomalous, and surely does.
        smoothness: Weight of the smoothness loss.
        smooth_noisy: Whether that loss sees the noise.
    """

    name: ClassVar[str] = "funad"
    learns_from_defects: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # the released command, for DINO ViT-B/8: 1500 epochs of 7 batches (bottle, 229 images)
        "paper": {
            **{"layers": ("stride8",), "patch_size": 1, "steps": 10_500, "patches_per_image": None, "decay": False},
            **{"learning_rate": 2e-5, "rebuild_every": 1, "bank_size": None, "projection_dim": None},
            **{"search": "adapted", "exclude_own": False, "scaling": "minmax", "smooth_noisy": True},
        },
        "budget": {"steps": 100, "hidden": (256, 64), "bank_size": 1000},
    }

    layers: Sequence[str] = ("stride16",)
    patch_size: int = 3
    image_branch: bool = True
    hidden: Sequence[int] = (1024, 128)
    steps: int = 300
    batch_size: int = 32
    patches_per_image: int | None = 64
    learning_rate: float = 3e-4
    decay: bool = True
    rebuild_every: int = 50
    bank_size: int | None = 3000
    projection_dim: int | None = 128
    search: Literal["patch", "adapted"] = "patch"
    exclude_own: bool = True
    scaling: Literal["robust", "minmax"] = "robust"
    tau: float = 0.5
    tau_sure: float = 0.9
    smoothness: float = 2.5
    smooth_noisy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hidden = tuple(self.hidden)
        self._require("patch_size", self.patch_size >= 1 and self.patch_size % 2 == 1, "be odd and at least 1")
        self._require("hidden", all(type(n) is int and n >= 1 for n in self.hidden), "be widths of at least 1")
        for name in ("steps", "batch_size", "rebuild_every"):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        # a bank of one image has nothing for the patches of that image to be compared with
        self._require("bank_size", self.bank_size is None or self.bank_size >= 2, "be at least 2, or None")
        for name in ("patches_per_image", "projection_dim"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "be at least 1, or None")
        for name in ("learning_rate", "tau"):
            self._require(name, getattr(self, name) > 0, "be positive")
        self._require("search", self.search in ("patch", "adapted"), "be 'patch' or 'adapted'")
        self._require("scaling", self.scaling in ("robust", "minmax"), "be 'robust' or 'minmax'")
        self._require("tau_sure", self.tau_sure >= self.tau, "not be below tau")
        self._require("smoothness", self.smoothness >= 0, "not be negative")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`. One image is refused with `exclude_own`: it has no distance to others."""
        self._forget()
        target, least = resolve_device(device), 2 if self.exclude_own else 1
        if len(data) < least:
            raise InputError(f"FUNAD.fit needs at least {least} images to compare patches, got {len(data)}.")
        self.statistics_ = channel_statistics(data, self.layers)
        image, patches, _ = self._embed(next(data.batches(self.layers, batch_size=1)), target)
        n_image, n_patch = self.widths_ = [image.shape[1], patches.shape[2]]
        with training.seeded(self.seed, target):
            head = Head(n_image, n_patch, self.hidden).to(target)
        size = min(patches.shape[1] * len(data), self.bank_size or sys.maxsize)
        memory = Memory(size, n_image + n_patch, keep=self.rebuild_every > 1).to(target)

        def loss_of(batch: Batch, step: int) -> Tensor:
            if step % self.rebuild_every == 0:
                self._rebuild(head, memory, data, target)
            return self._loss(head, memory, batch, target)

        optimizer = torch.optim.RMSprop(head.parameters(), lr=self.learning_rate, momentum=MOMENTUM)
        decay = training.warmup_cosine(WARMUP, self.steps, 0.0) if self.decay else None
        recipe = training.Recipe(steps=self.steps, batch_size=self.batch_size, seed=self.seed, schedule=decay)
        both = nn.ModuleList([head, memory])
        training.train(both, optimizer, data, self.layers, loss_of, recipe, device=target, watch=watch)
        self.weights_ = training.weights_of(head)
        self.positive_share_ = float(memory.positive)
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        image, patches, grid = self._embed(batch, device)
        logits: Tensor = self._net(device)(image, patches)
        return logits.view(-1, *grid)

    def _net(self, device: str) -> Head:
        def make() -> Head:
            with training.seeded(self.seed, "cpu"):  # building it draws weights, which are then replaced
                head = Head(self.widths_[0], self.widths_[1], self.hidden)
            return training.restored(self.weights_, head, device)

        return self._cached("net", device, make)

    def _embed(self, batch: Batch, device: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(B, I) image vectors, (B, P, C) patches, and the grid (h, w) of the patches."""
        taps = [standardized(batch.features[k].to(device), self.statistics_[k]) for k in self.layers]
        tokens = [tap for tap in taps if tap.shape[2:] == (1, 1)]
        taps = [tap for tap in taps if tap.shape[2:] != (1, 1)] or tokens
        edge = self.patch_size
        taps = [F.avg_pool2d(tap, edge, 1, edge // 2, count_include_pad=False) for tap in taps]
        cells = torch.cat(on_one_grid(taps), 1)
        patches = cells.flatten(2).transpose(1, 2)
        image = torch.cat(tokens, 1).flatten(1) if tokens else patches.mean(1)
        return image if self.image_branch else image[:, :0], patches, (cells.shape[2], cells.shape[3])

    @torch.no_grad()
    def _rebuild(self, head: Head, memory: Memory, data: ImageSet, device: str) -> None:
        """Fills the bank anew from images that the head scores low."""
        logits = [head(*self._embed(batch, device)[:2]).amax(1) for batch in data.batches(self.layers)]
        chosen = data.ids[self._candidates(torch.cat(logits)).cpu().numpy()]
        size, row = len(memory.owners), 0
        for batch in data.select(chosen).batches(self.layers):
            image, patches, _ = self._embed(batch, device)
            for i, id_ in enumerate(batch.ids.tolist()):
                quota = min(max(1, size // len(chosen)), size - row)
                taken = patches[i, torch.randperm(patches.shape[1], device=patches.device)[:quota]]
                rows = slice(row, row + len(taken))
                memory.bank[rows], memory.owners[rows] = torch.cat([image[i].expand(len(taken), -1), taken], 1), id_
                row = rows.stop
        memory.owners[row:] = -1

    def _candidates(self, logits: Tensor) -> Tensor:
        """Positions of the images that fill the bank, from (N,) image scores."""
        n, scores = len(logits), logits.sigmoid()
        least = min(n, max(MIN_IMAGES, round(MIN_SHARE * n)))
        low = int((spread(scores, scores.min(), scores.max()) < CANDIDATE).sum())
        n_low = max(least, low if self.scaling == "minmax" else int(RANKED * n))
        drawn = torch.randperm(n_low, device=logits.device)[: max(least, int(DRAWN * n_low))]
        return logits.argsort(stable=True)[drawn]

    def _loss(self, head: Head, memory: Memory, batch: Batch, device: str) -> Tensor:
        image, patches, _ = self._embed(batch, device)
        if self.patches_per_image is not None:
            patches = patches[:, torch.randperm(patches.shape[1], device=patches.device)[: self.patches_per_image]]
        clean = head.adapt(image, patches).flatten(0, 1)  # (B P, D)
        x = torch.cat([image.unsqueeze(1).expand(-1, patches.shape[1], -1), patches], 2)  # (B, P, D)
        entries = memory.bank.unsqueeze(1)  # each an image of one patch
        bank = self._keys(head, entries[:, 0, : image.shape[1]], entries[:, :, image.shape[1] :])
        keys = self._keys(head, image, patches)
        scaled = self._scaled(memory, self._distances(memory, bank, keys, batch))
        labels = scaled > self.tau
        follow(memory.positive, labels.float().mean())
        unsure = (labels & (scaled < self.tau_sure)).nonzero()[:, 0]
        # the largest deviation over the batch at any place; the adaptor being linear, its image adds to what is adapted
        sigma = x.std(0, correction=min(1, len(x) - 1)).amax(0)
        noise = torch.randn(len(unsure), x.shape[2], device=x.device) * sigma
        logits = head.discriminate(clean.index_add(0, unsure, F.linear(noise, head.adaptor.weight)))
        loss = balanced_loss(logits, labels)
        if self.smoothness:
            if not self.smooth_noisy:
                logits = logits.index_copy(0, unsure, head.discriminate(clean[unsure]))
            loss = loss + self.smoothness * smoothness_loss(logits.sigmoid(), mutual_pairs(keys))
        return loss

    @torch.no_grad()
    def _keys(self, head: Head, image: Tensor, patches: Tensor) -> Tensor:
        """(B P, d) what distances are between, of (B, I) and (B, P, C), by one way for a batch and for the bank.

        In float32 whatever the training is in: bfloat16 moves the copies of a patch further apart than `COPY`, so that
        an anomaly in the bank is compared with itself, and counts as normal.
        """
        with torch.autocast(patches.device.type, enabled=False):
            features = patches if self.search == "patch" else head.adapt(image, patches)
            return self._searchable(features.flatten(0, 1))

    def _searchable(self, features: Tensor) -> Tensor:
        """(N, d) what distances are between, from (N, D) features or adapted ones before their LeakyReLU."""
        keys = features.detach() if self.search == "patch" else F.leaky_relu(features.detach(), SLOPE)
        if self.projection_dim is None or self.projection_dim >= keys.shape[1]:
            return keys
        generator = torch.Generator().manual_seed(self.seed)
        return keys @ random_projection(keys.shape[1], self.projection_dim, generator).to(keys)

    def _distances(self, memory: Memory, bank: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        """(B P,) squared distance of each patch of a batch to the bank."""
        there = memory.owners >= 0
        if self.exclude_own:
            ids = torch.from_numpy(batch.ids).to(keys.device).repeat_interleave(len(keys) // len(batch))
            return NearestNeighbors(bank[there], owners=memory.owners[there]).query(keys, owners=ids)[0][:, 0].square()
        near = NearestNeighbors(bank[there]).query(keys, k=min(2, int(there.sum())))[0].square()
        near = near.where(near >= COPY, 0.0)
        return torch.where(near[:, 0] > 0, near[:, 0], near[:, -1])

    def _scaled(self, memory: Memory, distances: Tensor) -> Tensor:
        """Distances on the scale of `tau`."""
        if self.scaling == "minmax":
            return spread(distances, distances.min(), distances.max())
        levels = distances.quantile(distances.new_tensor([TYPICAL, EXTREME]))
        return spread(distances, *follow(memory.scale, levels))
