"""A model as one graph, from the pixels of a picture to score, p-value, verdict and map: what `export` writes.

The backbone and the detector's own `_score_batch` are traced as they are, but for the search among patches, which works
in blocks, picks neighbours in NumPy and mends near ties; here it is written plainly, and tests hold the two together.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.frames import REDUCING_GAP, STRETCH, Frame, Region
from flawsift.data.images import Batch
from flawsift.detectors.base import Detector
from flawsift.detectors.padim import PaDiM
from flawsift.detectors.parts.maps import embed_batch, to_image_grid
from flawsift.detectors.parts.neighbors import blocks
from flawsift.detectors.parts.positions import PARAMETER
from flawsift.detectors.quorum import SHARP, Quorum, counted_as
from flawsift.errors import ParameterError
from flawsift.features.backbones import Backbone
from flawsift.models.calibration import Calibration
from flawsift.types import Shape, Size, as_shape

BANK_ROWS = 8192  # of a bank whose distances are made at a time
UNIT = 64  # of norms: a power of two, so that it is a whole number in coarser steps too
COARSEST = 6.0  # two to the power of it is the coarsest: patches 64 times beyond the range of the bank
ZERO = 128  # what stands for nought among unsigned bytes
N_EXACT = 8  # patches, the worst ones, whose distances are measured by subtraction
N_MEASURED = 4  # patches of each of the nearest images that are measured so
RESULTS = 32  # of a resize, made from one window: fewer lose time to windows that overlap, more to zeros
CHUNK = 8  # images of the bank whose distances are made at a time: more do not fit a processor's cache


class Graph(nn.Module):
    """(H, W, 3) uint8 RGB -> score (1,), p-value (1,), verdict (1,) bool and map over the picture, all float32.

    Args:
        backbone: The network that the detector reads.
        detector: Fitted.
        calibration: For the p-value.
        threshold: Scores above it are anomalous.
        region: What counts of each picture; None for all.
        finer: Of a model that aligns, whose graph takes a crop and its `Alignment.to_crop`.
    """

    # long: what a graph is made of
    def __init__(
        self,
        backbone: Backbone,
        detector: Detector,
        calibration: Calibration,
        threshold: float,
        region: Region | None = None,
        finer: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.trunk, self.region, self.finer = backbone.size, backbone.trunk, region, finer
        self.members = {layer: backbone.members(layer) for layer in detector.layers}
        self.detector = _traceable(detector)
        self.reads_pixels = detector.reads_pixels
        self.register_buffer("thresholds", torch.from_numpy(calibration.thresholds.astype(np.float32)))
        self.register_buffer("rates", torch.from_numpy(np.concatenate([[1.0], calibration.rates]).astype(np.float32)))
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))

    def forward(self, image: Tensor, turn: Tensor | None = None) -> tuple[Tensor, ...]:
        pixels, contents = resized(image, self.size)
        taps = sorted({tap for several in self.members.values() for tap in several})
        outputs = dict(zip(taps, self.trunk.taps(pixels[None], taps), strict=True))
        features = {
            layer: torch.stack([outputs[tap] for tap in several]).mean(0) if len(several) > 1 else outputs[several[0]]
            for layer, several in self.members.items()
        }
        features = {layer: values.half().float() for layer, values in features.items()}  # as they are stored
        given = pixels[None] / 255 if self.reads_pixels else None
        batch = Batch(np.zeros(1, np.int64), features, given, self.size, frame=self._frame(contents, turn))
        grids, score = _scored(self.detector, batch)
        maps = to_image_grid(batch.over_image(grids.float()), batch.map_size, self.detector._map_sigma())
        p_value = cast(Tensor, self.rates)[(cast(Tensor, self.thresholds) < score).sum()].reshape(1)
        return score, p_value, score > cast(Tensor, self.threshold), maps[0]

    def _frame(self, contents: Tensor | None, turn: Tensor | None) -> Frame | None:
        shape, contents = as_shape(self.size), None if contents is None else contents[None]
        if self.finer is not None and turn is not None:
            return Frame(shape, contents, turns=turn[None], finer=self.finer)
        return None if contents is None and self.region is None else Frame(shape, contents, self.region)


def resized(image: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
    """(h, w, 3) uint8 to (3, H, W) uint8, as `to_pixels` does with Pillow, and (2,) rows and columns that it takes.

    The latter are None where every image takes all of it.

    Bilinear with antialiasing, across and then down, by weights of 22 bits and rounded after each; large pictures are
    averaged over blocks first. A runtime's own resize rounds otherwise, and one step of a grey value here and there
    moves scores by up to a hundredth.
    """
    height, width = (torch.as_tensor(n) for n in image.shape[:2])  # under the tracer they are inputs of the graph
    shape = as_shape(size)
    contents = None if isinstance(size, int) else _content(height, width, shape)
    rows, columns = (torch.tensor(n).double() for n in shape) if contents is None else contents
    down, across = _block(height, rows), _block(width, columns)
    x = _averaged(image.permute(2, 0, 1), down, across)  # (3, h, w)
    x = _weighted(x.flatten(0, 1).T, width, across, columns, shape[1])  # (W, 3 h)
    x = _weighted(x.view(3 * shape[1], -1).T, height, down, rows, shape[0]).view(*shape, 3)
    return x.permute(2, 0, 1), contents


def _content(height: Tensor, width: Tensor, shape: Shape) -> Tensor:
    """(2,) as `content_of`, as float64."""
    picture = torch.stack([height, width]).double()
    full = torch.tensor(shape, dtype=torch.float64)
    scales = full / picture
    scale = scales.amin(0, keepdim=True)  # not of no dimension, as in `_weighted`
    fitted = (picture * scale + 0.5).floor().clamp_min(1)
    return torch.where(
        scales.amax(0, keepdim=True) <= scale * torch.tensor([STRETCH], dtype=torch.float64), full, fitted
    )


def _block(n: Tensor, size: Tensor) -> Tensor:
    """How many pixels in a row are averaged before `n` are brought to `size`: a whole number."""
    return (n.double() / (size * REDUCING_GAP)).floor().clamp_min(1).long()


def _block_means(x: Tensor, down: int, across: int) -> Tensor:
    """(3, H, W) uint8 to means of blocks, rounded as by Pillow's `reduce`; the last ones may be of fewer pixels."""
    if down == 1 and across == 1:
        return x
    height, width = x.shape[1], x.shape[2]
    h, w = (height + down - 1) // down, (width + across - 1) // across
    padded = F.pad(x.float(), [0, w * across - width, 0, h * down - height])  # whole numbers: quicker as floats
    sums = padded.reshape(3, h, down, w, across).sum([2, 4])
    rows = (height - torch.arange(h) * down).clamp_max(down)
    columns = (width - torch.arange(w) * across).clamp_max(across)
    counts = (rows[:, None] * columns).double()
    share = (16777216 / counts).floor() / 16777216  # of 24 bits, as Pillow has it
    return ((sums.double() + (counts / 2).floor()) * share).floor().to(torch.uint8)


# scripted, so that a graph asks whether there is anything to average
_averaged: Callable[..., Tensor] = cast(Any, torch.jit).script_if_tracing(_block_means)


def _weighted(x: Tensor, n: Tensor, block: Tensor, size: Tensor, full: int) -> Tensor:
    """(cells, R) uint8, means of `block` of n pixels each, to (full, R): the first `size`, then the last one again.

    A result lies on few cells, so a window of them makes `RESULTS` at a time.
    """
    # not of no dimension: the exporter takes such numbers for floats of 32 bits
    edge, to = (n.double() / block).reshape(1).double(), size.reshape(1)
    scale = edge.float().double() / to  # Pillow takes the edge as a float
    reach = scale.clamp_min(1)
    place = torch.arange(-(-full // RESULTS) * RESULTS).double().view(-1, RESULTS)
    centres = (torch.minimum(place, (to - 1).double()) + 0.5) * scale  # (windows, results)
    width: Any = ((RESULTS - 1) * scale + 2 * reach).ceil().long()[0] + 1
    cells = (centres[:, :1] - reach).floor().clamp_min(0) + torch.arange(width).double()  # (windows, width)
    weights = (1 - ((cells[:, None] + 0.5 - centres[..., None]) / reach).abs()).clamp_min(0)
    weights = torch.where((cells < x.shape[0])[:, None], weights, 0)
    whole = (weights / weights.sum(2, keepdim=True) * 2**22 + 0.5).floor()
    high = (whole / 2**11).floor()
    halves = torch.cat([high, whole - high * 2**11], 1).float()  # (windows, 2 results, width): 11 bits each
    there = torch.minimum(cells, torch.as_tensor(x.shape[0]) - 1).long()
    product = halves @ x[there].float()  # (windows, 2 results, R): whole numbers below 2^24, so exact in any order
    high, low = product[:, :RESULTS].int(), product[:, RESULTS:].int()
    return _over(high * 2**11 + low + 2**21, 2**22).to(torch.uint8).flatten(0, 1)[:full]


def _over(a: Tensor | int, b: Tensor | int) -> Tensor:
    """a / b of whole numbers that are not negative, rounded down."""
    return torch.div(a, b, rounding_mode="trunc")


def _traceable(detector: Detector) -> Detector:
    """A copy whose search among patches can be traced."""
    plain = copy.copy(detector)
    cache = vars(plain)["_cache"] = {}
    bank = getattr(detector, "memory_bank_", None)
    if getattr(detector, PARAMETER, None) is not None:
        raise ParameterError("Models that compare tiles by position cannot be exported: fit one without it.")
    if isinstance(detector, Quorum):
        cache["search", "cpu"] = Groups(detector)
    elif bank is not None:
        cache["search", "cpu"] = Neighbors(bank)
    return plain


class Neighbors:
    """`NearestNeighbors.query` of a (M, C) bank, in operations that a graph has.

    Winners are those of one float32 product, their distances are measured by subtraction.
    """

    def __init__(self, bank: Tensor) -> None:
        self.bank, self._mean = bank, bank.mean(0)

    def query(self, queries: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
        """(Q, k) distances and rows of the bank, ascending."""
        wide = _as_query(queries - self._mean)
        values, rows = [], []
        for part in blocks(len(self.bank), BANK_ROWS):
            halves = wide @ _as_key(self.bank[part].float() - self._mean).T  # (Q, rows)
            best = halves.topk(min(k, halves.shape[1]), dim=1, largest=False)
            values.append(best.values)
            rows.append(best.indices + part.start)
        best = torch.cat(values, 1).topk(k, dim=1, largest=False)
        found = torch.cat(rows, 1).gather(1, best.indices)
        distances = (self.bank[found].float() - queries[:, None]).square().sum(2).sqrt()
        distances, order = distances.sort(dim=1)
        return distances, found.gather(1, order)


class Groups:
    """`GroupNeighbors.query` of a `Quorum`, in operations that a graph has: about as exact, and quicker.

    Distances to all images are made of numbers of eight bits, for which processors have units. With q and b centred,
    divided by a step t and rounded, |q - b|^2 / 2 = |q|^2 / 2 + (|b|^2 / 2 - q.b), and what depends on b is one product
    of whole numbers: the norm of b is carried by further columns. A patch beyond the range of the bank is rounded to a
    step of 2 t, or 4 t, and so on. Rounding adds t^2 / 12 for each channel and side, which is taken off. That is within
    a hundredth of the distance; what matters is measured anew by `exact`.
    """

    def __init__(self, detector: Quorum) -> None:
        self.bank = _without_unusable(detector.memory_bank_, detector.usable_)  # (N, P, C) float16
        members: dict[str, list[int]] = {}
        for image, group in enumerate(detector.groups_):
            members.setdefault(group, []).append(image)
        self._n_groups = len(members)
        most = max(map(len, members.values()))
        self._members = torch.tensor([np.resize(images, most).tolist() for images in members.values()])  # (G, most)
        self.k = min(detector.k_, self._n_groups)
        self._mean = self.bank.mean((0, 1), dtype=torch.float32)
        centred = self.bank.float() - self._mean
        self._step = float(centred.abs().max().clamp_min(1e-12)) / 127
        rounded = (centred / self._step).round()
        self._added = float((centred / self._step - rounded).square().sum(2).mean()) / 2  # by rounding one side
        norms = (rounded.square().sum(2) / 2).round().long()  # (N, P)
        n_columns = int(norms.max()) // (UNIT * 127) + 1
        units = torch.stack([(norms // UNIT - 127 * j).clamp(0, 127) for j in range(n_columns)], 2)
        keys = torch.cat([-rounded, units, norms[..., None] % UNIT], 2).to(torch.int8)
        self._n_columns = n_columns
        self._keys = [keys[part].flatten(0, 1).T.contiguous() for part in blocks(len(keys), CHUNK)]  # (W, n P)

    def images(self, queries: Tensor) -> Tensor:
        """(Q, N) about half the squared distances of (Q, C) patches to the nearest patch of each image."""
        rounded, coarser = self._rounded(queries)
        parts = [part.amin(2) for part in self._products(rounded, coarser)]
        halves = torch.cat(parts, 1).float() * coarser + rounded.square().sum(1, keepdim=True) * coarser.square() / 2
        return (halves - self._added * (1 + coarser.square())).clamp_min(0) * self._step**2

    def _rounded(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, C) whole numbers up to 127, and (Q, 1) how many steps one of them stands for."""
        steps = (queries - self._mean) / self._step
        coarser = 2 ** (steps.abs().amax(1, keepdim=True) / 127).clamp_min(1).log2().ceil().clamp_max(COARSEST)
        return (steps / coarser).round().clamp(-127, 127), coarser

    def _products(self, rounded: Tensor, coarser: Tensor) -> Iterator[Tensor]:
        """(Q, n, P) of some images after the other: half the squared distance to each patch, less |q|^2 / 2."""
        unit = UNIT / coarser  # (Q, 1) a whole number
        wide = torch.cat([rounded, unit.expand(-1, self._n_columns), (unit / UNIT).floor()], 1) + ZERO
        bytes_ = wide.to(torch.uint8)
        for keys in self._keys:
            yield _SignedProduct.apply(bytes_, keys).view(len(wide), -1, self.bank.shape[1])

    def query(self, halves: Tensor) -> Tensor:
        """(Q,) means of the distances to the k nearest groups."""
        return (2 * self._by_group(halves).topk(self.k, dim=1, largest=False).values).sqrt().mean(1)

    def exact(self, queries: Tensor, halves: Tensor) -> Tensor:
        """The same, with the distances of twice as many groups measured by subtraction; for a few queries.

        Of each of their images, the patches that seem nearest are measured: rounding may exchange neighbours.
        """
        by_group = self._by_group(halves)
        near = by_group.topk(min(2 * self.k, self._n_groups), dim=1, largest=False).indices  # (Q, G')
        members = self._members[near]  # (Q, G', most)
        if members.shape[2] == 1:
            images = members[..., 0]
        else:  # the nearest image of each group stands for it
            closest = halves.gather(1, members.flatten(1)).view(members.shape).argmin(2, keepdim=True)
            images = members.gather(2, closest)[..., 0]
        seeming = torch.cat(list(self._products(*self._rounded(queries))), 1)  # (Q, N, P)
        patches = self.bank.shape[1]
        of_near = seeming.gather(1, images[..., None].expand(-1, -1, patches))  # (Q, G', P)
        nearest = of_near.float().topk(min(N_MEASURED, patches), dim=2, largest=False).indices
        rows = (images[..., None] * patches + nearest).flatten()
        measured = self.bank.flatten(0, 1)[rows].float().view(*nearest.shape, -1)  # (Q, G', n, C)
        distances = (measured - queries[:, None, None]).square().sum(3).amin(2)
        return distances.topk(self.k, dim=1, largest=False).values.sqrt().mean(1)

    def _by_group(self, halves: Tensor) -> Tensor:
        """(Q, N) to (Q, G): of the nearest image."""
        return halves if self._n_groups == len(self.bank) else halves[:, self._members].amin(2)


def _without_unusable(bank: Tensor, usable: Tensor) -> Tensor:
    """(N, P, C) where the first usable patch of an image stands for those that are not: a copy changes no minimum."""
    first = usable.int().argmax(1)
    stand_in = bank[torch.arange(len(bank)), first][:, None]
    return torch.where(usable[..., None], bank, stand_in)


class _Product(torch.autograd.Function):
    """(Q, W) uint8 times (W, R) of bytes: (Q, R) int32, exact."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double()).int()

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any) -> Any:
        return g.op("MatMulInteger", a, b)


class _SignedProduct(_Product):
    """The same, of (Q, W) uint8 in which `ZERO` stands for nought."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return ((a.double() - ZERO) @ b.double()).int()

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any) -> Any:
        return g.op("MatMulInteger", a, b, g.op("Constant", value_t=torch.tensor(ZERO, dtype=torch.uint8)))


def _as_query(centred: Tensor) -> Tensor:
    """(..., C) to (..., C + 2), whose product with `_as_key` is half the squared distance."""
    return torch.cat([centred, centred.square().sum(-1, keepdim=True) / 2, torch.ones_like(centred[..., :1])], -1)


def _as_key(centred: Tensor) -> Tensor:
    return torch.cat([-centred, torch.ones_like(centred[..., :1]), centred.square().sum(-1, keepdim=True) / 2], -1)


@contextlib.contextmanager
def traceable_pooling() -> Iterator[None]:
    """Adaptive pooling as products with constant matrices: ONNX has none for grids that do not divide evenly."""
    known = {name: getattr(F, name) for name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d")}

    def along(n: int, cells: int) -> Tensor:
        """(cells, n) means, each of the places from floor(i n / cells) to ceil((i + 1) n / cells)."""
        return cast(Tensor, known["adaptive_avg_pool1d"](torch.eye(n)[None], cells)[0].T)

    def pooled(x: Tensor, size: Any) -> Tensor:
        return x @ along(int(x.shape[-1]), int(size)).T

    def pooled2d(x: Tensor, size: Any) -> Tensor:
        rows, columns = (size, size) if isinstance(size, int | Tensor) else size
        return along(int(x.shape[-2]), int(rows)) @ pooled(x, columns)

    try:
        F.adaptive_avg_pool1d, F.adaptive_avg_pool2d = pooled, pooled2d  # type: ignore[assignment]
        yield
    finally:
        for name, function in known.items():
            setattr(F, name, function)


def _scored(detector: Detector, batch: Batch) -> tuple[Tensor, Tensor]:
    """(1, h, w) patch-grid map and (1,) score."""
    if isinstance(detector, PaDiM):
        x, grid = detector._embed(batch)
        white = torch.bmm(detector._make_whitener(0), x - detector.mean_[..., None])  # (P, d, 1)
        maps = batch.only_counted(white.square().sum(1).sqrt().T.reshape(1, *grid))
        return maps, detector._image_scores(maps)
    if not isinstance(detector, Quorum):
        return detector._score_batch(batch, "cpu")
    search: Groups = vars(detector)["_cache"]["search", "cpu"]
    coarse, fine = detector._embed(batch)[0], embed_batch(batch, detector.layers)[0]
    queries, (h, w) = coarse.flatten(1).T, coarse.shape[1:]
    halves = search.images(queries)
    scores = batch.only_counted(search.query(halves).view(1, h, w))[0]
    counted = None if batch.frame is None else batch.frame.counted(h, w)
    # what does not count is as low as the lowest that does: where one place counts, all would be alike
    ranked = scores if counted is None else scores.masked_fill(~counted[0], -1)
    worst = ranked.flatten().topk(min(N_EXACT, len(queries))).indices
    distances = search.exact(queries[worst], halves[worst])
    if counted is not None:
        distances = torch.where(counted.flatten()[worst], distances, 0)
    maps = counted_as(batch, _sharpened(search, fine, scores)[None], int(h), int(w))
    return maps * detector.scale_, distances.amax().reshape(1)


def _sharpened(search: Groups, fine: Tensor, grid: Tensor) -> Tensor:
    """(H, W): `Quorum._sharpened` of one image, with a number of places that does not depend on the scores."""
    h, w, height, width = (int(edge) for edge in (*grid.shape, *fine.shape[1:]))  # constants of the graph
    n_sharp = h * w - math.ceil((1 - SHARP) * (h * w - 1))  # so many are not below the quantile
    owner = np.arange(height)[:, None] // 2 * w + np.arange(width) // 2  # the coarse place of each fine one
    members = [np.flatnonzero(owner == place) for place in range(h * w)]
    four = np.stack([np.resize(some, 4) for some in members])  # at odd borders some repeat
    chosen = torch.from_numpy(four)[grid.flatten().topk(n_sharp).indices].flatten()  # fine places
    sharp = search.query(search.images(fine.flatten(1).T[chosen]))
    return grid.flatten()[torch.from_numpy(owner.ravel())].scatter(0, chosen, sharp).view(height, width)
