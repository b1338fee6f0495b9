"""InReaCh: a memory bank of the patches that recur across images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift import nn
from flawsift.detector import Detector, resolve_device
from flawsift.errors import InputError
from flawsift.images import Batch, Ids, ImageSet
from flawsift.maps import SIGMA_PER_PIXEL, embed_patches, smooth
from flawsift.training import UNWATCHED, Watch

# Of a mean map to its transpose, in units of what two unrelated patches have. Textures are below 0.02, laid-out parts
# above 0.2.
ASYMMETRY = 0.1
MAD = 1.4826  # times the median absolute deviation of a Gaussian is its standard deviation


@dataclass(kw_only=True, eq=False)
class InReaCh(Detector):
    """Distance of each patch to its nearest neighbour among the training patches that recur across images.

    Patches are embedded as in PatchCore. `n_seeds` images are drawn; every patch of theirs heads a channel. A patch of
    another image joins the channel of the seed patch with which it is mutually nearest; if it is with patches of
    several seeds, that of the nearest. Channels of fewer than `min_span` patches are dropped, then patches far from the
    mean of their channel, then channels that have become too short. All that is left is nominal; the bank is a
    farthest-first coreset of it. The image score is the maximum of the smoothed map.

    Where the mean patch embedding is not symmetric about the diagonal, parts are laid out: then a patch's row and
    column are two more channels of its embedding.

    With fewer images than seeds, every image is one; with fewer than twice `min_span`, half of them are span enough,
    but at least two. A single image is refused: nothing recurs in it.

    Cost: 2 A N P^2 C flops for A seeds and N images of P patches, and four passes over the features; memory for the
        embedded seeds and at most `max_patches` patches. Scoring as PatchCore.
    Contamination: Resisted: a defect that no other image has joins no channel. One that recurs at least `min_span`
        times, in a seed, is nominal; so is none of a rare normal look. Seeds may themselves be defective: the others
        then carry the bank, so few seeds are a risk.
    Differs from the paper: Seeds are drawn, the code takes the first images, which are clean in its experiments; every
        image is matched with every seed but itself, not with earlier seeds only. A patch that is mutual with some seed
        is not lost because another seed is nearer (it is with assignment="nearest"). A member must be within
        median + `spread` times the scaled median absolute deviation of its channel's distances; the code's rule ("std",
        below `spread` times the standard deviation of the distances) empties every channel whose members scatter
        alike in many dimensions. The image score's smoothing is that of the other detectors (the code: sigma 13 at
        224 px). These three are in the paper preset as published. A coreset (1 in the paper preset); plain, not
        squared, distances; layout is judged, and the position weighed, by embeddings instead of grey values, which
        a detector here does not see; taps are pooled as PatchCore's and not brought to 1024 channels; statistics of
        batch norm stay frozen (the code's follow each image); channels hold the pairs as intended (the code swaps their
        ends).
    Reference: McIntosh & Albu, "Inter-Realization Channels: Unsupervised Anomaly Detection Beyond One-Class
        Classification", ICCV 2023.

    Attributes:
        n_seeds: Images whose patches head the channels.
        min_span: Fewest patches of a channel, the seed's included.
        assignment: "mutual": the nearest of the seed patches that a patch is mutual with; "nearest": the nearest of
            all seeds' patches, if it is mutual with that one.
        spread: Most that a member may be off the mean of its channel, in deviations.
        spread_rule: "mad" or "std": which deviations.
        position: Whether row and column count: "auto", "always" or "never".
        position_weight: What the edge of the image weighs, in root mean square distances of a patch to the mean patch.
        coreset_ratio: Share of the pooled nominal patches kept in the bank; 1 for all.
        max_patches: Most nominal patches in the pool that the coreset is chosen from; None for all.
        projection_dim: Dimension of the random projection for the coreset.
        smoothing: Sigma of the map's Gaussian before its maximum is taken, as a share of the image's edge.
    """

    name: ClassVar[str] = "inreach"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # the authors' code: 13 taps from stride 4 to 32, no coreset, sigma 13 at 224 px
        "paper": {
            "layers": ("stride4", "stride8", "stride16", "stride32"),
            "assignment": "nearest",
            "spread_rule": "std",
            "coreset_ratio": 1.0,
            "max_patches": None,
            "smoothing": 13 / 224,
        },
    }

    n_seeds: int = 10
    min_span: int = 4
    assignment: Literal["mutual", "nearest"] = "mutual"
    spread: float = 5.0
    spread_rule: Literal["mad", "std"] = "mad"
    position: Literal["auto", "always", "never"] = "auto"
    position_weight: float = 1.0
    coreset_ratio: float = 0.05
    max_patches: int | None = 100_000
    projection_dim: int = 128
    smoothing: float = SIGMA_PER_PIXEL

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_seeds", self.n_seeds >= 1, "be at least 1")
        self._require("min_span", self.min_span >= 2, "be at least 2")
        self._require("assignment", self.assignment in ("mutual", "nearest"), "be 'mutual' or 'nearest'")
        self._require("spread", self.spread > 0, "be positive")
        self._require("spread_rule", self.spread_rule in ("mad", "std"), "be 'mad' or 'std'")
        self._require("position", self.position in ("auto", "always", "never"), "be 'auto', 'always' or 'never'")
        self._require("position_weight", self.position_weight > 0, "be positive")
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "be in (0, 1]")
        self._require("max_patches", self.max_patches is None or self.max_patches >= 1, "be at least 1, or None")
        self._require("projection_dim", self.projection_dim >= 1, "be at least 1")
        self._require("smoothing", self.smoothing >= 0, "not be negative")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`; raises InputError where no patch recurs."""
        self._forget()
        if not len(data):
            raise InputError("InReaCh.fit needs at least one image, got an empty set.")
        target = resolve_device(device)
        generator = torch.Generator().manual_seed(self.seed)
        scale = self._position_scale(data)
        seeds = data.ids[torch.randperm(len(data), generator=generator)[: self.n_seeds].numpy()]
        nominal = self._nominal(data, seeds, scale, target)  # (N, P)
        if not nominal.any():
            raise InputError(
                f"No patch recurs in {self._span(len(data))} of these {len(data)} images, so InReaCh has nothing to "
                "learn from. Give more images."
            )
        pool, owners = self._pool(data, nominal, scale, generator)
        projected = nn.project(pool, self.projection_dim, generator).to(target)
        chosen = nn.k_center_greedy(projected, max(1, int(self.coreset_ratio * len(pool))), generator).cpu()
        self.memory_bank_ = pool[chosen]  # (M, C), or (M, C + 2) with position
        self.owner_ = owners[chosen]  # (M,) id of the image that each entry comes from
        self.position_scale_ = scale
        return self

    def _span(self, n_images: int) -> int:
        return max(2, min(self.min_span, n_images // 2))

    def _position_scale(self, data: ImageSet) -> float:
        """What the edge of the image adds to an embedding; 0 where position does not count."""
        if self.position == "never":
            return 0.0
        total, square = torch.zeros(()), torch.zeros(())
        for batch in data.batches(self.layers):
            x = self._embed(batch, 0.0).double()
            total, square = total + x.sum(0), square + x.square().sum()  # (C, h, w), ()
        mean = total / len(data)
        h, w = mean.shape[1:]
        variance = float(square / (len(data) * h * w) - mean.mean((1, 2)).square().sum())
        if self.position == "auto":
            # unrelated patches are twice the variance apart
            asymmetry = float((mean - mean.mT).square().sum()) / (h * w) / 2 if h == w else np.inf
            if asymmetry <= ASYMMETRY * variance:
                return 0.0
        return self.position_weight * max(variance, 0.0) ** 0.5

    def _nominal(self, data: ImageSet, seeds: Ids, scale: float, device: str) -> Tensor:
        """(N, P) whether a patch is nominal: it heads, or belongs to, a channel that is long and tight."""
        heads = torch.cat([patches for _, patches in self._patches(data.select(seeds), scale)]).to(device)  # (A, P, C)
        n_patches = heads.shape[1]
        sums, members = heads.flatten(0, 1).double(), []
        counts = sums.new_ones(len(sums))
        for ids, patches in self._patches(data, scale):
            for id_, own in zip(ids, patches.to(device), strict=True):
                keys = self._channels(own, heads, torch.from_numpy(seeds == id_).to(device))  # (P,)
                sums.index_add_(0, keys[keys >= 0], own[keys >= 0].double())
                counts += torch.bincount(keys[keys >= 0], minlength=len(counts))
                members.append(keys.cpu())
        channels = torch.stack(members)  # (N, P)
        means = (sums / counts[:, None]).float()
        distances, start = torch.empty(channels.shape), 0
        for ids, patches in self._patches(data, scale):
            keys = channels[start : start + len(ids)].clamp_min(0).to(device)
            distances[start : start + len(ids)] = (patches.to(device) - means[keys]).norm(dim=2).cpu()
            start += len(ids)
        own_distances = (heads.flatten(0, 1) - means).norm(dim=1).cpu()
        survives = prune(
            torch.cat([channels.flatten(), torch.arange(len(sums))]).numpy(),
            torch.cat([distances.flatten(), own_distances]).numpy(),
            min_span=self._span(len(data)),
            spread=self.spread,
            rule=self.spread_rule,
        )
        nominal = torch.from_numpy(survives[: channels.numel()]).view_as(channels)
        where = {int(id_): row for row, id_ in enumerate(data.ids)}
        nominal[[where[int(id_)] for id_ in seeds]] |= torch.from_numpy(survives[channels.numel() :]).view(
            -1, n_patches
        )
        return nominal

    def _channels(self, own: Tensor, heads: Tensor, is_own: Tensor) -> Tensor:
        """(P,) channel of each patch of an image, -1 for none: a P + q for patch q of seed a.

        Args:
            own: (P, C).
            heads: (A, P, C).
            is_own: (A,) whether the image is that seed: it does not join itself.
        """
        found = [nn.mutual_nearest(own, head) for head in heads]
        rows, distances, mutual = (torch.stack(part) for part in zip(*found, strict=True))  # each (A, P)
        mutual &= ~is_own[:, None]
        closed = ~mutual if self.assignment == "mutual" else is_own[:, None]
        best = distances.masked_fill(closed, torch.inf).argmin(0, keepdim=True)  # (1, P)
        keys = best * own.shape[0] + rows.gather(0, best)
        return torch.where(mutual.gather(0, best), keys, -1)[0]

    def _pool(self, data: ImageSet, nominal: Tensor, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(R, C) nominal patches that the bank is chosen from, and (R,) ids of their images."""
        rows = nominal.flatten().nonzero()[:, 0]
        if self.max_patches is not None and len(rows) > self.max_patches:
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.max_patches]]
        drawn = torch.zeros_like(nominal)
        drawn.view(-1)[rows] = True
        pool, start = [], 0
        for ids, patches in self._patches(data, scale):
            pool.append(patches[drawn[start : start + len(ids)]])
            start += len(ids)
        return torch.cat(pool), torch.from_numpy(data.ids).repeat_interleave(drawn.sum(1))

    def _patches(self, data: ImageSet, scale: float) -> Iterator[tuple[Ids, Tensor]]:
        """(B,) ids and (B, P, C) patches, in the order of the set."""
        for batch in data.batches(self.layers):
            yield batch.ids, self._embed(batch, scale).flatten(2).transpose(1, 2).contiguous()

    def _maps(self, batch: Batch, device: str) -> Tensor:
        distances, _ = nn.query_grid(self._neighbors(device), self._embed(batch, self.position_scale_).to(device))
        return smooth(distances[..., 0], self.smoothing * distances.shape[2])

    def _expected(self, batch: Batch, device: str) -> Tensor:
        _, entries = nn.query_grid(self._neighbors(device), self._embed(batch, self.position_scale_).to(device))
        found = self.memory_bank_.to(device)[entries[..., 0]].permute(0, 3, 1, 2)
        return found[:, :-2] if self.position_scale_ else found  # what is seen, not where

    def _neighbors(self, device: str) -> nn.NearestNeighbors:
        """The search structure for a device. Made once, never saved."""
        return nn.device_search(vars(self).setdefault("_searches", {}), self.memory_bank_, device)

    def _embed(self, batch: Batch, scale: float) -> Tensor:
        """(B, C, h, w), or (B, C + 2, h, w) with rows and columns when the scale is not 0."""
        x = embed_patches([batch.features[layer] for layer in self.layers])
        if not scale:
            return x
        b, _, h, w = x.shape
        places = torch.stack(torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij"))
        return torch.cat([x, scale * places.expand(b, -1, -1, -1)], 1)


def prune(
    keys: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
    *,
    min_span: int,
    spread: float,
    rule: Literal["mad", "std"],
) -> npt.NDArray[np.bool_]:
    """Which members survive: those near the mean of a channel that is long enough before and after the others go.

    Args:
        keys: (E,) channel of each member, -1 for none.
        distances: (E,) of each member to the mean of its channel.
        min_span: Fewest members of a channel.
        spread: Most that a member may be off, in deviations.
        rule: "mad": at most `spread` scaled median absolute deviations above the median distance. "std": less than
            `spread` standard deviations of the distances from the mean of the channel.

    Returns:
        (E,) bool.
    """
    n_keys = int(keys.max(initial=-1)) + 1

    def long_enough(alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return alive & (np.bincount(keys[alive], minlength=n_keys + 1)[keys] >= min_span)

    alive = long_enough(keys >= 0)
    k, d = keys[alive], distances[alive].astype(np.float64)
    if rule == "mad":
        center = _medians(k, d, n_keys)[k]
        tight = d <= center + spread * MAD * _medians(k, np.abs(d - center), n_keys)[k]
    else:
        counts = np.maximum(np.bincount(k, minlength=n_keys), 1)
        mean = np.bincount(k, d, n_keys) / counts
        tight = d < spread * np.sqrt(np.bincount(k, (d - mean[k]) ** 2, n_keys) / counts)[k]
    alive[alive] = tight
    return long_enough(alive)


def _medians(keys: npt.NDArray[np.int64], values: npt.NDArray[np.float64], n_keys: int) -> npt.NDArray[np.float64]:
    """(n_keys,) median of the values of each key; 0 for keys that are not there."""
    counts = np.bincount(keys, minlength=n_keys)
    ordered = np.append(values[np.lexsort((values, keys))], 0.0)
    starts = np.cumsum(counts) - counts
    middle = (
        ordered[starts + np.maximum(counts - 1, 0) // 2] + ordered[np.minimum(starts + counts // 2, len(values))]
    ) / 2
    return np.where(counts > 0, middle, 0.0)
