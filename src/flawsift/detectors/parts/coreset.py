"""Selection of a memory bank: k-center greedy, and the random projection that it selects in.

Plain tensors of feature vectors, one row per vector. Letters: N rows to select from, C channels.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsift.detectors.parts.neighbors import blocks, own_threads
from flawsift.errors import ParameterError

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]

# Rows that one round of k-center greedy brings up to date; N / 16 if that is more, to give many threads work. Of 2048
# to 8192, with 512 to 2048 rows per thread and 128 to 512 centres per matmul, these were quickest, by up to a third.
_CANDIDATES = 4096
# Rows per thread and matmul: fixed, so that the number of threads does not change any result.
_THREAD_ROWS = 1024
# Centres per matmul; after each, rows that cannot be picked in this round any more are dropped.
_CENTRE_BLOCK = 256


def random_projection(n_in: int, n_out: int, generator: torch.Generator) -> Tensor:
    """A Gaussian Johnson-Lindenstrauss matrix, (n_in, n_out) float32 on CPU, its entries N(0, 1 / n_out).

    `x @ matrix` keeps Euclidean distances within about sqrt(1 / (2 n_out)), 6 % at 128.

    Raises:
        ParameterError: if a size is below 1.

    Reference: Dasgupta & Gupta, "An elementary proof of a theorem of Johnson and Lindenstrauss", 2003.
    """
    if n_in < 1 or n_out < 1:
        raise ParameterError(f"n_in and n_out must be at least 1, got {n_in} and {n_out}.")
    return torch.randn((n_in, n_out), generator=generator) / math.sqrt(n_out)


def project(features: Tensor, n_out: int, generator: torch.Generator) -> Tensor:
    """(N, C) features projected to (N, n_out); the same tensor, and nothing drawn, when C <= n_out already."""
    if features.shape[1] <= n_out:
        return features
    return features @ random_projection(features.shape[1], n_out, generator).to(features.device, features.dtype)


def k_center_greedy(features: Tensor, n_select: int, generator: torch.Generator, *, start: int | None = None) -> Tensor:
    """Farthest-first selection: each centre is the row farthest from all centres before it.

    The order of the result is the order of selection: its first m rows are the selection of m centres. Equal distances
    go to the lowest row. The largest distance of a row to its nearest centre is at most twice the optimum.

    On CPU the distances are evaluated lazily: they only shrink, so the last known value bounds a row from above, and
    only rows whose bound reaches the current maximum are brought up to date, many rows and many centres per matmul. The
    selection is that of the plain loop, index for index, except where two distances differ by float32 rounding, and it
    is the same for any number of threads.

    Cost: a quarter to half of the 2 N C n_select flops of the plain loop, at the speed of a matmul: 1 to 2 s for 6144
    of 61440 x 272 on one core. Memory: about N / 8 rows and n_select rows of C; contiguous float32 input is not copied.
    On another device: the plain loop and one copy of the features.

    Contamination: outliers are far from everything, so they are selected first and are over-represented.

    Args:
        features: (N, C) vectors; used as float32.
        n_select: number of centres.
        generator: draws the first centre when `start` is None.
        start: the first centre.

    Returns:
        (n_select,) int64 rows on CPU. All N rows, ascending, when n_select >= N. Fewer than n_select when all remaining
        rows are copies of selected ones (within rounding: about 2e-3 of their distance from the first centre).

    Raises:
        ParameterError: if there are no rows, n_select is below 1, `start` is not a row, or a feature is not finite.

    References: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; Roth et al. (PatchCore),
    "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, Algorithm 1.
    """
    if features.ndim != 2 or features.shape[0] == 0:
        raise ParameterError(f"features must be (N, C) with at least one row, got {tuple(features.shape)}.")
    n = features.shape[0]
    if n_select < 1:
        raise ParameterError(f"n_select must be at least 1, got {n_select}.")
    if start is not None and not 0 <= start < n:
        raise ParameterError(f"start must be in [0, {n - 1}], got {start}.")
    if n_select >= n:
        return torch.arange(n)
    start = int(torch.randint(n, (1,), generator=generator)) if start is None else start
    features = features.detach().to(torch.float32).contiguous()
    if features.device.type != "cpu":
        return _greedy_plain(features, n_select, start)
    return torch.from_numpy(_LazyGreedy(features.numpy(), n_select, start).run())


def _copy_tolerance(channels: int) -> float:
    """The share of |x|^2 below which a squared distance computed from dot products may be rounding only."""
    return float(2 * math.sqrt(channels) * np.finfo(np.float32).eps)  # the `ROUNDING` of |x|^2 - 2 x.c + |c|^2


def _greedy_plain(features: Tensor, n_select: int, start: int) -> Tensor:
    """`k_center_greedy` as one matrix-vector product per centre, on any device."""
    x = features - features[start]
    norms = x.square().sum(dim=1)
    floor = norms * _copy_tolerance(x.shape[1])
    nearest_sq, selected = norms.clone(), [start]
    while len(selected) < n_select:
        pick = int(nearest_sq.argmax())
        if float(nearest_sq[pick]) <= 0:
            break
        selected.append(pick)
        squared = torch.addmv(norms + norms[pick], x, x[pick], alpha=-2)
        nearest_sq = torch.minimum(nearest_sq, squared.masked_fill_(squared <= floor, 0))
        nearest_sq[pick] = 0
    return torch.tensor(selected)


class _LazyGreedy:
    """State of one run of `k_center_greedy`: an upper bound per row, and for which centres it holds.

    Vectors are taken relative to the first centre: that removes a common offset and, unlike a mean, keeps integers
    exact. BLAS is held to one thread while threads of our own share the rows: they meet once per round, not in each of
    thousands of small matmuls, where every meeting costs a time slice when the machine is busy.
    """

    def __init__(self, features: _Floats, n_select: int, start: int) -> None:
        n, channels = features.shape
        self.features, self.n_select, self.origin = features, n_select, features[start].copy()
        self.norms = np.empty(n, np.float32)  # (N,) squared distance from the first centre
        for part in blocks(n, _CANDIDATES):
            x = features[part] - self.origin
            self.norms[part] = np.einsum("ij,ij->i", x, x)
        if not np.isfinite(self.norms).all():
            raise ParameterError("features must be finite, and small enough for their squares to be.")
        self.bounds = self.norms.copy()  # (N,) squared distance to the nearest of the first seen[i] centres
        self.seen = np.ones(n, np.int64)
        self.selected = np.full(n_select, start, np.int64)
        self.count = 1
        self.centres = np.zeros((n_select, channels + 1), np.float32)  # c, then -|c|^2 / 2; the first is the origin

    def run(self) -> _Ints:
        with own_threads() as pool:
            while self.count < self.n_select and self.bounds.max() > 0:
                rows, limit, tie = self._candidates()
                x = np.ones((len(rows), self.centres.shape[1]), np.float32)
                np.subtract(self.features[rows], self.origin, out=x[:, :-1])
                for _ in pool.map(partial(self._update, rows, x, limit), blocks(len(rows), _THREAD_ROWS)):
                    pass  # only re-raises what a thread raised
                keep = _precedes(self.bounds[rows], rows, limit, tie)
                self._pick(rows[keep], x[keep], limit, tie)
        return self.selected[: self.count]

    def _candidates(self) -> tuple[_Ints, float, int]:
        """First rows by (bound descending, row ascending), in row order; bound and row of the first one left out."""
        size = min(max(_CANDIDATES, len(self.bounds) // 16), len(self.bounds) - 1)
        position = len(self.bounds) - 1 - size
        limit = np.partition(self.bounds, position)[position]  # the largest bound but `size`
        above, ties = np.flatnonzero(self.bounds > limit), np.flatnonzero(self.bounds == limit)
        n_ties = size - len(above)
        return np.sort(np.concatenate([above, ties[:n_ties]])), float(limit), int(ties[n_ties])

    def _update(self, rows: _Ints, x: _Floats, limit: float, part: slice) -> None:
        """Applies to the rows all centres they have not seen, as long as they may still be picked in this round."""
        rows, x = rows[part], x[part]
        bounds, norms, seen = self.bounds[rows], self.norms[rows], self.seen[rows]
        for first in range(int(seen.min()) // _CENTRE_BLOCK * _CENTRE_BLOCK, self.count, _CENTRE_BLOCK):
            last = min(first + _CENTRE_BLOCK, self.count)
            live = np.flatnonzero((seen < last) & (bounds >= limit))
            closest = (x[live] @ self.centres[first:last].T).max(axis=1)  # largest x.c - |c|^2 / 2
            bounds[live] = np.minimum(bounds[live], self._squared(closest, norms[live]))
            seen[live] = last
        self.bounds[rows], self.seen[rows] = bounds, seen

    def _squared(self, closest: _Floats, norms: _Floats) -> _Floats:
        """|x - c|^2 from x.c - |c|^2 / 2 and |x|^2, with copies at exactly 0."""
        squared = norms - 2 * closest
        squared[squared <= norms * np.float32(_copy_tolerance(self.features.shape[1]))] = 0
        return squared

    def _pick(self, rows: _Ints, x: _Floats, limit: float, tie: int) -> None:
        """Plain greedy among up-to-date rows (ascending), while the farthest of them precedes all other rows."""
        bounds, norms = self.bounds[rows], self.norms[rows]
        while self.count < self.n_select and len(rows):
            best = int(bounds.argmax())
            if bounds[best] <= 0 or not _precedes(bounds[best], rows[best], limit, tie):
                break
            centre = self.centres[self.count]
            centre[:-1], centre[-1] = x[best, :-1], -norms[best] / 2
            self.selected[self.count] = rows[best]
            self.count += 1
            np.minimum(bounds, self._squared(np.einsum("ij,j->i", x, centre), norms), out=bounds)
            bounds[best] = 0
        self.bounds[rows], self.seen[rows] = bounds, self.count


def _precedes(bounds: Any, rows: Any, limit: float, tie: int) -> Any:
    """Whether (bound, row) comes before (limit, tie) in the order bound descending, row ascending."""
    return (bounds > limit) | ((bounds == limit) & (rows < tie))
