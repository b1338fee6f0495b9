"""PaDiM: a Gaussian per patch position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.maps import SIGMA_PER_PIXEL, largest_grid, smooth
from flawsift.detectors.parts.neighbors import in_threads
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError, NotFittedError
from flawsift.features.devices import resolve_device
from flawsift.types import as_shape

CHUNK = 32  # positions that a thread works on at a time: 1.3 MB of 100 x 100 matrices; 16 to 64 are as quick
LARGE_GROUP = 16  # images: larger groups are taken out of the model one by one, as their products grow with the square
FIT_BATCH = 64  # images per pass over the (P, d, d) scatter: larger halves its memory traffic, 64 is 100 MB of features


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of n images at P positions: exactly additive over disjoint sets.

    Attributes:
        n: (P, 1) number of images, at least 1, which differs between positions where patches are left out.
        mean: (P, d).
        scatter: (P, d (d + 1) / 2) sum over images of (x - mean)(x - mean)^T: symmetric, so its lower half is enough.
    """

    n: Tensor
    mean: Tensor
    scatter: Tensor

    def plus(self, other: "Moments") -> "Moments":
        """Statistics of the union (Chan et al. 1979: M2 = M2a + M2b + delta delta^T na nb / n)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = (self.scatter + other.scatter).add_(_packed_square(delta).mul_(self.n * other.n / n))
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def minus(self, other: "Moments") -> "Moments":
        """Statistics of what is left when a part is taken out; `plus` undone."""
        n = self.n - other.n
        mean = self.mean + (self.mean - other.mean) * (other.n / n)
        scatter = (self.scatter - other.scatter).sub_(_packed_square(other.mean - mean).mul_(n * other.n / self.n))
        return Moments(n, mean, scatter)


def _packed_square(delta: Tensor) -> Tensor:
    """(P, d) to the lower half of delta delta^T, (P, d (d + 1) / 2)."""
    rows, columns = torch.tril_indices(delta.shape[1], delta.shape[1])
    return delta[:, rows] * delta[:, columns]


@dataclass(kw_only=True, eq=False)
class PaDiM(Detector):
    """Mahalanobis distance to a Gaussian fitted at each position of the patch grid.

    Taps are brought to the largest grid by nearest-neighbour replication and concatenated; `n_features` channels are
    drawn once. At position p: mu_p = mean, S_p = scatter_p / (N - 1) + eps * diag(v); the map is
    sqrt((x - mu)^T S^-1 (x - mu)), the image score the maximum of the smoothed map.

    Cost: One pass over the features and P Cholesky factors of d x d. The state is the sufficient statistics, so
        models of disjoint sets can be merged, and images taken out again, exactly.
    Contamination: n_a anomalies among N shift a Gaussian by O(n_a / N): mild where defects scatter, strong where
        they recur at one position. In-sample distances saturate at (N - 1)^2 / N for N <= d: a training image's own
        score says nothing there, so stage 1 must use out-of-subset scores.
    Differs from the paper: `standardize` measures eps in units of each channel's variance v (the paper's constant
        assumes ResNet taps; v = 1 in the paper preset); the default leaves out the finest tap, which costs four times
        the positions and lowers the image AUROC with the embedded backbone; smoothing before the image score is done on
        the patch grid with the same Gaussian in image units; in the default that Gaussian scales with the input, as
        with 4 px of any size small inputs lose their small defects (`sigma`); no centre crop.
    Reference: Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR 2021 workshops,
        arXiv 2011.08785, section 3.

    Attributes:
        n_features: Channels kept (d); all where there are fewer.
        eps: Regularisation of the covariance.
        standardize: Whether eps is relative to the channel's variance.
        sigma: Of the Gaussian on maps, in pixels of the network's input; None takes 4 px of 256, scaled with its size.
    """

    name: ClassVar[str] = "padim"
    leaves_out_patches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # section 4.1: ResNet-18 with 100 of 448 channels, epsilon 0.01 (550 of 1792 for WideResNet-50)
        "paper": {
            **{"layers": ("stride4", "stride8", "stride16"), "n_features": 100, "eps": 0.01, "standardize": False},
            "sigma": 4.0,  # at 224 px, in the public code that the field compares with
        },
    }
    layers: Sequence[str] = ("stride8", "stride16")
    n_features: int = 100
    eps: float = 0.01
    standardize: bool = True
    sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("sigma", self.sigma is None or self.sigma >= 0, "not be negative")
        self._require("n_features", self.n_features >= 1, "be at least 1")
        self._require("eps", self.eps > 0, "be positive")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        return self._set(self._moments(data, resolve_device(device)))

    def merged(self, other: Self) -> Self:
        """The model of both training sets, which must be disjoint, without looking at an image again."""
        return self._like(self._stored_moments().plus(other._stored_moments()))

    def without(self, data: ImageSet, *, device: str = "auto") -> Self:
        """The model of the training set less these images, which must all have been in it."""
        if not len(data):
            return self._like(self._stored_moments())
        return self._like(self._stored_moments().minus(self._moments(data, resolve_device(device))))

    def held_out_scores(self, data: ImageSet, *, device: str = "auto") -> npt.NDArray[np.float64]:
        """(N,) scores of images that it was trained on, each as by the model without that image and its group.

        No model is fitted, but for groups of more than `LARGE_GROUP` images. Of n images a group has m, the others are
        n' = n - m. With c = 1 / (n' - 1), B = c scatter + eps diag(v) and K = (x_i - mu)^T B^-1 (x_j - mu) over the
        group, the Woodbury identity gives the squared distances as the diagonal of Z^T (K + c K (I - 1 1^T / n - c
        K)^-1 K) Z with Z = I + 1 1^T / n'; for m = 1 that is n / (n - 1) K / ((n - 1) / n - c K). Patches that were
        rejected are scored but not taken out: they were never in, though B still counts them among the m. v is that of
        all images.

        Raises:
            InputError: The patch grid is another one.
            NotFittedError: It is not fitted.
        """
        moments, target = self._stored_moments(), resolve_device(device)
        groups, scores = data.members.values(), np.empty(len(data))
        for group in (group for group in groups if len(group) > LARGE_GROUP):
            held_out = data.select(data.ids[group])
            rest = self.without(held_out, device=device)
            scores[group] = rest.predict(held_out, device=device, maps=False).scores
        for size in sorted({len(group) for group in groups if len(group) <= LARGE_GROUP}):
            alike = [position for group in groups if len(group) == size for position in group]
            image_scores: list[Tensor] = []
            whitener = self._make_whitener(size).to(target)
            for batch in data.select(data.ids[alike]).batches(self.layers, batch_size=FIT_BATCH // size * size):
                products = self._products(batch, whitener, target, size)
                accepted = batch.accepted(*self.grid_)
                if accepted is None:
                    learned = torch.ones(products.shape[:3])
                else:
                    learned = accepted.flatten(1).T.reshape(products.shape[:3])
                maps = _held_out_norms(products.cpu(), learned, moments.n).T.reshape(-1, *self.grid_)
                image_scores.append(self._image_scores(batch.only_counted(maps)))
            scores[alike] = torch.cat(image_scores).numpy()
        return scores

    def _maps(self, batch: Batch, device: str) -> Tensor:
        distances = self._products(batch, self._whitener(device), device, 1).flatten(1).sqrt_()  # (P, B)
        return distances.T.reshape(-1, *self.grid_)

    def _products(self, batch: Batch, whitener: Tensor, device: str, m: int) -> Tensor:
        """(P, G, m, m) inner products of the whitened patches, less their mean, of each m images in turn."""
        x, grid = self._embed(batch)
        if grid != self.grid_:
            raise InputError(
                f"PaDiM was fitted on a patch grid of {self.grid_}, these features have {grid}. "
                "Use the input size it was fitted with."
            )
        if device == "cpu":
            return _whitened_products(whitener, x, self.mean_, m)
        white = torch.bmm(whitener, x.to(device) - self.mean_.to(device).unsqueeze(2))
        columns = white.reshape(*white.shape[:2], -1, m)
        return torch.einsum("pdgi,pdgj->pgij", columns, columns)

    def _image_scores(self, maps: Tensor) -> Tensor:
        share = SIGMA_PER_PIXEL if self.sigma is None else self.sigma / self.size_
        return smooth(maps, share * maps.shape[2]).amax((1, 2))

    def _map_sigma(self) -> float | None:
        return self.sigma

    def _embed(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """(P, d, B): the drawn channels of all taps at the positions of the largest grid, and that grid's (h, w).

        Sub-models that look at one batch share it.
        """
        key = (self.name, self.layers, self.n_features, self.seed)
        if key not in batch.memo:
            taps = [batch.features[layer] for layer in self.layers]
            grid = list(largest_grid(taps))
            parts, start = [], 0
            for tap in taps:
                mine = self.channels_[(self.channels_ >= start) & (self.channels_ < start + tap.shape[1])] - start
                # copied at its own size, in the order that batched products like, then repeated position by position
                own = tap[:, mine].flatten(2).permute(2, 1, 0).contiguous()
                parts.append(own[_replication(list(tap.shape[2:]), grid)])
                start += tap.shape[1]
            batch.memo[key] = torch.cat(parts, 1), grid
        embedded: tuple[Tensor, list[int]] = batch.memo[key]
        return embedded

    def _moments(self, data: ImageSet, device: str) -> Moments:
        n, total, scatter, shift = None, None, None, None
        for batch in data.batches(self.layers, batch_size=FIT_BATCH):
            if "channels_" not in vars(self):
                self._draw_channels(batch)
            embedded, self.grid_ = self._embed(batch)
            self.size_ = max(as_shape(batch.size))  # models of before, whose Gaussian scales, have none
            x = embedded.to(device)  # (P, d, B)
            accepted = batch.accepted(*self.grid_)
            weights = x.new_ones(x.shape[0], len(batch)) if accepted is None else accepted.flatten(1).T.to(x)  # (P, B)
            counts = weights.sum(1, keepdim=True)
            # sums about the first batch's mean do not cancel in float32
            if shift is None:
                shift = (x * weights.unsqueeze(1)).sum(2, keepdim=True) / counts.clamp_min(1).unsqueeze(2)
            x = x - shift
            if accepted is not None:
                x *= weights.unsqueeze(1)
            if n is None or total is None or scatter is None:
                n, total, scatter = counts, x.sum(2), x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
            else:
                n += counts
                total += x.sum(2)
            _add_squares(scatter, x)
        if n is None or total is None or scatter is None or shift is None:
            raise InputError("PaDiM.fit needs at least one image, got an empty set.")
        n.clamp_min_(1)  # a position without patches: the mean is the first batch's, the variance the regularisation
        mean = total / n
        scatter.addcmul_(total.unsqueeze(2), mean.unsqueeze(1), value=-1)
        return Moments(n.cpu(), (mean + shift.squeeze(2)).cpu(), _packed(scatter.cpu()))

    def _draw_channels(self, batch: Batch) -> None:
        """One draw per seed, shared by all sub-models, so that their statistics can be added."""
        n_all = sum(batch.features[layer].shape[1] for layer in self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        self.channels_ = torch.randperm(n_all, generator=generator)[: self.n_features].sort().values

    def _set(self, moments: Moments) -> Self:
        self.counts_, self.mean_, self.scatter_ = moments.n, moments.mean, moments.scatter
        return self

    def _like(self, moments: Moments) -> Self:
        drawn = {name: value for name, value in self.state().items() if name in ("channels_", "grid_", "size_")}
        return self.with_state(drawn)._set(moments)

    def _stored_moments(self) -> Moments:
        if not self.fitted:
            raise NotFittedError("This PaDiM is not fitted yet; call fit(images) first.")
        return Moments(self.counts_, self.mean_, self.scatter_)

    def _whitener(self, device: str) -> Tensor:
        """(P, d, d) inverse Cholesky factors: distance = |L^-1 (x - mu)|."""
        return self._cached("whitener", device, lambda: self._make_whitener(0).to(device))

    def _make_whitener(self, n_held_out: int) -> Tensor:
        """(P, d, d) as `_whitener`, of scatter / (n - n_held_out - 1) + eps diag(v)."""
        unit = torch.ones(self.mean_.shape[1])
        if self.standardize:
            within = (self.scatter_[:, _diagonal(len(unit))] / (self.counts_ - 1).clamp_min(1)).mean(0)
            unit = within + self.mean_.var(0, correction=0)
            unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        degrees = (self.counts_ - n_held_out - 1).clamp_min(1)  # (P, 1)
        return _inverse_factors(self.scatter_, 1 / degrees, self.eps * unit)


def _replication(small: list[int], large: list[int]) -> Tensor:
    """(P,) for each cell of the large grid, row by row, the cell of the small one: nearest neighbour."""
    rows = torch.arange(large[0]) * small[0] // large[0]
    columns = torch.arange(large[1]) * small[1] // large[1]
    return (rows[:, None] * small[1] + columns).flatten()


def _lower(d: int) -> npt.NDArray[np.int64]:
    """(d (d + 1) / 2,) places of the lower half in a flattened d x d matrix, row by row."""
    rows, columns = np.tril_indices(d)
    return rows * d + columns


def _diagonal(d: int) -> npt.NDArray[np.int64]:
    """(d,) places of the diagonal in a packed lower half."""
    return np.cumsum(np.arange(1, d + 1)) - 1


def _packed(symmetric: Tensor) -> Tensor:
    """(P, d, d) symmetric matrices to their lower halves, (P, d (d + 1) / 2)."""
    full = symmetric.flatten(1).numpy()
    lower = _lower(symmetric.shape[1])
    packed = np.empty((len(full), len(lower)), np.float32)
    _by_position(len(full), lambda part: np.take(full[part], lower, axis=1, out=packed[part], mode="clip"))
    return torch.from_numpy(packed)


def _by_position(n: int, work: Callable[[slice], object]) -> None:
    """`work` on blocks of n positions that fit into the processor's cache, in threads."""
    in_threads(work, (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)))


def _add_squares(scatter: Tensor, x: Tensor) -> None:
    """Add x x^T of (P, d, B) to scatter (P, d, d), in place.

    In-sample covariances are nearly singular: a last bit here is 1e-4 of a score. torch's products on the CPU are those
    of MKL, which promises equal bits to nobody; these are of one thread each, position by position.
    """
    if x.device.type != "cpu":
        scatter.baddbmm_(x, x.transpose(1, 2))
        return
    sums, values = scatter.numpy(), x.numpy()

    def work(part: slice) -> None:
        sums[part] += np.matmul(values[part], values[part].transpose(0, 2, 1))

    _by_position(len(values), work)


def _whitened_products(whitener: Tensor, x: Tensor, mean: Tensor, m: int) -> Tensor:
    """(P, G, m, m) products of the columns of whitener (P, d, d) times (x - mean) of (P, d, G m), on the CPU."""
    factors, values, centres = whitener.numpy(), x.numpy(), mean.numpy()
    n, d, n_columns = values.shape
    products = np.empty((n, n_columns // m, m, m), np.float32)

    def work(part: slice) -> None:
        white = np.matmul(factors[part], values[part] - centres[part, :, None])
        if m == 1:  # five times quicker than products of single columns
            np.einsum("pdb,pdb->pb", white, white, out=products[part, :, 0, 0])
        else:
            columns = white.reshape(len(white), d, -1, m)
            np.matmul(columns.transpose(0, 2, 3, 1), columns.transpose(0, 2, 1, 3), out=products[part])

    _by_position(n, work)
    return torch.from_numpy(products)


def _held_out_norms(products: Tensor, learned: Tensor, n: Tensor) -> Tensor:
    """(P, G m) distances without a patch's own group, from the (P, G, m, m) products of `PaDiM.held_out_scores`.

    learned (P, G, m) tells whose patches the statistics of n (P, 1) images contain. Where no other group has such a
    patch, nothing is left to compare with, and it is scored by what was learned of itself.
    """
    k, w, n = products.double(), learned.double(), n.double().unsqueeze(2)  # n: (P, 1, 1)
    w = torch.where(w.sum(2, keepdim=True) < n, w, 0.0)
    m = k.shape[3]
    others = (n - w.sum(2, keepdim=True)).clamp_min(1)  # (P, G, 1)
    c = (1 / (others - 1).clamp_min(1)).unsqueeze(3)
    eye = torch.eye(m, dtype=k.dtype)
    shift = (w / others).unsqueeze(3)  # what leaving the group out does to the mean: column i is w / n'
    left = k @ (eye + shift)  # K Z
    seen = w.unsqueeze(3) * left
    inner = eye - w.unsqueeze(3) * w.unsqueeze(2) * (1 / n.unsqueeze(3) + c * k)
    squared = ((eye + shift) * left).sum(2) + c.squeeze(3) * (seen * torch.linalg.solve(inner, seen)).sum(2)
    norms: Tensor = squared.clamp_min_(0).sqrt_().flatten(1).float()
    return norms


def _inverse_factors(packed: Tensor, scale: Tensor, ridge: Tensor) -> Tensor:
    """(P, d, d) inverses of the lower Cholesky factors of scale * S + diag(ridge), at each position.

    S comes as packed (P, d (d + 1) / 2) halves, scale as (P, 1), ridge as (d,). Made on the CPU, once: a
    GPU has no faster way for such small matrices.
    """
    halves, scales, d = packed.numpy(), scale.numpy(), len(ridge)
    lower, inverses = _lower(d), np.empty((len(halves), d, d), np.float32)

    def work(part: slice) -> None:
        covariance = np.zeros((part.stop - part.start, d * d), np.float32)
        covariance[:, lower] = halves[part] * scales[part]  # Cholesky reads nothing else
        covariance[:, :: d + 1] += ridge.numpy()
        square = covariance.reshape(-1, d, d)
        try:
            factor = np.linalg.cholesky(square)
        except np.linalg.LinAlgError:
            factor = np.stack([_nearest_factor(matrix) for matrix in square])
        for position, matrix in zip(range(part.start, part.stop), factor, strict=True):
            inverses[position] = lapack.strtri(matrix.T, lower=0)[0].T

    _by_position(len(halves), work)
    return torch.from_numpy(inverses)


def _nearest_factor(lower: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Lower Cholesky factor of a (d, d) matrix; where rounding has made it indefinite, of the nearest definite one."""
    try:
        factor: npt.NDArray[np.float32] = np.linalg.cholesky(lower)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(lower.astype(np.float64))
        floor = max(values[-1], np.finfo(np.float32).tiny) * np.finfo(np.float32).eps
        mended = vectors * np.maximum(values, floor) @ vectors.T
        factor = np.linalg.cholesky(mended).astype(np.float32)
    return factor
