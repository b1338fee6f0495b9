"""Distances of pairs of vectors by class, and mutual matches: what methods for contaminated sets assume."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flawsift.detectors.parts.neighbors import mutual_pairs
from flawsift.types import Floats

N_PAIRS = 20_000  # of each kind: a mean within 1 %, a histogram without ragged bins
N_BINS = 48
NORMAL_NORMAL, NORMAL_ANOMALY, ANOMALY_ANOMALY, ALL = "normal-normal", "normal-anomaly", "anomaly-anomaly", "all"


@dataclass(frozen=True)
class Matching:
    """Mutual matches: two vectors that are among each other's k nearest.

    Attributes:
        k: Neighbours of each.
        matched: Share of all vectors in a mutual pair.
        true_normal: Share of the normal vectors in a pair of two normal ones; None without labels.
        true_anomaly: Share of the anomalous vectors in a pair of two anomalous ones.
        false: Share of all vectors in a mixed pair.
    """

    k: int
    matched: float
    true_normal: float | None = None
    true_anomaly: float | None = None
    false: float | None = None


def pair_distances(
    vectors: Tensor, labels: Tensor | None = None, *, owners: Tensor | None = None, n: int = N_PAIRS, seed: int = 0
) -> dict[str, Floats]:
    """{kind of pair: (n,) Euclidean distances}, equally many of each kind; without labels one kind, "all".

    Args:
        vectors: (N, C).
        labels: (N,) True for anomalous.
        owners: (N,) image of each; pairs of one image are left out. By default only a vector with itself is.
        n: Pairs of each kind, drawn with replacement.
        seed: Of the draw.

    Returns:
        Kinds that have no pair are absent.
    """
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(len(vectors)) if owners is None else owners
    flags = torch.zeros(len(vectors), dtype=torch.bool) if labels is None else labels.bool()
    normal, anomalous = (~flags).nonzero()[:, 0], flags.nonzero()[:, 0]
    sides = {NORMAL_NORMAL: (normal, normal), NORMAL_ANOMALY: (normal, anomalous)}
    sides |= {ANOMALY_ANOMALY: (anomalous, anomalous)}
    distances = {}
    for kind, (left, right) in ({ALL: (normal, normal)} if labels is None else sides).items():
        if not len(left) or not len(right) or len(torch.unique(torch.cat([own[left], own[right]]))) < 2:
            continue
        parts, count = [], 0
        while count < n:
            a = left[torch.randint(len(left), (n,), generator=generator)]
            b = right[torch.randint(len(right), (n,), generator=generator)]
            a, b = a[own[a] != own[b]][: n - count], b[own[a] != own[b]][: n - count]
            parts.append((vectors[a] - vectors[b]).norm(dim=1))
            count += len(a)
        distances[kind] = torch.cat(parts).double().numpy()
    return distances


def matching(vectors: Tensor, labels: Tensor | None = None, *, k: int = 1, owners: Tensor | None = None) -> Matching:
    """Shares of (N, C) vectors in mutual matches; `labels` (N,) and `owners` (N,) as in `examine`."""
    pairs = mutual_pairs(vectors, k=k, owners=owners)
    matched = len(torch.unique(pairs)) / len(vectors)
    if labels is None:
        return Matching(k, matched)
    left, right = labels.bool()[pairs].unbind(1)

    def share(which: Tensor, of: int) -> float:
        return len(torch.unique(pairs[which])) / max(1, of)

    n_anomalous = int(labels.sum())
    true_normal = share(~left & ~right, len(labels) - n_anomalous)
    return Matching(k, matched, true_normal, share(left & right, n_anomalous), share(left ^ right, len(labels)))


def chance_below(a: Floats, b: Floats) -> float:
    """The chance that a draw from (n,) is below one from (m,); ties count half."""
    ordered = np.sort(b)
    above = len(b) - np.searchsorted(ordered, a, "right") + len(b) - np.searchsorted(ordered, a, "left")
    return float(above.mean() / (2 * len(b)))


def histogram(distances: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
    """(N_BINS + 1,) shared edges, and the density of each kind of pair in the bins."""
    joined = np.concatenate(list(distances.values()))
    low, high = float(joined.min()), float(joined.max())
    if high <= low:  # copies only
        high = low + max(1.0, abs(low))
    edges = np.linspace(low, high, N_BINS + 1)
    return edges, {kind: np.histogram(values, edges, density=True)[0] for kind, values in distances.items()}
