"""Distances of patches to groups of images: how near the nearest patch of each group is.

Letters: N images of the bank with P patches of C channels each, in G groups; Q queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.detectors.parts.neighbors import blocks

# Queries and bank rows of one product. With more queries at a time it leaves the processor's caches before its minima
# are taken, and all is half as fast.
_QUERY_ROWS, _BANK_ROWS = 256, 8192
_FEW = 64  # queries at a time whose candidates are measured one by one: 10 MB of an image's patches each
_TILE = 32  # channels are padded to a multiple: matrix units work in tiles of so many bfloat16 numbers
_NEVER = 1e30  # half a squared distance that no patch has, of those that are no neighbours


class GroupNeighbors:
    """The nearest patch of each group, searched without approximation but for the precision of the products.

    Half the squared distance is one product of widened vectors: with q and b centred,
    (q, |q|^2 / 2, 1) . (-b, 1, |b|^2 / 2) = |q - b|^2 / 2. Norms are carried as two numbers, the rounded value and
    what rounding lost, so that bfloat16 products, which are summed in float32, lose little where q and b are near:
    about 0.2 % of a distance that is not much smaller than the norms. Distances of a hundredth of the norms, if an
    image lies far from all others, are off by some 10 % in bfloat16, of a thousandth in float32 too.

    Args:
        bank: (N, P, C) patches.
        groups: (N,) number of each image's group, any integers.
        usable: (N, P) bool, False where a patch is no neighbour; None for all.
        device: Where to search.
        exact: float32 products; else bfloat16 where the processor has units for them.
    """

    def __init__(
        self, bank: Tensor, groups: Tensor, *, usable: Tensor | None = None, device: str = "cpu", exact: bool = False
    ) -> None:
        self.bank, self._usable = bank, usable
        self._groups = groups.to(device)
        numbers, self._column = torch.unique(self._groups, return_inverse=True)  # (G,), and (N,) places in it
        self.n_groups = len(numbers)
        self._type = torch.float32 if exact or not has_bfloat16_units(device) else torch.bfloat16
        self._mean = bank.mean((0, 1), dtype=torch.float32).to(device)
        n, p, c = bank.shape
        self._keys = torch.empty((n * p, -(-(c + 4) // _TILE) * _TILE), dtype=self._type, device=device)
        for part in blocks(n, max(1, _BANK_ROWS // p)):
            self._keys[part.start * p : part.stop * p] = self._widened(bank[part].flatten(0, 1), as_key=True)
        if usable is not None:
            self._keys[(~usable).flatten().to(device), c + 2] = _NEVER

    def query(self, queries: Tensor, k: int, own: Tensor | None = None) -> Tensor:
        """Distances to the k nearest groups.

        Args:
            queries: (Q, C), on any device.
            k: At least 1.
            own: (Q,) group of each query, by its number, which is left out.

        Returns:
            (Q, k) float32, ascending; inf where there are fewer groups.
        """
        result = torch.full((len(queries), k), torch.inf, device=self._keys.device)
        for part in blocks(len(queries), _QUERY_ROWS):
            found = self._to_groups(queries[part], None if own is None else own[part])
            least = min(k, found.shape[1])
            result[part, :least] = found.topk(least, dim=1, largest=False).values.sqrt_()
        return result

    def nearest_patches(self, queries: Tensor, k: int, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which patches are nearest, one of each of the k nearest groups; for a few queries.

        Args:
            queries: (Q, C).
            k: At least 1.
            own: (Q,) group of each query, which is left out.

        Returns:
            (Q, k) float32 distances, measured by subtraction, (Q, k) images of the bank and (Q, k) patches in them, in
            the order of `query`; nan, -1 and -1 where there are fewer groups.
        """
        device, n = self._keys.device, len(queries)
        distances = torch.full((n, k), torch.nan, device=device)
        images, places = torch.full((2, n, k), -1, device=device)
        for part in blocks(n, _FEW):
            wanted = queries[part].to(device)
            found = self._to_images(wanted, own[part])
            for j in range(k):
                best = found.argmin(1)
                there = found.gather(1, best[:, None])[:, 0].isfinite()
                patches = self.bank[best.cpu()].to(device, torch.float32)  # (q, P, C)
                exact = (patches - wanted[:, None]).norm(dim=2)
                if self._usable is not None:
                    exact[~self._usable[best.cpu()].to(device)] = torch.inf
                nearest, place = exact.min(1)
                distances[part, j] = torch.where(there, nearest, torch.nan)
                images[part, j] = torch.where(there, best, -1)
                places[part, j] = torch.where(there, place, -1)
                found[self._groups[best][:, None] == self._groups] = torch.inf
        return distances, images, places

    def _to_groups(self, queries: Tensor, own: Tensor | None) -> Tensor:
        """(q, G) float32 squared distances to the nearest patch of each group, inf for the query's own."""
        found = self._to_images(queries, own)
        if self.n_groups == len(self.bank):
            return found
        by_group = found.new_full((len(found), self.n_groups), torch.inf)
        return by_group.scatter_reduce_(1, self._column.expand(len(found), -1), found, "amin")

    def _to_images(self, queries: Tensor, own: Tensor | None) -> Tensor:
        """(q, N) float32 squared distances to the nearest patch of each image, inf for the query's own group."""
        n, p, _ = self.bank.shape
        wide = self._widened(queries.to(self._mean.device), as_key=False)
        halves = torch.empty((n, len(wide)), dtype=self._type, device=wide.device)
        whole = torch.int16 if self._type == torch.bfloat16 else torch.int32
        for part in blocks(n, max(1, _BANK_ROWS // p)):
            product = self._keys[part.start * p : part.stop * p] @ wide.T  # queries last: minima of whole rows
            # positive numbers are ordered as the integers of the same bits, whose minima take a tenth of the time; of
            # negative ones, which rounding makes of zeros, any may win
            torch.amin(product.view(-1, p, len(wide)).view(whole), 1, out=halves[part].view(whole))
        squared = halves.T.float().mul_(2).clamp_min_(0)
        if own is not None:
            squared[own.to(squared.device)[:, None] == self._groups] = torch.inf
        return squared.masked_fill_(squared >= _NEVER, torch.inf)

    def _widened(self, patches: Tensor, *, as_key: bool) -> Tensor:
        """(R, C) -> (R, W): centred, rounded, then the norm of what rounding left, and zeros."""
        centred = (patches.to(self._mean.device, torch.float32) - self._mean).to(self._type)
        half = centred.float().square().sum(1, keepdim=True) / 2
        rounded = half.to(self._type)
        lost = (half - rounded.float()).to(self._type)
        one = torch.ones_like(rounded)
        parts = [-centred, one, one, rounded, lost] if as_key else [centred, rounded, lost, one, one]
        wide = torch.cat(parts, 1)
        return F.pad(wide, (0, self._keys.shape[1] - wide.shape[1]))


def has_bfloat16_units(device: str) -> bool:
    """Whether products of bfloat16 matrices are quicker than of float32 ones: on GPUs, and processors with AMX."""
    return device != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
