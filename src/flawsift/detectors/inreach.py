"""InReaCh: a memory bank of the patches that recur across images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import coreset
from flawsift.detectors.parts.maps import SIGMA_PER_PIXEL, embed_batch, smooth
from flawsift.detectors.parts.neighbors import NearestNeighbors, mutual_nearest, query_grid
from flawsift.detectors.parts.robust import MAD_TO_SIGMA, group_medians
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device
from flawsift.types import Ids

# From here on a layout counts: how far the mean map is from its transpose, where two unrelated patches are 1 apart. On
# three kinds of real photographs of parts it was 0.26 at least.
ASYMMETRY = 0.1
PROJECTION_DIM = 128  # of the random projection for the coreset, as PatchCore's


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(kw_only=True, eq=False)
class InReaCh(Detector):
    """Distance of each patch to its nearest neighbour among the training patches that recur across images.

    Patches are embedded as in PatchCore. Every patch of `n_seeds` drawn images heads a channel. A patch of another
    image joins the channel of a seed patch to which it is mutually nearest: of several, the nearest. Channels of fewer
    than `min_span` patches are dropped, then patches far from the mean of their channel, then channels that became too
    short. The rest is nominal, and the bank a farthest-first coreset of it. The image score is the maximum of the
    smoothed map. Where the mean embedding is not symmetric about the diagonal, parts are laid out: then a patch's row
    and column are two more channels of its embedding.

    Few images: seeds are as many as leave twice the span of images to a channel on average, but at least 2; the span is
    half of the images where that is less than `min_span`, but at least 2. So a single image is refused.

    Cost: 2 A N P^2 C flops for A seeds and N images of P patches, in four passes over the features. Memory: the seeds
        and at most `max_patches` patches. Scoring as PatchCore.
    Contamination: Resisted: what only one image has joins no channel, be it a defect or a rare normal look. A defect
        is nominal if it recurs `min_span` times and a seed has it. Where a seed is defective, the other seeds remain.
    Differs from the paper: Seeds are drawn (its code takes the first images, which are clean in its experiments) and
        matched with every image but themselves, not only with later ones. Three things are as published in the paper
        preset only: a patch whose nearest seed patch is not mutual is lost ("nearest"); a member must be within
        `spread` standard deviations of the distances ("std"), which empties channels whose members scatter alike in
        many dimensions, where "mad" keeps those within median + `spread` scaled median absolute deviations; sigma is
        13 of 224 px. Ours alone: a coreset (of all patches in the paper preset); plain, not squared, distances; layout
        is measured on embeddings, as grey values are not read here, and is added in their units (the code's rows and
        columns run to 5, whatever the features are); embeddings are PatchCore's, of fewer taps; fewer seeds of few
        images; maps are smoothed once more on the image grid, as all detectors' are; batch norm is frozen (the code's
        follows each image); pairs are as intended (the code swaps their ends).
    Reference: McIntosh & Albu, "Inter-Realization Channels: Unsupervised Anomaly Detection Beyond One-Class
        Classification", ICCV 2023.

    Attributes:
        n_seeds: Most images whose patches head channels (A).
        min_span: Fewest patches of a channel, the seed's included.
        assignment: Whether a patch belongs to the nearest of the seed patches that it is mutual with ("mutual"), or to
            the nearest of all, if it is mutual with that one ("nearest").
        spread: Most that a member may be off, in deviations.
        spread_rule: Which deviations, "mad" or "std".
        position: Whether row and column count: "auto", "always" or "never".
        position_weight: What the image's edge weighs, in root mean square distances of a patch from the mean patch.
        coreset_ratio: Share of the pooled nominal patches kept in the bank; 1 for all.
        max_patches: Most nominal patches pooled; None for all.
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
        self._require("smoothing", self.smoothing >= 0, "not be negative")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`; raises InputError where no patch recurs."""
        self._forget()
        if not len(data):
            raise InputError("InReaCh.fit needs at least one image, got an empty set.")
        target = resolve_device(device)
        generator = torch.Generator().manual_seed(self.seed)
        scale = self._position_scale(data)
        span = max(2, min(self.min_span, len(data) // 2))
        n_seeds = min(self.n_seeds, max(2, len(data) // (2 * span)))
        seeds = data.ids[torch.randperm(len(data), generator=generator)[:n_seeds].numpy()]
        nominal = self._nominal(data, seeds, span, scale, target)  # (N, P)
        if not nominal.any():
            raise InputError(
                f"InReaCh.fit found no patch that recurs in {span} of these {len(data)} images. Give more images."
            )
        pool, owners = self._pool(data, nominal, scale, generator)
        projected = coreset.project(pool, PROJECTION_DIM, generator).to(target)
        chosen = coreset.k_center_greedy(projected, max(1, int(self.coreset_ratio * len(pool))), generator).cpu()
        self.memory_bank_ = pool[chosen]  # (M, C), or (M, C + 2) with position
        self.owner_ = owners[chosen]  # (M,) id of the image that each entry comes from
        self.position_scale_ = scale
        return self

    def _position_scale(self, data: ImageSet) -> float:
        """What the image's edge adds to an embedding; 0 where position does not count."""
        total, square = torch.zeros(()), torch.zeros(())
        for batch in data.batches(self.layers):
            x = self._embed(batch, 0.0).double()
            total, square = total + x.sum(0), square + x.square().sum()  # (C, h, w), ()
        mean = total / len(data)
        h, w = mean.shape[1:]
        variance = float(square / (len(data) * h * w) - mean.mean((1, 2)).square().sum())
        counts = self.position == "always"
        if self.position == "auto" and h == w:
            asymmetry = float((mean - mean.mT).square().sum()) / (2 * h * w)
            counts = asymmetry > (ASYMMETRY + 1 / len(data)) * variance  # 1 / N is what chance leaves of it
        return float(self.position_weight * max(variance, 0.0) ** 0.5) if counts else 0.0

    def _nominal(self, data: ImageSet, seeds: Ids, span: int, scale: float, device: str) -> Tensor:
        """(N, P) whether a patch is nominal: it heads, or belongs to, a channel that is long and tight."""
        heads = torch.cat([patches for _, patches in self._patches(data.select(seeds), scale)]).to(device)  # (A, P, C)
        sums, joined = heads.flatten(0, 1).double(), []
        counts = sums.new_ones(len(sums))
        for ids, patches in self._patches(data, scale):
            for id_, own in zip(ids, patches.to(device), strict=True):
                keys = self._channels(own, heads, torch.from_numpy(seeds == id_).to(device))  # (P,)
                sums.index_add_(0, keys[keys >= 0], own[keys >= 0].double())
                counts += torch.bincount(keys[keys >= 0], minlength=len(counts))
                joined.append(keys.cpu())
        means = (sums / counts[:, None]).float()
        channels, distances, start = torch.stack(joined), [], 0  # (N, P)
        for ids, patches in self._patches(data, scale):
            keys = channels[start : start + len(ids)].clamp_min(0).to(device)
            distances.append((patches.to(device) - means[keys]).norm(dim=2).flatten().cpu())
            start += len(ids)
        distances.append((heads.flatten(0, 1) - means).norm(dim=1).cpu())  # last, the heads: each in its own channel
        keys = torch.cat([channels.flatten(), torch.arange(len(means))])
        survives = torch.from_numpy(
            prune(keys.numpy(), torch.cat(distances).numpy(), span, self.spread, self.spread_rule)
        )
        nominal = survives[: channels.numel()].view_as(channels)
        row_of = {int(id_): row for row, id_ in enumerate(data.ids)}
        nominal[[row_of[int(id_)] for id_ in seeds]] |= survives[channels.numel() :].view(len(seeds), -1)
        return nominal

    def _channels(self, own: Tensor, heads: Tensor, is_own: Tensor) -> Tensor:
        """(P,) channel of each of an image's patches (P, C), -1 for none: a P + q for patch q of seed a.

        `heads` are the seeds' patches (A, P, C); `is_own` (A,) is whether the image is that seed, which it cannot join.
        """
        matches = [mutual_nearest(own, head) for head in heads]
        rows, distances, mutual = (torch.stack(part) for part in zip(*matches, strict=True))  # each (A, P)
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
        distances, _ = self._search(batch, device)
        return smooth(distances[..., 0], self.smoothing * distances.shape[2])

    def _expected(self, batch: Batch, device: str) -> Tensor:
        _, entries = self._search(batch, device)
        nearest = self.memory_bank_.to(device)[entries[..., 0]].permute(0, 3, 1, 2)
        return nearest[:, :-2] if self.position_scale_ else nearest  # the embedding without its position

    def _search(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        """(B, h, w, 1) distances and entries of the bank."""
        search = self._cached("search", device, lambda: NearestNeighbors(self.memory_bank_.to(device)))
        return query_grid(search, self._embed(batch, self.position_scale_).to(device))

    def _embed(self, batch: Batch, scale: float) -> Tensor:
        """(B, C, h, w), or (B, C + 2, h, w) with rows and columns when the scale is not 0."""
        x = embed_batch(batch, self.layers)
        if not scale:
            return x
        b, _, h, w = x.shape
        places = torch.stack(torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij"))
        return torch.cat([x, scale * places.expand(b, -1, -1, -1)], 1)


def prune(keys: Ints, distances: Floats, min_span: int, spread: float, rule: Literal["mad", "std"]) -> Bools:
    """(E,) members that survive: those near the mean of a channel that is long enough before and after others go.

    Args:
        keys: (E,) channel of each member, -1 for none.
        distances: (E,) of each member to the mean of its channel.
        min_span: Fewest members of a channel.
        spread: Most deviations: above the channel's median distance ("mad"), or as such, excluded ("std").
        rule: Whether a deviation is the scaled median absolute one or the standard deviation of the distances.
    """
    n_keys = int(keys.max(initial=-1)) + 1

    def long_enough(alive: Bools) -> Bools:  # the last bin, which -1 finds, is of no channel: 0
        return alive & (np.bincount(keys[alive], minlength=n_keys + 1)[keys] >= min_span)

    alive = long_enough(keys >= 0)
    k, d = keys[alive], distances[alive].astype(np.float64)
    if rule == "mad":
        median = group_medians(k, d, n_keys)[k]
        tight = d <= median + spread * MAD_TO_SIGMA * group_medians(k, np.abs(d - median), n_keys)[k]
    else:
        counts = np.maximum(np.bincount(k, minlength=n_keys), 1)
        mean = np.bincount(k, d, n_keys) / counts
        tight = d < spread * np.sqrt(np.bincount(k, (d - mean[k]) ** 2, n_keys) / counts)[k]
    alive[alive] = tight
    return long_enough(alive)
