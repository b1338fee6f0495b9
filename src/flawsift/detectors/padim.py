"""PaDiM: a Gaussian per patch position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from flawsift.detector import Detector, resolve_device
from flawsift.errors import InputError, NotFittedError
from flawsift.images import Batch, ImageSet
from flawsift.maps import SIGMA_PER_PIXEL, smooth
from flawsift.training import UNWATCHED, Watch

CHUNK = 128  # positions factorised at a time: 5 MB of 100 x 100 matrices
FIT_BATCH = 64  # images per pass over the (P, d, d) scatter: larger halves its memory traffic, 64 is 100 MB of features


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of n images at P positions: exactly additive over disjoint sets.

    Attributes:
        n: Number of images.
        mean: (P, d).
        scatter: (P, d (d + 1) / 2) sum over images of (x - mean)(x - mean)^T: symmetric, so its lower half is enough.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    def plus(self, other: "Moments") -> "Moments":
        """Statistics of the union (Chan et al. 1979: M2 = M2a + M2b + delta delta^T na nb / n)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = (self.scatter + other.scatter).add_(_packed_square(delta), alpha=self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def minus(self, other: "Moments") -> "Moments":
        """Statistics of what is left when a part is taken out; `plus` undone."""
        n = self.n - other.n
        mean = self.mean + (self.mean - other.mean) * (other.n / n)
        scatter = (self.scatter - other.scatter).sub_(_packed_square(other.mean - mean), alpha=n * other.n / self.n)
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
        the positions and lowers the image AUROC with the embedded backbone; smoothing before the image score is done
        on the patch grid with the same Gaussian in image units; no centre crop.
    Reference: Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR 2021 workshops,
        arXiv 2011.08785, section 3.

    Attributes:
        n_features: Channels kept (d); all where there are fewer.
        eps: Regularisation of the covariance.
        standardize: Whether eps is relative to the channel's variance.
    """

    name: ClassVar[str] = "padim"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # section 4.1: ResNet-18 with 100 of 448 channels, epsilon 0.01 (550 of 1792 for WideResNet-50)
        "paper": {"layers": ("stride4", "stride8", "stride16"), "n_features": 100, "eps": 0.01, "standardize": False},
    }
    layers: Sequence[str] = ("stride8", "stride16")
    n_features: int = 100
    eps: float = 0.01
    standardize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def _maps(self, batch: Batch, device: str) -> Tensor:
        whitener = self._whitener(device)
        x, grid = self._embed(batch)
        if grid != self.grid_:
            raise InputError(
                f"PaDiM was fitted on a patch grid of {self.grid_}, these features have {grid}. "
                "Use the input size it was fitted with."
            )
        delta = x.to(device) - self.mean_.to(device).unsqueeze(2)  # (P, d, B)
        distances: Tensor = torch.bmm(whitener, delta).square_().sum(1).sqrt_()  # (P, B)
        return distances.T.reshape(-1, *grid)

    def _image_scores(self, maps: Tensor) -> Tensor:
        return smooth(maps, SIGMA_PER_PIXEL * maps.shape[2]).amax((1, 2))

    def _embed(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """(P, d, B): the drawn channels of all taps at the positions of the largest grid, and that grid's (h, w).

        Sub-models that look at one batch share it.
        """
        key = (self.name, self.layers, self.n_features, self.seed)
        if key not in batch.memo:
            taps = [batch.features[layer] for layer in self.layers]
            grid = max((list(tap.shape[2:]) for tap in taps), key=lambda s: s[0] * s[1])
            parts, start = [], 0
            for tap in taps:
                mine = self.channels_[(self.channels_ >= start) & (self.channels_ < start + tap.shape[1])] - start
                # copied at its own size, in the order that batched products like, then repeated position by position
                own = tap[:, mine].flatten(2).permute(2, 1, 0).contiguous()
                parts.append(own[_replication(list(tap.shape[2:]), grid)])
                start += tap.shape[1]
            batch.memo[key] = torch.cat(parts, 1), grid
        found: tuple[Tensor, list[int]] = batch.memo[key]
        return found

    def _moments(self, data: ImageSet, device: str) -> Moments:
        n, total, scatter, shift = 0, None, None, None
        for batch in data.batches(self.layers, batch_size=FIT_BATCH):
            if "channels_" not in vars(self):
                self._draw_channels(batch)
            embedded, self.grid_ = self._embed(batch)
            x = embedded.to(device)  # (P, d, B)
            # sums about the first batch's mean do not cancel in float32
            shift = x.mean(2, keepdim=True) if shift is None else shift
            x = x - shift
            if total is None or scatter is None:
                total = torch.zeros_like(x[:, :, 0])
                scatter = x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
            total += x.sum(2)
            scatter.baddbmm_(x, x.transpose(1, 2))
            n += len(batch)
        if total is None or scatter is None or shift is None:
            raise InputError("PaDiM.fit needs at least one image, got an empty set.")
        scatter.baddbmm_(total.unsqueeze(2), total.unsqueeze(1), alpha=-1.0 / n)
        d = total.shape[1]
        rows, columns = torch.tril_indices(d, d, device=total.device)
        packed = scatter.flatten(1).index_select(1, rows * d + columns)
        return Moments(n, (total / n + shift.squeeze(2)).cpu(), packed.cpu())

    def _draw_channels(self, batch: Batch) -> None:
        """One draw per seed, shared by all sub-models, so that their statistics can be added."""
        n_all = sum(batch.features[layer].shape[1] for layer in self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        self.channels_ = torch.randperm(n_all, generator=generator)[: self.n_features].sort().values

    def _set(self, moments: Moments) -> Self:
        self.n_images_, self.mean_, self.scatter_ = moments.n, moments.mean, moments.scatter
        vars(self).pop("_cached_whitener", None)
        return self

    def _like(self, moments: Moments) -> Self:
        other = self.clone()
        other.channels_, other.grid_ = self.channels_, self.grid_
        return other._set(moments)

    def _stored_moments(self) -> Moments:
        if not self.fitted:
            raise NotFittedError("This PaDiM is not fitted yet; call fit(images) first.")
        return Moments(self.n_images_, self.mean_, self.scatter_)

    def _whitener(self, device: str) -> Tensor:
        """(P, d, d) inverse Cholesky factors: distance = |L^-1 (x - mu)|. Made once, never saved."""
        cached: Tensor | None = vars(self).get("_cached_whitener")
        if cached is None or cached.device.type != torch.device(device).type:
            cached = _unpacked(self.scatter_.to(device)).div_(max(self.n_images_ - 1, 1))
            diagonal = cached.diagonal(dim1=1, dim2=2)  # (P, d), a view
            unit = torch.ones_like(diagonal[0])
            if self.standardize:
                unit = diagonal.mean(0) + self.mean_.to(device).var(0, correction=0)
                unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            diagonal += self.eps * unit
            for part in torch.split(cached, CHUNK):  # in place: a chunk stays in the processor's cache
                part.copy_(_invert_lower(_cholesky(part)))
            vars(self)["_cached_whitener"] = cached
        return cached


def _replication(small: list[int], large: list[int]) -> Tensor:
    """(P,) for each cell of the large grid, row by row, the cell of the small one: nearest neighbour."""
    rows = torch.arange(large[0]) * small[0] // large[0]
    columns = torch.arange(large[1]) * small[1] // large[1]
    return (rows[:, None] * small[1] + columns).flatten()


def _unpacked(packed: Tensor) -> Tensor:
    """(P, d (d + 1) / 2) lower halves to (P, d, d) symmetric matrices."""
    d = int((2 * packed.shape[1]) ** 0.5)
    rows, columns = torch.tril_indices(d, d, device=packed.device)
    place = torch.empty(d, d, dtype=torch.int64, device=packed.device)
    place[rows, columns] = place[columns, rows] = torch.arange(packed.shape[1], device=packed.device)
    return packed.index_select(1, place.flatten()).view(-1, d, d)


def _invert_lower(factor: Tensor) -> Tensor:
    """Inverses of (n, d, d) lower triangular matrices."""
    if factor.device.type != "cpu":
        eye = torch.eye(factor.shape[1], device=factor.device)
        solved: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        return solved
    # torch starts threads for every small matrix, and waits seconds for them on a busy machine
    inverses = [lapack.strtri(matrix.T, lower=0)[0].T for matrix in factor.numpy()]
    return torch.from_numpy(np.stack(inverses))


def _cholesky(covariance: Tensor) -> Tensor:
    """Lower factors of (n, d, d); where rounding has made a matrix indefinite, of the nearest definite one."""
    # not linalg.inv: Cholesky is better conditioned, and batched LU fails in some MKL builds
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bad := failed.nonzero()[:, 0].tolist():
        values, vectors = torch.linalg.eigh(covariance[bad].double())
        floor = values[:, -1:].clamp_min(torch.finfo(torch.float32).tiny) * torch.finfo(torch.float32).eps
        mended = vectors * values.clamp_min(floor).unsqueeze(1) @ vectors.mT
        factor[bad] = torch.linalg.cholesky(mended).float()
    found: Tensor = factor
    return found
