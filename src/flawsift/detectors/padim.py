"""PaDiM: a Gaussian per patch position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.detector import Detector, resolve_device
from flawsift.errors import InputError, NotFittedError
from flawsift.images import Batch, ImageSet
from flawsift.maps import SIGMA_PER_PIXEL, smooth

CHUNK = 128  # positions factorised at a time: 5 MB of 100 x 100 matrices
LEAF = 24  # triangular matrices up to this size are inverted row by row, larger ones by halves
FIT_BATCH = 64  # images per pass over the (P, d, d) scatter: larger halves its memory traffic, 64 is 100 MB of features


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of n images at P positions: exactly additive over disjoint sets.

    Attributes:
        n: Number of images.
        mean: (P, d).
        scatter: (P, d, d) sum over images of (x - mean)(x - mean)^T.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    def plus(self, other: "Moments") -> "Moments":
        """Statistics of the union (Chan et al. 1979: M2 = M2a + M2b + delta delta^T na nb / n)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter.baddbmm_(delta.unsqueeze(2), delta.unsqueeze(1), alpha=self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def minus(self, other: "Moments") -> "Moments":
        """Statistics of what is left when a part is taken out; `plus` undone."""
        n = self.n - other.n
        mean = self.mean + (self.mean - other.mean) * (other.n / n)
        delta = other.mean - mean
        scatter = self.scatter - other.scatter
        scatter.baddbmm_(delta.unsqueeze(2), delta.unsqueeze(1), alpha=-n * other.n / self.n)
        return Moments(n, mean, scatter)


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
        the positions and lowers the image AUROC with the embedded backbone; smoothing before the image score is done on the patch grid
        with the same Gaussian in image units; no centre crop.
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

    def fit(self, data: ImageSet, *, device: str = "auto") -> Self:
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
        x = self._embed(batch).to(device)
        if list(x.shape[2:]) != self.grid_:
            raise InputError(
                f"PaDiM was fitted on a patch grid of {self.grid_}, these features have {list(x.shape[2:])}. "
                "Use the input size it was fitted with."
            )
        h, w = self.grid_
        delta = x.flatten(2).permute(2, 1, 0).contiguous()  # (P, d, B)
        delta -= self.mean_.to(device).unsqueeze(2)
        return torch.bmm(whitener, delta).square_().sum(1).sqrt_().T.reshape(-1, h, w)

    def _image_scores(self, maps: Tensor) -> Tensor:
        return smooth(maps, SIGMA_PER_PIXEL * maps.shape[2]).amax((1, 2))

    def _embed(self, batch: Batch) -> Tensor:
        """(B, d, h, w): the drawn channels of all taps on the largest grid."""
        taps = [batch.features[layer] for layer in self.layers]
        grid = max((tap.shape[2:] for tap in taps), key=lambda s: s[0] * s[1])
        parts, start = [], 0
        for tap in taps:
            mine = self.channels_[(self.channels_ >= start) & (self.channels_ < start + tap.shape[1])] - start
            parts.append(F.interpolate(tap[:, mine], size=tuple(grid), mode="nearest"))
            start += tap.shape[1]
        return torch.cat(parts, 1)

    def _moments(self, data: ImageSet, device: str) -> Moments:
        n, total, scatter, shift = 0, None, None, None
        for batch in data.batches(self.layers, batch_size=FIT_BATCH):
            if "channels_" not in vars(self):
                self._draw_channels(batch)
            x = self._embed(batch).to(device)
            self.grid_ = list(x.shape[2:])
            x = x.flatten(2).permute(2, 0, 1).contiguous()  # (P, B, d); batched products of strided views crawl
            # sums about the first batch's mean do not cancel in float32
            shift = x.mean(1, keepdim=True) if shift is None else shift
            x = x - shift
            if total is None or scatter is None:
                total = torch.zeros_like(x[:, 0])
                scatter = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
            total += x.sum(1)
            scatter.baddbmm_(x.transpose(1, 2), x)
            n += len(batch)
        if total is None or scatter is None or shift is None:
            raise InputError("PaDiM.fit needs at least one image, got an empty set.")
        scatter.baddbmm_(total.unsqueeze(2), total.unsqueeze(1), alpha=-1.0 / n)
        return Moments(n, (total / n + shift.squeeze(1)).cpu(), scatter.cpu())

    def _draw_channels(self, batch: Batch) -> None:
        """One draw per seed, shared by all sub-models, so that their statistics can be added."""
        n_all = sum(batch.features[layer].shape[1] for layer in self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        self.channels_ = torch.randperm(n_all, generator=generator)[: self.n_features].sort().values

    def _set(self, moments: Moments) -> Self:
        d = moments.mean.shape[1]
        rows, columns = torch.tril_indices(d, d)
        self.n_images_ = moments.n
        self.mean_ = moments.mean
        self.scatter_ = moments.scatter[:, rows, columns]  # (P, d (d + 1) / 2): symmetric, so half is enough
        vars(self).pop("_cached_whitener", None)
        return self

    def _like(self, moments: Moments) -> Self:
        other = self.clone()
        other.channels_, other.grid_ = self.channels_, self.grid_
        return other._set(moments)

    def _stored_moments(self) -> Moments:
        if not self.fitted:
            raise NotFittedError("This PaDiM is not fitted yet; call fit(images) first.")
        d = self.mean_.shape[1]
        rows, columns = torch.tril_indices(d, d)
        full = self.scatter_.new_empty(len(self.scatter_), d, d)
        full[:, rows, columns] = self.scatter_
        full[:, columns, rows] = self.scatter_
        return Moments(self.n_images_, self.mean_, full)

    def _whitener(self, device: str) -> Tensor:
        """(P, d, d) inverse Cholesky factors: distance = |L^-1 (x - mu)|. Made once, never saved."""
        cached: Tensor | None = vars(self).get("_cached_whitener")
        if cached is None or cached.device.type != torch.device(device).type:
            moments = self._stored_moments()
            covariance = moments.scatter.to(device).div_(max(moments.n - 1, 1))
            diagonal = covariance.diagonal(dim1=1, dim2=2)  # (P, d), a view
            unit = torch.ones_like(diagonal[0])
            if self.standardize:
                unit = diagonal.mean(0) + moments.mean.to(device).var(0, correction=0)
                unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            diagonal += self.eps * unit
            cached = covariance
            for part in torch.split(cached, CHUNK):  # in place, position by position: a chunk stays in the cache
                part.copy_(_invert_lower(_cholesky(part)))
            vars(self)["_cached_whitener"] = cached
        return cached


def _cholesky(covariance: Tensor) -> Tensor:
    """Lower factors of (n, d, d); where rounding has made a matrix indefinite, of the nearest definite one."""
    # not linalg.inv: Cholesky is better conditioned, and batched LU fails in some MKL builds
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bad := failed.nonzero()[:, 0].tolist():
        values, vectors = torch.linalg.eigh(covariance[bad].double())
        floor = values[:, -1:].clamp_min(torch.finfo(torch.float32).tiny) * torch.finfo(torch.float32).eps
        mended = vectors * values.clamp_min(floor).unsqueeze(1) @ vectors.mT
        factor[bad] = torch.linalg.cholesky(mended).float()
    return factor


def _invert_lower(factor: Tensor) -> Tensor:
    """Inverses of (n, d, d) lower triangular matrices, by batched products of halves.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]; LAPACK's own goes matrix by matrix, 5 times slower.
    """
    d = factor.shape[1]
    out = torch.zeros_like(factor)
    if d <= LEAF:
        diagonal = factor.diagonal(dim1=1, dim2=2)
        for row in range(d):  # forward substitution of the identity
            above = torch.bmm(factor[:, row : row + 1, :row], out[:, :row, :row]).squeeze(1)
            out[:, row, :row] = -above / diagonal[:, row, None]
            out[:, row, row] = 1 / diagonal[:, row]
        return out
    half = d // 2
    upper = _invert_lower(factor[:, :half, :half].contiguous())
    lower = _invert_lower(factor[:, half:, half:].contiguous())
    out[:, :half, :half], out[:, half:, half:] = upper, lower
    out[:, half:, :half] = -(lower @ (factor[:, half:, :half].contiguous() @ upper))
    return out
