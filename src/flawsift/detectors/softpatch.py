"""SoftPatch: a PatchCore whose bank leaves out the most outlying patches and weights the others by outlier factor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import coreset
from flawsift.detectors.parts.maps import embed_batch
from flawsift.detectors.parts.neighbors import NearestNeighbors, local_outlier_factor, nearest_others, query_grid
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device

RIDGE = 0.01  # on the covariances of "gaussian": the authors' constant, here in units of the mean variance
CHUNK = 64  # covariances at a time: 8 MB of 128 x 128


@dataclass(kw_only=True, eq=False)
class SoftPatch(Detector):
    """Distance of each patch to its nearest neighbour in a denoised coreset, times that neighbour's outlier factor.

    Patches are embedded as in PatchCore. Each is compared with the patches at the same position of the other images,
    on a random projection, which gives its outlier factor (about 1 for inliers). The `outlier_share` of all patches
    with the highest factors is removed, the bank is a farthest-first coreset of the others, and each entry keeps its
    factor w. The map is w_m |x - m| for the nearest entry m, the image score its maximum: a patch that matches an
    outlying entry scores higher.

    With fewer than 2 `lof_neighbors` + 1 images half of the others are the neighbourhood: with all of them an outlier
    would be every patch's neighbour, and no patch be outlying. A single image has nothing to be compared with, so it
    is used whole; two are equally far from each other.

    Cost: That of PatchCore, and the outlier factors: 2 P n^2 C flops for n images at each of P positions. `max_patches`
        bounds both by a draw of images at each position.
    Contamination: Resisted as long as a defect is rare at its position: an outlying patch is out of the bank. More
        than `lof_neighbors` alike defects at one position are inliers to each other, and stay. Where parts lie
        anyhow, a position has no meaning of its own and its patches scatter; the factors then say less.
        `outlier_share` is removed from a clean set, too, rare normal looks first.
    Differs from the paper: Its code draws the first entry of the coreset from the removed patches, too; here none of
        them can enter, and the factors are clipped at `max_weight` (None in the paper preset), since copies of an image
        make those of their neighbours explode. The default has plain distances, as the paper writes them; the paper
        preset squared ones, as the authors' code has them (`squared`): w on these is sqrt(w) on plain ones, and a map
        of squares is another one once it is smoothed. "nearest" and "gaussian" give 1 + v / median(v): the code's 1 + v
        assumes the scale of ResNet taps, and its ridge is relative here. `max_patches` (None in the paper preset) and a
        1 % bank, as PatchCore has here; no centre crop; patches keep their own C channels. The published figures were
        made with 5 neighbours, although the code's setting says 6.
    Reference: Xi et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", NeurIPS 2022, arXiv 2403.14233,
        section 3; Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000.

    Attributes:
        discriminator: What the outlier factor is: "lof", the local outlier factor; "nearest", the distance to the
            nearest other patch; "gaussian", the Mahalanobis distance.
        lof_neighbors: Neighbours of the local outlier factor, half of the other images at most.
        outlier_share: Share of the patches that the bank is not chosen from (tau).
        soft_weights: Whether entries keep their factors; else all weigh 1.
        max_weight: Most that a factor counts; None for no bound.
        squared: Whether the factor multiplies the squared distance.
        coreset_ratio: Size of the bank as a share of all pooled patches, the removed ones counted.
        max_patches: Most patches pooled, but always those of 3 images at each position; None for all.
        projection_dim: Dimension of the random projections for the factors and for the coreset.
    """

    name: ClassVar[str] = "softpatch"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # the authors' code: tau 0.15, a 10 % coreset, squared distances as its search returns them
        "paper": {"coreset_ratio": 0.1, "max_patches": None, "max_weight": None, "squared": True},
    }

    discriminator: Literal["lof", "nearest", "gaussian"] = "lof"
    lof_neighbors: int = 6
    outlier_share: float = 0.15
    soft_weights: bool = True
    max_weight: float | None = 10.0
    squared: bool = False
    coreset_ratio: float = 0.01
    max_patches: int | None = 200_000
    projection_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("lof", "nearest", "gaussian")
        self._require("discriminator", self.discriminator in known, "be 'lof', 'nearest' or 'gaussian'")
        self._require("lof_neighbors", self.lof_neighbors >= 1, "be at least 1")
        self._require("outlier_share", 0 <= self.outlier_share < 1, "be in [0, 1)")
        self._require("max_weight", self.max_weight is None or self.max_weight > 0, "be positive, or None")
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "be in (0, 1]")
        self._require("max_patches", self.max_patches is None or self.max_patches >= 1, "be at least 1, or None")
        self._require("projection_dim", self.projection_dim >= 1, "be at least 1")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        generator = torch.Generator().manual_seed(self.seed)
        grid, owners = self._pool(data, generator)
        factors = self._factors(grid, target).flatten()  # (n P,), like the pool
        pool = grid.flatten(0, 1)
        inliers = lowest(factors, 1 - self.outlier_share)
        projected = coreset.project(pool, self.projection_dim, generator)[inliers].to(target)
        n_select = max(1, int(self.coreset_ratio * len(pool)))
        chosen = inliers[coreset.k_center_greedy(projected, n_select, generator).cpu()]
        self.memory_bank_ = pool[chosen]  # (M, C)
        self.owner_ = owners.flatten()[chosen]  # (M,) id of the image that each entry comes from
        weights = factors[chosen].clamp(0, self.max_weight)
        self.weight_ = weights if self.soft_weights else torch.ones_like(weights)  # (M,)
        return self

    def _pool(self, data: ImageSet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(n, P, C) patches of n images at each position, not the same images everywhere, and (n, P) their ids."""
        pool, owners, slots, start = torch.empty(0), torch.empty(0), torch.empty(0), 0
        for batch in data.batches(self.layers):
            patches = self._embed(batch).flatten(2).transpose(1, 2)  # (B, P, C)
            if not start:
                slots, n = self._slots(len(data), patches.shape[1], generator)
                pool = patches.new_empty(n, *patches.shape[1:])
                owners = torch.empty(pool.shape[:2], dtype=torch.int64)
            rows, positions = (slots[start : start + len(batch)] >= 0).nonzero(as_tuple=True)
            places = slots[start + rows, positions]
            pool[places, positions] = patches[rows, positions]
            owners[places, positions] = torch.from_numpy(batch.ids)[rows]
            start += len(batch)
        if not start:
            raise InputError("SoftPatch.fit needs at least one image, got an empty set.")
        return pool, owners

    def _slots(self, n_images: int, n_positions: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """(N, P) row of the pool that an image's patch goes to, -1 for none, and the number of rows."""
        order = torch.arange(n_images)
        quota = n_images if self.max_patches is None else self.max_patches // n_positions
        n = min(n_images, max(3, quota))  # one or two images cannot tell which is outlying
        if n == n_images:
            return order[:, None].expand(-1, n_positions), n
        slots = torch.full((n_images, n_positions), -1)
        for position in range(n_positions):  # each position has images of its own: all images are pooled somewhere
            slots[torch.randperm(n_images, generator=generator)[:n], position] = order[:n]
        return slots, n

    def _factors(self, pool: Tensor, device: str) -> Tensor:
        """(n, P) outlier factors of (n, P, C) patches."""
        n = len(pool)
        if n == 1:
            return pool.new_ones(pool.shape[:2])
        # a stream of its own: with nothing removed, the bank is the one of PatchCore
        generator = torch.Generator().manual_seed(self.seed + 1)
        points = coreset.project(pool.flatten(0, 1), self.projection_dim, generator).view(*pool.shape[:2], -1)
        points = points.transpose(0, 1).contiguous().to(device)  # (P, n, c)
        if self.discriminator == "lof":
            # the neighbourhood of an inlier must not reach the outliers, or their distance is the density of all
            return local_outlier_factor(points, min(self.lof_neighbors, max(1, (n - 1) // 2))).T.cpu()
        gaussian = self.discriminator == "gaussian"
        values = mahalanobis(points) if gaussian else nearest_others(points, 1)[0][:, :, 0]
        scale = values.median()
        return (1 + values / torch.where(scale > 0, scale, 1)).T.cpu()

    def _maps(self, batch: Batch, device: str) -> Tensor:
        distances, entries = self._search(batch, device)
        nearest = distances[..., 0].square() if self.squared else distances[..., 0]
        return nearest * self.weight_.to(device)[entries[..., 0]]

    def _expected(self, batch: Batch, device: str) -> Tensor:
        _, entries = self._search(batch, device)
        return self.memory_bank_.to(device)[entries[..., 0]].permute(0, 3, 1, 2)

    def _search(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        """(B, h, w, 1) distances and entries of the bank."""
        search = self._cached("search", device, lambda: NearestNeighbors(self.memory_bank_.to(device)))
        return query_grid(search, self._embed(batch).to(device))

    def _embed(self, batch: Batch) -> Tensor:
        """(B, C, h, w)."""
        return embed_batch(batch, self.layers)


def lowest(values: Tensor, share: float) -> Tensor:
    """Rows of the lowest `share` of (N,) values, ascending; equal values stay together, on the inner side."""
    n_out = int((1 - share) * len(values) + 1e-9)  # 0.15 * 100 is not to be 14
    limit = values.kthvalue(len(values) - n_out).values
    return (values <= limit).nonzero()[:, 0]


def mahalanobis(points: Tensor) -> Tensor:
    """(G, N) distances of (G, N, C) points to the Gaussian of their group.

    A ridge in units of the mean variance of all groups makes covariances of few points definite: in float64, since a
    group may hold all the variance there is, 100 G C ridges in one direction, where float32 ends at 10^7.
    """
    x = points - points.mean(1, keepdim=True)
    variance = x.square().mean()
    ridge = RIDGE * torch.where(variance > 0, variance, 1) * torch.eye(x.shape[2], device=x.device).double()
    distances = []
    for part in torch.split(x, CHUNK):
        own = part.double()
        factor = torch.linalg.cholesky(own.mT @ own / (x.shape[1] - 1) + ridge)
        distances.append(torch.linalg.solve_triangular(factor, own.mT, upper=False).norm(dim=1).float())
    return torch.cat(distances)
