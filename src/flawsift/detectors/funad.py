"""FUN-AD: a patch classifier that is trained from pseudo-labels of its own, ever purer memory bank."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.detector import Detector, resolve_device
from flawsift.errors import InputError
from flawsift.images import Batch, ImageSet
from flawsift.nn import NearestNeighbors, mutual_pairs, random_projection
from flawsift.training import (
    UNWATCHED,
    Recipe,
    Watch,
    channel_statistics,
    restored,
    seeded,
    standardized,
    train,
    weights_of,
)

SLOPE = 0.2  # of all LeakyReLUs, as the authors have it
MOMENTUM = 0.2  # of RMSprop, as the authors have it
COPY = 1e-2  # squared distances below it are copies, the patch itself among them: the authors' constant
CANDIDATE = 0.5  # images below this place between the lowest and the highest image score may enter the bank
MIN_IMAGES, MIN_SHARE = 8, 0.1  # the bank never has fewer images than this, whatever the scores
MEMORY = 0.9  # of the running scale of distances: about the last ten batches, 320 images
TYPICAL, EXTREME = 0.5, 0.999  # quantiles of a batch's distances that the running scale rests on


class Head(nn.Module):
    """Adaptor and discriminator: image vectors and patches to logits.

    The weights that meet the image vector are applied once per image: W [image; patch] = W_i image + W_p patch.
    """

    def __init__(self, n_image: int, n_patch: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.n_image, width = n_image, n_image + n_patch
        self.adaptor = nn.Linear(width, width)
        layers: list[nn.Module] = []
        for inputs, outputs in zip([width, *hidden], hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(SLOPE)]
        self.discriminator = nn.Sequential(*layers, nn.Linear([width, *hidden][-1], 1))

    def before(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P, D) adapted features before their LeakyReLU, from (B, I) and (B, P, C) with D = I + C."""
        of_image, of_patch = self.adaptor.weight.split([self.n_image, patches.shape[2]], dim=1)
        whole: Tensor = F.linear(image, of_image, self.adaptor.bias)
        return whole.unsqueeze(1) + F.linear(patches, of_patch)

    def logits(self, before: Tensor) -> Tensor:
        """(...) logits of (..., D) adapted features before their LeakyReLU."""
        found: Tensor = self.discriminator(F.leaky_relu(before, SLOPE))
        return found.squeeze(-1)

    def forward(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P) logits."""
        return self.logits(self.before(image, patches))


class Memory(nn.Module):
    """What training remembers between steps; in buffers, so that a checkpoint has it.

    Attributes:
        bank: (M, D) image vector and patch of each entry, not adapted: the adaptor moves on between two rebuilds.
        owners: (M,) id of the image that each comes from; -1 where there is no entry.
        scale: (2,) running typical and extreme squared distance; nan before the first batch.
        positive: Running share of patches that are taken for anomalous.
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
    """Moves a running value, nan before the first, towards that of a batch; returns it."""
    return running.copy_(torch.where(running.isnan(), value, MEMORY * running + (1 - MEMORY) * value))


def minmax(distances: Tensor) -> Tensor:
    """Distances brought to [0, 1] over a batch; all 0 where they are constant."""
    low, high = distances.aminmax()
    return (distances - low) / (high - low) if high > low else torch.zeros_like(distances)


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the anomalous patches plus that of the normal ones; a class without patches adds 0."""
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return each[labels].sum() / labels.sum().clamp_min(1) + each[~labels].sum() / (~labels).sum().clamp_min(1)


def smoothness_loss(scores: Tensor, pairs: Tensor) -> Tensor:
    """0.5 mean |s_i - s_j| over (M, 2) mutual pairs, each once; 0 without pairs."""
    gaps = (scores[pairs[:, 0]] - scores[pairs[:, 1]]).abs()
    return 0.5 * gaps.sum() / max(1, len(pairs))


@dataclass(kw_only=True, eq=False)
class FUNAD(Detector):
    """A small classifier of patches, taught by distances to a memory bank that it purifies itself.

    Each patch carries its image's vector: the class token where a layer has one cell per image, else the mean of the
    image's patches. Every `rebuild_every` steps the head scores all training images; patches of half of the images
    that score low become the bank. A patch of the batch that is far from the bank, in the head's own adapted space,
    counts as anomalous (equation: scaled distance above `tau`), and the head is trained on these labels by a
    class-balanced cross entropy; patches that are anomalous but not surely so (below `tau_sure`) get Gaussian noise.
    Mutually nearest patches are drawn to equal scores. The map is the head's logit, the image score its maximum.

    Cost: `steps` passes of `batch_size` x `patches_per_image` patches through the head, their search among `bank_size`
        patches and each other, and a pass over all patches per rebuild. No bank is kept: scoring is the head alone.
    Contamination: What the method is made for, as long as normal patches vary less than anomalous ones. Identical
        recurring defects break that: they are each other's neighbours and the labels turn round; see
        `flawsift.diagnostics`. A set without anomalies is split too: its most unusual patches are taken for defects.
    Differs from the paper: scores are logits, not their sigmoids, which saturate; the last step is what counts, never
        the best on a test set; features are standardised per channel in place of the backbone's last LayerNorm, which
        no layer includes; distances are squared, as in the authors' code. In the default preset, and not in "paper":
        patches of the same image are no neighbours (`exclude_own`) instead of the second neighbour standing in for a
        copy; distances are scaled by a running median and high quantile, not by the extremes of a batch, which make
        anomalies of the farthest patches of any batch (`scaling`); the smoothness loss has scores without the noise,
        as its pairs have (`smooth_noisy`; in the authors' code noise leaks into them); bank, batch, projection and
        steps are small enough for a CPU, with a learning rate to match. The bank never has fewer than 8 images or a
        tenth; empty classes and sets of pairs add no loss.
    Reference: Im et al., "FUN-AD: Fully Unsupervised Learning for Anomaly Detection with Noisy Training Data", WACV
        2025, arXiv 2411.16110. Its authors state that a patent is applied for and that commercial use of the method is
        limited; that concerns the method, not only their code.

    Attributes:
        image_branch: Whether each patch carries its image's vector.
        hidden: Widths of the discriminator's hidden layers.
        steps: Gradient steps.
        batch_size: Images in a batch.
        patches_per_image: Patches of each that a step sees, the same places in all; None for all.
        learning_rate: Of RMSprop.
        rebuild_every: Steps between two choices of the bank.
        draw: Share of the candidate images that enter the bank.
        bank_size: Most patches in the bank, evenly from its images; None for all.
        projection_dim: Dimension of a random projection for the searches; None searches in the adapted space.
        scaling: "running" or "minmax": how distances are brought to the scale of `tau`.
        exclude_own: Whether patches of the same image are left out of the search in the bank.
        tau: Scaled distance above which a patch counts as anomalous.
        tau_sure: Scaled distance from which it surely does.
        smoothness: Weight of the smoothness loss.
        smooth_noisy: Whether the smoothness loss sees the noise.
    """

    name: ClassVar[str] = "funad"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # the released command: 1500 epochs of 7 batches on the smallest set that the paper reports; for DINO ViT-B/8
        "paper": {
            "layers": ("stride8",),
            "steps": 10_500,
            "patches_per_image": None,
            "learning_rate": 2e-5,
            "rebuild_every": 1,
            "bank_size": None,
            "projection_dim": None,
            "scaling": "minmax",
            "exclude_own": False,
            "smooth_noisy": True,
        },
        "budget": {"layers": ("stride16",), "steps": 200, "hidden": (256, 64)},
    }

    image_branch: bool = True
    hidden: Sequence[int] = (1024, 128)
    steps: int = 300
    batch_size: int = 32
    patches_per_image: int | None = 128
    learning_rate: float = 1e-4
    rebuild_every: int = 50
    draw: float = 0.5
    bank_size: int | None = 5000
    projection_dim: int | None = 128
    scaling: Literal["running", "minmax"] = "running"
    exclude_own: bool = True
    tau: float = 0.5
    tau_sure: float = 0.9
    smoothness: float = 2.5
    smooth_noisy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hidden = tuple(self.hidden)
        self._require("hidden", all(type(n) is int and n >= 1 for n in self.hidden), "be widths of at least 1")
        for name in ("steps", "batch_size", "rebuild_every"):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("patches_per_image", "bank_size", "projection_dim"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "be at least 1, or None")
        self._require("learning_rate", self.learning_rate > 0, "be positive")
        self._require("draw", 0 < self.draw <= 1, "be in (0, 1]")
        self._require("scaling", self.scaling in ("running", "minmax"), "be 'running' or 'minmax'")
        self._require("tau", self.tau > 0, "be positive")
        self._require("tau_sure", self.tau_sure >= self.tau, "not be below tau")
        self._require("smoothness", self.smoothness >= 0, "not be negative")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target, least = resolve_device(device), 2 if self.exclude_own else 1
        if len(data) < least:
            why = "pseudo-labels are distances to other images, " if self.exclude_own else ""
            raise InputError(f"FUNAD.fit needs at least {least} image(s): {why}got {len(data)}.")
        self.statistics_ = channel_statistics(data, self.layers)
        image, patches, _ = self._embed(next(data.batches(self.layers, batch_size=1)), target)
        self.widths_ = [image.shape[1], patches.shape[2]]
        with seeded(self.seed, target):
            head = Head(*self.widths_, self.hidden).to(target)
            projection = self._projection(sum(self.widths_), target)
        size = min(patches.shape[1] * len(data), self.bank_size or sys.maxsize)
        memory = Memory(size, sum(self.widths_), keep=self.rebuild_every > 1).to(target)

        def loss_of(batch: Batch, step: int) -> Tensor:
            if step % self.rebuild_every == 0:
                self._rebuild(head, memory, data, target)
            return self._loss(head, memory, batch, projection, target)

        optimizer = torch.optim.RMSprop(head.parameters(), lr=self.learning_rate, momentum=MOMENTUM)
        recipe = Recipe(steps=self.steps, batch_size=self.batch_size, seed=self.seed)
        trained = nn.ModuleList([head, memory])
        train(trained, optimizer, data, self.layers, loss_of, recipe, device=target, watch=watch)
        self.weights_ = weights_of(head)
        self.positive_share_ = float(memory.positive)
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        image, patches, grid = self._embed(batch, device)
        return self._head(device)(image, patches).view(-1, *grid)

    def _head(self, device: str) -> Head:
        made: dict[str, Head] = vars(self).setdefault("_nets", {})
        if device not in made:
            made[device] = restored(self.weights_, Head(*self.widths_, self.hidden), device)
        return made[device]

    def _embed(self, batch: Batch, device: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(B, I) image vectors, (B, P, C) patches, and the grid (h, w) of the patches."""
        taps = [standardized(batch.features[layer].to(device), self.statistics_[layer]) for layer in self.layers]
        tokens = [tap for tap in taps if tap.shape[2:] == (1, 1)]
        taps = [tap for tap in taps if tap.shape[2:] != (1, 1)] or tokens
        grid = max((tap.shape[2:] for tap in taps), key=lambda s: s[0] * s[1])
        same = [F.interpolate(tap, tuple(grid), mode="bilinear", align_corners=False) for tap in taps]
        patches = torch.cat(same, 1).flatten(2).transpose(1, 2)
        image = torch.cat(tokens, 1).flatten(1) if tokens else patches.mean(1)
        return image[:, : image.shape[1] * self.image_branch], patches, (int(grid[0]), int(grid[1]))

    def _projection(self, width: int, device: str) -> Tensor | None:
        if self.projection_dim is None or self.projection_dim >= width:
            return None
        return random_projection(width, self.projection_dim, torch.Generator().manual_seed(self.seed)).to(device)

    @torch.no_grad()
    def _rebuild(self, head: Head, memory: Memory, data: ImageSet, device: str) -> None:
        """Chooses the bank's patches anew: from images that the head scores low."""
        scores = [head(*self._embed(batch, device)[:2]).amax(1) for batch in data.batches(self.layers)]
        chosen = data.ids[self._images(torch.cat(scores)).cpu().numpy()]
        size, row = len(memory.owners), 0
        for batch in data.select(chosen).batches(self.layers):
            image, patches, _ = self._embed(batch, device)
            for i, id_ in enumerate(batch.ids.tolist()):
                quota = min(max(1, size // len(chosen)), size - row)
                taken = patches[i, torch.randperm(patches.shape[1], device=patches.device)[:quota]]
                rows = slice(row, row + len(taken))
                memory.bank[rows] = torch.cat([image[i].expand(len(taken), -1), taken], 1)
                memory.owners[rows] = id_
                row = rows.stop
        memory.owners[row:] = -1

    def _images(self, logits: Tensor) -> Tensor:
        """Positions of the images whose patches make the bank, from (N,) logits of all."""
        n, scores = len(logits), logits.sigmoid()
        least = min(n, max(MIN_IMAGES, round(MIN_SHARE * n)))
        n_candidates = max(least, int((minmax(scores) < CANDIDATE).sum()))
        candidates = logits.argsort(stable=True)[:n_candidates]
        n_drawn = max(least, int(self.draw * n_candidates))
        return candidates[torch.randperm(n_candidates, device=scores.device)[:n_drawn]]

    def _loss(self, head: Head, memory: Memory, batch: Batch, projection: Tensor | None, device: str) -> Tensor:
        image, patches, _ = self._embed(batch, device)
        if self.patches_per_image is not None:
            patches = patches[:, torch.randperm(patches.shape[1], device=patches.device)[: self.patches_per_image]]
        clean = head.before(image, patches).flatten(0, 1)  # (B P, D)
        adapted = self._searched(clean, projection)
        distances = self._distances(head, memory, adapted, batch, projection)
        scaled = self._scaled(memory, distances)
        labels = scaled > self.tau
        follow(memory.positive, labels.float().mean())
        unsure = (labels & (scaled < self.tau_sure)).nonzero()[:, 0]
        # the adaptor is linear up to here, so noise on its input is added to its output
        deviation = torch.cat([image.std(0, correction=0), patches.std(0, correction=0).amax(0)])
        noise = torch.randn(len(unsure), len(deviation), device=clean.device) * deviation
        logits = head.logits(clean.index_add(0, unsure, F.linear(noise, head.adaptor.weight)))
        loss = balanced_loss(logits, labels)
        if self.smoothness:
            if not self.smooth_noisy:
                logits = logits.index_copy(0, unsure, head.logits(clean[unsure]))
            loss = loss + self.smoothness * smoothness_loss(logits.sigmoid(), mutual_pairs(adapted))
        return loss

    def _searched(self, before: Tensor, projection: Tensor | None) -> Tensor:
        """(N, d) what neighbours are sought by: adapted features, without gradient, perhaps projected."""
        adapted = F.leaky_relu(before.detach(), SLOPE)
        return adapted if projection is None else adapted @ projection

    @torch.no_grad()
    def _distances(
        self, head: Head, memory: Memory, adapted: Tensor, batch: Batch, projection: Tensor | None
    ) -> Tensor:
        """(B P,) squared distance of each patch of a batch to the bank."""
        there = memory.owners >= 0
        image, patches = memory.bank[there].split(self.widths_, dim=1)
        bank = self._searched(head.before(image, patches.unsqueeze(1)).squeeze(1), projection)
        if self.exclude_own:
            ids = torch.from_numpy(batch.ids).to(adapted.device).repeat_interleave(len(adapted) // len(batch))
            found, _ = NearestNeighbors(bank, owners=memory.owners[there]).query(adapted, owners=ids)
            return found[:, 0].square()
        nearest, _ = NearestNeighbors(bank).query(adapted, k=min(2, len(bank)))
        first, second = nearest[:, 0].square(), nearest[:, -1].square()
        return torch.where(first < COPY, torch.where(second < COPY, 0.0, second), first)

    def _scaled(self, memory: Memory, distances: Tensor) -> Tensor:
        """Distances on the scale of `tau`."""
        if self.scaling == "minmax":
            return minmax(distances)
        low, high = follow(memory.scale, distances.quantile(distances.new_tensor([TYPICAL, EXTREME])))
        return (distances - low) / (high - low) if high > low else torch.zeros_like(distances)
