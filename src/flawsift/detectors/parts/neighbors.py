"""Numeric code that detectors share: exact nearest neighbours and what rests on them, such as outlier factors.

Everything here works on plain tensors of feature vectors, one row per vector: images and their ids are unknown to it.
Letters: Q queries, M bank rows, C channels, k neighbours, G groups.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from flawsift.errors import ParameterError

# Floats in one (rows, M) block of scores, 16 MB: 4 MB repack the bank too often, 64 MB fall out of the L3 cache.
_BLOCK_FLOATS = 1 << 22
# A matmul with fewer rows spends its time packing the bank. At 64 rows the block is no larger than a bank of C = 64.
_MIN_BLOCK_ROWS = 64
# Queries to centre, or winners to gather, at a time (12 MB at C = 384): few large steps hand over to threads rarely.
_PART_ROWS = 8192
# A dot product of C terms is off by sqrt(C) * eps / 2 of its size at most: of 16 million, the worst reached 0.8 of that
# at C = 16 and 0.1 at C = 384. Twice that, to be sure.
ROUNDING = 2.0

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]


class NearestNeighbors:
    """Exact Euclidean nearest neighbours in a fixed bank, on the device of the bank (which must know float64).

    One blocked matmul finds the winners: the largest `q.b - |b|^2 / 2` is the nearest, and the norm rides along as one
    more channel. Bank and queries are centred by the bank mean, so that a common offset costs no precision. Queries
    whose winners are not clear within float32 rounding are searched again in float64. Distances are then computed anew
    as `|q - b|`, pair by pair, by a kernel to which other pairs make no difference.

    Hence a row of the bank is at distance exactly 0 from itself, equal distances go to the lowest bank row, and a query
    gives the same bits whatever other queries it comes with. What remains are bank rows that
    differ by their last float32 bits only (1e-7 of the distance of the query from the bank mean): they count as equal.

    Cost: 2 Q M C flops as a matmul, and k + 1 passes over the Q x M scores, together 1.2 times the matmul at k = 1 and
    1.6 to 1.9 times at k = 9. A float64 search triples the cost of the queries that need it: below 0.1 % of them on
    smooth features, all of them when every bank row has a copy. Memory: a copy of the bank (and a float64 one during
    that search) and one block of scores.

    Args:
        bank: (M, C) feature vectors; used as float32.
        owners: (M,) integers: what each bank row came from, such as an image id. Needed to exclude by owner in `query`.

    Raises:
        ParameterError: if the bank is empty or not a matrix, or `owners` does not fit it.
    """

    def __init__(self, bank: Tensor, *, owners: Tensor | None = None) -> None:
        if bank.ndim != 2 or bank.shape[0] == 0:
            raise ParameterError(f"bank must be (M, C) with at least one row, got {tuple(bank.shape)}.")
        if owners is not None and owners.shape != bank.shape[:1]:
            raise ParameterError(f"bank owners must be ({bank.shape[0]},), got {tuple(owners.shape)}.")
        self._bank = bank.detach().to(torch.float32).contiguous()
        self._rows_of = {} if owners is None else _rows_by_owner(owners.to(bank.device))
        self._mean = self._bank.mean(dim=0, dtype=torch.float64)
        self._keys = _with_norm(self._bank, self._mean.float())

    def query(self, queries: Tensor, *, k: int = 1, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest bank rows of each query.

        Args:
            queries: (Q, C) feature vectors; moved to the device of the bank block by block.
            k: number of neighbours.
            owners: (Q,) integers: bank rows of the same owner are not eligible, as for leave-one-image-out scores.

        Returns:
            (Q, k) float32 distances (not squared), ascending, and (Q, k) int64 bank rows.

        Raises:
            ParameterError: if C differs from that of the bank, k exceeds the eligible rows, or owners do not fit.
        """
        self._check(queries, k, owners)
        n, m = queries.shape[0], self._bank.shape[0]
        rows = max(_MIN_BLOCK_ROWS, _BLOCK_FLOATS // m)
        ids = torch.empty((n, k), dtype=torch.int64, device=self._bank.device)
        unclear = torch.empty(n, dtype=torch.bool, device=self._bank.device)
        distances = self._bank.new_empty((n, k))
        for part in blocks(n, _PART_ROWS):
            ids[part], unclear[part] = self._search(*self._take(queries, owners, part), k, rows)
        again = unclear.nonzero()[:, 0].cpu()  # indexes tensors on any device
        for part in blocks(len(again), max(1, rows // 2)):  # float64 scores are twice as large
            ids[again[part]] = self._search_double(*self._take(queries, owners, again[part]), k)
        for part in blocks(n, max(1, _PART_ROWS // k)):
            distances[part], ids[part] = self._measure(self._take(queries, None, part)[0], ids[part])
        return distances, ids

    def _check(self, queries: Tensor, k: int, owners: Tensor | None) -> None:
        m, channels = self._bank.shape
        if queries.ndim != 2 or queries.shape[1] != channels:
            raise ParameterError(f"queries must be (Q, {channels}) like the bank, got {tuple(queries.shape)}.")
        eligible = m
        if owners is not None:
            if not self._rows_of:
                raise ParameterError("query owners were given, but the bank was built without owners.")
            if owners.shape != queries.shape[:1]:
                raise ParameterError(f"query owners must be ({queries.shape[0]},), got {tuple(owners.shape)}.")
            eligible -= max((len(self._rows_of.get(owner, ())) for owner in torch.unique(owners).tolist()), default=0)
        if not 1 <= k <= eligible:
            raise ParameterError(f"k must be in [1, {eligible}], the number of eligible bank rows, got {k}.")

    def _take(self, queries: Tensor, owners: Tensor | None, part: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Some queries and their owners on the device of the bank, the queries as float32."""
        block = queries.detach()[part].to(self._bank.device, torch.float32)
        return block, None if owners is None else owners[part].to(self._bank.device)

    def _search(self, block: Tensor, own: Tensor | None, k: int, rows: int) -> tuple[Tensor, Tensor]:
        """(B, k) float32 winners, and (B,) True where rounding could have changed the set of winners."""
        centred = _with_one(block, self._mean.float())
        ids = torch.empty((block.shape[0], k + 1), dtype=torch.int64, device=block.device)
        values = block.new_empty(ids.shape)
        buffer = block.new_empty((min(rows, block.shape[0]), self._bank.shape[0]))
        for part in blocks(block.shape[0], rows):
            scores = buffer[: part.stop - part.start]
            torch.mm(centred[part], self._keys.T, out=scores)  # q.b - |b|^2 / 2
            self._hide(scores, None if own is None else own[part])
            for j in range(k + 1):  # one more than asked for: the runner-up
                best = ids[part, j : j + 1] = _argmax(scores)[:, None]
                values[part, j : j + 1] = scores.gather(1, best)
                scores.scatter_(1, best, -torch.inf)
        slack = self._slack(centred, values[:, k - 1 : k], torch.finfo(torch.float32).eps)
        # without a runner-up its value is -inf: clear
        return ids[:, :k], values[:, k - 1] - values[:, k] <= slack[:, 0]

    def _search_double(self, block: Tensor, own: Tensor | None, k: int) -> Tensor:
        """(rows, k) winners by float64 scores; the lowest bank row among those equal within rounding."""
        centred = _with_one(block.double(), self._mean)
        scores = centred @ _with_norm(self._bank.double(), self._mean).T
        self._hide(scores, own)
        ids = torch.empty((block.shape[0], k), dtype=torch.int64, device=scores.device)
        for j in range(k):
            best = scores.amax(dim=1, keepdim=True)
            slack = self._slack(centred, best, torch.finfo(torch.float64).eps)
            ids[:, j] = _argmax((scores >= best - slack).to(torch.int8))
            scores.scatter_(1, ids[:, j : j + 1], -torch.inf)
        return ids

    def _hide(self, scores: Tensor, own: Tensor | None) -> None:
        """Sets scores of bank rows with the owner of the query to -inf: owner by owner, as blocks hold few of them."""
        for owner in [] if own is None else torch.unique(own).tolist():
            if (columns := self._rows_of.get(owner)) is not None:
                scores[(own == owner).nonzero(), columns] = -torch.inf

    def _slack(self, centred: Tensor, best: Tensor, eps: float) -> Tensor:
        """(rows, 1) by how much two scores near `best` may change order through rounding."""
        square = centred[:, :-1].square().sum(dim=1, keepdim=True)
        # |q - b|^2 = |q|^2 - 2 score, so a rival b has |b| <= reach, and |q.b| + |b|^2 / 2 <= 1.5 reach^2
        reach = square.sqrt() + (square - 2 * best).clamp_min_(0).sqrt_()
        return reach.square_().mul_(2 * 1.5 * ROUNDING * math.sqrt(centred.shape[1]) * eps / 2)

    def _measure(self, block: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, k) distances by direct subtraction, ascending, ties to the lowest row, and their bank rows."""
        ids = ids.sort(dim=1).values
        # one small problem per query: a (1, k) distance matrix, every entry from its own pair of vectors only
        direct = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(block[:, None], self._bank[ids], compute_mode=direct)[:, 0]
        distances, order = distances.sort(dim=1, stable=True)
        return distances, ids.gather(1, order)


def nearest(queries: Tensor, bank: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """`NearestNeighbors(bank).query(queries, k=k)`, for a bank that is used once.

    >>> nearest(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), k=2)
    (tensor([[0., 5.]]), tensor([[0, 1]]))
    """
    return NearestNeighbors(bank).query(queries, k=k)


def query_grid(search: NearestNeighbors, embedding: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """`search.query` for each cell of a (B, C, h, w) grid: (B, h, w, k) distances and bank rows."""
    b, c, h, w = embedding.shape
    distances, rows = search.query(embedding.permute(0, 2, 3, 1).reshape(-1, c), k=k)
    return distances.view(b, h, w, k), rows.view(b, h, w, k)


def mutual_nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of two sets are each other's nearest neighbour.

    A bank row is the mutual neighbour of one query at most: of equal ones the first. One matrix product serves both
    directions, so near ties are decided within float32 rounding of |q - mean|^2.

    Args:
        queries: (Q, C).
        bank: (M, C), M >= 1, on the same device.

    Returns:
        (Q,) nearest bank row, (Q,) distance to it, and (Q,) True where the query is that bank row's nearest, too.

    >>> mutual_nearest(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.1], [5.0]]))[2].tolist()
    [False, True]
    """
    mean = bank.mean(0)
    scores = _with_one(queries, mean) @ _with_norm(bank, mean).T  # q.b - |b|^2 / 2
    scores -= (queries - mean).square_().sum(1, keepdim=True) / 2  # -|q - b|^2 / 2
    rows = _argmax(scores)
    mutual = scores.gather(1, rows[:, None])[:, 0] >= scores.amax(0)[rows]
    numbers = torch.arange(len(queries), device=queries.device)
    first = numbers.new_full((len(bank),), len(queries)).scatter_reduce(0, rows[mutual], numbers[mutual], "amin")
    return rows, (queries - bank[rows]).norm(dim=1), mutual & (first[rows] == numbers)


def nearest_others(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of each point within its group.

    Winners are found by float64 products and their distances computed anew, so copies are at distance exactly 0.

    Cost: 2 G N^2 C flops. Memory: N^2 float64 numbers, or 32 MB of several groups.

    Args:
        points: (G, N, C).
        k: In [1, N - 1].

    Returns:
        (G, N, k) distances, ascending, and (G, N, k) positions of the others in the group.

    Raises:
        ParameterError: k is out of range.
    """
    n_groups, n, channels = points.shape
    if not 1 <= k < n:
        raise ParameterError(f"k must be in [1, {n - 1}], the number of other points, got {k}.")
    distances, ids = points.new_empty(n_groups, n, k), torch.empty(n_groups, n, k, dtype=torch.int64)
    ids = ids.to(points.device)
    for part in blocks(n_groups, max(1, _BLOCK_FLOATS // max(n * n, n * k * channels))):
        own = points[part]  # (g, N, C)
        x = (own - own.mean(1, keepdim=True)).double()
        squares = x.square().sum(2)
        scores = torch.baddbmm(squares[:, None, :], x, x.mT, beta=-0.5)  # x.y - |y|^2 / 2
        scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        winners = scores.topk(k, dim=2).indices
        group = torch.arange(len(own), device=points.device)[:, None, None]
        exact, order = (own[:, :, None] - own[group, winners]).norm(dim=3).sort(dim=2, stable=True)
        distances[part], ids[part] = exact, winners.gather(2, order)
    return distances, ids


def local_outlier_factor(points: Tensor, k: int) -> Tensor:
    """(G, N) local outlier factors of (G, N, C) points among the points of their group; about 1 for inliers.

    Density of a point: the inverse of the mean of max(distance, k-distance of the neighbour) over its k neighbours.
    Its factor: the mean density of its neighbours by its own. More than k copies of a point are infinitely dense: the
    factor of a point beside them is bounded by 1e-10 only, so clip it.

    Raises:
        ParameterError: k is not in [1, N - 1].

    Reference: Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000.
    """
    distances, ids = nearest_others(points, k)

    def of_neighbors(values: Tensor) -> Tensor:  # (G, N) -> (G, N, k)
        return values.gather(1, ids.flatten(1)).view_as(distances)

    reach = torch.maximum(distances, of_neighbors(distances[:, :, -1]))
    density = 1 / (reach.mean(2) + 1e-10)  # scikit-learn's constant: copies have a density, not infinity
    return of_neighbors(density).mean(2) / density


def mutual_pairs(features: Tensor, *, k: int = 1, owners: Tensor | None = None) -> Tensor:
    """Pairs of rows that are among each other's k nearest rows, themselves left out.

    Args:
        features: (N, C) vectors.
        k: neighbours of each row; N - 1 if that is less.
        owners: (N,) integers: rows of the same owner are no neighbours, as for patches of one image.

    Returns:
        (M, 2) int64 rows, each pair once, the lower row first, in ascending order. No row is paired with itself,
        copies or not; of equally near rows the lowest count as nearest.

    Raises:
        ParameterError: if `owners` leave a row fewer than k others.

    >>> mutual_pairs(torch.tensor([[0.0], [1.0], [3.0], [3.5]]))
    tensor([[0, 1],
            [2, 3]])
    """
    n = features.shape[0]
    k = min(k, n - 1)
    if k < 1:
        return torch.empty((0, 2), dtype=torch.int64, device=features.device)
    rows = torch.arange(n, device=features.device)
    if owners is None:
        neighbors = nearest(features, features, k=k + 1)[1]
        # the row itself goes last; among more than k copies it may be absent, and then the last neighbour is left out
        itself = (neighbors == rows[:, None]).to(torch.int8)
        others = neighbors.gather(1, itself.sort(dim=1, stable=True).indices[:, :k])
    else:
        others = NearestNeighbors(features, owners=owners).query(features, k=k, owners=owners)[1]
    low, high = rows.repeat_interleave(k), others.flatten()
    mutual = torch.isin(high * n + low, low * n + high) & (low < high)
    keys = (low * n + high)[mutual].sort().values
    return torch.stack([keys // n, keys % n], dim=1)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _with_one(block: Tensor, mean: Tensor) -> Tensor:
    """(rows, C) -> (rows, C + 1): centred, then a channel of ones that picks up the last channel of the keys."""
    out = block.new_ones((block.shape[0], block.shape[1] + 1))
    torch.sub(block, mean, out=out[:, :-1])
    return out


def _with_norm(bank: Tensor, mean: Tensor) -> Tensor:
    """(M, C) -> (M, C + 1): centred, then -|b|^2 / 2."""
    out = _with_one(bank, mean)
    out[:, -1] = out[:, :-1].square().sum(dim=1, dtype=torch.float64).mul_(-0.5)
    return out


def _rows_by_owner(owners: Tensor) -> dict[int, Tensor]:
    order = owners.argsort(stable=True)
    values, counts = torch.unique(owners, return_counts=True)
    return dict(zip(values.tolist(), torch.split(order, counts.tolist()), strict=True))


@functools.cache
def _blas() -> ThreadpoolController:
    """What sets the threads of numpy's BLAS: finding it reads all loaded libraries, so it is found once."""
    return ThreadpoolController()


@contextlib.contextmanager
def own_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads of our own, as many as torch has, with one thread each for numpy's BLAS."""
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield pool


def in_threads(work: Callable[[slice], object], blocks: Iterable[slice]) -> None:
    """`work` on each block, on `own_threads`.

    Threads of BLAS, and torch's, meet at every product, and wait there for seconds on a busy machine; these meet at the
    end. numpy lets other threads run during its products, factorisations and reductions.
    """
    with own_threads() as pool:
        for _ in pool.map(work, blocks):
            pass  # only re-raises what a thread raised


def _argmax(scores: Tensor) -> Tensor:
    """(rows,) position of the first maximum of each row."""
    if scores.device.type == "cpu":  # on one thread numpy's is 5 to 10 times as quick as torch's on two
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)
