"""PatchCore: nearest neighbour in a memory bank of patches."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts import coreset
from flawsift.detectors.parts.maps import embed_batch
from flawsift.detectors.parts.neighbors import NearestNeighbors, query_grid
from flawsift.detectors.parts.positions import PlacedNeighbors, Window, check_grid, is_tiling, windows
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device
from flawsift.types import as_shape


@dataclass(kw_only=True, eq=False)
class PatchCore(Detector):
    """Distance of each patch to its nearest neighbour in a coreset of training patches.

    Patches are 3 x 3 averages of the taps, brought to the largest grid bilinearly and concatenated. The bank is a
    farthest-first coreset chosen on a random projection. The map is the mean distance to the `n_neighbors` nearest
    entries, the image score its maximum.

    Cost: Quadratic in the number of patches for the coreset at a fixed ratio, so `max_patches` bounds the pool;
        scoring is one matrix product of patches and bank.
    Contamination: Amplified. Farthest-first selection seeks outliers: the share of defective entries in the bank was
        found to be 4 to 40 times their share among the patches. A recurring defect then matches its own kind. Nor does
        the coreset know how many images have a patch like this one; `flawsift.detectors.quorum` keeps all patches.
    Differs from the paper: `max_patches` draws the pool evenly from all images (None in the paper preset); plain, not
        squared, distances, as the paper writes them (its code has squared ones); no re-weighting unless
        `reweight_neighbors` is set (as in the authors' code); no centre crop; patches keep their own C channels
        instead of being averaged down to 1024.
    Reference: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265,
        sections 3.1 to 3.3 and Algorithm 1.

    Attributes:
        coreset_ratio: Share of the pooled patches kept in the bank.
        coreset: "greedy" is Algorithm 1; "random" draws evenly.
        max_patches: Most patches in the pool that the coreset is chosen from; None for all.
        projection_dim: Dimension of the random projection for the greedy choice.
        n_neighbors: Neighbours whose distances are averaged.
        reweight_neighbors: b of equation 7, which weights the image score by how typical the nearest entry is; 0
            leaves it out.
        tiles_by_position: "EDGE:OVERLAP" in pixels of the network's input, for cameras that stand still: each tile has
            a bank of its own (`flawsift.detectors.parts.positions`), of `coreset_ratio` of its patches. None has one.
    """

    name: ClassVar[str] = "patchcore"
    leaves_out_patches: ClassVar[bool] = True
    patch_rejection: ClassVar[float] = 2.0  # in sets that show defects; chosen by docs/benchmarks/screening.md
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # section 4.1 (10 % is the middle of the paper's three ratios); b = 9 as the field has it, the paper is silent
        "paper": {"coreset_ratio": 0.1, "max_patches": None, "reweight_neighbors": 9},
    }

    coreset_ratio: float = 0.01
    coreset: Literal["greedy", "random"] = "greedy"
    max_patches: int | None = 200_000
    projection_dim: int = 128
    n_neighbors: int = 1
    reweight_neighbors: int = 0
    tiles_by_position: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "be in (0, 1]")
        self._require("coreset", self.coreset in ("greedy", "random"), "be 'greedy' or 'random'")
        self._require("max_patches", self.max_patches is None or self.max_patches >= 1, "be at least 1, or None")
        self._require("projection_dim", self.projection_dim >= 1, "be at least 1")
        self._require("n_neighbors", self.n_neighbors >= 1, "be at least 1")
        self._require("reweight_neighbors", self.reweight_neighbors >= 0, "not be negative")
        cut = self.tiles_by_position
        self._require("tiles_by_position", is_tiling(cut), "be such as '512:256', or None")
        self._require("reweight_neighbors", cut is None or not self.reweight_neighbors, "be 0 with tiles_by_position")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        generator = torch.Generator().manual_seed(self.seed)
        pool, owners, places = self._pool(data, generator)
        if self.tiles_by_position is None:
            chosen = self._coreset(pool, target, generator)
        else:
            parts, tile = [], []
            for number, one in enumerate(self._tiles()):
                mine = torch.isin(places, one.seen).nonzero()[:, 0]
                if len(mine):
                    parts.append(mine[self._coreset(pool[mine], target, generator)])
                    tile.append(torch.full((len(parts[-1]),), number))
            chosen, self.tile_ = torch.cat(parts), torch.cat(tile)  # (M,) of each entry; where tiles overlap, of any
        self.memory_bank_ = pool[chosen]  # (M, C)
        self.owner_ = owners[chosen]  # (M,) id of the image that each entry comes from
        return self

    def _coreset(self, pool: Tensor, device: str, generator: torch.Generator) -> Tensor:
        """(M,) rows of the bank in a (R, C) pool."""
        n_select = max(1, int(self.coreset_ratio * len(pool)))
        if self.coreset == "greedy":
            projected = coreset.project(pool, self.projection_dim, generator).to(device)
            return coreset.k_center_greedy(projected, n_select, generator).cpu()
        return torch.randperm(len(pool), generator=generator)[:n_select]

    def _tiles(self) -> list[Window]:
        assert self.tiles_by_position is not None
        return windows(self.tiles_by_position, as_shape(self.size_), self.grid_)

    def _pool(self, data: ImageSet, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(R, C) patches that the bank is chosen from, (R,) ids of their images and (R,) places in them."""
        rows, owners, places = [], [], []
        for batch in data.batches(self.layers):
            embedding = self._embed(batch)
            h, w = embedding.shape[2:]
            patches = embedding.flatten(2).transpose(1, 2)  # (B, P, C)
            accepted, n_patches = batch.accepted(h, w), h * w
            quota = n_patches if self.max_patches is None else max(1, self.max_patches // len(data))
            for j, id_ in enumerate(batch.ids.tolist()):
                usable = torch.arange(n_patches)
                if quota < n_patches:
                    # one permutation per image: the same share of every image, whatever the batch size
                    usable = torch.randperm(n_patches, generator=generator)
                if accepted is not None:  # after the draw, so that what is rejected changes no other image's patches
                    usable = usable[accepted[j].flatten()[usable]]
                usable = usable[:quota]
                rows.append(patches[j, usable])
                owners.append(torch.full((len(usable),), id_))
                places.append(usable)
            if self.tiles_by_position is not None:
                self.grid_, self.size_ = [h, w], list(as_shape(batch.size))
        if not sum(map(len, rows)):
            raise InputError("PatchCore.fit needs at least one image with a patch to learn from, got none.")
        return torch.cat(rows), torch.cat(owners), torch.cat(places)

    def _maps(self, batch: Batch, device: str) -> Tensor:
        return self._search_batch(batch, device)[0]

    def _score_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        maps, entries, embedding = self._search_batch(batch, device)
        maps = batch.only_counted(maps)
        scores = self._image_scores(maps)
        if not self.reweight_neighbors:
            return maps, scores
        worst = maps.flatten(1).argmax(1, keepdim=True)  # (B, 1)
        queries = embedding.flatten(2).gather(2, worst.unsqueeze(1).expand(-1, embedding.shape[1], -1)).squeeze(2)
        return maps, scores * self._weights(queries, entries.flatten(1).gather(1, worst).squeeze(1), device)

    def _weights(self, queries: Tensor, entries: Tensor, device: str) -> Tensor:
        """(B,) weights of equation 7: 1 - exp(|p - m|) / sum over the b neighbours n of m of exp(|p - n|).

        In log-sum-exp form, since exp of a raw distance overflows. Between 0 and 1 - 1/b.
        """
        bank = self.memory_bank_.to(device)
        k = min(self.reweight_neighbors, len(bank))
        _, around = self._neighbors(device).query(bank[entries], k=k)  # (B, b), m among them
        distances = (bank[around] - queries.unsqueeze(1)).norm(dim=2)
        own = (bank[entries] - queries).norm(dim=1)
        return 1 - torch.exp(own - distances.logsumexp(1))

    def _expected(self, batch: Batch, device: str) -> Tensor:
        _, entries, _ = self._search_batch(batch, device)
        return self.memory_bank_.to(device)[entries].permute(0, 3, 1, 2)

    def _search_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """(B, h, w) maps, (B, h, w) nearest entries and the (B, C, h, w) embedding that they answer."""
        embedding = self._embed(batch).to(device)
        if self.tiles_by_position is None:
            k = min(self.n_neighbors, len(self.memory_bank_))
            distances, entries = query_grid(self._neighbors(device), embedding, k=k)
        else:
            check_grid(self.grid_, embedding.shape[2:])
            distances, entries = self._placed(device).query_grid(embedding, k=self.n_neighbors)
        return distances.mean(3), entries[..., 0], embedding

    def _placed(self, device: str) -> PlacedNeighbors:
        """The bank of each tile, ready to be searched on a device."""
        make = functools.partial(PlacedNeighbors, self.memory_bank_.to(device), self.tile_.to(device))
        return self._cached("placed", device, lambda: make(self._tiles()))

    def _neighbors(self, device: str) -> NearestNeighbors:
        """The memory bank, ready to be searched on a device."""
        return self._cached("search", device, lambda: NearestNeighbors(self.memory_bank_.to(device)))

    def _embed(self, batch: Batch) -> Tensor:
        """(B, C, h, w): locally averaged taps on the largest grid (section 3.1, patch size 3, stride 1)."""
        return embed_batch(batch, self.layers)
