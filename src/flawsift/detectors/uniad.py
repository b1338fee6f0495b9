"""UniAD: a transformer that reconstructs each patch without attention to it or its neighbours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import training
from flawsift.detectors.parts.maps import upsample
from flawsift.detectors.parts.networks import AttentionLayer
from flawsift.detectors.parts.scaling import channel_statistics, standardized
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device
from flawsift.types import as_shape

HEADS, WEIGHT_DECAY, CLIP_NORM = 8, 1e-4, 0.1  # section 4.1; weight decay on every parameter, as in the authors' code
DROP_AT, DROP_TO = 0.8, 0.1  # the paper divides the learning rate by ten at epoch 800 of 1000
FINE = 16  # cells per patch of the map whose averages over a patch's width make the image score: the paper's 16 px


def neighbour_mask(h: int, w: int, share: float) -> Tensor:
    """(P, P) bool, True where a query (row) may not see a key (column): in a window about the query.

    The window's sides are the largest odd numbers of patches within `share` of the grid's: 7 of 14 for a half. They
    are smaller than the grid's, so that no query loses all its keys.
    """
    near = []
    for side in (h, w):
        reach = max(0, int(share * side) - 1) // 2
        at = torch.arange(side)
        near.append((at[:, None] - at).abs() <= reach)
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(h * w, h * w)


def jittered(features: Tensor, scale: float) -> Tensor:
    """(B, C, h, w) with Gaussian noise on each patch, on average `scale` times as long as the patch is.

    The paper's alpha is scale * sqrt(C): the same noise for any number of channels.
    """
    length = features.norm(dim=1, keepdim=True)
    jittered: Tensor = features + torch.randn_like(features) * (scale / features.shape[1] ** 0.5 * length)
    return jittered


class Transformer(nn.Module):
    """From (B, C, h, w) features, with noise, to their reconstruction.

    The encoder reads the features. Each decoder layer starts afresh from a table of queries of its own, looks at the
    encoder's output and then at that of the layer before, so that features come in as keys and values only.
    """

    mask: Tensor

    def __init__(self, settings: "UniAD", channels: int, h: int, w: int) -> None:
        super().__init__()
        width, n_decoder = settings.width, settings.n_decoder
        layer = partial(AttentionLayer, width, HEADS, settings.dropout, settings.attention_dropout)
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.rows, self.columns = (nn.Parameter(torch.empty(side, width // 2)) for side in (h, w))
        self.encoder = nn.ModuleList(layer(n_attentions=1) for _ in range(settings.n_encoder))
        self.decoder = nn.ModuleList(layer(n_attentions=2) for _ in range(n_decoder))
        self.queries = nn.ParameterList(nn.Parameter(torch.empty(h * w, width)) for _ in range(n_decoder))
        self.norm = nn.LayerNorm(width)
        # no state, since it follows from the grid
        self.register_buffer("mask", neighbour_mask(h, w, settings.window), persistent=False)
        for table in (self.rows, self.columns):
            nn.init.uniform_(table)
        for query in self.queries:
            nn.init.normal_(query)
        for name, value in self.named_parameters():
            if name.endswith("weight") and value.dim() == 2:
                nn.init.xavier_uniform_(value)
            elif name.endswith("bias"):
                nn.init.zeros_(value)

    def forward(self, features: Tensor) -> Tensor:
        b, _, h, w = features.shape
        places = [self.columns.expand(h, -1, -1), self.rows.unsqueeze(1).expand(-1, w, -1)]
        place = torch.cat(places, 2).flatten(0, 1)  # (P, D)
        memory = self.enter(features.flatten(2).transpose(1, 2))  # (B, P, D)
        for layer in self.encoder:
            memory = layer(memory, [memory], place, self.mask)
        x = memory
        for layer, query in zip(self.decoder, self.queries, strict=True):
            x = layer(query.expand(b, -1, -1), [memory, x], place, self.mask)
        reconstruction: Tensor = self.leave(self.norm(x)).transpose(1, 2).reshape(b, -1, h, w)
        return reconstruction


@dataclass(kw_only=True, eq=False)
class UniAD(Detector):
    """Distance of each patch to its reconstruction by a transformer from patches that are not its neighbours.

    Taps are brought to one grid and concatenated. The transformer is trained to undo noise on them; in every attention,
    a patch and its neighbours are hidden from it, and its decoder layers start from learned queries, so that copying
    does not pay. The map is the Euclidean distance between features and reconstruction, the image score the maximum of
    its averages over the width of a patch. One model can serve several products: put their images into one set.

    Cost: `epochs` passes; a step is quadratic in the number of patches. All embedded images are kept in memory while it
        trains: 45 kB each by default, 0.2 MB in the paper preset. 11 ms of one core per image and epoch by default.
    Contamination: Mild. Noise and hidden neighbours leave the common patterns; a defect that recurs is one of them.
    Differs from the paper: the default is narrower (128 channels, 2 + 2 layers), looks at patches of 32 px and trains
        for a tenth of the epochs at ten times the rate; features are standardised per channel (the paper's rate assumes
        the scale of its network) and averaged over a patch instead of picked at its place, which the paper preset does;
        no dropout on attention weights, for half the time. With few epochs all presets are worse than published. Maps
        are smoothed like those of all detectors, and upsampled without aligned corners. Always the last step, never
        the best on a test set. On a GPU that has bfloat16, the forward pass of a step is in it, the authors' in
        float32.
    Reference: You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, arXiv 2206.03687,
        sections 3.2 to 3.4 and 4.1.

    Attributes:
        patch: Edge length of a patch in pixels of the network's input.
        pooling: "average" over a patch, or "subsample" bilinearly with aligned corners.
        standardize: Bring each channel to mean 0 and standard deviation 1 first.
        width: Channels of the transformer.
        n_encoder: Encoder layers.
        n_decoder: Decoder layers.
        dropout: On what a layer adds to its input, and inside its feed-forward part.
        attention_dropout: On attention weights.
        window: Sides of the hidden neighbourhood as a share of the grid's.
        jitter: Length of the noise over that of a patch's features.
        epochs: Passes over the images.
        batch_size: Images in a step.
        learning_rate: Until four fifths of the steps; a tenth of it after that.
    """

    name: ClassVar[str] = "uniad"
    leaves_out_patches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "budget": {},  # the default: two minutes for 200 images on two cores
        # section 4.1; batches of 8 on each of 8 GPUs; alpha = 20 at the 272 channels of EfficientNet-B4's four taps
        "paper": {
            "layers": ("stride2", "stride4", "stride8", "stride16"),
            "patch": 16,
            "pooling": "subsample",
            "standardize": False,
            "width": 256,
            "n_encoder": 4,
            "n_decoder": 4,
            "attention_dropout": 0.1,
            "jitter": 20 / 272**0.5,
            "epochs": 1000,
            "batch_size": 64,
            "learning_rate": 1e-4,
        },
    }

    layers: Sequence[str] = ("stride4", "stride8", "stride16")
    patch: int = 32
    pooling: Literal["average", "subsample"] = "average"
    standardize: bool = True
    width: int = 128
    n_encoder: int = 2
    n_decoder: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.0
    window: float = 0.5
    jitter: float = 1.2
    epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("pooling", self.pooling in ("average", "subsample"), "be 'average' or 'subsample'")
        for count in ("patch", "width", "n_decoder", "epochs", "batch_size"):
            self._require(count, getattr(self, count) >= 1, "be at least 1")
        self._require("width", self.width % HEADS == 0, f"be a multiple of {HEADS}")
        for share in ("dropout", "attention_dropout", "window"):
            self._require(share, 0 <= getattr(self, share) < 1, "be in [0, 1)")
        for amount in ("n_encoder", "jitter"):
            self._require(amount, getattr(self, amount) >= 0, "not be negative")
        self._require("learning_rate", self.learning_rate > 0, "be positive")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: training.Watch = training.UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        if self.standardize:
            self.statistics_ = channel_statistics(data, self.layers)
        embedded: dict[int, Tensor] = {}
        for part in data.batches(self.layers):
            embedded |= zip(part.ids.tolist(), self._embed(part), strict=True)
        if not embedded:
            raise InputError("UniAD.fit needs at least one image, got an empty set.")
        self.shape_ = list(next(iter(embedded.values())).shape)  # C, h, w
        if self.shape_[1:] == [1, 1]:
            raise InputError(f"UniAD.fit needs at least 2 x 2 patches of {self.patch} px. Take a smaller UniAD.patch.")
        with training.seeded(self.seed, target):
            module = self._build().to(target)
        optimizer = torch.optim.AdamW(module.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        steps = self.epochs * (len(data) // min(self.batch_size, len(data)))
        recipe = training.Recipe(
            steps=steps,
            batch_size=self.batch_size,
            seed=self.seed,
            clip_norm=CLIP_NORM,
            schedule=lambda step: 1.0 if step < DROP_AT * steps else DROP_TO,
        )

        def loss_of(batch: Batch, step: int) -> Tensor:
            clean = torch.stack([embedded[int(i)] for i in batch.ids]).to(target)
            restored, clean = training.without_rejected([module(jittered(clean, self.jitter)), clean], batch)
            return F.mse_loss(restored.float(), clean)

        training.train(module.train(), optimizer, data, (), loss_of, recipe, device=target, watch=watch)
        self.weights_ = training.weights_of(module)
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        features, reconstruction = self._reconstruct(batch, device)
        distances: Tensor = (reconstruction - features).norm(dim=1)
        return distances

    def _image_scores(self, maps: Tensor) -> Tensor:
        fine = upsample(maps, (FINE * maps.shape[1], FINE * maps.shape[2]))
        return F.avg_pool2d(F.avg_pool2d(fine[:, None], (FINE, 1), 1), (1, FINE), 1).amax((1, 2, 3))

    def _expected(self, batch: Batch, device: str) -> Tensor:
        _, reconstruction = self._reconstruct(batch, device)
        if self.standardize:  # each sub-model by statistics of its own, which would pass for a divergence
            statistics = torch.cat([self.statistics_[layer] for layer in self.layers], 1).to(device)
            reconstruction = reconstruction * statistics[1, :, None, None] + statistics[0, :, None, None]
        return reconstruction

    def _reconstruct(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) features and their reconstruction."""
        clean = self._embed(batch).to(device)
        if list(clean.shape[1:]) != self.shape_:
            raise InputError(f"UniAD was fitted on features of {self.shape_}, these have {list(clean.shape[1:])}.")
        return clean, self._net(device)(clean)

    def _embed(self, batch: Batch) -> Tensor:
        """(B, C, h, w): all taps at the grid of patches."""
        height, width = as_shape(batch.size)
        grid = max(1, height // self.patch), max(1, width // self.patch)
        taps = [batch.features[layer] for layer in self.layers]
        if self.standardize:
            taps = list(map(standardized, taps, (self.statistics_[layer] for layer in self.layers)))
        if self.pooling == "average":
            return torch.cat([F.adaptive_avg_pool2d(tap, grid) for tap in taps], 1)
        return torch.cat([F.interpolate(tap, grid, mode="bilinear", align_corners=True) for tap in taps], 1)

    def _build(self) -> Transformer:
        return Transformer(self, *self.shape_)

    def _net(self, device: str) -> Transformer:
        def make() -> Transformer:
            with training.seeded(self.seed, "cpu"):  # initial weights, which are not used, are drawn all the same
                return training.restored(self.weights_, self._build(), device)

        return self._cached("net", device, make)
