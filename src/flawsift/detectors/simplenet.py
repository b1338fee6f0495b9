"""SimpleNet: a discriminator between the features of patches and the same features with noise on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.maps import on_one_grid
from flawsift.detectors.parts.scaling import channel_statistics, standardized
from flawsift.detectors.parts.training import (
    UNWATCHED,
    Recipe,
    Watch,
    restored,
    seeded,
    train,
    weights_of,
)
from flawsift.features.devices import resolve_device

# The published code's numbers that section 4.2 leaves to it.
SLOPE = 0.2  # of the leaky ReLU
ADAPTOR_DECAY = 0.01  # AdamW's default; the only brake on an adaptor that outgrows the noise
DISCRIMINATOR_DECAY = 1e-5  # Adam's: a penalty in the loss


class Net(nn.Module):
    """The adaptor and the discriminator, whose output is high for normal patches."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.adaptor = nn.Linear(embedding_dim, embedding_dim)
        self.discriminator = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden_dim, 1, bias=False),
        )
        for layer in (self.adaptor, self.discriminator[0], self.discriminator[3]):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """(R,) how normal (R, D) patches are."""
        normality: Tensor = self.discriminator(self.adaptor(patches)).squeeze(1)
        return normality

    def loss(self, patches: Tensor, noise: float, margin: float) -> Tensor:
        """Equation 6 on (R, D) patches: normal ones above the margin, noisy ones below minus the margin."""
        adapted = self.adaptor(patches)
        noisy = adapted + noise * torch.randn_like(adapted)
        # one batch: BatchNorm must see both kinds together, else it could tell them apart by their statistics
        of_normal, of_noisy = self.discriminator(torch.cat([adapted, noisy])).squeeze(1).chunk(2)
        return F.relu(margin - of_normal).mean() + F.relu(margin + of_noisy).mean()


@dataclass(kw_only=True, eq=False)
class SimpleNet(Detector):
    """Discriminator trained to tell patches from the same patches with Gaussian noise on their features.

    A patch is its 3 x 3 neighbourhood in each tap, averaged down to `embedding_dim` numbers; a linear adaptor turns it
    into q, and D(q) is pushed above the margin, D(q + noise) below minus the margin. The map is -D(q), the image score
    its maximum.

    Cost: Per step, the embedding of `batch_size` images and `patches` rows through matrices of D x D and D x
        `hidden_dim`. With the embedded backbone at 256 px and one core, a fit takes about 30 s whatever the size of the
        set, and prediction 25 ms per image; the budget preset a third of that. The state does not grow with the set.
    Contamination: Sensitive. Defective patches are trained as normal ones, against noise around them: a fifth of
        defective images cost 0.05 to 0.09 of image AUROC on the two sets that were looked at.
    Differs from the paper: Noise is in units of the embedding's standard deviation per dimension (`standardize`); the
        published 0.015 assumes pooled taps of a WideResNet-50. A step sees `patches` random patches of its images, not
        all. Training is counted in steps, not epochs, so small sets get as many. Weights are averaged over the last
        half of the steps (`average`), as accuracy goes up and down from step to step; the published code keeps those of
        the best test result. In the default the Gaussian on maps scales with the input (`sigma`). No centre crop. On a
        GPU that has bfloat16, the forward pass of a step is in it, the authors' in float32.
    Localization: Coarser than that of distances. Where features lie far from all that it was trained on, the
        discriminator grows in directions that nothing has taught it, so a patch at the edge of a defect may score as
        high as one inside (in 43 % of the pairs; by PatchCore in 20 %). Dark spots on stripes at 64 px, read by the
        `tiny` backbone, AUPRO: 0.73 by default and 0.78 with 4000 steps, where PaDiM has 0.80 and PatchCore 0.84; at
        256 px with the embedded network, where a spot is many patches, all have 0.995 or more.
    Reference: Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023,
        arXiv 2303.15140, section 3.

    Attributes:
        embedding_dim: Length D of a patch's embedding.
        hidden_dim: Width of the discriminator.
        noise: Standard deviation of the noise, in those of the embedding when it is standardised.
        margin: Of the hinge loss.
        steps: Gradient steps.
        batch_size: Images whose patches a step sees.
        patches: Most patches that a step sees; None for all of its images.
        adaptor_rate: Learning rate of the adaptor.
        discriminator_rate: Learning rate of the discriminator.
        average: Share of the steps, the last ones, over which weights are averaged; 0 takes those of the last step.
        standardize: Whether embeddings are brought to mean 0 and standard deviation 1 in each dimension first.
        sigma: Of the Gaussian on maps, in pixels of the network's input; None takes 4 px of 256, scaled with its size.
        statistics_: (2, D) mean and standard deviation by which embeddings are standardised.
        weights_: Of adaptor and discriminator.
    """

    name: ClassVar[str] = "simplenet"
    leaves_out_patches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "budget": {"embedding_dim": 192, "hidden_dim": 128, "steps": 300},
        # section 4.2 and the published run script: 160 epochs over 242 images (MVTec AD's mean) in batches of 8
        "paper": {
            "embedding_dim": 1536,
            "hidden_dim": 1024,
            "noise": 0.015,
            "margin": 0.5,
            "steps": 160 * (242 // 8),
            "batch_size": 8,
            "patches": None,
            "adaptor_rate": 1e-4,
            "discriminator_rate": 2e-4,
            "average": 0.0,
            "standardize": False,
            "sigma": 4.0,  # at 288 px
        },
    }

    embedding_dim: int = 384
    hidden_dim: int = 256
    noise: float = 0.5
    margin: float = 0.5
    steps: int = 400
    batch_size: int = 4
    patches: int | None = 2048
    adaptor_rate: float = 1e-4
    discriminator_rate: float = 2e-4
    average: float = 0.5
    standardize: bool = True
    sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in ("embedding_dim", "hidden_dim", "steps", "batch_size"):
            self._require(parameter, getattr(self, parameter) >= 1, "be at least 1")
        for parameter in ("noise", "margin", "adaptor_rate", "discriminator_rate"):
            self._require(parameter, getattr(self, parameter) > 0, "be positive")
        self._require("sigma", self.sigma is None or self.sigma >= 0, "not be negative")
        self._require("average", 0 <= self.average <= 1, "be in [0, 1]")
        self._require("patches", self.patches is None or self.patches >= 1, "be at least 1, or None")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        self.statistics_ = channel_statistics(data, self.layers, lambda batch: {"": self._embed(batch)})[""]
        if not self.standardize:
            self.statistics_ = torch.stack([torch.zeros_like(row) + one for one, row in enumerate(self.statistics_)])
        net = self._build().to(target)
        mean = AveragedModel(net, use_buffers=True)
        first = self.steps - max(1, int(self.average * self.steps))

        def loss_of(batch: Batch, step: int) -> Tensor:
            if step > first:
                mean.update_parameters(net)  # after the step before; after the last one below
            patches = self._patches(batch)
            accepted = batch.accepted(*self._embed(batch).shape[2:])
            if accepted is not None and accepted.any():  # a batch rejected as a whole is learned from as it is
                patches = patches[accepted.flatten()]
            if self.patches is not None:
                patches = patches[torch.randperm(len(patches))[: self.patches]]
            loss = net.loss(patches.to(target), self.noise, self.margin)
            # Adam's own weight decay adds its gradient; one AdamW for both would decay outside of Adam's scaling
            penalty = torch.stack([p.square().sum() for p in net.discriminator.parameters()]).sum()
            return loss + DISCRIMINATOR_DECAY / 2 * penalty

        adaptor = {"params": net.adaptor.parameters(), "lr": self.adaptor_rate, "weight_decay": ADAPTOR_DECAY}
        discriminator = {"params": net.discriminator.parameters(), "lr": self.discriminator_rate, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([adaptor, discriminator], fused=True)
        recipe = Recipe(steps=self.steps, batch_size=self.batch_size, seed=self.seed)
        both = nn.ModuleList([net, mean])  # a checkpoint holds the mean so far, too
        train(both, optimizer, data, self.layers, loss_of, recipe, device=target, watch=watch)
        mean.update_parameters(net)
        self.weights_ = weights_of(mean.module)
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        normal: Tensor = self._net(device)(self._patches(batch).to(device))
        return -normal.view(len(batch), *self._embed(batch).shape[2:])

    def _map_sigma(self) -> float | None:
        return self.sigma

    def _build(self) -> Net:
        with seeded(self.seed, "cpu"):
            return Net(self.embedding_dim, self.hidden_dim)

    def _net(self, device: str) -> Net:
        return self._cached("net", device, lambda: restored(self.weights_, self._build(), device))

    def _patches(self, batch: Batch) -> Tensor:
        """(B h w, D) standardised embeddings."""
        return standardized(self._embed(batch), self.statistics_).flatten(2).transpose(1, 2).flatten(0, 1)

    def _embed(self, batch: Batch) -> Tensor:
        """(B, D, h, w) embeddings on the largest grid; models that look at one batch share them.

        The published code brings 9 C numbers to the largest grid and averages then; averaging first is the same, as
        both are linear and act on different axes.
        """
        key = (self.name, self.layers, self.embedding_dim)
        if key not in batch.memo:
            taps = [self._pooled(batch.features[layer]) for layer in self.layers]
            batch.memo[key] = _averaged(torch.cat(on_one_grid(taps), 1), self.embedding_dim)
        embedding: Tensor = batch.memo[key]
        return embedding

    def _pooled(self, tap: Tensor) -> Tensor:
        """(B, D, h, w): 3 x 3 neighbourhoods of (B, C, h, w), channel by channel, averaged down to D numbers."""
        # (B, 9 C, h, w), zeros beyond the border
        around = F.unfold(tap, 3, padding=1).view(len(tap), -1, *tap.shape[2:])
        return _averaged(around, self.embedding_dim)


def _averaged(x: Tensor, size: int) -> Tensor:
    """(B, K, h, w) to (B, size, h, w): means of neighbouring channels, as adaptive pooling takes them."""
    rows = x.flatten(2).transpose(1, 2)  # (B, h w, K)
    averaged: Tensor = F.adaptive_avg_pool1d(rows, size)
    return averaged.transpose(1, 2).reshape(len(x), size, *x.shape[2:])
